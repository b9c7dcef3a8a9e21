"""What a figure was measured on: processor, GPU, bandwidth, versions, and exactly which source."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import record

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The record of the benchmarks, and what else matters here.

    Args:
        device: where the draft is.
        commit: of the source, for a copy of it without its history; `source_sha256` tells the source in any case.
    """
    found = record()
    if not found["commit"]:  # a copy without its history: nothing is known of changes
        found |= {"commit": commit, "uncommitted_changes": None}
    return {**found, "source_sha256": source_digest(), "processor": _processor(), "gpu": _gpu(device)}


def source_digest() -> str:
    """SHA-256 of the package's and these scripts' source, by which a run without history is told."""
    digest = hashlib.sha256()
    for folder in ("hf_dovetail", "scripts/gpu_real"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_gb_per_s(size_bytes: int) -> float:
    """Read bandwidth with torch's current threads: the median of five sums over a tensor of so many bytes."""
    data, times = torch.ones(size_bytes // 4), []
    for _ in range(6):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return round(data.nbytes / statistics.median(times[1:]) / 1e9, 1)


def _processor() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = set(fields.get("flags", "").split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "model": fields.get("model name"),
        "usable_cores": usable,
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(memory / 2**30, 1) if memory else None,
    }


def _gpu(device: torch.device) -> dict[str, Any] | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
