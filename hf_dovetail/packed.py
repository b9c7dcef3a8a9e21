"""Weights in an engine's own layout that still look like ordinary parameters.

`PackedWeight` is a tensor without storage of its own: it has the weight's shape, precision and device, runs
`F.linear` and `F.embedding` on its kernel, and unpacks itself for anything else that reads it. So the modules,
names, hooks, parameter counts and ties of a model stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

_COPIES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Kernel(Protocol):
    """One weight matrix (N, K) in an engine's layout.

    Attributes:
        shape, dtype: the matrix's, as the model knows it.
        lossless: whether `dense` gives back the very weights that were packed.
    """

    shape: torch.Size
    dtype: torch.dtype
    lossless: bool

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N): `rows @ weight.T + bias`, in the precision of `rows`."""

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., K): rows of the matrix."""

    def dense(self) -> Tensor:
        """The matrix (N, K) as an ordinary tensor, made anew."""


class PackedWeight(Tensor):
    """A weight matrix held by a `Kernel`."""

    kernel: Kernel

    @staticmethod
    def __new__(cls, kernel: Kernel) -> PackedWeight:
        """A tensor of the kernel's shape and precision, without storage."""
        weight = Tensor._make_wrapper_subclass(cls, kernel.shape, dtype=kernel.dtype, device="cpu")
        weight.kernel = kernel
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.embedding and isinstance(args[1], cls):
            return args[1].kernel.lookup(args[0])
        if func == Tensor.data.__set__ and isinstance(args[0], cls) and getattr(args[1], "kernel", 0) != args[0].kernel:
            raise _would_change("another value")
        if func is Tensor.share_memory_:  # torch would look for the storage that a packed weight has not
            raise _would_change("sharing its memory with other processes")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func in _COPIES:
            return cls(args[0].kernel)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise _would_change(str(func))
        plain = _pytree.tree_map_only(cls, lambda weight: weight.kernel.dense(), (args, dict(kwargs or {})))
        return func(*plain[0], **plain[1])

    def original(self) -> Tensor:
        """The weight that was packed, as an ordinary tensor.

        Raises:
            RuntimeError: if the kernel has changed it, so that a copy of the model would be another model.
        """
        if not self.kernel.lossless:
            raise RuntimeError(
                "the weights of this model are quantised, and a saved or copied model would be another one; call "
                "hf_dovetail.restore_target(model) first"
            )
        return self.kernel.dense()

    def __deepcopy__(self, memo: dict) -> Tensor:
        """An ordinary parameter: a copied model is not a prepared one."""
        if id(self) not in memo:
            memo[id(self)] = torch.nn.Parameter(self.original(), requires_grad=False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary parameter, like a copy."""
        return torch.nn.Parameter(self.original(), requires_grad=False).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"PackedWeight({type(self.kernel).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _would_change(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what} would change a weight that is packed for a faster engine; call hf_dovetail.restore_target(model) first"
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedWeight):  # a packed matrix as the input of another layer
        return F.linear(input.kernel.dense(), weight, bias)
    if torch.is_autocast_enabled("cpu") and input.dtype == torch.float32:
        input = input.to(torch.get_autocast_dtype("cpu"))
    if torch.is_grad_enabled() and input.requires_grad:  # the kernels have no derivative
        return F.linear(input, weight.kernel.dense(), bias)
    return weight.kernel.linear(input, bias)
