"""Weights in 8 bits beside activations in their own precision, on any device.

A row of activations is split into two rows of 8 bits, the upper and the lower half of 16, so that a product runs on
a device's integer units (`torch._int_mm`) and no weight is ever unpacked; where a device has no such product, or a
wrong one, the weights are unpacked in parts. Knows matrices only: neither drafts nor targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

logger = logging.get_logger(__name__)

_LARGEST = 127
"""Largest magnitude of a weight."""
_LARGEST_ROW = 127 * 256
"""Largest magnitude of an activation in 16 bits, the upper half of which fits into 8."""
_ROWS = 32
"""`torch._int_mm` on CUDA wants more than 16 rows; its tiles have multiples of this."""
_ALIGNED = 16
"""Inputs and outputs of its fast kernels come in multiples of this; with others, some versions computed wrong sums."""
_PART = 4096
"""Rows of a matrix that are unpacked at a time."""
_SMALLEST = 1e-30
"""Stands in for the largest magnitude of a row of zeros."""


class EightBitMatrix(nn.Module):
    """A matrix (N, K) of 8-bit weights with one scale per row, in place of an `nn.Linear` or an `nn.Embedding`.

    Symmetric, rounded to nearest: `w = q * s`, `s = max |w| / 127` over the row. Neither trains nor saves.

    Args:
        weight: (N, K), finite; not kept.
        bias: (N,) of an `nn.Linear`; kept in its precision.

    Attributes:
        values: (N or a little more, K) int8; the rows beyond N are zero.
        scale_bits: (N or a little more,) int32, the bits of float32 scales: a change of precision leaves them as
            they are.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        padding = _padding(self.out_features)
        parts = [_quantised(part) for part in weight.detach().split(_PART)]
        values, scales = (torch.cat(each) for each in zip(*parts, strict=True))
        self.register_buffer("values", F.pad(values, (0, 0, 0, padding)))
        self.register_buffer("scale_bits", F.pad(scales, (0, padding)).view(torch.int32))
        self.bias = bias
        self._tried: torch.device | None = None  # where it is known whether integers are multiplied
        self._integers = False

    @staticmethod
    def nbytes(shape: torch.Size) -> int:
        """Bytes of a matrix of this shape, scales and padding included."""
        outputs, inputs = shape
        return (outputs + _padding(outputs)) * (inputs + torch.float32.itemsize)

    def forward(self, rows: Tensor) -> Tensor:
        """(..., K) -> (..., N) in the precision of `rows`. A row's result does not depend on the others."""
        flat = rows.reshape(-1, self.in_features)
        if self._integers and self._tried == self.values.device:
            product = self._multiplied(flat)
        else:
            product = torch.cat([F.linear(flat, part) for part in self._unpacked(rows.dtype)], dim=1)
        product = product[:, : self.out_features].view(*rows.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """(...) int64 -> (..., K): rows of the matrix."""
        places = ids.flatten()
        scales = self.scale_bits.index_select(0, places).view(torch.float32)
        rows = self.values.index_select(0, places).float() * scales[:, None]
        return rows.to(dtype).view(*ids.shape, self.in_features)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(N, K): the matrix that products and lookups stand for."""
        return torch.cat(list(self._unpacked(dtype)))[: self.out_features]

    def _unpacked(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """(4096 or fewer, K) parts, one at a time."""
        scales = self.scale_bits.view(torch.float32)[:, None].split(_PART)
        for values, scale in zip(self.values.split(_PART), scales, strict=True):
            yield (values.float() * scale).to(dtype)

    def _multiplied(self, rows: Tensor) -> Tensor:
        """The product of (R, K) rows on integer units, (R, N or more).

        Rows in 16 bits have errors of 1.5e-5 of their largest entry, far below those of bfloat16.
        """
        exact, count = rows.float(), len(rows)
        largest = exact.abs().amax(dim=1, keepdim=True).clamp_min(_SMALLEST)
        scaled = (exact * (_LARGEST_ROW / largest)).round_()
        upper = ((scaled + 128) / 256).floor_()
        halves = torch.cat((upper, scaled - 256 * upper)).to(torch.int8)
        sums = torch._int_mm(F.pad(halves, (0, 0, 0, -2 * count % _ROWS)), self.values.t())
        product = torch.add(sums[count : 2 * count].float(), sums[:count].float(), alpha=256)
        return (product * (largest / _LARGEST_ROW) * self.scale_bits.view(torch.float32)).to(rows.dtype)

    @torch.no_grad()
    def try_integers(self) -> None:
        """Find out whether the device multiplies integers rightly, by comparing with unpacked weights.

        Until then, and where it does not, products unpack the weights. The host waits; a second call does nothing.
        """
        device = self.values.device
        if device in (self._tried, torch.device("meta")):
            return
        self._tried, self._integers = device, False
        if self.in_features % _ALIGNED:
            return
        rows = torch.arange(2 * self.in_features, dtype=torch.float32, device=device).sin().view(2, -1)
        expected = torch.cat([F.linear(rows, part) for part in self._unpacked(rows.dtype)], dim=1).cpu()
        try:
            found = self._multiplied(rows).cpu()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # also NotImplementedError
            logger.info("8-bit weights are unpacked on %s, since torch._int_mm failed (%s)", device, error)
            return
        self._integers = bool(torch.allclose(found, expected, rtol=0, atol=1e-2 * float(expected.abs().max())))
        if not self._integers:
            logger.info("8-bit weights are unpacked on %s, since torch._int_mm computes wrong products there", device)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _padding(outputs: int) -> int:
    return -outputs % _ALIGNED


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) int8 and (n,) float32 scales of a part of a matrix."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1).clamp_min(_SMALLEST) / _LARGEST
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def multiply(rows: Tensor, matrix: Tensor | EightBitMatrix, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a matrix of either kind."""
    if isinstance(matrix, EightBitMatrix):
        product = matrix(rows)
        return product if bias is None else product + bias
    return F.linear(rows, matrix, bias)


def look_up(ids: Tensor, matrix: Tensor | EightBitMatrix, dtype: torch.dtype) -> Tensor:
    """`F.embedding` with a matrix of either kind; `dtype` is the network's, in which an ordinary matrix is."""
    return matrix.lookup(ids, dtype) if isinstance(matrix, EightBitMatrix) else F.embedding(ids, matrix)


def try_integers(modules: Iterable[nn.Module]) -> None:
    """`EightBitMatrix.try_integers` of all such matrices."""
    for module in modules:
        if isinstance(module, EightBitMatrix):
            module.try_integers()


def quantise(network: nn.Module, transposed: tuple[str, ...] = ()) -> None:
    """Replace the matrices of a network's linear layers and embeddings, in place, one at a time.

    Args:
        network: its `nn.Linear` and `nn.Embedding` modules become `EightBitMatrix` ones.
        transposed: names of bare parameters (K, N), used as `x @ W`, that become such modules too.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, EightBitMatrix(child.weight, child.bias))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, EightBitMatrix(child.weight))
        for name, weight in list(module.named_parameters(recurse=False)):
            if name in transposed:
                delattr(module, name)
                setattr(module, name, EightBitMatrix(weight.t()))
