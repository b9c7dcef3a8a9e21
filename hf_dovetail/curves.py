"""What a round costs on this machine: the cost curves as plain numbers, their interpolation, and their file.

Knows no model and no clock: `calibrate` measures the numbers, `controller` reads and corrects them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_ROWS = 32
"""Rows of the largest verification: the root and 31 nodes. Two AMX tiles; beyond, no measured kernel is cheap."""
ROW_POINTS = (1, 2, 4, 8, 16, 24, 32)
_FORMAT = 1
_COSTS = ("first_ms", "row_ms", "level_ms", "overhead_ms", "tree_ms")


@dataclass(frozen=True)
class CostCurves:
    """Milliseconds of the parts of a round.

    Args:
        rows: numbers of rows (root and nodes) at which verification was timed, ascending, from 1 to `MAX_ROWS`.
        contexts: positions in the target's cache at which it was timed, ascending.
        verify: ms, one tuple per context, one number per entry of `rows`.
        first_ms: the draft's catching up with one round's tokens, and the root's children.
        row_ms: each further token to catch up with.
        level_ms: each further level.
        overhead_ms: the rest of a plain round, outside the two models.
        tree_ms: what a tree adds to that.

    Raises:
        ValueError: if the numbers do not make curves.
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    verify: tuple[tuple[float, ...], ...]
    first_ms: float
    row_ms: float
    level_ms: float
    overhead_ms: float = 0.0
    tree_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rows", "contexts"):
            points = getattr(self, name)
            if not points or any(a >= b for a, b in pairwise(points)) or points[0] < 0:
                raise ValueError(f"{name} of cost curves must ascend, got {points}")
        if self.rows[0] != 1 or self.rows[-1] != MAX_ROWS:
            raise ValueError(f"cost curves must reach from 1 to {MAX_ROWS} rows, got rows {self.rows}")
        if len(self.verify) != len(self.contexts) or any(len(line) != len(self.rows) for line in self.verify):
            shape = (len(self.contexts), len(self.rows))
            raise ValueError(
                f"verify of cost curves must have shape {shape}, got lines {[len(x) for x in self.verify]}"
            )
        costs = [getattr(self, name) for name in _COSTS]
        if not all(math.isfinite(x) and x > 0 for line in self.verify for x in line):
            raise ValueError(f"verification takes a positive time, got {self.verify}")
        if not all(math.isfinite(x) and x >= 0 for x in costs):
            raise ValueError(f"{', '.join(_COSTS)} must be times of at least 0 ms, got {costs}")

    @classmethod
    def guess(cls) -> CostCurves:
        """Curves for a machine on which nothing was measured yet: 1.5 % per row, as while weights come from memory."""
        line = tuple(1 + 0.015 * (rows - 1) for rows in ROW_POINTS)
        return cls(ROW_POINTS, (0,), (line,), first_ms=0.1, row_ms=0.001, level_ms=0.05)

    def line(self, context: int) -> np.ndarray:
        """(len(rows),) ms of a verification at each of `rows`; linear between and beyond the measured contexts."""
        grid = np.asarray(self.verify)
        if len(self.contexts) == 1:
            return grid[0]
        last = len(self.contexts) - 2
        index = min(max(int(np.searchsorted(self.contexts, context, side="right")) - 1, 0), last)
        begin, end = self.contexts[index], self.contexts[index + 1]
        share = max((context - begin) / (end - begin), 0.0)
        line = grid[index] + share * (grid[index + 1] - grid[index])
        return np.maximum(line, grid[-1]) if share > 1 else line  # noise must not lead the line downwards

    def scaled(self, verify: float, draft: float) -> CostCurves:
        """The same curves on a machine that takes `verify` and `draft` times as long for the two models."""
        return replace(
            self,
            verify=tuple(tuple(verify * x for x in line) for line in self.verify),
            first_ms=draft * self.first_ms,
            row_ms=draft * self.row_ms,
            level_ms=draft * self.level_ms,
        )


def along_rows(points: Sequence[int], line: Sequence[float] | np.ndarray) -> np.ndarray:
    """(MAX_ROWS + 1,) the line's value at every number of rows; entry 0 repeats that of one row."""
    return np.interp(_ALL_ROWS, points, line)


_ALL_ROWS = np.arange(MAX_ROWS + 1)


def curves_path(description: Mapping[str, Any]) -> Path:
    """The file for the curves of what `description` describes (models, engine, machine), in the user's cache."""
    return described_path("curves", description)


def described_path(folder: str, description: Mapping[str, Any]) -> Path:
    """The file of the user's cache for what was measured of what `description` describes."""
    text = json.dumps(description, sort_keys=True, default=str)
    return user_cache() / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def user_cache() -> Path:
    """The folder for what Dovetail keeps between processes."""
    home = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "hf_dovetail"


def save_curves(curves: CostCurves, path: Path, description: Mapping[str, Any]) -> bool:
    """Write the curves at once or not at all; a file that cannot be written is a warning, and False."""
    content = {"format": _FORMAT, "description": dict(description), "curves": asdict(curves)}
    return write_whole(content, path, "the cost curves")


def write_whole(content: Mapping[str, Any], path: Path, what: str) -> bool:
    """Write JSON at once or not at all; a file that cannot be written is a warning that says `what`, and False."""
    try:
        replace_file(path, json.dumps(content, indent=1, default=str).encode())
    except OSError as error:
        logger.warning_once(f"{what} could not be kept ({error}); Dovetail goes on without the file")
        return False
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Write a file at once or not at all, whichever threads and processes do the same; its folder is made.

    Raises:
        OSError: if it cannot be written; what was there before is intact, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".partial", f"{path.name}.", path.parent) as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(content)
        partial.replace(path)


def load_curves(path: Path) -> CostCurves | None:
    """The curves of a file, or None if there is none; a file that holds something else is a warning, and None."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {_FORMAT}")
        values = content["curves"]
        values["verify"] = tuple(tuple(float(x) for x in line) for line in values["verify"])
        for name in ("rows", "contexts"):
            values[name] = tuple(int(x) for x in values[name])
        for name in _COSTS:
            values[name] = float(values[name])
        return CostCurves(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        logger.warning_once(
            f"the cost curves in {path} cannot be read ({type(error).__name__}: {error}); Dovetail measures as it "
            "goes; delete the file or run hf-dovetail calibrate"
        )
        return None
