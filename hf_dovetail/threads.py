"""How many threads a CPU target computes with: the physical cores that this process may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Physical cores of this process's affinity mask, within its cgroup's CPU quota; at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = len({_core(cpu) for cpu in cpus})
    quota = _quota()
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def chosen_threads() -> int:
    """Threads for the target: what torch is set to, but no more than there are usable cores."""
    return min(torch.get_num_threads(), usable_cores())


@contextmanager
def target_threads() -> Iterator[int]:
    """Compute with `chosen_threads()` inside the block; torch's own setting returns afterwards."""
    before, chosen = torch.get_num_threads(), chosen_threads()
    if chosen != before:
        torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        if chosen != before:
            torch.set_num_threads(before)


def _core(cpu: int) -> tuple[str, str]:
    """The physical core of a logical CPU; the CPU itself where the system does not say."""
    folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _quota() -> float | None:
    """CPUs that the cgroup allows (cgroup v2, then v1), or None for no limit."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass  # no cgroup v2
    try:
        limit = int((_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((_CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
        return None if limit <= 0 else limit / period
    except (OSError, ValueError):
        return None
