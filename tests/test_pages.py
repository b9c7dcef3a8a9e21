"""Large pages: packed weights lie in them, unchanged, and a system that has none is left alone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_dovetail.engines import native, onednn, pages
from hf_dovetail.engines.int8 import Int8Matrix

ROWS, WIDTH = 2048, 4096
available = pytest.mark.skipif(pages.why_not() is not None, reason=str(pages.why_not()))


@pytest.fixture
def unsaid() -> Iterator[None]:
    """What the system said is asked again, before and after."""
    pages.why_not.cache_clear()
    yield
    pages.why_not.cache_clear()


def large_bytes(address: int, nbytes: int) -> int:
    """Bytes in large pages among the mappings that reach into this memory, as Linux counts them."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            begin, end = (int(each, 16) for each in first.split("-"))
            inside = begin < address + nbytes and end > address
        elif inside and first == "AnonHugePages:":
            found += 1024 * int(line.split()[1])
    return found


def collapses() -> bool:
    """Whether this kernel brings used memory into large pages at once (Linux 6.1), and has some to give."""
    probe = torch.ones(16 << 20, dtype=torch.uint8)
    begin = -(-probe.data_ptr() // pages.PAGE_BYTES) * pages.PAGE_BYTES
    size = ctypes.c_size_t(probe.nbytes - 2 * pages.PAGE_BYTES)
    for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE: asked for here, not through what is tested
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), size, advice)
    return large_bytes(probe.data_ptr(), probe.nbytes) >= probe.nbytes // 2


def weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


@available
def test_packed_weights_lie_in_large_pages() -> None:
    if not collapses():
        pytest.skip("this kernel does not bring used memory into large pages at once")
    given = weight()
    kernel = onednn.pack(given)
    address, nbytes = kernel.stored.data_ptr(), kernel.stored.nbytes
    assert large_bytes(address, nbytes) >= nbytes - 2 * pages.PAGE_BYTES
    assert torch.equal(kernel.dense(), given)
    if native.why_not() is None:
        matrix = Int8Matrix(native.NativeInt8)
        matrix.add(given)
        matrix.pack()
        blocks = matrix._packed._blocks
        assert large_bytes(blocks.data_ptr(), blocks.nbytes) >= blocks.nbytes - 2 * pages.PAGE_BYTES


@available
def test_contents_stay_and_small_memory_is_left_alone() -> None:
    given = weight()
    expected, address = given.clone(), given.data_ptr()
    pages.enlarge(address, given.nbytes)
    assert torch.equal(given, expected)
    copied = pages.copy(given.t())
    assert copied.is_contiguous()
    assert torch.equal(copied, expected.t())
    small = torch.arange(1000)
    pages.enlarge(small.data_ptr(), small.nbytes)
    assert torch.equal(pages.copy(small), torch.arange(1000))


@pytest.mark.usefixtures("unsaid")
@pytest.mark.parametrize("setting", ["always madvise [never]", None], ids=["off", "absent"])
def test_a_system_without_them_is_not_asked(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting, encoding="utf-8")
    monkeypatch.setattr(pages, "_SETTING", tmp_path / "enabled")
    monkeypatch.setattr(pages.ctypes, "CDLL", lambda *args, **options: pytest.fail("the system was asked"))
    assert pages.why_not() is not None
    given = torch.randn(1 << 21)
    assert torch.equal(pages.copy(given), given)
    pages.enlarge(given.data_ptr(), given.nbytes)
    monkeypatch.setattr(sys, "platform", "darwin")
    pages.why_not.cache_clear()
    assert "darwin" in str(pages.why_not())
