"""What the nodes of a tree are worth: chances of paths, and accepted tokens against the time they take. Pure."""

from __future__ import annotations

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
    sums = np.zeros(len(gains) + 1)
    for node, (parent, gain) in enumerate(zip(tree.parents.numpy()[0, 1:], gains, strict=True), start=1):
        sums[node] = sums[parent] + gain
    return sums[1:]


def worth_of(chances: np.ndarray, rows: np.ndarray) -> float:
    """Expected accepted tokens minus the price of their verification, at the best number of nodes.

    Args:
        chances: (C,) of the nodes, surest first.
        rows: (R,) price in tokens of verifying 0, 1, 2, ... nodes.
    """
    gains = chances[: len(rows) - 1].cumsum()
    return max(float((gains - rows[1 : len(gains) + 1]).max(initial=-np.inf)), -float(rows[0]))
