"""Keys and values of a draft's rows in preallocated buffers, and who may use the buffers that a draft keeps.

The committed rows stand first, in order; a tree's rows are written behind them and overwritten by what comes
next. Knows tensors only: neither the network nor the tree.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

EXTENT = 256
"""Buffers, and the keys that a fixed-shape step looks at, come in multiples of this many rows."""

ROUND_ROWS = 16
"""Committed rows that a fixed-shape round computes, real ones and padding; earlier ones are computed before it."""


def rounded(rows: int) -> int:
    """`rows`, rounded up to a multiple of `EXTENT`."""
    return -(-rows // EXTENT) * EXTENT


class RowBuffer:
    """Keys and values of all blocks, (blocks, 2, 1, kv_heads, capacity, head_dim); a `blocks.KeyValueStore`.

    Args:
        blocks, kv_heads, head_dim: the network's.
        capacity: rows to reserve; more are made when needed.
        device, dtype: where and in which precision.

    Attributes:
        states: the buffer. Rows that nobody has written are zero: a masked NaN would still spoil a sum.
    """

    def __init__(
        self, blocks: int, kv_heads: int, head_dim: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._place = {"device": device, "dtype": dtype}
        self.states = self._zeros(blocks, kv_heads, rounded(max(capacity, 1)), head_dim)
        self._start = self._end = 0
        self._slots: Tensor | None = None

    @torch.inference_mode(False)  # a later caller may not be in inference mode
    def _zeros(self, blocks: int, kv_heads: int, capacity: int, head_dim: int) -> Tensor:
        return torch.zeros(blocks, 2, 1, kv_heads, capacity, head_dim, **self._place)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self.states.shape[4]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows; what is held stays."""
        if rows > self.capacity:
            old = self.states
            self.states = self._zeros(old.shape[0], old.shape[3], rounded(max(rows, 2 * self.capacity)), old.shape[5])
            self.states[..., : old.shape[4], :] = old

    def at(self, start: int, count: int) -> RowBuffer:
        """This buffer, set to write the next `count` rows from `start` on and to show all rows up to them."""
        self._start, self._end, self._slots = start, start + count, None
        return self

    def at_slots(self, slots: Tensor, extent: int) -> RowBuffer:
        """This buffer, set to write at `slots` (T,) int64 on its device, and to show its first `extent` rows."""
        self._slots, self._end = slots, extent
        return self

    def update(self, keys: Tensor, values: Tensor, layer: int, **named: object) -> tuple[Tensor, Tensor]:
        """Write (1, kv_heads, T, D) states where `at` or `at_slots` said; return the rows shown."""
        held_keys, held_values = self.states[layer]
        if self._slots is None:
            held_keys[:, :, self._start : self._end] = keys
            held_values[:, :, self._start : self._end] = values
        else:
            held_keys.index_copy_(2, self._slots, keys)
            held_values.index_copy_(2, self._slots, values)
        return held_keys[:, :, : self._end], held_values[:, :, : self._end]

    def clear(self, slots: Tensor) -> None:
        """Zero the rows at `slots` (T,) int64."""
        self.states.index_fill_(4, slots, 0)


class Pool:
    """What a draft keeps on its device between answers, for one session at a time.

    Whoever comes while it is taken does without. It is free again when its user is gone.

    Attributes:
        bench: what the last user left, or None.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._user: weakref.ref | None = None
        self._network: Any = None
        self.bench: Any = None

    def __reduce__(self) -> tuple:
        """A copy of a draft has a pool of its own, empty."""
        return Pool, ()

    @property
    def taken(self) -> bool:
        """Whether somebody has it."""
        return self._user is not None and self._user() is not None

    def take(self, user: Any, network: Any) -> bool:
        """Give the pool to `user` for as long as it lives, if it is free; whether it was.

        Args:
            user: only a weak reference is kept.
            network: what identifies the weights in memory; the bench of other weights is dropped.
        """
        with self._lock:
            if self.taken:
                return False
            self._user = weakref.ref(user)
            if self._network != network:
                self._network, self.bench = network, None
            return True
