"""From how many rows on a prompt is streamed: a pure function, on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dovetail.curves import MAX_ROWS
from hf_dovetail.prefill.threshold import LayerTimes, least_rows, load_times, save_times

LAPTOP = LayerTimes(34.0, ((64, 3.0), (1024, 30.0)), ((64, 90.0), (256, 350.0)))
"""A 7 B layer (405 MB in bf16) over 12 GB/s, 15 TFLOPS there, 0.3 here."""


def cost(times: LayerTimes, rows: int) -> tuple[float, float]:
    """(ms through the accelerator, ms on the CPU), by the straight lines through the points."""

    def along(points: tuple) -> float:
        (few, few_ms), (many, many_ms) = points
        return few_ms + (many_ms - few_ms) / (many - few) * (rows - few)

    return times.upload_ms + along(times.device), along(times.host)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (LAPTOP, MAX_ROWS + 1),  # pays at 29 rows; a verification stays
        (LayerTimes(340.0, LAPTOP.device, LAPTOP.host), 285),  # a slow link
        (LayerTimes(34.0, LAPTOP.device, ((64, 3.0), (256, 11.0))), 3723),  # a strong CPU
        (LayerTimes(34.0, LAPTOP.device, ((64, 2.0), (256, 7.0))), None),  # a CPU stronger than the GPU
        (LayerTimes(34.0, LAPTOP.device, ((64, 2.0), (256, 2.0))), None),
        (LayerTimes(1e9, LAPTOP.device, LAPTOP.host), None),
    ],
)
def test_rows_from_which_on_it_pays(times: LayerTimes, expected: int | None) -> None:
    rows = least_rows(times)
    assert rows == expected
    if rows is not None:
        there, here = cost(times, rows)
        assert there <= 0.9 * here * 1.0001
        if rows > MAX_ROWS + 1:
            there, here = cost(times, rows - 1)
            assert there > 0.9 * here * 0.9999


def test_a_quicker_link_or_a_slower_cpu_never_raises_the_threshold() -> None:
    def rows(upload: float, host: float) -> int:
        return least_rows(LayerTimes(upload, LAPTOP.device, ((64, 90.0 * host), (256, 350.0 * host)))) or 1 << 30

    for upload in (1.0, 30.0, 300.0, 3000.0):
        for host in (0.02, 0.1, 1.0, 10.0):
            assert rows(upload, host) >= max(rows(upload / 2, host), rows(upload, 2 * host))
    assert rows(300.0, 1.0) > rows(30.0, 0.1) or rows(300.0, 1.0) > rows(30.0, 1.0)


@pytest.mark.parametrize(
    "values",
    [
        (0.0, LAPTOP.device, LAPTOP.host),
        (float("nan"), LAPTOP.device, LAPTOP.host),
        (1.0, ((64, 1.0), (64, 2.0)), LAPTOP.host),
        (1.0, LAPTOP.device, ((64, -1.0), (256, 2.0))),
    ],
)
def test_times_that_no_clock_shows_are_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match=r"positive times|ascend"):
        LayerTimes(*values)


def test_times_survive_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "times.json"
    assert load_times(path) is None
    assert save_times(LAPTOP, path, {"a": 1})
    assert load_times(path) == LAPTOP
    for text in ("{}", "no json", '{"times": {"upload_ms": 0, "device": [], "host": []}}'):
        path.write_text(text)
        assert load_times(path) is None
    assert not save_times(LAPTOP, path / "below", {})
