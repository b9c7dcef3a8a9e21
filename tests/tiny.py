"""Tiny random models of many families, drafts of three qualities for them, and the comparison with plain generate.

Random weights are drawn wide enough that the next token depends on the whole prefix: with the usual 0.02 every
model repeats one token, and a broken cache or mask would go unnoticed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape

VOCAB = 101
WINDOW = 8
DRAFTS = ("accepting", "noisy", "untrained")

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
"""Sizes from which oneDNN lays bf16 weights out as the native kernels read them, so that a layer is two calls."""

_MIXED = ["sliding_attention", "full_attention"]
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _BASE | {"num_hidden_layers": 3}),
    "mistral": ("mistral", _BASE | {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", _BASE),
    "qwen2-sliding": ("qwen2", _BASE | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", _BASE),
    "gemma2": ("gemma2", _BASE | {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", _BASE | {"sliding_window": WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", _BASE | {"sliding_window": WINDOW}),
    "gpt2": ("gpt2", _GPT2),
    "olmo2": ("olmo2", _BASE),
    "granite": ("granite", _BASE | {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "cohere": ("cohere", _BASE | {"logit_scale": 0.25}),
    "cohere2": ("cohere2", _BASE | {"logit_scale": 0.25, "sliding_window": WINDOW, "layer_types": _MIXED}),
    "mixtral": ("mixtral", _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", _BASE | _MOE | {"num_experts": 4}),
}
"""Families whose attention can hold branches: name -> (model type, configuration)."""

CHAINS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("lfm2", _BASE | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.25,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
    "llama4": (
        "llama4_text",
        _BASE
        | _MOE
        | {
            "attention_chunk_size": 16,
            "num_local_experts": 2,
            "layer_types": ["chunked_attention", "full_attention"],
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "num_experts_per_tok": 1,
            "use_qk_norm": False,
        },
    ),
}
"""Families that get a chain: convolutions, positions from the order of the keys, chunked attention."""

STATEFUL: tuple[str, dict[str, Any]] = (
    "mamba",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
        "eos_token_id": None,
        "bos_token_id": 1,
        "pad_token_id": 0,
    },
)


def build(name: str, seed: int = 0, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """A tiny random float32 model of one family, always the same for the same arguments."""
    model_type, values = {**FAMILIES, **CHAINS, "mamba": STATEFUL}[name]
    config = AutoConfig.for_model(model_type, **{**values, **changes})
    torch.manual_seed(seed)
    options = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()


@torch.no_grad()
def perturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """A copy whose matrices carry noise relative to their own spread: it agrees often, not always."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        if parameter.ndim >= 2:
            parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


def draft_for(target: PreTrainedModel, kind: str) -> DovetailAssistantModel:
    """A draft of one of the `DRAFTS` kinds: the target itself, the target with noise, a new DGF draft."""
    if kind == "untrained":
        torch.manual_seed(2)
        return _placed(DovetailAssistantModel.from_target(target))
    return _placed(DovetailAssistantModel.from_causal_lm(target if kind == "accepting" else perturbed(target, 0.15)))


