"""Prompts of a measurement: easy ones that repeat themselves, code, and text that does not repeat itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..demo import demo_prompts

_REPETITIVE = (
    "".join(
        f"    parser.add_argument('--{name}', type=int, default=0, help='the {name}')\n"
        for name in ("width", "height", "depth", "length", "weight")
    ),
    "x = 0\n" + "x = x + 1\nprint(x)\n" * 8,
    "".join(
        f"def get_{name}(self):\n    if self.{name} is None:\n        raise ValueError('no {name}')\n"
        f"    return self.{name}\n\n\n"
        for name in ("name", "value", "name", "value")
    ),
)


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are answered alike.

    Args:
        name: its name in the rows.
        prompts: the texts.
        sampling: keyword arguments of `generate`; each prompt is sampled under its own fixed seed.
    """

    name: str
    prompts: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=lambda: {"do_sample": False})


_SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
NAMES = ("easy", "medium", "hard")
"""Repetitive text; HumanEval problems; the same problems sampled at temperature 1, which seldom repeats itself."""


def prompt_sets(words: Sequence[str]) -> list[PromptSet]:
    """The sets of these names and files; see `prompt_set`.

    Raises:
        ValueError: as `prompt_set`, and if two are called alike, whose answers would be one row.
    """
    found: dict[str, tuple[str, PromptSet]] = {}
    for word in words:
        group = prompt_set(word)
        if group.name in found:
            raise ValueError(
                f"prompts {found[group.name][0]!r} and {word!r} would both be called {group.name!r} in the result; "
                "give each set once, and rename files that are called alike"
            )
        found[group.name] = (word, group)
    return [group for _, group in found.values()]


def prompt_set(name: str) -> PromptSet:
    """A set by name, or the prompts of a file: JSONL with a "prompt" or "text" field, or one prompt as plain text.

    Raises:
        ValueError: if the name is unknown and no file, or the file holds no prompt or is not UTF-8.
    """
    if name == "easy":
        return PromptSet(name, _REPETITIVE)
    if name == "medium":
        return PromptSet(name, tuple(demo_prompts()))
    if name == "hard":
        return PromptSet(name, tuple(demo_prompts()), _SAMPLED)
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"prompts {name!r}: expected {', '.join(NAMES)}, or a JSONL or text file that exists")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    prompts = _jsonl(path, text) if path.suffix in (".jsonl", ".json") else (text,)
    if not prompts or not all(prompts):
        raise ValueError(f"{path} holds an empty prompt, or none; give some text to continue")
    return PromptSet(path.stem, prompts)


def _jsonl(path: Path, text: str) -> tuple[str, ...]:
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompts.append(entry["prompt"] if "prompt" in entry else entry["text"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f'{path}, line {number}: expected JSON with a "prompt" or "text" field') from error
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f'{path}: every "prompt" must be a string')
    return tuple(prompts)
