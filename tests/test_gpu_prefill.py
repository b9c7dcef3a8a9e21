"""Long prompts through a real accelerator. Skipped where there is none; `test_prefill` has all else."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_dovetail import prefill, prepare_target, restore_target
from hf_dovetail.anatomy import decoder_layers
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.prefill import calls, upload
from hf_dovetail.prefill.switch import streaming_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
    pytest.mark.usefixtures("own_cache"),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt of 40 tokens is streamed, whether it pays or not."""
    monkeypatch.setattr(prefill, "measured_threshold", lambda *_: (40, None))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    output = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True)
    return output.logits, output.past_key_values


@pytest.mark.parametrize("block", [1024, 128])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_prompts_agree_with_the_cpu(
    family: str, block: int, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two conversations' turns in each; weights cross in small pieces, so that both buffers are used often."""
    monkeypatch.setattr(calls, "BLOCK_ROWS", block)
    monkeypatch.setattr(upload, "_PIECE_BYTES", 4096)
    model = tiny.build(family)
    prompts = [tiny.prompt(length, seed=length) for length in (240, 90)]
    expected = [logits(model, ids) for ids in prompts]
    prepare_target(model)
    for _ in range(3):
        for ids, (values, kept) in zip(prompts, expected, strict=True):
            found, cache = logits(model, ids)
            torch.testing.assert_close(found, values, rtol=1e-3, atol=5e-3)
            for one, other in zip(tiny.cache_states(kept), tiny.cache_states(cache), strict=True):
                assert other.device.type == "cpu"
                torch.testing.assert_close(other, one, rtol=1e-3, atol=5e-3)
    assert not streaming_of(model.get_decoder()).failed
    assert not torch.equal(found, values)  # another kernel's roundings: it was streamed


def test_dovetail_and_plain_generate_agree_on_a_streamed_target(always: None) -> None:
    target, draft, tokenizer = load_pair()
    ids = tokenizer(demo_prompts()[0] * 3, return_tensors="pt").input_ids
    prepare_target(target)
    options = {"max_new_tokens": 64, "do_sample": False}
    plain = target.generate(ids, **options)
    for _ in range(2):
        assert torch.equal(target.generate(ids, assistant_model=draft, **options), plain)
    assert draft.last_stats.accepted > 0
    assert not streaming_of(target.get_decoder()).failed


def wide(layers: int) -> PreTrainedModel:
    """Layers of a 7 B target, in bf16."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory of CUDA devices is counted")
def test_a_7_b_shape_needs_the_memory_of_three_layers_and_one_prompt(always: None) -> None:
    """Two layers' weights; the third part is room for 3,000 tokens: states of one layer, hidden states, one block."""
    model = prepare_target(wide(4))
    ids = torch.randint(512, (1, 3000), generator=torch.Generator().manual_seed(0))
    one_layer = sum(p.numel() * 2 for p in decoder_layers(model.get_decoder())[0].parameters())
    logits(model, ids[:, :60])  # libraries take their own working space
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = logits(model, ids)
    assert torch.cuda.max_memory_allocated() - before < 3 * one_layer
    assert torch.cuda.memory_allocated() - before < one_layer / 100
    assert not streaming_of(model.get_decoder()).failed
    prefill.remove(model)
    expected, _ = logits(model, ids[:, :200])
    error = (found[:, :200] - expected).float().abs().mean() / expected.float().abs().mean()
    assert 0 < error < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the memory of CUDA devices can be limited")
def test_a_full_device_leaves_the_prompt_to_the_cpu(always: None) -> None:
    model = prepare_target(wide(2))
    ids = torch.randint(512, (1, 60), generator=torch.Generator().manual_seed(0))
    state = streaming_of(model.get_decoder())
    state.failed = True
    expected, _ = logits(model, ids)
    state.failed = False
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 600 * 2**20) / total)
    try:
        found, _ = logits(model, ids)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state.failed
    assert torch.equal(found, expected)
    restore_target(model)
    prepare_target(model)
    assert not torch.equal(logits(model, ids)[0], expected)
    assert not streaming_of(model.get_decoder()).failed


def test_the_threshold_is_measured_and_stays() -> None:
    """Whether it pays is this machine's matter; that it stays what it was is ours."""
    model = prepare_target(wide(2))
    first = streaming_of(model.get_decoder())
    restore_target(model)
    second = streaming_of(prepare_target(model).get_decoder())
    assert (first is None) == (second is None)
    if first is not None:
        assert first.least_rows == second.least_rows
