"""The draft's side of the loop: what waits for the draft, what crosses to its device, and what happens when it fails.

A draft only proposes, so an answer needs none: whatever goes wrong here ends the drafting, not the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .accept import Accepted
from .config import TreeShape
from .controller import Controller, Found
from .devices import to_device, to_host
from .levels import KeepGoing
from .lookup import Lookup
from .stats import GenerationStats
from .tree import DraftTree

logger = logging.get_logger(__name__)


class Drafter(Protocol):
    """What the loop asks of the draft (`plugin.candidates.DovetailCandidateGenerator`)."""

    device: torch.device
    reads_features: bool
    noise_bytes: int  # of the target's draws, that went to the draft's device so far

    def begin(self, first: Tensor, start: int) -> None:
        """Open the session with the first token (1, 1) the target has read, at position `start`."""

    def commit(self, tokens: Tensor, features: Tensor | None) -> None:
        """Add certain tokens (1, T) and the features (1, T, h) of the positions before them."""

    def propose(
        self, shape: TreeShape, keep_going: KeepGoing | None = None, shifts: np.ndarray | None = None
    ) -> Tensor:
        """(1, 3, N) int32: a packed tree."""

    def room(self, waiting: int = 0) -> int:
        """Levels that the draft's positions still allow behind `waiting` tokens that are not committed yet."""

    def give_up(self, error: Exception) -> None:
        """Leave the session after a failure, and free what it holds."""


class Drafting:
    """One answer's drafting; once it has failed, every round is plain.

    Args:
        drafter: the draft.
        controller: chooses the tree of each round.
        stats: where times and bytes are counted.
        strict: whether a failure is raised instead.
    """

    def __init__(self, drafter: Drafter, controller: Controller, stats: GenerationStats, strict: bool = False) -> None:
        self._drafter, self._controller, self._stats, self._strict = drafter, controller, stats, strict
        self._waiting, self._lookup = Waiting(drafter, stats), Lookup()
        self._active = controller.largest.nodes > 0

    def begin(self, known: Tensor, start: int) -> None:
        """Open the session behind tokens (1, n) that the target has read from position `start` on."""
        with self._guarded():
            if self._controller.looks_up:
                self._lookup.extend(known[0].tolist())
            if self._active:
                self._waiting.begin(known, start)

    def tree(self, root: int, held: int, remaining: int, allowed: Callable[[TreeShape], TreeShape]) -> DraftTree:
        """What this round verifies.

        Args:
            root: the last token of the answer so far.
            held: positions in the target's cache.
            remaining: tokens that the answer may still get.
            allowed: the part of a shape that the target can verify.
        """
        first = torch.from_numpy(np.array([[root]]))
        with self._guarded():
            if self._active:
                return self._chosen(first, held, remaining, allowed)
        return DraftTree.root_only(first)

    def _chosen(self, root: Tensor, held: int, remaining: int, allowed: Callable[[TreeShape], TreeShape]) -> DraftTree:
        controller, waiting = self._controller, self._waiting
        most = allowed(controller.largest.clipped(remaining - 1))
        shape = controller.plan(most.clipped(self._drafter.room(waiting.count)), held, waiting.count, remaining)
        found = Found(*self._lookup.continuation(most.levels))
        if not shape.nodes:
            return controller.choose(DraftTree.root_only(root), found, most)
        with self._stats.clock("draft_ms"):
            waiting.commit()
            tree = self._propose(root, shape)
        return controller.choose(tree, found, most)

    def _propose(self, root: Tensor, shape: TreeShape) -> DraftTree:
        """A tree of this shape under `root`, brought to the host in one copy, for which the host waits."""
        stats, shifts = self._stats, self._controller.shifts
        before = self._drafter.noise_bytes
        packed = self._drafter.propose(shape, self._controller.keep_going, shifts)
        stats.bytes_to_draft += self._drafter.noise_bytes - before + (0 if shifts is None else shifts.nbytes)
        stats.bytes_to_target += packed.nbytes
        return DraftTree.unpack(root, to_host(packed).wait())

    def add(self, tokens: tuple[int, ...], features: Tensor | None) -> None:
        """Keep accepted tokens and features (1, T, h) for the next tree."""
        if self._active:
            self._waiting.add(tokens, features)
            if self._controller.looks_up:
                self._lookup.extend(tokens)

    def learn(self, tree: DraftTree, accepted: Accepted, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        """Tell the controller what the round took and gave."""
        if self._active:
            with self._guarded():
                self._controller.learn(tree, accepted, draft_ms, verify_ms, round_ms)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self._active = False
            self._waiting = Waiting(self._drafter, self._stats)
            self._stats.draft_failed = True
            self._drafter.give_up(error)
            logger.warning(
                "the draft failed in round %d (%s: %s); the answer goes on without it, at plain speed, and stays the "
                "same. Set draft.strict = True to raise the error instead",
                self._stats.rounds + 1,
                type(error).__name__,
                error,
            )


class Waiting:
    """What is certain and the draft does not know yet: token ids, and the features of the positions before them.

    Tokens of rounds without a tree pile up here, untouched, until the draft is asked again.
    """

    def __init__(self, drafter: Drafter, stats: GenerationStats) -> None:
        self._drafter, self._stats = drafter, stats
        self._tokens: list[Tensor] = []
        self._new: list[int] = []
        self._features: list[Tensor] = []
        self.count = 0

    def begin(self, known: Tensor, start: int) -> None:
        """Open the drafter's session; tokens (1, n) that the target has read, from position `start` on, wait."""
        self._drafter.begin(self._moved(known[:, :1]), start)
        self._tokens.append(known[:, 1:].cpu())
        self.count = known.shape[1] - 1

    def add(self, tokens: tuple[int, ...], features: Tensor | None) -> None:
        """Keep accepted tokens, and features (1, T, h), for the next commit."""
        self._new += tokens
        self.count += len(tokens)
        if features is not None:
            self._features.append(features)

    def commit(self) -> None:
        """Hand the draft what waits: token ids, and features if it reads them."""
        tokens = _joined((*self._tokens, torch.from_numpy(np.array([self._new]))))
        features = self._moved(_joined(self._features)) if self._drafter.reads_features else None
        self._drafter.commit(self._moved(tokens), features)
        self._tokens, self._new, self._features, self.count = [], [], [], 0

    def _moved(self, data: Tensor) -> Tensor:
        """Data on the draft's device, or on the way there; counted unless the target's last layers left it there."""
        device = self._drafter.device
        if data.device != device or device.type == "cpu":
            self._stats.bytes_to_draft += data.nbytes
        return to_device(data, device)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(1, T, ...) of parts one after the other."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=1)
