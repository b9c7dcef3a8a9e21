"""Measuring and keeping cost curves: the numbers, what is left behind, and files that are not what they should be."""

from __future__ import annotations

import argparse
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from fixed_costs import verify_ms
from observers import snapshot
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape, learned, threads
from hf_dovetail.calibrate import _spread, calibrate
from hf_dovetail.calibrate_command import add_calibrate_parser, table
from hf_dovetail.costs import WINDOW
from hf_dovetail.curves import ROW_POINTS, CostCurves, curves_path, load_curves, replace_file, save_curves
from hf_dovetail.learned import describe, keep, learned_of

CURVES = CostCurves(ROW_POINTS, (64, 512), (tuple([1.0] * 7), tuple([2.0] * 7)), 0.5, 0.01, 0.25, 0.1, 0.2)


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    """Where curves are kept."""
    return own_cache / "curves"


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the curves' file warns of."""
    messages: list[str] = []
    monkeypatch.setattr("hf_dovetail.curves.logger.warning_once", messages.append)
    return messages


@pytest.mark.parametrize("kind", tiny.DRAFTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "lfm2"])
def test_calibration_leaves_nothing_behind(family: str, kind: str, cache: Path) -> None:
    """Guards caches, hooks, the mode of the models, and the random generator; for trees and for chains."""
    target = tiny.build(family)
    lm = tiny.build("llama")
    draft = tiny.draft_for(target, "untrained") if kind == "untrained" else tiny.draft_for(lm, kind)
    draft.meet(target)
    before, state = (snapshot(target), snapshot(draft)), torch.get_rng_state()
    curves = calibrate(target, draft, progress=False, budget_s=0.05)
    assert (snapshot(target), snapshot(draft)) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert curves.rows == ROW_POINTS
    assert len(curves.contexts) == (1 if family == "lfm2" else 2)  # a chain's cache is not filled by repeating
    assert min(min(line) for line in curves.verify) > 0
    assert curves.first_ms > 0
    assert [load_curves(path) for path in cache.glob("*.json")] == [curves]
    tiny.both(target, draft, tiny.prompt())
    tiny.both(target, draft, tiny.prompt(), do_sample=True)


def test_calibrated_curves_are_used_and_probing_is_over(llama: PreTrainedModel, ids: Tensor) -> None:
    draft = tiny.draft_for(llama, "noisy")
    draft.meet(llama)
    assert not learned_of(draft, llama).costs.measured
    curves = calibrate(llama, draft, progress=False, budget_s=0.05)
    assert learned_of(draft, llama).costs.curves == curves
    assert learned_of(draft, llama).costs.measured
    draft.tree = "auto"
    tiny.both(llama, draft, ids)
    other = tiny.draft_for(llama, "noisy")  # as in another process
    other.meet(llama)
    assert learned_of(other, llama).costs.curves == curves


