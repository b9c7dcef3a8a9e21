"""What the nodes of a tree are worth: chances of paths, and accepted tokens against the time they take. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .acceptance import corrected
from .tree import DraftTree

_IMPOSSIBLE = np.float32(-1e4)  # the log-probability of what overflowed


def nodes_of(tree: DraftTree) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of the proposed nodes, (N,) each: log-probabilities given their parents, ranks among siblings, depths, parents.

    Siblings stand in the order of their probability, and a node is only there with those before it; what was looked
    up stands behind all others.
    """
    sums, parents = tree.log_probs.numpy()[0], tree.parents.numpy()[0, 1:]
    log_probs = np.maximum(sums[1:], _IMPOSSIBLE) - np.maximum(sums[parents], _IMPOSSIBLE)
    return np.minimum(log_probs, 0.0), tree.ranks.numpy()[0, 1:], tree.depths.numpy()[0, 1:], parents


def gains_of(tree: DraftTree, shifts: np.ndarray) -> np.ndarray:
    """(N,) corrected log-probabilities of the draft's nodes given their parents."""
    log_probs, ranks, depths, _ = nodes_of(tree)
    return corrected(log_probs, shifts[depths - 1, ranks])


def sums_of(tree: DraftTree, gains: np.ndarray) -> np.ndarray:
    """(N,) scores of nodes with these `gains` (N,): those of their paths; no child's is above its parent's."""
    sums = [0.0]
    for parent, gain in zip(tree.parents.tolist()[0][1:], gains.tolist(), strict=True):
        sums.append(sums[parent] + gain)
    return np.array(sums[1:])


def worth_of(chances: np.ndarray, rows: np.ndarray) -> float:
    """Expected accepted tokens minus the price of their verification, at the best number of nodes.

    Args:
        chances: (C,) of the nodes, surest first.
        rows: (R,) price in tokens of verifying 0, 1, 2, ... nodes.
    """
    gains = chances[: len(rows) - 1].cumsum()
    return max(float((gains - rows[1 : len(gains) + 1]).max(initial=-np.inf)), -float(rows[0]))


def worths_by_levels(tree: DraftTree, scores: np.ndarray, rows: np.ndarray, levels: Iterable[int]) -> dict[int, float]:
    """What a tree would be worth with its first levels alone, by their number.

    Args:
        tree: proposed by the draft.
        scores: (N,) of its nodes.
        rows: (R,) price in tokens of verifying 0, 1, 2, ... nodes.
        levels: numbers of levels.
    """
    order = np.argsort(-scores, kind="stable")
    chances, depths = np.exp(scores[order]), tree.depths.numpy()[0, 1:][order]
    return {most: worth_of(chances[depths <= most], rows) for most in levels}


def deeper_pays(
    best: np.ndarray, frontier: np.ndarray, kept: Iterable[float], rows: np.ndarray, level_price: float
) -> bool:
    """Whether a tree with one of the next levels is expected to be worth more than without, and their time.

    Args:
        best: (C,) chances of its best nodes so far, surest first, as many as can be verified.
        frontier: (W,) those of the last level's nodes.
        kept: share of a level's probability that the next one has, for each of the levels to look at.
        rows: (R,) price in tokens of verifying 0, 1, 2, ... nodes.
        level_price: tokens that a level's time is worth.
    """
    if float(frontier.sum()) <= level_price:  # not even if every frontier node had a certain child
        return False
    now, ahead, most = worth_of(best, rows), frontier, len(rows) - 1
    for step, share in enumerate(kept, start=1):
        ahead = ahead * share
        best = np.sort(np.concatenate((best, ahead)))[: -most - 1 : -1]
        if worth_of(best, rows) - step * level_price > now:
            return True
    return False
