"""Small real models trained by others, with a DGF draft trained for each here, on real story openings.

    python benchmarks/real_models.py [--steps 400] [--drafts build/real_models]

Needs ../shared (models, TinyStories text, prompts). Trains a draft for each model on TinyStories, then counts tokens
per round and identical answers, greedy and sampled under a seed. babyllama also drafts as an ordinary small LM.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import SHARED, story_prompts, write
from losslessness import compare
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, read_texts, token_stream, train_draft

MODELS = ("stories260K", "babyllama-tok105", "babyllama-tok361as105", "atome-vanilla-1m-bytes")
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


def load(name: str) -> tuple[Any, Any]:
    folder = SHARED / "models" / name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def trained_draft(target: Any, tokenizer: Any, out: Path, steps: int) -> tuple[DovetailAssistantModel, float]:
    """A draft of one block, and the seconds that its training took (0 if it was finished before)."""
    if (out / "recipe.json").exists():
        return DovetailAssistantModel.from_pretrained(out, dtype=torch.float32), 0.0
    recipe = Recipe(steps=steps, batch=16, window=128, learning_rate=2e-3, distribution_weight=1.0, noise=0.0, unroll=3)
    text = read_texts([SHARED / "data/train/tinystories.txt"])[0][:1_500_000]
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    stream = token_stream(tokenizer, stories)
    windows = stream[: len(stream) // recipe.window * recipe.window].view(-1, recipe.window)
    torch.manual_seed(0)
    begin = time.perf_counter()
    draft = train_draft(DovetailAssistantModel.from_target(target), target, windows, recipe, out, Extras(tokenizer))
    return draft, time.perf_counter() - begin


def answers(target: Any, draft: Any, tokenizer: Any, length: int) -> dict[str, Any]:
    """Tokens per round and identical answers of one pair."""
    draft.tree, result = TreeShape(), {}
    for mode, sampling in (("greedy", {"do_sample": False}), ("temperature_1", SAMPLED)):
        found = result[mode] = compare(target, draft, tokenizer, story_prompts(), length, sampling)
        same = f"{found['identical']} of {found['tried']} identical"
        print(f"  {mode:14} {found['tokens_per_round']:.2f} tokens per round, {same}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--drafts", type=Path, default=Path("build/real_models"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    for name in MODELS:
        print(name)
        target, tokenizer = load(name)
        draft, seconds = trained_draft(target, tokenizer, arguments.drafts / name, arguments.steps)
        found = answers(target, draft, tokenizer, arguments.max_new_tokens)
        results[name] = {"draft": "dgf, 1 block", "steps": arguments.steps, "training_s": round(seconds), **found}
    print("babyllama-tok105 drafts for babyllama-tok361as105")
    (target, tokenizer), (small, _) = load("babyllama-tok361as105"), load("babyllama-tok105")
    draft = DovetailAssistantModel.from_causal_lm(small)
    results["babyllama pair"] = {"draft": "causal LM", **answers(target, draft, tokenizer, arguments.max_new_tokens)}
    write("real_models", {"max_new_tokens": arguments.max_new_tokens, "results": results})


if __name__ == "__main__":
    main()
