"""Linear layers with weights prepacked for oneDNN, in bf16 and fp32: the same numbers, read at memory speed.

A row's result does not depend, bit for bit, on how many rows are computed with it, up to `MAX_ROWS`. In bf16 a native
kernel computes so few rows out of oneDNN's own memory, where it can be had (`native.NativeBf16`). Elsewhere oneDNN
does, and rows are padded to a number from which on its kernels agree on this machine, found by trying (`least_rows`).
On CPUs for which oneDNN has no bf16 the native kernel computes any number of rows, out of blocks like oneDNN's.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..curves import MAX_ROWS
from . import native, pages
from .native import NativeBf16
from .swap import DTYPES, Swap, swap_all

_BLOCKS = (64, 48, 32, 16, 8)  # output channels side by side in oneDNN's layouts
_GROUPS = (1, 2, 4)  # input channels side by side within


class _Blocks:
    """One weight matrix in blocks of output channels.

    Attributes:
        shape, dtype: (N, K), bf16 or fp32.
    """

    lossless = True
    shape: torch.Size
    dtype: torch.dtype
    _rows: Tensor | None  # (blocks, K / group, block, group)

    @property
    def has_rows(self) -> bool:
        """Whether single rows can be read (`lookup`)."""
        return self._rows is not None

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., K): rows of the matrix, read out of the blocks."""
        block = self._rows.shape[2]
        return self._rows[ids // block, :, ids % block, :].reshape(*ids.shape, self.shape[1])

    @property
    def stored(self) -> Tensor:
        """The matrix as it lies in memory, not copied; unpacked where its layout is unknown. `ordered` reads it."""
        return self._rows if self.has_rows else self.dense()

    def ordered(self, stored: Tensor) -> Tensor:
        """(N, K) out of a copy of `stored`, on the copy's device: there, the order costs next to nothing."""
        if not self.has_rows:
            return stored
        return stored.permute(0, 2, 1, 3).reshape(-1, self.shape[1])[: self.shape[0]]

    def dense(self) -> Tensor:
        """The matrix (N, K), bit for bit."""
        return self.ordered(self._rows)


class OneDnnKernel(_Blocks):
    """One weight matrix in oneDNN's blocked layout.

    Args:
        weight: (N, K) bf16 or fp32.
    """

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        pages.enlarge(torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed))
        self._rows = _row_view(self._packed, weight)
        self._native, self._least = None, 0
        if NativeBf16.takes(self._rows):
            self._native = NativeBf16(self._rows, self.shape[0])
        else:
            self._least = least_rows(self._packed, weight.shape, weight.dtype)

    def native(self) -> NativeBf16 | None:
        """The weights as the native kernel reads them, if it is this that multiplies up to `MAX_ROWS` rows."""
        return self._native

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N)."""
        if rows.dtype != self.dtype:  # by autocast
            return F.linear(rows, self.dense().to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        count = rows.numel() // self.shape[1]
        if self._native is not None and 0 < count <= MAX_ROWS and (bias is None or bias.dtype == self.dtype):
            return self._native.product(rows, bias)
        if count >= self._least or count == 0:
            return _product(rows, self._packed, bias)
        if count == 1 and self._least == 2 and rows.ndim > 1:
            return _product(torch.cat((rows, rows), dim=-2), self._packed, bias)[..., :1, :]
        padded = rows.new_zeros(self._least, self.shape[1])
        padded[:count] = rows.reshape(count, -1)
        return _product(padded, self._packed, bias)[:count].view(*rows.shape[:-1], self.shape[0])

    def dense(self) -> Tensor:
        """The matrix (N, K), bit for bit."""
        return self._packed.to_dense()


class NativeKernel(_Blocks):
    """One weight matrix in blocks that the native kernel multiplies, whatever the number of rows.

    Args:
        weight: (N, K) bf16.
        blocks: of the weight.
    """

    def __init__(self, weight: Tensor, blocks: NativeBf16) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype
        self._native, self._rows = blocks, blocks.blocks

    def native(self) -> NativeBf16:
        """The weights as the native kernel reads them."""
        return self._native

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N)."""
        if rows.dtype != self.dtype:  # by autocast
            return F.linear(rows, self.dense().to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        if bias is None or bias.dtype == self.dtype:
            return self._native.product(rows, bias)
        return self._native.product(rows, None) + bias


def pack(weight: Tensor) -> OneDnnKernel | NativeKernel | None:
    """The kernel of a weight (N, K) bf16 or fp32, or None if there is none here."""
    if weight.dtype == torch.float32 or has_bf16():
        return OneDnnKernel(weight)
    native_copy = NativeBf16.of(weight)
    return None if native_copy is None else NativeKernel(weight, native_copy)


def has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 numbers on this CPU."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def why_not(model: PreTrainedModel) -> str | None:
    """Why this engine cannot take the model, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if model.dtype not in DTYPES:
        return f"its weights are {model.dtype}, not bfloat16 or float32"
    if model.dtype == torch.bfloat16 and not has_bf16() and not native.multiplies_bf16():
        return f"oneDNN has no bfloat16 for this CPU, and {native.why_not() or 'no native products could be compiled'}"
    return None


def prepare(model: PreTrainedModel) -> Swap:
    """Pack every linear weight of the model, in place; the LM head that is the embedding too stays one matrix."""
    return swap_all(model, pack)


def _product(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(rows, packed, bias, "none", [], "")


_TRIED_VALUES = 1 << 15
_LEAST_ROWS: dict[tuple[torch.Size, torch.dtype], int] = {}


def least_rows(packed: Tensor, shape: torch.Size, dtype: torch.dtype) -> int:
    """The number of rows from which on a row's result is the same, up to `MAX_ROWS`; never 1.

    Found by trying on random rows: 2 where only the one-row kernel differs, `MAX_ROWS` on CPUs whose kernel
    changes on the way (AMX). The order of the sums depends on the sizes, not on the data; rounding to bf16 hides
    most differences, so narrow matrices are tried several times.
    """
    if (shape, dtype) not in _LEAST_ROWS:
        generator = torch.Generator(device="cpu").manual_seed(0)
        tries = min(max(_TRIED_VALUES // shape[0], 1), 16)
        rows = torch.randn(tries, MAX_ROWS, shape[1], generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        results, least = [_product(batch, packed, None) for batch in rows], MAX_ROWS
        while least > 2 and all(
            torch.equal(_product(batch[: least - 1], packed, None), result[: least - 1])
            for batch, result in zip(rows, results, strict=True)
        ):
            least -= 1
        _LEAST_ROWS[shape, dtype] = least
    return _LEAST_ROWS[shape, dtype]


def _row_view(packed: Tensor, weight: Tensor) -> Tensor | None:
    """(blocks, K / group, block, group) view of the packed memory, or None if it has another layout.

    oneDNN does not promise a layout, so the view is compared with rows of the matrix itself.
    """
    outputs, inputs = weight.shape
    size = torch.ops.mkldnn._nbytes(packed) // weight.itemsize
    memory = (ctypes.c_char * (size * weight.itemsize)).from_address(torch.ops.mkldnn.data_ptr(packed))
    flat = torch.frombuffer(memory, dtype=weight.dtype)
    sample = torch.arange(0, outputs, max(outputs // 67, 1), device=weight.device)
    for block in _BLOCKS:
        blocks = math.ceil(outputs / block)
        for group in _GROUPS:
            if size != blocks * block * inputs or inputs % group:
                continue
            view = flat.view(blocks, inputs // group, block, group)
            rows = view[sample // block, :, sample % block, :].reshape(len(sample), inputs)
            if torch.equal(rows, weight[sample]):
                return view
    return None
