"""benchmarks/gpu_check.py: its dry run, its synthetic acceptance, and a step that fails."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from two_devices import Accelerator

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_check


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict]:
    """Runs the script; returns what it wrote."""

    def start(*arguments: str) -> dict:
        out = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--out", str(out)])
        gpu_check.main()
        return json.loads(out.read_text())

    return start


def test_the_dry_run_does_all_steps_and_a_failure_stops_none(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(size: gpu_check.Size) -> dict:
        raise RuntimeError("no tests today")

    monkeypatch.setitem(gpu_check.STEPS, "tests", fails)
    result = run("--dry-run")
    assert result["dry_run"]
    assert result["tests"]["failed"] == "RuntimeError: no tests today"
    assert result["latency"]["cases"][0]["total_ms"] > 0
    assert result["demo_pair"]["identical"]
    assert result["demo_pair"]["tokens_per_round"] > 2
    on_cpu, *under_budgets = result["synthetic_7b"]["settings"]
    assert [drafted["rate"] for drafted in on_cpu["drafted"]] == list(gpu_check.RATES)
    assert all("accelerator" in setting["refused"] for setting in under_budgets)


def test_without_an_accelerator_nothing_is_measured(run: Callable[..., dict]) -> None:
    with pytest.raises(SystemExit, match="--dry-run"):
        run()


def test_pytests_summary_is_read() -> None:
    size = replace(gpu_check.TOY, tests=("tests/test_threads.py",))
    found = gpu_check.gpu_tests(size)
    assert found["passed"] > 3
    assert found["status"] == 0


@pytest.mark.parametrize(("rate", "tokens"), [(0.0, 1.0), (1.0, 8.0)])
def test_acceptance_is_what_it_is_said_to_be(rate: float, tokens: float) -> None:
    target = gpu_check.random_target(gpu_check.TOY)
    draft = gpu_check.DovetailAssistantModel.from_target(target)
    draft.tree, draft.draft_device = gpu_check.CHAIN, "cpu"
    with gpu_check.acceptance_of(rate):
        gpu_check.answer(target, torch.arange(5, 30)[None], 33, assistant_model=draft)
    assert draft.last_stats.tokens_per_round == pytest.approx(tokens)


def test_budgets_on_a_simulated_device(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the steps that only run where there is an accelerator."""
    accelerator.waits = True
    monkeypatch.setattr("hf_dovetail.prepare.head_times_ms", lambda *_: (2.0, 1.0))
    with accelerator:
        found = gpu_check.synthetic(replace(gpu_check.TOY, new_tokens=6))
    for setting in found["settings"][1:]:
        assert setting["layers_on_device"] == 3
        assert all(drafted["bytes_to_draft_per_round"] > 0 for drafted in setting["drafted"])
