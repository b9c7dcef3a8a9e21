"""How a session computes the rows of its draft: the committed ones, and a tree's behind them.

`BlockSteps` writes the rows of blocks into preallocated buffers; `LanguageModelSteps` runs any causal LM of
transformers with its cache and masks. A tree's rows are forgotten by being written over.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .blocks import KeyValueStore, RotaryTable, Rotation
from .levels import Best
from .network import DraftNetwork
from .rows import RowBuffer

_CHUNK = 256
"""Committed rows computed at a time, so that the mask of a long prompt stays small."""


class Network(Protocol):
    """What computes rows: a draft with a fusion, or a causal LM in the same blocks (`recast.RecastLM`).

    Attributes:
        input_size: width of what a row reads beside its token; 0 if that is nothing.
        target_ids, best: as `levels.Stepper`'s.
        rotary: cos and sin of its positions.
    """

    device: torch.device
    dtype: torch.dtype
    input_size: int
    target_ids: Tensor | None
    best: Best
    rotary: RotaryTable

    def step(
        self,
        tokens: Tensor,
        inputs: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """Compute rows, with all that depends on positions and branches made by the caller.

        Args:
            tokens: (B, T). inputs: (B, T, `input_size`) features, or hidden states of rows before.
            rotation: of the rows' positions, from `rotary`.
            mask: (B or 1, 1, T, K) bool, or to be added, in the network's precision; None: all keys for all rows.
            store: earlier rows' keys and values.

        Returns:
            (B, T, h) hidden states.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) float32 logits of (B, T, h) hidden states."""

    def new_rows(self, capacity: int) -> RowBuffer:
        """Empty buffers for one drafting session."""

    def addresses(self) -> tuple:
        """Where all weights lie in memory that rows are computed with; graphs hold on to these."""


class BlockSteps:
    """A network's rows in a `RowBuffer`; a `levels.Stepper` for the host.

    Args:
        network: what computes them.
        buffer: where keys and values live.
        sharpness: of the session, see `draft.DraftSession`.

    Attributes:
        start: position of the first row. held: committed rows.
    """

    def __init__(self, network: Network, buffer: RowBuffer, sharpness: float = 1.0) -> None:
        self._network, self.buffer, self._sharpness = network, buffer, sharpness
        self.target_ids, self.best = network.target_ids, network.best
        self.start = self.held = 0
        self._tree = self._level = 0  # rows and levels of the tree so far
        self._device, self._dtype, self._least = network.device, network.dtype, torch.finfo(network.dtype).min

    def catch_up(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Compute committed rows: tokens (1, T), features (1, T, f); return the last one's hidden state (1, 1, h)."""
        for part, inputs in zip(tokens.split(_CHUNK, dim=1), features.split(_CHUNK, dim=1), strict=True):
            count, mask = part.shape[1], None
            if count > 1:
                mask = inputs.new_full((1, 1, count, self.held + count), self._least).triu_(self.held + 1)
            self.buffer.reserve(self.held + count)
            store, rotation = self.buffer.at(self.held, count), self._rotation(self.held, count)
            hidden = self._network.step(part, inputs, rotation, mask, store)
            self.held += count
        return hidden[0, -1:].unsqueeze(0)  # not hidden[:, -1:]: its strides cost the next product its fast path

    def level(self, tokens: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        """See `levels.Stepper`; on the host only."""
        count, first = tokens.shape[1], self.held + self._tree
        self.buffer.reserve(first + count)
        mask = hidden.new_zeros(1, 1, count, first + count)
        mask[..., self.held :].masked_fill_(~visible, self._least)
        store, rotation = self.buffer.at(first, count), self._rotation(self.held + self._level, 1)
        self._tree += count
        self._level += 1
        return self._network.step(tokens, hidden, rotation, mask, store)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `levels.Stepper`."""
        return self._network.logits(hidden) * self._sharpness

    def forget(self) -> None:
        """Drop the tree's rows: the next rows are written over them."""
        self._tree = self._level = 0

    def _rotation(self, row: int, count: int) -> Rotation:
        """The rotation of `count` positions from row `row`'s on."""
        first = self.start + row
        cos, sin = self._network.rotary.table(first + count, self._device, self._dtype)
        return cos[:, first : first + count], sin[:, first : first + count]


class LanguageModelSteps:
    """A wrapped causal LM's rows in its cache; a `levels.Stepper` for the host and for devices.

    Args:
        draft: a draft with `fusion="none"`.
        capacity: positions to reserve in the cache; a hint.
        sharpness: of the session, see `draft.DraftSession`.

    Attributes:
        start: position of the first row. held: committed rows.
    """

    def __init__(self, draft: DraftNetwork, capacity: int, sharpness: float = 1.0) -> None:
        self._draft, self._device, self._sharpness = draft, draft.device, sharpness
        self.target_ids, self.best = draft.target_ids, draft.best
        self.cache, self._mask = draft.new_cache(capacity), draft.mask_builder()
        self.start = self.held = self._level = 0
        self._slots = torch.arange(0, device=self._device)  # (R,) in the sequence, of the tree's rows so far

    def catch_up(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Compute the committed rows of (1, T) tokens, all that it reads; return the last hidden state (1, 1, h)."""
        keys = torch.arange(self.held + tokens.shape[1], device=self._device).unsqueeze(0)
        slots = keys[:, self.held :]
        hidden = self._step(tokens, slots, keys, keys[:, None, :] <= slots[:, :, None])
        self.held += tokens.shape[1]
        return hidden[:, -1:]

    def level(self, tokens: Tensor, hidden: Tensor, visible: Tensor) -> Tensor:
        """See `levels.Stepper`."""
        here = torch.full_like(tokens, self.held + self._level)
        self._slots = torch.cat((self._slots, here[0]))
        self._level += 1
        committed = visible.new_ones(len(visible), self.held)
        keys = torch.cat((torch.arange(self.held, device=self._device), self._slots)).unsqueeze(0)
        return self._step(tokens, here, keys, torch.cat((committed, visible), dim=1).unsqueeze(0))

    def logits(self, hidden: Tensor) -> Tensor:
        """See `levels.Stepper`."""
        return self._draft.logits(hidden).to(self._device) * self._sharpness

    def forget(self) -> None:
        """Drop the tree's rows."""
        self.cache.truncate(self.held)
        self._slots, self._level = self._slots[:0], 0

    def _step(self, tokens: Tensor, slots: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        hidden = self._draft(tokens, None, self.start + slots, self._mask(allowed, slots, keys), self.cache)
        return hidden.to(self._device)  # a target that drafts for itself may end on another device
