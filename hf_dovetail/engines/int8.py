"""Linear layers in 8 bits: weights int8 per output channel, activations uint8 per row, sums in integers.

A row's result does not depend, bit for bit, on the rows computed with it: it has a scale of its own, integer sums
are exact in any order, and what follows them is elementwise. Two kernels give the same bits: the native one where it
can be built, oneDNN's elsewhere. What was measured on the way: docs/quantisation.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from . import native, pages, quantised
from .quantised import LEVELS, StackedMatrix
from .swap import Swap

logger = logging.get_logger(__name__)

_ZERO_POINT = 128  # of the activations; oneDNN's kernels for signed ones are many times slower
_SMALLEST = torch.tensor(1e-30, dtype=torch.float32, device="cpu")  # magnitude of an all-zero row
_TOP = torch.tensor(float(LEVELS), dtype=torch.float32, device="cpu")
_ROUND = torch.tensor(1.5 * 2**23 + _ZERO_POINT, dtype=torch.float32, device="cpu")
"""float32 + this: the rounded integer stands in the lowest byte."""
_CHUNK = 2**17  # weights that are float32 at a time


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise each row by its own largest magnitude.

    Args:
        rows: (R, K) bf16 or fp32.

    Returns:
        (R, K) uint8 levels with zero point 128, and (R, 1) largest magnitudes in the precision of `rows`:
        `rows` is about `(levels - 128) / 127 * magnitudes`. NaN or inf makes the magnitude of its row NaN or inf.
    """
    wide = rows.float()
    magnitudes = torch.maximum(wide.abs().amax(-1, keepdim=True), _SMALLEST)
    levels = (wide * (_TOP / magnitudes)).add_(_ROUND).view(torch.int32).to(torch.uint8)
    return levels, magnitudes.to(rows.dtype)


class OneDnnInt8:
    """8-bit weights in oneDNN's layout.

    Args:
        levels: (N, K) int8.
        scales: (N,) float32; a product is `scale * activation's magnitude * (sum of levels' products)`.
    """

    def __init__(self, levels: Tensor, scales: Tensor) -> None:
        self._packed, self._scales = torch.ops.onednn.qlinear_prepack(levels, None), scales
        pages.enlarge(torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed))
        self._zeros = torch.zeros_like(scales, dtype=torch.int64)
        self.nbytes = levels.nbytes + scales.nbytes

    def product(self, rows: Tensor) -> Tensor:
        """(R, K) bf16 or fp32 to (R, N)."""
        levels, magnitudes = quantise(rows)
        sums = torch.ops.onednn.qlinear_pointwise.default(
            levels,
            1.0,
            _ZERO_POINT,
            self._packed,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            magnitudes.dtype,
            "none",
            [],
            "",
        )
        return sums.mul_(magnitudes)

    def levels(self) -> Tensor:
        """(N, K) int8, as they were given."""
        return self._packed.to_dense().t()


class Int8Matrix(StackedMatrix):
    """One matrix (N, K), or several with one input stacked, in 8 bits.

    Args:
        kernel: how the packed weights multiply.
    """

    def __init__(self, kernel: type[OneDnnInt8] | type[native.NativeInt8] = OneDnnInt8) -> None:
        super().__init__()
        self._kernel = kernel
        self._scales: Tensor | None = None  # of the packed weights

    def _quantised(self, weight: Tensor) -> tuple[Tensor, ...]:
        scales = weight.abs().amax(1).float().div_(LEVELS)
        scales.masked_fill_(scales == 0, 1.0)
        levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        step = max(1, _CHUNK // weight.shape[1])
        for begin in range(0, len(weight), step):
            rows = slice(begin, begin + step)
            levels[rows] = (weight[rows].float() / scales[rows, None]).round_()
        return levels, scales

    def _laid_out(self, levels: Tensor, scales: Tensor) -> OneDnnInt8 | native.NativeInt8:
        self._scales = scales
        return self._kernel(levels, scales / LEVELS)  # the rows' levels, too, are 127 times too large

    def _dense(self, packed: OneDnnInt8 | native.NativeInt8, place: slice) -> Tensor:
        return packed.levels()[place].float() * self._scales[place, None]


def why_not(model: PreTrainedModel) -> str | None:
    """Why this engine cannot take the model, or None."""
    reason = quantised.why_not(model)
    if reason is not None or _native_why_not() is None:
        return reason
    onednn_reason = _onednn_why_not()
    return None if onednn_reason is None else f"{_native_why_not()}; without the native kernel: {onednn_reason}"


def prepare(model: PreTrainedModel) -> Swap:
    """Quantise every linear weight of the model, in place, except the LM head, embeddings and routers."""
    reason = _native_why_not()
    kernel = native.NativeInt8 if reason is None else OneDnnInt8
    logger.info("8-bit products by %s", "the native kernel" if reason is None else f"oneDNN: {reason}")
    return quantised.prepare(model, lambda: Int8Matrix(kernel))


def _native_why_not() -> str | None:
    """Why the native kernel cannot or should not be used, or None."""
    if "amx_int8" in native.cpu_flags():
        return "this CPU has AMX, which oneDNN uses"
    return native.why_not()


def _onednn_why_not() -> str | None:
    """Why oneDNN's kernel cannot be used, or None."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this build of torch has no 8-bit linear layers"
    if not _adds_exactly():
        return "this CPU has no VNNI instructions, without which oneDNN's 8-bit sums overflow"
    return None


def _adds_exactly() -> bool:
    """Whether oneDNN's largest possible products add up; without VNNI they are clipped to 16 bits."""
    inputs = 64
    matrix = Int8Matrix(OneDnnInt8)
    ones = torch.ones(16, inputs, dtype=torch.float32, device="cpu")
    matrix.add(ones)
    found = matrix.product(ones[:2])
    return bool((found - inputs).abs().max() < 0.01 * inputs)
