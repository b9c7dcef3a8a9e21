"""The command `hf-dovetail calibrate`: measures the cost curves of a pair of models, keeps them, and draws them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .curves import CostCurves
from .loading import load_target
from .names import existing


def add_calibrate_parser(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    parser = commands.add_parser("calibrate", help="measure what rounds cost on this machine, for draft.tree = auto")
    parser.add_argument("--target", help="folder or name of the target (default: the pair in the package)")
    parser.add_argument("--draft", help="folder or name of its draft")
    parser.add_argument("--engine", default="auto", help="how the target's layers run (default: %(default)s)")
    parser.add_argument("--budget-s", type=float, default=8.0, help="seconds to spend (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file, such as curve.png")
    parser.set_defaults(run=run_calibrate)


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Measure, keep, print and, if asked to, draw.

    Raises:
        ValueError: if only one of target and draft is given, the budget is no time, or matplotlib is not installed.
    """
    if (arguments.target is None) != (arguments.draft is None):
        raise ValueError("give both --target and --draft, or neither for the pair in the package")
    if not 0 < arguments.budget_s < math.inf:
        raise ValueError(f"--budget-s is {arguments.budget_s}; expected a number of seconds, more than 0")
    pyplot = None if arguments.plot is None else _pyplot(arguments.plot)

    from .calibrate import calibrate
    from .demo import load_pair
    from .engines import engine_of
    from .modeling import DovetailAssistantModel
    from .prepare import prepare_target

    if arguments.target is None:
        target, draft, _ = load_pair()
    else:
        target = load_target("--target", arguments.target)
        draft = DovetailAssistantModel.from_pretrained(existing("--draft", arguments.draft), dtype="auto")
    prepare_target(target, engine=arguments.engine)
    curves = calibrate(target, draft, budget_s=arguments.budget_s)
    print(f"engine {engine_of(target)}\n{table(curves)}")
    if pyplot is not None:
        plot(curves, arguments.plot, pyplot)
        print(f"the plot is in {arguments.plot}")


def table(curves: CostCurves) -> str:
    """The curves as text."""
    lines = ["context | verify ms at " + " ".join(f"{rows:>7d}" for rows in curves.rows) + " rows"]
    for context, line in zip(curves.contexts, curves.verify, strict=True):
        lines.append(f"{context:7d} |              " + " ".join(f"{ms:7.2f}" for ms in line))
    lines.append(
        f"draft: first level {curves.first_ms:.2f} ms, each further level {curves.level_ms:.2f} ms, "
        f"each token of a prompt {curves.row_ms:.3f} ms"
    )
    lines.append(f"rest of a round: {curves.overhead_ms:.2f} ms, with a tree {curves.tree_ms:.2f} ms more")
    return "\n".join(lines)


def plot(curves: CostCurves, path: Path, pyplot: Any) -> None:
    """Draw verification over rows, one line per context, and the draft's time over levels."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), width_ratios=(2, 1), layout="constrained")
    for context, line in zip(curves.contexts, curves.verify, strict=True):
        left.plot(curves.rows, line, marker="o", label=f"{context} positions in the cache")
    left.set(title="Target: one verification", xlabel="rows (root and nodes)", ylabel="ms", ylim=(0, None))
    left.set_xticks(curves.rows)
    left.legend()
    levels = range(1, 12)
    right.plot(levels, [curves.first_ms + (n - 1) * curves.level_ms for n in levels], marker="o", color="tab:green")
    right.set_xticks(levels)
    right.set(title="Draft: one tree", xlabel="levels", ylabel="ms", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot(path: Path) -> Any:
    """matplotlib without a window, before anything is measured."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib, which is not installed; pip install 'hf_dovetail[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ValueError(f"--plot is {str(path)!r}; expected a file ending in {', '.join(sorted(known))}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot is {str(path)!r}; there is no folder {path.parent}")
    return pyplot
