"""Step 3: drafts for the target, with the package's own loss, the target's features computed on the fly.

A part of the text is the target's own (`continue_stream`), since that is what a draft is asked about.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import capture, continue_stream, draft_loss

from .plan import SEED, Size, Work, read_json, write_json
from .timed import (
    TimedRun,
    adamw,
    draw_windows,
    load_stream,
    optimize,
    reserve_s,
    size_facts,
    spread_windows,
)

OWN_TIME_SHARE = 0.15  # of the step's minutes: the target writes
OWN_ROWS_SHARE = 1 / 3  # of a batch
VALIDATION_WINDOWS = 64


def recipe_of(size: Size) -> Recipe:
    """The demo pair's recipe; its number of steps and its rate follow the clock here."""
    return Recipe(
        batch=size.draft_batch,
        window=size.draft_window,
        learning_rate=size.draft_learning_rate,
        warmup=size.warmup,
        feature_weight=1.0,
        distribution_weight=1.0,
        noise=0.0,
        unroll=3,
        precision="bf16",
        seed=SEED,
    )


def load_target(work: Work, device: torch.device) -> PreTrainedModel:
    """The trained target in bf16, in evaluation mode."""
    work.need(work.target / "training.json", "target")
    return AutoModelForCausalLM.from_pretrained(work.target, dtype=torch.bfloat16).to(device).eval()


def own_windows(target: PreTrainedModel, stream: Tensor, size: Size, seconds: float, path: Path) -> Tensor:
    """(N, W) windows that the target writes in about so many seconds; kept in a file for a run that resumes."""
    if path.exists():
        return torch.load(path, weights_only=True)
    begin, parts, host = time.perf_counter(), [], stream.cpu().long()
    longest_s = 0.0
    while not parts or time.perf_counter() - begin + longest_s < seconds:
        started = time.perf_counter()
        parts.append(
            continue_stream(target, host, size.own_batch, size.draft_window, SEED + len(parts), batch=size.own_batch)
        )
        longest_s = max(longest_s, time.perf_counter() - started)
    windows = torch.cat(parts)
    torch.save(windows, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    print(f"the target wrote {len(windows):,} windows in {time.perf_counter() - begin:.0f} s", flush=True)
    return windows


def train_drafts(
    work: Work, size: Size, blocks: list[int], minutes: float, device: torch.device
) -> dict[int, dict[str, Any]]:
    """Train a draft for each number of blocks, in equal parts of the minutes without the target's own writing."""
    left = [count for count in blocks if not (work.draft(count) / "training.json").exists()]
    if left:
        target = load_target(work, device)
        stream = load_stream(work, "train", device, size.draft_window)
        held_out = load_stream(work, "held_out", device, size.draft_window)
        own_s = 60 * minutes * OWN_TIME_SHARE
        own = own_windows(target, stream, size, own_s, work.folder / "own_windows.pt").to(device)
        share_s = 60 * minutes * (1 - OWN_TIME_SHARE) / len(blocks)
        for count in left:
            print(f"draft of {count} blocks", flush=True)
            _train_draft(work, size, count, share_s, target, stream, held_out, own)
    return {count: read_json(work.draft(count) / "training.json") for count in blocks}


def _train_draft(
    work: Work,
    size: Size,
    blocks: int,
    share_s: float,
    target: PreTrainedModel,
    stream: Tensor,
    held_out: Tensor,
    own: Tensor,
) -> None:
    """Train one draft, and write it in bf16 with its `training.json`."""
    began, device, recipe = time.perf_counter(), target.device, recipe_of(size)
    torch.manual_seed(SEED)
    draft = DovetailAssistantModel.from_target(target, num_hidden_layers=blocks).float()
    draft.draft_device = device
    draft.train().meet(target)
    out = work.draft(blocks)
    out.mkdir(parents=True, exist_ok=True)
    facts = {**size_facts(size), "blocks": blocks}
    optimizer = adamw(draft, 0.01, device)
    budget_s = share_s - reserve_s(share_s)
    run = TimedRun(out / "checkpoint.pt", draft, optimizer, budget_s, size.save_every_s, facts, began)
    generator, own_rows = torch.Generator(device), round(recipe.batch * OWN_ROWS_SHARE)

    def losses(step: int) -> Iterator[Tensor]:
        generator.manual_seed(SEED + step)
        read = draw_windows(stream, recipe.batch - own_rows, recipe.window, generator)
        rows = torch.randint(len(own), (own_rows,), generator=generator, device=device)
        yield _loss(draft, target, torch.cat((read, own[rows])), recipe, generator)

    optimize(run, losses, recipe.learning_rate, recipe.warmup, recipe.clip)
    windows = spread_windows(held_out, max(VALIDATION_WINDOWS, recipe.batch), recipe.window)[: recipe.batch]
    with torch.no_grad():
        validation = _loss(draft, target, windows, recipe, generator.manual_seed(SEED)).item()
    result = {
        "blocks": blocks,
        "parameters": sum(p.numel() for p in draft.parameters()),
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("steps", "save_every")},
        "own_windows": len(own),
        "own_rows_share": round(own_rows / recipe.batch, 3),
        **run.facts_of_training(recipe.batch * recipe.window),
        "validation_loss": round(validation, 4),
    }
    draft.eval().to(torch.bfloat16).save_pretrained(out)
    write_json(out / "training.json", result)
    run.finish()


def _loss(
    draft: DovetailAssistantModel, target: PreTrainedModel, ids: Tensor, recipe: Recipe, generator: torch.Generator
) -> Tensor:
    """The package's loss of (B, W) ids; under the device's context its noise is drawn there and not on the host."""
    features, logits = capture(target, ids)
    with torch.autocast(ids.device.type, torch.bfloat16), ids.device:
        return draft_loss(draft, ids, features, logits, recipe, generator)
