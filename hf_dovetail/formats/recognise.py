"""Which published draft a checkpoint is, its configuration here, and what its tensors are called here.

Pure: a configuration's dictionary and tensors' names and shapes in, a `Published` out. A name that no rule of `tables`
knows, or a missing one, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedConfig

from ..config import ROPE_TYPES_KEPT, DovetailConfig, rope_parameters
from .tables import BLOCK, BLOCK_EXTRAS, FORMATS, GEOMETRY, ROPE, SPECULATORS_TYPES, SUPPORTED, SWITCHES, Format, Key

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Published:
    """A published draft, understood.

    Args:
        format: which format it is.
        config: what it is here.
        names: its tensors' names -> ours; tensors that are not used here are left out.
    """

    format: Format
    config: DovetailConfig
    names: dict[str, str]

    def state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The network's state dictionary.

        `d2t` is an offset: token i of the draft is token i + d2t[i] of the target (`topK_genrate` in `cnets.py` of
        SafeAILab/EAGLE; `compute_logits` in vLLM's `llama_eagle3.py`).

        Raises:
            ValueError: if `d2t` leaves the target's vocabulary, names a token twice, or contradicts `t2d`.
        """
        state = {ours: tensors[name] for name, ours in self.names.items()}
        if self.config.draft_vocab_size:
            plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            state["vocabulary"] = _vocabulary(plain["d2t"], plain.get("t2d"), self.config)
        return state


def recognise(config: Mapping[str, Any], shapes: Shapes, source: str) -> Published | None:
    """Which published draft this is; None if it has nothing of one (it may be an ordinary language model).

    Args:
        config: of its `config.json`.
        shapes: of its tensors, by name.
        source: what errors call it.

    Raises:
        ValueError: if tensors are missing or left over, or the configuration names what is not supported or contradicts
            the tensors.
    """
    plain = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    found = format_of(config, plain, source)
    if found is None:
        return None
    stated, nested = _stated(config), config.get("transformer_layer_config") or {}
    blocks = _blocks(found, stated, plain, source)
    names = _translated(found, blocks, plain, source)
    try:
        ours = _config(found, config, stated, blocks, plain, bool(nested))
    except ValueError as error:
        raise ValueError(f"{source} looks like {found.name}, but {error}") from error
    return Published(found, ours, {name: names[p] for name in shapes if (p := name.removeprefix("model.")) in names})


def format_of(config: Mapping[str, Any], plain: Shapes, source: str) -> Format | None:
    """By what the speculators library says, or by the marks of the tensors' names, which lack the prefix `model.`.

    Raises:
        ValueError: if it is a speculator of a type that is not supported.
    """
    kind = config.get("speculators_model_type")
    if kind is not None:
        if kind not in SPECULATORS_TYPES:
            raise ValueError(
                f"{source} is a speculator of type {kind!r}; supported are {', '.join(map(repr, SPECULATORS_TYPES))}, "
                f"and the formats {SUPPORTED}"
            )
        return SPECULATORS_TYPES[kind]
    for each in FORMATS:
        if any(name.startswith(each.marks) for name in plain):
            return each
    return None


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The geometry that a configuration states: its own, or what speculators and vLLM's EAGLE nest."""
    for name in ("transformer_layer_config", "model"):
        if isinstance(config.get(name), Mapping):
            return dict(config[name])
    return dict(config)


def _blocks(found: Format, stated: Mapping[str, Any], plain: Shapes, source: str) -> int:
    """How many decoder blocks it has: as many as are there; where the number is stated it must be the same."""
    numbers = {int(match[1]) for name in plain if (match := re.match(r"layers\.(\d+)\.", name))}
    count = max(numbers, default=0) + 1
    if found.states_blocks and stated.get("num_hidden_layers", count) != count:
        raise ValueError(
            f"{source} looks like {found.name}: its configuration says num_hidden_layers "
            f"{stated['num_hidden_layers']}, its tensors are those of {count}"
        )
    return count


