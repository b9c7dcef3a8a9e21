"""The demo pair's corpus: Python source that every installation of torch already has on disk.

The standard library of the running interpreter (PSF licence) and the sources of sympy and networkx
(BSD-3-Clause, both dependencies of torch). Nothing is downloaded. One file in 25, chosen by a hash of its
path, is held out; HumanEval is not part of the corpus at all. This module knows files, not models.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SEPARATOR = "<|endoftext|>"
HELD_OUT_SHARE = 25  # one file in this many
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "benchmarks",
}
MAX_FILE_BYTES, MAX_LINE_CHARS = 120_000, 400


def corpus_roots() -> list[Path]:
    """The folders of the standard library, sympy and networkx on this machine."""
    packages = [Path(importlib.import_module(name).__file__).parent for name in ("sympy", "networkx")]
    return [Path(sysconfig.get_paths()["stdlib"]), *packages]


def source_files() -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of every usable source file, in a fixed order; `name` is relative to its package."""
    for root in corpus_roots():
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if SKIPPED_FOLDERS.intersection(relative.parts) or path.stat().st_size > MAX_FILE_BYTES:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip() and max(map(len, text.splitlines())) <= MAX_LINE_CHARS:
                yield f"{root.name}/{relative.as_posix()}", text


def is_held_out(name: str) -> bool:
    """Whether the file belongs to the validation split; depends on its name only."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def split_corpus() -> tuple[list[str], list[str]]:
    """The texts for training and the held-out texts."""
    training, held_out = [], []
    for name, text in source_files():
        (held_out if is_held_out(name) else training).append(text)
    return training, held_out
