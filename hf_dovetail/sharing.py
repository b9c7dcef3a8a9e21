"""How a pass's threads wait for each other where other processes want the cores too: asleep, and not in a loop.

At the end of each parallel region GNU OpenMP's threads wait in a loop, some milliseconds long, before they sleep. That
is the fastest on cores of one's own. Where another process wants a core, such a loop uses up the very time that the
last thread needs to arrive, and a pass takes several times as long (`benchmarks/busy.py`). OpenMP reads its wait policy
from the environment before Python runs a line of this, but it also shortens the loop to 100 turns while a process has
more OpenMP threads than CPUs (libgomp's manual, GOMP_SPINCOUNT). `SharedCores` watches how much of its time a pass
gets, and brings that about where others take too much of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

_CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # by whom started this process
_WATCHED_S = 0.1  # of passes, before they are judged
_MISSING = 0.3  # threads that got no time, of which one may be half of a thread beside another process
_MISSING_SHARE = 0.05  # or so many of all
_PREEMPTIONS = 30.0  # per second; a thread that sleeps misses its time too, but nobody takes it away
_LOOK_AGAIN_S = 30.0

_shared_until = -float("inf")  # on `time.monotonic`'s clock: the cores were found to be shared less than so long ago


class SharedCores(AbstractContextManager):
    """Watches the passes of one answer; entered for its length.

    What one answer finds, all of this process's answers act upon for half a minute. While several threads of Python
    decode at once, each other's CPU time hides what is missing, and nothing is found.

    Args:
        threads: that compute a pass.
        watches: whether its passes are these threads' work alone (one that waits for a GPU is not).

    Attributes:
        found: whether the cores were found to be shared, in this answer or less than half a minute before it.
    """

    def __init__(self, threads: int, watches: bool = True) -> None:
        self._threads, self._others = threads, _others(threads)
        self._watches = watches and threads > 1 and self._others > 0
        self._crowd: _Crowd | None = None
        self.found = False
        self._begin()

    def __enter__(self) -> SharedCores:
        if self._watches:
            self._follow()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave OpenMP as it was."""
        self._relax()

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Run one pass."""
        if self._watches:
            self._follow()
        if not self._watches or self._crowd is not None:  # threads that sleep lack time by themselves
            yield
            return
        wall, cpu, preemptions = time.perf_counter(), time.process_time(), _preemptions()
        yield
        self._wall += time.perf_counter() - wall
        self._cpu += time.process_time() - cpu
        self._preempted += _preemptions() - preemptions
        if self._wall > _WATCHED_S:
            self._judge()

    def _begin(self) -> None:
        self._wall, self._cpu, self._preempted = 0.0, 0.0, 0

    def _judge(self) -> None:
        global _shared_until
        if shares_cores(self._threads, self._wall, self._cpu, self._preempted):
            self.found, _shared_until = True, time.monotonic() + _LOOK_AGAIN_S
        self._begin()

    def _follow(self) -> None:
        """Do what was found last, in this answer or in one before."""
        if time.monotonic() >= _shared_until:
            self._relax()
            return
        self.found = True
        if self._crowd is None:
            try:
                self._crowd = _Crowd(self._others)
            except RuntimeError:  # the system gives no more threads
                self._watches = False

    def _relax(self) -> None:
        if self._crowd is not None:
            self._crowd.leave()
            self._crowd = None


def shares_cores(threads: int, wall_s: float, cpu_s: float, preemptions: int) -> bool:
    """Whether other processes took the time of threads that work or wait in loops.

    Args:
        threads: of the passes. wall_s: time of the passes. cpu_s: that all threads got meanwhile.
        preemptions: how often a thread had to leave a core meanwhile.
    """
    missing = threads - cpu_s / wall_s
    return missing > max(_MISSING, _MISSING_SHARE * threads) and preemptions > _PREEMPTIONS * wall_s


class _Crowd:
    """So many OpenMP threads that do nothing, asleep until they leave.

    Raises:
        RuntimeError: if the system does not give so many, which OpenMP would end the process for.
    """

    def __init__(self, size: int) -> None:
        self._size, self._ready, self._leaving = size, threading.Event(), threading.Event()
        _try_threads(size)
        self._owner = threading.Thread(target=self._stay, name=_CROWD, daemon=True)
        self._owner.start()
        try:
            self._ready.wait()
        except BaseException:  # Ctrl-C
            self._leaving.set()
            raise

    def _stay(self) -> None:
        openmp = _openmp()
        nothing = ctypes.cast(openmp.free, ctypes.c_void_p)  # of a null pointer
        openmp.GOMP_parallel(nothing, None, self._size, 0)
        self._ready.set()
        self._leaving.wait()  # the threads are this one's, and end with it

    def leave(self) -> None:
        """End them."""
        self._leaving.set()
        self._owner.join()


_CROWD = "hf_dovetail-crowd"


def _try_threads(count: int) -> None:
    """Start and end so many threads.

    Raises:
        RuntimeError: if the system does not give so many.
    """
    leaving, started = threading.Event(), []
    try:
        for _ in range(count):
            thread = threading.Thread(target=leaving.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        leaving.set()
        for thread in started:
            thread.join()


def _others(threads: int) -> int:
    """Threads that make more than there are CPUs together with those of a pass; 0 where that cannot or must not be.

    Of a pass on few CPUs of many, under a quota say, it would be a crowd beyond all proportion.
    """
    openmp = _openmp()
    if openmp is None:
        return 0
    others = max(openmp.omp_get_num_procs() - threads, 0) + 2
    return others if others <= 2 * threads + 2 else 0


def _preemptions() -> int:
    """Involuntary context switches of this process's threads so far."""
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """What this process has of GNU OpenMP, unless it is another one, or its wait policy was chosen already."""
    if platform.system() != "Linux" or any(os.environ.get(name) for name in _CHOSEN):
        return None
    symbols = ctypes.CDLL(None)
    needed = ("GOMP_parallel", "omp_get_num_procs", "free")
    other = hasattr(symbols, "kmp_set_blocktime")  # LLVM's and Intel's, which have GOMP_parallel too
    return symbols if not other and all(hasattr(symbols, name) for name in needed) else None
