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
_STEPS = 2  # of Newton's method at a time; they start where the last ones ended
_EAGER = 12  # first rounds that are learned from at once; later ones change little each, and wait for each other
_BATCH = 4  # such rounds


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
        self._by_odds = np.zeros((2, *groups, 2 * _LIMIT + 1))  # nodes by their log-odds, and the sums of those
        self._taken = np.zeros(groups)
        self._fitted = np.zeros((2, *groups))  # shifts: of each rank at all depths, and of each rank at each depth
        self.shifts = np.zeros((levels, ranks), dtype=np.float32)
        self._learned, self._waiting = 0, []  # rounds; what was entered of some of them

    def learn(
        self, log_probs: np.ndarray, ranks: np.ndarray, depths: np.ndarray, accepted: np.ndarray, rounds: int = 1
    ) -> None:
        """Enter the verified children of accepted nodes.

        Args:
            log_probs: (N,) the draft's, of each given its parent. ranks: (N,) among its siblings, from 0.
            depths: (N,) from 1. accepted: (N,) bool.
            rounds: since the last time.
        """
        self._learned += 1
        self._waiting.append((log_probs, ranks, depths, accepted, rounds))
        if self._learned <= _EAGER or len(self._waiting) == _BATCH:
            *nodes, rounds = zip(*self._waiting, strict=True)
            self._enter(*(np.concatenate(part) for part in nodes), sum(rounds))
            self._waiting = []

    def _enter(
        self, log_probs: np.ndarray, ranks: np.ndarray, depths: np.ndarray, accepted: np.ndarray, rounds: int
    ) -> None:
        log_probs = np.minimum(log_probs.astype(np.float64), -1e-9)
        odds = np.clip(log_probs - np.log(-np.expm1(log_probs)), -_LIMIT, _LIMIT)
        groups = self._taken.size
        group = self._level_groups[depths - 1] * self._taken.shape[1] + self._rank_groups[ranks]
        cells, bins = group * (2 * _LIMIT + 1) + np.rint(odds).astype(int) + _LIMIT, groups * (2 * _LIMIT + 1)
        keep = max(self._keep**rounds, _KEEP)
        self._by_odds *= keep
        self._taken *= keep
        for values, weights in zip(self._by_odds, (None, odds), strict=True):
            values += np.bincount(cells, weights, bins).reshape(values.shape)
        self._taken += np.bincount(group, accepted, groups).reshape(self._taken.shape)
        means = self._by_odds[1] / np.maximum(self._by_odds[0], 1e-9)
        for _ in range(_STEPS):
            self._fit(means)
        shifts = self._fitted[1][self._level_groups][:, self._rank_groups]
        self.shifts = (np.minimum.accumulate(shifts, axis=1) if self._ordered else shifts).astype(np.float32)

    def _fit(self, odds: np.ndarray) -> None:
        """A step of Newton's method, for both kinds of shifts, towards the likeliest ones.

        Args:
            odds: (D, R, B) the nodes' log-odds in the mean.
        """
        by_rank, by_depth = self._fitted
        expected = 1 / (1 + np.exp(-(odds + self._fitted[..., None])))
        right = self._by_odds[0] * expected
        missing, information = self._taken - right.sum(-1), (right - right * expected).sum(-1)
        by_rank += _bounded(missing[0].sum(0) - _RANK_PRIOR * by_rank[0], information[0].sum(0) + _RANK_PRIOR)
        by_depth += _bounded(missing[1] - _DEPTH_PRIOR * (by_depth - by_rank), information[1] + _DEPTH_PRIOR)


def _bounded(gradient: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """Newton's step, at most 1."""
    return (gradient / curvature).clip(-1.0, 1.0)
