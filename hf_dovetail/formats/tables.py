"""The rules of the published formats, as data: names of tensors, and what configurations say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """What one tensor is called.

    Args:
        published: its published name; `{i}` stands for a number.
        ours: its name here, or None if it is not used here.
        needed: whether a checkpoint must hold it.
    """

    published: str
    ours: str | None
    needed: bool = True


@dataclass(frozen=True)
class Format:
    """A published format.

    Args:
        name: what errors and cards call it.
        source: where its rules come from.
        fusion: `DovetailConfig.fusion`.
        marks: beginnings of tensor names; one is enough to recognise it.
        keys: tensors outside the blocks.
        first: names of the first block's tensors begin with this, those of block i with `layers.{i}.`.
        first_norms: norms at the first block's entrance.
        states_blocks: whether its code builds as many blocks as the configuration says; otherwise that number is any.
    """

    name: str
    source: str
    fusion: str
    marks: tuple[str, ...]
    keys: tuple[Key, ...]
    first: str = "layers.0."
    first_norms: tuple[str, ...] = ()
    states_blocks: bool = True


_EMBEDDINGS = Key("embed_tokens.weight", "embed_tokens.weight", needed=False)
_TARGETS_HEAD = Key("lm_head.weight", None, needed=False)  # published code draws on the target's own
_EAGLE3_KEYS = (
    Key("fc.weight", "fusion.fc.weight"),
    Key("input_norm.weight", "fusion.input_norm.weight", needed=False),
    Key("fc_norm.{i}.weight", "fusion.fc_norm.{i}.weight", needed=False),
    Key("norm.weight", "norm.weight"),
    Key("lm_head.weight", "lm_head.weight", needed=False),  # NVIDIA publishes some that draw on the target's
    Key("d2t", None, needed=False),  # see `Published.state`
    Key("t2d", None, needed=False),
    _EMBEDDINGS,
)
BLOCK = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
BLOCK_EXTRAS = (
    *(f"self_attn.{name}_proj.bias" for name in "qkvo"),
    *(f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
)
_PAIR_NORMS = ("input_layernorm.weight", "hidden_norm.weight")

FORMATS = (
    Format(
        "Dovetail (DGF)",
        "arXiv 2412.18934 and its code",
        "dgf",
        marks=("W_1", "W_2", "W_z"),
        keys=(
            *(Key(name, f"fusion.{name}") for name in ("W_1", "W_2", "W_z", "input_layernorm.weight")),
            _EMBEDDINGS,
            _TARGETS_HEAD,
        ),
    ),
    Format(
        "EAGLE-3",
        "cnets.py of SafeAILab/EAGLE; SpecForge and AngelSlim write the same",
        "eagle3",
        marks=("midlayer.",),
        keys=_EAGLE3_KEYS,
        first="midlayer.",
        first_norms=_PAIR_NORMS,
        states_blocks=False,  # `cnets.py` builds one; EAGLE3-Vicuna1.3-13B states its target's 40
    ),
    Format(
        "EAGLE-3 (speculators)",
        "eagle3/core.py of vllm-project/speculators",
        "eagle3",
        marks=("layers.0.hidden_norm.",),
        keys=(
            *_EAGLE3_KEYS,
            Key("verifier_norm.weight", None, needed=False),  # of training only
            Key("verifier_lm_head.weight", None, needed=False),
        ),
        first_norms=_PAIR_NORMS,
    ),
    Format(
        "EAGLE-1/2",
        "cnets1.py of SafeAILab/EAGLE",
        "eagle",
        marks=("fc.",),
        keys=(
            Key("fc.weight", "fusion.fc.weight"),
            Key("fc.bias", "fusion.fc.bias", needed=False),
            _EMBEDDINGS,
            _TARGETS_HEAD,
        ),
    ),
)
"""In the order in which they are tried."""
SUPPORTED = ", ".join(each.name for each in FORMATS)
SPECULATORS_TYPES = {"eagle3": FORMATS[2]}
GEOMETRY = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
SWITCHES = (
    ("fusion_bias", "fc.bias", ("bias",), ("eagle",)),
    ("norm_before_fc", "input_norm.weight", ("norm_before_fc",), ("eagle3",)),
    ("fc_norm", "fc_norm.0.weight", ("fc_norm",), ("eagle3",)),
    ("attention_bias", "{first}self_attn.q_proj.bias", ("attention_bias", "qkv_bias"), ("dgf", "eagle", "eagle3")),
    ("attention_out_bias", "{first}self_attn.o_proj.bias", (), ("dgf", "eagle", "eagle3")),
    ("mlp_bias", "{first}mlp.gate_proj.bias", ("mlp_bias",), ("dgf", "eagle", "eagle3")),
    ("qk_norm", "{first}self_attn.q_norm.weight", (), ("dgf", "eagle", "eagle3")),
    ("own_embeddings", "embed_tokens.weight", (), ("dgf", "eagle", "eagle3")),
    ("own_head", "lm_head.weight", (), ("eagle3",)),
)
"""What the tensors decide: our field, the tensor that shows it, what a published configuration may call it, and the
fusions that have it."""
