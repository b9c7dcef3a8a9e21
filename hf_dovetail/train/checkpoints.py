"""A run that can be killed at any time: its place in the data, its best draft, and its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, compare_versions
from transformers.utils import logging

from ..modeling import DovetailAssistantModel
from ..recipe import Recipe
from .features import Source
from .files import check_facts, read_facts, remove, whole, write_whole

logger = logging.get_logger(__name__)

_FOLDER, _FACTS = "checkpoint", "run.json"
_DRAFT_FACTS = ("fusion", "num_hidden_layers", "hidden_size", "intermediate_size", "target_type", "vocab_size")


@dataclass
class Progress:
    """How far a run is; saved with weights and optimizers.

    Attributes:
        step: finished steps.
        generator: of data order and noise.
        best: most tokens per round in a validation so far; 0 before the first.
        since_best: validations since then.
    """

    step: int
    generator: torch.Generator
    best: float = 0.0
    since_best: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For accelerate's checkpoints."""
        state = self.generator.get_state()
        return {"step": self.step, "generator": state, "best": self.best, "since_best": self.since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""
        self.step, self.best, self.since_best = state["step"], state["best"], state["since_best"]
        self.generator.set_state(state["generator"])

    def note(self, tokens_per_round: float) -> bool:
        """Note a validation; whether it is the best so far."""
        better = tokens_per_round > self.best
        self.best = max(self.best, tokens_per_round)
        self.since_best = 0 if better else self.since_best + 1
        return better


class Checkpoint:
    """The folder of a run's last state.

    Args:
        folder: of the run.
        facts: what a resumed run must have in common with the first (see `facts_of`).
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path, self._facts = folder / _FOLDER, facts

    def save(self, accelerator: Accelerator) -> None:
        """Write weights, optimizers and progress; an interruption leaves the checkpoint before.

        Raises:
            OSError: if there is no room for it; the checkpoint before is intact.
        """

        def write(fresh: Path) -> None:
            accelerator.save_state(str(fresh))
            if accelerator.is_main_process:
                (fresh / _FACTS).write_text(json.dumps(self._facts))

        write_whole(self.path, write, "a checkpoint", accelerator.state)

    def resume(self, accelerator: Accelerator, progress: Progress) -> None:
        """Go on from the checkpoint, if there is one; `progress` was registered with `accelerator`.

        A learning rate that is lower than before may go on, since a run whose loss was not finite could not otherwise.

        Raises:
            ValueError: if it belongs to another run, naming what differs, or accelerate cannot restore it.
        """
        path = whole(self.path)
        if path is None:
            return
        found = read_facts(path / _FACTS)
        lowered = self._lowered(found)
        check_facts(self._facts, {**found, **lowered}, path)
        if lowered:
            logger.warning("%s goes on with another learning_rate: %s", path, lowered["recipe"]["learning_rate"])
        if accelerator.distributed_type == DistributedType.FSDP and compare_versions("accelerate", "<", "1.13"):
            raise ValueError(
                f"accelerate {accelerate.__version__} does not restore the optimizer of weights that FSDP splits, so "
                f"{path} cannot go on exactly; update accelerate to 1.13 or newer, or start in another folder"
            )
        accelerator.load_state(str(path))
        logger.info("resuming after step %d", progress.step)

    def _lowered(self, found: dict[str, Any]) -> dict[str, Any]:
        """The recipe of a checkpoint with this run's learning rate, if that is lower; else nothing."""
        theirs, ours = found.get("recipe", {}), self._facts["recipe"]["learning_rate"]
        return {"recipe": {**theirs, "learning_rate": ours}} if ours < theirs.get("learning_rate", 0) else {}

    def remove(self) -> None:
        """The run is finished."""
        remove(self.path)


def precision_of(folder: Path) -> str | None:
    """The precision of the run that a folder's checkpoint goes on with; None without a checkpoint."""
    path = whole(folder / _FOLDER)
    return None if path is None else read_facts(path / _FACTS).get("recipe", {}).get("precision")


def facts_of(recipe: Recipe, draft: DovetailAssistantModel, source: Source, split: bool) -> dict[str, Any]:
    """What makes a run the same run; `split`: whether no process has whole weights, which checkpoints then hold apart.

    The number of processes is no part of it: a step is the same on any.
    """
    return {
        "recipe": asdict(recipe),
        "weights": "split" if split else "whole",
        "draft": {name: getattr(draft.config, name) for name in _DRAFT_FACTS},
        **source.facts,
    }
