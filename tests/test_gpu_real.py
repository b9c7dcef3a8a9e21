"""scripts/gpu_real at toy size on the CPU: all four steps, a run that was killed, and bad use."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

from gpu_real import corpus, measure, timed  # noqa: E402
from gpu_real.cli import main  # noqa: E402
from gpu_real.plan import TOY  # noqa: E402


def step(name: str, work: Path, minutes: float = 0.02, *more: str) -> None:
    main([name, "--toy", "--work", str(work), "--minutes", str(minutes), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which data and target are made, the target in two runs, the first of which was killed."""
    work = tmp_path_factory.mktemp("work")
    step("data", work)
    with pytest.MonkeyPatch.context() as patch:
        save = timed.TimedRun.save

        def save_and_die(run: timed.TimedRun) -> None:
            save(run)
            raise KeyboardInterrupt

        patch.setattr(timed.TimedRun, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            step("target", work, 0.05)
    assert not (work / "target" / "training.json").exists()
    killed = torch.load(work / "target" / "checkpoint.pt", weights_only=True)
    step("target", work, 0.05)
    found = json.loads((work / "target" / "training.json").read_text())
    assert found["resumed"] == 1
    assert found["steps"] > killed["step"] > 0
    assert found["log_elapsed_s_step_loss"][: len(killed["log"])] == [list(entry) for entry in killed["log"]]
    assert not (work / "target" / "checkpoint.pt").exists()
    return work


def test_all_steps_give_a_result_that_says_what_was_done(made: Path, capsys: pytest.CaptureFixture) -> None:
    step("draft", made, 0.04, "--blocks", "1")
    out = made / "result.json"
    step("measure", made, 1.0, "--out", str(out), "--threads", "1", "--engines", "eager", "no-such-engine")
    result = json.loads(out.read_text())
    assert result["complete"]
    assert result["answered"] == TOY.prompts == len(result["prompts"])
    assert result["record"]["processor"]["usable_cores"] >= 1
    assert len(result["record"]["source_sha256"]) == 64
    assert result["threads"]["chosen"] == 1
    packages = {package["name"]: package for package in result["corpus"]["packages"]}
    assert packages["python"]["licence"] == "PSF-2.0"
    assert sum(package["tokens"] for package in packages.values()) == result["corpus"]["train_tokens"] > 10_000
    assert result["target"]["tokens"] == result["target"]["steps"] * TOY.tokens_per_step
    losses = [entry[2] for entry in result["target"]["log_elapsed_s_step_loss"]]
    assert losses[-1] < losses[0]
    assert result["drafts"][0]["blocks"] == 1
    assert {row["engine"] for row in result["refused"]} >= {"no-such-engine"}
    rows = {(row["method"], row["shape"], row["sampling"]): row for row in result["rows"]}
    assert rows["plain", None, "greedy"]["speedup"] == 1.0
    fixed = rows["dovetail", "16/7/10", "greedy"]
    assert fixed["identical_to_plain"] <= fixed["answers"] == TOY.prompts, "bf16 promises no more of a toy"
    assert fixed["tokens_per_round"] >= 1.0
    assert fixed["draft_ms_per_round"] > 0 < fixed["verify_ms_per_round"]
    assert rows["dovetail", "16/7/10", "temperature_1"]["answers"] == 1
    assert "prompt_lookup" in capsys.readouterr().out


def test_a_finished_step_is_not_done_again(made: Path) -> None:
    before = (made / "target" / "model.safetensors").stat().st_mtime_ns
    step("target", made)
    assert (made / "target" / "model.safetensors").stat().st_mtime_ns == before


def test_bad_use_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cases = [
        (("target", tmp_path / "none"), "run the step `data` first"),
        (("draft", tmp_path / "none"), "run the step `target` first"),
        (("measure", tmp_path / "none"), "run the step `target` first"),
        (("data", tmp_path / "none", -1.0), "--minutes is -1.0"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stopped:
            step(*arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_of_another_size_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = timed.adamw(model, 0.0, torch.device("cpu"))
    timed.TimedRun(tmp_path / "c.pt", model, optimizer, 1.0, 1.0, {"layers": 2}, 0.0).save()
    with pytest.raises(ValueError, match="its layers is 2, this run's is 3"):
        timed.TimedRun(tmp_path / "c.pt", model, optimizer, 1.0, 1.0, {"layers": 3}, 0.0)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = timed.adamw(model, 0.0, torch.device("cpu"))
    run = timed.TimedRun(tmp_path / "c.pt", model, optimizer, 1e9, 0.0, {}, 0.0)
    seen = []

    def losses(step: int) -> list[torch.Tensor]:
        seen.append(step)
        return [model.weight.sum() * (float("nan") if step == 3 else 1.0)]

    with pytest.raises(FloatingPointError, match="at step 3"):
        timed.optimize(run, losses, 1e-3, 1, 1.0)
    assert seen == [0, 1, 2, 3]
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 3
    assert torch.isfinite(saved["model"]["weight"]).all()


def test_the_rate_warms_up_by_steps_and_falls_to_zero_with_time() -> None:
    assert timed.rate(0, 10, 0.0) == pytest.approx(0.1)
    assert timed.rate(0, 10, 0.3) == pytest.approx(0.1), "minutes of compilation must not end the warm-up"
    assert timed.rate(99, 10, 0.4) == 1.0
    assert timed.rate(99, 10, 0.7) == pytest.approx(0.5)
    assert timed.rate(99, 10, 1.0) == 0.0


def test_what_a_measurement_asks_is_not_in_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = sorted(corpus.telling_lines())[0]
    (tmp_path / "clean.py").write_text("x = 1\n")
    (tmp_path / "known.py").write_text(f"def f():\n    {line}\n")
    (tmp_path / "again.py").write_text("x = 1\n")
    part = corpus.Part("made up", "1", "MIT")
    monkeypatch.setattr(corpus, "package_roots", lambda: [(part, tmp_path)])
    parts, left_out = corpus.read_parts(None)
    assert parts[0].training + parts[0].held_out == ["x = 1\n"]
    assert left_out["contains a HumanEval prompt"] == left_out["same text as another"] == 1


def test_tokens_are_the_texts(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "corpus")
    texts = ["def f(x):\n    return x\n", "é = 1\n"]
    stream = corpus.encode(tokenizer, texts)
    assert stream.dtype == np.uint16
    assert tokenizer.decode(stream.tolist()) == "".join(tokenizer.eos_token + text for text in texts)


def test_medians_and_ratios_are_those_of_the_answers() -> None:
    def answer(method: str, prompt: int, wall_ms: float, ids: list[int], **more: float) -> dict:
        label = measure.Label("eager", method, *(() if method == "plain" else (1, "cpu", "16/7/10")))
        return {**vars(label), "sampling": "greedy", "prompt": prompt, "wall_ms": wall_ms, "ids": ids, **more}

    times = {"draft_ms": 4.0, "verify_ms": 8.0, "overhead_ms": 2.0, "rounds": 2, "drafted": 32}
    records = [answer("plain", i, 100.0 + i, [1, 2, 3, 4, 5]) for i in range(3)]
    records += [answer("dovetail", i, 50.0, [1, 2, 3, 4, 5 + (i == 2)], **times) for i in range(3)]
    plain, dovetail = measure.summarize(records)
    assert plain["ms_per_token_median"] == pytest.approx(20.2)
    assert dovetail["speedup"] == dovetail["speedup_over_eager"] == pytest.approx(2.02)
    assert dovetail["identical_to_plain"] == 2
    assert dovetail["tokens_per_round"] == 2.0
    assert (dovetail["draft_ms_per_round"], dovetail["verify_ms_per_round"]) == (2.0, 4.0)
