"""The loop: a killed run goes on with the same losses, parts and processes change nothing, validation, full disks."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training import RECIPE, ROOT, Interrupting, losses, metrics, new_draft, weights

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.demo import pair_path
from hf_dovetail.recipe import PAPER, Recipe, default_recipe
from hf_dovetail.train import Extras, hold_out, loop, train_draft, validate
from hf_dovetail.train.checkpoints import Progress
from hf_dovetail.train.losses import distribution_distances
from hf_dovetail.train.tracking import CsvTracker, trackers


def test_a_step_in_parts_is_the_same_step(target, windows, tmp_path: Path) -> None:
    """Noise, order and the share of what counts do not depend on how a step is split; the batch does matter."""
    whole = train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "whole")
    parts = train_draft(new_draft(target), target, windows, replace(RECIPE, accumulate=2), tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-3, atol=1e-4)
    train_draft(new_draft(target), target, windows, replace(RECIPE, batch=2), tmp_path / "half")
    assert losses(tmp_path / "half") != pytest.approx(losses(tmp_path / "whole"), rel=1e-3)
    with pytest.raises(ValueError, match=r"4 windows do not fall into 3 equal parts on 1 processes; .* multiple of 3"):
        train_draft(new_draft(target), target, windows, replace(RECIPE, accumulate=3), tmp_path / "uneven")


KILLED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from training import RECIPE, load_target, new_draft
from hf_dovetail.train import Windows, train_draft
torch.set_num_threads(1)
data = torch.load(Path(sys.argv[1]) / "data.pt")
target = load_target()
train_draft(new_draft(target), target, Windows(data["ids"], data["counted"]), RECIPE, Path(sys.argv[1]) / "cut")
"""


