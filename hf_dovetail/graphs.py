"""A round of drafting in fixed shapes on a device, from the committed rows to the packed tree, as one CUDA graph.

All that changes from round to round (tokens, features, how many rows are held) is data in tensors with an address
of their own, so that a round is replayed with one call. Where there are no graphs, the same function runs as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .blocks import Rotation
from .config import TreeShape
from .draws import Choice
from .levels import expand_on_device, tree_rows
from .rows import ROUND_ROWS as _ROWS
from .rows import Pool, RowBuffer, rounded
from .steps import BlockSteps, Network
from .tree import rerank

logger = logging.get_logger(__name__)

_EAGER_ROUNDS = 2
"""Rounds of a kind before it is captured: a kind that occurs once is not worth it."""
_MOST_GRAPHS = 32


class Inputs:
    """What a round reads, at fixed addresses: the committed rows that are new, padded, and three counters.

    Attributes:
        tokens: (1, 16) int64. features: (1, 16, f).
        count: (1,) int64, how many of them are real. held: (1,) int64, rows committed before them.
        position: (1,) int64, of the first of them.
    """

    def __init__(self, input_size: int, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            self.tokens = torch.zeros(1, _ROWS, dtype=torch.long, device=device)
            self.features = torch.zeros(1, _ROWS, input_size, dtype=dtype, device=device)
            self.count, self.held, self.position = torch.zeros(3, 1, dtype=torch.long, device=device)
        self._kept: dict[tuple, Tensor] = {}

    def fill(self, tokens: Tensor, features: Tensor, held: int, start: int) -> None:
        """Set the next round's: (1, T) tokens and (1, T, f) features, T at most 16."""
        count = tokens.shape[1]
        self.tokens[:, :count] = tokens
        self.features.zero_()  # padding must stay finite
        self.features[:, :count] = features
        self.count.fill_(count)
        self.held.fill_(held)
        self.position.fill_(start + held)

    def kept(self, values: Tensor) -> Tensor:
        """The same values at an address of their own, one for each shape and precision."""
        key = values.shape, values.dtype
        if key not in self._kept:
            with torch.inference_mode(False):
                self._kept[key] = torch.zeros(values.shape, dtype=values.dtype, device=self.tokens.device)
        return self._kept[key].copy_(values)


