"""Results as text: the table of a run, the ratios that matter, and the comparison of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .layout import faults
from .rows import PLAIN, ROW_NAMES
from .run import FORMAT, KIND, LLAMA_ENGINES

_MUST_AGREE = ("cpu", "cores", "threads", "cpu_capability", "accelerator", "torch", "transformers", "python")


def load(path: str) -> dict[str, Any]:
    """A result that `hf-dovetail bench` wrote.

    Raises:
        ValueError: if the file is not there, holds something else, or not all of a result.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; give the JSON that hf-dovetail bench --out wrote") from error
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give the file that hf-dovetail bench --out wrote") from error
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise ValueError(f'{path} is not a result of hf-dovetail bench: it does not say "kind": "{KIND}"')
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} has format {result.get('format')!r}, this version reads {FORMAT}; measure again")
    damaged = faults(result)
    if damaged:
        places = ", ".join(damaged[:8])
        raise ValueError(f"{path} is damaged: it lacks {places}, or something else stands there; measure again")
    return result


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """The ratios of one run; those whose rows were not measured are left out. Speedups are above 1 when faster."""
    found: dict[str, float] = {}

    def enter(name: str, numerator: float | None, denominator: float | None) -> None:
        if numerator and denominator:
            found[name] = round(numerator / denominator, 3)

    def verify(engine: str, rows: int) -> float | None:
        return result["engines"].get(engine, {}).get("verify_ms", {}).get(str(rows), {}).get("median")

    engines = [engine for engine in result["engines"] if engine not in LLAMA_ENGINES]
    for engine in engines:
        enter(f"verify {engine}: 16 rows / 1 row", verify(engine, 16), verify(engine, 1))
    for one, other, rows in (
        ("onednn", "eager", 16),
        ("int8", "onednn", 16),
        ("onednn", "ipex", 1),
        ("onednn", "ipex", 16),
    ):
        enter(f"verify {rows} rows: {one} / {other}", verify(one, rows), verify(other, rows))
    times = {(row["engine"], row["row"], row["prompts"]): row["decode_ms_per_token"] for row in result["rows"]}
    for group in result["settings"]["prompts"]:
        for engine in engines:
            plain = times.get((engine, PLAIN, group))
            enter(
                f"{group} {engine}: random-draft-auto over plain",
                plain,
                times.get((engine, "random-draft-auto", group)),
            )
            for name in (row for row in ROW_NAMES if row.startswith("dovetail")):
                ours = times.get((engine, name, group))
                what = f"{group} {engine}: {name} over"
                enter(f"{what} plain", plain, ours)
                enter(f"{what} plain eager", times.get(("eager", PLAIN, group)), ours)
                for rival in ("assisted", "lookup"):
                    mine = (engine, group)
                    best = [t for (at, row, of), t in times.items() if (at, of) == mine and row.startswith(rival)]
                    enter(f"{what} the best {rival}", min(best, default=None), ours)
                for rival in LLAMA_ENGINES:
                    for row in (PLAIN, "lookup-10"):
                        enter(f"{what} {rival} {row}", times.get((rival, row, group)), ours)
    return found


def table(result: dict[str, Any]) -> str:
    """The run as text."""
    target, machine = result["models"]["target"], result["record"]
    label = f", widened to {result['widened']}" if result["widened"] else ""
    lines = [
        f"target   {target['name']}{label}: {target['parameters'] / 1e6:.1f} M parameters, "
        f"{target['bytes'] / 1e9:.2f} GB, {target['dtype']}",
        f"machine  {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"transformers {machine['transformers']}",
        f"ceiling  {result['ceiling']['read_gb_s']:.1f} GB/s read",
        "",
    ]
    for engine, parts in result["engines"].items():
        share = f"{parts['one_token_ms']:8.2f} ms per token = {parts['percent_of_ceiling']:.0f} % of the ceiling"
        curve = ", ".join(f"{rows}: {ms['median']:.1f}" for rows, ms in parts.get("verify_ms", {}).items())
        lines.append(f"{engine:16}{share}" + (f"; verify ms by rows {curve}" if curve else ""))
    for name, cost in result["draft_ms_per_round"].items():
        lines.append(f"{name + ' draft':16}{cost['median']:8.2f} ms per tree of the fixed shape")
    lines += [
        "",
        f"{'engine':15}{'row':26}{'prompts':10}{'ms/token':>9}{'decode':>9}{'per round':>10}{'identical':>11}",
    ]
    lines += [
        f"{row['engine']:15}{row['row']:26}{row['prompts']:10}{row['ms_per_token']:9.2f}"
        f"{row['decode_ms_per_token']:9.2f}{row['tokens_per_round']:10.2f}{row['identical_to_plain']:>11}"
        for row in result["rows"]
    ]
    lines += ["", *(f"{value:7.2f}  {name}" for name, value in ratios(result).items())]
    disturbed = sum(row.get("answers_on_shared_cores", 0) for row in result["rows"])
    if disturbed:
        lines.append(
            f"warning: the cores were shared in {disturbed} of Dovetail's answers (other processes, or a CPU quota); "
            "that slows all rows, the others most, so run it again on a quiet machine"
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for skipped in result["skipped"]:
        what = (f"{skipped['engine']} {skipped['row'] or ''}".strip(), skipped["reason"])
        reasons.setdefault(what, []).append(skipped["prompts"] or "all prompts")
    lines += [f"skipped {what} ({', '.join(groups)}): {reason}" for (what, reason), groups in reasons.items()]
    return "\n".join(lines)


def warnings(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What makes two runs hard to compare: other machine, threads, versions, models or settings."""
    found = [
        f"{name} differs: {first['record'].get(name)} and {second['record'].get(name)}"
        for name in _MUST_AGREE
        if first["record"].get(name) != second["record"].get(name)
    ]
    for name in ("widened", "settings", "models"):
        if first[name] != second[name]:
            found.append(f"{name} differ: {first[name]} and {second[name]}")
    return found


def compare(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Both runs' rows side by side; the ratio is above 1 where the second is faster."""
    lines = [f"warning: {text}" for text in warnings(first, second)]
    lines += [
        f"first   commit {first['record']['commit']}, {first['record']['date']}",
        f"second  commit {second['record']['commit']}, {second['record']['date']}",
        "",
        f"{'engine':15}{'row':26}{'prompts':10}{'first ms':>10}{'second ms':>10}{'ratio':>7}   (decoding, per token)",
    ]
    for key, ours in _times(first).items():
        theirs = _times(second).get(key)
        right = f"{theirs:10.2f}{ours / theirs:7.2f}" if theirs else f"{'-':>10}{'-':>7}"
        lines.append(f"{key[0]:15}{key[1]:26}{key[2]:10}{ours:10.2f}{right}")
    for key, theirs in _times(second).items():
        if key not in _times(first):
            lines.append(f"{key[0]:15}{key[1]:26}{key[2]:10}{'-':>10}{theirs:10.2f}{'-':>7}")
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Decoding ms per token of each row, and of each engine's verification."""
    times = {(row["engine"], row["row"], row["prompts"]): row["decode_ms_per_token"] for row in result["rows"]}
    for engine, parts in result["engines"].items():
        for rows, ms in parts.get("verify_ms", {}).items():
            times[engine, f"verify of {rows} rows", "-"] = ms["median"]
    return times
