"""What the engines with quantised weights share: one product for siblings, what keeps its precision, the way back.

Weights of one input lie in one matrix (`StackedMatrix`), whose product is shared among them. An engine says how a
weight is quantised and which kernel multiplies; here is which weights it gets, and how the originals come back. The LM
head, embeddings, routers of experts and adapters (PEFT's) keep their precision (`onednn`).
"""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from ..formats.files import read_tensors
from ..packed import Kernel
from . import onednn
from .native import NativeInt4, NativeInt8, Packed
from .swap import BASE_LAYER, DTYPES, LosslessKernel, Swap, adapter_paths, can_pack, packed_by

logger = logging.get_logger(__name__)

LEVELS = 127
"""Largest quantised magnitude of activations, and of 8-bit weights."""
WHY_NOT_STREAMED = "quantises activations too, which the accelerator's kernels do not compute alike"
"""Of these engines."""

_MOST_INPUTS = (2**31 - 1) // (255 * LEVELS)  # beyond it an int32 sum could overflow
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # modules of one parent with one input
_ROUTERS = ("gate", "router", "shared_expert_gate")  # tiny, and another choice of experts is no small error


class Layout(Protocol):
    """Packed weights (N, K) as one kernel reads them.

    Attributes:
        nbytes: with their scales.
    """

    nbytes: int

    def product(self, rows: Tensor) -> Tensor:
        """(R, K) bf16 or fp32 to (R, N), in the same precision. A row's result does not depend on the others."""


class StackedMatrix(ABC):
    """Quantised weights (n, K) of one input, stacked, which one product multiplies.

    A subclass says how a weight is quantised, how a kernel reads the stack, and what that computes with.

    Attributes:
        places: the rows of each in the stack.
    """

    def __init__(self) -> None:
        self.places: list[slice] = []
        self._added: list[tuple[Tensor, ...]] = []  # until they are packed
        self._packed: Layout | None = None

    @property
    def nbytes(self) -> int:
        """Of the packed weights with their scales."""
        return self.pack().nbytes

    def add(self, weight: Tensor) -> int:
        """Quantise a matrix (n, K) and stack it below the others; return its number."""
        self._added.append(self._quantised(weight))
        first = self.places[-1].stop if self.places else 0
        self.places.append(slice(first, first + len(weight)))
        return len(self.places) - 1

    def pack(self) -> Layout:
        """Bring the weights into the kernel's layout, once, and return them; nothing can be added afterwards."""
        if self._packed is None:
            self._packed = self._laid_out(*(torch.cat(parts) for parts in zip(*self._added, strict=True)))
            self._added.clear()
        return self._packed

    def product(self, rows: Tensor) -> Tensor:
        """(R, K) bf16 or fp32 to (R, N), in the same precision. A row's result does not depend on the others."""
        return self.pack().product(rows)

    def native(self) -> Packed | None:
        """The packed weights, if native kernels multiply."""
        packed = self.pack()
        return packed if isinstance(packed, NativeInt8 | NativeInt4) else None

    def dense(self, number: int) -> Tensor:
        """(n, K) float32: what the product computes with."""
        return self._dense(self.pack(), self.places[number])

    @abstractmethod
    def _quantised(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A matrix (n, K) in parts of n rows each, such as levels and scales."""

    @abstractmethod
    def _laid_out(self, *parts: Tensor) -> Layout:
        """The parts of all weights, one below the other, as the kernel reads them."""

    @abstractmethod
    def _dense(self, packed: Layout, place: slice) -> Tensor:
        """(n, K) float32: rows of the packed stack."""


class QuantisedKernel:
    """One of the weights of a `StackedMatrix`.

    Args:
        name: the parameter's.
        weight: (n, K) bf16 or fp32, finite.
        matrix: alone, or with the weights that read the same input.
    """

    lossless = False

    def __init__(self, name: str, weight: Tensor, matrix: StackedMatrix) -> None:
        self.name, self.shape, self.dtype = name, weight.shape, weight.dtype
        self.fingerprint = fingerprint(weight)
        self.matrix, self._number = matrix, matrix.add(weight)

    @property
    def stored_bytes(self) -> int:
        """This weight's share of the packed matrix."""
        return self.matrix.nbytes * self.shape[0] // self.matrix.places[-1].stop

    def native(self) -> Packed | None:
        """This weight as native kernels read it, if it is these that multiply, and it is alone in its matrix."""
        return self.matrix.native() if len(self.matrix.places) == 1 else None

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., n)."""
        if rows.dtype not in DTYPES or rows.numel() == 0:
            return F.linear(rows, self.dense().to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        if len(self.matrix.places) == 1:
            output = self.matrix.product(rows.reshape(-1, self.shape[1]))
        else:
            output = _shared_product(self.matrix, self._number, rows)
        output = output if bias is None else output.add_(bias)
        return output.view(*rows.shape[:-1], self.shape[0])

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., K): rows of the quantised matrix."""
        return self.dense()[ids]

    def dense(self) -> Tensor:
        """The matrix (n, K) as it was quantised."""
        return self.matrix.dense(self._number).to(self.dtype)


