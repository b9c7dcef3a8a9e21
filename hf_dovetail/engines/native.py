"""The native kernels, compiled at first use, and products of rows with bf16 (`bf16.c`), 8-bit and 4-bit weights.

They run on torch's own OpenMP threads. One quantised product (`native.c`) quantises the rows, multiplies and rescales;
the 8-bit result has the bits of `int8.OneDnnInt8`. The other kernels are called by `exact`, `activations`, `norms`,
`rotary`, `best` and, in the order of a whole layer, by `fused`.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.utils import logging

from . import pages
from .compiler import CompileError, library
from .instructions import INSTRUCTION_SETS, InstructionSet, cpu_flags, sets_of

logger = logging.get_logger(__name__)

GROUP = 32
"""Input channels of 4-bit weights that share a step and a lowest weight."""

_HEADERS = ("native.h", "avx512.h", "avx2.h")
_NAMES = (*_HEADERS, "native.c", "attention.c", "activation.c", "norm.c", "rotary.c", "layer.c", "best.c")
_SOURCES = tuple(Path(__file__).with_name(name) for name in _NAMES)
_BF16_SOURCE = Path(__file__).with_name("bf16.c")  # which may need a newer compiler
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-ffp-contract=off", f"-DGROUP={GROUP}")
_COLUMNS = 32  # output channels of a block; COLUMNS in the source
_INPUTS = 16  # 8-bit rows are padded to a multiple
_THREADING = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier")
_BF16_BLOCK = (64, 2)  # output channels of a block, and input channels side by side; COLUMNS in the source
_ALONE = 1 << 18  # weights below which waking other threads costs more than they save

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_STATES = (_POINTER, _POINTER, _LONG, _LONG)  # from, to, heads, step
_SIGNATURES = {  # what a function of the sources returns, and its arguments
    "dovetail_use_threads": (None, *[_POINTER] * len(_THREADING)),
    "dovetail_scratch": (_LONG, _LONG, _INT),
    "dovetail_product": (None, *[_POINTER] * 5, *[_LONG] * 4, *[_INT] * 3),
    "dovetail_bf16_product": (None, *[_POINTER] * 4, *[_LONG] * 3, _INT),
    "dovetail_attention_scratch": (_LONG, _LONG, _LONG),
    "dovetail_attention": (None, *[_POINTER] * 8, _FLOAT, *[_INT] * 3),
    "dovetail_activation": (None, *[_POINTER] * 3, *[_LONG] * 4, *[_FLOAT] * 2, *[_INT] * 2),
    "dovetail_norm": (None, *[_POINTER] * 3, *[_LONG] * 3, _FLOAT, *[_INT] * 2),
    "dovetail_rotary": (None, *_STATES, *_STATES, *[_POINTER] * 2, *[_LONG] * 3, *[_INT] * 2),
    "dovetail_best": (None, *[_POINTER] * 3, *[_LONG] * 4, _INT),
    "dovetail_layer_room": (_LONG, _POINTER, *[_LONG] * 2, _INT),
    "dovetail_layer_qkv": (None, *[_POINTER] * 4, *[_LONG] * 2, *[_POINTER] * 4, _INT),
    "dovetail_layer_finish": (None, *[_POINTER] * 7, *[_LONG] * 3, _POINTER, _FLOAT, _INT, _POINTER, _INT),
}
_BF16_FUNCTIONS = ("dovetail_bf16_product",)  # which may be missing

_lock = threading.Lock()
_thread = threading.local()  # .scratch: memory for what kernels keep on the way


def why_not() -> str | None:
    """Why the native kernels cannot be used here, or None; the first call compiles them."""
    return loaded()[1]


def loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason why there is none."""
    built = _built()
    return built.library, built.reason


def instruction_set() -> InstructionSet | None:
    """What the kernels are compiled for; None without them."""
    return _built().instructions


def multiplies_bf16() -> bool:
    """Whether there are kernels for products of bf16 numbers."""
    return hasattr(loaded()[0], _BF16_FUNCTIONS[0])


def _built() -> _Built:
    with _lock:
        return _load()


def _present() -> _Built:
    """What was built.

    Raises:
        RuntimeError: if nothing was, saying why.
    """
    built = _built()
    if built.library is None:
        raise RuntimeError(built.reason)
    return built


def kernels() -> ctypes.CDLL | None:
    """The library, unless somebody follows torch's operations, of which its calls are none.

    That is torch.compile, torch.jit.trace and forward-mode derivatives.
    """
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
    return None if followed else loaded()[0]


@dataclass(frozen=True)
class _Built:
    """The library and what it is compiled for, or the reason why there is none."""

    library: ctypes.CDLL | None = None
    instructions: InstructionSet | None = None
    reason: str | None = None


