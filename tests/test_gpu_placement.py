"""Target layers on a real accelerator: memory against the plan, answers, the way back. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare, prepare_target, restore_target
from hf_dovetail.anatomy import anatomy_of
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.dispatch import dispatch_of
from hf_dovetail.placement import WEIGHTS, Limits, planned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine"),
]
CONTEXT, ANSWER = 768, 32
TOLERANCE = 0.02


def wide_target(kv_heads: int) -> LlamaForCausalLM:
    """0.9 B parameters in bf16, random: memory does not depend on what they are."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def budget_for(target: LlamaForCausalLM, draft: DovetailAssistantModel, layers: int) -> int:
    sizes = prepare.target_sizes_of(target, anatomy_of(target))
    headroom = prepare.headroom_bytes(prepare._device_of(draft), target.dtype)
    limits = Limits(0, CONTEXT, prepare._nodes(draft), headroom)
    return planned(sizes, prepare.draft_sizes_of(draft, target), limits, layers).total * 64 // 63 + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="reads torch.cuda's own counters")
@pytest.mark.parametrize("layers", [0, 8])
@pytest.mark.parametrize("kv_heads", [16, 4])
def test_memory_is_as_planned_to_two_percent(kv_heads: int, layers: int) -> None:
    target = wide_target(kv_heads)
    draft = DovetailAssistantModel.from_target(target, num_hidden_layers=2)
    draft.tree = TreeShape()
    budget = budget_for(target, draft, layers)  # libraries have taken their workspace by now
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    prepare_target(target, "eager", budget, draft, CONTEXT)
    plan = prepare.plan_of(target)
    assert plan.layers == layers
    held = torch.cuda.memory_allocated() - before
    assert held == pytest.approx(plan.of(*WEIGHTS), rel=TOLERANCE)
    torch.cuda.reset_peak_memory_stats()
    ids = torch.arange(CONTEXT - ANSWER).unsqueeze(0) * 7919 % 32000
    target.generate(ids, assistant_model=draft, max_new_tokens=ANSWER, do_sample=False)
    assert not draft.last_stats.draft_failed
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(plan.total - plan.of("headroom"), rel=TOLERANCE)
    assert peak < plan.total <= budget
    restore_target(target)
    draft.draft_device = "cpu"
    draft.release()
    draft.meet(target)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 0.02 * held


@pytest.mark.parametrize("engine", ["eager", "auto"])
def test_answers_on_two_devices(engine: str) -> None:
    """float32, so that ties do not part; with the prompt on either device."""
    target, draft, tokenizer = load_pair()
    inputs = tokenizer(demo_prompts()[0], return_tensors="pt")
    weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    prepare_target(target, engine, "2GiB", draft)
    assert dispatch_of(target).layers == 8
    restore_target(target)
    sizes = prepare.target_sizes_of(target, anatomy_of(target))
    limits = Limits(0, 512, prepare._nodes(draft), prepare.headroom_bytes(prepare._device_of(draft), target.dtype))
    budget = planned(sizes, prepare.draft_sizes_of(draft, target), limits, 3).total * 64 // 63 + 1
    prepare_target(target, engine, budget, draft, 512)
    device = dispatch_of(target).device
    assert {p.device for p in target.model.layers[5:].parameters()} == {device}
    assert {p.device for p in target.model.layers[:5].parameters()} == {torch.device("cpu")}
    for there in (inputs, inputs.to(device)):
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            torch.manual_seed(0)
            plain = target.generate(**there, max_new_tokens=64, **sampling)
            torch.manual_seed(0)
            assisted = target.generate(**there, max_new_tokens=64, assistant_model=draft, **sampling)
            assert torch.equal(plain, assisted)
            assert draft.last_stats.accepted > 0
    restore_target(target)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in target.state_dict().items())


def test_a_round_of_a_7_b_shape_moves_at_most_144_kib() -> None:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=2,
        num_attention_heads=32,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    target = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    draft = DovetailAssistantModel.from_target(target)
    draft.tree = TreeShape()
    prepare_target(target, "eager", "4GiB", draft, 512)
    ids = torch.arange(16).unsqueeze(0)
    target.generate(ids, assistant_model=draft, max_new_tokens=40, do_sample=False)
    stats = draft.last_stats
    moved = stats.bytes_to_draft + stats.bytes_to_target - ids.shape[1] * 4096 * 2
    assert 17 * 4096 * 2 * (stats.rounds - 1) < moved <= 144 * 1024 * stats.rounds


def test_a_device_is_faster_than_the_cpu_or_gets_nothing() -> None:
    head = nn.Linear(4096, 32000, bias=False, dtype=torch.bfloat16)
    host_ms, device_ms = prepare.head_times_ms(head, 17, prepare._device_of(None))
    assert host_ms > 0 < device_ms