def stack_of(kernels: Sequence[Kernel]) -> StackedMatrix | None:
    """The matrix that consists of just these weights, in this order, if there is one."""
    if not all(isinstance(kernel, QuantisedKernel) for kernel in kernels):
        return None
    matrix = kernels[0].matrix
    found = [(kernel.matrix, kernel._number) for kernel in kernels]
    return matrix if found == [(matrix, number) for number in range(len(matrix.places))] else None


def parts_of_product(matrix: StackedMatrix, rows: Tensor, biases: Sequence[Tensor | None]) -> list[Tensor]:
    """One product with all stacked weights: rows (..., K) bf16 or fp32 to (R, n) for each weight, its bias added."""
    output = matrix.product(rows.reshape(-1, rows.shape[-1]))
    parts = [output[:, place] for place in matrix.places]
    return [part if bias is None else part.add_(bias) for part, bias in zip(parts, biases, strict=True)]


@dataclass
class _Pending:
    """The product of one input with a stacked matrix, of which some parts are yet to be asked for."""

    matrix: StackedMatrix
    rows: weakref.ref[Tensor]
    content: tuple[int, int] | Tensor
    output: Tensor
    left: set[int]  # numbers; each part is given away once, since the taker may write into it


_thread = threading.local()  # .pending: the last stacked product


def _shared_product(matrix: StackedMatrix, number: int, rows: Tensor) -> Tensor:
    """(R, n): one weight's part; the whole product is computed for the first, and kept for the others.

    It is kept until all parts are taken, the input is freed or another product follows, and only used for the very
    same input, unchanged.
    """
    pending = getattr(_thread, "pending", None)
    if pending is None or pending.matrix is not matrix or number not in pending.left or not _unchanged(pending, rows):
        _thread.pending = None
        output, left = matrix.product(rows.reshape(-1, rows.shape[-1])), set(range(len(matrix.places)))
        content = rows.clone() if rows.is_inference() else _version(rows)
        pending = _Pending(matrix, weakref.ref(rows, _forget), content, output, left)
    pending.left.remove(number)
    _thread.pending = pending if pending.left else None
    return pending.output[:, matrix.places[number]]


def _unchanged(pending: _Pending, rows: Tensor) -> bool:
    if pending.rows() is not rows:
        return False
    if isinstance(pending.content, Tensor):  # inference tensors do not count their changes
        return torch.equal(pending.content, rows)
    return pending.content == _version(rows)


def _version(rows: Tensor) -> tuple[int, int]:
    """Changes with the tensor's content."""
    return rows._version, rows.data_ptr()


def _forget(rows: weakref.ref) -> None:
    pending = getattr(_thread, "pending", None)
    if pending is not None and pending.rows is rows:
        _thread.pending = None


def why_not(model: PreTrainedModel) -> str | None:
    """Why no engine of this kind can take the model, or None."""
    reason = onednn.why_not(model)
    if reason is not None:
        return reason
    head = model.get_output_embeddings()
    if all(type(module) is not nn.Linear or module is head for module in model.modules()):
        return "it has no nn.Linear layers"
    return None


def prepare(model: PreTrainedModel, new_matrix: Callable[[], StackedMatrix]) -> Swap:
    """Quantise every linear weight of the model, in place, except the LM head, embeddings, routers and adapters."""
    head, adapters = model.get_output_embeddings(), adapter_paths(model)
    head = getattr(head, BASE_LAYER, head)
    kept = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if path in adapters or _keeps_precision(path.removesuffix(f".{BASE_LAYER}"), module, head)
    }
    swap, stacks = QuantisedSwap(model), _Stacks(new_matrix)
    swap.warn_if_lost(model, kept)

    def pack(name: str, weight: Tensor, is_embedding: bool) -> QuantisedKernel | LosslessKernel | None:
        if name in kept or is_embedding or not _can_quantise(weight):
            return packed_by(onednn.pack, weight, is_embedding)
        return QuantisedKernel(name, weight, stacks.of(name, weight))

    swap.pack(model, pack)
    stacks.finish()
    return swap


def _keeps_precision(path: str, module: nn.Module, head: nn.Module | None) -> bool:
    return module is head or path.rpartition(".")[2] in _ROUTERS


def _can_quantise(weight: Tensor) -> bool:
    return can_pack(weight) and weight.shape[1] <= _MOST_INPUTS and bool(weight.abs().amax().isfinite())


class _Stacks:
    """Finds the matrix in which a weight belongs, and packs each as soon as the next begins."""

    def __init__(self, new_matrix: Callable[[], StackedMatrix]) -> None:
        self._new_matrix = new_matrix
        self._key: tuple | None = None
        self._matrix: StackedMatrix | None = None

    def of(self, name: str, weight: Tensor) -> StackedMatrix:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        siblings = next((names for names in _SIBLINGS if leaf in names), leaf)
        key = parent, siblings, weight.shape[1], weight.dtype
        if key != self._key:
            self.finish()
            self._key, self._matrix = key, self._new_matrix()
        return self._matrix

    def finish(self) -> None:
        if self._matrix is not None:
            self._matrix.pack()
        self._key = self._matrix = None


