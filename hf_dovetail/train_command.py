"""`hf-dovetail train` and `hf-dovetail capture`: from data and a target to a draft.

Imports what trains only when it is asked to, so that the command line starts at once.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .loading import load_target, load_tokenizer
from .recipe import CHOICES, MEASURED_WIDTH, PAPER, Recipe, default_recipe, option_help

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .train import Skipped, Windows

_FUSIONS = ("dgf", "eagle", "eagle3")
_DATA_HELP = (
    'text files, JSONL ("text", "messages", "conversations", or "prompt" and "completion"), folders that datasets '
    "saved, or names of data sets (NAME or NAME:SPLIT); of conversations only the assistant's turns are learned"
)


def add_train_parsers(commands: Any) -> None:
    """Add `train` and `capture` to the command line."""
    train = commands.add_parser("train", help="train a draft for a target on text or conversations")
    _add_data(train, "folder or name of the target (may be left out with --features)")
    train.add_argument("--features", type=Path, help="folder of captured features, instead of --data")
    train.add_argument("--out", required=True, type=Path, help="folder for the draft; an interrupted run resumes there")
    train.add_argument("--blocks", type=int, default=1, help="decoder blocks of the draft, 1 to 6")
    train.add_argument("--fusion", default="dgf", choices=_FUSIONS, help="the draft's kind")
    train.add_argument("--recipe", choices=("default", "paper"), default="default", help="numbers that are not given")
    _add_recipe(train)
    train.add_argument("--regenerate", action="store_true", help="train on the target's own answers to the data")
    train.add_argument("--answer-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    train.add_argument("--answer-temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    train.add_argument("--validate-on", help="prompts for validation, as --data (default: held out of the data)")
    train.add_argument("--validation-prompts", type=int, default=24, help="how many (default: %(default)s)")
    train.add_argument("--log-with", nargs="+", default=(), help="trackers beside metrics.csv, such as tensorboard")
    train.set_defaults(run=_train)
    capture = commands.add_parser("capture", help="capture a target's features over text, to train drafts from")
    _add_data(capture, "folder or name of the target")
    capture.add_argument("--out", required=True, type=Path, help="folder for the features; a killed run goes on there")
    capture.add_argument("--window", type=int, default=Recipe().window, help="tokens per window (default: %(default)s)")
    capture.add_argument(
        "--fusion",
        default="dgf",
        choices=_FUSIONS,
        help="the kind of draft to train from them: eagle3 reads three layers more (default: %(default)s)",
    )
    capture.add_argument("--batch", type=int, default=8, help="windows per forward pass (default: %(default)s)")
    capture.set_defaults(run=_capture)


def _add_data(parser: argparse.ArgumentParser, target: str) -> None:
    parser.add_argument("--target", help=target)
    parser.add_argument("--data", nargs="+", default=(), help=_DATA_HELP)
    parser.add_argument("--strict", action="store_true", help="stop at a record that cannot be used; else skip it")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """One option for each number in the recipe, in the recipe's own words; the default rate falls with the width."""
    words, ours = option_help(), default_recipe(MEASURED_WIDTH, muon=True)
    for field in fields(Recipe):
        if isinstance(field.default, int | float | str):
            usual = f"default: {getattr(ours, field.name)}, paper: {getattr(PAPER, field.name)}"
            if field.name == "precision":
                usual = "default: bf16, or no on a CPU without it"
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                choices=CHOICES.get(field.name),
                help=f"{words[field.name]} ({usual})",
            )


def _recipe(arguments: argparse.Namespace, target: PreTrainedModel) -> Recipe:
    """The recipe that is named, with the numbers that were given; AdamW where Muon cannot work.

    The precision is that of the run that goes on, or what this machine is fast in.
    """
    import torch

    from .train.checkpoints import precision_of
    from .train.processes import this_process
    from .train.steps import fast_precision

    whole = not any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    muon = hasattr(torch.optim, "Muon") and whole and arguments.optimizer != "adamw"
    width = target.config.get_text_config(decoder=True).hidden_size
    named = PAPER if arguments.recipe == "paper" else default_recipe(width, muon)
    given = {field.name: getattr(arguments, field.name, None) for field in fields(Recipe)}
    given["precision"] = given["precision"] or precision_of(arguments.out) or fast_precision(this_process().device)
    return replace(named, **{name: value for name, value in given.items() if value is not None})