def test_the_file_is_of_this_setting_only(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the key: threads, attention, geometry and the machine make different files; a second look does not."""
    draft = tiny.draft_for(llama, "untrained")
    draft.meet(llama)
    path = curves_path(describe(llama, draft))
    assert path == curves_path(describe(llama, draft))
    assert path != curves_path(describe(tiny.build("llama", num_hidden_layers=2), draft))
    assert path != curves_path(describe(tiny.build("llama", attention="eager"), draft))
    assert path != curves_path(describe(llama, tiny.draft_for(llama, "noisy")))
    for name, value in (("chosen_threads", 99), ("cpu_name", "another"), ("engine_of", "another")):
        with monkeypatch.context() as changed:
            changed.setattr(learned, name, lambda *arguments, value=value: value)
            assert path != curves_path(describe(llama, draft))
    draft._quantise(8, "this draft")
    assert path != curves_path(describe(llama, draft))


def test_curves_survive_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = curves_path({"a": 1})
    assert path.parent == tmp_path / "hf" / "hf_dovetail" / "curves"
    assert load_curves(path) is None
    assert save_curves(CURVES, path, {"a": 1})
    assert load_curves(path) == CURVES
    assert save_curves(CURVES.scaled(2, 3), path, {"a": 1})
    assert load_curves(path) == CURVES.scaled(2, 3) != CURVES
    assert list(path.parent.iterdir()) == [path]


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path, warned: list[str]) -> None:
    """Guards the temporary name, which is each write's own; whoever reads meanwhile finds one of the files, whole."""
    path, both = tmp_path / "folder" / "curves.json", (CURVES, CURVES.scaled(2, 3))
    written: list[bool] = []
    read: list[CostCurves | None] = []

    def write(curves: CostCurves) -> None:
        for _ in range(50):
            written.append(save_curves(curves, path, {}))
            read.append(load_curves(path))

    workers = [threading.Thread(target=write, args=(curves,)) for curves in both * 2]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert written == [True] * 200
    assert set(read) <= set(both)
    assert warned == []
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, warned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "curves.json", tmp_path / "folder"
    folder.mkdir()
    assert not save_curves(CURVES, folder, {})  # which stands where the file should
    assert len(warned) == 1
    assert str(folder) in warned[0]
    assert list(tmp_path.iterdir()) == [folder]
    assert save_curves(CURVES, path, {})
    before = path.read_bytes()

    def interrupt(self: Path, target: Path) -> None:
        assert self.read_bytes() == b"new"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"new")
    assert path.read_bytes() == before
    assert {*tmp_path.iterdir()} == {folder, path}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-40],
        lambda text: "[1, 2]",
        lambda text: text.replace("level_ms", "level"),
        lambda text: text.replace('"first_ms": 0.5', '"first_ms": "often"'),
        lambda text: text.replace('"first_ms": 0.5', '"first_ms": NaN'),
        lambda text: text.replace('"first_ms": 0.5', '"first_ms": -1'),
        lambda text: text.replace('"curves"', '"curve"'),
        lambda text: text.replace('"first_ms"', '"more": 1, "first_ms"'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"format": 1', '"form": 1'),
        lambda text: text.replace("512", "Infinity"),
        lambda text: text.replace('"first_ms": 0.5', f'"first_ms": 1{"0" * 400}'),
        lambda text: text.replace('"first_ms": 0.5', f'"first_ms": {"[" * 99999}{"]" * 99999}'),
        lambda text: "\x00\xff" * 9,
    ],
)
def test_a_damaged_file_is_a_warning_and_decoding_goes_on(
    damage: Callable[[str], str], warned: list[str], llama: PreTrainedModel, ids: Tensor
) -> None:
    draft = tiny.draft_for(llama, "untrained")
    draft.meet(llama)
    path = keep(draft, llama, CURVES)
    whole = path.read_text(encoding="utf-8")
    assert damage(whole) != whole
    path.write_bytes(damage(whole).encode("latin-1"))
    draft.tree = "auto"
    tiny.both(llama, draft, ids)
    assert len(warned) == 1
    assert str(path) in warned[0]
    assert "run hf-dovetail calibrate" in warned[0]
    assert not learned_of(draft, llama).costs.measured


def test_a_cache_that_cannot_be_written_is_a_warning(
    cache: Path, warned: list[str], llama: PreTrainedModel, ids: Tensor
) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("in the way", encoding="utf-8")
    draft = tiny.draft_for(llama, "untrained")
    curves = calibrate(llama, draft, progress=False, budget_s=0.05)
    assert curves.level_ms >= 0
    assert "could not be kept" in warned[0]
    draft.tree = "auto"
    tiny.both(llama, draft, ids)


def test_stored_curves_are_rewritten_when_the_machine_has_left_them(llama: PreTrainedModel, ids: Tensor) -> None:
    """The rule is in test_controller; here it reaches the file, once, at the end of a call."""
    draft = tiny.draft_for(llama, "untrained")
    draft.meet(llama)
    path = keep(draft, llama, CURVES)
    costs = learned_of(draft, llama).costs
    learned_of(draft, llama).refresh()
    assert load_curves(path) == CURVES
    for _ in range(WINDOW):
        costs.learn_verify(4, 64, 3.0)
    learned_of(draft, llama).refresh()
    stored = load_curves(path)
    assert stored == costs.curves
    assert verify_ms(stored, 4, 64) == pytest.approx(3.0)
    assert stored.level_ms == CURVES.level_ms


