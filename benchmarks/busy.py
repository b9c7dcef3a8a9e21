"""Decoding beside other processes that keep cores busy: threads that wait asleep (`sharing`) against waiting in loops.

    python benchmarks/busy.py [--sizes 0.5B] [--tokens 48] [--repeats 3]

Each setting runs in turns, with 0, 1 and 2 neighbours per two cores, each in a session of its own, as a desktop's
programs are (Linux gives sessions equal shares). "plain" is generate without a draft, whose threads wait in loops, as
everywhere. ms per token of a whole call; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from common import humaneval_prompts, write
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, prepare_target, sharing
from hf_dovetail.bench.widen import PRESETS, map_draft, preset, widen
from hf_dovetail.demo import load_pair

PROMPT_TOKENS = 64
MODES = ("plain", "dovetail, in loops", "dovetail")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    loop = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(loop, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(mode: str, target: PreTrainedModel, draft: DovetailAssistantModel, ids: Tensor, tokens: int) -> float:
    """Of one answer."""
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    options |= {} if mode == "plain" else {"assistant_model": draft}
    sharing._shared_until = -float("inf")  # each answer finds out for itself
    begin = time.perf_counter()
    with patch.object(sharing, "_others", (lambda _: 0) if mode == "dovetail, in loops" else sharing._others):
        target.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return time.perf_counter() - begin


def pairs(sizes: list[str]) -> Iterator[tuple[str, PreTrainedModel, DovetailAssistantModel, Tensor]]:
    """Name, target, draft and prompt of each setting."""
    for dtype in (torch.float32, torch.bfloat16):
        target, draft, tokenizer = load_pair(dtype)
        ids = tokenizer(humaneval_prompts()[3], return_tensors="pt").input_ids[:, :PROMPT_TOKENS]
        prepare_target(target)
        yield f"demo pair, {str(dtype).removeprefix('torch.')}", target, draft, ids
    for size in sizes:
        for engine in ("onednn", "int8"):
            small, draft, _ = load_pair(torch.bfloat16)
            wide = prepare_target(widen(small, **vars(preset(size, small.config))), engine)
            yield f"widened {size}, {engine}", wide, map_draft(draft, small, wide), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=PRESETS, default=["0.5B"], help="widened targets")
    parser.add_argument("--tokens", type=int, default=48, help="length of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="busy")
    arguments = parser.parse_args()
    cores, rows = len(os.sched_getaffinity(0)), []
    for name, target, draft, ids in pairs(arguments.sizes):
        for _ in range(3):  # warms up, and the draft learns what rounds cost
            seconds("dovetail", target, draft, ids, arguments.tokens)
        for count in (0, cores // 2, cores):
            taken: dict[str, list[float]] = {mode: [] for mode in MODES}
            with neighbours(count):
                for _ in range(arguments.repeats):
                    for mode in MODES:
                        taken[mode].append(seconds(mode, target, draft, ids, arguments.tokens))
            found = {mode: round(1e3 * statistics.median(times) / arguments.tokens, 2) for mode, times in taken.items()}
            rows.append({"setting": name, "neighbours": count, "ms_per_token": found})
            print(rows[-1], flush=True)
    write(arguments.name, {"tokens": arguments.tokens, "repeats": arguments.repeats, "rows": rows})


if __name__ == "__main__":
    main()
