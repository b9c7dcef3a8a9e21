"""The training loop: steps on accelerate, validation, early stopping, checkpoints, and the finished draft.

Runs on one process or many (`accelerate launch`) with the same code; does not know where text and features come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling import DovetailAssistantModel
from ..recipe import Recipe
from .card import write_card
from .checkpoints import Checkpoint, Progress, facts_of
from .features import LiveFeatures, Source, check_length
from .files import naming, remove, whole, write_whole
from .processes import as_number, splits_weights, tell_batch, whole_draft
from .steps import DraftLoss, autocast, optimizers, parts_of_step, windows_of_a_part
from .text import Windows
from .tracking import CsvTracker, trackers
from .validate import validate

_FINISHED = "recipe.json"
"""Written last: where it is, the draft is finished."""


@dataclass(frozen=True)
class Extras:
    """What a run may have beside text and recipe.

    Args:
        tokenizer: the target's, saved beside the draft.
        prompts: (1, n) held-out ids each, for validation.
        new_tokens: length of a validation's answers.
        log_with: accelerate's trackers beside the CSV file, such as "tensorboard".
        data: names of the training data, for the card.
        dtype: precision of the finished draft; None: that of training.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    prompts: Sequence[Tensor] = ()
    new_tokens: int = 96
    log_with: Sequence[str] = ()
    data: Sequence[str] = ()
    dtype: torch.dtype | None = None


@dataclass
class _Run:
    """Everything that a step works with."""

    draft: DovetailAssistantModel
    target: PreTrainedModel
    source: Source
    recipe: Recipe
    extras: Extras
    accelerator: Accelerator
    progress: Progress
    checkpoint: Checkpoint
    out: Path
    csv: CsvTracker
    module: nn.Module | None = None

    @property
    def best(self) -> Path:
        """The weights of the best validated draft so far."""
        return self.out / "best"


def train_draft(
    draft: DovetailAssistantModel,
    target: PreTrainedModel,
    text: Tensor | Windows | Source,
    recipe: Recipe,
    out: Path,
    extras: Extras | None = None,
) -> DovetailAssistantModel:
    """Train `draft` in place for `target`, and save it to `out`; resumes from the checkpoint in `out`, if any.

    Where FSDP or DeepSpeed splits the weights, `draft` is left in parts, and the draft that is returned is another.

    Args:
        draft: a new draft, in float32.
        target: the target it imitates (or its stand-in, with captured features and without validation); it is moved
            to the training device, unless accelerate has spread it over devices, and nothing else of it changes.
        text: (N, W) int64 ids of the training text, W at least `recipe.window`; or windows with what counts in them;
            or captured features.
        recipe: how to train.
        out: folder of the checkpoint, of `metrics.csv` and of the finished draft.
        extras: the tokenizer to save beside the draft, validation, trackers and names for the card.

    Raises:
        ValueError: if there is too little text for one window, windows are too long for the target, the batch does not
            fall into equal parts, or `out` holds a finished draft or another run.
        FloatingPointError: if the loss or its gradient is not finite; the last checkpoint stays usable.
        OSError: if the disk is full; the last checkpoint stays usable.
    """
    out, extras = Path(out), extras or Extras()
    source = _source(target, text)
    _check(source, recipe, extras, out)
    out.mkdir(parents=True, exist_ok=True)
    csv, log_with = trackers(extras.log_with, out / "metrics.csv")
    accelerator = _accelerator(recipe, log_with, out)
    tell_batch(accelerator, windows_of_a_part(recipe, accelerator.num_processes))
    progress = Progress(0, torch.Generator().manual_seed(recipe.seed))
    checkpoint = Checkpoint(out, facts_of(recipe, draft, source, splits_weights(accelerator)))
    run = _Run(draft, target, source, recipe, extras, accelerator, progress, checkpoint, out, csv)
    draft.draft_device, training = accelerator.device, target.training
    if (isinstance(source, LiveFeatures) or recipe.validate_every) and not _is_placed(target):
        target.to(accelerator.device)
    target.eval()
    try:
        _optimize(run)
    finally:
        target.train(training)
    return _finish(run)


def _source(target: PreTrainedModel, text: Tensor | Windows | Source) -> Source:
    if isinstance(text, Tensor):
        text = Windows(text)
    return LiveFeatures(target, text) if isinstance(text, Windows) else text


def _is_placed(target: PreTrainedModel) -> bool:
    """Whether accelerate's hooks say where its parts are (`device_map`)."""
    return any(hasattr(module, "_hf_hook") for module in target.modules())


def _check(source: Source, recipe: Recipe, extras: Extras, out: Path) -> None:
    if source.window < recipe.window:
        raise ValueError(
            f"the training text is of shape ({len(source)}, {source.window}); expected windows of {recipe.window} "
            "tokens, so give more text or a smaller window"
        )
    check_length(source.target, recipe.window)
    check_unfinished(out)
    if recipe.validate_every and not extras.prompts:
        raise ValueError(f"Recipe.validate_every is {recipe.validate_every}, but there are no prompts to validate on")


