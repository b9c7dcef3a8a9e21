"""Compiles C source at first use with the user's own compiler, and keeps the library in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..curves import user_cache

_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120
_KEPT_MESSAGE = 400  # characters of a compiler's message


class CompileError(Exception):
    """The library cannot be had; the message says why, in one sentence."""


def library(sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of C sources and headers, compiled unless the cache holds it for them and these flags.

    Other processes may do the same at the same time: a file appears in the cache complete or not at all.

    Raises:
        CompileError: without a compiler, or if it fails, or the cache cannot be written.
    """
    compiler = _compiler()
    command = [*compiler, *flags]
    version = _run([*compiler, "--version"])
    texts = (source.read_text(encoding="utf-8") for source in sources)
    described = "\0".join((*texts, *command, version, platform.machine()))
    path = user_cache() / "native" / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.so"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                partial = Path(folder) / path.name
                _run([*command, *(str(source) for source in sources if source.suffix == ".c"), "-o", str(partial)])
                partial.replace(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"the compiled kernels cannot be kept in or loaded from {path.parent} ({error})") from error


def _compiler() -> list[str]:
    """The command of `$CC`, or the first compiler on the path."""
    chosen = shlex.split(os.environ.get("CC", ""))
    found = [name for name in chosen[:1] or _COMPILERS if shutil.which(name)]
    if not found:
        wanted = f"$CC is {chosen[0]!r}, which" if chosen else f"none of {', '.join(_COMPILERS)}"
        raise CompileError(f"no C compiler: {wanted} is not on the path; install gcc or clang, or set $CC")
    return [found[0], *chosen[1:]]


def _run(command: list[str]) -> str:
    """What a command prints; a failure is a `CompileError` with the end of its message."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"the C compiler could not be run ({error})") from error
    if done.returncode != 0:
        message = " ".join((done.stderr or done.stdout).split())[:_KEPT_MESSAGE]
        raise CompileError(f"the C compiler failed ({shlex.join(command[:1])}, status {done.returncode}): {message}")
    return done.stdout
