"""What the next round will cost: the cost curves, corrected by what rounds really took.

Knows times in ms; knows no model and reads no clock. A single round that a hiccup made ten times longer moves
nothing by more than a few percent; a machine that stays slower is followed within a few dozen rounds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from statistics import median
from threading import Lock

import numpy as np

from .curves import MAX_ROWS, CostCurves, along_rows

_RATE = 0.1  # share of a round's surprise that enters an estimate which has seen enough rounds
_CLIP = 0.4  # largest surprise of one round, in log units (a factor of 1.5)
_TRUSTED = 8.0  # weight of a measured number, in rounds
_FADE = 0.99  # per round: estimates of sizes that are not seen lose weight, and follow the others
_NEIGHBOURS = 0.5  # weight of what all sizes say, in rounds
_BLOCK = 32  # positions of context that share a table
_OPENING = 3  # verifications that draw the curve on a machine without one; the later ones correct it
WINDOW = 32  # rounds over which drift is judged
DRIFT = (0.75, 1.33)  # median of observed / stored beyond which stored curves are rescaled


class Estimate:
    """A positive number followed by a mean of logarithms that outliers cannot move far."""

    __slots__ = ("value", "weight")

    def __init__(self, value: float, weight: float = 0.0) -> None:
        self.value, self.weight = value, weight

    def learn(self, observed: float) -> None:
        """Enter one observation; the first ones count fully, the later ones by their share."""
        if observed <= 0:
            return
        if self.weight < 1 or self.value <= 0:
            self.value, self.weight = observed, 1.0
            return
        surprise = math.log(observed / self.value)
        if self.weight >= 2:
            surprise = min(max(surprise, -_CLIP), _CLIP)
        self.value *= math.exp(max(_RATE, 1 / (self.weight + 1)) * surprise)
        self.weight = min(self.weight + 1, 1 / _RATE)


class Costs:
    """The parts of a round in ms, as far as known.

    Attributes:
        lock: for whoever shares these costs, and what else was learned with them.
        probes: rounds that were forced to show what they cost.
        verified_ms, most_rows: ms of all verifications so far, and rows of the largest.

    Args:
        curves: measured curves, or None: then `CostCurves.guess()`, until the first rounds have drawn others.
    """

    def __init__(self, curves: CostCurves | None) -> None:
        self.measured, self.lock = curves is not None, Lock()
        self.probes, self.verified_ms, self.most_rows = 0, 0.0, 0
        self._first: list[tuple[int, float]] = []  # rows and ms of the opening
        self._begin(curves or CostCurves.guess())

    def _begin(self, curves: CostCurves) -> None:
        self.curves = curves
        weight = _TRUSTED if self.measured else 0.0
        self.first, self.row = Estimate(curves.first_ms, weight), Estimate(curves.row_ms, weight)
        self.level = Estimate(curves.level_ms, weight)
        self.overhead, self.tree = Estimate(curves.overhead_ms), Estimate(curves.tree_ms)
        self._correction = [0.0] * len(curves.rows)  # log of observed / curve, per size
        self._weight = [0.0] * len(curves.rows)  # rounds behind it
        self._ratios: tuple[deque, deque] = (deque(maxlen=WINDOW), deque(maxlen=WINDOW))  # verify, draft
        self._block, self._line, self._table = -1, [], None

    def _at(self, context: int) -> list[float]:
        """The uncorrected curve near this context."""
        if self._block != context // _BLOCK:
            self._block, self._table = context // _BLOCK, None
            self._line = self.curves.line(context).tolist()
        return self._line

    def table(self, context: int) -> np.ndarray:
        """(MAX_ROWS + 1,) ms of one verification of 0 (as 1), 1, 2, ... rows behind `context` positions."""
        line = self._at(context)
        if self._table is None:
            corrected = [ms * math.exp(x) for ms, x in zip(line, self._corrections(), strict=True)]
            self._table = along_rows(self.curves.rows, corrected)
        return self._table

    def plain_ms(self, context: int) -> float:
        """A round of plain decoding."""
        return float(self.table(context)[1]) + self.overhead.value

    def draft_ms(self, levels: int) -> float:
        """Growing a tree of so many levels behind a usual round's tokens."""
        return self.first.value + (levels - 1) * self.level.value

    def learn_verify(self, rows: int, context: int, observed_ms: float) -> None:
        """Enter the time of one verification."""
        if rows > MAX_ROWS or observed_ms <= 0:
            return
        self.verified_ms += observed_ms
        self.most_rows = max(self.most_rows, rows)
        if not self.measured and len(self._first) < _OPENING:
            self._first.append((rows, observed_ms))
            self.curves = replace(self.curves, verify=(straight_line(self._first, self.curves.rows),))
            self._block = -1
            return
        points, line, near = self.curves.rows, self._at(context), self._corrections()
        after = max(bisect_left(points, rows), 1)
        share = (rows - points[after - 1]) / (points[after] - points[after - 1])
        parts = [(index, part) for index, part in ((after - 1, 1 - share), (after, share)) if part > 0]
        ratio = math.log(observed_ms / sum(part * line[index] for index, part in parts))
        self._ratios[0].append(ratio)
        surprise = ratio - sum(part * near[index] for index, part in parts)
        if self.measured or sum(part * self._weight[index] for index, part in parts) >= 2:
            surprise = min(max(surprise, -_CLIP), _CLIP)
        self._weight = [_FADE * weight for weight in self._weight]
        for index, part in parts:
            known = self._weight[index] + (_TRUSTED if self.measured else 0.0)
            start = self._correction[index] if self._weight[index] >= 1 else near[index]
            self._correction[index] = start + part * max(_RATE, 1 / (known + 1)) * surprise
            self._weight[index] = min(self._weight[index] + part, 1 / _RATE)
        self._table = None

    def learn_draft(self, caught_up: int, levels: int, total_ms: float, level_ms: float | None) -> None:
        """Enter the time of one tree: tokens caught up with, levels, ms in all and, where known, of one level."""
        expected = self.draft_ms(levels)
        if caught_up <= MAX_ROWS:
            stored = self.curves.first_ms + (levels - 1) * self.curves.level_ms
            if stored > 0 and total_ms > 0:
                self._ratios[1].append(math.log(total_ms / stored))
            if level_ms is not None:
                self.level.learn(level_ms)
            elif levels > 1 and self.level.weight >= 1:  # share the surprise as the model splits the time
                surprise = min(max(total_ms / max(expected, 1e-6), math.exp(-_CLIP)), math.exp(_CLIP))
                self.level.learn(self.level.value * surprise)
            elif levels > 1:
                self.level.learn(total_ms / (levels + 1))
            self.first.learn(total_ms - (levels - 1) * self.level.value)
        else:
            base = total_ms - (levels - 1) * (level_ms or self.level.value)
            self.row.learn(max(base - self.first.value, 0.1 * base) / caught_up)
            if level_ms is not None:
                self.level.learn(level_ms)

    def learn_rest(self, tree: bool, tokens: int, observed_ms: float) -> None:
        """Enter what a round took outside the two models: per token as in plain rounds, and what a tree adds."""
        if tree:
            self.tree.learn(observed_ms - tokens * self.overhead.value)
        else:
            self.overhead.learn(observed_ms)

    def drift(self) -> tuple[float, float] | None:
        """Factors of verification and drafting by which the machine has left the curves, or None if it has not."""
        factors = [math.exp(median(ratios)) if len(ratios) == WINDOW else 1.0 for ratios in self._ratios]
        return (factors[0], factors[1]) if _leaves(factors) else None

    def rescale(self, verify: float, draft: float) -> None:
        """Take the curves times these factors as the measured ones."""
        self._begin(self.curves.scaled(verify, draft))

    def _corrections(self) -> list[float]:
        """Log corrections per size; sizes without rounds of their own follow the others."""
        pairs = list(zip(self._weight, self._correction, strict=True))
        total = sum(self._weight)
        shared = sum(weight * x for weight, x in pairs) / total if total else 0.0
        return [(weight * x + _NEIGHBOURS * shared) / (weight + _NEIGHBOURS) for weight, x in pairs]


def straight_line(seen: Iterable[tuple[int, float]], points: Iterable[int]) -> tuple[float, ...]:
    """ms at each of `points`, ascending numbers of rows, by the fewest and the most rows of which a time was seen.

    Of each number of rows the least time counts, since a first pass prepares what later ones find. A single number says
    nothing of the others: then `CostCurves.guess()` does.
    """
    least: dict[int, float] = {}
    for rows, ms in seen:
        least[rows] = min(ms, least.get(rows, ms))
    few, most = min(least), max(least)
    if few == most:
        guess = CostCurves.guess()
        guessed = along_rows(guess.rows, guess.line(0))
        return tuple(least[few] * float(guessed[rows] / guessed[few]) for rows in points)
    slope = max(least[most] - least[few], 0.0) / (most - few)
    return tuple(least[few] + slope * max(rows - few, 0) for rows in points)


def _leaves(factors: Iterable[float]) -> bool:
    return any(not DRIFT[0] <= factor <= DRIFT[1] for factor in factors)