def _load_target(arguments: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not arguments.target:
        raise ValueError("give the target with --target")
    target = load_target("--target", arguments.target)
    return target, load_tokenizer("--target", arguments.target)


def _check_data(arguments: argparse.Namespace) -> None:
    """Refuse a command without data, before a large target is loaded for nothing."""
    if not arguments.data:
        raise ValueError("give the training data with --data")


def _windows(tokenizer: PreTrainedTokenizerBase, data: list, window: int, strict: bool) -> Windows:
    """The data as windows; says what was skipped."""
    from .train import Skipped, load_windows

    skipped = Skipped(strict)
    windows = load_windows(data, tokenizer, window, skipped)
    _say(skipped)
    return windows


def _say(skipped: Skipped) -> None:
    if skipped.count:
        print(f"skipped {skipped.count} records that cannot be used, the first: {skipped.first[0]}")


def _regenerated(
    arguments: argparse.Namespace, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[Path]:
    """The data with the target's own answers, as files in the draft's folder."""
    from .train import Answering, Skipped, answerable, regenerate

    skipped = Skipped(arguments.strict)
    how = Answering(arguments.answer_tokens, arguments.answer_temperature, seed)
    records = list(answerable(arguments.data, tokenizer, how, skipped))
    _say(skipped)
    return regenerate(target, tokenizer, records, how, arguments.out / "answers")


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from .modeling import DovetailAssistantModel
    from .train import Extras, train_draft
    from .train.loop import check_unfinished
    from .train.processes import this_process

    check_unfinished(arguments.out)
    if arguments.features is None:
        _check_data(arguments)
        target, tokenizer = _load_target(arguments)
        recipe, data, strict = _recipe(arguments, target), list(arguments.data), arguments.strict
        if arguments.regenerate:
            data, strict = _regenerated(arguments, target, tokenizer, recipe.seed), False  # an answer may be empty
        text, names = _windows(tokenizer, data, recipe.window, strict), _names(arguments)
    else:
        target, tokenizer, text = _stored(arguments)
        recipe, names = _recipe(arguments, target), text.facts.get("data", [])
    text, prompts = _prompts(arguments, recipe, tokenizer, text)
    extras = Extras(tokenizer, prompts, log_with=arguments.log_with, data=names, dtype=target.dtype)
    torch.manual_seed(recipe.seed)
    draft = DovetailAssistantModel.from_target(target, arguments.blocks, arguments.fusion).float()
    train_draft(draft, target, text, recipe, arguments.out, extras=extras)
    if this_process().is_main_process:
        print(f"the draft is in {arguments.out}")


def _names(arguments: argparse.Namespace) -> list[str]:
    """What the card calls the data: of files the last part, since the rest belongs to this machine."""
    names = [Path(name).name if os.path.exists(name) else name for name in arguments.data]
    if not getattr(arguments, "regenerate", False):
        return names
    sampled = f"sampled at temperature {arguments.answer_temperature}" if arguments.answer_temperature else "greedy"
    return [*names, f"with the target's own answers ({sampled})"]


def _stored(arguments: argparse.Namespace) -> tuple:
    """Target or stand-in, tokenizer and features of a folder of captured features."""
    from .train import StoredFeatures

    if arguments.data or arguments.regenerate:
        raise ValueError("--features holds the text already; leave out --data and --regenerate, or --features")
    target = _load_target(arguments)[0] if arguments.target else None
    source = StoredFeatures(arguments.features, target)
    return source.target, load_tokenizer("--features", str(arguments.features)), source


def _prompts(arguments: argparse.Namespace, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, text: Any) -> tuple:
    """The text that is left to train on, and the prompts of validation."""
    from .train import Skipped, hold_out, load_prompts

    if not recipe.validate_every:
        return text, []
    if arguments.validation_prompts < 1:
        raise ValueError(f"--validation-prompts is {arguments.validation_prompts}; expected at least 1")
    if arguments.features is not None and not arguments.target:
        raise ValueError("validation decodes with the target itself: give --target, or leave out --validate-every")
    if arguments.validate_on:
        skipped, count, longest = Skipped(arguments.strict), arguments.validation_prompts, recipe.window // 2
        prompts = load_prompts(arguments.validate_on, tokenizer, count, longest, skipped)
        _say(skipped)
        return text, prompts
    if arguments.features is not None:
        raise ValueError("captured features have no text to hold out: give prompts with --validate-on")
    return hold_out(text, arguments.validation_prompts)


def _capture(arguments: argparse.Namespace) -> None:
    from .config import DovetailConfig
    from .train import capture_features
    from .train.processes import this_process

    _check_data(arguments)
    target, tokenizer = _load_target(arguments)
    windows = _windows(tokenizer, list(arguments.data), arguments.window, arguments.strict)
    layers = DovetailConfig.for_target(target.config, 1, arguments.fusion).feature_layers
    names = _names(arguments)
    capture_features(target, windows, arguments.out, batch=arguments.batch, layers=layers, data=names)
    if this_process().is_main_process:
        tokenizer.save_pretrained(arguments.out)
        print(f"the features of {len(windows):,} windows are in {arguments.out}")
