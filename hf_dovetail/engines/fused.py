"""A decoder layer of Llama's kind in two native calls (`layer.c`), with the cache of keys and values between them.

The same kernels in the same order as one by one, so the same bits; but for a few rows, Python around each kernel costs
more than many of them. Knows weights and tensors; knows nothing of modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packed import Kernel
from . import native
from .activations import coefficients_of
from .exact import mask_arguments
from .quantised import stack_of

_PARTS = 3


@dataclass(frozen=True)
class Products:
    """Products of one input.

    Args:
        matrices: of one weight each, or one of all weights, one below the other.
        biases: of each, or None; of one matrix in bf16, one bias of all weights, or None.
        sizes: outputs of each weight.
    """

    matrices: Sequence[native.Packed]
    biases: Sequence[Tensor | None]
    sizes: Sequence[int]

    @classmethod
    def of(cls, kernels: Sequence[Kernel], biases: Sequence[Tensor | None]) -> Products | None:
        """Those of an engine's weights; None if it is not native kernels that multiply, or cannot read the biases."""
        pairs = zip(kernels, biases, strict=True)
        if not all(b is None or (b.dtype == kernel.dtype and b.is_cpu and b.is_contiguous()) for kernel, b in pairs):
            return None
        stack = stack_of(kernels) if len(kernels) > 1 else None
        found = [kernel.native() for kernel in kernels] if stack is None else [stack.native()]
        if any(each is None for each in found):
            return None
        return cls(found, biases, [kernel.shape[0] for kernel in kernels])


@dataclass(frozen=True)
class Geometry:
    """Sizes of a layer.

    Args:
        hidden: width of its input. heads, kv_heads: of queries, and of keys and values. head_dim: width of a head.
        dtype: bf16 or fp32.
        activation: name of the gate's function.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    activation: str


Norm = tuple[Tensor | None, float]
"""A root-mean-square norm's weight, and its epsilon; None: no norm."""
NO_NORM: Norm = (None, 0.0)


class FusedLayer:
    """A layer's weights as `layer.c` reads them; biases and norms' weights are read where they lie.

    Args:
        geometry: its sizes.
        qkv, out, gate_up, down: queries, keys and values; back from attention; gate and up; back from the MLP.
        norms: of the layer's input, and of the MLP's.
        head_norms: of queries, and of keys.
    """

    def __init__(
        self,
        geometry: Geometry,
        qkv: Products,
        out: Products,
        gate_up: Products,
        down: Products,
        norms: tuple[Norm, Norm],
        head_norms: tuple[Norm, Norm],
    ) -> None:
        self._kernels, self._geometry = native.loaded()[0], geometry
        self._held = qkv, out, gate_up, down, norms, head_norms
        self._layer = _CLayer(
            *(_linears(products) for products in (qkv, out, gate_up, down)),
            (_CNorm * 2)(*(_CNorm(_address(weight), epsilon) for weight, epsilon in norms)),
            (_CNorm * 2)(*(_CNorm(_address(weight), epsilon) for weight, epsilon in head_norms)),
            *(geometry.hidden, geometry.heads, geometry.kv_heads, geometry.head_dim),
            geometry.dtype == torch.bfloat16,
            *coefficients_of(geometry.activation),
        )
        self._address = ctypes.addressof(self._layer)

    def qkv(self, hidden: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values.

        Args:
            hidden: (B, T, h), contiguous. cosines, sines: (1 or B, T, D), contiguous, as transformers makes them.

        Returns:
            (B, H, T, D), (B, G, T, D), (B, G, T, D), laid out row by row.
        """
        sizes, (batch, rows, _) = self._geometry, hidden.shape
        query = hidden.new_empty(batch, rows, sizes.heads, sizes.head_dim)
        key, value = (hidden.new_empty(batch, rows, sizes.kv_heads, sizes.head_dim) for _ in range(2))
        threads, count = torch.get_num_threads(), batch * rows
        self._kernels.dovetail_layer_qkv(
            self._address,
            hidden.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            count,
            cosines.shape[0] * rows,
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            native.scratch(self._kernels.dovetail_layer_room(self._address, count, 0, threads)),
            threads,
        )
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(
        self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """What comes out of the layer.

        Args:
            hidden: what went in. query: of `qkv`.
            keys, values: (B, G, S, D) that the cache shows. mask: (B, 1, T, S) or None, that `exact.takes` takes.
            scale: of the scores.

        Returns:
            (B, T, h).
        """
        output, (batch, rows, _), count = torch.empty_like(hidden), hidden.shape, keys.shape[2]
        threads = torch.get_num_threads()
        room = self._kernels.dovetail_layer_room(self._address, batch * rows, count, threads)
        kind, mask_address, mask_strides = mask_arguments(mask)
        self._kernels.dovetail_layer_finish(
            self._address,
            hidden.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            mask_address,
            output.data_ptr(),
            batch,
            rows,
            count,
            _Strides(*keys.stride()[:3], *values.stride()[:3], *mask_strides),
            scale,
            kind,
            native.scratch(room),
            threads,
        )
        return output


class _CLinears(ctypes.Structure):
    _fields_ = (
        ("matrices", native.Matrix * _PARTS),
        ("biases", ctypes.c_void_p * _PARTS),
        ("sizes", ctypes.c_long * _PARTS),
        ("parts", ctypes.c_long),
        ("stacked", ctypes.c_long),
    )


class _CNorm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("epsilon", ctypes.c_float))


class _CLayer(ctypes.Structure):
    _fields_ = (
        *((name, _CLinears) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _CNorm * 2) for name in ("norms", "head_norms")),
        *((name, ctypes.c_long) for name in ("hidden", "heads", "kv_heads", "head_dim", "bf16")),
        *((name, ctypes.c_float) for name in ("linear", "cubic")),
    )


_Strides = ctypes.c_long * 8


def _linears(products: Products) -> _CLinears:
    matrices, parts = products.matrices, len(products.sizes)
    return _CLinears(
        (native.Matrix * _PARTS)(*(packed.matrix for packed in matrices)),
        (ctypes.c_void_p * _PARTS)(*map(_address, products.biases)),
        (ctypes.c_long * _PARTS)(*products.sizes),
        parts,
        len(matrices) < parts,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
