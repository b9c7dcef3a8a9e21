"""Real text for the tests, which no change to the package changes."""

from __future__ import annotations

import json
from pathlib import Path


def humaneval_prompts() -> list[str]:
    """The prompts of HumanEval: Python, about 25,000 of the demo target's tokens, which its training never saw."""
    lines = (Path(__file__).parent / "data" / "humaneval_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]
