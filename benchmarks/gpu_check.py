"""What only a machine with a GPU can show, in one run of at most ten minutes, as one JSON.

    python benchmarks/gpu_check.py                # on the accelerator
    python benchmarks/gpu_check.py --dry-run      # the same steps at toy size on the CPU, where nothing is proven

Steps: the GPU tests; the draft's latency with graphs and without; the demo pair end to end; and a CPU target of 7 B
shape (random weights) with a 5-block draft: plain, drafted, and under memory budgets. Its acceptance is *synthetic*: a
drafted token is taken with a stated probability, since random models agree about nothing. Times and bytes there are
real, texts are not. Each step's result is written as soon as it is there; a step that fails is recorded, and the others
go on.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import draft_latency
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare_target, restore_target
from hf_dovetail.accept import Accepted, walk
from hf_dovetail.bench import rows
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.placement import WEIGHTS
from hf_dovetail.prepare import plan_of
from hf_dovetail.tree import DraftTree

NAME = "gpu_check"
RATES = (0.6, 0.8)
CHAIN = TreeShape(nodes=7, depth=6, top_k=1)
_CERTAIN = 1e4  # added to a logit, so that greedy decoding takes its token, or taken away, so that it does not
_TEST_LIMIT_S = 240


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        config: of the target.
        blocks: of its draft.
        budgets: of the device's memory.
        context, new_tokens: of an answer.
        rounds, contexts: of a latency's case.
        tests: what pytest runs.
    """

    config: dict[str, Any]
    blocks: int
    budgets: tuple[str, ...]
    context: int
    new_tokens: int
    rounds: int
    contexts: list[int]
    tests: tuple[str, ...]


FULL = Size(
    {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    },
    5, ("3GiB", "7GiB"), 512, 32, 25, [128, 1024], ("-m", "gpu", "tests"),
)  # fmt: skip
TOY = Size(
    {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256,
    },
    2, ("3GiB", "7GiB"), 64, 12, 6, [16], ("-m", "gpu", "tests/test_gpu.py"),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="toy size, on the CPU")
    parser.add_argument("--out", type=Path, default=common.RESULTS / f"{NAME}.json", help="the JSON")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.accelerator.is_available():
        raise SystemExit("there is no accelerator on this machine; --dry-run tries the steps on the CPU")
    size, result = TOY if arguments.dry_run else FULL, {"dry_run": arguments.dry_run, "device": device_name()}
    for name, step in STEPS.items():
        begin = time.perf_counter()
        try:
            found = step(size)
        except Exception as error:  # the other steps are worth having
            found = {"failed": f"{type(error).__name__}: {error}"}
        result[name] = {"seconds": round(time.perf_counter() - begin, 1), **found}
        print(name, result[name], flush=True)
        common.write_to(arguments.out, result)


def device_name() -> str:
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return "none"
    return torch.cuda.get_device_name() if device.type == "cuda" else device.type


def gpu_tests(size: Size) -> dict[str, Any]:
    """The tests marked `gpu`: how many passed, and the end of what pytest said."""
    command = [sys.executable, "-m", "pytest", "-rf", "-p", "no:cacheprovider", *size.tests]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=_TEST_LIMIT_S, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    return {**counts, "status": done.returncode, "said": done.stdout[-2000:] if done.returncode else last}


def latency(size: Size) -> dict[str, Any]:
    """A round of drafting, with graphs and without."""
    modes = [False, True] if torch.cuda.is_available() else [False]
    cases = [draft_latency.pair_case(size.rounds)]
    if size is FULL:
        cases += draft_latency.lm_cases(size.rounds, size.contexts, "auto")
        cases += draft_latency.big_cases(size.rounds, size.contexts, "auto")
    return {"cases": [draft_latency.measure(case, size.rounds, graphs) for case in cases for graphs in modes]}


def demo_pair(size: Size) -> dict[str, Any]:
    """The pair in the package: real text, real acceptance."""
    target, draft, tokenizer = load_pair()
    ids = tokenizer(demo_prompts()[0], return_tensors="pt").input_ids
    plain, plain_ms = answer(target, ids, 4 * size.new_tokens)
    ours, ms = answer(target, ids, 4 * size.new_tokens, assistant_model=draft)
    stats = draft.last_stats
    return {
        "identical": torch.equal(plain, ours),
        "plain_ms_per_token": plain_ms,
        "dovetail_ms_per_token": ms,
        "tokens_per_round": round(stats.tokens_per_round, 3),
        **bytes_per_round(draft),
    }


