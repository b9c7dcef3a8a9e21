"""Published draft formats: reads and understands checkpoints that others wrote.

`files` reads tensors, `tables` holds each format's rules, `recognise` applies them; no network is built here.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from ..config import DovetailConfig
from .files import hub_options, read_config, read_tensors
from .recognise import Published, format_of, recognise
from .tables import FORMATS, SUPPORTED, Format

__all__ = [
    "FORMATS",
    "Published",
    "check_not_misread",
    "hub_options",
    "published_format",
    "read_config",
    "read_published",
    "read_tensors",
    "recognise",
]

_MARKS = tuple(mark for each in FORMATS for mark in each.marks)
_read_right: WeakSet[nn.Module] = WeakSet()


def read_published(
    source: str, saved: dict[str, Any], options: dict[str, Any]
) -> tuple[DovetailConfig, dict[str, Tensor]] | None:
    """A published draft's configuration and state dictionary; None for an ordinary language model.

    Args:
        source: a folder, or a name on the Hub.
        saved: its `config.json`.
        options: of `hub_options`.

    Raises:
        ValueError: if it is neither, or a draft whose tensors or configuration do not fit its format.
        OSError: if its files are missing or damaged.
    """
    tensors = read_tensors(source, options)
    published = recognise(saved, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, source)
    if published is not None:
        config, state = published.config, published.state(tensors)
        config.name_or_path = source
        return config, state
    # Here, since the Auto classes import `modeling`, which imports this module (see `register`).
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if saved.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{source} is no draft: its model_type is {saved.get('model_type')!r} and its tensors are of none of the "
            f"formats {SUPPORTED}; expected one of them, a Dovetail draft, or a causal language model"
        )
    return None


def published_format(source: str, **options: Any) -> Format | None:
    """The format of a published draft; None for a draft of this package, an ordinary model, and what cannot be read.

    Args:
        source: a folder, or a name on the Hub.
        options: of `hub_options`.

    Raises:
        ValueError: if it is a speculator of a type that is not supported.
    """
    try:
        saved = read_config(source, options)
        if saved.get("model_type") == DovetailConfig.model_type:
            return None
        marked = read_tensors(source, options, lambda name: name.removeprefix("model.").startswith(_MARKS))
    except (OSError, ValueError):  # whoever loads it says more
        return None
    return format_of(saved, {name.removeprefix("model."): tuple(t.shape) for name, t in marked.items()}, source)


def check_not_misread(model: nn.Module) -> None:
    """Refuse a model that transformers made of a published draft's files: most of its weights are random.

    Raises:
        ValueError: saying how to load the draft.
    """
    if model in _read_right or not type(model).__module__.startswith("transformers."):
        return
    source = model.name_or_path
    found = published_format(source, local_files_only=True) if source else None
    if found is not None:
        raise ValueError(
            f"{source} is a published draft ({found.name}), of which transformers made a {type(model).__name__} with "
            f"random weights; load it with hf_dovetail.DovetailAssistantModel.from_pretrained({source!r}), or convert "
            f"it once with: hf-dovetail convert {source} OUT --target TARGET"
        )
    _read_right.add(model)
