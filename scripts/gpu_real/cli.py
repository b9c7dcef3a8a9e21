"""The command line: one step per call. Bad use ends with one line that says what to do."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from transformers.utils import logging

from hf_dovetail.devices import resolve_device

from . import __doc__ as ABOUT
from .corpus import make_corpus
from .drafts import train_drafts
from .measure import measure, table
from .plan import FULL, TOY, Work
from .target import train_target

ROOT = Path(__file__).resolve().parents[2]
MINUTES = {"data": 1.0, "target": 6.0, "draft": 3.0, "measure": 4.0}


def parser() -> argparse.ArgumentParser:
    """Arguments of every step; each step reads its own."""
    made = argparse.ArgumentParser(
        prog="gpu_real", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("step", choices=[*MINUTES, "all"])
    made.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_real", help="folder of the run")
    made.add_argument("--minutes", type=float, help=f"wall-clock budget of the step; by default {MINUTES}")
    made.add_argument("--device", default="auto", help="where is trained, and where the draft drafts")
    made.add_argument("--toy", action="store_true", help="a size for seconds on a CPU")
    made.add_argument("--no-compile", action="store_true", help="target: do not compile its layers (only GPUs do)")
    made.add_argument("--blocks", type=int, nargs="+", default=[1, 2], help="draft: a draft for each number")
    made.add_argument("--threads", type=int, help="measure: threads of the target; by default the fastest")
    made.add_argument("--engines", nargs="+", help="measure: engines; by default all that the package has")
    made.add_argument("--out", type=Path, help="measure: the JSON; by default gpu_real.json in $OUT or in the results")
    made.add_argument("--commit", help="measure: commit of the source, where its history is not at hand")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run a step, or all of them."""
    made = parser()
    given = made.parse_args(arguments)
    logging.disable_progress_bar()
    try:
        if given.minutes is not None and not given.minutes > 0:
            raise ValueError(f"--minutes is {given.minutes}; expected more than 0")
        for step in MINUTES if given.step == "all" else [given.step]:
            run(step, given)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"gpu_real: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(step: str, given: argparse.Namespace) -> None:
    """One step; its budget counts from here."""
    began, size, work = time.perf_counter(), TOY if given.toy else FULL, Work(given.work)
    minutes, device = given.minutes or MINUTES[step], resolve_device(given.device)
    if step == "data":
        make_corpus(work, size)
    elif step == "target":
        compiled = device.type == "cuda" and not given.no_compile
        train_target(work, size, minutes, device, began, compiled)
    elif step == "draft":
        train_drafts(work, size, given.blocks, minutes, device)
    else:
        out = given.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results") / "gpu_real.json"
        result = measure(work, size, minutes, device, began, out, given.threads, given.engines, given.commit)
        print(table(result["rows"]))
        for refused in result["refused"]:
            print("refused:", {name: value for name, value in refused.items() if value is not None})
        print(f"wrote {out}")
    print(f"{step}: {(time.perf_counter() - began) / 60:.2f} minutes", flush=True)
