"""The draft network: its formula, its checkpoints, and the weights that it shares with a target."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hf_dovetail import DovetailAssistantModel, DovetailConfig
from hf_dovetail.blocks import DynamicGatingFusion


def rows(count: int = 7) -> tuple[Tensor, Tensor]:
    """Tokens t+1 and features of tokens t."""
    return tiny.prompt(count), torch.randn(1, count, 32, generator=torch.Generator().manual_seed(6))


def test_fusion_is_the_formula_of_the_paper() -> None:
    """Guards the gate's direction and the order of the concatenation (DESIGN section 7)."""
    torch.manual_seed(0)
    fusion = DynamicGatingFusion(8, eps=1e-5)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter)
    embedding, feature = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    e = embedding / (embedding.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * fusion.input_layernorm.weight
    h1 = feature @ fusion.W_1
    h2 = e @ fusion.W_2
    h2 = h2 * torch.sigmoid(h2)
    z = torch.sigmoid(torch.cat([h1, h2], -1) @ fusion.W_z)
    torch.testing.assert_close(fusion(embedding, feature), z * h1 + (1 - z) * h2)
    assert not torch.allclose(z * h1 + (1 - z) * h2, z * h2 + (1 - z) * h1, atol=0.1)


@torch.no_grad()
def test_the_blocks_are_llamas_without_the_first_norm_and_the_last() -> None:
    """Guards the architecture: block 0 takes the fusion's output as it is, and no norm stands before the LM head."""
    target = tiny.build("llama")
    draft = tiny.met(tiny.randomised(DovetailAssistantModel.from_target(target, num_hidden_layers=2)), target)
    tokens, features = rows()
    hidden = draft.fusion(target.model.embed_tokens(tokens), features)
    positions = torch.arange(7).unsqueeze(0)
    rotary = LlamaRotaryEmbedding(target.config)(hidden, positions)
    mask = torch.full((1, 1, 7, 7), float("-inf")).triu(1)
    for index, block in enumerate(draft.layers):
        own = LlamaDecoderLayer(draft.config, index)
        own.input_layernorm = nn.Identity() if index == 0 else own.input_layernorm
        own.load_state_dict(block.state_dict())
        hidden = own(hidden, attention_mask=mask, position_embeddings=rotary)
    torch.testing.assert_close(draft(tokens, features), hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(draft.logits(hidden), F.linear(hidden, target.lm_head.weight))
    names = set(draft.state_dict())
    assert "layers.1.input_layernorm.weight" in names
    assert not {"layers.0.input_layernorm.weight", "norm.weight", "embed_tokens.weight", "lm_head.weight"} & names


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma2"])
@torch.no_grad()
def test_logits_are_those_of_the_targets_own_head(family: str, tiny_model: Any) -> None:
    """Guards scales and soft caps behind the LM head: the draft reads the same features in the same units."""
    target = tiny_model(family)
    draft = tiny.met(DovetailAssistantModel.from_target(target), target)
    output = target(tiny.prompt(), output_hidden_states=True)
    torch.testing.assert_close(draft.logits(output.hidden_states[-1]), output.logits, rtol=1e-4, atol=1e-4)
    twin = DovetailAssistantModel.from_causal_lm(target)
    torch.testing.assert_close(twin.logits(output.hidden_states[-1]), output.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "lfm2"])
def test_every_family_gets_a_working_draft(family: str, blocks: int, tiny_model: Any) -> None:
    """Guards `from_target`: heads, widths, RoPE and activation of each configuration."""
    target = tiny_model(family)
    draft = tiny.met(DovetailAssistantModel.from_target(target, num_hidden_layers=blocks), target)
    tokens, features = rows()
    logits = draft.logits(draft(tokens, features))
    assert logits.shape == (1, 7, tiny.VOCAB)
    assert logits.isfinite().all()
    assert len(draft.layers) == blocks
    assert draft.config.target_type == target.config.model_type


@torch.no_grad()
def test_a_fresh_draft_passes_the_feature_on(llama: PreTrainedModel) -> None:
    """Guards the start values: without training the feature enters by half."""
    draft = DovetailAssistantModel.from_target(llama)
    _, features = rows()
    fused = draft.fusion(torch.zeros(1, 7, 32), features)
    torch.testing.assert_close(fused, features / 2)


@pytest.mark.parametrize("blocks", [0, 7, -1])
def test_the_number_of_blocks_is_checked(blocks: int, llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"num_hidden_layers is {blocks}; a draft has 1 to 6 blocks"):
        DovetailAssistantModel.from_target(llama, num_hidden_layers=blocks)


def test_unknown_fusions_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"'sum'.*dgf, eagle, eagle3, none"):
        DovetailAssistantModel.from_target(llama, fusion="sum")
    with pytest.raises(ValueError, match="from_causal_lm"):
        DovetailAssistantModel.from_target(llama, fusion="none")


