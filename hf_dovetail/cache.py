"""Key/value caches that grow in place and can keep one path of a tree. The only file that knows `Cache`.

`GrowingCache` is a `DynamicCache` for the models it is given to, but its layers write into preallocated
buffers. Sliding-window layers keep every position too: the window belongs to the mask (see `attention`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .devices import Move

_SMALLEST_BUFFER = 64


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, H, length, D) views of buffers whose capacity doubles when it runs out."""

    def __init__(self, capacity: int = 0) -> None:
        self.length, self.capacity = 0, capacity
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._bytes: list[np.ndarray] | None = None  # the buffers as NumPy sees them, once it was asked to
        super().__init__()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_bytes": None}  # a copy's own buffers are elsewhere

    def _view(self, index: int) -> Tensor | None:
        return self._buffers[index].narrow(2, 0, self.length) if self._buffers else None

    keys = property(lambda self: self._view(0), lambda self, value: self._refuse(value))
    values = property(lambda self: self._view(1), lambda self, value: self._refuse(value))

    @staticmethod
    def _refuse(value: object) -> None:
        if value is not None:  # the base class sets None when it is made
            raise AttributeError("the states of a GrowingLayer change by update, keep and crop only")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note where and in which precision the buffers live; they are made by the first `update`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) states and return all of them, without copying the earlier ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        self._reserve(key_states, value_states, start)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, start, states.shape[2]).copy_(states)
        if start == 0:  # the contiguous tensors that a DynamicCache would return: prefill stays bit-identical
            return key_states, value_states
        return self.keys, self.values

    def _reserve(self, key_states: Tensor, value_states: Tensor, filled: int) -> None:
        """Make room for `self.length` positions, keeping the first `filled`."""
        held = self._buffers[0].shape[-2] if self._buffers else 0
        if held >= self.length:
            return
        size = max(self.length, 2 * held, self.capacity, _SMALLEST_BUFFER)
        grown = tuple(s.new_empty(*s.shape[:2], size, s.shape[-1]) for s in (key_states, value_states))
        for new, old in zip(grown, self._buffers or (), strict=False):
            new[:, :, :filled] = old[:, :, :filled]
        self._buffers, self._bytes = grown, None

    @property
    def on_host(self) -> bool:
        """Whether its states lie on the CPU, or nowhere yet."""
        return not self.is_initialized or self.device.type == "cpu"

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def keep(self, start: int, positions: Tensor) -> None:
        """After position `start`, keep only `positions` (ascending, on the layer's device), moved together."""
        self.length = start + len(positions)
        for buffer in self._buffers or ():
            buffer[:, :, start : self.length] = buffer[:, :, positions]

    def keep_on_host(self, length: int, moves: Sequence[tuple[slice, slice]]) -> None:
        """Make `moves` (from, to: earlier ones never write over what later ones read) and keep `length` positions.

        By NumPy's slices, which for the few positions of many layers take less time than an index into a tensor.
        """
        self.length = length
        if self._bytes is None:
            self._bytes = [buffer.view(torch.uint8).numpy() for buffer in self._buffers or ()]
        for states in self._bytes:
            for source, place in moves:
                states[:, :, place] = states[:, :, source]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions, with `DynamicLayer.crop`'s sign."""
        self.length += tokens_to_remove

    def reset(self) -> None:
        """Forget every position; the buffers stay."""
        self.length = 0


