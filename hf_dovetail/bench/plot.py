"""Bars: tokens per second of each row, one panel for each set of prompts. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .files import check_can_write

_COLORS = {"plain": "#9aa0a6", "dovetail": "#1f77b4", "random": "#aec7e8", "assisted": "#ff7f0e", "lookup": "#2ca02c"}


def check_can_plot(path: str) -> None:
    """Refuse a plot that could not be drawn, before anything is measured.

    Raises:
        ValueError: if matplotlib is not installed, the file's kind is none that it writes, or it cannot be written.
    """
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the plot's file is {path!r}; expected a name that ends in .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib, which is not installed; pip install 'hf_dovetail[plot]'")
    check_can_write("--plot", path)


def plot_bars(result: dict[str, Any], path: str) -> None:
    """Draw the rows of a result to a file."""
    check_can_plot(path)
    from matplotlib.figure import Figure

    groups = list(result["settings"]["prompts"])
    rows = list(dict.fromkeys((row["engine"], row["row"]) for row in result["rows"]))
    speed = {(row["engine"], row["row"], row["prompts"]): 1e3 / row["decode_ms_per_token"] for row in result["rows"]}
    figure = Figure(figsize=(3.0 + 4.2 * len(groups), 1.6 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    places = _places(rows)
    for panel, group in zip(panels, groups, strict=True):
        lengths = [speed.get((*row, group), 0.0) for row in rows]
        colors = [_COLORS[row.split("-")[0]] for _, row in rows]
        bars = panel.barh(places, lengths, color=colors)
        panel.bar_label(bars, [f"{length:.1f}" if length else "not run" for length in lengths], padding=3, fontsize=8)
        panel.set_title(f"{group} prompts")
        panel.set_xlabel("tokens per second, decoding")
        panel.set_xlim(0, 1.15 * max([*lengths, 1e-9]))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [f"{engine}  {row}" for engine, row in rows], fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(_title(result), fontsize=10)
    figure.savefig(path, dpi=120)


def _places(rows: list[tuple[str, str]]) -> list[float]:
    """Heights of the bars, with a gap between engines."""
    places, height, before = [], 0.0, rows[0][0]
    for engine, _ in rows:
        height += 0.6 if engine != before else 0.0
        places.append(height)
        height, before = height + 1.0, engine
    return places


def _title(result: dict[str, Any]) -> str:
    target, machine = result["models"]["target"], result["record"]
    label = f" (widened to {result['widened']})" if result["widened"] else ""
    return (
        f"{target['name']}{label}, {target['parameters'] / 1e6:.0f} M parameters, {target['dtype']}; "
        f"{machine['cpu']}, {machine['threads']} threads"
    )
