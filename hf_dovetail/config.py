"""What a draft checkpoint is (`DovetailConfig`, saved) and how a run goes (`TreeShape`, never saved).

This module knows numbers and names only: no weights, no devices, no generation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

FUSIONS = ("dgf", "eagle", "eagle3", "none")
MAX_BLOCKS = 6
ROPE_TYPES_KEPT = ("default", "linear", "llama3", "yarn")
_EAGLE3_ONLY = (
    "own_head",
    "draft_vocab_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
)
_EAGLE3_LAYERS = 7
"""Fewest layers of a target in which EAGLE-3's own three are different ones."""
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TreeShape:
    """How large a tree the draft proposes in a round (paper: server setting 16/7/10, laptop setting 7/4/10).

    Args:
        nodes: nodes that the target verifies in one forward pass, not counting the root; 0 is plain decoding.
        depth: expansions after the first level (EAGLE-2's `depth`); a path has at most `depth + 1` nodes.
        top_k: nodes expanded per level, and children proposed per expanded node.

    Raises:
        ValueError: if a number is not an integer, or is out of range.
    """

    nodes: int = 16
    depth: int = 7
    top_k: int = 10

    def __post_init__(self) -> None:
        for name, least in (("nodes", 0), ("depth", 0), ("top_k", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"TreeShape.{name} is {value!r}; expected an integer of at least {least}")

    @property
    def levels(self) -> int:
        """Largest number of nodes on a path from the root."""
        return min(self.depth + 1, self.nodes)

    def clipped(self, levels: int) -> TreeShape:
        """The same shape with paths of at most `levels` nodes (none: plain decoding)."""
        if levels >= self.levels:
            return self
        if levels <= 0:
            return TreeShape(0, 0, self.top_k)
        return TreeShape(self.nodes, levels - 1, self.top_k)

    def within(self, most: TreeShape) -> TreeShape:
        """The part of this shape that `most` allows (no nodes: plain decoding)."""
        if self.nodes == 0 or most.nodes == 0:
            return TreeShape(0, 0, most.top_k)
        return TreeShape(min(self.nodes, most.nodes), min(self.depth, most.depth), min(self.top_k, most.top_k))

    def as_chain(self) -> TreeShape:
        """The widest chain within this shape, for targets that cannot verify branches."""
        return TreeShape(self.levels, max(self.levels - 1, 0), 1)


class DovetailConfig(PreTrainedConfig):
    """Geometry of a draft and the target it was made for; never how to run (engine, threads, device, tree).

    Args:
        fusion: "dgf" (Dynamic Gating Fusion, arXiv 2412.18934), "eagle" (EAGLE-1 and -2, arXiv 2401.15077), "eagle3"
            (EAGLE-3, arXiv 2503.01840) or "none" (an ordinary causal LM, see `causal_lm`).
        target_name, target_type, target_hidden_size, target_vocab_size: the target that the draft imitates.
        feature_layers: hidden states of the target that the draft reads: [-1] is the LM head's input; with "eagle3"
            the layers whose inputs it reads, or None for EAGLE-3's own choice (`eagle3_layers`).
        fusion_bias: whether "eagle"'s product has a bias.
        own_embeddings: whether the checkpoint holds embeddings, in place of the target's.
        own_head: whether it holds an LM head, in place of the target's; None: with "eagle3" only, which alone may.
        draft_vocab_size: tokens that an "eagle3" draft can propose; None: all of the target's.
        norm_before_residual, norm_before_fc, fc_norm, norm_output: variants of "eagle3", see `blocks`.
        qk_norm: whether queries and keys are normalised per head (Qwen 3).
        attention_out_bias: whether the attention's output has a bias; None: as `attention_bias`.
        final_logit_softcapping, logit_scale: what the target does to its LM head's output.
        causal_lm: the wrapped model's configuration, for `fusion="none"`.

    The other fields have the meaning they have in `LlamaConfig`.
    """

    model_type = "dovetail"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 1
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    fusion: str = "dgf"
    target_name: str | None = None
    target_type: str | None = None
    target_hidden_size: int | None = None
    target_vocab_size: int | None = None
    feature_layers: list[int] | None = None
    fusion_bias: bool = False
    own_embeddings: bool = False
    own_head: bool | None = None
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    attention_out_bias: bool | None = None
    final_logit_softcapping: float | None = None
    logit_scale: float = 1.0
    causal_lm: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"fusion is {self.fusion!r}; expected one of {', '.join(FUSIONS)}")
        if self.fusion != "none" and not 1 <= self.num_hidden_layers <= MAX_BLOCKS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; a draft has 1 to {MAX_BLOCKS} blocks")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.feature_layers is None and self.fusion != "eagle3":
            self.feature_layers = [] if self.fusion == "none" else [-1]
        if self.own_head is None:
            self.own_head = self.fusion == "eagle3"
        _check_features(self)
        _check_eagle3(self)
        super().__post_init__(**kwargs)

    @property
    def feature_size(self) -> int:
        """Entries of a position's features, as the target hands them over."""
        layers = 3 if self.feature_layers is None else len(self.feature_layers)
        return layers * (self.target_hidden_size or self.hidden_size)

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved. A pipeline looks for its assistant's class inside transformers, by these names."""
        saved = super().to_dict()
        if saved.get("architectures"):
            saved["architectures"] = [saved["architectures"][0], "AutoModelForCausalLM"]
        return saved

    @classmethod
    def for_target(cls, target: PreTrainedConfig, num_hidden_layers: int, fusion: str) -> DovetailConfig:
        """The configuration of a new draft with the target's own widths, heads and RoPE parameters."""
        text = target.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=_intermediate_size(text),
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            max_position_embeddings=_max_positions(text),
            rms_norm_eps=getattr(text, "rms_norm_eps", None) or 1e-6,
            rope_parameters=rope_parameters(text),
            fusion=fusion,
            feature_layers=_new_eagle3_layers(text.num_hidden_layers) if fusion == "eagle3" else None,
            **describe_head(target, own_head=fusion == "eagle3"),
            **describe_target(target),
        )

    @classmethod
    def for_causal_lm(cls, lm: PreTrainedConfig) -> DovetailConfig:
        """The configuration that wraps an ordinary causal LM as a draft."""
        text = lm.get_text_config(decoder=True)
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            max_position_embeddings=_max_positions(text),
            fusion="none",
            **describe_head(lm),
            causal_lm=lm.to_dict(),
            **{name: getattr(text, name, None) for name in _SPECIAL_TOKENS},
        )


