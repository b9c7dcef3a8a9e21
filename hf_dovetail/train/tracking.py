"""The figures of a run, step by step: a CSV file, TensorBoard, or any of accelerate's trackers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import LoggerType

from .files import naming, write_whole
from .validate import SHAPE

COLUMNS = ("step", "loss", "learning_rate", "tokens_per_round", *(f"depth_{d + 1}" for d in range(SHAPE.levels)))


class CsvTracker(GeneralTracker):
    """One line per step; a resumed run goes on behind the last step of its checkpoint.

    Args:
        path: of the file.
        step: steps that are finished; later lines are of a run that was killed, and are dropped.
    """

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def tracker(self) -> Path:
        """The file."""
        return self._path

    @on_main_process
    def keep_until(self, step: int) -> None:
        """Drop the lines behind `step` finished steps: a killed run wrote them after its checkpoint.

        Raises:
            OSError: if the file cannot be written; it is as it was.
        """
        kept: list[dict[str, str]] = []
        if step and self._path.exists():
            with self._path.open(newline="") as lines:
                kept = list(islice(csv.DictReader(lines), step))

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(kept)

        write_whole(self._path, write, "the figures of all steps")

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The recipe has a file of its own."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Write a line.

        Raises:
            OSError: if it cannot be written; a part of it may be.
        """
        with naming(self._path, "the figures of a step"), self._path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({"step": step, **values})


def trackers(names: Sequence[str], csv_path: Path) -> tuple[CsvTracker, list[str | GeneralTracker]]:
    """The CSV file, which every run writes, and beside it those of accelerate's trackers that `names` asks for.

    Raises:
        ValueError: if one is not installed, which accelerate would pass over, or there is none of that name.
    """
    known = [str(name) for name in LoggerType if name != LoggerType.ALL]
    here = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in (*known, "all"):
            raise ValueError(f"there is no tracker {name!r}; expected all, or some of {', '.join(known)}")
        if name in known and name not in here:
            raise ValueError(f"{name} is not installed; pip install {name}, or leave out --log-with {name}")
    file = CsvTracker(csv_path)
    return file, [file, *names]