def first_logits(draft: DovetailAssistantModel, target: PreTrainedModel) -> Tensor:
    """What a draft says of fixed rows."""
    tiny.met(draft, target)
    tokens, features = rows()
    with torch.no_grad():
        return draft.logits(draft(tokens, features if draft.reads_features else None))


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("through", ["class", "auto"])
def test_a_saved_draft_is_the_same_draft(
    kind: str, through: str, llama: PreTrainedModel, tmp_path: Path, ids: Tensor
) -> None:
    """Guards save and load, bit by bit, and the Auto classes; nothing of how to run is stored."""
    draft = tiny.draft_for(llama, kind)
    if kind == "untrained":
        tiny.randomised(draft)
    expected = first_logits(draft, llama)
    draft.save_pretrained(tmp_path)
    loader = DovetailAssistantModel if through == "class" else AutoModelForCausalLM
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is DovetailAssistantModel
    assert torch.equal(first_logits(loaded, llama), expected)
    assert not loaded.training
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DovetailConfig
    assert config.architectures == ["DovetailAssistantModel", "AutoModelForCausalLM"]
    assert not {"tree", "draft_device", "engine", "device", "threads"} & set(config.to_dict())
    loaded.draft_device = "cpu"
    tiny.both(llama, loaded, ids)
    assert loaded.config.target_hidden_size == draft.config.target_hidden_size
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 4 * sum(p.numel() for p in draft.parameters()) + 20_000  # no embeddings of the target in it


def test_loading_information_is_still_available(untrained: DovetailAssistantModel, tmp_path: Path) -> None:
    untrained.save_pretrained(tmp_path)
    _, info = DovetailAssistantModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    half = DovetailAssistantModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_draft_that_was_never_loaded_is_refused(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards weights that nothing has set: they are NaN, and the first call says which."""
    bare = DovetailAssistantModel(DovetailConfig.for_target(llama.config, 1, "dgf"))
    assert all(p.isnan().all() for p in bare.parameters())
    bare.draft_device = "cpu"
    with pytest.raises(ValueError, match=r"weight fusion\.W_1 of the draft is not finite.*never loaded"):
        tiny.run(llama, ids, bare)
    bare.reset_parameters()
    tiny.both(llama, bare, ids)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_are_shared_or_copied(tied: bool, ids: Tensor) -> None:
    """Guards memory: shared where device and precision agree, one copy where they do not, never a parameter."""
    target = tiny.build("llama", tie_word_embeddings=tied)
    draft = tiny.draft_for(target, "untrained")
    count = sum(p.numel() for p in draft.parameters())
    draft.meet(target)
    sources = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    held = draft._shared.embedding, draft._shared.head
    assert [t.data_ptr() for t in held] == [t.data_ptr() for t in sources]
    draft.to(torch.float64).meet(target)
    copies = draft._shared.embedding, draft._shared.head
    assert [t.dtype for t in copies] == [torch.float64] * 2
    assert (copies[0].data_ptr() == copies[1].data_ptr()) is tied
    again = draft._shared
    draft.meet(target)
    assert draft._shared is again
    assert count == sum(p.numel() for p in draft.parameters())
    tiny.both(target, draft, ids)


def test_a_head_with_a_bias_is_shared_with_it(ids: Tensor) -> None:
    target = tiny.build("llama")
    target.lm_head = nn.Linear(32, tiny.VOCAB)
    draft = tiny.draft_for(target, "untrained")
    tiny.both(target, draft, ids)
    assert draft._shared.bias.data_ptr() == target.lm_head.bias.data_ptr()
    hidden = torch.randn(1, 2, 32)
    torch.testing.assert_close(draft.logits(hidden), target.lm_head(hidden))


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_a_draft_that_has_met_a_target_can_be_copied(
    kind: str, through: str, llama: PreTrainedModel, ids: Tensor
) -> None:
    """Guards weak references and shared weights, which must stay behind."""
    draft = tiny.draft_for(llama, kind)
    tiny.both(llama, draft, ids)
    rounds = draft.last_stats.rounds
    other = copy.deepcopy(draft) if through == "deepcopy" else pickle.loads(pickle.dumps(draft))
    assert other._shared is None
    assert other.tree == draft.tree
    tiny.both(llama, other, ids)
    assert other.last_stats.rounds == rounds
    tiny.both(llama, draft, ids)


@pytest.mark.parametrize("value", [None, 16, "wide", {"nodes": 3}])
def test_only_a_tree_shape_is_a_tree(value: Any, untrained: DovetailAssistantModel) -> None:
    with pytest.raises(ValueError, match="expected a TreeShape"):
        untrained.tree = value
    assert untrained.tree.nodes == 12


def test_statistics_are_readable_both_ways(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    """Guards the contract's names, and sums that must hold."""
    tiny.run(llama, ids, noisy)
    stats = noisy.last_stats
    assert {
        "rounds",
        "new_tokens",
        "drafted",
        "accepted",
        "accepted_by_depth",
        "tokens_per_round",
        "prefill_ms",
        "draft_ms",
        "verify_ms",
        "overhead_ms",
        "bytes_to_draft",
        "bytes_to_target",
        "cores_shared",
        "draft_failed",
    } == set(stats)
    assert stats["accepted"] == stats.accepted == sum(stats.accepted_by_depth) > 0
    assert stats.tokens_per_round == 29 / stats.rounds == dict(stats)["tokens_per_round"]
    assert stats.bytes_to_target == stats.drafted * 3 * 4
    assert min(stats.prefill_ms, stats.draft_ms, stats.verify_ms, stats.overhead_ms, stats.bytes_to_draft) > 0
    with pytest.raises(KeyError):
        stats["clock"]