class GrowingCache(DynamicCache):
    """A cache of `GrowingLayer`s for a model with `num_layers` attention layers; `capacity` is only a hint."""

    def __init__(self, num_layers: int, capacity: int = 0) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [GrowingLayer(capacity) for _ in range(num_layers)]

    @classmethod
    def adopt(cls, cache: Cache, num_layers: int, capacity: int) -> GrowingCache:
        """A growing copy of what `cache` holds; `cache` itself stays as it is.

        A sliding layer has dropped old positions: they are filled with zeros, which the window masks out.
        """
        grown = cls(num_layers, capacity)
        for layer, source in zip(grown.layers, cache.layers, strict=False):
            if not source.is_initialized or source.get_seq_length() == 0:
                continue
            dropped = source.get_seq_length() - source.keys.shape[-2]
            layer.update(*(_pad_front(states, dropped) for states in (source.keys, source.values)))
        return grown

    @property
    def length(self) -> int:
        """Positions held by every layer."""
        return self.layers[0].length

    def keep(self, start: int, path: Sequence[int], move: Move = Tensor.to) -> None:
        """Of the positions after `start`, keep those of a path of the tree (ascending), and nothing else.

        Layers may be on several devices; `move` brings the positions to each.
        """
        stay = next((place for place, node in enumerate(path) if place != node), len(path))
        if stay == len(path):
            self.truncate(start + stay)
            return
        begin, moves = start + stay, _moves(start, path)  # the nodes before stand where they shall
        elsewhere = {layer.device for layer in self.layers if not layer.on_host}
        if elsewhere:
            positions = torch.tensor(path[stay:], device="cpu") + start
            there = {device: move(positions, device) for device in elsewhere}
        for layer in self.layers:
            if layer.on_host:
                layer.keep_on_host(start + len(path), moves)
            else:
                layer.keep(begin, there[layer.device])

    def truncate(self, length: int) -> None:
        """Forget every position from `length` on; the buffers stay."""
        self.crop(length - self.length)

    def export(self, cache: Cache) -> None:
        """Leave in `cache` what plain `generate` would have left there, replacing its contents.

        `cache` is a fresh or adopted `DynamicCache`; its layers take views, so nothing is copied.
        """
        while len(cache.layers) < len(self.layers):
            cache.layers.append(cache.layer_class_to_replicate())
        for layer, target in zip(self.layers, cache.layers, strict=True):
            keys, values = layer.keys, layer.values
            if not target.is_initialized:
                target.lazy_initialization(keys, values)
            if isinstance(target, DynamicSlidingWindowLayer):
                keys, values = (s[:, :, -target.sliding_window + 1 :] for s in (keys, values))
                target.cumulative_length = layer.length
            target.keys, target.values = keys, values

    def check_integrity(self, length: int) -> None:
        """Raise AssertionError unless every layer holds exactly `length` positions within its buffer."""
        for index, layer in enumerate(self.layers):
            assert layer.length == length, f"layer {index} holds {layer.length} positions, expected {length}"
            assert layer._buffers is None or layer._buffers[0].shape[-2] >= length


def can_branch(cache: Cache) -> bool:
    """Whether every layer is plain attention, so that one forward pass can hold branches and keep one of them."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and not cache.offloading and all(type(layer) in plain for layer in cache.layers)


def num_cache_layers(config: PreTrainedConfig) -> int:
    """Layers that the model's own cache has."""
    return len(DynamicCache(config=config).layers) or config.get_text_config(decoder=True).num_hidden_layers


def _moves(start: int, path: Sequence[int]) -> list[tuple[slice, slice]]:
    """From where to where positions move so that a path (ascending) of those after `start` stands together."""
    moves = []
    for shift, run in groupby(enumerate(path), key=lambda pair: pair[1] - pair[0]):
        first, *rest = (start + place for place, _ in run)
        end = first + len(rest) + 1
        if shift:
            moves.append((slice(first + shift, end + shift), slice(first, end)))
    return moves


def _pad_front(states: Tensor, count: int) -> Tensor:
    """`count` zero positions before (B, H, T, D) states."""
    return torch.nn.functional.pad(states, (0, 0, count, 0)) if count else states


def streamable(cache: object) -> bool:
    """Whether a layer's new states may be computed elsewhere and handed in afterwards (`held_states`, `snapshot`)."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)
    known = type(cache) in (DynamicCache, GrowingCache) and not cache.offloading
    return known and all(type(layer) in plain for layer in cache.layers)


def held_states(cache: Cache, index: int, rows: int) -> tuple[Tensor, Tensor] | None:
    """The earlier keys and values (B, H, T, D) of layer `index` that a mask for `rows` new positions counts."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    count = 0 if layer is None or not layer.is_initialized else layer.get_mask_sizes(rows)[0] - rows
    return (layer.keys[:, :, -count:], layer.values[:, :, -count:]) if count else None


def snapshot(cache: Cache) -> Callable[[], None]:
    """What takes a streamable cache back to what it holds now; nothing is copied, since no update writes over it."""
    layers = [(layer, dict(vars(layer))) for layer in cache.layers]

    def restore() -> None:
        del cache.layers[len(layers) :]
        for layer, state in layers:
            vars(layer).clear()
            vars(layer).update(state)

    return restore
