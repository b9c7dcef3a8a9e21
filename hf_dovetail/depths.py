"""What the levels of past trees were worth, and so how many the next tree gets. Pure: numbers only.

A draft on the CPU is asked after each level, and what matters is how much of a level's probability the next one keeps.
On an accelerator the depth is chosen ahead, by what past trees gained with each further level.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_AHEAD = (1, 2, 3, 4, 6, 8, 12, 20)  # few kinds of round, since each may be captured as a graph
_RETENTION = 0.7  # share of a level's probability that the next one keeps: a guess, with the weight of one round
_KEEP = 0.97  # of the sums behind it, what a round leaves
_GAIN, _SELDOM = 0.1, 0.25  # what a tree counts for in the gains of its levels, and of those that are seen seldom
_LOOK_AFTER = 8  # rounds, at least
_LOOK_SHARE = 0.02  # of the time of plain decoding that levels beyond the best may take
_LOOK_STEPS = 3  # depths beyond the best that looks go to


class Depths:
    """What is known of a tree's levels.

    Args:
        levels: of the deepest tree.

    Attributes:
        mass, kept: (levels + 1,) by level: sums of its probability, and of the next one's.
        gains: by levels chosen ahead: what a tree won over that of the entry before, in tokens.
        planned, deeper: rounds since one was deeper than seemed best, and how many were.
    """

    def __init__(self, levels: int) -> None:
        self.mass, self.kept = np.ones(levels + 1), np.full(levels + 1, _RETENTION)
        self.gains: dict[int, float] = {}
        self.planned = self.deeper = 0

    def retention(self, level: int) -> float:
        """The share of a level's probability that the next one had."""
        level = min(level, len(self.mass) - 1)
        return float(self.kept[level] / self.mass[level])

    def learn_retention(self, level: int, mass: float, kept: float) -> None:
        """Enter the probability of a level and of the next one."""
        self.kept[level] = _KEEP * self.kept[level] + kept
        self.mass[level] = _KEEP * self.mass[level] + mass

    def plan(self, most: int, price: float, level_ms: float, plain_ms: float, explores: bool) -> tuple[int, int]:
        """The levels of the next tree, and those that seem best; before the first tree, a guess and the most there are.

        Args:
            most: levels that the answer allows.
            price: tokens per ms that time is worth.
            level_ms, plain_ms: of a level, and of a plain round.
            explores: whether the next tree may have more levels than seem best.
        """
        self.planned += 1
        best = self._best(most, price, level_ms)
        if best is None:
            return guessed_levels(most, price * level_ms), len(self.mass) - 1
        return (self._deeper_than(best, most, level_ms, plain_ms) if explores else best), best

    def _best(self, most: int, price: float, level_ms: float) -> int | None:
        """The levels that were worth most in past trees; None before the first of them."""
        values, worth = {}, 0.0
        for levels in depths_within(most):
            if levels in self.gains:
                worth += self.gains[levels]
                values[levels] = worth - levels * price * level_ms
        return max(values, key=values.__getitem__, default=None)

    def _deeper_than(self, best: int, most: int, level_ms: float, plain_ms: float) -> int:
        """The best levels; now and then more, to see what those would be worth."""
        deeper = [levels for levels in depths_within(most) if levels > best]
        if not deeper:
            return best
        look = deeper[self.deeper % min(_LOOK_STEPS, len(deeper))]
        rounds = (look - best) * level_ms / plain_ms
        if self.planned < max(_LOOK_AFTER, rounds / _LOOK_SHARE):
            return best
        self.planned = 0
        self.deeper += 1
        return look

    def learn(self, worths: Mapping[int, float], usual: int) -> None:
        """Enter what a tree would have been worth with fewer levels, in tokens.

        Texts differ more than depths do, so depths are compared within a tree.

        Args:
            worths: by levels, fewest first.
            usual: levels of most trees of late; deeper ones are seen seldom, and count more.
        """
        before = 0.0
        for levels, worth in worths.items():
            gain, share = worth - before, _GAIN if levels <= usual else _SELDOM
            self.gains[levels] = (1 - share) * self.gains.get(levels, gain) + share * gain
            before = worth


def depths_within(most: int) -> list[int]:
    """The levels to choose from where a tree may have `most`."""
    return [levels for levels in _AHEAD if levels <= most] or [most]


def guessed_levels(most: int, level_price: float) -> int:
    """The levels to begin with, before any tree: what the guessed retention says.

    Args:
        most: levels that the answer allows.
        level_price: tokens that a level's time is worth.
    """
    possible = depths_within(most)
    gains = np.cumprod(np.full(max(possible), _RETENTION)).cumsum()
    return max(possible, key=lambda levels: gains[levels - 1] - levels * level_price)
