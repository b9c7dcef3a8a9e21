"""Rotary position embedding in one pass: `rotary.c`, with the bits of transformers' `apply_rotary_pos_emb`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def takes(hidden: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    """Whether `rotate` computes what transformers would for states (B, T, ., D) that come from `hidden` (B, T, h)."""
    batch, rows, _ = hidden.shape
    shape = cosines.shape
    plain = len(shape) == 3 and shape[0] in (1, batch) and shape[1] == rows and sines.shape == shape
    kind = cosines.dtype == sines.dtype == hidden.dtype and cosines.is_cpu and sines.is_cpu
    return plain and kind and cosines.is_contiguous() and sines.is_contiguous()


def rotate(query: Tensor, key: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (B, T, H, D) and keys (B, T, G, D) in one precision (bf16 or fp32), rows at equal distances.

    Args:
        cosines, sines: (1 or B, T, D) in the same precision, contiguous; D is even.

    Returns:
        (B, H, T, D) and (B, G, T, D), laid out in memory as transformers lays them out: row by row.
    """
    turned = [torch.empty(states.shape, dtype=states.dtype, device="cpu") for states in (query, key)]
    batch, rows, heads, width = query.shape
    native.loaded()[0].dovetail_rotary(
        query.data_ptr(),
        turned[0].data_ptr(),
        heads,
        query.stride(0 if rows == 1 else 1),
        key.data_ptr(),
        turned[1].data_ptr(),
        key.shape[2],
        key.stride(0 if rows == 1 else 1),
        cosines.data_ptr(),
        sines.data_ptr(),
        batch * rows,
        cosines.shape[0] * rows,
        width,
        query.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return turned[0].transpose(1, 2), turned[1].transpose(1, 2)
