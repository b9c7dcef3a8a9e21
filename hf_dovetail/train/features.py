"""What a draft learns from, batch by batch: text, the target's features, and its distributions.

Two sources with one face: `LiveFeatures` runs the target on each batch, `capture.StoredFeatures` reads from disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling import DovetailAssistantModel
from ..target import FeatureTap
from ..weights import feature_layers
from .text import Windows


@dataclass(frozen=True)
class Batch:
    """What the loss is computed from.

    Args:
        ids: (B, W). features: (B, W, f). logits: (B, W, V), the target's.
    """

    ids: Tensor
    features: Tensor
    logits: Tensor


class Source(Protocol):
    """Training material.

    Attributes:
        facts: what a resumed run must have in common with the first.
        window: tokens per window.
        counted: (N, W) bool or None, as in `text.Windows`.
        target: the target, or a stand-in that has its embeddings and LM head only.
    """

    facts: Mapping[str, Any]
    window: int
    counted: Tensor | None
    target: PreTrainedModel

    def __len__(self) -> int:
        """Number of windows."""

    def batch(self, rows: Tensor, length: int, draft: DovetailAssistantModel) -> Batch:
        """The first `length` tokens of windows `rows` (B,), on the draft's device."""


@torch.no_grad()
def capture(target: PreTrainedModel, ids: Tensor, layers: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
    """The target's features (B, T, f) of these layers (see `FeatureTap`), and its logits (B, T, V), for ids (B, T).

    Every feature that a draft is trained on comes from here.
    """
    output, features = FeatureTap(target, enabled=True, layers=layers)(lambda: target(input_ids=ids, use_cache=False))
    return features, output.logits


class LiveFeatures:
    """Features computed on the fly: nothing is stored, and the target runs in every step."""

    def __init__(self, target: PreTrainedModel, windows: Windows) -> None:
        self.target, self._ids, self.counted = target, windows.ids, windows.counted
        self.window = windows.ids.shape[1]
        self._text = text_facts(windows)

    @property
    def facts(self) -> dict[str, Any]:
        """Of `Source`."""
        return {"target": fingerprint(self.target), "text": self._text}

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, rows: Tensor, length: int, draft: DovetailAssistantModel) -> Batch:
        """One forward pass of the target over windows `rows`, where the target is.

        If that is not where the draft is, features cross, and logits only of a draft with an LM head of its own.
        """
        ids = self._ids[rows, :length].long()
        layers = feature_layers(draft.config, self.target.config)
        entrance = self.target.get_input_embeddings().weight.device
        features, logits = capture(self.target, ids if entrance.type == "meta" else ids.to(entrance), layers)
        if draft.predicts_features and logits.device != draft.device:
            features = features.to(draft.device)
            with torch.no_grad():
                return Batch(ids.to(draft.device), features, draft.logits(features.to(draft.dtype)))
        return Batch(*(tensor.to(draft.device) for tensor in (ids, features, logits)))


def check_length(target: PreTrainedModel, window: int) -> None:
    """Refuse windows beyond the target's last position, where it was not trained, or cannot compute at all.

    Raises:
        ValueError: with both lengths.
    """
    longest = getattr(target.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise ValueError(f"windows have {window} tokens, the target has {longest} positions; choose a smaller window")


def text_facts(windows: Windows) -> dict[str, Any]:
    """What tells one training text from another."""
    digest = hashlib.sha256(windows.ids.int().contiguous().numpy())
    facts: dict[str, Any] = {"windows": list(windows.ids.shape)}
    if windows.counted is not None:
        digest.update(windows.counted.contiguous().numpy())
        facts["counted"] = int(windows.counted.sum())
    return {**facts, "sha256": digest.hexdigest()[:16]}


def fingerprint(target: PreTrainedModel) -> str:
    """A hash of the target's parameters: names, shapes, and the first values of each in bfloat16.

    Of a parameter that accelerate has offloaded, and that therefore is not there, name and shape alone.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(target.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        if parameter.is_meta:
            continue
        values = parameter.detach()[:1].flatten()[:256].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
