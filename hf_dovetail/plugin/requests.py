"""What Dovetail does not decode, and says so before anything runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..anatomy import CACHE
from ..modeling import DovetailAssistantModel
from ..weights import check_fits

PREPARED = (CACHE, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position")
"""The model's arguments that `generate` prepares for text prompts."""
_MODES = ("greedy_search", "sample", "assisted_generation")
_OTHER_ASSISTANTS = ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "speculation_type")


def check_request(target: PreTrainedModel, draft: DovetailAssistantModel, mode: str, config: GenerationConfig) -> None:
    """Refuse what Dovetail does not decode, before the prompt is run.

    Raises:
        ValueError: saying what was asked for and what to do.
    """
    check_fits(draft.config, target)
    if str(getattr(mode, "value", mode)) not in _MODES:
        raise ValueError(
            f"Dovetail decodes greedily or by sampling, but these arguments ask for {getattr(mode, 'value', mode)} "
            f"(num_beams={config.num_beams}); set num_beams=1, or leave out assistant_model"
        )
    dola = getattr(config, "dola_layers", None)
    if dola is not None:
        raise ValueError(
            f"dola_layers={dola!r} asks for DoLa, which Dovetail does not decode; leave out one of the "
            "two, it or assistant_model"
        )
    for name in _OTHER_ASSISTANTS:
        if getattr(config, name, None):
            raise ValueError(
                f"{name}={getattr(config, name)!r} asks for another way of drafting; leave out one of the two, "
                "it or assistant_model"
            )


def check_inputs(
    target: PreTrainedModel,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
    synced_gpus: bool,
) -> None:
    """Refuse inputs that cannot be decoded with a draft."""
    rows, length = input_ids.shape
    if rows != 1:
        raise ValueError(f"Dovetail decodes one prompt at a time, got a batch of {rows}; call generate once per prompt")
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError(
            "Dovetail needs token ids to draft from, got inputs_embeds; pass input_ids, or leave out assistant_model"
        )
    if length == 0:
        raise ValueError(
            "the prompt is empty (0 tokens); pass at least one token, such as the tokenizer's bos_token_id"
        )
    if not model_kwargs.get("use_cache") or model_kwargs.get(CACHE) is None:
        raise ValueError(
            "Dovetail needs the target's key/value cache; pass use_cache=True, or leave out assistant_model"
        )
    if target.training and any(getattr(module, "gradient_checkpointing", False) for module in target.modules()):
        raise ValueError(
            "gradient checkpointing turns the target's cache off in training mode; call target.eval() first"
        )
    if synced_gpus:
        raise ValueError("synced_gpus=True is not supported with a Dovetail draft; leave out assistant_model")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name) and config.return_dict_in_generate:
            raise ValueError(
                f"{name}=True is not supported with a Dovetail draft; leave it out, or leave out assistant_model"
            )
    tensors = [k for k, v in model_kwargs.items() if isinstance(v, Tensor) and k not in PREPARED]
    if tensors:
        raise ValueError(
            f"Dovetail decodes text prompts only, got {', '.join(tensors)}; leave out assistant_model for these inputs"
        )


def changes_rope(target: PreTrainedModel, length: int, max_length: int) -> bool:
    """Whether the answer may cross the length at which a longrope model recomputes its cache (Phi-3)."""
    text = target.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    original = getattr(text, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return rope.get("rope_type") == "longrope" and original is not None and length <= original < max_length
