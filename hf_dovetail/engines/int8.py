"""Linear layers in 8 bits: weights int8 per output channel, activations uint8 per row, sums in integers.

A row's result does not depend, bit for bit, on the rows computed with it: it has a scale of its own, integer sums
are exact in any order, and what follows them is elementwise. The LM head, embeddings and routers of experts keep
their precision (`onednn`). What was measured on the way: docs/quantisation.md.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from . import onednn
from .swap import Swap

_LEVELS = 127  # largest quantised magnitude, of weights and of activations
_ZERO_POINT = 128  # of the activations; oneDNN's kernels for signed ones are many times slower
_MOST_INPUTS = (2**31 - 1) // (255 * _LEVELS)  # beyond it an int32 sum could overflow
_SMALLEST = torch.tensor(1e-30)  # magnitude of an all-zero row
_TOP = torch.tensor(float(_LEVELS))
_ROUND = torch.tensor(1.5 * 2**23 + _ZERO_POINT)  # float32 + this: the rounded integer stands in the lowest byte
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # modules of one parent with one input
_ROUTERS = ("gate", "router", "shared_expert_gate")  # tiny, and another choice of experts is no small error
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


class Int8Matrix:
    """One matrix (N, K), or several with one input stacked, in 8 bits."""

    def __init__(self) -> None:
        self.places: list[slice] = []
        self._levels: list[Tensor] = []  # of the matrices added so far, until they are packed
        self._scales: list[Tensor] = []
        self._packed: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, weight: Tensor) -> int:
        """Quantise a matrix (n, K) and stack it below the others; return its number."""
        scales = weight.abs().amax(1).float().div_(_LEVELS)
        scales.masked_fill_(scales == 0, 1.0)
        levels = torch.empty(weight.shape, dtype=torch.int8)
        step = max(1, _CHUNK // weight.shape[1])
        for begin in range(0, len(weight), step):
            rows = slice(begin, begin + step)
            levels[rows] = (weight[rows].float() / scales[rows, None]).round_()
        first = self.places[-1].stop if self.places else 0
        self.places.append(slice(first, first + len(weight)))
        self._levels.append(levels)
        self._scales.append(scales)
        return len(self.places) - 1

    def pack(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights in oneDNN's layout, their scales and zero points; nothing can be added afterwards."""
        if self._packed is None:
            levels = self._levels[0] if len(self._levels) == 1 else torch.cat(self._levels)
            self._levels.clear()
            scales = torch.cat(self._scales) / _LEVELS  # the rows' levels, too, are 127 times too large
            packed = torch.ops.onednn.qlinear_prepack(levels, None)
            self._packed = packed, scales, torch.zeros(len(scales), dtype=torch.int64)
        return self._packed

    def product(self, levels: Tensor, magnitudes: Tensor) -> Tensor:
        """(R, K) quantised rows to (R, N), in the precision of `magnitudes`."""
        packed, scales, zeros = self._packed or self.pack()
        sums = torch.ops.onednn.qlinear_pointwise.default(
            levels, 1.0, _ZERO_POINT, packed, scales, zeros, None, 1.0, 0, magnitudes.dtype, "none", [], ""
        )
        return sums.mul_(magnitudes)

    def dense(self, number: int) -> Tensor:
        """(n, K) float32: what the product computes with."""
        packed, scales, _ = self.pack()
        place = self.places[number]
        return packed.to_dense().t()[place].float() * (scales[place] * _LEVELS)[:, None]