class FixedSteps:
    """A tree's rows in fixed shapes; a `levels.Stepper` whose counters live on the device.

    Args:
        network: what computes them. buffer: their keys and values.
        table: cos and sin of all positions that can occur.
        extent: rows of the buffer that every row looks at, most of them masked.
        end: (1,) int64, committed rows. position: (1,) int64, of the first level.
        sharpness: of the session, see `draft.DraftSession`.
    """

    def __init__(
        self,
        network: Network,
        buffer: RowBuffer,
        table: Rotation,
        extent: int,
        end: Tensor,
        position: Tensor,
        sharpness: float,
    ) -> None:
        self._sharpness, self.target_ids, self.best = sharpness, network.target_ids, network.best
        self._network, self._buffer, self._table, self._extent = network, buffer, table, extent
        self._end, self._position = end, position
        self._least = torch.finfo(network.dtype).min
        self._committed = self._penalty(torch.arange(extent, device=end.device) < end)  # (extent,)

    def level(self, tokens: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        """See `levels.Stepper`."""
        count, rows = visible.shape
        slots = self._end + torch.arange(rows, device=visible.device)
        mask = self._committed.repeat(count, 1).index_copy_(1, slots, self._penalty(visible))
        store = self._buffer.at_slots(slots[rows - count :], self._extent)
        rotation = looked_up(self._table, self._position)
        self._position = self._position + 1
        return self._network.step(tokens, hidden, rotation, mask[None, None], store)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `levels.Stepper`."""
        return self._network.logits(hidden) * self._sharpness

    def _penalty(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self._network.dtype, device=allowed.device).masked_fill_(
            ~allowed, self._least
        )


def looked_up(table: Rotation, positions: Tensor) -> Rotation:
    """The rotation of (T,) positions on the device."""
    return table[0].index_select(1, positions), table[1].index_select(1, positions)


def fixed_round(
    network: Network,
    inputs: Inputs,
    buffer: RowBuffer,
    table: Rotation,
    extent: int,
    shape: TreeShape,
    sharpness: float,
    shifts: Tensor | None,
    choice: Choice | None,
) -> Tensor:
    """One round: the committed rows, the levels of the tree, its re-ranking; (1, 3, N) int32.

    The host reads nothing, and a second run with the same inputs does the same. The tree's rows are zeroed at
    the end, so that an overflow in one tree does not outlive it.
    """
    rows = torch.arange(_ROWS, device=inputs.held.device)
    slots = inputs.held + rows
    sees = torch.arange(extent, device=rows.device) <= slots[:, None]  # (16, extent)
    mask = torch.zeros(sees.shape, dtype=network.dtype, device=rows.device)
    mask.masked_fill_(~sees, torch.finfo(network.dtype).min)
    rotation = looked_up(table, inputs.position + rows)
    hidden = network.step(inputs.tokens, inputs.features, rotation, mask[None, None], buffer.at_slots(slots, extent))
    root = hidden.index_select(1, inputs.count - 1)  # (1, 1, h)
    end = inputs.held + inputs.count
    steps = FixedSteps(network, buffer, table, extent, end, inputs.position + inputs.count, sharpness)
    packed = rerank(expand_on_device(steps, root, shape, shifts, choice), shape.nodes)
    buffer.clear(end + torch.arange(max(_ROWS, tree_rows(shape)), device=rows.device))
    return packed


@dataclass(frozen=True)
class Captured:
    """A captured round: replay `graph`, then read `packed`; `table` is kept alive since the graph reads it."""

    graph: Any
    packed: Tensor
    table: Rotation


class Bench:
    """Everything with a fixed address that rounds work on, and the graphs captured over it.

    Attributes:
        graphs: per kind of round (shape, extent, length of the table, sharpness, what corrects and how the target
            chooses), least recently used first: how often it ran as it is, or what was captured.
        captures: whether to capture at all; False once it has failed.
    """

    def __init__(self, network: Network, capacity: int) -> None:
        self.buffer = network.new_rows(capacity)
        self.inputs = Inputs(network.input_size, network.device, network.dtype)
        self.graphs: OrderedDict[tuple, int | Captured] = OrderedDict()
        self.captures = network.device.type == "cuda"

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows; graphs over a buffer that is no more are dropped."""
        if rows > self.buffer.capacity:
            self.buffer.reserve(rows)
            self.graphs.clear()

    def run(self, kind: tuple, table: Rotation, compute: Callable[[], Tensor]) -> Tensor:
        """The result of `compute`, from a graph once this kind of round has occurred a few times."""
        known = self.graphs.pop(kind, 0)
        if not isinstance(known, Captured) and known >= _EAGER_ROUNDS and self.captures:
            known = self._capture(table, compute) or known
        self.graphs[kind] = known if isinstance(known, Captured) else known + 1
        if len(self.graphs) > _MOST_GRAPHS:
            self.graphs.popitem(last=False)
        if not isinstance(known, Captured):
            return compute()
        known.graph.replay()
        return known.packed.clone()  # the next replay writes over it

    def _capture(self, table: Rotation, compute: Callable[[], Tensor]) -> Captured | None:
        """A graph of `compute`; where there can be none, say so once and go on without."""
        pools = (known.graph.pool() for known in self.graphs.values() if isinstance(known, Captured))
        try:
            graph, packed = capture(compute, next(pools, None), self.inputs.tokens.device)
        except RuntimeError as error:
            self.captures = False
            logger.info("the draft runs without CUDA graphs: capturing a round failed (%s)", error)
            return None
        return Captured(graph, packed, table)


def capture(compute: Callable[[], Tensor], pool: Any, device: torch.device) -> tuple[Any, Tensor]:
    """Capture `compute`, which may run any number of times, as a CUDA graph with memory from `pool`."""
    with torch.cuda.device(device):
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            compute()  # what libraries set up at first use must not be captured
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            packed = compute()
    return graph, packed


class DeviceRounds:
    """The rounds of one session on a device, replayed from graphs where that is possible.

    Args:
        network: what computes rows.
        pool: the draft's. Its bench is used, unless another session is at it: then the session makes its own, for so
            short a time that nothing is captured.
        capacity: rows to reserve; a hint.
        sharpness: of the session, see `draft.DraftSession`.
    """

    def __init__(self, network: Network, pool: Pool, capacity: int, sharpness: float) -> None:
        self._network, self._sharpness = network, sharpness
        owns = pool.take(self, network.addresses())
        bench = pool.bench if owns else None
        if bench is None:
            bench = Bench(network, capacity)
            bench.captures = bench.captures and owns
            pool.bench = bench if owns else pool.bench
        else:
            bench.reserve(capacity)
            bench.buffer.states.zero_()
        self._bench, self.steps = bench, BlockSteps(network, bench.buffer)

    def grow(
        self,
        tokens: Tensor,
        features: Tensor,
        shape: TreeShape,
        shifts: Tensor | None = None,
        choice: Choice | None = None,
    ) -> Tensor:
        """Commit rows, (1, T) tokens and (1, T, f) features, and grow a tree: (1, 3, N) int32. All is on the device."""
        network, bench, steps, sharpness = self._network, self._bench, self.steps, self._sharpness
        early, start = max(tokens.shape[1] - _ROWS, 0), steps.start
        if early:
            bench.reserve(steps.held + early)
            steps.catch_up(tokens[:, :early], features[:, :early])
        held, count = steps.held, tokens.shape[1] - early
        extent = rounded(held + count + max(_ROWS, tree_rows(shape)))
        bench.reserve(extent)
        table = network.rotary.table(start + extent, network.device, network.dtype)
        bench.inputs.fill(tokens[:, early:], features[:, early:], held, start)
        corrections = None if shifts is None else bench.inputs.kept(shifts)
        chooses = None if choice is None else replace(choice, log_noise=bench.inputs.kept(choice.log_noise))
        corrects = None if shifts is None else shifts.shape
        packed = bench.run(
            (shape, extent, table[0].shape[1], sharpness, corrects, None if choice is None else choice.kind),
            table,
            lambda: fixed_round(
                network, bench.inputs, bench.buffer, table, extent, shape, sharpness, corrections, chooses
            ),
        )
        steps.held += count
        return packed
