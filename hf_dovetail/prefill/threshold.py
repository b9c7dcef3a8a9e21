"""From how many rows on a prompt is faster through the accelerator: pure numbers, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..curves import MAX_ROWS, write_whole

logger = logging.get_logger(__name__)

_FORMAT = 1
_ENOUGH = 0.9  # of the CPU's time: what is gained must be seen beyond the noise of a short measurement
_MOST_ROWS = 1 << 20


@dataclass(frozen=True)
class LayerTimes:
    """What one layer of the target takes.

    Args:
        upload_ms: bringing its weights to the accelerator, in the order in which kernels read them.
        device: two points (rows, ms) of computing it there, with the way of its new keys and values back.
        host: two points (rows, ms) of computing it on the CPU.

    Raises:
        ValueError: if the points do not ascend or a time is not positive.
    """

    upload_ms: float
    device: tuple[tuple[int, float], tuple[int, float]]
    host: tuple[tuple[int, float], tuple[int, float]]

    def __post_init__(self) -> None:
        times = [self.upload_ms, *(ms for points in (self.device, self.host) for _, ms in points)]
        if not all(math.isfinite(ms) and ms > 0 for ms in times):
            raise ValueError(f"a layer takes positive times, got {self}")
        if any(points[0][0] >= points[1][0] for points in (self.device, self.host)):
            raise ValueError(f"the points of a layer's times must ascend in rows, got {self}")


def least_rows(times: LayerTimes) -> int | None:
    """The rows from which on upload and computation there take at most 0.9 of the CPU's time; None for never.

    Both computations are taken for linear in the rows beyond the measured points. The sum is the worst case, without
    any overlap of upload and computation. Never fewer than a verification has at most (`MAX_ROWS`): those stay.
    """
    device_begin, device_row = _line(times.device)
    host_begin, host_row = _line(times.host)
    gain = _ENOUGH * host_row - device_row
    lead = times.upload_ms + device_begin - _ENOUGH * host_begin
    if gain <= 0:
        return None
    rows = max(math.ceil(lead / gain), MAX_ROWS + 1)
    return rows if rows <= _MOST_ROWS else None


def _line(points: tuple[tuple[int, float], tuple[int, float]]) -> tuple[float, float]:
    """(ms at no rows, ms per row) of the line through two points, neither below zero."""
    (few, few_ms), (many, many_ms) = points
    slope = max(many_ms - few_ms, 0.0) / (many - few)
    return max(few_ms - slope * few, 0.0), slope


def save_times(times: LayerTimes, path: Path, description: Mapping[str, Any]) -> bool:
    """Write the times at once or not at all; a file that cannot be written is a warning, and False."""
    content = {"format": _FORMAT, "description": dict(description), "times": asdict(times)}
    return write_whole(content, path, "what a layer takes on the accelerator")


def load_times(path: Path) -> LayerTimes | None:
    """The times of a file, or None if there is none; a file that holds something else is a warning, and None."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["times"]
        points = {name: tuple((int(rows), float(ms)) for rows, ms in values[name]) for name in ("device", "host")}
        return LayerTimes(float(values["upload_ms"]), **points)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        logger.warning_once(
            f"the times in {path} cannot be read ({type(error).__name__}: {error}); they are measured again"
        )
        return None
