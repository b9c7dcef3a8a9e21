"""Grouped attention gives what transformers' own eager attention gives, for one row and for a tree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_dovetail.grouped import grouped_attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 17), (2, 1), (2, 5)])
@pytest.mark.parametrize("masked", ["not", "bool", "additive"])
def test_the_sums_are_eager_attentions(
    batch: int, rows: int, masked: str, dtype: torch.dtype, tolerance: float
) -> None:
    heads, groups, width, keys = 12, 4, 16, 33
    query = torch.randn(batch, rows, heads, width).to(dtype)
    key, value = (torch.randn(batch, groups, keys + 7, width).to(dtype)[:, :, :keys] for _ in range(2))
    allowed = torch.rand(batch, 1, rows, keys) > 0.4
    allowed[..., 0] = True
    additive = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, training=False, is_causal=True)
    given = {"not": None, "bool": allowed, "additive": additive}[masked]
    if given is None and rows > 1:
        pytest.skip("without a mask only one row sees every key")
    states = query.transpose(1, 2), key, value
    expected, _ = eager_attention_forward(module, *states, None if given is None else additive, scaling=0.3)
    found, _ = grouped_attention(module, *states, given, scaling=0.3)
    assert found.shape == (batch, rows, heads, width)
    assert (found - expected).abs().max() < tolerance
    if given is not None:
        unmasked, _ = grouped_attention(module, *states, torch.zeros_like(additive), scaling=0.3)
        assert (unmasked - expected).abs().max() > 3 * tolerance
