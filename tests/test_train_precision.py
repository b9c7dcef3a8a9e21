"""The precision of training: what the machine is fast in, unless it is given or a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training import ROOT

from hf_dovetail.cli import main
from hf_dovetail.demo import pair_path
from hf_dovetail.train import loop, steps

COMMAND = [
    *("train", "--target", str(pair_path("target")), "--data", str(ROOT / "hf_dovetail" / "target.py")),
    *("--steps", "2", "--batch", "2", "--window", "32", "--warmup", "1"),
]


@pytest.mark.parametrize(
    ("has_bf16", "given", "precision"),
    [
        (True, [], "bf16"),
        (False, [], "no"),
        (False, ["--precision", "bf16"], "bf16"),
        (True, ["--recipe", "paper"], "bf16"),
    ],
)
def test_the_precision_is_what_the_cpu_has_unless_it_is_given(
    has_bf16: bool, given: list[str], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "has_bf16", lambda: has_bf16)
    assert main([*COMMAND, "--out", str(tmp_path / "draft"), *given]) == 0
    assert json.loads((tmp_path / "draft" / "recipe.json").read_text())["precision"] == precision


def test_a_run_goes_on_in_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Guards a folder of bf16 from before the choice, or from another machine: the same command goes on."""

    def interrupted(run: object) -> None:
        raise OSError("interrupted")

    command = [*COMMAND, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(steps, "has_bf16", lambda: True)
        patch.setattr(loop, "_finish", interrupted)
        assert main(command) == 2
    monkeypatch.setattr(steps, "has_bf16", lambda: False)
    assert main([*command, "--precision", "no"]) == 2
    assert "its recipe.precision is bf16, this run's is no" in capsys.readouterr().err
    assert main(command) == 0
    assert json.loads((tmp_path / "recipe.json").read_text())["precision"] == "bf16"


def test_only_a_cpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "has_bf16", lambda: False)
    assert [steps.fast_precision(torch.device(name)) for name in ("cpu", "cuda", "xpu")] == ["no", "bf16", "bf16"]
