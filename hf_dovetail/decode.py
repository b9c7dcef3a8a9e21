"""The loop: draft, verify, accept, commit. The only place where data crosses devices, and the only timers.

Knows a drafter, a target and a `select` callback; knows nothing of transformers' generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .accept import Accepted, Select, walk
from .config import TreeShape
from .controller import Controller
from .levels import KeepGoing
from .target import Target
from .tree import DraftTree


@dataclass
class GenerationStats(Mapping):
    """What happened in one call of `generate`; readable by attribute and by key.

    Attributes:
        rounds: forward passes of the target after prefill.
        new_tokens: tokens in the answer.
        drafted: nodes proposed in all rounds.
        accepted: proposed nodes that the answer kept; a round's last token always counts as its bonus token.
        accepted_by_depth: rounds that kept a node at depth 1, 2, ...
        prefill_ms, draft_ms, verify_ms, overhead_ms: wall time; overhead is everything else in the call.
        bytes_to_draft, bytes_to_target: data handed from one model to the other (over the link, where the two
            are on different devices).
    """

    rounds: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    overhead_ms: float = 0.0
    bytes_to_draft: int = 0
    bytes_to_target: int = 0

    @property
    def tokens_per_round(self) -> float:
        """Tokens that a round yields: accepted + 1 on average; the prefill's own token is not counted."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else 0.0

    def _names(self) -> list[str]:
        return [f.name for f in fields(self)] + ["tokens_per_round"]

    def __getitem__(self, name: str) -> Any:
        if name not in self._names():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + 1e3 * (time.perf_counter() - begin))

    def count(self, tree: DraftTree, accepted: Accepted) -> None:
        """Enter one round."""
        self.rounds += 1
        self.new_tokens += len(accepted.tokens)
        self.drafted += tree.num_nodes
        kept = accepted.drafted
        self.accepted += kept
        self.accepted_by_depth += [0] * (kept - len(self.accepted_by_depth))
        for depth in range(kept):
            self.accepted_by_depth[depth] += 1


class Drafter(Protocol):
    """What the loop asks of the draft's side (`plugin.DovetailCandidateGenerator`)."""

    device: torch.device
    reads_features: bool

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


@dataclass(frozen=True)
class Round:
    """One round of the loop, for those who watch it."""

    tree: DraftTree
    accepted: Accepted


def decode(
    target: Target,
    drafter: Drafter,
    prompt: Tensor,
    prefill: Callable[[Any], Any],
    select: Select,
    remaining: Callable[[], int],
    controller: Controller,
    stats: GenerationStats,
    watch: Callable[[Round], None] | None = None,
) -> None:
    """Decode one answer; the tokens go to `select`'s owner, which ends the answer.

    Args:
        target: the verifier, its features tapped.
        drafter: the draft's side.
        prompt: (1, n) int64 on the target's device.
        prefill: runs the prompt with the cache that it is given.
        select: the next token from (1, V) logits.
        remaining: tokens that the answer may still get.
        controller: chooses the tree of each round.
        stats: filled while decoding, also when an exception ends it.
        watch: called after each round.
    """
    begin = time.perf_counter()
    try:
        with stats.clock("prefill_ms"):
            output = target.prefill(prefill)
        token, finished = select(output.logits[:, -1])
        stats.new_tokens += 1
        if finished:
            return
        waiting = Waiting(drafter, stats)
        if controller.largest.nodes:
            waiting.begin(prompt[:, prompt.shape[1] - (target.held - target.first) :], target.first)
        waiting.add((token,), output.features)
        while not finished:
            turn = _Turn(stats)
            most = controller.largest.clipped(min(remaining() - 1, drafter.room(waiting.count)))
            shape = controller.plan(target.allowed(most), target.held, waiting.count, remaining())
            tree = DraftTree.root_only(torch.tensor([[token]]))
            if shape.nodes:
                with stats.clock("draft_ms"):
                    waiting.commit()
                    tree = _propose(drafter, tree.tokens, shape, controller, stats)
                tree = controller.choose(tree)
            with stats.clock("verify_ms"):
                output = target.verify(tree)
            accepted = walk(tree, output.logits, select)
            target.commit(accepted.path)
            stats.count(tree, accepted)
            finished, token = accepted.finished, accepted.tokens[-1]
            if not finished:
                waiting.add(accepted.tokens, _rows(output.features, accepted.path))
            controller.learn(tree, accepted, *turn.times())
            if watch is not None:
                watch(Round(tree, accepted))
    finally:
        total = 1e3 * (time.perf_counter() - begin)
        stats.overhead_ms = total - stats.prefill_ms - stats.draft_ms - stats.verify_ms


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
        self._drafter.begin(_to_draft(known[:, :1], self._drafter, self._stats), start)
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
        drafter, stats = self._drafter, self._stats
        tokens = torch.cat((*self._tokens, torch.tensor([self._new])), dim=1)
        features = None
        if drafter.reads_features:
            features = _to_draft(torch.cat(self._features, dim=1), drafter, stats)
        drafter.commit(_to_draft(tokens, drafter, stats), features)
        self._tokens, self._new, self._features, self.count = [], [], [], 0


class _Turn:
    """The times of one round, as the difference of what the statistics say at its ends."""

    def __init__(self, stats: GenerationStats) -> None:
        self._stats, self._begin = stats, (stats.draft_ms, stats.verify_ms, time.perf_counter())

    def times(self) -> tuple[float, float, float]:
        """ms of drafting, of verification, and of the round so far."""
        draft_ms, verify_ms, begin = self._begin
        stats = self._stats
        return stats.draft_ms - draft_ms, stats.verify_ms - verify_ms, 1e3 * (time.perf_counter() - begin)


def _propose(
    drafter: Drafter, root: Tensor, shape: TreeShape, controller: Controller, stats: GenerationStats
) -> DraftTree:
    """A tree of this shape under `root`, brought to the host in one copy."""
    shifts = controller.shifts
    packed = drafter.propose(shape, controller.keep_going, shifts)
    stats.bytes_to_draft += 0 if shifts is None else shifts.nbytes
    stats.bytes_to_target += packed.nbytes
    return DraftTree.unpack(root, packed.cpu())


def _to_draft(data: Tensor, drafter: Drafter, stats: GenerationStats) -> Tensor:
    """Move data to the draft's device and count it."""
    stats.bytes_to_draft += data.nbytes
    return data.to(drafter.device)


def _rows(features: Tensor | None, path: tuple[int, ...]) -> Tensor | None:
    """The features (1, T, h) of the rows on a path."""
    if features is None or features.shape[1] == len(path):  # all of them
        return features
    return features[:, list(path)]
