"""Targets with PEFT's adapters: the base model runs on an engine, the adapters stay themselves."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from hf_dovetail import TreeShape, prepare_target, restore_target
from hf_dovetail.demo import load_pair
from hf_dovetail.engines import engine_of, int8
from hf_dovetail.packed import PackedWeight

peft = pytest.importorskip("peft")
reason = int8.why_not(load_pair(torch.float32)[0])
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
LORA = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def adapted(way: str) -> tuple:
    """The model that decodes, what a user prepares, the draft and the tokenizer."""
    target, draft, tokenizer = load_pair(torch.float32)
    torch.manual_seed(0)
    draft.tree, config = TreeShape(), peft.LoraConfig(task_type="CAUSAL_LM", **LORA)
    if way == "add_adapter":
        target.add_adapter(config)
        return target, target, draft, tokenizer
    wrapped = peft.get_peft_model(target, config).eval()
    return target, wrapped if way == "wrapper" else target, draft, tokenizer


def packed(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, PackedWeight)}


@pytest.mark.parametrize("engine", ["onednn", "int8"])
@pytest.mark.parametrize("way", ["wrapper", "model", "add_adapter"])
def test_prepare_and_restore_leave_base_and_adapters_as_they_were(way: str, engine: str) -> None:
    target, given, draft, tokenizer = adapted(way)
    inputs = tokenizer("def quicksort(items):\n", return_tensors="pt")
    before = {name: parameter.detach().clone() for name, parameter in target.named_parameters()}
    logits = target(**inputs).logits
    assert prepare_target(given, engine) is given
    assert engine_of(target) == engine
    assert len(packed(target)) == 8 * 7 + 1
    assert not [name for name in packed(target) if "lora" in name]
    plain = target.generate(**inputs, max_new_tokens=16, do_sample=False)
    ours = target.generate(**inputs, max_new_tokens=16, do_sample=False, assistant_model=draft)
    assert torch.equal(plain, ours)
    assert draft.last_stats.accepted > 0
    assert restore_target(given) is given
    after = dict(target.named_parameters())
    assert not packed(target)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(target(**inputs).logits, logits)


def test_adapters_learn_on_a_prepared_model_and_frozen_ones_are_packed_without_loss() -> None:
    target, given, _, tokenizer = adapted("wrapper")
    inputs = tokenizer("def quicksort(items):\n", return_tensors="pt")
    prepare_target(given, "int8")
    given.train()(**inputs, labels=inputs.input_ids).loss.backward()
    learned = {name for name, parameter in target.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in target.named_parameters() if "lora" in name}
    restore_target(given).requires_grad_(False)
    adapters = {name: parameter.clone() for name, parameter in target.named_parameters() if "lora" in name}
    prepare_target(given, "int8")
    assert adapters.keys() < packed(target)
    assert all(torch.equal(dict(target.named_parameters())[name].original(), adapters[name]) for name in adapters)


def test_merged_weights_are_not_on_disk_and_the_refusal_says_so() -> None:
    _, given, _, _ = adapted("wrapper")
    merged = given.merge_and_unload()
    prepare_target(merged, "int8")
    with pytest.raises(RuntimeError, match="is not the weight that was quantised"):
        restore_target(merged)
    assert engine_of(merged) == "int8"
