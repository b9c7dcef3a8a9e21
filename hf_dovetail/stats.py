"""What happened in one call of `generate`: counts, times, bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from .accept import Accepted
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
            are on different devices); of a target with layers on the draft's device, all that goes there, and back.
        cores_shared: whether the target's threads were found to get less than their time, in this call or less than
            half a minute before it: other processes keep the cores busy, or a CPU quota ends them (`sharing`).
        draft_failed: whether the draft failed on the way, and the rest was decoded plainly.
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
    cores_shared: bool = False
    draft_failed: bool = False

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

    def moved(self, data: Tensor, device: torch.device) -> Tensor:
        """Data on a device; what crosses to get there is counted."""
        if data.device != device:
            if device.type == "cpu":
                self.bytes_to_target += data.nbytes
            else:
                self.bytes_to_draft += data.nbytes
        return data.to(device)

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
