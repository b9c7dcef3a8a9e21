"""The likeliest of many: `best.c` in place of torch's top-k and log-softmax, which are five operations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native


def best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, count) float32 and places (T, count) int64 of each row's largest, likeliest first.

    Args:
        logits: (T, V) float32 on the CPU. -inf is what is impossible; NaN or +inf makes a row's results -inf.
        count: from 1 to V.
    """
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    log_probs = torch.empty(len(rows), count, dtype=torch.float32, device="cpu")
    places = torch.empty(len(rows), count, dtype=torch.int64, device="cpu")
    native.loaded()[0].dovetail_best(
        rows.data_ptr(),
        log_probs.data_ptr(),
        places.data_ptr(),
        *rows.shape,
        rows.stride(0),
        count,
        torch.get_num_threads(),
    )
    return log_probs, places
