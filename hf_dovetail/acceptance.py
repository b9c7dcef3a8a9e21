"""How often the target accepts what the draft is so sure of: probabilities of nodes, corrected by what happened.

Counts verified nodes by the draft's cumulative log-probability and the node's depth. Knows no tree and no model.
"""

from __future__ import annotations

import numpy as np

_EDGES = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])  # of -log_prob
_DEPTH_BINS = np.array([0, 0, 1, 2, 2, 3, 3, 4])  # by depth; deeper ones share the last
_FORGET = 0.98  # per round: what 50 rounds ago was accepted counts a third
_PRIOR_NODES = 4.0  # nodes after which a cell's own counts weigh as much as the draft's word
_PRIOR_HITS = 2.0  # likewise for the whole draft, in expected acceptances


class Acceptance:
    """The probability that a node is accepted, as a correction of the draft's own.

    A cell (confidence, depth) corrects by its own ratio of accepted to expected, drawn towards the ratio of all
    cells while it has seen few nodes; that one is drawn towards 1, the draft's word.
    """

    def __init__(self) -> None:
        shape = (_DEPTH_BINS[-1] + 1, len(_EDGES) + 1)
        self._nodes, self._hits, self._expected = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._factors = np.ones(shape)

    def probabilities(self, log_probs: np.ndarray, depths: np.ndarray | int) -> np.ndarray:
        """(N,) chances of acceptance of nodes, by their cumulative log-probabilities (N,) and depths, (N,) or one."""
        cells = _depth_bin(depths), _EDGES.searchsorted(-log_probs)
        return np.minimum(np.exp(log_probs) * self._factors[cells], 1.0)

    def learn(self, log_probs: np.ndarray, depths: np.ndarray, accepted: np.ndarray) -> None:
        """Enter the nodes of one verified tree: (N,) each, `accepted` bool."""
        cells = _depth_bin(depths), _EDGES.searchsorted(-log_probs)
        for counts, values in ((self._nodes, 1.0), (self._hits, accepted), (self._expected, np.exp(log_probs))):
            counts *= _FORGET
            np.add.at(counts, cells, values)
        overall = (_PRIOR_HITS + self._hits.sum()) / (_PRIOR_HITS + self._expected.sum())
        own = self._nodes * self._hits / np.maximum(self._expected, 1e-9)
        self._factors = (_PRIOR_NODES * overall + own) / (_PRIOR_NODES + self._nodes)


def _depth_bin(depths: np.ndarray | int) -> np.ndarray | int:
    return _DEPTH_BINS[np.minimum(depths, len(_DEPTH_BINS) - 1)]