class QuantisedSwap(Swap):
    """Quantised weights; `undo` reads the original ones from the model's own checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        source = model.name_or_path  # a program may change its working directory later
        self._source = os.path.abspath(source) if os.path.isdir(source) else source
        self._originals: dict[int, Tensor] = {}  # by their kernels' ids, on their way back

    def warn_if_lost(self, model: PreTrainedModel, kept: set[str]) -> None:
        """Say before anything is quantised that it could not be had back; of `kept` weights nothing is lost."""
        weights = {
            _own_name(f"{path}.weight"): module.weight.detach()
            for path, module in model.named_modules()
            if type(module) is nn.Linear and f"{path}.weight" not in kept and can_pack(module.weight)
        }
        reason = _why_lost(self._source, _options(model), weights)
        if reason is not None:
            logger.warning(
                "restore_target will not be able to give the original of the quantised weights back: %s; if they are "
                "needed again, save the model and load it from there before it is prepared",
                reason,
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo(self) -> None:
        """Give the modules their own parameters back, bit for bit.

        For a moment the whole checkpoint is in memory beside the quantised weights.

        Raises:
            RuntimeError: if the weights are not on disk, or not those that were quantised; nothing is changed then.
        """
        lost = [each.kernel for each in self._swapped if each.is_emptied and not each.kernel.lossless]
        self._originals = _reread(self._model(), self._source, lost) if lost else {}
        try:
            super().undo()
        finally:
            self._originals = {}

    def _original(self, kernel: Kernel) -> Tensor:
        return kernel.dense() if kernel.lossless else self._originals[id(kernel)]


def _options(model: PreTrainedModel) -> dict[str, Any]:
    """Where a checkpoint is looked for: among what is on this machine, in the revision that was loaded."""
    return {"local_files_only": True, "revision": getattr(model.config, "_commit_hash", None)}


def _why_lost(source: str, options: dict[str, Any], weights: dict[str, Tensor]) -> str | None:
    """Why weights could not be read again, as far as a look at a checkpoint tells, or None.

    Two rows of each weight are compared; `_reread` compares all of it.
    """
    if not source:
        return "the model was built in memory, not loaded from a checkpoint"
    look = partial(cached_file, source, _raise_exceptions_for_missing_entries=False, **options)
    try:
        lazy = look(SAFE_WEIGHTS_NAME) or look(SAFE_WEIGHTS_INDEX_NAME)
        stored = read_tensors(source, options, weights.__contains__) if lazy else {}  # others are read as a whole
        if not lazy and not look(WEIGHTS_NAME) and not look(WEIGHTS_INDEX_NAME):
            return f"its checkpoint {source!r} holds no weights"
    except (OSError, ValueError) as error:
        return f"its checkpoint {source!r} cannot be read ({error})"
    changed = next((name for name, weight in stored.items() if _differ(weight, weights[name])), None)
    return None if changed is None else f"{changed} is not the weight in its checkpoint {source!r}"


def _differ(stored: Tensor, weight: Tensor) -> bool:
    """Whether the first or the last row of a weight (N, K) is another one in its checkpoint."""
    ends = [0, -1]
    return stored.shape != weight.shape or fingerprint(stored[ends].to(weight.dtype)) != fingerprint(weight[ends])


def _reread(model: PreTrainedModel, source: str, kernels: list[QuantisedKernel]) -> dict[int, Tensor]:
    """The weights that were quantised, by their kernel's id, from the checkpoint that the model was loaded from."""
    impossible = "the original of the quantised weights cannot be given back: "
    if not source:
        raise RuntimeError(
            f"{impossible}the model was built in memory, not loaded from a checkpoint; build it again, or save it and "
            "load it before it is prepared"
        )
    try:
        loaded = type(model).from_pretrained(source, dtype=model.dtype, **_options(model))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{impossible}its checkpoint {source!r} can no longer be read ({error})") from error
    weights = {_own_name(name): weight for name, weight in loaded.named_parameters(remove_duplicate=False)}
    for kernel in kernels:
        weight = weights.get(_own_name(kernel.name))
        if weight is None or weight.dtype != kernel.dtype or fingerprint(weight.detach()) != kernel.fingerprint:
            raise RuntimeError(
                f"{impossible}{kernel.name} in its checkpoint {source!r} is not the weight that was quantised; "
                "load the model again"
            )
    return {id(kernel): weights[_own_name(kernel.name)].detach() for kernel in kernels}


def _own_name(name: str) -> str:
    """A parameter's name in its model without adapters."""
    return name.replace(f".{BASE_LAYER}.", ".")


def fingerprint(weight: Tensor) -> tuple[int, ...]:
    """Shape, sum of the bits, and the bits of 64 entries of a matrix (N, K): cheap, and sees any usual change."""
    bits = weight.contiguous().view(torch.int16).flatten()
    step, whole = max(1, len(bits) // 64), len(bits) // 4 * 4
    total = int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum())
    return (*weight.shape, total, *bits[::step][:64].tolist())
