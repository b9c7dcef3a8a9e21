"""How often the target takes what the draft is so sure of: probabilities of nodes, corrected by what happened.

A draft may be too modest about its first choices and too hopeful about its second ones, and the more so the deeper it
looks. So what it says of a token after its parent is corrected by a shift of the log-odds that depends on the token's
rank among its siblings and on its depth (Platt scaling, 1999, with slope 1). Knows no tree and no model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_RANKS = np.array([0, 1, 2, 3])  # groups of ranks; higher ones share the last
_DEPTHS = np.array([0, 1, 2, 2, 3])  # groups of levels; deeper ones share the last
_LIMIT = 9  # of log-odds: what is beyond is as good as certain
_KEEP = 0.6  # the least that a pause leaves
_RANK_PRIOR = 0.25  # precision of a rank's shift around none, the draft's word
_DEPTH_PRIOR = 4.0  # likewise of its shift at a depth around that at all depths
_STEPS = 2  # of Newton's method per round; they start where the last round's ended


def corrected(log_probs: Tensor | np.ndarray, shifts: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Log-probabilities with their log-odds shifted; arrays or tensors of shapes that broadcast.

    Never above 0, so that a child's chance stays below its parent's; a shift of 0 changes no bit.
    """
    if isinstance(log_probs, Tensor):
        return (log_probs + shifts - torch.log1p(log_probs.exp() * torch.expm1(shifts))).clamp_(max=0.0)
    return np.minimum(log_probs + shifts - np.log1p(np.exp(log_probs) * np.expm1(shifts)), 0.0)


class Acceptance:
    """Learns the shifts of log-odds from verified nodes.

    Args:
        levels, ranks: the deepest tree's, and the widest level's.
        keep: share of what was learned that a round leaves; at 0.98 what 50 rounds ago was accepted counts a third.
        ordered: whether shifts must not rise with the rank, so that siblings keep their order.

    Attributes:
        shifts: (levels, ranks) float32.
    """

    def __init__(self, levels: int, ranks: int, keep: float = 0.98, ordered: bool = True) -> None:
        self._keep, self._ordered = keep, ordered
        self._level_groups = _DEPTHS[np.minimum(np.arange(levels), len(_DEPTHS) - 1)]
        self._rank_groups = _RANKS[np.minimum(np.arange(ranks), len(_RANKS) - 1)]
        groups = _DEPTHS[-1] + 1, _RANKS[-1] + 1
        self._tried, self._odds = np.zeros((2, *groups, 2 * _LIMIT + 1))  # by log-odds: nodes, and the sum of theirs
        self._taken = np.zeros(groups)
        self._by_rank, self._by_depth = np.zeros(groups[1]), np.zeros(groups)
        self.shifts = np.zeros((levels, ranks), dtype=np.float32)

    def learn(
        self, log_probs: np.ndarray, ranks: np.ndarray, depths: np.ndarray, accepted: np.ndarray, rounds: int = 1
    ) -> None:
        """Enter the verified children of accepted nodes.

        Args:
            log_probs: (N,) the draft's, of each given its parent. ranks: (N,) among its siblings, from 0.
            depths: (N,) from 1. accepted: (N,) bool.
            rounds: since the last time.
        """
        log_probs = np.minimum(log_probs.astype(np.float64), -1e-9)
        odds = np.clip(log_probs - np.log(-np.expm1(log_probs)), -_LIMIT, _LIMIT)
        group = self._level_groups[depths - 1], self._rank_groups[ranks]
        cells = *group, np.rint(odds).astype(int) + _LIMIT
        for counts, places, values in (
            (self._tried, cells, 1.0),
            (self._odds, cells, odds),
            (self._taken, group, accepted),
        ):
            counts *= max(self._keep**rounds, _KEEP)
            np.add.at(counts, places, values)
        means = self._odds / np.maximum(self._tried, 1e-9)
        for _ in range(_STEPS):
            self._by_rank += _newton(self._by_rank, 0.0, _RANK_PRIOR, self._tried, means, self._taken, pooled=True)
            self._by_depth += _newton(self._by_depth, self._by_rank, _DEPTH_PRIOR, self._tried, means, self._taken)
        shifts = self._by_depth[self._level_groups][:, self._rank_groups]
        self.shifts = (np.minimum.accumulate(shifts, axis=1) if self._ordered else shifts).astype(np.float32)


def _newton(
    shifts: np.ndarray,
    prior: np.ndarray | float,
    precision: float,
    tried: np.ndarray,
    odds: np.ndarray,
    taken: np.ndarray,
    pooled: bool = False,
) -> np.ndarray:
    """A step towards the likeliest shifts of log-odds.

    Args:
        shifts: (D, R), or (R,) of all depths together if `pooled`.
        prior, precision: of a normal distribution around which they lie.
        tried, odds: (D, R, B) nodes, and their log-odds in the mean. taken: (D, R) accepted ones.
    """
    expected = 1 / (1 + np.exp(-(odds + shifts[..., None])))
    missing, information = taken - (tried * expected).sum(-1), (tried * expected * (1 - expected)).sum(-1)
    if pooled:
        missing, information = missing.sum(0), information.sum(0)
    return np.clip((missing - precision * (shifts - prior)) / (information + precision), -1.0, 1.0)
