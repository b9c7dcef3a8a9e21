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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import logging

from ..curves import replace_file, user_cache

logger = logging.get_logger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT_S = 120
_KEPT_MESSAGE = 400  # characters of a compiler's message
_DIGEST_BYTES = hashlib.sha256().digest_size


class CompileError(Exception):
    """The library cannot be had; the message says why, in one sentence."""


def library(sources: tuple[Path, ...], flags: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of C sources and headers, compiled unless the cache holds it for them and these flags.

    Other processes may do the same at the same time: a file appears in the cache complete or not at all. A damaged
    one is compiled again; where none can be kept, the library is this process's own.

    Raises:
        CompileError: without a compiler, or if it fails, or what it made cannot be loaded.
    """
    compiler = _compiler()
    command = [*compiler, *flags]
    version = _run([*compiler, "--version"])
    texts = (source.read_text(encoding="utf-8") for source in sources)
    described = "\0".join((*texts, *command, version, platform.machine()))
    path = user_cache() / "native" / f"{hashlib.sha256(described.encode()).hexdigest()[:24]}.so"
    found = _kept(path)
    if found is not None:
        return found
    return _compiled(command, [source for source in sources if source.suffix == ".c"], path)


def _kept(path: Path) -> ctypes.CDLL | None:
    """The library that the cache holds, or None if there is none, or a damaged one, or one that cannot be loaded."""
    try:
        content = path.read_bytes()
        if content == _with_digest(content[:-_DIGEST_BYTES]):
            return ctypes.CDLL(str(path))
        logger.info("%s is damaged; it is compiled again", path)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.info("%s cannot be loaded (%s); it is compiled again", path, error)
    return None


def _compiled(command: list[str], sources: list[Path], path: Path) -> ctypes.CDLL:
    """The library that a command makes of C files, kept as `path`, or else loaded from a temporary folder.

    Raises:
        CompileError: if the command fails, or the library cannot be loaded from either.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            objects = [made.with_name(f"{source.stem}.o") for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # seconds of one core
                parts = zip(objects, sources, strict=True)
                list(pool.map(_run, ([*command, "-c", str(source), "-o", str(part)] for part, source in parts)))
            _run([*command, *map(str, objects), "-o", str(made)])
            content = _with_digest(made.read_bytes())
            try:
                replace_file(path, content)
                return ctypes.CDLL(str(path))
            except OSError as error:
                logger.warning_once(
                    f"the compiled kernels cannot be kept in or loaded from {path.parent} ({error}); each process "
                    "compiles its own; set HF_HOME to a folder that can be written, where libraries may be loaded from"
                )
            return ctypes.CDLL(str(made))
    except OSError as error:
        raise CompileError(
            f"the compiled kernels can be loaded neither from {path.parent} nor from a temporary folder ({error}); set "
            "HF_HOME or TMPDIR to a folder that can be written, where libraries may be loaded from"
        ) from error


def _with_digest(code: bytes) -> bytes:
    """A library's file as it is kept: what follows the code is not loaded, and says whether the file is whole."""
    return code + hashlib.sha256(code).digest()


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
