"""The loop: draft, verify, accept, commit; the only timers.

Knows the draft's side, a target and a `select` callback; knows nothing of transformers' generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .accept import Accepted, Select, walk
from .drafting import Drafting
from .sharing import SharedCores
from .stats import GenerationStats
from .target import Target
from .tree import DraftTree


@dataclass(frozen=True)
class Round:
    """One round of the loop, for those who watch it."""

    tree: DraftTree
    accepted: Accepted


def decode(
    target: Target,
    drafting: Drafting,
    prompt: Tensor,
    prefill: Callable[[Any], Any],
    select: Select,
    remaining: Callable[[], int],
    stats: GenerationStats,
    cores: SharedCores,
    watch: Callable[[Round], None] | None = None,
) -> None:
    """Decode one answer; the tokens go to `select`'s owner, which ends the answer.

    Args:
        target: the verifier, its features tapped.
        drafting: the draft's side.
        prompt: (1, n) int64 on the target's device.
        prefill: runs the prompt with the cache that it is given.
        select: the next token from (1, V) logits.
        remaining: tokens that the answer may still get.
        stats: filled while decoding, also when an exception ends it.
        cores: watches the passes.
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
        drafting.begin(prompt[:, prompt.shape[1] - (target.held - target.first) :], target.first)
        drafting.add((token,), output.features)
        while not finished:
            turn = _Turn(stats)
            tree = drafting.tree(token, target.held, remaining(), target.allowed)
            with stats.clock("verify_ms"), cores.observed():
                output = target.verify(tree)
            accepted = walk(tree, output.logits, select)
            target.commit(accepted.path)
            stats.count(tree, accepted)
            finished, token = accepted.finished, accepted.tokens[-1]
            if not finished:
                drafting.add(accepted.tokens, _rows(output.features, accepted.path, stats))
            drafting.learn(tree, accepted, *turn.times())
            if watch is not None:
                watch(Round(tree, accepted))
    finally:
        total = 1e3 * (time.perf_counter() - begin)
        stats.cores_shared = cores.found
        stats.overhead_ms = total - stats.prefill_ms - stats.draft_ms - stats.verify_ms


class _Turn:
    """The times of one round, as the difference of what the statistics say at its ends."""

    def __init__(self, stats: GenerationStats) -> None:
        self._stats, self._begin = stats, (stats.draft_ms, stats.verify_ms, time.perf_counter())

    def times(self) -> tuple[float, float, float]:
        """ms of drafting, of verification, and of the round so far."""
        draft_ms, verify_ms, begin = self._begin
        stats = self._stats
        return stats.draft_ms - draft_ms, stats.verify_ms - verify_ms, 1e3 * (time.perf_counter() - begin)


def _rows(features: Tensor | None, path: tuple[int, ...], stats: GenerationStats) -> Tensor | None:
    """The features (1, T, h) of the rows on a path, where the target has left them."""
    if features is None or features.shape[1] == len(path):  # all of them
        return features
    return features.index_select(1, stats.moved(torch.from_numpy(np.array(path)), features.device))
