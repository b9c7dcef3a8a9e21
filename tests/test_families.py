"""Every family of targets x every quality of draft: the answer, its scores and its logits are plain generate's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.attention import why_not_branching
from hf_dovetail.target import ChainTarget, Context, FeatureTap, Target, TreeTarget, open_target
from hf_dovetail.tree import DraftTree

Maker = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("kind", tiny.DRAFTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_and_sampled_answers_are_plain_generates(family: str, kind: str, attention: str | None) -> None:
    """Guards losslessness; the answer runs far beyond the sliding windows (8), in branches and after rejections."""
    target = tiny.build(family, attention=attention)
    draft = tiny.draft_for(target, kind)
    kept, seen = 0, set()
    for options in ({}, {"do_sample": True}, {"do_sample": True, "temperature": 0.6, "top_k": 20}):
        plain, _ = tiny.both(target, draft, tiny.prompt(), **options)
        stats = draft.last_stats
        kept += stats.accepted
        assert plain.sequences.shape[1] == 12 + 30 == 12 + stats.new_tokens
        assert stats.accepted < stats.drafted
        assert stats.rounds + stats.accepted == 29
        seen.add(tuple(plain.sequences[0].tolist()))
    assert len(seen) == 3
    assert kept > (0 if kind == "untrained" else 15)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_the_target_as_its_own_draft_is_always_accepted(family: str, tiny_model: Maker) -> None:
    """Guards positions and features of the draft: any slip between the two sides costs acceptance at once."""
    target = tiny_model(family)
    draft = tiny.draft_for(target, "accepting")
    draft.tree = TreeShape(nodes=4, depth=3, top_k=1)
    tiny.both(target, draft, tiny.prompt(), max_new_tokens=41)
    stats = draft.last_stats
    assert stats.accepted == stats.drafted == 32
    assert (stats.rounds, stats.tokens_per_round, stats.accepted_by_depth) == (8, 5.0, [8] * 4)


ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0}),
    "yarn": ("qwen3", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 24}),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    "longrope": ("phi3", {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("name", ROPES)
def test_ropes_that_change_with_the_length(name: str, kind: str) -> None:
    """Guards RoPE that depends on the length: no pass of a tree may stand on both sides of the change (at 24)."""
    family, rope = ROPES[name]
    end = 48 if name == "longrope" else 24
    original = {"original_max_position_embeddings": 24} if name == "longrope" else {}
    rope = {"rope_theta": 10000.0, **rope, **original}
    values = {"rope_parameters": rope, "max_position_embeddings": end, **original}
    for length in (5, 12, 30):  # fresh models: a dynamic RoPE remembers the longest sequence of earlier calls
        plain = tiny.run(tiny.build(family, **values), tiny.prompt(length), max_new_tokens=35)
        target = tiny.build(family, **values)
        draft = tiny.draft_for(target, kind)
        tiny.assert_same(plain, tiny.run(target, tiny.prompt(length), draft, max_new_tokens=35))
    assert plain.sequences.shape[1] == 65
    plain, _ = tiny.both(target, draft, tiny.prompt(5), max_new_tokens=12, do_sample=True)
    assert draft.last_stats.drafted > 0
    still = tiny.run(tiny.build(family), plain.sequences[:, :-1], max_new_tokens=1)
    assert name in ("dynamic", "longrope") or not torch.allclose(still.logits[0], plain.logits[-1], atol=1e-3)


def open_tree(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> tuple[Target, Any]:
    """A verifier that has read `ids`."""
    positions = (torch.ones_like(ids) if mask is None else mask).cumsum(-1).sub(1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    context = Context(cache, mask, positions, ids.shape[1], 100)
    target = open_target(model, context, FeatureTap(model, enabled=True), 20)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
    return target, target.prefill(lambda own: model(past_key_values=own, **inputs))


@torch.no_grad()
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "lfm2", "bloom"])
def test_inner_layers_are_tapped_where_transformers_shows_them(family: str) -> None:
    """Guards drafts that read several layers: the inputs of layer i are `hidden_states[i]`, in every family."""
    model, ids = tiny.build(family), tiny.prompt()
    expected = model(ids, output_hidden_states=True).hidden_states
    output, found = FeatureTap(model, True, (1, 0, -1))(lambda: model(ids))
    torch.testing.assert_close(found, torch.cat([expected[layer] for layer in (1, 0, -1)], dim=-1))
    assert not torch.allclose(*(found.chunk(3, dim=-1)[:2]), atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(output.logits, model(ids).logits)


def random_tree(root: int, seed: int) -> DraftTree:
    rng = random.Random(seed)
    parents = [-1, *(rng.randrange(max(0, node - 3), node) for node in range(1, 14))]
    tokens = [root, *(rng.randrange(4, tiny.VOCAB) for _ in range(13))]
    return DraftTree(torch.tensor([tokens]), torch.tensor([parents]), torch.zeros(1, 14))


@torch.no_grad()
@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_branching_tree_is_verified_as_each_path_alone(family: str, attention: str | None) -> None:
    """Guards mask, positions, window and the kept path, without any sampling in between; two rounds in a row."""
    model = tiny.build(family, attention=attention)
    ids = tiny.prompt()
    target, prefilled = open_tree(model, ids)
    expected = model(ids, output_hidden_states=True)
    torch.testing.assert_close(prefilled.logits, expected.logits[:, -1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prefilled.features, expected.hidden_states[-1], rtol=1e-4, atol=1e-4)
    for seed in range(3):
        tree = random_tree(10 + seed, seed)
        assert tree.depths.unique().numel() < tree.num_nodes  # it branches
        output = target.verify(tree)
        for node in range(tree.num_nodes + 1):
            path = tree.path(node)
            alone = model(torch.cat((ids, tree.tokens[:, path]), dim=1), output_hidden_states=True)
            torch.testing.assert_close(output.logits[:, node], alone.logits[:, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(output.features[:, node], alone.hidden_states[-1][:, -1], rtol=1e-4, atol=1e-4)
        assert isinstance(target, TreeTarget)
        kept = tree.path(9 + seed)
        target.commit(tuple(kept))
        ids = torch.cat((ids, tree.tokens[:, kept]), dim=1)
        target.cache.check_integrity(ids.shape[1])
    assert not model.get_decoder()._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_left_padded_prompt_is_verified_as_without_padding(family: str, tiny_model: Maker) -> None:
    """Guards the mask's padding columns and the position of the root."""
    model, ids = tiny_model(family), tiny.prompt()
    padded, mask = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1), torch.ones(1, 17, dtype=torch.long)
    mask[:, :5] = 0
    target, prefilled = open_tree(model, padded, mask)
    assert prefilled.features.shape[1] == 12
    tree = random_tree(9, 1)
    output = target.verify(tree)
    for node in range(tree.num_nodes + 1):
        alone = model(torch.cat((ids, tree.tokens[:, tree.path(node)]), dim=1)).logits[:, -1]
        torch.testing.assert_close(output.logits[:, node], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "qwen3"])