class Int8Kernel:
    """One of the weights of an `Int8Matrix`.

    Args:
        name: the parameter's.
        weight: (n, K) bf16 or fp32, finite.
        matrix: alone, or with the weights that read the same input.
    """

    lossless = False

    def __init__(self, name: str, weight: Tensor, matrix: Int8Matrix) -> None:
        self.name, self.shape, self.dtype = name, weight.shape, weight.dtype
        self.fingerprint = fingerprint(weight)
        self.matrix, self._number = matrix, matrix.add(weight)

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., n)."""
        if rows.dtype not in (torch.bfloat16, torch.float32) or rows.numel() == 0:
            return F.linear(rows, self.dense(), bias)
        if len(self.matrix.places) == 1:
            output = self.matrix.product(*quantise(rows.reshape(-1, self.shape[1])))
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


@dataclass
class _Pending:
    """The product of one input with a stacked matrix, of which some parts are yet to be asked for."""

    matrix: Int8Matrix
    rows: weakref.ref[Tensor]
    version: tuple[int, int] | None
    quantised: tuple[Tensor, Tensor]
    output: Tensor
    left: set[int]  # numbers; each part is given away once, since the taker may write into it


_thread = threading.local()  # .pending: the last stacked product


def _shared_product(matrix: Int8Matrix, number: int, rows: Tensor) -> Tensor:
    """(R, n): one weight's part; the whole product is computed for the first, and kept for the others.

    It is kept until all parts are taken, the input is freed or another product follows, and only used for the very
    same input, unchanged.
    """
    pending = getattr(_thread, "pending", None)
    if pending is None or pending.matrix is not matrix or number not in pending.left or not _unchanged(pending, rows):
        _thread.pending = None
        quantised = quantise(rows.reshape(-1, rows.shape[-1]))
        output, left = matrix.product(*quantised), set(range(len(matrix.places)))
        pending = _Pending(matrix, weakref.ref(rows, _forget), _version(rows), quantised, output, left)
    pending.left.remove(number)
    _thread.pending = pending if pending.left else None
    return pending.output[:, matrix.places[number]]


def _unchanged(pending: _Pending, rows: Tensor) -> bool:
    if pending.rows() is not rows or pending.version != _version(rows):
        return False
    if pending.version is not None:
        return True
    levels, magnitudes = quantise(rows.reshape(-1, rows.shape[-1]))
    return torch.equal(levels, pending.quantised[0]) and torch.equal(magnitudes, pending.quantised[1])


def _version(rows: Tensor) -> tuple[int, int] | None:
    """Changes with the tensor's content; None for inference tensors, which do not count their changes."""
    return None if rows.is_inference() else (rows._version, rows.data_ptr())


def _forget(rows: weakref.ref) -> None:
    pending = getattr(_thread, "pending", None)
    if pending is not None and pending.rows is rows:
        _thread.pending = None


def why_not(model: PreTrainedModel) -> str | None:
    """Why this engine cannot take the model, or None."""
    reason = onednn.why_not(model)
    if reason is not None:
        return reason
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this build of torch has no 8-bit linear layers"
    if not _adds_exactly():
        return "this CPU has no VNNI instructions, without which 8-bit sums overflow"
    head = model.get_output_embeddings()
    if all(type(module) is not nn.Linear or module is head for module in model.modules()):
        return "it has no nn.Linear layers"
    return None


def _adds_exactly() -> bool:
    """Whether the largest possible products add up; without VNNI they are clipped to 16 bits."""
    inputs = 64
    matrix = Int8Matrix()
    matrix.add(torch.ones(16, inputs))
    levels = torch.full((2, inputs), 255, dtype=torch.uint8)
    found = matrix.product(levels, torch.ones(2, 1))
    return bool((found - inputs).abs().max() < 0.01 * inputs)


def prepare(model: PreTrainedModel) -> Swap:
    """Quantise every linear weight of the model, in place, except the LM head, embeddings and routers."""
    head = model.get_output_embeddings()
    kept = {f"{path}.weight" for path, module in model.named_modules() if _keeps_precision(path, module, head)}
    swap, stacks = Int8Swap(model), _Stacks()

    def pack(name: str, weight: Tensor, is_embedding: bool) -> Int8Kernel | onednn.OneDnnKernel | None:
        if name in kept or is_embedding or not _can_quantise(weight):
            return onednn.pack(name, weight, is_embedding)
        return Int8Kernel(name, weight, stacks.of(name, weight))

    swap.pack(model, pack)
    stacks.finish()
    return swap


