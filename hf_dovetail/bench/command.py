"""The subcommand `hf-dovetail bench`: measure, show and compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DEFAULT_OUT = "bench.json"


def add_bench_parser(commands: Any) -> None:
    """Add `bench` to the subparsers of the command line; imports nothing heavy."""
    bench = commands.add_parser(
        "bench", help="measure plain decoding, Dovetail and its rivals on this machine, and compare measurements"
    )
    bench.add_argument("--target", help="folder of the target (default: the pair in the package)")
    bench.add_argument("--draft", help="folder of its draft")
    bench.add_argument("--assistant", help="folder of a small LM for transformers' assisted generation")
    bench.add_argument("--widen", default="1B", help="0.5B, 1B, 3B, or none (default: %(default)s)")
    bench.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (default: %(default)s)")
    bench.add_argument(
        "--prompts",
        nargs="+",
        default=["easy", "medium", "hard"],
        metavar="SET",
        help="easy (repetitive text), medium (HumanEval), hard (the same, sampled at temperature 1), "
        "or JSONL and text files",
    )
    bench.add_argument("--prompts-per-set", type=int, help="use only the first so many prompts of each set")
    bench.add_argument("--new-tokens", type=int, default=64, help="tokens of each answer (default: %(default)s)")
    bench.add_argument("--repeats", type=int, default=2, help="answers per row and turn (default: %(default)s)")
    bench.add_argument("--cycles", type=int, default=2, help="turns of each engine (default: %(default)s)")
    bench.add_argument("--engines", nargs="+", metavar="ENGINE", help="engines to measure (default: all)")
    bench.add_argument("--rows", nargs="+", metavar="ROW", help="rows to measure beside plain (default: all)")
    bench.add_argument("--out", default=DEFAULT_OUT, help="file for the result (default: %(default)s)")
    bench.add_argument("--plot", metavar="FILE", help="draw the rows as bars (.png, .svg or .pdf)")
    bench.set_defaults(run=run_bench)
    actions = bench.add_subparsers(metavar="{compare,show}")
    compare = actions.add_parser("compare", help="two results side by side")
    compare.add_argument("first")
    compare.add_argument("second")
    compare.set_defaults(run=run_compare)
    show = actions.add_parser("show", help="a result as a table, and as bars")
    show.add_argument("result")
    show.add_argument("--plot", metavar="FILE", help="draw the rows as bars (.png, .svg or .pdf)")
    show.set_defaults(run=run_show)


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure, write the JSON, print the table.

    Raises:
        ValueError: for options that name nothing known, files that cannot be written, or numbers out of range.
    """
    import torch
    from transformers.utils import logging

    from .files import check_can_write
    from .models import load_models
    from .plot import check_can_plot, plot_bars
    from .report import ratios, table
    from .run import Run

    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if arguments.dtype not in dtypes:
        raise ValueError(f"--dtype is {arguments.dtype!r}; expected {' or '.join(dtypes)}")
    settings = _settings(arguments)
    if arguments.plot:
        check_can_plot(arguments.plot)
    check_can_write("--out", arguments.out)
    out = Path(arguments.out)
    logging.disable_progress_bar()
    models = load_models(
        arguments.target, arguments.draft, arguments.assistant, arguments.widen, dtypes[arguments.dtype], settings.shape
    )
    run = Run(models, settings, say=lambda text: print(text, file=sys.stderr, flush=True))
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    for result in run.results():  # what is measured stays, should the run be stopped
        result["command"] = f"hf-dovetail {' '.join(words)}"
        result["ratios"] = ratios(result)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))
    print(f"wrote {out}")
    if arguments.plot:
        plot_bars(result, arguments.plot)


def run_compare(arguments: argparse.Namespace) -> None:
    """Print two results side by side."""
    from .report import compare, load

    print(compare(load(arguments.first), load(arguments.second)))


def run_show(arguments: argparse.Namespace) -> None:
    """Print a result, and draw it if asked to."""
    from .plot import check_can_plot, plot_bars
    from .report import load, table

    if arguments.plot:
        check_can_plot(arguments.plot)
    result = load(arguments.result)
    print(table(result))
    if arguments.plot:
        plot_bars(result, arguments.plot)


def _settings(arguments: argparse.Namespace) -> Any:
    """The run's settings from the command line, checked."""
    from dataclasses import replace

    from .prompts import prompt_sets
    from .rows import ROW_NAMES
    from .run import ENGINE_NAMES, Settings

    for name, least in (("new_tokens", 2), ("repeats", 1), ("cycles", 1), ("prompts_per_set", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    for option, given, known in (
        ("--engines", arguments.engines, ENGINE_NAMES),
        ("--rows", arguments.rows, ROW_NAMES),
    ):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            raise ValueError(f"{option}: unknown {', '.join(unknown)}; expected some of {', '.join(known)}")
    groups = prompt_sets(arguments.prompts)
    return Settings(
        prompts=tuple(replace(group, prompts=group.prompts[: arguments.prompts_per_set]) for group in groups),
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        cycles=arguments.cycles,
        engines=tuple(arguments.engines or ENGINE_NAMES),
        rows=tuple(arguments.rows) if arguments.rows else None,
    )
