"""Large pages for packed weights: a pass reads all of them, and with small pages the CPU looks up each place anew.

Linux gives memory in pages of 4 KiB unless it is asked for larger ones. Reads of whole weights were 8 to 16 % faster
with them on the machine of `docs/performance.md`, a virtual one, where looking up takes longest.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

PAGE_BYTES = 2 << 20
"""Of a large page on x86-64; on other CPUs the advice may find nothing to do."""

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # <asm-generic/mman-common.h>


@functools.cache
def why_not() -> str | None:
    """Why memory cannot be in large pages here, or None."""
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} is not asked for them"
    try:
        setting = _SETTING.read_text(encoding="utf-8")
    except OSError:
        return "this system has no transparent huge pages"
    return "they are switched off on this system" if "[never]" in setting else None


def enlarge(address: int, nbytes: int) -> None:
    """Bring memory that is in use into large pages, as far as it fills them; its contents stay.

    At once where the kernel can (Linux 6.1), later in the background elsewhere. A refusal, for want of free memory in
    one piece for instance, changes nothing.
    """
    _advise(address, nbytes, _MADV_HUGEPAGE)
    _advise(address, nbytes, _MADV_COLLAPSE)


def copy(tensor: Tensor) -> Tensor:
    """A contiguous copy in large pages: cheaper than to bring it into them afterwards."""
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    _advise(new.data_ptr(), new.nbytes, _MADV_HUGEPAGE)
    new.copy_(tensor)
    _advise(new.data_ptr(), new.nbytes, _MADV_COLLAPSE)  # of memory that had been in use before
    return new


def _advise(address: int, nbytes: int, advice: int) -> None:
    begin, end = -(-address // PAGE_BYTES) * PAGE_BYTES, (address + nbytes) // PAGE_BYTES * PAGE_BYTES
    if begin >= end or why_not() is not None:
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice)):
        logger.info("no large pages for %d bytes: %s", nbytes, os.strerror(ctypes.get_errno()))
