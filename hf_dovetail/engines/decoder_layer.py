"""A decoder layer of Llama's kind out of kernels: in two native calls for a few rows (`fused`), else kernel by kernel.

Targets (`layers`) and drafts (`host`) compute their layers here. Knows weights and tensors; of modules, only what
transformers' attention interface asks of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..curves import MAX_ROWS
from ..packed import PackedWeight
from . import activations, norms, rotary
from .exact import exact_attention, takes
from .fused import FusedLayer, Geometry, Norm, Products
from .native import NativeBf16
from .quantised import parts_of_product, stack_of


class Cache(Protocol):
    """Where keys and values live: transformers' `Cache`, or the draft's rows."""

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, D) states of a layer; return all that its rows may look at, (B, H, S, D)."""


class Linears:
    """Linear layers with one input; those that lie in one matrix are computed as one product.

    Args:
        weights: (n, K) each, in one precision.
        biases: (n,) or None, of each.
        copies: whether weights that no engine has packed may be copied, to be packed side by side.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], copies: bool = False) -> None:
        self.dtype, self.biases = weights[0].dtype, tuple(biases)
        self._sizes = [len(weight) for weight in weights]
        packed = [isinstance(weight, PackedWeight) for weight in weights]
        self._kernels = [weight.kernel for weight in weights] if all(packed) else None
        self._stack = stack_of(self._kernels) if self._kernels and len(weights) > 1 else None
        self._products = [
            weight.kernel.linear if isinstance(weight, PackedWeight) else partial(F.linear, weight=weight)
            for weight in weights
        ]
        self._copy, self._copied_bias = None, None
        if copies and not any(packed):
            self._copy = NativeBf16.of(torch.cat([weight.detach() for weight in weights]))
            if self._copy is not None and any(bias is not None for bias in biases):
                whole = [
                    torch.zeros_like(weight[:, 0]) if bias is None else bias.detach()
                    for weight, bias in zip(weights, biases, strict=True)
                ]
                self._copied_bias = torch.cat(whole)

    @classmethod
    def of(cls, *modules: nn.Linear, copies: bool = False) -> Linears:
        """Those of modules."""
        return cls([module.weight for module in modules], [module.bias for module in modules], copies)

    def __call__(self, rows: Tensor) -> Sequence[Tensor]:
        """(..., K) to (..., n), or (R, n), for each."""
        if self._copy is not None:
            return self._copy.product(rows, self._copied_bias).split(self._sizes, dim=-1)
        if self._stack is not None:
            return parts_of_product(self._stack, rows, self.biases)
        return [product(rows, bias=bias) for product, bias in zip(self._products, self.biases, strict=True)]

    def native(self) -> Products | None:
        """The same for native kernels, if it is these that multiply."""
        if self._copy is not None:
            return Products([self._copy], [self._copied_bias, *[None] * (len(self._sizes) - 1)], self._sizes)
        return None if self._kernels is None else Products.of(self._kernels, self.biases)


class DecoderLayer:
    """What a layer is computed with; weights and biases are read where they lie, but for those that `Linears` copies.

    Args:
        qkv, out, gate_up, down: what makes queries, keys and values; back from attention; the gated MLP, and back.
        norms: of the layer's input, and of the MLP's.
        head_norms: of queries, and of keys.
        head_dim: of queries, keys and values.
        activation: the name of the gate's function, one that `activations` knows.
    """

    def __init__(
        self,
        qkv: Linears,
        out: Linears,
        gate_up: Linears,
        down: Linears,
        norms: tuple[Norm, Norm],
        head_norms: tuple[Norm, Norm],
        *,
        head_dim: int,
        activation: str,
    ) -> None:
        self._qkv, self._out, self._gate_up, self._down = qkv, out, gate_up, down
        self._norms, self._head_norms = norms, head_norms
        self._head_dim, self._activation = head_dim, activation
        products = [each.native() for each in (qkv, out, gate_up, down)]
        self._fused = None
        if all(each is not None for each in products):
            heads, kv_heads, _ = (size // head_dim for size in products[0].sizes)
            geometry = Geometry(products[1].sizes[0], heads, kv_heads, head_dim, qkv.dtype, activation)
            self._fused = FusedLayer(geometry, *products, norms, head_norms)

    @property
    def is_fused(self) -> bool:
        """Whether few rows are computed in two native calls."""
        return self._fused is not None

    def compute(
        self,
        attention: nn.Module,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        options: dict[str, Any],
    ) -> Tensor:
        """What comes out of the layer, in transformers' order.

        Args:
            attention: tells `layer_idx` and `scaling`; handed, with `options`, to `exact_attention`.
            hidden: (B, T, h). rotation: cosines and sines (1 or B, T, D) that `rotary.takes` takes.
            mask: (B, 1, T, S) or None.

        Returns:
            (B, T, h).
        """
        batch, rows, _ = hidden.shape
        fused = self._fused if batch * rows <= MAX_ROWS and hidden.is_contiguous() else None
        query, key, value = self._queries(hidden, rotation) if fused is None else fused.qkv(hidden, *rotation)
        if cache is not None:
            key, value = cache.update(key, value, attention.layer_idx)
        if fused is not None and takes(query, key, value, mask):
            return fused.finish(hidden, query, key, value, mask, attention.scaling)
        attended = exact_attention(attention, query, key, value, mask, 0.0, attention.scaling, **options)[0]
        hidden = hidden + self._out(attended.reshape(batch, rows, -1))[0].view(hidden.shape)
        gate, up = (each.view(batch * rows, -1) for each in self._gate_up(norms.normalised(hidden, *self._norms[1])))
        inner = activations.gated(self._activation, gate, up).view(batch, rows, -1)
        return hidden + self._down(inner)[0].view(hidden.shape)

    def _queries(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, G, T, D)."""
        batch, rows, _ = hidden.shape
        states = self._qkv(norms.normalised(hidden, *self._norms[0]))
        query, key, value = (each.view(batch, rows, -1, self._head_dim) for each in states)
        query, key = (norms.normalised(each, *norm) for each, norm in zip((query, key), self._head_norms, strict=True))
        return *rotary.rotate(query, key, *rotation), value.transpose(1, 2)
