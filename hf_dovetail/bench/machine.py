"""The machine of a measurement: commit, versions, CPU, threads, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_dovetail

from ..engines import pages
from ..fingerprint import cpu_name
from ..threads import chosen_threads

_PACKAGE = Path(hf_dovetail.__file__).parent
_OPTIONAL = ("intel-extension-for-pytorch", "llama-cpp-python", "torchao")
BUFFER_BYTES = 512 * 2**20
"""Far beyond any cache."""


def record() -> dict[str, Any]:
    """Commit (None outside a git checkout of this package), versions and machine of a measurement."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        **_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hf_dovetail": hf_dovetail.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **_optional_versions(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "target_threads": chosen_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator or "") or None,
    }


def _commit() -> dict[str, Any]:
    if not _git("ls-files", "--", "__init__.py"):  # not a checkout, or a checkout of something else
        return {"commit": None, "uncommitted_changes": None}
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ":/*.py")),
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:  # no git here
        return ""


def _optional_versions() -> dict[str, str]:
    found = {}
    for name in _OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of `call` in ms, after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def read_bandwidth(repeats: int = 7) -> dict[str, Any]:
    """How fast all threads together read memory, in GB/s (1e9 bytes): the best of several ways to read a buffer.

    The buffer lies in large pages, as packed weights do. Each way is the median of `repeats` reads of a float32
    buffer; `read_gb_s` is the fastest way's, so that what is a percentage of it is not flattered.
    """
    buffer = pages.copy(torch.ones(1).expand(BUFFER_BYTES // 4))
    integers = buffer.view(torch.int64)
    ways = {"sum_float32": buffer.sum, "dot_float32": lambda: torch.dot(buffer, buffer), "sum_int64": integers.sum}
    rates = {name: buffer.nbytes / median_ms(way, repeats) / 1e6 for name, way in ways.items()}
    return {
        "read_gb_s": round(max(rates.values()), 2),
        "by_way_gb_s": {name: round(rate, 2) for name, rate in rates.items()},
        "buffer_bytes": buffer.nbytes,
        "repeats": repeats,
    }
