"""Automatic trees against the best fixed shape: a grid of shapes on the same prompts, interleaved, on a widened target.

    python benchmarks/shapes.py --widen 1B --engines onednn int8      # writes results/shapes.json
    python benchmarks/shapes.py --widen none --new-tokens 16          # the pair as it is: minutes become seconds

A fixed shape is constant in a row; "auto" is what a user gets. No fixed shape looks anything up in the prompt and
none pauses, so auto may be ahead of the best of them; how far it is behind is the price of not knowing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

import common
import torch
from transformers.utils import logging

from hf_dovetail import TreeShape
from hf_dovetail.bench.models import load_models
from hf_dovetail.bench.prompts import NAMES, prompt_set
from hf_dovetail.bench.rows import PLAIN, dovetail
from hf_dovetail.bench.run import Run, Settings

GRID = [
    TreeShape(nodes, depth, top_k)
    for nodes, depth, top_k in (
        (3, 2, 1), (3, 1, 3), (7, 6, 1), (7, 4, 10), (7, 2, 10), (12, 5, 10), (16, 15, 1), (16, 7, 10), (16, 4, 10),
        (20, 19, 1), (24, 9, 10), (31, 10, 10), (31, 19, 3),
    )
]  # fmt: skip
AUTO = "auto"


def name_of(shape: TreeShape) -> str:
    """As rows are called."""
    return f"{shape.nodes}/{shape.depth}/{shape.top_k}"


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each engine and prompt set: auto's time over that of the best fixed shape, and which that is."""
    found = []
    for engine in result["engines"]:
        for name in result["settings"]["prompts"]:
            rows = {
                row["row"]: row["decode_ms_per_token"]
                for row in result["rows"]
                if (row["engine"], row["prompts"]) == (engine, name)
            }
            fixed = {row: ms for row, ms in rows.items() if row not in (PLAIN, AUTO)}
            best = min(fixed, key=fixed.__getitem__)
            found.append(
                {
                    "engine": engine,
                    "prompts": name,
                    "plain_ms": rows[PLAIN],
                    "auto_ms": rows[AUTO],
                    "best_fixed": best,
                    "best_fixed_ms": fixed[best],
                    "median_fixed_ms": round(statistics.median(fixed.values()), 3),
                    "auto_over_best_fixed": round(rows[AUTO] / fixed[best], 3),
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widen", default="1B", help="geometry of the target, or none")
    parser.add_argument("--engines", nargs="+", default=["onednn"])
    parser.add_argument("--prompts", nargs="+", default=list(NAMES))
    parser.add_argument("--prompts-per-set", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="shapes")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    models = load_models(None, None, None, arguments.widen, torch.bfloat16, TreeShape())
    draft = next(row.draft for row in models.rows if row.draft is not None)
    rows = [models.rows[0], dovetail(AUTO, draft, AUTO), *(dovetail(name_of(shape), draft, shape) for shape in GRID)]
    groups = [prompt_set(name) for name in arguments.prompts]
    settings = Settings(
        prompts=tuple(replace(group, prompts=group.prompts[: arguments.prompts_per_set]) for group in groups),
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        cycles=1,
        engines=tuple(arguments.engines),
    )
    run = Run(replace(models, rows=rows), settings, say=lambda text: print(text, file=sys.stderr, flush=True))
    for result in run.results():
        common.write(arguments.name, {**result, "against_the_best_fixed": summary(result)})
    for line in summary(result):
        print(line)


if __name__ == "__main__":
    main()