def synthetic(size: Size) -> dict[str, Any]:
    """A target of 7 B shape on the CPU, with a draft of 5 blocks and synthetic acceptance."""
    target = random_target(size)
    draft = DovetailAssistantModel.from_target(target, num_hidden_layers=size.blocks)
    draft.tree, draft.strict = CHAIN, True
    ids = torch.randint(size.config["vocab_size"], (1, size.context))
    settings: list[str | None] = [None, *size.budgets]
    return {
        "acceptance": "synthetic",
        "rates": list(RATES),
        "target_bytes": sum(p.nbytes for p in target.parameters()),
        "settings": [one_setting(target, draft, ids, size, budget) for budget in settings],
    }


def one_setting(
    target: LlamaForCausalLM, draft: DovetailAssistantModel, ids: Tensor, size: Size, budget: str | None
) -> dict[str, Any]:
    """Plain and drafted answers with the target on the CPU (`budget` None), or spread under a budget."""
    found: dict[str, Any] = {"budget": budget}
    before = allocated()
    try:
        prepare_target(target, vram_budget=budget, draft=None if budget is None else draft)
        draft.meet(target)
    except ValueError as error:
        return {**found, "refused": str(error)}
    try:
        made = plan_of(target)
        if made is not None:
            found["layers_on_device"] = made.layers
            found["memory"] = {"planned_weights": made.of(*WEIGHTS), "measured_weights": allocated() - before}
        _, found["plain_ms_per_token"] = answer(target, ids, size.new_tokens)
        found["drafted"] = []
        for rate in RATES:
            with acceptance_of(rate):
                _, ms = answer(target, ids, size.new_tokens, assistant_model=draft)
            stats = draft.last_stats
            drafted = {"rate": rate, "ms_per_token": ms, "tokens_per_round": round(stats.tokens_per_round, 3)}
            drafted["draft_ms_per_round"] = round(stats.draft_ms / max(stats.rounds, 1), 2)
            drafted["verify_ms_per_round"] = round(stats.verify_ms / max(stats.rounds, 1), 2)
            found["drafted"].append({**drafted, **bytes_per_round(draft)})
        if made is not None and torch.cuda.is_available():
            found["memory"] |= {"planned_peak": made.total, "measured_peak": torch.cuda.max_memory_allocated() - before}
    finally:
        restore_target(target)
        draft.release()
    return found


@contextmanager
def acceptance_of(rate: float) -> Any:
    """Within it a drafted token is the target's choice with this probability, given that its parent was accepted."""
    generator = torch.Generator().manual_seed(0)

    def steered(tree: DraftTree, logits: Tensor, select: Callable, row: int = 0) -> Accepted:
        logits, children = logits.clone(), set()
        for node in range(1, tree.num_nodes + 1):
            parent = int(tree.parents[row, node])
            taken = parent not in children and float(torch.rand((), generator=generator)) < rate
            logits[row, parent, int(tree.tokens[row, node])] += _CERTAIN if taken else -_CERTAIN
            children.add(parent)
        return walk(tree, logits, select, row)

    with patch("hf_dovetail.decode.walk", steered):
        yield


@torch.no_grad()
def random_target(size: Size) -> LlamaForCausalLM:
    """A Llama in bfloat16 on the CPU, its matrices filled with repeated noise: drawing 7 B numbers takes minutes."""
    config = LlamaConfig(**size.config, eos_token_id=None, pad_token_id=0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    noise = 0.02 * torch.randn(1 << 20).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.data.view(-1)
        for begin in range(0, len(flat), len(noise)):
            part = flat[begin : begin + len(noise)]
            part.copy_(noise[: len(part)].roll(begin // len(noise)))
    return model


def answer(target: LlamaForCausalLM, ids: Tensor, new_tokens: int, **options: Any) -> tuple[Tensor, float]:
    """A greedy answer, and its ms per token behind the first; the second of two."""
    for _ in range(2):
        found = rows.answer(target, rows.Row("", options), ids, new_tokens, 0, do_sample=False)
    return torch.tensor(found.tokens), round(found.decode_ms / max(found.decoded, 1), 3)


def bytes_per_round(draft: DovetailAssistantModel) -> dict[str, float]:
    """What crossed between host and device."""
    stats = draft.last_stats
    names = ("bytes_to_draft", "bytes_to_target")
    return {f"{name}_per_round": round(stats[name] / max(stats.rounds, 1)) for name in names}


def allocated() -> int:
    """Bytes of the device that torch holds; 0 without CUDA. The peak is counted anew from here."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


STEPS: dict[str, Callable[[Size], dict[str, Any]]] = {
    "tests": gpu_tests,
    "latency": latency,
    "demo_pair": demo_pair,
    "synthetic_7b": synthetic,
}

if __name__ == "__main__":
    main()
