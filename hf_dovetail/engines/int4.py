"""Linear layers in 4 bits: weights in groups of 32 input channels, activations in 8 bits per row as in `int8`.

A group has a step and a lowest weight in bf16, chosen for the least squared error among clipped ranges. A row's result
does not depend, bit for bit, on the rows computed with it. Quality and speed: docs/quantisation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import native, quantised
from .native import GROUP, NativeInt4
from .quantised import StackedMatrix
from .swap import Swap

_TOP = 15  # largest level
_KEPT_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)  # parts of a group's range; what lies outside is clipped
_CHUNK = 2**17  # weights that are float32 at a time


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix group by group.

    Args:
        weight: (n, K) bf16 or fp32, finite.

    Returns:
        (n, groups, GROUP) uint8 levels from 0 to 15, and (n, groups) bf16 lowest weights and steps: the weight is about
        `least + level * step`. Beyond K, the levels repeat the last weight's.
    """
    groups = -(-weight.shape[1] // GROUP)
    columns = torch.arange(groups * GROUP, device=weight.device).clamp_(max=weight.shape[1] - 1)
    found = []
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        values = rows.float()[:, columns].view(len(rows), groups, GROUP)
        found.append(_quantise_groups(values))
    levels, least, step = (torch.cat(parts) for parts in zip(*found, strict=True))
    return levels, least, step


def _quantise_groups(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, groups, GROUP) float32 to levels, lowest weights and steps; the kept range with the least squared error."""
    low, high = (bound / 2 for bound in values.aminmax(dim=-1, keepdim=True))
    best = _clipped(values, low + high, high - low, _KEPT_RANGES[0])
    for kept in _KEPT_RANGES[1:]:
        found = _clipped(values, low + high, high - low, kept)
        better = found[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    _, levels, least, step = best
    return levels.to(torch.uint8), least.squeeze(-1).bfloat16(), step.squeeze(-1).bfloat16()


def _clipped(values: Tensor, middle: Tensor, half: Tensor, kept: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared errors, levels, lowest weights and steps when a part of each range, `middle +- half`, is kept."""
    least = (middle - kept * half).bfloat16().float()
    step = (2 * kept / _TOP * half).bfloat16().float()
    step.masked_fill_(step == 0, 1.0)
    levels = ((values - least) / step).round_().clamp_(0, _TOP)
    return (levels * step).add_(least).sub_(values).square_().sum(-1, keepdim=True), levels, least, step


class Int4Matrix(StackedMatrix):
    """One matrix (N, K), or several with one input stacked, in 4 bits."""

    _width = 0  # K, which whole groups of levels do not tell

    def _quantised(self, weight: Tensor) -> tuple[Tensor, ...]:
        self._width = weight.shape[1]
        return quantise(weight)

    def _laid_out(self, *parts: Tensor) -> NativeInt4:
        return NativeInt4(*parts, self._width)

    def _dense(self, packed: NativeInt4, place: slice) -> Tensor:
        return packed.dense()[place]


def why_not(model: PreTrainedModel) -> str | None:
    """Why this engine cannot take the model, or None."""
    return quantised.why_not(model) or native.why_not()


def prepare(model: PreTrainedModel) -> Swap:
    """Quantise every linear weight of the model, in place, except the LM head, embeddings and routers."""
    return quantised.prepare(model, Int4Matrix)