def test_left_padded_prompts_give_plain_generates_answer(family: str, kind: str, tiny_model: Maker) -> None:
    """Guards padding, which the draft must not learn from and the target must not see."""
    target = tiny_model(family)
    draft = tiny.draft_for(target, kind)
    padded = torch.nn.functional.pad(tiny.prompt(), (5, 0), value=0)
    mask = (padded != 0).long()
    for sample in (False, True):
        padded_out, _ = tiny.both(target, draft, padded, attention_mask=mask, do_sample=sample)
    assert draft.last_stats.drafted > draft.last_stats.accepted
    bare, _ = tiny.both(target, draft, tiny.prompt(), do_sample=True)
    assert padded_out.sequences[0, 5:].tolist() == bare.sequences[0].tolist()
    unmasked = tiny.run(target, padded, attention_mask=torch.ones_like(mask), do_sample=True)
    assert not torch.allclose(unmasked.logits[0], padded_out.logits[0], atol=1e-3)


def chain_draft(target: PreTrainedModel, ids: Tensor, **options: Any) -> DovetailAssistantModel:
    """A draft that knows the token pairs of the target's own answer."""
    return tiny.bigram_draft(tiny.run(target, ids, max_new_tokens=60, **options).sequences)


@pytest.mark.parametrize("family", tiny.CHAINS)
def test_targets_that_cannot_branch_get_a_chain_and_plain_generates_answer(family: str, tiny_model: Maker) -> None:
    """Guards the chain path: convolutions, ALiBi and chunked attention, rolled back after each rejection."""
    target, ids = tiny_model(family), tiny.prompt()
    assert why_not_branching(target) is not None
    for sample in (False, True):
        draft = chain_draft(target, ids, do_sample=sample)
        _, _ = tiny.both(target, draft, ids, do_sample=sample, max_new_tokens=60)
        stats = draft.last_stats
        assert 0 < stats.accepted < stats.drafted
        assert stats.drafted <= stats.rounds * draft.tree.levels


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("family", tiny.CHAINS)
def test_a_chains_cache_is_plain_generates_and_goes_on(family: str, tokens: int, tiny_model: Maker) -> None:
    """Guards past recording, which must be trimmed and switched off also when the answer ends in the prefill."""
    target, ids = tiny_model(family), tiny.prompt(20)
    draft = chain_draft(target, ids)
    plain, ours = tiny.both(target, draft, ids, max_new_tokens=tokens)
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length() == 19 + tokens
    assert not any(getattr(layer, "record_past", False) for layer in ours.past_key_values.layers)
    more = torch.cat((plain.sequences, tiny.prompt(3, seed=8)), dim=1)
    expected = tiny.run(target, more, past_key_values=plain.past_key_values)
    tiny.assert_same(expected, tiny.run(target, more, past_key_values=ours.past_key_values))


