"""The card of a finished draft: what it is for, what it was trained on, how, and what it reached."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from ..modeling import DovetailAssistantModel
from ..recipe import Recipe
from .features import Source
from .validate import SHAPE


def write_card(
    folder: Path,
    draft: DovetailAssistantModel,
    recipe: Recipe,
    source: Source,
    data: Sequence[str],
    metrics: Path,
) -> None:
    """Write `README.md` beside a draft.

    Args:
        folder: of the draft. draft: as it is saved. recipe: that trained it.
        source: the training material. data: its names.
        metrics: the run's CSV file, for loss and validation.
    """
    (folder / "README.md").write_text(card(draft, recipe, source, data, _figures(metrics)), encoding="utf-8")


def card(
    draft: DovetailAssistantModel, recipe: Recipe, source: Source, data: Sequence[str], figures: dict[str, str]
) -> str:
    """The card as Markdown with the hub's header."""
    config = draft.config
    size = sum(p.numel() for p in draft.parameters())
    counted = "all" if source.counted is None else f"{int(source.counted.sum()):,} of {source.counted.numel():,}"
    rows = {
        "target": f"{config.target_name or 'unnamed'} ({config.target_type}, hidden size {config.target_hidden_size}, "
        f"vocabulary {config.target_vocab_size})",
        "draft": f"{config.fusion} fusion, {config.num_hidden_layers} block(s), {size / 1e6:.2f} M parameters; "
        + ("embeddings and LM head are" if draft.predicts_features else "LM head of its own, embeddings are")
        + " the target's",
        "data": ", ".join(data) or "not named",
        "text": f"{len(source):,} windows of {source.window} tokens, of which {counted} count in the loss",
        **figures,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    lines = [
        "---",
        "library_name: transformers",
        "tags: [speculative-decoding, dovetail]",
        "---",
        "",
        f"# Dovetail draft for {config.target_name or 'its target'}",
        "",
        "Used with `hf_dovetail`: `target.generate(..., assistant_model=draft)`.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in asdict(recipe).items()),
        "",
    ]
    return "\n".join(lines)


def _figures(metrics: Path) -> dict[str, str]:
    """Last loss and best validation of a run."""
    with metrics.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows:
        return {}
    found = {"loss": f"{float(rows[-1]['loss']):.3f} at step {rows[-1]['step']}"}
    validated = [row for row in rows if row["tokens_per_round"]]
    if validated:
        best = max(validated, key=lambda row: float(row["tokens_per_round"]))
        depths = " ".join(f"{float(best[f'depth_{d + 1}']):.2f}" for d in range(SHAPE.levels))
        found["tokens per round"] = (
            f"{float(best['tokens_per_round']):.2f}, greedy on held-out prompts with {SHAPE.nodes} nodes, at step "
            f"{best['step']}; rounds that accept depth 1, 2, ...: {depths}"
        )
    return found
