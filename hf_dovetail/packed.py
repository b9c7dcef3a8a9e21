"""Weights in an engine's own layout that still look like ordinary parameters.

`PackedWeight` is a tensor without storage of its own: it has the weight's shape, precision and device, runs
`F.linear` and `F.embedding` on its kernel, and unpacks itself for anything else that reads it. So the modules,
names, hooks, parameter counts and ties of a model stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import forward_ad
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

    def native(self) -> Any | None:
        """The matrix as the kernels in C read it (`engines.native.Packed`), if it is these that multiply few rows."""


class PackedWeight(Tensor):
    """A weight matrix held by a `Kernel`.

    Attributes:
        ticket: (1,) int64, by which the operations of a compiled graph find the kernel (`TracedKernel`).
        trainable: whether the weight that was packed required gradients, as its copies do again.
    """

    kernel: Kernel
    ticket: Tensor
    trainable: bool = True

    @staticmethod
    def __new__(cls, kernel: Kernel, **options: Any) -> PackedWeight:
        """A tensor of the kernel's shape and precision, without storage.

        Raises:
            RuntimeError: if it is asked for around other values, as accelerate does when it moves a parameter.
        """
        if isinstance(kernel, Tensor):
            raise would_change("moving it, or giving it other values,")
        weight = Tensor._make_wrapper_subclass(cls, kernel.shape, dtype=kernel.dtype, device="cpu")
        weight.kernel, weight.ticket = kernel, _ticket_of(kernel)
        return weight

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        """What torch.compile traces this tensor by."""
        return ["ticket"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Mapping[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Tensor:
        """The tensor while it is traced."""
        return cls(TracedKernel(inner["ticket"], torch.Size(size), dtype))

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph that is kept between processes depends on."""
        return f"{type(self).__qualname__}{tuple(self.shape)}{self.dtype}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is F.embedding and isinstance(args[1], cls):
            return args[1].kernel.lookup(args[0])
        if func == Tensor.data.__set__ and isinstance(args[0], cls) and getattr(args[1], "kernel", 0) != args[0].kernel:
            raise would_change("another value")
        if func is Tensor.__setitem__ and isinstance(args[0], cls):  # it would write into an unpacked copy
            raise would_change("another value for some of its entries")
        if func is Tensor.share_memory_:  # torch would look for the storage that a packed weight has not
            raise would_change("sharing its memory with other processes")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        if func in _COPIES:
            return cls(args[0].kernel)
        if func._schema.is_mutable and any(isinstance(each, cls) for each in _written(func, args, kwargs or {})):
            raise would_change(str(func))
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
            memo[id(self)] = torch.nn.Parameter(self.original(), requires_grad=self.trainable)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled as an ordinary parameter, like a copy."""
        return torch.nn.Parameter(self.original(), requires_grad=self.trainable).__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"PackedWeight({type(self.kernel).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"


def _written(func: Any, args: tuple, kwargs: Mapping) -> Iterator[Any]:
    """What an operation writes into, by its schema: first arguments, `out=`, and what is in lists."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, list | tuple) else (value,)


def would_change(what: str) -> RuntimeError:
    """The error about something that a packed weight cannot take."""
    return RuntimeError(
        f"{what} would change a weight that is packed for a faster engine; call hf_dovetail.restore_target(model) first"
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, PackedWeight):  # a packed matrix as the input of another layer
        return F.linear(input.kernel.dense(), weight, bias)
    if torch.is_autocast_enabled("cpu") and input.dtype == torch.float32:
        input = input.to(torch.get_autocast_dtype("cpu"))
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace cannot follow the kernels of a prepared model; call restore_target(model) and trace it "
            "then, or use torch.compile"
        )
    derives = (torch.is_grad_enabled() and input.requires_grad) or forward_ad._current_level >= 0
    fits = input.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    if derives or not fits:  # the kernels have no derivative, and only torch knows what fits otherwise
        return F.linear(input, weight.kernel.dense(), bias)
    return weight.kernel.linear(input, bias)


class TracedKernel:
    """Stands in for a kernel while torch.compile traces a model: each product becomes one operation of the graph.

    The graph gets the ticket as an input, so that layers with weights of one shape can share it.

    Args:
        ticket: (1,) int64, perhaps a fake tensor.
        shape, dtype: the matrix's.
    """

    lossless = False

    def __init__(self, ticket: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        self.ticket, self.shape, self.dtype = ticket, shape, dtype

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N)."""
        return _packed_linear(rows, self.ticket, bias, self.shape[0])

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., K)."""
        return _packed_lookup(ids, self.ticket, self.shape[1], self.dtype)

    def dense(self) -> Tensor:
        """(N, K)."""
        return _packed_dense(self.ticket, *self.shape, self.dtype)

    def native(self) -> None:
        """Nothing: a graph has operations only."""


_kernels: WeakValueDictionary[int, Kernel] = WeakValueDictionary()  # by their tickets


def _ticket_of(kernel: Kernel) -> Tensor:
    if isinstance(kernel, TracedKernel):
        return kernel.ticket
    _kernels[id(kernel)] = kernel
    return torch.tensor([id(kernel)], dtype=torch.int64, device="cpu")


def _operation(name: str, schema: str) -> Any:
    return torch.library.custom_op(f"hf_dovetail::{name}", mutates_args=(), device_types="cpu", schema=schema)


@_operation("packed_linear", "(Tensor rows, Tensor ticket, Tensor? bias, int outputs) -> Tensor")
def _packed_linear(rows: Tensor, ticket: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return _own(_kernels[int(ticket)].linear(rows, bias))


@_operation("packed_lookup", "(Tensor ids, Tensor ticket, int inputs, ScalarType dtype) -> Tensor")
def _packed_lookup(ids: Tensor, ticket: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    return _own(_kernels[int(ticket)].lookup(ids))


@_operation("packed_dense", "(Tensor ticket, int outputs, int inputs, ScalarType dtype) -> Tensor")
def _packed_dense(ticket: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return _own(_kernels[int(ticket)].dense())


def _own(result: Tensor) -> Tensor:
    """A result as graphs expect it: contiguous, in memory of its own."""
    return result.clone(memory_format=torch.contiguous_format)


@_packed_linear.register_fake
def _(rows: Tensor, ticket: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], outputs)


@_packed_lookup.register_fake
def _(ids: Tensor, ticket: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, inputs, dtype=dtype)


@_packed_dense.register_fake
def _(ticket: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return ticket.new_empty(outputs, inputs, dtype=dtype)