@functools.cache
def _load() -> _Built:
    system = platform.system(), platform.machine()
    if system != ("Linux", "x86_64"):
        return _Built(reason=f"the native kernels are for Linux on x86-64, not for {' on '.join(system)}")
    missing = INSTRUCTION_SETS[-1].needs - cpu_flags()
    if missing:
        return _Built(reason=f"this CPU has no {INSTRUCTION_SETS[-1].name} (missing: {', '.join(sorted(missing))})")
    try:
        found, instructions = _library()
        openmp = [ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p) for name in _THREADING]
    except CompileError as error:
        return _Built(reason=str(error))
    except AttributeError as error:
        return _Built(reason=f"this build of torch does not bring GNU OpenMP along ({error})")
    for name, (result, *arguments) in _SIGNATURES.items():
        if name not in _BF16_FUNCTIONS or hasattr(found, name):
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    found.dovetail_use_threads(*openmp)
    return _Built(found, instructions)


def _library() -> tuple[ctypes.CDLL, InstructionSet]:
    """All kernels, or those that this compiler can build, for the best instructions of this CPU that it knows.

    Raises:
        CompileError: if there is nothing that it can build.
    """
    failures = []
    for instructions in sets_of(cpu_flags()):
        choices = [_SOURCES]
        if instructions.bf16_needs <= cpu_flags():
            choices.insert(0, (*_SOURCES, _BF16_SOURCE))
        for sources in choices:
            try:
                return library(sources, (*_FLAGS, *instructions.flags)), instructions
            except CompileError as error:
                logger.info("not all kernels for %s: %s", instructions.name, error)
                failures.append(error)
    raise failures[-1]


class Matrix(ctypes.Structure):
    """Where packed weights lie, for kernels that multiply on their own; `Matrix` in `layer.c`."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("width", ctypes.c_long),
        ("inputs", ctypes.c_long),
        ("outputs", ctypes.c_long),
        ("kind", ctypes.c_int),
        ("threads", ctypes.c_int),
    )
    INT8, INT4, BF16 = range(3)


class Packed(Protocol):
    """Weights as the kernels read them."""

    @property
    def matrix(self) -> Matrix:
        """Where they lie, while this lives."""


class NativeBf16:
    """Products of a few rows with bf16 weights that lie in memory as oneDNN packs them.

    A row's result does not depend, bit for bit, on how many rows there are.

    Args:
        blocks: (blocks, K / 2, 64, 2) bf16, in memory that lives as long as this.
        outputs: N; the last block may reach beyond it.
    """

    def __init__(self, blocks: Tensor, outputs: int) -> None:
        self._product = loaded()[0].dovetail_bf16_product
        self.blocks, self._outputs = blocks, outputs
        self._width = 2 * blocks.shape[1]
        self._most_threads = 1 if outputs * self._width < _ALONE else len(blocks)

    @property
    def matrix(self) -> Matrix:
        """Where the weights lie, while this lives."""
        width, outputs = self._width, self._outputs
        return Matrix(self.blocks.data_ptr(), 0, width, width, outputs, Matrix.BF16, self._most_threads)

    @classmethod
    def of(cls, weight: Tensor) -> NativeBf16 | None:
        """A packed copy of a matrix (N, K), or None if the kernel is not here or does not take it."""
        (outputs, inputs), (columns, pair) = weight.shape, _BF16_BLOCK
        if weight.dtype != torch.bfloat16 or inputs % pair or not multiplies_bf16():
            return None
        padded = F.pad(weight, (0, 0, 0, -outputs % columns))
        blocks = padded.view(-1, columns, inputs // pair, pair).transpose(1, 2)
        return cls(pages.copy(blocks), outputs)

    @staticmethod
    def takes(blocks: Tensor | None) -> bool:
        """Whether the kernel is here and knows this layout."""
        known = blocks is not None and blocks.dtype == torch.bfloat16 and blocks.shape[2:] == _BF16_BLOCK
        return known and multiplies_bf16()

    def product(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) bf16 to (..., N) bf16, with a bias (N,) bf16."""
        rows = rows.contiguous()
        output = rows.new_empty(*rows.shape[:-1], self._outputs)
        bias = None if bias is None else bias.contiguous()
        self._product(
            rows.data_ptr(),
            output.data_ptr(),
            self.blocks.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            rows.numel() // self._width,
            self._width,
            self._outputs,
            min(torch.get_num_threads(), self._most_threads),
        )
        return output


