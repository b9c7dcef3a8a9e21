"""Published draft formats: reads and understands checkpoints that others wrote.

`files` reads tensors, `tables` holds each format's rules, `recognise` applies them; no network is built here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config import DovetailConfig
from .files import hub_options, read_config, read_tensors
from .recognise import Published, recognise
from .tables import FORMATS, SUPPORTED

__all__ = ["FORMATS", "Published", "hub_options", "read_config", "read_published", "read_tensors", "recognise"]


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
    if saved.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"{source} is no draft: its model_type is {saved.get('model_type')!r} and its tensors are of none of the "
            f"formats {SUPPORTED}; expected one of them, a Dovetail draft, or a causal language model"
        )
    return None