def describe_target(target: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a draft's configuration that record its target."""
    text = target.get_text_config(decoder=True)
    return {
        "target_name": public_name(target.name_or_path),
        "target_type": text.model_type,
        "target_hidden_size": text.hidden_size,
        "target_vocab_size": text.vocab_size,
        **{name: getattr(text, name, None) for name in _SPECIAL_TOKENS},
    }


def describe_head(target: PreTrainedConfig, own_head: bool = False) -> dict[str, Any]:
    """The fields that say what happens behind the LM head: what the target does, unless the draft has its own head."""
    if own_head:
        return {}
    text = target.get_text_config(decoder=True)
    return {
        "final_logit_softcapping": getattr(text, "final_logit_softcapping", None),
        "logit_scale": _logit_scale(text),
    }


def eagle3_layers(target_layers: int) -> list[int]:
    """The layers whose inputs an EAGLE-3 draft reads where its checkpoint names none: 2, n // 2, n - 3.

    Source: `modeling_llama_kv.py` in SafeAILab/EAGLE; vLLM and SGLang take the same.

    Raises:
        ValueError: if the target has too few layers for three different ones.
    """
    if target_layers < _EAGLE3_LAYERS:
        raise ValueError(
            f"EAGLE-3 reads the inputs of layers 2, n // 2 and n - 3, but the target has {target_layers} layers, "
            f"expected at least {_EAGLE3_LAYERS}; name others in the draft's config.feature_layers"
        )
    return [2, target_layers // 2, target_layers - 3]


def _new_eagle3_layers(target_layers: int) -> list[int]:
    """The layers for a new draft: EAGLE-3's own, or as far apart in a target that is too small for them."""
    if target_layers < _EAGLE3_LAYERS:
        return [target_layers // 4, target_layers // 2, target_layers - 1]
    return eagle3_layers(target_layers)


def _check_features(config: DovetailConfig) -> None:
    """Refuse feature layers that the fusion cannot read."""
    layers = config.feature_layers
    if config.fusion in ("dgf", "eagle") and layers != [-1]:
        raise ValueError(f"feature_layers is {layers}; fusion {config.fusion!r} reads [-1], the LM head's input")
    if config.fusion == "eagle3" and layers is not None and (not layers or min(layers) < 0):
        raise ValueError(
            f"feature_layers is {layers}; EAGLE-3 reads inputs of layers, numbered from 0, such as [2, 16, 29]"
        )


def _check_eagle3(config: DovetailConfig) -> None:
    """Refuse what only EAGLE-3 has in other drafts, and its numbers out of range."""
    if config.fusion != "eagle3":
        given = [name for name in _EAGLE3_ONLY if getattr(config, name)]
        if given:
            raise ValueError(f"{', '.join(given)}: only drafts with fusion 'eagle3' have this, not {config.fusion!r}")
        return
    size = config.draft_vocab_size
    if size is not None and not 1 <= size <= config.vocab_size:
        raise ValueError(f"draft_vocab_size is {size}; expected 1 to the target's vocab_size of {config.vocab_size}")
    wide = config.target_hidden_size
    if wide is not None and wide != config.hidden_size and not (config.own_embeddings and config.own_head):
        raise ValueError(
            f"hidden_size is {config.hidden_size} and the target's is {wide}; a draft of another width needs "
            "embeddings and an LM head of its own (own_embeddings, own_head)"
        )
    if size is not None and not config.own_head:
        raise ValueError(
            f"draft_vocab_size is {size}, but the target's LM head, which ranks all {config.vocab_size} tokens, is "
            "the draft's too; set own_head=True, or leave draft_vocab_size out"
        )


def public_name(name_or_path: str | None) -> str | None:
    """A model's name; of a folder only its last part, since the rest belongs to this machine."""
    if name_or_path and os.path.isdir(name_or_path):
        return os.path.basename(os.path.abspath(name_or_path))
    return name_or_path or None


def _intermediate_size(text: PreTrainedConfig) -> int:
    """The target's MLP width; four times the hidden size where it is unset or differs between layers."""
    size = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None)
    return size if isinstance(size, int) else 4 * text.hidden_size


def _max_positions(text: PreTrainedConfig) -> int:
    """The model's last position; without one (ALiBi), more than any prompt has."""
    return getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None) or 1 << 24


def rope_parameters(text: PreTrainedConfig) -> dict[str, Any]:
    """A model's RoPE parameters, without kinds that depend on more than the position."""
    rope = dict(getattr(text, "rope_parameters", None) or {})
    if rope and "rope_type" not in rope:  # one set per layer type (Gemma 3): take the full-attention layers'
        rope = dict(rope.get("full_attention") or next(iter(rope.values())))
    rope.pop("partial_rotary_factor", None)
    if rope.get("rope_type") in ROPE_TYPES_KEPT:
        return {"rope_theta": 10000.0, **rope}
    return {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}


def _logit_scale(text: PreTrainedConfig) -> float:
    """The factor that the target applies to its logits (Cohere multiplies, Granite divides)."""
    if getattr(text, "logits_scaling", None):
        return 1.0 / text.logits_scaling
    return getattr(text, "logit_scale", None) or 1.0
