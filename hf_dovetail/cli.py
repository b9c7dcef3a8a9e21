"""The command `hf-dovetail`: one subcommand each for the demo, generating text, measuring and training."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from .bench.command import add_bench_parser
from .calibrate_command import add_calibrate_parser
from .doctor import add_doctor_parser
from .loading import load_target, load_tokenizer
from .names import existing
from .train_command import add_train_parsers

_PIPE_CLOSED = 141  # what a shell shows of a command that SIGPIPE has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; errors of use end with one line on stderr and status 2, Ctrl-C with status 130.

    Where nobody reads on (`hf-dovetail demo | head -1`), it ends as any other command does: status 141, not a word.
    """
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError as error:
        if _is_read(sys.stdout):  # it was another pipe
            print(f"hf-dovetail: {error}", file=sys.stderr)
            return 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return _PIPE_CLOSED


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"hf-dovetail: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hf-dovetail: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_read(stream: TextIO) -> bool:
    """Whether somebody reads at the other end, or nobody can tell."""
    try:
        waiting = select.poll()  # Windows has none
        waiting.register(stream.fileno(), select.POLLOUT)
        return not any(event & select.POLLERR for _, event in waiting.poll(0))
    except (AttributeError, OSError, ValueError):  # no file at all
        return True


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
    add_train_parsers(commands)
    add_doctor_parser(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import demo_prompts, load_pair, report, run_demo
    from .prepare import prepare_target

    if arguments.repeats < 1:
        raise ValueError(f"--repeats is {arguments.repeats}; expected at least 1")
    target, draft, tokenizer = load_pair()
    prepare_target(target)
    prompt = demo_prompts()[0] if arguments.prompt is None else arguments.prompt
    result = run_demo(target, draft, tokenizer, prompt, arguments.max_new_tokens, arguments.repeats)
    print(result.text, end="\n\n")
    print(report(result, target, draft, tokenizer))


def _generate(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    from .modeling import DovetailAssistantModel
    from .prepare import prepare_target

    target = load_target("--target", arguments.target)
    if isinstance(target, DovetailAssistantModel):
        raise ValueError(f"--target {arguments.target} is a draft; give the model that it drafts for")
    tokenizer = load_tokenizer("--target", arguments.target)
    prepare_target(target, arguments.engine)
    draft = DovetailAssistantModel.from_pretrained(existing("--draft", arguments.draft), dtype="auto")
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    target.generate(**inputs, assistant_model=draft, max_new_tokens=arguments.max_new_tokens, streamer=streamer)
    stats = draft.last_stats
    print(f"{stats.new_tokens} tokens, {stats.tokens_per_round:.2f} per round", file=sys.stderr)


def _convert(arguments: argparse.Namespace) -> None:
    from .convert import convert_draft

    target = None if arguments.target is None else existing("--target", arguments.target)
    print(convert_draft(existing("the draft", arguments.source), arguments.out, target))
    print(f"the draft is in {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