def check_unfinished(out: Path) -> None:
    """Refuse the folder of a finished draft.

    Raises:
        ValueError: naming it.
    """
    if (out / _FINISHED).exists():
        raise ValueError(f"{out} holds a finished draft; choose another folder")


def _accelerator(recipe: Recipe, log_with: list, out: Path) -> Accelerator:
    """An accelerator that leaves the precision to the recipe, whatever another one in this process had."""
    if AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no",
        gradient_accumulation_steps=recipe.accumulate,
        log_with=log_with,
        project_dir=out,
    )


def _optimize(run: _Run) -> None:
    """All steps that are left, or fewer if validation sees no more progress."""
    recipe, accelerator, progress = run.recipe, run.accelerator, run.progress
    run.draft.train().meet(run.target)
    module = DraftLoss(run.draft, recipe)
    chosen = optimizers(module, recipe, splits_weights(accelerator))
    module, *chosen = accelerator.prepare(module, *chosen)
    run.module = module
    accelerator.register_for_checkpointing(progress)
    run.checkpoint.resume(accelerator, progress)
    run.csv.keep_until(progress.step)
    accelerator.init_trackers("training")
    bar = tqdm(
        total=recipe.steps,
        initial=progress.step,
        desc="training the draft",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    while progress.step < recipe.steps and not _stops_early(run):
        rate = recipe.rate(progress.step)
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = rate
        loss = _step(run, module, chosen)
        progress.step += 1
        figures = {"loss": loss, "learning_rate": rate, **_validated(run)}
        accelerator.log(figures, step=progress.step)
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if progress.step % recipe.save_every == 0 or progress.step == recipe.steps:
            run.checkpoint.save(accelerator)
    bar.close()
    for tracker in accelerator.trackers:
        tracker.finish()  # and not end_training, which would end the processes' group as well


def _step(run: _Run, module: nn.Module, chosen: list[torch.optim.Optimizer]) -> float:
    """One optimizer step; its loss, over all parts and processes."""
    accelerator, recipe = run.accelerator, run.recipe
    total = torch.zeros((), device=accelerator.device)
    index, processes = accelerator.process_index, accelerator.num_processes
    for part in parts_of_step(run.source, recipe, run.progress.generator, index, processes):
        with accelerator.accumulate(module):
            with autocast(recipe, accelerator.device):
                batch = run.source.batch(part.rows, recipe.window, run.draft)
            weights = None if part.weights is None else part.weights.to(accelerator.device)
            loss = module(batch, part.seeds, weights)
            total += loss.detach() / recipe.accumulate
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                value = accelerator.reduce(total, "mean").item()
                _check_finite("loss", value, run)
                norm = accelerator.clip_grad_norm_(module.parameters(), recipe.clip)
                _check_finite("gradient's norm", as_number(norm), run)
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()
    return value


def _check_finite(what: str, value: float, run: _Run) -> None:
    """Stop before the weights are changed by what is no number, since a checkpoint would keep them."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {run.progress.step + 1}; lower learning_rate (now "
            f"{run.recipe.learning_rate}) and run again: the last checkpoint goes on with a lower one"
        )


def _validated(run: _Run) -> dict[str, float]:
    """The figures of a validation, if one is due after this step; the best draft so far is kept."""
    recipe, step = run.recipe, run.progress.step
    if not recipe.validate_every or (step % recipe.validate_every and step != recipe.steps):
        return {}
    draft = whole_draft(run.draft, run.module, run.accelerator)
    found = validate(draft, run.target, run.extras.prompts, run.extras.new_tokens)
    if run.progress.note(found.tokens_per_round) and run.accelerator.is_main_process:
        write_whole(run.best, draft.save_pretrained, "the best draft so far")
    run.accelerator.wait_for_everyone()
    depths = {f"depth_{depth}": share for depth, share in enumerate(found.acceptance_by_depth, start=1)}
    return {"tokens_per_round": found.tokens_per_round, **depths}


def _stops_early(run: _Run) -> bool:
    return 0 < run.recipe.patience <= run.progress.since_best


def _finish(run: _Run) -> DovetailAssistantModel:
    """Write the finished draft (the best validated one), its recipe, tokenizer and card; the checkpoint can go."""
    out, accelerator = run.out, run.accelerator
    draft = whole_draft(run.draft, run.module, accelerator)
    best = whole(run.best)
    if best is not None:
        draft.load_state_dict(load_file(best / "model.safetensors"), strict=True)
    if accelerator.is_main_process:
        with naming(out, "the finished draft"):
            if run.extras.tokenizer is not None:
                run.extras.tokenizer.save_pretrained(out)
            draft.eval().to(run.extras.dtype or draft.dtype).save_pretrained(out)
            write_card(out, draft, run.recipe, run.source, run.extras.data, run.csv.tracker)
        recipe = json.dumps(asdict(run.recipe), indent=1) + "\n"
        write_whole(out / _FINISHED, lambda path: path.write_text(recipe), "the recipe")
        run.checkpoint.remove()
        remove(run.best)
    accelerator.wait_for_everyone()
    return draft.eval()
