"""The loop: draft, verify, accept, commit. The only place where data crosses devices, and the only timers.

Knows a drafter, a target and a `select` callback; knows nothing of transformers' generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .accept import Accepted, Select, walk
from .config import TreeShape
from .target import Target, TargetOutput
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

    def propose(self, shape: TreeShape) -> Tensor:
        """(1, 3, N) int32: a packed tree."""

    def room(self) -> int:
        """Levels that the draft's positions still allow."""


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
    shape: TreeShape,
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
        shape: the tree of a round.
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
        known, root = prompt[:, prompt.shape[1] - (target.held - target.first) :], torch.tensor([[token]])
        with stats.clock("draft_ms"):
            if shape.nodes:
                drafter.begin(_to_draft(known[:, :1], drafter, stats), target.first)
                _commit(drafter, torch.cat((known[:, 1:].cpu(), root), dim=1), output, stats)
        while not finished:
            tree = _propose(drafter, root, target.allowed(shape.clipped(min(remaining() - 1, drafter.room()))), stats)
            with stats.clock("verify_ms"):
                output = target.verify(tree)
            accepted = walk(tree, output.logits, select)
            target.commit(accepted.path)
            stats.count(tree, accepted)
            finished, root = accepted.finished, torch.tensor([[accepted.tokens[-1]]])
            if shape.nodes and not finished:
                with stats.clock("draft_ms"):
                    _commit(drafter, torch.tensor([accepted.tokens]), _rows(output, accepted.path), stats)
            if watch is not None:
                watch(Round(tree, accepted))
    finally:
        total = 1e3 * (time.perf_counter() - begin)
        stats.overhead_ms = total - stats.prefill_ms - stats.draft_ms - stats.verify_ms


def _propose(drafter: Drafter, root: Tensor, shape: TreeShape, stats: GenerationStats) -> DraftTree:
    """A tree of this shape under `root`, brought to the host in one copy."""
    if shape.nodes == 0:
        return DraftTree.root_only(root)
    with stats.clock("draft_ms"):
        packed = drafter.propose(shape)
        stats.bytes_to_target += packed.nbytes
        return DraftTree.unpack(root, packed.cpu())


def _commit(drafter: Drafter, tokens: Tensor, output: TargetOutput, stats: GenerationStats) -> None:
    """Hand the draft what is certain: token ids, and the features before them if it reads them."""
    features = None
    if drafter.reads_features:
        features = _to_draft(output.features, drafter, stats)
    drafter.commit(_to_draft(tokens, drafter, stats), features)


def _to_draft(data: Tensor, drafter: Drafter, stats: GenerationStats) -> Tensor:
    """Move data to the draft's device and count it."""
    stats.bytes_to_draft += data.nbytes
    return data.to(drafter.device)


def _rows(output: TargetOutput, path: tuple[int, ...]) -> TargetOutput:
    """The output's rows on a path."""
    features = None if output.features is None else output.features[:, list(path)]
    return TargetOutput(output.logits, features)