def randomised(draft: DovetailAssistantModel, seed: int = 4) -> DovetailAssistantModel:
    """Every weight random: start values (identity, zero gate) would hide swapped terms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return draft


def random_pair(kind: str, family: str, blocks: int = 1) -> tuple[PreTrainedModel, DovetailAssistantModel]:
    """A target and a draft whose every weight is random."""
    target = build(family)
    if kind == "lm":
        draft = draft_for(target, "noisy")
    else:
        draft = randomised(DovetailAssistantModel.from_target(target, num_hidden_layers=blocks))
    return target, met(draft, target)


def met(draft: DovetailAssistantModel, target: PreTrainedModel) -> DovetailAssistantModel:
    """The draft, ready on the CPU for `target`."""
    draft.draft_device = "cpu"
    draft.meet(target)
    return draft


def _placed(draft: DovetailAssistantModel) -> DovetailAssistantModel:
    draft.draft_device = "cpu"
    draft.tree = TreeShape(nodes=12, depth=4, top_k=4)
    return draft


@torch.no_grad()
def bigram_draft(sequence: Tensor) -> DovetailAssistantModel:
    """A Llama whose weights are set to the token pairs of `sequence`: it drafts for targets that have no twin."""
    width = 104
    lm = build("llama", hidden_size=width, num_hidden_layers=1)
    lm.model.layers[0].self_attn.o_proj.weight.zero_()
    lm.model.layers[0].mlp.down_proj.weight.zero_()
    lm.model.embed_tokens.weight.copy_(torch.eye(VOCAB, width))
    lm.lm_head.weight.zero_()
    tokens = sequence[0].tolist()
    for last, following in pairwise(tokens):
        lm.lm_head.weight[following, last] += 1.0
    return _placed(DovetailAssistantModel.from_causal_lm(lm))


def prompt(length: int = 12, seed: int = 3) -> Tensor:
    """(1, length) random token ids above the special ones."""
    return torch.randint(4, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


CASES = ("fresh", "padded", "continued", "chunked")


def prepared(case: str, target: PreTrainedModel) -> tuple[Tensor, dict[str, Any], int]:
    """A prompt (1, n) in one of the `CASES`, what `generate` is given with it, and the first position that is new."""
    ids = prompt()
    if case == "padded":
        ids = torch.nn.functional.pad(ids, (4, 0))
        return ids, {"attention_mask": (ids != 0).long()}, 4
    if case == "continued":
        first = run(target, ids, max_new_tokens=8)
        return torch.cat((first.sequences, prompt(4, seed=8)), dim=1), {"past_key_values": first.past_key_values}, 19
    return ids, {"prefill_chunk_size": 5} if case == "chunked" else {}, 0


def run(
    target: PreTrainedModel, ids: Tensor, draft: DovetailAssistantModel | None = None, seed: int = 5, **options: Any
) -> Any:
    """One seeded call of generate with everything it can return."""
    extra = {} if draft is None else {"assistant_model": draft}
    settings = {
        "do_sample": False,
        "max_new_tokens": 30,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    torch.manual_seed(seed)
    return target.generate(ids, **{**settings, **extra, **options})


def both(target: PreTrainedModel, draft: DovetailAssistantModel, ids: Tensor, **options: Any) -> tuple[Any, Any]:
    """Plain generate's output and Dovetail's, compared."""
    plain, ours = run(target, ids, **options), run(target, ids, draft, **options)
    assert_same(plain, ours)
    return plain, ours


def assert_same(plain: Any, ours: Any, tolerance: float = 2e-4) -> None:
    """The same tokens exactly, the same scores and logits up to float32's rounding (logits here reach 20)."""
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        expected, found = getattr(plain, name), getattr(ours, name)
        assert (expected is None) == (found is None)
        if expected is not None:
            assert len(found) == len(expected)
            torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=tolerance)


def cache_states(cache: Any) -> list[Tensor]:
    """Keys and values of every layer."""
    return [states for layer in cache.layers for states in (layer.keys, layer.values)]


def assert_same_cache(plain: Any, ours: Any) -> None:
    """Two caches of the same kind that hold the same states."""
    assert type(plain) is type(ours)
    assert ours.get_seq_length() == plain.get_seq_length() > 0
    assert [type(layer) for layer in ours.layers] == [type(layer) for layer in plain.layers]
    for expected, found in zip(cache_states(plain), cache_states(ours), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def offloaded(config: Any) -> DynamicCache:
    """A cache that says it offloads; making a real one needs a GPU with some builds of torch."""
    cache = DynamicCache(config=config)
    cache.offloading = True
    return cache


def call_log(log: list[Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor that writes down the prefix of each call and changes the scores by how often it ran."""

    def process(prefix: Tensor, scores: Tensor) -> Tensor:
        log.append(prefix[0].tolist())
        return scores.roll(len(log) % 3, dims=-1)

    return process
