"""Drafts with weights in 8 bits: the product, what is quantised, the bytes of a 7 B shape, what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from published import CASES, Reference
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from two_devices import DEVICE, Accelerator

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import demo_prompts, load_pair, pair_path
from hf_dovetail.eight_bits import EightBitMatrix
from hf_dovetail.levels import tree_rows
from hf_dovetail.weights import SharedWeights

GIB = 2**30


def matrix(outputs: int = 45, inputs: int = 64) -> tuple[Tensor, EightBitMatrix]:
    """Weights whose rows differ a hundredfold in size, one of them zero, and their 8-bit matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-1, 1, outputs)[:, None]
    weight[3] = 0
    held = EightBitMatrix(weight)
    held.try_integers()
    return weight, held


def exact(rows: Tensor, held: EightBitMatrix) -> Tensor:
    """The product in float64 with the weights as they are held."""
    scales = held.scale_bits.view(torch.float32).double()[:, None]
    return rows.double() @ (held.values.double() * scales)[: held.out_features].T


def test_weights_are_rounded_to_the_nearest_of_255_steps_of_their_row() -> None:
    weight, held = matrix()
    steps = weight.abs().amax(1, keepdim=True) / 127
    error = (held.dense(torch.float32) - weight).abs()
    assert bool((error <= steps / 2 * 1.001).all())
    assert error.max() > 0
    assert held.values[:45].abs().amax(1)[4:].tolist() == [127] * 41
    found = held.lookup(torch.tensor([[3, 44], [0, 7]]), torch.float32)
    assert torch.equal(found, held.dense(torch.float32)[torch.tensor([[3, 44], [0, 7]])])