def test_a_killed_run_goes_on_with_the_same_losses(target, windows, tmp_path: Path) -> None:
    """SIGKILL behind the first checkpoint: every later loss, and the weights, are those of a run that nobody killed."""
    torch.save({"ids": windows.ids, "counted": windows.counted}, tmp_path / "data.pt")
    command = [sys.executable, "-c", KILLED.format(tests=str(ROOT / "tests")), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoint" / "run.json").exists():
        assert process.poll() is None, "the run ended before its first checkpoint was seen"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "recipe.json").exists()
    resumed = train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "cut")
    whole = train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "whole")
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [str(step) for step in range(1, 9)]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_kill_between_two_renamings_loses_nothing(target, windows, tmp_path: Path) -> None:
    """The old checkpoint has its other name, the new one not yet its own."""
    stopping = replace(RECIPE, steps=8, save_every=3)
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(windows, 5), stopping, tmp_path / "cut")
    (tmp_path / "cut" / "checkpoint").rename(tmp_path / "cut" / "checkpoint.old")
    left = Interrupting(windows, 5)  # 3 of 8 steps are done; a run from the start would be interrupted again
    train_draft(new_draft(target), target, left, stopping, tmp_path / "cut")
    train_draft(new_draft(target), target, windows, stopping, tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert not list((tmp_path / "cut").glob("checkpoint*"))


def test_a_full_disk_leaves_the_last_checkpoint(target, windows, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; the run goes on from its checkpoint afterwards."""
    recipe, out = replace(RECIPE, save_every=1), tmp_path / "full"
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(windows, 4), recipe, out)
    with no_file_beyond(500_000), pytest.raises(OSError, match=r"could not write a checkpoint to .*before is intact"):
        train_draft(new_draft(target), target, windows, recipe, out)
    assert (out / "checkpoint" / "run.json").exists()
    assert not (out / "checkpoint.new").exists()
    train_draft(new_draft(target), target, Interrupting(windows, 4), recipe, out)
    train_draft(new_draft(target), target, windows, recipe, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def test_whatever_cannot_be_written_is_named_and_the_run_goes_on(target, windows, tmp_path: Path) -> None:
    """A line of figures, cut off in its middle, and the finished draft: the error says what, and nothing is lost."""
    recipe, out = replace(RECIPE, save_every=2), tmp_path / "full"
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(windows, 3), recipe, out)
    with (out / "metrics.csv").open("a") as file:
        file.write("1")  # of a number of two digits
    before, csv = (out / "metrics.csv").read_text(), CsvTracker(out / "metrics.csv")
    with no_file_beyond(60), pytest.raises(OSError, match=r"could not write the figures of all steps to .*metrics.csv"):
        csv.keep_until(2)
    assert (out / "metrics.csv").read_text() == before
    with pytest.raises(OSError, match=r"could not write the figures of a step to /dev/full .*No space left"):
        CsvTracker(Path("/dev/full")).log({"loss": 1.0}, step=3)
    with pytest.raises(OSError, match=r"could not write the finished draft to .*full .*run the same command again"):
        train_draft(new_draft(target), target, windows, recipe, out, extras=Extras(_Unsaved()))
    assert not (out / "recipe.json").exists()
    train_draft(new_draft(target), target, windows, recipe, out)
    train_draft(new_draft(target), target, windows, recipe, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


class _Unsaved:
    """A tokenizer whose files do not fit on the disk."""

    def save_pretrained(self, folder: Path) -> None:
        raise OSError(28, "No space left on device")


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_validation_decodes_keeps_the_best_and_stops_early(target, windows, tmp_path: Path) -> None:
    """A rate that ruins a good draft step by step: training stops, and the finished draft is the best one."""
    text, prompts = hold_out(windows, 2)
    recipe = replace(RECIPE, steps=40, learning_rate=0.05, warmup=20, validate_every=2, patience=2)
    extras = Extras(prompts=prompts, new_tokens=32)
    good = DovetailAssistantModel.from_pretrained(pair_path("draft"), dtype=torch.float32)
    trained = train_draft(good, target, text, recipe, tmp_path, extras=extras)
    rows = metrics(tmp_path)
    rates = [float(row["tokens_per_round"]) for row in rows if row["tokens_per_round"]]
    assert len(rows) < 40
    assert len(rates) == len(rows) // 2
    assert rates.index(max(rates)) == len(rates) - 3  # two validations without a better one
    again = validate(trained, target, prompts, 32)
    assert max(rates) > 1.2 * rates[-1]
    assert again.tokens_per_round == pytest.approx(max(rates), abs=1e-6)
    assert not (tmp_path / "best").exists()
    assert float(rows[-1]["depth_1"]) >= float(rows[-1]["depth_2"])
    card = (tmp_path / "README.md").read_text()
    assert f"{max(rates):.2f}, greedy on held-out prompts" in card


def test_validation_leaves_the_draft_and_the_run_as_they_were(target, windows, tmp_path: Path) -> None:
    prompts = list(windows.ids[:2].long().split(1))
    draft = new_draft(target).train()
    draft.tree = "auto"
    found = validate(draft, target, prompts, 12)
    assert draft.training
    assert draft.tree == "auto"
    assert draft.last_stats is None
    validate(draft.eval(), target, prompts[:1], 4)
    assert not draft.training
    assert found.rounds == pytest.approx(2 * 11 / found.tokens_per_round)
    extras = Extras(prompts=prompts, new_tokens=8)
    train_draft(new_draft(target), target, windows, replace(RECIPE, validate_every=2), tmp_path / "with", extras=extras)
    train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "without")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    with pytest.raises(ValueError, match="validate_every is 2, but there are no prompts"):
        train_draft(new_draft(target), target, windows, replace(RECIPE, validate_every=2), tmp_path / "none")


def test_bf16_and_float32_in_one_process(target, windows, tmp_path: Path) -> None:
    """Guards accelerate's shared state, which keeps the first precision of a process."""
    for precision in ("no", "bf16", "no"):
        recipe = replace(RECIPE, steps=2, precision=precision)
        train_draft(new_draft(target), target, windows, recipe, tmp_path / f"{precision}{time.monotonic_ns()}")
    first, second, third = (losses(path) for path in sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns))
    assert first == third != second == pytest.approx(first, rel=0.02)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_muon_trains_the_matrices(target, windows, tmp_path: Path) -> None:
    """Muon's updates are nearly orthogonal, so that their singular values are alike; AdamW's are not."""
    alike = {}
    for name in ("muon", "adamw"):
        recipe = replace(RECIPE, optimizer=name, steps=1, batch=16)  # enough tokens for a gradient of full rank
        trained = train_draft(new_draft(target), target, windows, recipe, tmp_path / name)
        step = trained.layers[0].mlp.up_proj.weight - new_draft(target).layers[0].mlp.up_proj.weight
        singular = torch.linalg.svdvals(step.detach())
        alike[name] = float(singular.median() / singular[0])
    assert alike["muon"] > 0.6 > 4 * alike["adamw"], alike


def test_top_k_distillation_with_all_tokens_is_the_whole_distribution(target, windows, tmp_path: Path) -> None:
    for name, k in (("all", 0), ("whole", 4095), ("few", 4)):
        train_draft(new_draft(target), target, windows, replace(RECIPE, steps=3, top_k=k), tmp_path / name)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "all"), rel=1e-4)
    assert losses(tmp_path / "few") != pytest.approx(losses(tmp_path / "all"), rel=1e-2)


def test_distances_on_the_likeliest_tokens_are_by_hand() -> None:
    """The target's two likeliest tokens, their probabilities summing to 1, against the draft's whole distribution."""
    teacher = torch.tensor([[[9.0, 9.0, 9.0, 9.0], [2.0, -1.0, 1.0, 0.0]]])
    logits = torch.tensor([[[0.3, 0.1, -0.2, 0.5]]])
    wanted = torch.tensor([2.0, 1.0]).softmax(0)
    by_hand = -(wanted * logits.log_softmax(-1)[0, 0, [0, 2]]).sum()
    assert distribution_distances(teacher, 2)(logits, 1).item() == pytest.approx(by_hand.item())


