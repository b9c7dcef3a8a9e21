"""Automatic trees against the best fixed shape, on real text at the prices of measured machines: no clock is read.

    python benchmarks/priced.py                    # writes results/priced.json
    python benchmarks/priced.py --prompts-per-set 3 --machines "fast, int8" --name scratch
    python benchmarks/priced.py --first-answers --prompts-per-set 10 --name first_answers

The pair in the package decodes real prompts; what a round takes is added up from what `hf-dovetail bench` has measured
on a machine: a verification by its rows, a tree by its levels, the rest of a round. So many prompts can be compared and
nothing disturbs them: what lies between auto and the best shape is what the controller does not know, or does wrong.
`benchmarks/shapes.py` measures the same with clocks, on a few prompts. Fixed shapes look nothing up and never pause.
With --first-answers every answer is a process's first: nothing is known of the text, and of the machine either what
calibration has measured, or nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from common import RESULTS, humaneval_prompts, write
from shapes import AUTO, GRID, name_of
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape, plugin, prepare_target
from hf_dovetail.accept import Accepted
from hf_dovetail.bench.prompts import NAMES, PromptSet, prompt_set
from hf_dovetail.bench.rows import randomised
from hf_dovetail.controller import AutoController, Controller
from hf_dovetail.costs import Costs
from hf_dovetail.curves import MAX_ROWS, CostCurves, along_rows
from hf_dovetail.demo import load_pair
from hf_dovetail.experience import Experience
from hf_dovetail.tree import DraftTree

SHAPES = GRID + [
    TreeShape(nodes, depth, top_k)
    for nodes, depth, top_k in (
        (1, 0, 1), (2, 1, 1), (3, 2, 3), (5, 4, 1), (5, 3, 3), (5, 4, 10), (7, 3, 3), (9, 5, 10), (9, 8, 1),
        (12, 7, 10), (12, 11, 1), (20, 7, 10), (24, 5, 10), (24, 15, 10),
    )
]  # fmt: skip
RUNS = {"fast": "widened_1b", "slow cores": "widened_1b_slow_cores", "avx2": "widened_1b_avx2"}
"""Machines, and the runs of `hf-dovetail bench` that measured them."""
DRAFT_IN_ROUNDS = 2.5
"""Times as long as back to back takes a tree between two passes of the target: 4.1 and 7.7 ms in the first two runs."""
_LEVELS = 8  # of the tree that those runs timed
_PLAIN_REST_MS = 0.2
_USUAL = 8  # tokens to catch up with that cost nothing more


@dataclass(frozen=True)
class Spent:
    """What one round is paid for.

    Args:
        rows: verified, the root among them.
        levels: grown; 0 without a tree.
        waiting: tokens that the draft caught up with.
        tokens: gained.
    """

    rows: int
    levels: int
    waiting: int
    tokens: int


@dataclass(frozen=True)
class Prices:
    """What the parts of a round cost, in ms."""

    curves: CostCurves

    def verify(self, rows: int) -> float:
        return float(along_rows(self.curves.rows, self.curves.line(0))[rows])

    def draft(self, levels: int, waiting: int) -> float:
        curves = self.curves
        caught_up = max(waiting - _USUAL, 0) * curves.row_ms
        return curves.first_ms + (levels - 1) * curves.level_ms + caught_up if levels else 0.0

    def rest(self, rows: int, tokens: int) -> float:
        return tokens * self.curves.overhead_ms + (self.curves.tree_ms if rows > 1 else 0.0)

    @property
    def plain(self) -> float:
        return self.verify(1) + self.rest(1, 1)

    def per_token(self, rounds: Sequence[Spent]) -> float:
        parts = (
            self.verify(one.rows) + self.draft(one.levels, one.waiting) + self.rest(one.rows, one.tokens)
            for one in rounds
        )
        return sum(parts) / sum(one.tokens for one in rounds)


class Fixed(Controller):
    """A fixed shape that keeps account of its rounds."""

    def __init__(self, shape: TreeShape, spent: list[Spent]) -> None:
        super().__init__(shape)
        self._spent = spent

    def plan(self, most: TreeShape, context: int, waiting: int, remaining: int) -> TreeShape:
        self._round = most.levels if most.nodes else 0, waiting
        return most

    def learn(self, tree: DraftTree, accepted: Accepted, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        self._spent.append(Spent(tree.num_nodes + 1, *self._round, len(accepted.tokens)))


class Priced(AutoController):
    """Automatic trees that keep account of their rounds, and believe that those took what they are priced at."""

    def __init__(
        self, prices: Prices, costs: Costs, experience: Experience, spent: list[Spent], on_host: bool = True
    ) -> None:
        ticks = count()
        super().__init__(costs, experience, on_host, clock=lambda: 1e-3 * prices.curves.level_ms * next(ticks))
        self._at, self._spent = prices, spent

    def learn(self, tree: DraftTree, accepted: Accepted, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        rows, tokens, at = tree.num_nodes + 1, len(accepted.tokens), self._at
        levels = self._levels_grown() if self._plan.nodes else 0
        self._spent.append(Spent(rows, levels, self._waiting, tokens))
        models = at.draft(levels, self._waiting), at.verify(rows)
        super().learn(tree, accepted, *models, sum(models) + at.rest(rows, tokens))


def machines() -> dict[str, Prices]:
    """The engines of the measured machines."""
    found = {}
    for name, run in RUNS.items():
        result = json.loads((RESULTS / f"{run}.json").read_text())
        rest = {
            row["engine"]: row["overhead_ms_per_round"]
            for row in result["rows"]
            if (row["row"], row["prompts"]) == ("dovetail-auto", "medium")
        }
        tree_ms = DRAFT_IN_ROUNDS * result["draft_ms_per_round"]["small"]["median"]
        for engine, measured in result["engines"].items():
            if measured.get("verify_ms"):
                found[f"{name}, {engine}"] = Prices(_curves(measured["verify_ms"], tree_ms, rest[engine]))
    return found


def _curves(verify: dict[str, Any], draft_ms: float, rest_ms: float) -> CostCurves:
    """A tree's first level, which catches up, is taken to cost two, and a token of a prompt a sixteenth of one."""
    points = tuple(rows for rows in sorted(map(int, verify)) if rows <= MAX_ROWS)
    line, level_ms = tuple(verify[str(rows)]["median"] for rows in points), draft_ms / (_LEVELS + 1)
    return CostCurves(points, (0,), (line,), 2 * level_ms, level_ms / 16, level_ms, _PLAIN_REST_MS, rest_ms)


