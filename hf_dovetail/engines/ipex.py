"""Linear layers on the prepacked kernels of Intel Extension for PyTorch (IPEX) 2.8, in bf16 and fp32.

The layout and the kernels are those of `ipex.optimize(model, auto_kernel_selection=True)`, applied weight by weight:
the function itself would also replace modules, drop dropout and patch `state_dict`, and could not be undone.
Nothing of IPEX is imported before a model is prepared.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import onednn
from .swap import Swap, swap_all

PACKAGE = "intel_extension_for_pytorch"
INSTALL = 'pip install "hf_dovetail[ipex]"'
WHY_NOT_STREAMED = "keeps its weights in a layout that only the CPU reads"
_TORCH = "2.8"  # the only version that the last IPEX, 2.8, can be loaded into


class IpexKernel:
    """One weight matrix in IPEX's blocked layout.

    Args:
        weight: (N, K) bf16 or fp32, on the CPU.
    """

    lossless = True

    def __init__(self, weight: Tensor) -> None:
        self.shape, self.dtype = weight.shape, weight.dtype
        self._context = torch.ops.ipex_prepack.linear_prepack(weight.contiguous(), None, None)
        self._empty = weight.new_empty(0)
        packed = self._context.get_weight()  # the context's own memory, in a shape of IPEX's choice
        self._rows = packed if _has_known_layout(packed, weight) else None

    @property
    def has_rows(self) -> bool:
        """Whether single rows can be read (`lookup`)."""
        return self._rows is not None

    def linear(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N)."""
        if bias is None:  # the operator reads the weight from the context; its own argument serves derivatives
            handle = self._context.get_data_handle()
            return torch.ops.torch_ipex.ipex_linear(rows, self._empty, None, handle, self.shape[0])
        sums = bias.repeat(*rows.shape[:-1], 1)  # the product is added to it in place, and rounded once
        return torch.ops.ipex_prepack.linear_add_run(rows, sums, alpha=1, W_prepack=self._context)

    def lookup(self, ids: Tensor) -> Tensor:
        """(...) int64 to (..., K): rows of the matrix, read out of the blocks."""
        return _read(self._rows, ids, self.shape[1])

    def dense(self) -> Tensor:
        """The matrix (N, K), bit for bit."""
        return self._context.to_public(self._context.get_weight())

    def native(self) -> None:
        """Nothing: only IPEX reads its layout."""


def why_not(model: PreTrainedModel) -> str | None:
    """Why this engine cannot take the model, or None; imports nothing of IPEX."""
    reason = onednn.why_not(model)  # whose precisions are IPEX's too
    if reason is not None:
        return reason
    if model.dtype == torch.bfloat16 and not onednn.has_bf16():
        return "oneDNN, whose products IPEX's are, has no bfloat16 for this CPU"
    if find_spec(PACKAGE) is None:
        return f"Intel Extension for PyTorch is not installed; {INSTALL} (it needs torch {_TORCH})"
    if torch.__version__.split(".")[:2] != _TORCH.split("."):
        return f"Intel Extension for PyTorch needs torch {_TORCH}, and this is {torch.__version__}; {INSTALL}"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "Intel Extension for PyTorch needs a CPU with AVX2 or AVX-512"
    return None


def prepare(model: PreTrainedModel) -> Swap:
    """Pack every linear weight of the model, in place; the LM head that is the embedding too stays one matrix.

    Raises:
        ValueError: if IPEX is installed and cannot be imported.
    """
    _load_operators()
    return swap_all(model, IpexKernel)


def _has_known_layout(packed: Tensor, weight: Tensor) -> bool:
    """Whether `_read` finds the matrix's rows; IPEX does not promise a layout, so they are compared."""
    if packed.ndim not in (4, 5) or not packed.is_contiguous():
        return False
    sample = torch.arange(0, len(weight), max(len(weight) // 67, 1), device=weight.device)
    fits = packed.shape[0] * packed.shape[3] >= len(weight)
    return fits and torch.equal(_bits(_read(packed, sample, weight.shape[1])), _bits(weight[sample]))


def _read(packed: Tensor, ids: Tensor, width: int) -> Tensor:
    """(...) row numbers to (..., width), from (N / b, K / g, g, b), in bf16 (N / b, K / g, g / 2, b, 2)."""
    block = packed.shape[3]
    rows = packed[ids // block, :, :, ids % block]  # (..., K / g, g), in bf16 (..., K / g, g / 2, 2)
    return rows.reshape(*ids.shape, -1)[..., :width]  # K is padded to whole blocks


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)  # not-a-number equals nothing


def _load_operators() -> None:
    """Import IPEX, and leave logging as it was: it replaces the class of all later loggers and adds a root handler.

    Raises:
        ValueError: if it cannot be imported; it is the choice of this engine that can be changed.
    """
    with _logging_restored():
        try:
            importlib.import_module(PACKAGE)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"Intel Extension for PyTorch is installed and cannot be imported: {error}; install it again "
                f'({INSTALL}), or take engine="auto"'
            ) from error


@contextmanager
def _logging_restored() -> Iterator[None]:
    kind, handlers = logging.getLoggerClass(), list(logging.root.handlers)
    try:
        yield
    finally:
        logging.setLoggerClass(kind)
        logging.root.handlers[:] = handlers
