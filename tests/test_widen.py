"""The widened target computes what the small one computes, and drafts follow it into the larger geometry."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import tiny
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.bench import widen as module
from hf_dovetail.bench.widen import Geometry, map_draft, preset, widen, widen_draft
from hf_dovetail.demo import demo_prompts, load_pair

SIZES = {
    "hidden_size": 400,
    "num_hidden_layers": 9,
    "intermediate_size": 640,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}
TINY = {
    "hidden_size": 80,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def pair() -> tuple:
    target, draft, tokenizer = load_pair()
    draft.draft_device, draft.tree = "cpu", TreeShape()
    return target, draft, tokenizer(demo_prompts()[1], return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def wide(pair: tuple) -> LlamaForCausalLM:
    return widen(pair[0], **SIZES)


def answer(target: PreTrainedModel, ids: torch.Tensor, **options: Any) -> list[int]:
    return target.generate(ids, max_new_tokens=24, do_sample=False, **options)[0].tolist()


@torch.no_grad()
def test_logits_features_and_text_are_the_small_models(pair: tuple, wide: LlamaForCausalLM) -> None:
    small, _, ids = pair
    for _ in range(2):
        ours, theirs = (model(ids, output_hidden_states=True) for model in (wide, small))
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)
        features = ours.hidden_states[-1]
        torch.testing.assert_close(features[..., :192], theirs.hidden_states[-1], atol=1e-4, rtol=0)
        assert not features[..., 192:].any()
    assert wide.lm_head.weight is wide.model.embed_tokens.weight
    assert answer(wide, ids) == answer(small, ids)


@torch.no_grad()
@pytest.mark.parametrize("broken", ["eps", "norm", "below"])
def test_each_part_of_the_rule_matters(pair: tuple, broken: str) -> None:
    small, _, ids = pair
    wide = widen(small, **SIZES)
    if broken == "eps":  # far larger than the embeddings' mean square would forgive
        for norm in (m for m in wide.modules() if hasattr(m, "variance_epsilon")):
            norm.variance_epsilon *= 1e6
    elif broken == "norm":
        wide.model.norm.weight *= 400 / 192
    else:
        wide.model.layers[8].self_attn.v_proj.weight[:, :192] = 1.0  # an added layer that says something
    assert (wide(ids).logits - small(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_no_matrix_has_a_row_of_zeros_and_the_padding_is_real_memory(wide: LlamaForCausalLM) -> None:
    matrices = {name: weight for name, weight in wide.named_parameters() if weight.ndim == 2}
    assert len(matrices) == 9 * 7 + 1
    for name, weight in matrices.items():
        assert bool(weight.any(dim=1).all()), name
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
        if "embed" not in name:
            assert weight[:, -8:].abs().mean() > 0, name


@torch.no_grad()
def test_an_untied_model_in_bfloat16() -> None:
    small = tiny.build("llama").bfloat16()
    wide = widen(small, **TINY)
    ids = tiny.prompt()
    assert wide.dtype == torch.bfloat16
    assert wide.lm_head.weight is not wide.model.embed_tokens.weight
    assert bool(wide.lm_head.weight[:, -8:].any(dim=1).all())
    ours, theirs = wide(ids).logits, small(ids).logits
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_drafts_propose_for_the_wide_target_what_they_propose_for_the_small_one(
    pair: tuple, wide: LlamaForCausalLM
) -> None:
    small, draft, ids = pair
    plain = answer(small, ids)
    assert answer(small, ids, assistant_model=draft) == plain
    expected = draft.last_stats
    mapped, widened = map_draft(draft, small, wide), widen_draft(draft, wide)
    widened.draft_device, widened.tree = "cpu", draft.tree
    for follower in (mapped, widened):
        for _ in range(2):
            assert answer(wide, ids, assistant_model=follower) == plain
            assert follower.last_stats.accepted_by_depth == expected.accepted_by_depth
    assert mapped.num_parameters() == draft.num_parameters()
    untrained = DovetailAssistantModel.from_target(wide, num_hidden_layers=draft.config.num_hidden_layers)
    assert widened.num_parameters() == untrained.num_parameters() > 3 * draft.num_parameters()
    with pytest.raises(ValueError, match="hidden_size 400"):
        answer(small, ids, assistant_model=mapped)
    assert answer(small, ids, assistant_model=draft) == plain  # the original is as it was


def test_the_presets_have_the_size_in_their_name(pair: tuple) -> None:
    config = pair[0].config
    for name, billions in (("0.5B", 0.5), ("1B", 1.0), ("3B", 2.8)):
        sizes = asdict(preset(name, config))
        with torch.device("meta"):
            model = LlamaForCausalLM(module._widened_config(config, Geometry(**sizes)))
        assert abs(model.num_parameters() / 1e9 - billions) < 0.1
        assert sizes["num_attention_heads"] == 3 * sizes["num_key_value_heads"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 100}, "hidden_size is 100, the model's own is 192"),
        ({"num_key_value_heads": 6}, "15 query heads on 6 key/value heads"),
    ],
)
def test_geometries_that_do_not_hold_the_model(pair: tuple, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        widen(pair[0], **(SIZES | change))


def test_other_models_and_drafts_are_refused(pair: tuple, wide: LlamaForCausalLM) -> None:
    small = pair[0]
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        widen(tiny.build("gpt2"), **TINY)
    with pytest.raises(ValueError, match=r"0\.7B.*0\.5B, 1B, 3B"):
        preset("0.7B", small.config)
    lm_draft = DovetailAssistantModel.from_causal_lm(small)
    with pytest.raises(ValueError, match="nothing to widen"):
        widen_draft(lm_draft, wide)
    with pytest.raises(ValueError, match="as it is"):
        map_draft(lm_draft, small, wide)
    eagle3 = DovetailAssistantModel.from_target(small, fusion="eagle3")
    with pytest.raises(ValueError, match="only 'dgf' can be widened"):
        widen_draft(eagle3, wide)
    with pytest.raises(ValueError, match="inner layers of its target"):
        map_draft(eagle3, small, wide)
