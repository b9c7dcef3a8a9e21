"""Threads that wait for each other asleep where other processes want the cores, and only there and then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, plugin, sharing, threads
from hf_dovetail.sharing import SharedCores, shares_cores

linux = pytest.mark.skipif(sharing._openmp() is None, reason="no GNU OpenMP here, or its wait policy is chosen already")


def few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are threads, where there are more."""
    known = sharing._others
    monkeypatch.setattr(sharing, "_others", lambda count: known(os.cpu_count() or 1) if count > 1 else 0)


@pytest.fixture
def shared_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads compute, and the cores were found to be shared a moment ago; nothing is found from now on."""
    monkeypatch.setattr(sharing, "shares_cores", lambda *_: False)
    few_cpus(monkeypatch)
    monkeypatch.setattr(sharing, "_shared_until", time.monotonic() + 60)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    torch.set_num_threads(2)


def running() -> int:
    """Threads of this process, those that are ending too."""
    return len(os.listdir("/proc/self/task"))


def settled() -> int:
    """Their number when none has begun or ended for a moment."""
    before = -1
    while before != (before := running()):
        time.sleep(0.3)
    return before


def crowds() -> int:
    """How many crowds there are."""
    return sum(thread.name == sharing._CROWD for thread in threading.enumerate())


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
    before = settled()
    with SharedCores(2) as watched:
        assert crowds() == 1
        assert comes_true(lambda: running() >= before + 2)
        assert watched.found
        with watched.observed():
            assert crowds() == 1
    assert crowds() == 0
    assert comes_true(lambda: running() <= before)


@linux
def test_it_ends_when_the_cores_have_not_been_shared_for_long(
    shared_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SharedCores(2) as watched:
        monkeypatch.setattr(sharing, "_shared_until", time.monotonic() - 1)
        with watched.observed():
            assert crowds() == 0
    with SharedCores(2) as later:
        assert not later.found


@linux
def test_no_more_threads_cost_speed_only(shared_cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with SharedCores(2) as watched, watched.observed():
        assert crowds() == 0


@linux
@pytest.mark.parametrize(("count", "watches"), [(1, True), (2, False), (2, True)], ids=["one thread", "GPU", "chosen"])
def test_otherwise_nothing_is_touched(
    count: int, watches: bool, shared_cores: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (count, watches) == (2, True):
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        sharing._openmp.cache_clear()
    try:
        with SharedCores(count, watches) as watched, watched.observed():
            assert crowds() == 0
            assert not watched.found
    finally:
        monkeypatch.undo()
        sharing._openmp.cache_clear()


@pytest.mark.parametrize(("cpus", "count", "others"), [(2, 2, 2), (16, 8, 10), (4, 8, 2), (100, 2, 0)])
def test_the_crowd_outnumbers_the_cpus_or_is_not_there(
    cpus: int, count: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two of a hundred CPUs it would take a hundred threads."""
    monkeypatch.setattr(sharing, "_openmp", lambda: SimpleNamespace(omp_get_num_procs=lambda: cpus))
    assert sharing._others(count) == others


@linux
def test_an_answer_on_shared_cores_is_the_same_and_says_so(
    shared_cores: None, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor, monkeypatch
) -> None:
    tiny.both(llama, noisy, ids)
    assert noisy.last_stats.cores_shared
    monkeypatch.setattr(sharing, "_shared_until", -float("inf"))
    tiny.both(llama, noisy, ids)
    assert not noisy.last_stats.cores_shared


@linux
def test_busy_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real ones: twice as many as there are cores."""
    monkeypatch.setattr(sharing, "_shared_until", -float("inf"))
    few_cpus(monkeypatch)
    torch.set_num_threads(2)
    loop = [sys.executable, "-c", "while True: pass"]
    before = sharing._preemptions()
    neighbours = [subprocess.Popen(loop) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        numbers, end = torch.ones(1 << 20), time.monotonic() + 30
        with SharedCores(2) as watched:
            while not watched.found and time.monotonic() < end:
                with watched.observed():
                    for _ in range(20):
                        numbers.add_(1)
            if sharing._preemptions() == before:
                pytest.skip("this system does not count preemptions")
            assert watched.found
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.parametrize(
    ("device", "dispatch", "watches"), [("cpu", None, True), ("cuda", None, False), ("cpu", 1, False)]
)
def test_only_a_target_that_computes_on_the_cpu_alone_is_watched(
    device: str, dispatch: object, watches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "dispatch_of", lambda target: dispatch)
    target = SimpleNamespace(device=torch.device(device))
    assert plugin._Call(target, *[None] * 7)._on_host == watches
