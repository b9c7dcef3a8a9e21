"""A target that torchao has quantised: it keeps its own kernels, and Dovetail gives its plain text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_dovetail import TreeShape, prepare_target
from hf_dovetail.demo import load_pair, pair_path
from hf_dovetail.engines import engine_of
from hf_dovetail.packed import PackedWeight

torchao = pytest.importorskip("torchao.quantization")


def test_a_quantised_target_is_left_as_it_is_and_keeps_its_text() -> None:
    own, draft, tokenizer = load_pair(torch.float32)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    target = AutoModelForCausalLM.from_pretrained(
        pair_path("target"), dtype=torch.float32, quantization_config=config
    ).eval()
    weight = target.model.layers[0].mlp.up_proj.weight
    assert type(weight) is not torch.nn.Parameter
    assert "int8" in str(weight).lower()
    prepare_target(target)
    assert engine_of(target) == "eager"
    assert target.model.layers[0].mlp.up_proj.weight is weight
    assert not any(isinstance(parameter, PackedWeight) for parameter in target.parameters())
    with pytest.raises(ValueError, match="quantised already"):
        prepare_target(target, engine="int8")
    draft.tree = TreeShape()
    changed = 0
    for prompt in ("def quicksort(items):\n", "import os\n\n\ndef read(path):\n", "class Stack:\n"):
        inputs = tokenizer(prompt, return_tensors="pt")
        plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
        ours = target.generate(**inputs, assistant_model=draft, max_new_tokens=24, do_sample=False)
        assert torch.equal(plain, ours)
        assert draft.last_stats.accepted > 0
        changed += not torch.equal(target(**inputs).logits, own(**inputs).logits)
    assert changed == 3
