"""What a pass brings from one device to another, on accelerate's hooks.

Every tensor that the modules on the other side read crosses once per pass, however many of them read it. Knows nothing
of which modules are where.
"""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import torch
from accelerate.hooks import ModelHook
from accelerate.utils import find_device, recursively_apply
from torch import Tensor, nn

from ..devices import Move


class Crossing(threading.local):
    """What the running pass of this thread has brought from one device to another.

    Attributes:
        move: how.
        verifying: whether the logits stay where they are, since whoever runs the pass takes from them what it needs.
        given: counterparts that are on the other device from the start, by id and device of their originals.
        brought: those and what has been moved since, each beside its original, which must live as long.
        source: device of the pass's inputs.
        inputs: arguments of the tables that are being computed, by id of the table.
        trying: whether tables are compared with their twins.
    """

    move: Move = staticmethod(Tensor.to)
    verifying = trying = False
    source: torch.device | None = None

    def __init__(self) -> None:
        self.given: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.brought: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.inputs: dict[int, tuple] = {}

    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on `device`; the same copy for all who ask in one pass."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self.brought:
            self.brought[key] = tensor, self.move(tensor, device)
        return self.brought[key][1]

    def __reduce__(self) -> tuple:
        raise RuntimeError(
            "a target with layers on two devices cannot be copied; call hf_dovetail.restore_target(model) first"
        )

    def __deepcopy__(self, memo: dict) -> Crossing:
        return self.__reduce__()


class Enter(ModelHook):
    """Brings a module's inputs to its device."""

    def __init__(self, crossing: Crossing, device: torch.device, kept: frozenset[str]) -> None:
        self._crossing, self._device, self._kept = crossing, device, kept

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        """The inputs on the device."""
        bring = partial(self._crossing.bring, device=self._device)
        moved = {k: v if k in self._kept else recursively_apply(bring, v) for k, v in named.items()}
        return recursively_apply(bring, args), moved


class EnterDecoder(Enter):
    """A pass begins and ends with the decoder."""

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        """Begin a pass."""
        self._crossing.brought = dict(self._crossing.given)
        return super().pre_forward(module, *args, **named)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """End the pass."""
        self._crossing.brought = {}
        return output


class EnterModel(Enter):
    """The model itself: inputs may be on any device, and outputs return there, as accelerate's own hooks do it."""

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        """Note where the inputs are, and take them to the decoder's device."""
        self._crossing.source = find_device([args, named])
        self._crossing.brought = {}
        return super().pre_forward(module, *args, **named)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """The outputs where the inputs were, unless the pass is a verification."""
        crossing, self._crossing.brought = self._crossing, {}
        if crossing.verifying or crossing.source is None:
            return output
        returned = partial(crossing.bring, device=crossing.source)
        if not isinstance(output, dict):
            return recursively_apply(returned, output)
        moved = {k: v if k in self._kept else recursively_apply(returned, v) for k, v in output.items()}
        crossing.brought = {}
        return type(output)(moved)


class Twin(ModelHook):
    """Computes on the device what a table computes on the host, so that its output need not cross.

    Rotary embeddings read positions, and of the hidden states beside them only shape, precision and device: the twin
    gets NaN in their place, and is given up if that shows when it is tried.
    """

    def __init__(self, crossing: Crossing, device: torch.device, module: nn.Module) -> None:
        self._crossing, self._device = crossing, device
        self._twin: nn.Module | None = copy.deepcopy(module).to(device)

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        """Keep the inputs for the twin."""
        self._crossing.inputs[id(module)] = args, named
        return args, named

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Let the twin compute, and put its outputs beside the originals."""
        args, named = self._crossing.inputs.pop(id(module))
        if self._twin is None:
            return output
        twins = _leaves(self._twin(*recursively_apply(self._there, args), **recursively_apply(self._there, named)))
        originals = _leaves(output)
        if self._crossing.trying and not all(map(_alike, originals, twins)):
            self._twin = None
            return output
        for original, twin in zip(originals, twins, strict=True):
            self._crossing.brought[id(original), self._device] = original, twin
        return output

    def _there(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return self._crossing.bring(tensor, self._device)
        return torch.full((), float("nan"), dtype=tensor.dtype, device=self._device).expand(tensor.shape)


def _leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [leaf for part in output for leaf in _leaves(part)]


def _alike(original: Tensor, twin: Tensor) -> bool:
    return torch.allclose(original.float(), twin.to(original.device).float(), rtol=1e-2, atol=1e-2)
