"""A decoder's layers, why they cannot be computed elsewhere, and their twins that can.

A twin has other weights and the same modules, hooks and attributes; nothing of the original is touched. Other threads
may run the original meanwhile, which rules out exchanging its weights for a moment (as `torch.func.functional_call`
and accelerate's hooks do).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..forwards import keeps_forward
from ..packed import PackedWeight


def unfit(layers: Iterable[nn.Module]) -> str | None:
    """Why these layers cannot be computed elsewhere as they are now, or None."""
    for layer in layers:
        for name, module in layer.named_modules():
            if module is not layer and not keeps_forward(module):
                return f"something has replaced the forward of {type(layer).__name__}.{name}"
            if any(isinstance(value, Tensor) for value in vars(module).values()):
                return f"{type(layer).__name__}.{name} keeps a tensor outside its parameters and buffers"
        for tensor in tensors_of(layer):
            if tensor.device.type != "cpu":
                return f"weights of {type(layer).__name__} are on {tensor.device}"
            if isinstance(tensor, PackedWeight):
                if not hasattr(tensor.kernel, "stored"):
                    return f"a weight of {type(layer).__name__} is packed as {type(tensor.kernel).__name__}"
            elif type(tensor) not in (Tensor, nn.Parameter):
                return f"a weight of {type(layer).__name__} is a {type(tensor).__name__}"
    return None


def twin(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A shallow copy of a tree of modules.

    Args:
        module: the original.
        tensors: for the `id` of every parameter and buffer, what the twin has in its place.
    """
    other = copy.copy(module)
    state = vars(other)
    state.pop("forward", None)  # what leads to the twin, or a kernel of the CPU (`keeps_forward`)
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: None if t is None else tensors[id(t)] for name, t in state[kind].items()}
    state["_modules"] = {
        name: None if child is None else twin(child, tensors) for name, child in state["_modules"].items()
    }
    return other


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer once."""
    found = {id(t): t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values())}
    return [t for t in found.values() if t is not None]
