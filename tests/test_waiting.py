"""Threads that wait for each other asleep where other processes want the cores, and only there and then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, threads, waiting
from hf_dovetail.waiting import Waiting, shares_cores

linux = pytest.mark.skipif(waiting._openmp() is None, reason="no GNU OpenMP here, or its wait policy is chosen already")


@pytest.fixture
def shared_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads compute, and the cores were found to be shared a moment ago; nothing is found from now on."""
    monkeypatch.setattr(waiting, "shares_cores", lambda *_: False)
    monkeypatch.setattr(waiting, "_shared_until", time.monotonic() + 60)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    torch.set_num_threads(2)


def running() -> int:
    """Threads of this process that are no longer ending."""
    return len(os.listdir("/proc/self/task"))


def comes_true(condition: Callable[[], bool]) -> bool:
    """Soon: the system takes a moment to end threads."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize(
    ("count", "cpu_s", "preemptions", "shared"),
    [
        (2, 1.97, 40, False),  # two cores of one's own
        (2, 1.5, 62, True),  # another process on one of them
        (2, 0.5, 125, True),
        (2, 1.0, 3, False),  # a thread slept by itself
        (8, 7.9, 20, False),
        (8, 7.5, 62, True),
        (64, 61.5, 300, False),
        (64, 59.0, 300, True),
    ],
)
def test_who_misses_time_that_others_took_shares_its_cores(
    count: int, cpu_s: float, preemptions: int, shared: bool
) -> None:
    assert shares_cores(count, 1.0, cpu_s, preemptions) == shared


@linux
def test_the_crowd_is_there_during_an_answer_only(shared_cores: None) -> None:
    torch.ones(1 << 20).add_(1)  # torch's own threads are there
    before = running()
    with Waiting(2) as watched:
        assert running() >= before + 2
        assert watched.shared
        with watched.observed():
            assert running() >= before + 2
    assert comes_true(lambda: running() == before)


@linux
def test_it_ends_when_the_cores_have_not_been_shared_for_long(
    shared_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Waiting(2) as watched:
        crowded = running()
        monkeypatch.setattr(waiting, "_shared_until", time.monotonic() - 1)
        with watched.observed():
            assert comes_true(lambda: running() < crowded)
    with Waiting(2) as later:
        assert not later.shared


@linux
@pytest.mark.parametrize(("count", "watches"), [(1, True), (2, False), (2, True)], ids=["one thread", "GPU", "chosen"])
def test_otherwise_nothing_is_touched(
    count: int, watches: bool, shared_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (count, watches) == (2, True):
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        waiting._openmp.cache_clear()
    try:
        before = running()
        with Waiting(count, watches) as watched, watched.observed():
            assert running() == before
            assert not watched.shared
    finally:
        monkeypatch.undo()
        waiting._openmp.cache_clear()


@pytest.mark.parametrize(("cpus", "count", "others"), [(2, 2, 2), (16, 8, 10), (4, 8, 2), (100, 2, 0)])
def test_the_crowd_outnumbers_the_cpus_or_is_not_there(
    cpus: int, count: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two of a hundred CPUs it would take a hundred threads."""
    monkeypatch.setattr(waiting, "_openmp", lambda: SimpleNamespace(omp_get_num_procs=lambda: cpus))
    assert waiting._others(count) == others


@linux
def test_an_answer_on_shared_cores_is_the_same_and_says_so(
    shared_cores: None, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor, monkeypatch
) -> None:
    tiny.both(llama, noisy, ids)
    assert noisy.last_stats.cores_shared
    monkeypatch.setattr(waiting, "_shared_until", -float("inf"))
    tiny.both(llama, noisy, ids)
    assert not noisy.last_stats.cores_shared


@linux
def test_busy_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones: twice as many as there are cores."""
    monkeypatch.setattr(waiting, "_shared_until", -float("inf"))
    torch.set_num_threads(2)
    loop = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(loop) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        numbers, end = torch.ones(1 << 20), time.monotonic() + 30
        with Waiting(2) as watched:
            while not watched.shared and time.monotonic() < end:
                with watched.observed():
                    for _ in range(20):
                        numbers.add_(1)
            assert watched.shared
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
