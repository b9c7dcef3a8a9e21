"""The demo: the pair of models in the package writes Python, with and without Dovetail, and the figures of both."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .decode import Round
from .engines import engine_of
from .modeling import DovetailAssistantModel
from .stats import GenerationStats


def pair_path(part: str = "") -> Path:
    """Folder of the pair in the package; `part` is "target" or "draft"."""
    return Path(str(files("hf_dovetail"))) / "pair" / part


def load_pair(
    dtype: torch.dtype = torch.float32,
) -> tuple[PreTrainedModel, DovetailAssistantModel, PreTrainedTokenizerBase]:
    """The demo target on the CPU, its draft, and their tokenizer; offline."""
    target = AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=dtype)
    draft = DovetailAssistantModel.from_pretrained(pair_path("draft"), dtype=dtype)
    return target, draft, AutoTokenizer.from_pretrained(pair_path("target"))


def demo_prompts() -> list[str]:
    """Real prompts for the demo target: problems of HumanEval, which its training never saw."""
    lines = (pair_path() / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Args:
        text: the prompt and the answer.
        identical: whether Dovetail's answer is plain decoding's, token for token.
        plain_s, dovetail_s: median wall time of an answer.
        stats: of the last Dovetail answer.
        fullest: the round that accepted most; None if the prefill's token was the whole answer.
    """

    text: str
    identical: bool
    plain_s: float
    dovetail_s: float
    stats: GenerationStats
    fullest: Round | None


def run_demo(
    target: PreTrainedModel,
    draft: DovetailAssistantModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    repeats: int,
) -> DemoResult:
    """Decode one prompt plainly and with Dovetail, in turns, `repeats` times each after a warm-up."""
    if not prompt:
        raise ValueError("the prompt is empty; give some text to continue")
    inputs = tokenizer(prompt, return_tensors="pt").to(target.device)
    rounds: list[Round] = []
    draft.watch = rounds.append
    plain_s, dovetail_s = [], []
    try:
        for repeat in range(repeats + 1):
            plain, seconds = _timed(target, inputs, max_new_tokens)
            assisted, assisted_seconds = _timed(target, inputs, max_new_tokens, assistant_model=draft)
            if repeat:  # the first turn warms up
                plain_s.append(seconds)
                dovetail_s.append(assisted_seconds)
    finally:
        draft.watch = None
    return DemoResult(
        text=tokenizer.decode(assisted[0], skip_special_tokens=True),
        identical=torch.equal(plain, assisted),
        plain_s=statistics.median(plain_s),
        dovetail_s=statistics.median(dovetail_s),
        stats=draft.last_stats,
        fullest=max(rounds, key=lambda r: len(r.accepted.tokens), default=None),
    )


def _timed(target: PreTrainedModel, inputs: Any, max_new_tokens: int, **assistant: Any) -> tuple[torch.Tensor, float]:
    begin = time.perf_counter()
    answer = target.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **assistant)
    return answer, time.perf_counter() - begin


def report(
    result: DemoResult, target: PreTrainedModel, draft: DovetailAssistantModel, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The demo's figures as text."""
    stats = result.stats
    total = stats.prefill_ms + stats.draft_ms + stats.verify_ms + stats.overhead_ms
    split = ", ".join(
        f"{name} {100 * getattr(stats, f'{name}_ms') / total:.0f} %"
        for name in ("prefill", "draft", "verify", "overhead")
    )
    same = "yes, token for token" if result.identical else "NO - please report this"
    speedup = result.plain_s / result.dovetail_s
    nodes = f" of {stats.drafted / stats.rounds:.1f} nodes" if stats.rounds else ""
    lines = [
        f"target   {_describe(target)}, engine {engine_of(target)}",
        f"draft    {_describe(draft)}",
        f"plain    {stats.new_tokens / result.plain_s:7.1f} tokens/s",
        f"dovetail {stats.new_tokens / result.dovetail_s:7.1f} tokens/s  ({speedup:.2f} x plain)",
        f"identical output: {same} ({stats.new_tokens} tokens)",
        f"tokens per round: {stats.tokens_per_round:.2f} in {stats.rounds} rounds{nodes}",
        f"time: {split}",
    ]
    if draft.device == target.device:
        lines.append(
            "(the draft works on the target's own device here; the method is made for a large target and a GPU draft)"
        )
    if stats.cores_shared:
        lines.append(
            "(other processes keep these cores busy, which slows plain decoding down most: compare on a quiet machine)"
        )
    if result.fullest is not None:
        lines.append("the tree of the fullest round (* accepted; with the draft's probability of the path):")
        accepted = result.fullest.accepted.path[1:]
        lines.append(result.fullest.tree.draw(lambda token: tokenizer.decode([token]), accepted))
    return "\n".join(lines)


def _describe(model: PreTrainedModel) -> str:
    size = sum(p.numel() for p in model.parameters())
    precision = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {size / 1e6:.2f} M parameters, {precision}, on {_device_name(model.device)}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
