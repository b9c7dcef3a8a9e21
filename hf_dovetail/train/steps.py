"""One optimizer step: which windows it reads, in which parts and on which process, and the optimizers.

All processes draw the same numbers and each takes its parts, so a step is the same on one process or on many, in one
part or in several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..engines.onednn import has_bf16
from ..modeling import DovetailAssistantModel
from ..recipe import Recipe
from .features import Batch, Source
from .losses import draw_seeds, row_weights, unrolled_loss


class DraftLoss(nn.Module):
    """A draft and its loss as one module: what wraps it for several processes sees one forward pass per part."""

    def __init__(self, draft: DovetailAssistantModel, recipe: Recipe) -> None:
        super().__init__()
        self.draft, self.recipe = draft, recipe
        self._no_split_modules = sorted({type(layer).__name__ for layer in draft.layers})  # what FSDP splits apart

    def forward(self, batch: Batch, seeds: Sequence[int], weights: Tensor | None) -> Tensor:
        """The loss of a part, see `losses.unrolled_loss`."""
        with autocast(self.recipe, batch.ids.device):
            return unrolled_loss(self.draft, batch.ids, batch.features, batch.logits, self.recipe, seeds, weights)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The recipe's precision. Ours and not accelerate's, whose wrappers cast weights in ways of their own."""
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")


def fast_precision(device: torch.device) -> str:
    """The recipe's precision that a device is fast in: where oneDNN has no bf16 kernels, every product converts."""
    return "no" if device.type == "cpu" and not has_bf16() else "bf16"


@dataclass(frozen=True)
class Part:
    """A process's share of a step, or of a part of it.

    Args:
        rows: (B,) windows. seeds: B, and weights: (B, W-1) or None, as `losses.unrolled_loss` takes them.
    """

    rows: Tensor
    seeds: list[int]
    weights: Tensor | None


def parts_of_step(
    source: Source, recipe: Recipe, generator: torch.Generator, process: int, processes: int
) -> Iterator[Part]:
    """The parts of the next step that belong to `process`, `recipe.accumulate` of them.

    Args:
        source: the training material.
        recipe: batch, window and number of parts.
        generator: on the CPU; at the same place on all processes.
        process, processes: this process's number, and how many there are.
    """
    rows = torch.randint(len(source), (recipe.batch,), generator=generator)
    parts = recipe.accumulate * processes
    shares = None
    if source.counted is not None:
        counted = source.counted[rows, : recipe.window]
        shares = row_weights(counted)
        shares = (shares * (parts / shares.sum().clamp(min=1.0))).chunk(parts)
    for number, chosen in enumerate(rows.chunk(parts)):
        seeds = draw_seeds(len(chosen), generator)
        if number % processes == process:
            yield Part(chosen, seeds, None if shares is None else shares[number])


def windows_of_a_part(recipe: Recipe, processes: int) -> int:
    """How many windows a process computes at a time.

    Raises:
        ValueError: if a batch does not fall into equal parts, naming the numbers.
    """
    if recipe.batch % (recipe.accumulate * processes):
        raise ValueError(
            f"a step's {recipe.batch} windows do not fall into {recipe.accumulate} equal parts on {processes} "
            f"processes; choose a batch that is a multiple of {recipe.accumulate * processes}"
        )
    return recipe.batch // (recipe.accumulate * processes)


def optimizers(module: nn.Module, recipe: Recipe, sharded: bool) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the matrices beside it.

    Args:
        module: whose parameters are trained.
        recipe: names the optimizer.
        sharded: whether parameters are split over processes, which Muon cannot work on.

    Raises:
        ValueError: if Muon is asked for where it cannot work.
    """
    if recipe.optimizer == "adamw":
        return [torch.optim.AdamW(module.parameters(), lr=recipe.learning_rate, betas=recipe.betas)]
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon; take torch 2.9 or newer, or optimizer adamw")
    if sharded:
        raise ValueError("Muon needs whole matrices, which FSDP and DeepSpeed split; choose optimizer adamw")
    matrices = [p for p in module.parameters() if p.ndim == 2]
    others = [p for p in module.parameters() if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=recipe.learning_rate, betas=recipe.betas)]