@contextmanager
def controlled(make: Callable[[], Controller]) -> Iterator[None]:
    """Let answers be decoded with such controllers."""
    before = plugin._controller
    plugin._controller = lambda *arguments: (None, make())
    try:
        yield
    finally:
        plugin._controller = before


@dataclass(frozen=True)
class Decoding:
    """The pair, and how long its answers are."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int

    def answers(self, group: PromptSet, draft: DovetailAssistantModel, make: Callable[[], Controller]) -> None:
        """Answer a set's prompts one after the other, each under a controller of its own."""
        with controlled(make):
            for number, prompt in enumerate(group.prompts):
                torch.manual_seed(number)
                inputs = self.tokenizer(prompt, return_tensors="pt")
                options = {**group.sampling, "max_new_tokens": self.new_tokens}
                self.target.generate(**inputs, assistant_model=draft, **options)

    def automatic(
        self, group: PromptSet, draft: DovetailAssistantModel, at: Prices, on_host: bool = True, measured: bool = True
    ) -> float:
        """ms per token of automatic trees that begin with no experience, with or without measured costs."""
        spent: list[Spent] = []
        draft.tree = AUTO
        costs, experience = Costs(at.curves if measured else None), Experience()
        self.answers(group, draft, lambda: Priced(at, costs, experience, spent, on_host))
        return at.per_token(spent)

    def fixed(self, group: PromptSet, draft: DovetailAssistantModel, shape: TreeShape) -> list[Spent]:
        """The rounds of a fixed shape."""
        spent: list[Spent] = []
        draft.tree = shape
        self.answers(group, draft, lambda: Fixed(shape, spent))
        return spent


