"""The expansion of a tree, level by level (EAGLE-2, arXiv 2406.16858, section 4.1), on the host and on a device.

Both give the same tree. On the host what is found is looked at after every level, so the bookkeeping is NumPy and
nodes without prospects are left out; on a device every shape is fixed and the host reads nothing, so that the
whole of it can be captured in a graph. Knows no network: a `Stepper` computes the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .acceptance import corrected
from .config import TreeShape
from .draws import Choice
from .tree import Candidates

KeepGoing = Callable[[int, np.ndarray], bool]
"""Whether a level more is worth its time: called with the number of levels done (1: the root's children), and the
scores (C,) float32 of the candidates that the last of them found."""


Best = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Finds the largest of logits, see `likeliest`."""


class Stepper(Protocol):
    """Computes the rows of a tree's nodes behind the committed rows.

    Attributes:
        target_ids: (V,) int64, the target's ids of the tokens that `logits` ranks; None: their places are the ids.
        best: `likeliest`, or what does the same where the rows are computed.
    """

    target_ids: Tensor | None
    best: Best

    def level(self, tokens: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        """Compute a level's nodes.

        Args:
            tokens: (1, k) of the nodes.
            hidden: (1, k, h) hidden states of their parents.
            visible: (k, R) bool, which of the tree's rows so far a node sees; the last k are the level's own.

        Returns:
            (1, k, h) hidden states of the nodes.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """(1, T, V) float32 logits of what follows (1, T, h) hidden states, as sharp as the session wants them."""


def tree_rows(shape: TreeShape) -> int:
    """The most rows that a tree of this shape is computed with."""
    return max(shape.levels - 1, 0) * min(shape.top_k, shape.nodes)


def best_continuations(
    stepper: Stepper, hidden: Tensor, count: int, level: int = 0, choice: Choice | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens of the `count` likeliest continuations of each row, (T, count) each.

    With a `choice`: those that the target is likeliest to draw at this level (0: after the root).
    """
    logits = stepper.logits(hidden)[0]
    if choice is not None:
        logits = choice.perturbed(logits, level, stepper.target_ids)
    log_probs, tokens = stepper.best(logits, min(count, logits.shape[-1]))
    return log_probs, tokens if stepper.target_ids is None else stepper.target_ids[tokens]


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, count) and places (T, count) of the largest of (T, V) float32 logits, likeliest first."""
    best, places = logits.topk(count, dim=-1)
    log_probs = best - logits.logsumexp(dim=-1, keepdim=True)
    return log_probs.nan_to_num(nan=float("-inf"), neginf=float("-inf")), places  # an overflow costs acceptance only


def expand_on_host(
    stepper: Stepper,
    hidden: Tensor,
    shape: TreeShape,
    keep_going: KeepGoing | None = None,
    shifts: np.ndarray | None = None,
    choice: Choice | None = None,
) -> Candidates:
    """All candidates that can enter the tree: `top_k` children of the root, then of the best nodes of each level.

    No level is wider than `nodes`, since a node that `nodes` others of its level beat cannot be kept; and of a
    level only those nodes are expanded that can still have a child among the `nodes` best of all: a child never
    beats its parent.

    Args:
        stepper: computes rows on the CPU.
        hidden: (1, 1, h) of the last committed row.
        shape: nodes, depth and width of the tree.
        keep_going: asked after each level; False ends the expansion.
        shifts: (levels, ranks) float32 at least as large as the shape, see `acceptance.Acceptance`.
        choice: of a target that samples, if its draws are known.
    """
    width = min(shape.top_k, shape.nodes)
    gains, tokens = (part.numpy()[0] for part in best_continuations(stepper, hidden, width, 0, choice))
    log_probs, scores = gains, _sure(gains, shifts, 0)  # of the nodes to expand: (k,) each
    found = _Found(tokens, log_probs, scores)
    frontier = np.arange(len(gains))
    hidden = hidden.repeat(1, len(gains), 1)
    visible = np.eye(len(gains), dtype=bool)
    while found.goes_on(keep_going) and found.levels < shape.levels and len(tokens) > 0:
        hidden = stepper.level(torch.from_numpy(tokens).unsqueeze(0), hidden, torch.from_numpy(visible))
        best = best_continuations(stepper, hidden, width, found.levels, choice)
        gains, children = (part.numpy() for part in best)  # (k, w)
        totals = (scores[:, None] + _sure(gains, shifts, found.levels)).ravel()
        before, sums = found.count, (log_probs[:, None] + gains).ravel()
        found.add(children.ravel(), frontier.repeat(gains.shape[1]), sums, totals)
        best = np.argsort(-totals, kind="stable")[:width]
        best = best[: found.hopeful(totals[best], shape.nodes)]
        rows = best // gains.shape[1]  # which expanded node each new one descends from
        log_probs, scores, tokens, frontier = sums[best], totals[best], children.ravel()[best], before + best
        hidden = hidden.index_select(1, torch.from_numpy(rows))
        visible = np.concatenate((visible[rows], np.eye(len(best), dtype=bool)), axis=1)
    return found.candidates()


def expand_on_device(
    stepper: Stepper,
    hidden: Tensor,
    shape: TreeShape,
    shifts: Tensor | None = None,
    choice: Choice | None = None,
) -> Candidates:
    """All candidates of the tree, as `expand_on_host` finds them and those that it leaves out; no host reads.

    `shifts` and the noise are on the device.
    """
    width, device = min(shape.top_k, shape.nodes), hidden.device
    log_probs, tokens = best_continuations(stepper, hidden, width, 0, choice)  # (1, w): the frontier
    scores, count = _sure(log_probs, shifts, 0), log_probs.shape[1]
    frontier = torch.arange(count, device=device)
    found = [(tokens, torch.full_like(tokens, -1), log_probs, scores)]
    hidden, visible = hidden.repeat(1, count, 1), torch.eye(count, dtype=torch.bool, device=device)
    before = 0
    for level in range(1, shape.levels):
        hidden = stepper.level(tokens, hidden, visible)
        gains, children = best_continuations(stepper, hidden, width, level, choice)  # (k, w)
        totals = (scores.T + _sure(gains, shifts, level)).view(1, -1)
        sums, children = (log_probs.T + gains).view(1, -1), children.view(1, -1)
        before += found[-1][0].shape[1]
        parents = frontier.unsqueeze(1).expand(-1, gains.shape[1]).reshape(1, -1)
        found.append((children, parents, sums, totals))
        if level == shape.levels - 1:
            break
        best = totals[0].argsort(descending=True, stable=True)[:width]
        rows = best // gains.shape[1]
        log_probs, scores, tokens = sums[:, best], totals[:, best], children[:, best]
        frontier = before + best
        hidden = hidden[:, rows]
        own = torch.eye(len(best), dtype=torch.bool, device=device)
        visible = torch.cat((visible[rows], own), dim=1)
    return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def _sure(gains: Any, shifts: Any, level: int) -> Any:
    """(..., w) log-probabilities of a level's nodes, likeliest first, given their parents: corrected, if at all."""
    return gains if shifts is None else corrected(gains, shifts[level, : gains.shape[-1]])


class _Found:
    """The candidates of the levels so far, on the host."""

    def __init__(self, tokens: np.ndarray, log_probs: np.ndarray, scores: np.ndarray) -> None:
        self._tokens, self._log_probs, self._scores = [tokens], [log_probs], [scores]
        self._parents = [np.full(len(tokens), -1)]
        self.count = len(tokens)

    @property
    def levels(self) -> int:
        return len(self._tokens)

    def add(self, tokens: np.ndarray, parents: np.ndarray, log_probs: np.ndarray, scores: np.ndarray) -> None:
        """Enter a level: (c,) each."""
        self._tokens.append(tokens)
        self._parents.append(parents)
        self._log_probs.append(log_probs)
        self._scores.append(scores)
        self.count += len(tokens)

    def goes_on(self, keep_going: KeepGoing | None) -> bool:
        """Ask whether a level more is wanted."""
        return keep_going is None or keep_going(self.levels, self._scores[-1])

    def hopeful(self, scores: np.ndarray, nodes: int) -> int:
        """How many of a level's nodes, best first, can still have a child among the `nodes` best of all."""
        if self.count < nodes:
            return len(scores)
        least = np.partition(np.concatenate(self._scores), -nodes)[-nodes]
        return int(np.count_nonzero(scores > least))

    def candidates(self) -> Candidates:
        parts = self._tokens, self._parents, self._log_probs, self._scores
        return Candidates(*(torch.from_numpy(np.concatenate(part)).unsqueeze(0) for part in parts))
