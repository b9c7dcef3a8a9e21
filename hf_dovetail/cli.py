"""The command `hf-dovetail`: one subcommand each for the demo, generating text, measuring and training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .bench.command import add_bench_parser
from .calibrate_command import add_calibrate_parser
from .recipe import Recipe, option_help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of use end with one line on stderr and status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"hf-dovetail: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dovetail", description="Dovetail speculative decoding for Hugging Face models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="write code with the pair of models in the package, with and without Dovetail"
    )
    demo.add_argument("--prompt", help="text to continue (default: a HumanEval problem)")
    demo.add_argument("--max-new-tokens", type=int, default=128)
    demo.add_argument("--repeats", type=int, default=3, help="timed answers of each kind")
    demo.set_defaults(run=_demo)
    generate = commands.add_parser("generate", help="continue a prompt with a target and a draft")
    generate.add_argument("prompt")
    generate.add_argument("--target", required=True, help="folder or name of the target")
    generate.add_argument("--draft", required=True, help="folder or name of its draft")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--engine", default="auto", help="how the target's layers run (default: %(default)s)")
    generate.set_defaults(run=_generate)
    convert = commands.add_parser("convert", help="write a published draft in this package's own format")
    convert.add_argument(
        "source", help="folder or name of a draft: Dovetail, EAGLE-1, -2, -3, speculators, or a small LM"
    )
    convert.add_argument("out", type=Path, help="folder for the draft")
    convert.add_argument("--target", help="folder or name of its target: checks the fit, adds its tokenizer")
    convert.set_defaults(run=_convert)
    add_calibrate_parser(commands)
    add_bench_parser(commands)
    train = commands.add_parser("train", help="train a draft for a target on text")
    train.add_argument("--target", required=True, help="folder or name of the target")
    train.add_argument("--data", required=True, nargs="+", type=Path, help='text files, or JSONL with a "text" field')
    train.add_argument("--out", required=True, type=Path, help="folder for the draft; an interrupted run resumes there")
    train.add_argument("--blocks", type=int, default=1, help="decoder blocks of the draft, 1 to 6")
    train.add_argument("--fusion", default="dgf", choices=("dgf", "eagle", "eagle3"), help="the draft's kind")
    _add_recipe(train)
    train.set_defaults(run=_train)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """One option for each number in the recipe, with the recipe's own defaults and words."""
    words = option_help()
    for field in fields(Recipe):
        if isinstance(field.default, int | float | str):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                help=f"{words[field.name]} (default: %(default)s)",
            )


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo_prompts, load_pair, report, run_demo
    from .engines import prepare_target

    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; expected at least 1")
    target, draft, tokenizer = load_pair()
    prepare_target(target)
    prompt = demo_prompts()[0] if arguments.prompt is None else arguments.prompt
    result = run_demo(target, draft, tokenizer, prompt, arguments.max_new_tokens, arguments.repeats)
    print(result.text, end="\n\n")
    print(report(result, target, draft, tokenizer))


def _generate(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    from .engines import prepare_target
    from .modeling import DovetailAssistantModel

    tokenizer = AutoTokenizer.from_pretrained(_existing(arguments.target))
    target = prepare_target(AutoModelForCausalLM.from_pretrained(arguments.target, dtype="auto"), arguments.engine)
    draft = DovetailAssistantModel.from_pretrained(_existing(arguments.draft), dtype="auto")
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
    stats = draft.last_stats
    print(f"{stats.new_tokens} tokens, {stats.tokens_per_round:.2f} per round", file=sys.stderr)


def _existing(name: str) -> str:
    """A folder or the name of a model; a path that is not there gets an error of its own."""
    if os.sep in name and not os.path.exists(name) and (name.startswith((os.sep, ".")) or name.count(os.sep) > 1):
        raise ValueError(f"there is no folder {name}")
    return name


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert_draft

    target = None if arguments.target is None else _existing(arguments.target)
    print(convert_draft(_existing(arguments.source), arguments.out, target))
    print(f"the draft is in {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .modeling import DovetailAssistantModel
    from .train import read_texts, token_stream, train_draft

    names = {field.name for field in fields(Recipe)} & set(vars(arguments))
    recipe = Recipe(**{name: getattr(arguments, name) for name in names})
    tokenizer = AutoTokenizer.from_pretrained(_existing(arguments.target))
    target = AutoModelForCausalLM.from_pretrained(arguments.target, dtype="auto")
    stream = token_stream(tokenizer, read_texts(arguments.data))
    if len(stream) < recipe.window:
        raise ValueError(f"the text has {len(stream)} tokens; expected at least one window of {recipe.window}")
    windows = stream[: len(stream) // recipe.window * recipe.window].view(-1, recipe.window)
    draft = DovetailAssistantModel.from_target(target, arguments.blocks, arguments.fusion).float()
    train_draft(draft, target, windows, recipe, arguments.out, tokenizer)
    draft.to(target.dtype).save_pretrained(arguments.out)
    print(f"the draft is in {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