def compare(
    decoding: Decoding,
    group: PromptSet,
    draft: DovetailAssistantModel,
    chosen: dict[str, Prices],
    random: DovetailAssistantModel,
) -> Iterator[dict[str, Any]]:
    """Of each machine: ms per token, plainly, with the best of the fixed shapes, and with automatic trees."""
    rounds = {name_of(shape): decoding.fixed(group, draft, shape) for shape in tqdm(SHAPES, desc=group.name)}
    for name, at in chosen.items():
        fixed = {shape: at.per_token(spent) for shape, spent in rounds.items()}
        best = min(fixed, key=fixed.__getitem__)
        ways = {
            "auto": decoding.automatic(group, draft, at),
            "auto, costs not measured": decoding.automatic(group, draft, at, measured=False),
            "auto, depth chosen ahead": decoding.automatic(group, draft, at, on_host=False),
        }
        yield {
            "machine": name,
            "prompts": group.name,
            "plain_ms": round(at.plain, 2),
            "best_fixed": best,
            "best_fixed_ms": round(fixed[best], 2),
            "over_best_fixed": {way: round(ms / fixed[best], 3) for way, ms in ways.items()},
            "random_draft_over_plain": round(decoding.automatic(group, random, at) / at.plain, 3),
            "fixed_ms": {shape: round(ms, 2) for shape, ms in fixed.items()},
        }


def first_answers(
    decoding: Decoding, group: PromptSet, draft: DovetailAssistantModel, chosen: dict[str, Prices]
) -> Iterator[dict[str, Any]]:
    """Of each machine: time of answers without experience over that of plain decoding, their mean."""
    alone = [replace(group, prompts=(prompt,)) for prompt in group.prompts]
    for name, at in chosen.items():
        ways = {"costs measured": True, "costs not measured": False}
        over_plain = {
            way: statistics.mean(decoding.automatic(one, draft, at, measured=measured) for one in alone) / at.plain
            for way, measured in ways.items()
        }
        yield {
            "machine": name,
            "prompts": group.name,
            "first_answers_over_plain": {way: round(ratio, 3) for way, ratio in over_plain.items()},
        }


def prompt_sets(prompts: int) -> list[PromptSet]:
    """Repetitive text, and as many problems of HumanEval as asked for, decoded greedily and sampled."""
    sets = [prompt_set(name) for name in NAMES]
    problems = tuple(humaneval_prompts()[:prompts])
    return [group if group.name == "easy" else replace(group, prompts=problems) for group in sets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts-per-set", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--machines", nargs="+", default=list(machines()))
    parser.add_argument("--first-answers", action="store_true")
    parser.add_argument("--name", default="priced")
    arguments = parser.parse_args()
    target, draft, tokenizer = load_pair(torch.bfloat16)
    prepare_target(target)
    random = randomised(draft)
    for model in (draft, random):
        model.draft_device = "cpu"
    decoding, chosen = Decoding(target, tokenizer, arguments.new_tokens), machines()
    chosen = {name: chosen[name] for name in arguments.machines}
    measure = first_answers if arguments.first_answers else partial(compare, random=random)
    found = []
    for group in prompt_sets(arguments.prompts_per_set):
        for line in measure(decoding, group, draft, chosen):
            print({key: value for key, value in line.items() if key != "fixed_ms"}, flush=True)
            found.append(line)
    write(
        arguments.name,
        {"prompts_per_set": arguments.prompts_per_set, "new_tokens": arguments.new_tokens, "results": found},
    )


if __name__ == "__main__":
    main()
