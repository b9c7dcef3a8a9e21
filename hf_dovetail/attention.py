"""Attention masks for a forward pass that holds branches, in the structure that a model's forward accepts.

Which positions a row may see is decided by the caller; this module adds the model's sliding window and puts
the result into the form that transformers passes through untouched: one 4D mask, or one per layer type.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .grouped import NAME as _GROUPED

_FULL, _SLIDING = "full_attention", "sliding_attention"
IMPLEMENTATIONS = ("eager", "sdpa", _GROUPED)
"""Kinds of attention that read a 4D mask as it is."""
TESTED_TYPES = frozenset(
    (
        *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "olmo2"),
        *("granite", "cohere", "cohere2", "mixtral", "qwen3_moe"),
    )
)
"""Model types that the tests cover; others are tried first (`probe`)."""


class BranchingMask:
    """Builds the masks of one model.

    Attributes:
        reads_slots: whether a layer has a window, and slots must be given.

    Raises:
        ValueError: if the model's attention cannot be given a mask of its own (`why_not_branching` says why).
    """

    def __init__(self, model: PreTrainedModel) -> None:
        reason = why_not_branching(model)
        if reason:
            raise ValueError(reason)
        text = model.config.get_text_config(decoder=True)
        self._additive = text._attn_implementation != "sdpa"
        self._dtype = model.dtype
        self._layer_types = sorted(set(getattr(text, "layer_types", None) or ()))
        self._window = getattr(text, "sliding_window", None)
        self.reads_slots = self._layer_types != [_FULL] if self._layer_types else self._window is not None

    def __call__(
        self, allowed: Tensor, query_slots: Tensor | None = None, key_slots: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The model's `attention_mask`.

        Args:
            allowed: (B, T, K) bool, whether the row may see the key at all.
            query_slots: (B, T) int64, index in the sequence that the row stands for.
            key_slots: (B, K) int64, likewise for the keys; the window counts in these.
        """
        full = self._finish(allowed)
        if not self.reads_slots:
            return {_FULL: full} if self._layer_types else full
        near = query_slots[:, :, None] - key_slots[:, None, :] < self._window
        sliding = self._finish(allowed & near)
        return {_FULL: full, _SLIDING: sliding} if self._layer_types else sliding

    def _finish(self, allowed: Tensor) -> Tensor:
        """(B, 1, T, K): bool for sdpa; 0 and the dtype's minimum, to be added, for the others."""
        allowed = allowed.unsqueeze(1)
        if not self._additive:
            return allowed
        mask = torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(self._dtype).min)


def why_not_branching(model: PreTrainedModel) -> str | None:
    """Why one forward pass of this model cannot hold branches, or None if it can."""
    text: PreTrainedConfig = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if text._attn_implementation not in IMPLEMENTATIONS:
        return f"{name} uses attn_implementation={text._attn_implementation!r}; branches need one of {IMPLEMENTATIONS}"
    unknown = set(getattr(text, "layer_types", None) or ()) - {_FULL, _SLIDING}
    if unknown:
        return f"{name} has layers of type {sorted(unknown)}; branches need attention layers"
    if getattr(text, "attention_chunk_size", None) is not None:
        return f"{name} has chunked attention"
    if getattr(text, "attention_types", None) is not None:
        return f"{name} counts its local attention in the order of its keys"
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" not in parameters or getattr(text, "alibi", False):
        return f"{name} takes positions from the order of its keys (no position_ids)"
    if getattr(text, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder"
    return None