def test_progress_is_restored_whole() -> None:
    """Guards early stopping after a resume: validations since the best one count on."""
    progress = Progress(7, torch.Generator().manual_seed(3))
    assert [progress.note(rate) for rate in (2.0, 1.5, 2.0)] == [True, False, False]
    restored = Progress(0, torch.Generator())
    restored.load_state_dict(progress.state_dict())
    assert (restored.step, restored.best, restored.since_best) == (7, 2.0, 2)
    assert torch.rand(1, generator=restored.generator) == torch.rand(1, generator=progress.generator)


def test_schedules_warm_up_and_end_near_zero() -> None:
    for schedule in ("linear", "cosine", "plateau"):
        recipe = Recipe(steps=100, warmup=10, learning_rate=1.0, schedule=schedule)
        rates = [recipe.rate(step) for step in range(100)]
        assert rates[0] <= 0.1
        assert max(rates) > 0.89
        assert rates[99] < 0.03
        assert rates[9:] == sorted(rates[9:], reverse=True)
    assert Recipe(steps=100, warmup=1, learning_rate=1.0, schedule="plateau").rate(49) == 1.0
    with pytest.raises(ValueError, match=r"Recipe\.schedule is 'step'; expected one of linear, cosine, plateau"):
        Recipe(schedule="step")


def test_the_papers_recipe_is_the_papers() -> None:
    assert (PAPER.learning_rate, PAPER.betas, PAPER.warmup) == (3e-5, (0.9, 0.95), 2000)
    assert (PAPER.feature_weight, PAPER.distribution_weight, PAPER.noise, PAPER.unroll) == (1.0, 0.1, 0.1, 1)


def test_the_default_rate_falls_with_the_width() -> None:
    assert default_recipe(192, muon=True).learning_rate == 2e-2
    assert default_recipe(768, muon=True).learning_rate == pytest.approx(1e-2)
    assert default_recipe(768, muon=False).learning_rate == pytest.approx(1e-3)
    assert [default_recipe(768, muon).optimizer for muon in (True, False)] == ["muon", "adamw"]


def test_tensorboard_is_written_or_its_absence_said(target, windows, tmp_path: Path) -> None:
    extras = Extras(log_with=("tensorboard",))
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="tensorboard is not installed; pip install tensorboard"):
            train_draft(new_draft(target), target, windows, RECIPE, tmp_path, extras=extras)
        return
    train_draft(new_draft(target), target, windows, replace(RECIPE, steps=2), tmp_path, extras=extras)
    assert list((tmp_path / "training").glob("events.out.tfevents.*"))


def test_a_tracker_that_is_not_there_is_not_passed_over() -> None:
    """Guards accelerate's way: it leaves out what is not installed, without a word."""
    with pytest.raises(ValueError, match="there is no tracker 'nonsense'; expected all, or some of aim, tensorboard"):
        trackers(["nonsense"], Path("metrics.csv"))
    if not find_spec("aim"):
        with pytest.raises(ValueError, match="aim is not installed; pip install aim, or leave out --log-with aim"):
            trackers(["aim"], Path("metrics.csv"))
    assert trackers([], Path("metrics.csv"))[1][0].tracker == Path("metrics.csv")


def test_a_gradient_that_is_not_finite_is_kept_out_of_the_checkpoint(
    target, windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite loss with a gradient that is not: the checkpoint stays as it was, and goes on with a lower rate."""
    whole_loss, calls = loop.DraftLoss.forward, []

    def forward(module: loop.DraftLoss, *arguments: Any) -> Tensor:
        calls.append(None)
        loss = whole_loss(module, *arguments)
        return loss + (loss.detach() - loss).abs().sqrt() if len(calls) == 4 else loss  # the root's slope at 0

    monkeypatch.setattr(loop.DraftLoss, "forward", forward)
    recipe = replace(RECIPE, save_every=1)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is nan at step 4; lower learning_rate"):
        train_draft(new_draft(target), target, windows, recipe, tmp_path)
    assert len(losses(tmp_path)) == 3
    before = losses(tmp_path)
    with pytest.raises(ValueError, match=r"its recipe.learning_rate is 0.003, this run's is 0.03"):
        train_draft(new_draft(target), target, windows, replace(recipe, learning_rate=0.03), tmp_path)
    train_draft(new_draft(target), target, windows, replace(recipe, learning_rate=0.001), tmp_path)
    assert losses(tmp_path)[:3] == before
    assert len(losses(tmp_path)) == recipe.steps
    assert json.loads((tmp_path / "recipe.json").read_text())["learning_rate"] == 0.001


def test_the_finished_folder_is_complete(target, tokenizer, windows, tmp_path: Path) -> None:
    extras = Extras(tokenizer, data=["target.py"])
    train_draft(new_draft(target), target, windows, replace(RECIPE, steps=2), tmp_path, extras=extras)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "README.md", "recipe.json", "metrics.csv", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    card = (tmp_path / "README.md").read_text()
    assert "| data | target.py |" in card
    assert "| learning_rate | 0.003 |" in card
    assert (
        f"{len(windows)} windows of 32 tokens, of which {windows.counted.sum():,} of {windows.counted.numel():,}"
        in card
    )
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 2
