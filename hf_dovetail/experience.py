"""What rounds have shown of a draft on a target: numbers only, which the controller reads and writes."""

from __future__ import annotations

from .acceptance import Acceptance
from .config import TreeShape
from .curves import MAX_ROWS
from .depths import Depths
from .lookup import CLASSES
from .pauses import Pauses

LARGEST = TreeShape(nodes=MAX_ROWS - 1, depth=19, top_k=10)
"""What `tree = "auto"` may choose: with the root as many rows as the curves reach; paths of 20 nodes, which a
draft that is right 97 times in 100 reaches every other time; the paper's width."""


class Experience:
    """What rounds of one kind (greedy or sampled) have shown of one draft on one target; shared by calls."""

    def __init__(self) -> None:
        self.acceptance = Acceptance(LARGEST.levels, LARGEST.top_k)
        self.lookups = Acceptance(LARGEST.levels, CLASSES, keep=0.9, ordered=False)
        """Of looked-up tokens, by class of match in place of the rank; texts are copied in episodes."""
        self.pauses, self.depths = Pauses(), Depths(LARGEST.levels)
        self.unverified = 0  # plain rounds since the last tree
        self.nodes = float(LARGEST.nodes)  # of the draft's, verified in trees of late
