"""Activation functions whose result for a number does not depend on where it stands: `activation.c`.

torch computes the last numbers of a tensor, and of each thread's share, in another way than the vectors before, so that
the bits of a row depend on the rows beside it. Here they do not.
"""

from __future__ import annotations

import ctypes
import math
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..forwards import stand_in, take_out
from . import native

_BY_TANH = 2 * math.sqrt(2 / math.pi)
_GATES = {"silu": (1.0, 0.0), "swish": (1.0, 0.0), "quick_gelu": (1.702, 0.0)} | dict.fromkeys(
    ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh"), (_BY_TANH, 0.044715 * _BY_TANH)
)
"""The a and b of x * sigmoid(x * (a + b * x * x)); (1 + tanh y) / 2 is sigmoid(2 y)."""
_NAME_OF = {type(ACT2FN[name]): name for name in _GATES}
_FUNCTION_OF = {kind: kind.forward for kind in _NAME_OF}  # somebody may put another in its place later


def switch_on(model: PreTrainedModel) -> None:
    """Let those activation functions of the model that the kernel knows run on it, where there is one."""
    if native.why_not() is not None:
        return
    for module in model.modules():
        name = function_of(module)
        if name is not None and "forward" not in vars(module):
            module.forward = partial(_forward, module, name)


def switch_off(model: PreTrainedModel) -> None:
    """Give the modules their own functions back."""
    take_out(model.modules(), _forward)


def function_of(module: nn.Module) -> str | None:
    """The name of the function that a module stands for, or None if the kernel does not know it."""
    kind = type(module)
    known = kind in _NAME_OF and kind.forward is _FUNCTION_OF[kind] and not getattr(module, "inplace", False)
    return _NAME_OF[kind] if known else None


def name_of(module: nn.Module) -> str | None:
    """The name of the function that a module computes by the kernel, or None if it does not."""
    forward = stand_in(module, _forward)
    return function_of(module) if forward is not None and forward.args[1] == function_of(module) else None


def coefficients_of(name: str) -> tuple[float, float]:
    """The a and b of a function that the kernel knows."""
    return _GATES[name]


def gated(name: str, gate: Tensor, factor: Tensor) -> Tensor:
    """The function of `gate`, times `factor`: (R, n) each, in one precision (bf16 or fp32), without gaps in a row.

    The function's result is rounded before it is multiplied, as it is where two operations do it.
    """
    return _computed(native.loaded()[0], name, gate, factor)


def _forward(module: nn.Module, name: str, input: Tensor) -> Tensor:
    """(..., n) in its own precision; what the kernel does not take goes to the module's own function."""
    kernels = native.kernels()
    known = kernels is not None and function_of(module) == name
    supported = input.dtype in (torch.bfloat16, torch.float32) and input.device.type == "cpu" and input.ndim > 0
    if not known or not supported or input.requires_grad or input.numel() == 0:
        return type(module).forward(module, input)
    rows = input.reshape(-1, input.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return _computed(kernels, name, rows).view(input.shape)


def _computed(kernels: ctypes.CDLL, name: str, rows: Tensor, factor: Tensor | None = None) -> Tensor:
    output = torch.empty(rows.shape, dtype=rows.dtype, device="cpu")
    kernels.dovetail_activation(
        rows.data_ptr(),
        0 if factor is None else factor.data_ptr(),
        output.data_ptr(),
        *rows.shape,
        rows.stride(0),
        0 if factor is None else factor.stride(0),
        *_GATES[name],
        rows.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return output
