"""What the benchmark scripts share: prompts, the record of machine and versions, and the JSON file."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hf_dovetail
from hf_dovetail.bench.machine import record

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SHARED = ROOT.parent / "shared"


def humaneval_prompts() -> list[str]:
    """The prompts of HumanEval."""
    return _jsonl(ROOT / "tests" / "data" / "humaneval_prompts.jsonl", "prompt")


def story_prompts() -> list[str]:
    """Story openings for the models under ../shared/models."""
    return [turns[0] for turns in _jsonl(SHARED / "data/prompts/stories.jsonl", "turns")]


class Tally:
    """Sums what several calls report: rounds, tokens, and the share of rounds that accept each depth."""

    def __init__(self) -> None:
        self.answers, self.rounds, self.tokens, self.by_depth = 0, 0, 0, Counter()

    def add(self, stats: hf_dovetail.GenerationStats) -> None:
        self.answers += 1
        self.rounds += stats.rounds
        self.tokens += stats.new_tokens - 1  # the prefill's token is no round's
        self.by_depth.update(dict(enumerate(stats.accepted_by_depth)))

    def result(self) -> dict[str, Any]:
        shares = [round(self.by_depth[depth] / self.rounds, 3) for depth in sorted(self.by_depth)]
        rate = round(self.tokens / self.rounds, 3)
        return {"answers": self.answers, "rounds": self.rounds, "tokens_per_round": rate, "acceptance_by_depth": shares}


def _jsonl(path: Path, key: str) -> list[Any]:
    return [json.loads(line)[key] for line in path.read_text(encoding="utf-8").splitlines()]


def write(name: str, result: dict[str, Any]) -> None:
    """Write a result with its record to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_to(path, result)
    print(f"wrote {path.relative_to(ROOT)}")


def write_to(path: Path, result: dict[str, Any]) -> None:
    """Write a result with its record; of absolute paths in the command, the names."""
    command = " ".join(Path(word).name if Path(word).is_absolute() else word for word in sys.argv)
    path.write_text(json.dumps({"record": record(), "command": command, **result}, indent=1) + "\n")