def test_the_draft_must_fit(llama: PreTrainedModel) -> None:
    other = tiny.draft_for(tiny.build("llama", hidden_size=64), "untrained")
    with pytest.raises(ValueError, match="64"):
        calibrate(llama, other, progress=False)


def test_a_short_model_and_a_wide_draft(ids: Tensor) -> None:
    """Guards contexts beyond the last position, and a draft that runs out of positions while it is timed."""
    target = tiny.build("gpt2", n_positions=48)
    draft: DovetailAssistantModel = tiny.draft_for(target, "untrained")
    curves = calibrate(target, draft, progress=False, budget_s=0.05)
    assert len(curves.contexts) == 1
    assert curves.contexts[0] <= 48 - 32
    draft.tree = TreeShape()
    tiny.both(target, draft, ids, max_new_tokens=20)


def test_the_table_shows_every_number() -> None:
    text = table(CURVES)
    for number in ("     64 |", "    512 |", "2.00", "0.25 ms", "0.010 ms", "0.50 ms"):
        assert number in text


def command(*words: str) -> None:
    """Run `hf-dovetail calibrate` with these words."""
    parser = argparse.ArgumentParser()
    add_calibrate_parser(parser.add_subparsers())
    arguments = parser.parse_args(["calibrate", *words])
    arguments.run(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "x"], "both --target and --draft"),
        (["--budget-s", "0"], "seconds, more than 0"),
        (["--budget-s", "inf"], "seconds, more than 0"),
        (["--plot", "curve.unknown"], "curve.unknown|needs? matplotlib"),
    ],
)
def test_bad_options(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        command(*words)


def test_the_command_measures_keeps_and_draws(
    tmp_path: Path, cache: Path, llama: PreTrainedModel, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    llama.save_pretrained(tmp_path / "target")
    tiny.draft_for(llama, "untrained").save_pretrained(tmp_path / "draft")
    models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    command(*models, "--engine", "eager", "--budget-s", "0.05", "--plot", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").stat().st_size > 10_000
    [curves] = [load_curves(path) for path in cache.glob("*.json")]
    assert table(curves) in capsys.readouterr().out


def test_what_is_no_draft_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match="draft is a LlamaForCausalLM; expected a DovetailAssistantModel"):
        calibrate(llama, llama, progress=False)


def test_passes_are_timed_with_the_threads_of_a_round(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards curves of another number of threads than their file says; torch's own number stays, errors included."""
    before, chosen, seen = torch.get_num_threads(), torch.get_num_threads() + 1, set()
    monkeypatch.setattr(threads, "chosen_threads", lambda: chosen)
    draft = tiny.draft_for(llama, "noisy")
    watched = llama.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        calibrate(llama, draft, progress=False, budget_s=0.01)
    finally:
        watched.remove()
    assert seen == {chosen}
    assert torch.get_num_threads() == before


def test_a_busy_machine_is_told_from_a_quiet_one(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the user against curves that say nothing; one hiccup, or a slow size, is no busy machine."""
    messages: list[str] = []
    monkeypatch.setattr("hf_dovetail.calibrate.logger.warning", lambda text, *values: messages.append(text % values))
    draft = tiny.draft_for(llama, "noisy")
    generator = random.Random(0)
    for slowest, budget_s, warns in ((1.05, 0.5, False), (1.05, 0.0, False), (6.0, 0.5, True), (6.0, 0.0, True)):

        def timed(verifier: object, rows: int, cores: object, slowest: float = slowest) -> float:
            return 0.01 * rows * generator.uniform(1.0, slowest)

        monkeypatch.setattr("hf_dovetail.calibrate._verify_ms", timed)
        messages.clear()
        calibrate(llama, draft, progress=False, budget_s=budget_s)
        assert bool(messages) == warns
    assert "busy" in messages[0]
    steady = [[1.0, 9.0]] * 8
    assert _spread([*steady, [7.0, 9.0]]) == 0.0
    assert _spread([[1.0, 9.0], [2.0, 3.0], [3.0, 15.0]]) == pytest.approx(0.5)
