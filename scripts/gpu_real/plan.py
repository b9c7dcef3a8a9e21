"""What is trained, as numbers, and where each step leaves its result. Knows no models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED, MAX_POSITIONS = 0, 2048


@dataclass(frozen=True)
class Size:
    """Everything that differs between a real run and a test of it.

    Args:
        max_files: source files to read, or None for all.
        tokenizer_bytes: text that the tokenizer is trained on, at most.
        vocab_size, hidden_size, intermediate_size, layers, heads, kv_heads: the target, a Llama.
        window, batch, micro_batch: tokens per window, windows per step, windows per forward pass.
        learning_rate, warmup: peak of AdamW for the target, and the steps to get there.
        draft_window, draft_batch, own_batch: the same for the draft; windows that the target writes at a time.
        draft_learning_rate: peak of AdamW for the draft.
        prompts, new_tokens: of the measurement.
        save_every_s: seconds between checkpoints.
        probe_bytes: memory that is read to measure its bandwidth.
    """

    max_files: int | None = None
    tokenizer_bytes: int = 40_000_000
    vocab_size: int = 16384
    hidden_size: int = 1024
    intermediate_size: int = 2560
    layers: int = 12
    heads: int = 16
    kv_heads: int = 4
    window: int = 1024
    batch: int = 64
    micro_batch: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 100
    draft_window: int = 257  # its last token is only predicted: 256 rows, which attention kernels like
    draft_batch: int = 128
    own_batch: int = 2048
    draft_learning_rate: float = 1e-3
    prompts: int = 12
    new_tokens: int = 128
    save_every_s: float = 120.0
    probe_bytes: int = 1 << 30

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step of the target's training sees."""
        return self.window * self.batch


FULL = Size()
TOY = Size(
    max_files=120,
    tokenizer_bytes=200_000,
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    kv_heads=1,
    window=64,
    batch=8,
    micro_batch=4,
    warmup=5,
    draft_window=32,
    draft_batch=8,
    own_batch=4,
    prompts=2,
    new_tokens=12,
    save_every_s=0.0,
    probe_bytes=1 << 24,
)


@dataclass(frozen=True)
class Work:
    """The folder of a run: `corpus/`, `target/`, `draft-N/` and `runs.jsonl`, each written by one step."""

    folder: Path

    @property
    def corpus(self) -> Path:
        """Tokens, tokenizer and `corpus.json`."""
        return self.folder / "corpus"

    @property
    def target(self) -> Path:
        """The trained target and `training.json`."""
        return self.folder / "target"

    def draft(self, blocks: int) -> Path:
        """The trained draft of so many blocks and its `training.json`."""
        return self.folder / f"draft-{blocks}"

    def drafts(self) -> list[int]:
        """Blocks of the drafts that are finished."""
        return sorted(int(p.parent.name.split("-")[1]) for p in self.folder.glob("draft-*/training.json"))

    def need(self, path: Path, step: str) -> Path:
        """The path of a result that another step has left.

        Raises:
            FileNotFoundError: saying which step to run first.
        """
        if not path.exists():
            raise FileNotFoundError(
                f"there is no {path}; run the step `{step}` first, with the same --work (now {self.folder})"
            )
        return path


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that an interruption leaves the file before, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