def _translated(found: Format, blocks: int, plain: Shapes, source: str) -> dict[str, str]:
    """Published names -> ours, of the tensors that are used.

    Raises:
        ValueError: naming the tensors that are missing and those that no rule knows.
    """
    rules = {key.published: key for key in _expanded(found, blocks, plain)}
    missing = sorted(name for name, key in rules.items() if key.needed and name not in plain)
    left_over = sorted(name for name in plain if name not in rules and not name.endswith("rotary_emb.inv_freq"))
    if missing or left_over:
        problems = [
            f"{word}: {', '.join(names)}" for word, names in (("missing", missing), ("left over", left_over)) if names
        ]
        raise ValueError(f"{source} looks like {found.name}, but its tensors do not fit: {'; '.join(problems)}")
    return {name: rules[name].ours for name in plain if name in rules and rules[name].ours}


def _expanded(found: Format, blocks: int, plain: Shapes) -> Iterable[Key]:
    """All rules of a checkpoint with so many blocks."""
    for key in found.keys:
        if "{i}" not in key.published:
            yield key
            continue
        pattern = re.escape(key.published).replace(r"\{i\}", r"(\d+)")
        for match in filter(None, (re.fullmatch(pattern, name) for name in plain)):
            yield Key(match[0], key.ours.replace("{i}", match[1]), key.needed)
    for block in range(blocks):
        published, ours = f"layers.{block}." if block else found.first, f"layers.{block}."
        norms = ("input_layernorm.weight",) if block else found.first_norms
        yield from (Key(published + name, ours + name) for name in (*BLOCK, *norms))
        yield from (Key(published + name, ours + name, needed=False) for name in BLOCK_EXTRAS)