@pytest.mark.parametrize("units", ["integer", "none", "wrong"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_the_product_is_that_of_the_held_weights(
    count: int, dtype: torch.dtype, units: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations keep their precision, also beside an entry a thousand times larger; rows do not see each other. A
    device without such a product, or with one that misplaces its sums, unpacks the weights.
    """
    product = torch._int_mm

    def other(rows: Tensor, weight: Tensor) -> Tensor:
        if units == "none":
            raise NotImplementedError("no such product on this device")
        return product(rows, weight).roll(1, dims=1)

    if units != "integer":
        monkeypatch.setattr(torch, "_int_mm", other)
    held = matrix()[1]
    assert held._integers == (units == "integer")
    rows = torch.randn(count, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[0, 5] = 1000.0
    rows[-1, 0] = -rows[-1].abs().max() * 2  # the largest is negative
    expected = exact(rows, held)
    found = held(rows)
    assert found.dtype == dtype
    finest = 2e-5 if dtype == torch.float32 else 8e-3
    bound = finest * rows.double().abs().amax(1, keepdim=True) * exact(torch.ones(1, 64), held).abs().max()
    assert bool(((found.double() - expected).abs() <= bound + finest * expected.abs()).all())
    assert torch.equal(held(rows[:1]), found[:1]) or units != "integer"
    assert torch.equal(held(rows.unsqueeze(0))[0], found)
    rows[0, 0] = float("nan")
    again = held(rows)
    assert bool(again[0, 4:].isnan().all())
    assert torch.equal(again[1:], found[1:])


def test_a_bias_is_added_and_a_change_of_precision_leaves_the_scales() -> None:
    linear = nn.Linear(64, 45)
    held, rows = EightBitMatrix(linear.weight, linear.bias), torch.randn(2, 64)
    torch.testing.assert_close(held(rows), exact(rows, held).float() + linear.bias, rtol=1e-4, atol=1e-4)
    before = held.dense(torch.float32)
    assert torch.equal(held.to(torch.bfloat16).dense(torch.float32), before)


def demo_pair(**options: Any) -> tuple[PreTrainedModel, DovetailAssistantModel, Any]:
    """The package's pair, the target in float32 and the draft in bfloat16, so that it copies what it shares."""
    target, _, tokenizer = load_pair(torch.float32)
    draft = DovetailAssistantModel.from_pretrained(pair_path("draft"), dtype=torch.bfloat16, **options)
    draft.draft_device, draft.tree = "cpu", TreeShape()
    return target, draft, tokenizer


def test_the_shipped_draft_in_8_bits_accepts_as_much_and_the_text_stays() -> None:
    """Guards every matrix: all are in 8 bits, embeddings and LM head too, and one wrong one would cost acceptance."""
    rates, texts = [], []
    for options in ({}, {"weight_bits": 8}):
        target, draft, tokenizer = demo_pair(**options)
        tokens = rounds = 0
        for prompt in demo_prompts()[:3]:
            inputs = tokenizer(prompt, return_tensors="pt")
            text = target.generate(**inputs, assistant_model=draft, max_new_tokens=64, do_sample=False)
            texts.append(text)
            tokens, rounds = tokens + draft.last_stats.new_tokens - 1, rounds + draft.last_stats.rounds
        rates.append(tokens / rounds)
    assert all(torch.equal(plain, ours) for plain, ours in zip(texts[:3], texts[3:], strict=True))
    assert draft.weight_bits == 8
    assert rates[1] > 0.97 * rates[0] > 3
    assert not [name for name, p in draft.named_parameters() if p.ndim > 1]
    assert isinstance(draft._shared.embedding, EightBitMatrix)
    assert isinstance(draft._shared.head, EightBitMatrix)


@pytest.mark.parametrize("name", ["eagle-vicuna", "eagle3", "speculators-new"])
@torch.no_grad()
def test_published_kinds_in_8_bits(name: str, tmp_path: Path, ids: Tensor) -> None:
    """Guards biases, EAGLE-3's own head with its reduced vocabulary, and own embeddings."""
    case = CASES[name]
    target, folder = case.target(), case.write(tmp_path)
    tokens = tiny.prompt(20)
    features = Reference(case, target).features(tokens)
    logits = []
    for options in ({}, {"weight_bits": 8}):
        draft = tiny.met(DovetailAssistantModel.from_pretrained(folder, **options), target)
        logits.append(draft.logits(draft(tokens, draft.encode(features))))
    assert not [name for name, p in draft.named_parameters() if p.ndim > 1]
    assert not torch.equal(*logits)
    assert nn.functional.cosine_similarity(logits[0].flatten(), logits[1].flatten(), dim=0) > 0.995
    tiny.both(target, draft, ids)


def test_the_auto_class_takes_the_option(ids: Tensor, tmp_path: Path, untrained: DovetailAssistantModel) -> None:
    untrained.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, weight_bits=8).weight_bits == 8
    assert AutoModelForCausalLM.from_pretrained(tmp_path).weight_bits is None


def test_what_8_bits_refuse(llama: PreTrainedModel, untrained: DovetailAssistantModel, tmp_path: Path) -> None:
    untrained.save_pretrained(tmp_path / "draft")
    llama.save_pretrained(tmp_path / "lm")
    load = DovetailAssistantModel.from_pretrained
    for bits in (4, "8", True, 16):
        with pytest.raises(ValueError, match="expected 8, or None"):
            load(tmp_path / "draft", weight_bits=bits)
    with pytest.raises(ValueError, match=r"ordinary language model.*quantization_config.*from_causal_lm"):
        load(tmp_path / "lm", weight_bits=8)
    draft = load(tmp_path / "draft", weight_bits=8)
    with pytest.raises(ValueError, match="in 8 bits and cannot be saved; load it again without weight_bits"):
        draft.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="cannot be trained"):
        draft.train()
    assert not draft.eval().training
    assert not (tmp_path / "again").exists()


def test_copies_draft_alike(ids: Tensor, llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny.draft_for(llama, "untrained").save_pretrained(tmp_path)
    draft = DovetailAssistantModel.from_pretrained(tmp_path, weight_bits=8)
    draft.draft_device, draft.tree = "cpu", TreeShape()
    tiny.both(llama, draft, ids)
    rounds = draft.last_stats.rounds
    other = copy.deepcopy(draft)
    tiny.both(llama, other, ids)
    assert other.last_stats.rounds == rounds
    assert other.weight_bits == 8


def test_it_drafts_on_another_device(
    ids: Tensor, llama: PreTrainedModel, tmp_path: Path, accelerator: Accelerator
) -> None:
    """Guards the integer product there (no fallback) and what is copied: 8-bit values, never whole weights."""
    tiny.draft_for(llama, "untrained").save_pretrained(tmp_path)
    draft = DovetailAssistantModel.from_pretrained(tmp_path, weight_bits=8)
    draft.draft_device = str(DEVICE)
    with accelerator:
        needs = draft.weight_bytes(llama)
        plain = tiny.run(llama, ids)
        tiny.assert_same(plain, tiny.run(llama, ids, draft))
        weights = (*draft.parameters(), *draft.buffers(), *draft._shared.tensors)
        assert {t.device for t in weights} == {DEVICE}
        assert sum(t.nbytes for t in weights) == needs
        matrices = [m for m in draft.modules() if isinstance(m, EightBitMatrix)]
        assert len(matrices) == 10
        assert all(m._integers for m in matrices)
        crossed = accelerator.bytes_in
    assert needs < crossed < needs + 60_000
    assert llama.get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize(("tied", "expected"), [(False, (2.83, 1.58)), (True, (2.59, 1.46))])
def test_a_7_b_targets_draft_of_5_blocks_fits_into_2_gib(tied: bool, expected: tuple[float, float]) -> None:
    """Its weights, the target's embeddings and LM head, and its cache of 4096 positions and a tree, counted in real
    modules without data: in bfloat16, as the paper has it, and in 8 bits.
    """
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=tied,
    )  # fmt: skip
    found = []
    with torch.device("meta"):
        target = LlamaForCausalLM(config)
        draft = DovetailAssistantModel.from_target(target, num_hidden_layers=5).to(torch.bfloat16)
        draft.draft_device = "meta"
        cache = draft.new_rows(4096 + tree_rows(TreeShape()))
        assert cache.states.nbytes == 5 * 2 * 4096 * 2 * cache.capacity  # a key and a value a block, in bfloat16
        for bits in (None, 8):
            if bits:
                draft._quantise(bits, "this draft")
            shared = SharedWeights.of(target, draft.config, (draft.device, draft.dtype, bits))
            held = sum(t.nbytes for t in (*draft.parameters(), *draft.buffers(), *shared.tensors))
            assert draft.weight_bytes(target) == held
            found.append((held + cache.states.nbytes) / GIB)
    assert found == pytest.approx(expected, abs=0.005)
    assert found[1] < 2 < found[0]
