"""Grouped attention gives what transformers' own eager attention gives, for one row and for a tree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_dovetail.engines import native
from hf_dovetail.engines.exact import exact_attention
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
    found = grouped_attention(*states, given, 0.3)
    assert found.shape == (batch, rows, heads, width)
    assert (found - expected).abs().max() < tolerance
    if given is not None:
        unmasked = grouped_attention(*states, torch.zeros_like(additive), 0.3)
        assert (unmasked - expected).abs().max() > 3 * tolerance


@pytest.mark.parametrize(("groups", "rows", "takes"), [(2, 5, True), (4, 5, False), (2, 65, False)])
def test_without_kernels_a_tree_is_computed_by_groups_and_the_rest_by_sdpa(
    groups: int, rows: int, takes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "loaded", lambda: (None, "no compiler"))
    query, key, value = torch.randn(1, 4, rows, 16), *torch.randn(2, 1, groups, 80, 16)
    allowed = torch.rand(1, 1, rows, 80) > 0.3
    module: Any = SimpleNamespace(num_key_value_groups=4 // groups, training=False, is_causal=True)
    by_groups = grouped_attention(query, key, value, allowed, 0.2)
    by_sdpa, _ = sdpa_attention_forward(module, query, key, value, allowed, 0.0, 0.2)
    assert not torch.equal(by_groups, by_sdpa)
    found, _ = exact_attention(module, query, key, value, allowed, 0.0, 0.2)
    assert torch.equal(found, by_groups if takes else by_sdpa)