class _Native:
    """Packed weights (N, K) and the call that multiplies rows with them."""

    def __init__(self, blocks: Tensor, scales: Tensor | None, outputs: int, width: int, inputs: int) -> None:
        found = _present().library
        blocks = pages.copy(blocks)
        self._blocks, self._scales = blocks, scales
        self.nbytes = blocks.nbytes + (0 if scales is None else scales.nbytes)
        self._shape = outputs, width
        self._inputs = inputs
        self._four = scales is None
        self._product = found.dovetail_product
        self._scratch = found.dovetail_scratch(inputs, self._four)
        self._most_threads = 1 if outputs * width < _ALONE else len(blocks)
        self._addresses = blocks.data_ptr(), 0 if scales is None else scales.data_ptr()

    @property
    def matrix(self) -> Matrix:
        """Where the weights lie, while this lives."""
        outputs, width = self._shape
        kind = Matrix.INT4 if self._four else Matrix.INT8
        return Matrix(*self._addresses, width, self._inputs, outputs, kind, self._most_threads)

    def product(self, rows: Tensor) -> Tensor:
        """(R, K) bf16 or fp32 to (R, N), in the same precision."""
        rows = rows.contiguous()
        outputs, width = self._shape
        count, dtype = rows.shape[0], rows.dtype
        output = rows.new_empty(count, outputs)
        self._product(
            rows.data_ptr(),
            output.data_ptr(),
            *self._addresses,
            scratch(self._scratch),
            count,
            width,
            self._inputs,
            outputs,
            dtype == torch.bfloat16,
            self._four,
            min(torch.get_num_threads(), self._most_threads),
        )
        return output


def scratch(size: int) -> int:
    """The address of this thread's own memory, at least `size` bytes."""
    held = getattr(_thread, "scratch", None)
    if held is None or len(held) < size:
        held = _thread.scratch = torch.empty(size, dtype=torch.uint8, device="cpu")
    return held.data_ptr()


class NativeInt8(_Native):
    """8-bit weights.

    Args:
        levels: (N, K) int8.
        scales: (N,) float32; a product is `scale * activation's magnitude * (sum of levels' products)`.
    """

    def __init__(self, levels: Tensor, scales: Tensor) -> None:
        outputs, width = levels.shape
        self._layout = instructions = _present().instructions
        side, zero_point = instructions.side_by_side, instructions.zero_point
        padded = _padded(levels.view(torch.uint8) ^ zero_point, _INPUTS, zero_point)
        inputs = padded.shape[1]
        blocks = padded.view(-1, _COLUMNS, inputs // side, side).transpose(1, 2)
        super().__init__(blocks, F.pad(scales, (0, -outputs % _COLUMNS)), outputs, width, inputs)

    def levels(self) -> Tensor:
        """(N, K) int8, as they were given."""
        outputs, width = self._shape
        rows = self._blocks.transpose(1, 2).reshape(-1, self._inputs)[:outputs, :width]
        return (rows ^ self._layout.zero_point).view(torch.int8)


class NativeInt4(_Native):
    """4-bit weights in groups of `GROUP` input channels.

    Args:
        levels: (N, groups, GROUP) uint8, 0 to 15.
        least, step: (N, groups) bf16; a weight is `least + level * step`.
        width: K; the last group may reach beyond it.
    """

    def __init__(self, levels: Tensor, least: Tensor, step: Tensor, width: int) -> None:
        outputs, groups, _ = levels.shape
        inputs = groups * GROUP
        padded = _padded(levels.reshape(outputs, inputs), GROUP, 0)
        low, high = padded.view(-1, _COLUMNS, groups, GROUP // 8, 2, 4).permute(4, 0, 2, 3, 1, 5)
        pairs = _padded(torch.stack((least, step), -1).view(torch.int32).squeeze(-1), 1, 0)
        pairs = pairs.view(-1, _COLUMNS, groups).transpose(1, 2).contiguous().view(torch.uint8)
        blocks = torch.cat(((low | high << 4).flatten(3).flatten(2), pairs), -1)
        super().__init__(blocks, None, outputs, width, inputs)

    def dense(self) -> Tensor:
        """(N, K) float32."""
        outputs, width = self._shape
        packed, pairs = self._blocks.split((_COLUMNS * GROUP // 2, 4 * _COLUMNS), -1)
        groups = packed.shape[1]
        packed = packed.view(-1, groups, GROUP // 8, _COLUMNS, 4)
        levels = torch.stack((packed & 15, packed >> 4), 3)  # (blocks, groups, GROUP / 8, 2, COLUMNS, 4)
        levels = levels.permute(0, 4, 1, 2, 3, 5).reshape(-1, groups, GROUP)
        least, step = pairs.contiguous().view(torch.bfloat16).view(-1, groups, _COLUMNS, 2).transpose(1, 2).unbind(-1)
        least, step = (each.reshape(-1, groups, 1).float() for each in (least, step))
        return (levels * step + least).flatten(1)[:outputs, :width]


def _padded(matrix: Tensor, inputs: int, value: int) -> Tensor:
    """An integer matrix with whole blocks of rows, and columns in multiples of `inputs`."""
    rows, columns = matrix.shape
    return F.pad(matrix, (0, -columns % inputs, 0, -rows % _COLUMNS), value=value)