def test_a_chain_target_takes_a_dgf_draft_where_its_features_can_be_read(tiny_model: Maker) -> None:
    """Such a target takes any draft; where the decoder's output cannot be tapped, that is said."""
    target, ids = tiny_model("bloom"), tiny.prompt()
    tiny.both(target, tiny.draft_for(target, "untrained"), ids)
    target = tiny_model("llama4")
    with pytest.raises(ValueError, match="Llama4ForCausalLM does not say which part is its decoder"):
        tiny.run(target, ids, tiny.draft_for(target, "untrained"))


def test_a_stateful_target_is_refused_in_a_sentence() -> None:
    """Guards recurrent states, which cannot be taken back at all."""
    target, ids = tiny.build("mamba"), tiny.prompt()
    draft = tiny.bigram_draft(ids)
    with pytest.raises(ValueError, match=r"stateful models, such as MambaForCausalLM"):
        tiny.run(target, ids, draft)
    assert tiny.run(target, ids).sequences.shape[1] == 42


@pytest.mark.parametrize("family", tiny.CHAINS)
def test_such_a_model_cannot_be_a_tree_draft(family: str, tiny_model: Maker) -> None:
    with pytest.raises(ValueError, match="cannot draft a tree"):
        DovetailAssistantModel.from_causal_lm(tiny_model(family))


def test_each_family_opens_the_right_verifier(tiny_model: Maker) -> None:
    """The parametrised tests above would pass on chains alone, and on eager attention alone."""
    assert tiny_model("llama").config._attn_implementation == "sdpa"
    for family, kind in [*((f, TreeTarget) for f in tiny.FAMILIES), ("bloom", ChainTarget), ("llama4", ChainTarget)]:
        model = tiny_model(family)
        context = Context(DynamicCache(config=model.config), None, None, 5, 10)
        assert type(open_target(model, context, FeatureTap(model, False), 4)) is kind


class IgnoresMasks(LlamaForCausalLM):
    """Takes a mask of branches and attends as if it were none."""

    def forward(self, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(
            *args, attention_mask=None if getattr(attention_mask, "ndim", 2) > 2 else attention_mask, **kwargs
        )


def test_an_unknown_architecture_that_ignores_the_mask_gets_chains() -> None:
    """Guards silent corruption: such a model runs on trees without an error, and answers something else."""
    known, ids = tiny.build("llama"), tiny.prompt()
    model = IgnoresMasks(known.config).eval()
    model.load_state_dict(known.state_dict())
    model.config.model_type = "llama_of_another_house"
    draft = tiny.draft_for(known, "noisy")
    tiny.both(model, draft, ids)
    stats = draft.last_stats
    assert 0 < stats.accepted < stats.drafted <= stats.rounds * draft.tree.levels
    tiny.both(known, draft, ids)
    assert draft.last_stats.drafted > draft.last_stats.rounds * draft.tree.levels