def _config(
    found: Format, config: Mapping[str, Any], stated: dict[str, Any], blocks: int, plain: Shapes, nested: bool
) -> DovetailConfig:
    """Our configuration of a published draft."""
    text = _text_config(stated, nested)
    geometry = {name: getattr(text, name, None) for name in GEOMETRY}
    fields = {**geometry, **_switches(found, {**stated, **config}, plain), "rope_parameters": rope_parameters(text)}
    if found.fusion == "eagle3":
        fields |= _eagle3_fields(config, text.vocab_size, plain, nested)
    name = ((config.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")
    return DovetailConfig(
        fusion=found.fusion,
        num_hidden_layers=blocks,
        target_name=None if name is None or name.startswith(("/", ".")) else name,
        **fields,
    )


def _text_config(stated: dict[str, Any], nested: bool) -> PreTrainedConfig:
    """Geometry and RoPE with the defaults of the configuration's class: speculators saves only what differs from them.

    Without `rope_theta` that is 10000, in EAGLE's own code too.
    """
    # Here, since these import the Auto classes, which import `modeling`, which imports this module (see `register`).
    from transformers import LlamaConfig, Qwen3Config

    kind = stated.get("model_type", "llama")
    classes = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    if nested and kind not in classes:
        raise ValueError(f"its transformer_layer_config is of type {kind!r}; expected {' or '.join(classes)}")
    rope = stated.get("rope_parameters") or stated.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type not in (*ROPE_TYPES_KEPT, "dynamic"):  # dynamic differs beyond the trained length only
        raise ValueError(f"its RoPE is of type {rope_type!r}; expected {', '.join(ROPE_TYPES_KEPT)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"its RoPE turns {rope['partial_rotary_factor']} of each head only; expected all of it")
    if stated.get("use_sliding_window") or "sliding_attention" in (stated.get("layer_types") or ()):
        raise ValueError("its attention has a sliding window; expected full attention")
    known = {name: stated[name] for name in (*GEOMETRY, *ROPE) if stated.get(name) is not None}
    try:
        return classes.get(kind, LlamaConfig)(**known)
    except (StrictDataclassError, KeyError, TypeError) as error:
        raise ValueError(f"its geometry is no valid one: {error}") from error


def _switches(found: Format, config: Mapping[str, Any], plain: Shapes) -> dict[str, bool]:
    """The fields that the tensors decide.

    Raises:
        ValueError: if the configuration says otherwise.
    """
    fields, places = {}, (config, config.get("eagle_config") or {})
    for field, pattern, words, fusions in SWITCHES:
        if found.fusion not in fusions:
            continue
        tensor = pattern.format(first=found.first)
        fields[field] = tensor in plain
        said = [bool(place[word]) for place in places for word in words if place.get(word) is not None]
        if said and any(said) != fields[field]:
            there = "there" if fields[field] else "missing"
            raise ValueError(f"its configuration says {words[0]} {any(said)}, yet {tensor} is {there}")
    return fields


def _eagle3_fields(config: Mapping[str, Any], vocab_size: int, plain: Shapes, nested: bool) -> dict[str, Any]:
    """What only EAGLE-3 has: the layers read, the draft's vocabulary, the variants of its norms."""
    inner = config.get("eagle_config") or {}
    if inner.get("use_aux_hidden_state") is False:
        raise ValueError("its eagle_config says use_aux_hidden_state false; expected features of several layers")
    if nested and config.get("norm_before_residual") is None:
        raise ValueError("its configuration lacks norm_before_residual, whose default differs between programs; add it")
    head = plain.get("lm_head.weight")
    size = vocab_size if head is None else head[0]
    if config.get("draft_vocab_size") not in (None, size):
        rows = f"lm_head has {size} rows" if head else f"it has no lm_head, and the target's ranks {size} tokens"
        raise ValueError(f"its configuration says draft_vocab_size {config['draft_vocab_size']}, {rows}")
    if size < vocab_size and "d2t" not in plain:
        raise ValueError(f"d2t is missing: it draws on {size} of the target's {vocab_size} tokens and must say which")
    return {
        "feature_layers": _feature_layers(config, inner),
        "target_hidden_size": config.get("target_hidden_size"),
        "draft_vocab_size": size if size != vocab_size else None,
        **{name: bool(config.get(name, inner.get(name, False))) for name in ("norm_before_residual", "norm_output")},
    }


def _feature_layers(config: Mapping[str, Any], inner: Mapping[str, Any]) -> list[int] | None:
    """The layers whose inputs are read, or None for EAGLE-3's own choice.

    At the top level (speculators, vLLM) number i means the input of layer i, transformers' `hidden_states[i]`; inside
    `eagle_config` it means the output of layer i (SpecForge hooks the layers' outputs, and SGLang's
    `set_eagle3_layers_to_capture` adds 1).
    """
    name = "eagle_aux_hidden_state_layer_ids"
    inputs, outputs = config.get(name), inner.get(name)
    shifted = [layer + 1 for layer in outputs] if outputs else None
    if inputs and shifted and list(inputs) != shifted:
        raise ValueError(
            f"its {name} is {list(inputs)} (inputs of layers), in its eagle_config {list(outputs)} (outputs), which "
            "are other layers; delete the wrong one"
        )
    return list(inputs) if inputs else shifted


def _vocabulary(d2t: Tensor, t2d: Tensor | None, config: DovetailConfig) -> Tensor:
    """(D,) int64 ids of the target, from offsets (D,) and, if given, a mask (V,) of the same tokens."""
    ids = torch.arange(len(d2t)) + d2t.long()
    size, vocab_size = config.draft_vocab_size, config.vocab_size
    if len(ids) != size or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) != size:
        raise ValueError(
            f"d2t names {len(ids.unique())} tokens between {int(ids.min())} and {int(ids.max())}; expected {size} "
            f"different ones below the target's {vocab_size} (token i of the draft is i + d2t[i])"
        )
    if t2d is not None and (len(t2d) != vocab_size or not torch.equal(t2d.nonzero().flatten(), ids.sort().values)):
        raise ValueError(
            f"d2t and t2d name different tokens of the target (t2d has {len(t2d)} entries for {vocab_size} tokens); "
            "the checkpoint is damaged"
        )
    return ids
