"""Attention whose result for a row does not depend on the tree around it: `attention.c`, in transformers' interface.

A row's result depends, bit for bit, on the keys and values that it sees and on their order alone. With linear layers
that treat rows alike (`onednn`, `int8`, `int4`), a node of a verified tree gets the bits of plain decoding.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..grouped import MOST_ROWS, NAME, grouped_attention, is_for, takes_grouped
from . import native

_NO_MASK, _BOOL_MASK, _ADDED_MASK = range(3)
_Sizes, _Strides = ctypes.c_long * 7, ctypes.c_long * 11


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; what the kernel does not take is left to `grouped_attention`, and the
    rest, prompts above all, to transformers' sdpa.

    Args:
        query: (B, H, T, D). key, value: (B, G, S, D), H a multiple of G. attention_mask: (B, 1, T, S) bool or
            additive, or None.

    Returns:
        (B, T, H, D) and None.
    """
    kernels = native.kernels()
    given = query, key, value, attention_mask
    if torch.is_autocast_enabled("cpu"):  # what it left in another precision meets here
        given = [each if each is None or each.dtype == torch.bool else each.to(query.dtype) for each in given]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if kernels is not None and not dropout and takes(*given):
        return _attend(kernels, *given, scale), None
    if not dropout and takes_grouped(query, key, attention_mask):
        return grouped_attention(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)


def switch_on(model: PreTrainedModel) -> None:
    """Let a model that uses sdpa use `exact_attention`."""
    text = model.config.get_text_config(decoder=True)
    heads, groups = getattr(text, "num_attention_heads", 0), getattr(text, "num_key_value_heads", None)
    if text._attn_implementation != "sdpa" or (groups in (None, heads) and native.why_not() is not None):
        return
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:  # somebody's own, under that name
        return
    with suppress(ValueError):  # a model that does not take attention from outside
        model.set_attn_implementation(NAME)


def switch_off(model: PreTrainedModel) -> None:
    """Give the model sdpa back, unless it was given another attention meanwhile; a prepared model's copy too."""
    if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes these; see `exact_attention`."""
    states = query, key, value
    if query.shape[2] > MOST_ROWS or (mask is None and query.shape[2] > 1):
        return False
    if query.dtype not in (torch.bfloat16, torch.float32) or any(each.dtype != query.dtype for each in states):
        return False
    if any(not each.is_cpu or each.stride(3) != 1 or each.requires_grad for each in states):
        return False
    if mask is None:
        return True
    plain = is_for(mask, query, key) and mask.stride(3) == 1 and not mask.requires_grad
    return plain and mask.dtype in (torch.bool, query.dtype)


def _attend(
    kernels: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    batch, heads, rows, width = query.shape
    groups, keys, value_width = value.shape[1:]
    output = torch.empty((batch, rows, heads, value_width), dtype=query.dtype, device="cpu")
    threads = torch.get_num_threads()
    kind, address, mask_strides = mask_arguments(mask)
    kernels.dovetail_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        address,
        output.data_ptr(),
        native.scratch(4 * threads * kernels.dovetail_attention_scratch(keys, width)),
        _Sizes(batch, heads, groups, rows, keys, width, value_width),
        _Strides(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides),
        scale,
        kind,
        query.dtype == torch.bfloat16,
        threads,
    )
    return output


def mask_arguments(mask: Tensor | None) -> tuple[int, int, tuple[int, int]]:
    """Kind, address and strides (of the batch, of rows) of a mask that `takes` takes, for the kernels."""
    if mask is None:
        return _NO_MASK, 0, (0, 0)
    kind = _BOOL_MASK if mask.dtype == torch.bool else _ADDED_MASK
    strides = 0 if mask.shape[0] == 1 else mask.stride(0), 0 if mask.shape[2] == 1 else mask.stride(2)
    return kind, mask.data_ptr(), strides


# Not by `switch_on`: a copy of a prepared model, in another process, asks for it by name.
AttentionInterface.register(NAME, exact_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
