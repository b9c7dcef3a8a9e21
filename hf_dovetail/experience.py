"""What rounds have shown of a draft on a target: numbers only, which the controller reads and writes."""

from __future__ import annotations

import numpy as np

from .acceptance import Acceptance
from .config import TreeShape
from .curves import MAX_ROWS
from .lookup import CLASSES

LARGEST = TreeShape(nodes=MAX_ROWS - 1, depth=19, top_k=10)
"""What `tree = "auto"` may choose: with the root as many rows as the curves reach; paths of 20 nodes, which a
draft that is right 97 times in 100 reaches every other time; the paper's width."""

RETENTION = 0.7
"""Share of a level's probability that the next one has: a guess, with the weight of one round."""


class Experience:
    """What rounds of one kind (greedy or sampled) have shown of one draft on one target; shared by calls."""

    def __init__(self) -> None:
        self.acceptance = Acceptance(LARGEST.levels, LARGEST.top_k)
        self.lookups = Acceptance(LARGEST.levels, CLASSES, keep=0.9, ordered=False)
        """Of looked-up tokens, by class of match in place of the rank; texts are copied in episodes."""
        self.unverified = 0  # plain rounds since the last tree
        self.probed = 0  # probing rounds done, on a machine without curves
        self.tokens = self.ms = 0.0  # of rounds with a tree: the pace
        self.advantage: float | None = None  # of a tree over plain decoding, in tokens a round; expected
        self.proof = self.proofs = 0.0  # the same in real tokens: sum and number of rounds
        self.nodes = float(LARGEST.nodes)  # verified in trees of late
        self.pause = self.wait = 0  # tokens: of plain decoding between two looks, and until the next
        levels = LARGEST.levels + 1
        self.mass, self.kept = np.ones(levels), np.full(levels, RETENTION)
        self.gains: dict[int, float] = {}  # by levels: what the tree won over that of the entry before
        self.planned = self.deeper = 0  # rounds since one was deeper than seemed best, and how many were

    def retention(self, level: int) -> float:
        """The share of a level's probability that the next one had."""
        return float(self.kept[level] / self.mass[level])
