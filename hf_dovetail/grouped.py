"""Attention of few rows over many keys on the CPU, without repeating grouped keys and values.

transformers copies each key and value once per query head before a pass with a mask. Here the query heads of a group
become further rows of one head, and two batched products with a softmax between them do the rest: the arithmetic
of transformers' eager attention, for one row and for a tree alike, faster than sdpa (`benchmarks/attention.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "dovetail_sdpa"
MOST_ROWS = 64
"""A pass with more rows is a prompt's."""


def takes_grouped(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether `grouped_attention` is for these: few rows that see what a mask says, of heads that share keys."""
    rows = query.shape[2]
    few = query.shape[1] != key.shape[1] and rows <= MOST_ROWS and (rows == 1 or mask is not None)
    plain = mask is None or (is_for(mask, query, key) and mask.dtype in (torch.bool, query.dtype))
    return few and plain and query.device.type == "cpu" and not query.requires_grad


def is_for(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is (1 or B, 1, 1 or T, S) for these, one for all heads."""
    batch, heads, rows, keys = mask.shape if mask.ndim == 4 else (0, 0, 0, 0)
    return heads == 1 and keys == key.shape[2] and batch in (1, query.shape[0]) and rows in (1, query.shape[2])


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention.

    Args:
        query: (B, H, T, D). key, value: (B, G, S, D), H a multiple of G. mask: that `takes_grouped` takes, or None.
        scale: what scores are multiplied by.

    Returns:
        (B, T, H, D).
    """
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    folded = query.reshape(batch * groups, -1, width)  # (B G, H/G T, D)
    key, value = (states.reshape(batch * groups, keys, -1) for states in (key, value))
    bias = _bias(mask, folded, keys, heads // groups)
    scores = torch.baddbmm(bias, folded, key.transpose(1, 2), beta=0 if mask is None else 1, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), value).view(batch, heads, rows, -1).transpose(1, 2).contiguous()


def _bias(mask: Tensor | None, folded: Tensor, keys: int, share: int) -> Tensor:
    """(B G, H/G T, S) to be added to the scores: the mask for each of the heads that a group's rows come from."""
    if mask is None:
        return folded.new_empty(1)  # not read
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=folded.dtype).masked_fill_(~mask, torch.finfo(folded.dtype).min)
    batch, rows = mask.shape[0], folded.shape[1] // share
    groups = folded.shape[0] // batch
    mask = mask.unsqueeze(1).expand(batch, groups, share, rows, keys)
    return mask.reshape(batch * groups, share * rows, keys)
