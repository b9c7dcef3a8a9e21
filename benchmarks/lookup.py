"""Whether prompt lookup pays: copy-heavy and ordinary prompts with automatic trees, lookup on and off in turns.

    python benchmarks/lookup.py [--prompts 12] [--widened] [--models FOLDER --stories FILE]

The demo pair edits functions of the corpus' held-out files (the function, a comment that asks for it with a name
changed, and the first line of the answer) and continues HumanEval's prompts; with `--widened` the target is 66 M large
without change of its function, so that verifying costs more than drafting. With `--models` (a folder that holds two
babyllamas, one of which drafts for the other; they read letters, 256 at most) and `--stories` (JSONL, openings in
"turns"), the beginnings of openings are read on, alone and where they are told a second time. Each set has a draft of
its own that knows nothing at first; two prompts warm up. The times are those of decoding, without the prompt, of a
prompt's faster repeat: others may hold up the machine.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import ROOT, humaneval_prompts, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.bench.widen import map_draft, widen
from hf_dovetail.controller import AutoController
from hf_dovetail.demo import load_pair
from hf_dovetail.learned import Learned

sys.path.append(str(ROOT / "scripts"))
from demo_corpus import split_corpus  # the demo's own corpus; scripts/ is no package

GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "temperature": 1.0, "top_k": 0}
TARGET, DRAFT = "babyllama-tok361as105", "babyllama-tok105"
WARM_UP = 2
WIDENED = {
    "hidden_size": 768,
    "num_hidden_layers": 10,
    "intermediate_size": 2048,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
}
OPENING_CHARS = 80
LINES, FUNCTION_CHARS = (6, 20), 700
NEW_NAME = "renamed_value"


@dataclass
class Side:
    """A draft with lookup on or off, and what it took and gave: ms per prompt and repeat, tokens and rounds."""

    draft: DovetailAssistantModel
    looks_up: bool
    ms: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rounds: int = 0

    def result(self) -> dict[str, Any]:
        ms = [min(repeats) for repeats in self.ms]
        return {
            "ms_per_token": round(sum(ms) / sum(self.tokens), 3),
            "tokens_per_round": round(sum(self.tokens) * len(self.ms[0]) / self.rounds, 3),
            "rounds": self.rounds,
            "tokens": sum(self.tokens) * len(self.ms[0]),
        }


@contextmanager
def lookup(on: bool) -> Iterator[None]:
    """Calls inside look up, as they do by default, or do not."""
    usual = Learned.controller

    def controller(learned: Learned, do_sample: bool, on_host: bool) -> AutoController:
        made = usual(learned, do_sample, on_host)
        made.looks_up = on
        return made

    with patch.object(Learned, "controller", controller):
        yield


def edits(count: int) -> list[str]:
    """So many functions of held-out files, each followed by the first line of the same with a parameter renamed."""
    found = []
    for text in split_corpus()[1]:
        for node in ast.walk(ast.parse(text)):
            prompt = _edit(text, node) if isinstance(node, ast.FunctionDef) else None
            if prompt is not None:
                found.append(prompt)
                break  # one of a file
        if len(found) == count:
            break
    return found


def _edit(text: str, node: ast.FunctionDef) -> str | None:
    """The prompt of one function, or None if it is too short, too long, or uses no parameter often enough."""
    code = (ast.get_source_segment(text, node) or "").replace("\n" + " " * node.col_offset, "\n")
    names = [a.arg for a in node.args.args if len(a.arg) > 1 and a.arg != "self"]
    name = next((name for name in names if len(re.findall(rf"\b{name}\b", code)) >= 3), None)
    first = code.split("\n")[0]
    lines = len(code.split("\n"))
    if name is None or not first.endswith(":") or not LINES[0] <= lines <= LINES[1] or len(code) > FUNCTION_CHARS:
        return None
    renamed = re.sub(rf"\b{name}\b", NEW_NAME, first)
    return f"{code}\n\n\n# The same with {name} renamed to {NEW_NAME}\n{renamed}\n"


def quotations(openings: list[str]) -> list[str]:
    """Openings that are told again."""
    return [f'{opening}." Mom said it again: "{" ".join(opening.split()[:3])}' for opening in openings]


def measured(
    pair: Callable[[], tuple[Any, Any, Any]], prompts: list[str], sampling: dict, length: int, repeats: int
) -> dict[str, Any]:
    """One set of prompts, in turns with and without lookup."""
    target, draft, tokenizer = pair()
    sides = {"on": Side(draft, True), "off": Side(pair()[1], False)}
    identical = 0
    for number, prompt in enumerate(prompts):
        inputs, answers = tokenizer(prompt, return_tensors="pt"), []
        times: dict[str, list[float]] = {name: [] for name in sides}
        for repeat in range(repeats):
            for name, side in list(sides.items())[:: 1 if repeat % 2 else -1]:
                torch.manual_seed(number)
                with lookup(side.looks_up):
                    answers.append(
                        target.generate(**inputs, assistant_model=side.draft, max_new_tokens=length, **sampling)
                    )
                stats = side.draft.last_stats
                times[name].append(stats.draft_ms + stats.verify_ms + stats.overhead_ms)
                if number >= WARM_UP:
                    side.rounds += stats.rounds
        if number >= WARM_UP and stats.new_tokens > 1:
            identical += all(torch.equal(answers[0], answer) for answer in answers)
            for name, side in sides.items():
                side.ms.append(times[name])
                side.tokens.append(stats.new_tokens - 1)
    ratios = [min(a) / min(b) for a, b in zip(*(s.ms for s in sides.values()), strict=True)]
    return {
        "prompts": len(ratios),
        "identical": identical,
        "sampling": sampling,
        **{name: side.result() for name, side in sides.items()},
        "median_time_on_over_off": round(statistics.median(ratios), 3),
        "prompts_faster_with_lookup": sum(ratio < 1 for ratio in ratios),
    }


def widened_pair() -> tuple[Any, Any, Any]:
    """The demo target widened, its small draft, and their tokenizer."""
    small, draft, tokenizer = load_pair()
    wide = widen(small, **WIDENED)
    return wide, map_draft(draft, small, wide), tokenizer


def story_pair(folder: Path) -> Callable[[], tuple[Any, Any, Any]]:
    """How to load the pair of story models: one drafts for the other."""

    def load() -> tuple[Any, Any, Any]:
        target, lm = (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in (TARGET, DRAFT)
        )
        return target, DovetailAssistantModel.from_causal_lm(lm), AutoTokenizer.from_pretrained(folder / TARGET)

    return load


def sets_of(arguments: argparse.Namespace, skipped: dict[str, str]) -> Iterator[tuple[str, Any, list[str]]]:
    """Name, pair and prompts of every set; why others are missing goes into `skipped`."""
    count = arguments.prompts + WARM_UP
    demo = widened_pair if arguments.widened else load_pair
    yield "code edits", demo, edits(count)
    yield "HumanEval", demo, humaneval_prompts()[:count]
    for name, path in (("--models", arguments.models), ("--stories", arguments.stories)):
        if path is None or not path.exists():
            skipped["stories"] = f"{name} is not given" if path is None else f"{name}: there is no {path.name}"
            print(f"stories are skipped: {skipped['stories']}")
            return
    lines = arguments.stories.read_text(encoding="utf-8").splitlines()[:count]
    openings = [json.loads(line)["turns"][0][:OPENING_CHARS] for line in lines]
    yield "stories told again", story_pair(arguments.models), quotations(openings)
    yield "story openings", story_pair(arguments.models), openings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="of each set, without those that warm up")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--widened", action="store_true", help="widen the demo target to 66 M")
    parser.add_argument("--models", type=Path, help="folder of the story models")
    parser.add_argument("--stories", type=Path, help="JSONL of story openings")
    parser.add_argument("--name", default="lookup")
    arguments = parser.parse_args()
    skipped: dict[str, str] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, pair, prompts in sets_of(arguments, skipped):
        for mode, sampling in (("greedy", GREEDY), ("temperature 1", SAMPLED)):
            found = measured(pair, prompts, sampling, arguments.max_new_tokens, arguments.repeats)
            results.setdefault(name, {})[mode] = found
            print(name, mode, found, flush=True)
    facts = {"max_new_tokens": arguments.max_new_tokens, "widened": WIDENED if arguments.widened else None}
    write(arguments.name, {**facts, "skipped": skipped, "results": results})


if __name__ == "__main__":
    main()
