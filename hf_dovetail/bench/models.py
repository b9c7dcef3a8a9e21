"""The models of a measurement: the target, made anew for each engine's turn, its drafts, and a small assistant."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..config import TreeShape
from ..demo import load_pair, pair_path
from ..loading import load_target, load_tokenizer
from ..modeling import DovetailAssistantModel
from ..names import existing
from .rows import Row, make_rows, never_ending, randomised
from .widen import PRESETS, check_can_widen, map_draft, preset, widen, widen_draft

NOT_WIDENED = "none"


@dataclass(frozen=True)
class Models:
    """What is measured.

    Args:
        make_target: a new target, untouched by any engine; at most one lives at a time.
        tokenizer: its tokenizer.
        rows: the ways to decode.
        drafts: the Dovetail drafts whose cost is measured, by name.
        describe: the models in words and numbers.
        widened: the geometry's name, or None.
        positions: longest prompt and answer together.
    """

    make_target: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    drafts: dict[str, DovetailAssistantModel]
    describe: dict[str, Any]
    widened: str | None
    positions: int


def load_models(
    target: str | None, draft: str | None, assistant: str | None, geometry: str, dtype: torch.dtype, shape: TreeShape
) -> Models:
    """Load the models.

    Args:
        target, draft: folders or names; both None for the pair in the package.
        assistant: a small LM for transformers' assisted generation. None: the small target itself if it is
            widened, an assistant that always agrees; else those rows are left out.
        geometry: one of `widen.PRESETS` or "none".
        dtype: of all models.
        shape: of the fixed trees.

    Raises:
        ValueError: if only one of target and draft is given, or the geometry is unknown or does not suit the target.
        OSError: if a model's files are missing or damaged.
    """
    if (target is None) != (draft is None):
        raise ValueError("give both --target and --draft, or neither for the pair in the package")
    if geometry not in (*PRESETS, NOT_WIDENED):
        raise ValueError(f"--widen is {geometry!r}; expected {', '.join(PRESETS)} or {NOT_WIDENED}")
    helper = None if assistant is None else load_target("--assistant", assistant, dtype)
    if target is None:
        small, small_draft, tokenizer = load_pair(dtype)
    else:
        small_draft = DovetailAssistantModel.from_pretrained(existing("--draft", draft), dtype=dtype)
        small = load_target("--target", target, dtype)
        tokenizer = load_tokenizer("--target", target)
    if geometry == NOT_WIDENED:
        del small  # it is read anew for each engine
        source, chain_maker = target or pair_path("target"), helper
        rows, drafts = _rows(small_draft, None, helper, shape)

        def make() -> PreTrainedModel:
            return never_ending(AutoModelForCausalLM.from_pretrained(source, dtype=dtype))

    else:
        check_can_widen(small)
        sizes, chain_maker = asdict(preset(geometry, small.config)), helper or small

        def make() -> PreTrainedModel:
            return never_ending(widen(small, **sizes))

        wide = make()
        if small_draft.reads_features:
            mapped, wide_draft = map_draft(small_draft, small, wide), widen_draft(small_draft, wide)
        else:
            mapped, wide_draft = small_draft, None
        rows, drafts = _rows(mapped, wide_draft, chain_maker, shape)
        del wide
    target_now = make()
    text = target_now.config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None) or sys.maxsize  # ALiBi's have no end
    describe = {
        "target": {"name": "the pair in the package" if target is None else Path(target).name, **_describe(target_now)},
        "drafts": {name: _describe(model) for name, model in drafts.items()},
        "assistant": None if chain_maker is None else _describe(chain_maker),
        "assistant_is_the_small_target": chain_maker is not None and helper is None,
    }
    return Models(make, tokenizer, rows, drafts, describe, None if geometry == NOT_WIDENED else geometry, positions)


def _rows(
    draft: DovetailAssistantModel,
    wide_draft: DovetailAssistantModel | None,
    assistant: PreTrainedModel | None,
    shape: TreeShape,
) -> tuple[list[Row], dict[str, DovetailAssistantModel]]:
    """The rows, and the drafts by name."""
    random = randomised(draft) if draft.reads_features else None
    drafts = {"small" if wide_draft is not None else "draft": draft}
    if wide_draft is not None:
        drafts["wide"] = wide_draft
    helper = None if assistant is None else never_ending(copy.deepcopy(assistant))
    return make_rows(draft, wide_draft, random, helper, shape), drafts


def _describe(model: PreTrainedModel) -> dict[str, Any]:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    tensors = {id(parameter): parameter for parameter in model.parameters()}.values()
    return {
        "type": model.config.model_type,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtype": str(model.dtype).removeprefix("torch."),
        **{name: getattr(model.config, name, None) for name in (*sizes, "head_dim", "vocab_size")},
    }
