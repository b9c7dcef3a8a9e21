"""Targets that other libraries have quantised: they keep their own kernels, and Dovetail gives their plain text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_dovetail import TreeShape, prepare_target
from hf_dovetail.demo import load_pair, pair_path
from hf_dovetail.engines import engine_of
from hf_dovetail.packed import PackedWeight

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
PROMPTS = ("def quicksort(items):\n", "import os\n\n\ndef read(path):\n", "class Stack:\n")


def config_of(kind: str) -> Any:
    """How transformers is told to quantise while it loads."""
    if kind == "torchao":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    if kind.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        return BitsAndBytesConfig(**NF4) if kind == "bitsandbytes-nf4" else BitsAndBytesConfig(load_in_8bit=True)
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes-nf4", "bitsandbytes-int8", "quanto-int8"])
def test_a_quantised_target_is_left_as_it_is_and_keeps_its_text(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    quantised = config_of(kind)
    own, draft, tokenizer = load_pair(torch.float32)
    target = AutoModelForCausalLM.from_pretrained(
        pair_path("target"), dtype=torch.float32, quantization_config=quantised, device_map="cpu"
    ).eval()
    module = target.model.layers[0].mlp.up_proj
    weight = module.weight
    assert type(module) is not torch.nn.Linear or type(weight) is not torch.nn.Parameter
    with caplog.at_level("INFO", logger="hf_dovetail"):
        prepare_target(target)
    assert "quantised already" in caplog.text
    assert engine_of(target) == "eager"
    assert target.model.layers[0].mlp.up_proj.weight is weight
    assert not any(isinstance(parameter, PackedWeight) for parameter in target.parameters())
    with pytest.raises(ValueError, match="quantised already"):
        prepare_target(target, engine="int8")
    draft.tree = TreeShape()
    changed = 0
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
        ours = target.generate(**inputs, assistant_model=draft, max_new_tokens=24, do_sample=False)
        # rows of bitsandbytes' 8-bit layers depend on the rows beside them: docs/quantisation.md
        assert kind == "bitsandbytes-int8" or torch.equal(plain, ours)
        assert draft.last_stats.accepted > 0
        changed += not torch.equal(target(**inputs).logits, own(**inputs).logits)
    assert changed == 3
