"""RMS norms in one pass: `norm.c` in place of transformers' seven operations, which cost more than their arithmetic.

A row's result does not depend on the rows beside it, and is rounded as transformers rounds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import same_code
from ..forwards import stand_in, take_out
from . import native


def switch_on(model: PreTrainedModel) -> None:
    """Let those norms of the model that compute what Llama's do run on the kernel, where there is one."""
    if native.why_not() is not None:
        return
    for module in model.modules():
        if "forward" not in vars(module) and _is_llamas(type(module)):
            module.forward = partial(_forward, module)


def switch_off(model: PreTrainedModel) -> None:
    """Give the modules their own functions back."""
    take_out(model.modules(), _forward)


def is_on(module: nn.Module) -> bool:
    """Whether a module is a norm that runs on the kernel, and computes what it computed when it was switched on."""
    return stand_in(module, _forward) is not None and _is_llamas(type(module))


def _is_llamas(kind: type) -> bool:
    """Whether this is Llama's norm, or one of the copies of its code in other models of transformers."""
    return _is_llamas_function(kind.forward) if hasattr(kind, "forward") else False


@functools.cache
def _is_llamas_function(forward: Callable) -> bool:
    own = getattr(forward, "__module__", "").startswith("transformers.models.")
    return own and same_code(forward, _llamas_function())


@functools.cache
def _llamas_function() -> Callable:
    """Of Llama's norm, looked up once: somebody may put another in its place later."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm  # here: it imports the Auto classes

    return LlamaRMSNorm.forward


def _forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """(..., n) in its own precision; what the kernel does not take goes to the module's own function."""
    weight, dtype = module.weight, hidden_states.dtype
    plain = dtype in (torch.bfloat16, torch.float32) and hidden_states.is_cpu and hidden_states.numel() > 0
    learns = torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad)
    known = native.kernels() is not None and _is_llamas(type(module))
    if not known or not plain or learns or not can_normalise(weight, dtype, hidden_states.shape[-1]):
        return type(module).forward(module, hidden_states)
    return normalised(hidden_states, weight, module.variance_epsilon)


def can_normalise(weight: Tensor, dtype: torch.dtype, width: int) -> bool:
    """Whether `normalised` takes a norm's weight, for states (..., width) on the CPU, in bf16 or fp32."""
    return weight.shape == (width,) and weight.dtype == dtype and weight.is_cpu and weight.is_contiguous()


def normalised(states: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """The norm of (..., n) on the CPU, bf16 or fp32 as its weight (n,), by the kernel, without gradients.

    Without a weight there is no norm: the states themselves.
    """
    if weight is None:
        return states
    rows = states.reshape(-1, states.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    output = torch.empty(states.shape, dtype=states.dtype, device="cpu")
    native.loaded()[0].dovetail_norm(
        rows.data_ptr(),
        output.data_ptr(),
        weight.data_ptr(),
        *rows.shape,
        rows.stride(0),
        epsilon,
        states.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return output
