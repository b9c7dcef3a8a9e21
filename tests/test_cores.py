"""How many threads a target computes with: what the machine, the affinity mask and the cgroup leave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny
import torch

from hf_dovetail import threads
from hf_dovetail.threads import chosen_threads, target_threads, usable_cores


def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: list[tuple[int, int]], **limits: str) -> None:
    """A system with these (package, core) pairs per logical CPU, and these files in its cgroup."""
    for cpu, (package, core) in enumerate(cores):
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{core}\n")
    (tmp_path / "cgroup" / "cpu").mkdir(parents=True)
    for name, text in limits.items():
        place = {"v2": "cpu.max", "quota": "cpu/cpu.cfs_quota_us", "period": "cpu/cpu.cfs_period_us"}[name]
        (tmp_path / "cgroup" / place).write_text(text)
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(threads, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(len(cores))), raising=False)


FOUR_CORES = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1), (1, 0), (1, 1)]  # two packages, two threads a core


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 4),
        ({"v2": "max 100000"}, 4),
        ({"v2": "250000 100000"}, 3),
        ({"v2": "50000 100000"}, 1),
        ({"v2": "900000 100000"}, 4),
        ({"v2": "nonsense"}, 4),
        ({"quota": "200000", "period": "100000"}, 2),
        ({"quota": "-1", "period": "100000"}, 4),
    ],
)
def test_cores_are_counted_once_and_within_the_cgroups_quota(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, FOUR_CORES, **limits)
    assert usable_cores() == expected


def test_cpus_without_a_topology_count_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(tmp_path, monkeypatch, FOUR_CORES)
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path / "nothing")
    assert usable_cores() == len(FOUR_CORES)


def test_the_users_own_number_is_kept_below_the_limit_and_returns_after_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, FOUR_CORES, v2="200000 100000")
    torch.set_num_threads(1)
    assert chosen_threads() == 1
    torch.set_num_threads(3)
    target, seen = tiny.build("llama"), []
    target.lm_head.register_forward_hook(lambda *call: seen.append(torch.get_num_threads()))
    draft = tiny.draft_for(target, "noisy")
    with target_threads() as chosen:
        assert chosen == torch.get_num_threads() == 2
    assert torch.get_num_threads() == 3
    tiny.run(target, tiny.prompt(), draft, max_new_tokens=6)
    assert set(seen) == {2}
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
