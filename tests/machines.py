"""Machines made up of numbers: the cost of every pass is known, and no clock is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fixed_costs import FixedCosts

from hf_dovetail import plugin
from hf_dovetail.controller import AutoController
from hf_dovetail.curves import MAX_ROWS, CostCurves
from hf_dovetail.experience import Experience

ROWS = tuple(range(1, MAX_ROWS + 1))
MACHINES: dict[str, Callable[[int], float]] = {
    "flat": lambda rows: 10.0,
    "memory-bound": lambda rows: 10.0 + 0.15 * (rows - 1),
    "linear": lambda rows: 10.0 + 1.0 * (rows - 1),
    "steps": lambda rows: 10.0 if rows <= 4 else 15.0 if rows <= 16 else 25.0,
    "every row costs a pass": lambda rows: 10.0 * rows,
}
DRAFTS = {  # ms of the first pass and of a level
    "fast": (0.15, 0.1),
    "medium": (0.8, 0.5),
    "slow": (3.0, 2.0),
}


def machine(name: str, draft: str) -> CostCurves:
    """The costs of one of the `MACHINES` with one of the `DRAFTS`."""
    first_ms, level_ms = DRAFTS[draft]
    return CostCurves(ROWS, (0,), (tuple(MACHINES[name](rows) for rows in ROWS),), first_ms, 0.01, level_ms)


def at_these_costs(
    monkeypatch: pytest.MonkeyPatch, curves: CostCurves, experience: Experience, on_host: bool = True
) -> None:
    """Let curves take the place of clocks."""
    costs = FixedCosts(curves)

    def controller(*arguments: Any) -> tuple[None, AutoController]:
        return None, AutoController(costs, experience, on_host, clock=lambda: 0.0)

    monkeypatch.setattr(plugin, "_controller", controller)
