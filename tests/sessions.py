"""Drafting sessions side by side: the same commits, round by round, on the host, in fixed shapes, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel
from trees import features_of

from hf_dovetail import DovetailAssistantModel, TreeShape, graphs
from hf_dovetail.draft import DraftSession
from hf_dovetail.tree import DraftTree

COMMITS = (11, 1, 4, 2, 9, 1, 3, 20, 5, 2)
"""Rows committed before each round; 20 are more than a fixed round computes."""


def made(kind: str, family: str, blocks: int = 1) -> tuple[PreTrainedModel, DovetailAssistantModel]:
    """A target and a random draft in float64: what differs by more than nothing is wrong."""
    target, draft = tiny.random_pair(kind, family, blocks)
    return target.double(), tiny.met(draft.double(), target)


class Answer:
    """One sequence, drafted for by sessions that are given the same commits."""

    def __init__(self, target: Any, draft: DovetailAssistantModel, seed: int = 3) -> None:
        self.draft, self.ids = draft, tiny.prompt(1 + sum(COMMITS), seed)
        self.features = features_of(target, self.ids)

    def rounds(
        self, session: DraftSession, shapes: list[TreeShape], shifts: list[np.ndarray] | None = None
    ) -> list[DraftTree]:
        """The tree of every round."""
        session.begin(self.ids[:, :1], 0)
        corrections = shifts or [None] * len(shapes)
        return [self.round(session, turn, *now) for turn, now in enumerate(zip(shapes, corrections, strict=True))]

    def round(self, session: DraftSession, turn: int, shape: TreeShape, shifts: np.ndarray | None = None) -> DraftTree:
        known, count = 1 + sum(COMMITS[:turn]), COMMITS[turn]
        features = None if self.features is None else self.features[:, known - 1 : known + count - 1]
        session.commit(self.ids[:, known : known + count], features)
        return DraftTree.unpack(self.ids[:, known + count - 1 : known + count], session.grow(shape, None, shifts))


def assert_same(found: list[DraftTree], expected: list[DraftTree]) -> None:
    """The same nodes under the same parents in the same order, and the same log-probabilities."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.parents.tolist() == other.parents.tolist()
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-6, atol=1e-5)


def replaying(session: DraftSession, monkeypatch: Any) -> list[str]:
    """Let a session capture and replay as on a GPU: a replay computes from what lay in the inputs' tensors."""
    log: list[str] = []

    class Graph:
        def __init__(self, compute: Callable[[], Tensor], packed: Tensor) -> None:
            self.compute, self.packed = compute, packed

        def replay(self) -> None:
            log.append("replay")
            self.packed.copy_(self.compute())

        def pool(self) -> tuple[int, int]:
            return 0, 0

    def capture(compute: Callable[[], Tensor], *rest: Any) -> tuple[Graph, Tensor]:
        log.append("capture")
        packed = compute()
        return Graph(compute, packed), packed

    monkeypatch.setattr(graphs, "capture", capture)
    session._rounds._bench.captures = True
    return log