def _keeps_precision(path: str, module: nn.Module, head: nn.Module | None) -> bool:
    return module is head or path.rpartition(".")[2] in _ROUTERS


def _can_quantise(weight: Tensor) -> bool:
    supported = weight.dtype in (torch.bfloat16, torch.float32) and weight.device.type == "cpu" and weight.numel() > 0
    return supported and weight.shape[1] <= _MOST_INPUTS and bool(weight.abs().amax().isfinite())


class _Stacks:
    """Finds the matrix in which a weight belongs, and packs each as soon as the next begins."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._matrix: Int8Matrix | None = None

    def of(self, name: str, weight: Tensor) -> Int8Matrix:
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        siblings = next((names for names in _SIBLINGS if leaf in names), leaf)
        key = parent, siblings, weight.shape[1], weight.dtype
        if key != self._key:
            self.finish()
            self._key, self._matrix = key, Int8Matrix()
        return self._matrix

    def finish(self) -> None:
        if self._matrix is not None:
            self._matrix.pack()
        self._key = self._matrix = None


class Int8Swap(Swap):
    """Quantised weights; `undo` reads the original ones from the model's own checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = weakref.ref(model)  # the model's entry among the prepared ones must not keep it alive

    @torch.no_grad()
    def undo(self) -> None:
        """Give the modules their own parameters back, bit for bit.

        For a moment the whole checkpoint is in memory beside the quantised weights.

        Raises:
            RuntimeError: if the weights are not on disk, or not those that were quantised; nothing is changed then.
        """
        if not self.lossless:
            quantised = [swapped.kernel for swapped in self._swapped if not swapped.kernel.lossless]
            originals = _reread(self._model(), quantised)
            self._swapped = [
                replace(swapped, kernel=originals.get(id(swapped.kernel), swapped.kernel)) for swapped in self._swapped
            ]
        super().undo()


@dataclass(frozen=True)
class _Original:
    """An original weight in the place of its kernel, on its way back."""

    weight: Tensor

    def dense(self) -> Tensor:
        return self.weight


def _reread(model: PreTrainedModel, kernels: list[Int8Kernel]) -> dict[int, _Original]:
    """The weights that were quantised, by their kernel's id, from the checkpoint that the model was loaded from."""
    source = model.name_or_path
    impossible = "the 8-bit engine cannot give the original weights back: "
    if not source:
        raise RuntimeError(f"{impossible}the model was built in memory, not loaded from a checkpoint")
    revision = getattr(model.config, "_commit_hash", None)
    try:
        loaded = type(model).from_pretrained(source, dtype=model.dtype, local_files_only=True, revision=revision)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{impossible}its checkpoint {source!r} can no longer be read ({error})") from error
    weights = dict(loaded.named_parameters(remove_duplicate=False))
    for kernel in kernels:
        weight = weights.get(kernel.name)
        if weight is None or weight.dtype != kernel.dtype or fingerprint(weight.detach()) != kernel.fingerprint:
            raise RuntimeError(
                f"{impossible}{kernel.name} in its checkpoint {source!r} is not the weight that was quantised; "
                "load the model again"
            )
    return {id(kernel): _Original(weights[kernel.name].detach()) for kernel in kernels}


def fingerprint(weight: Tensor) -> tuple[int, ...]:
    """Shape, sum of the bits, and the bits of 64 entries of a matrix (N, K): cheap, and sees any usual change."""
    bits = weight.contiguous().view(torch.int16).flatten()
    step, whole = max(1, len(bits) // 64), len(bits) // 4 * 4
    total = int(bits[:whole].view(torch.int64).sum()) + int(bits[whole:].sum())
    return (*weight.shape, total, *bits[::step][:64].tolist())
