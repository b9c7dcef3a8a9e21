"""One call of a layer, computed on a device in blocks of rows, with the cache's states coming and going."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers.cache_utils import Cache

from ..cache import held_states

BLOCK_ROWS = 1024
"""Rows that a layer computes at a time. Fixed, so that memory which happens to be free never decides on roundings."""


@dataclass
class Call:
    """One call of a layer, its arguments by name.

    Args:
        hidden: (B, T, h), its first argument.
        named: the others.
        cache: the one among them that is a cache, or None.
    """

    hidden: Tensor
    named: dict[str, Any]
    cache: Cache | None

    @classmethod
    def of(cls, layer: nn.Module, args: tuple, named: dict[str, Any]) -> Call:
        """Name the arguments that a layer was called with."""
        names = [name for name in inspect.signature(type(layer).forward).parameters if name != "self"]
        every = {**dict(zip(names, args, strict=False)), **named}
        hidden = every.pop(names[0])
        return cls(hidden, every, next((value for value in every.values() if isinstance(value, Cache)), None))


class DeviceStates:
    """Stands in for the cache within a layer on the device: earlier states come along, new ones are kept.

    Args:
        call: the layer's call. device: where it is computed.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        self._cache, self._device, self._rows = call.cache, device, call.hidden.shape[1]
        self._states: list[Tensor] = []
        self._held = self._filled = 0
        self.layer = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values (B, H, t, D) of the next t rows; return all that these may attend to."""
        if not self._states:
            self._begin(keys, values, layer_idx)
        end = self._filled + keys.shape[-2]
        for states, new in zip(self._states, (keys, values), strict=True):
            states[:, :, self._filled : end] = new
        self._filled = end
        return self._states[0][:, :, :end], self._states[1][:, :, :end]

    def _begin(self, keys: Tensor, values: Tensor, layer: int) -> None:
        self.layer, earlier = layer, held_states(self._cache, layer, self._rows)
        self._held = self._filled = 0 if earlier is None else earlier[0].shape[-2]
        for index, new in enumerate((keys, values)):
            states = new.new_empty(*new.shape[:2], self._held + self._rows, new.shape[-1])
            if earlier is not None:
                states[:, :, : self._held] = earlier[index].to(self._device)
            self._states.append(states)

    @property
    def new(self) -> tuple[Tensor, Tensor]:
        """The new keys and values of all rows."""
        keys, values = (states[:, :, self._held :] for states in self._states)
        return keys, values


class Blocks:
    """Computes a layer on a device, `BLOCK_ROWS` rows at a time.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}  # masks and RoPE, the same for many layers

    def __call__(self, layer: nn.Module, call: Call) -> tuple[Tensor, DeviceStates]:
        """What `layer`, whose weights are on the device, answers to the call: (B, T, h) there, and its new states."""
        states = DeviceStates(call, self._device)
        named = {name: states if value is call.cache else self._there(value) for name, value in call.named.items()}
        hidden, total = call.hidden.to(self._device), call.hidden.shape[1]
        step = max(BLOCK_ROWS // hidden.shape[0], 1)
        if total <= step:
            return layer.forward(hidden, **named), states
        parts = []
        for begin in range(0, total, step):
            end = min(begin + step, total)
            cut = _pytree.tree_map_only(Tensor, partial(_rows, begin=begin, end=end, total=total), named)
            if begin and "attention_mask" in cut and cut["attention_mask"] is None:  # causal, from the first key on
                cut["attention_mask"] = self._causal(begin, end)
            parts.append(layer.forward(hidden[:, begin:end], **cut))
        return torch.cat(parts, dim=1), states

    def _causal(self, begin: int, end: int) -> Tensor:
        """(1, 1, rows, end) mask of rows `begin` to `end` of a sequence without padding or earlier positions."""
        ones = torch.ones(end - begin, end, dtype=torch.bool, device=self._device)
        return ones.tril(diagonal=begin)[None, None]

    def _there(self, value: Any) -> Any:
        return _pytree.tree_map_only(Tensor, self._tensor_there, value)

    def _tensor_there(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor, tensor.to(self._device)
        return self._moved[id(tensor)][1]


def _rows(tensor: Tensor, begin: int, end: int, total: int) -> Tensor:
    """Rows `begin` to `end` of a layer's argument: a mask (B, 1, T, S), states (B, T, D), positions (B, T) or (T,).

    Raises:
        ValueError: if it has no dimension of `total` rows where these have it.
    """
    dimension = {4: 2, 3: 1, 2: 1, 1: 0}.get(tensor.ndim)
    if dimension is None or tensor.shape[dimension] != total:
        raise ValueError(f"an argument of shape {tuple(tensor.shape)} cannot be cut into blocks of {total} rows")
    part = tensor.narrow(dimension, begin, end - begin)
    return part[..., : part.shape[-1] - total + end] if tensor.ndim == 4 else part
