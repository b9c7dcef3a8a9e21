"""Tokens per round of the demo pair on held-out prompts: greedy, at temperature 1, and two controls.

    python benchmarks/acceptance.py [--draft FOLDER] [--prompts 100] [--name acceptance]
    python benchmarks/acceptance.py --sharpness 1 1.3 1.7 2.2 3 --name sharpness   # greedy only, for each limit

The controls are a draft with random weights (about 1 token per round) and the target as its own draft (the
most that the shape allows). Counts every token of every answer; the prefill's token is not a round's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import Tally, humaneval_prompts, write
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.bench.rows import randomised
from hf_dovetail.demo import load_pair
from hf_dovetail.plugin import sampling


def measure(
    target: PreTrainedModel,
    draft: DovetailAssistantModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    **sampling: Any,
) -> dict[str, Any]:
    """Tokens per round over all prompts together, and the share of rounds that accept each depth."""
    tally = Tally()
    for prompt in tqdm(prompts, leave=False):
        torch.manual_seed(0)
        inputs = tokenizer(prompt, return_tensors="pt")
        target.generate(**inputs, assistant_model=draft, max_new_tokens=max_new_tokens, **sampling)
        tally.add(draft.last_stats)
    return tally.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", type=Path, help="folder of another draft for the demo target")
    parser.add_argument("--prompts", type=int, default=164)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--name", default="acceptance")
    parser.add_argument(
        "--sharpness", type=float, nargs="+", help="limits of `plugin.sampling.sharpness_of` to compare"
    )
    arguments = parser.parse_args()
    target, draft, tokenizer = load_pair()
    if arguments.draft:
        draft = DovetailAssistantModel.from_pretrained(arguments.draft, dtype=torch.float32)
    torch.manual_seed(0)
    controls = {
        "random_weights": randomised(draft),
        "target_itself": DovetailAssistantModel.from_causal_lm(target),
    }
    for model in (draft, *controls.values()):
        model.tree = TreeShape()
    prompts, length = humaneval_prompts()[: arguments.prompts], arguments.max_new_tokens
    if arguments.sharpness:
        results = {}
        for sampling.SHARPEST in arguments.sharpness:
            found = measure(target, draft, tokenizer, prompts, length, do_sample=False)
            results[f"greedy at {sampling.SHARPEST}"] = found
            print(f"sharpness {sampling.SHARPEST}: {found['tokens_per_round']:.2f} tokens per round")
        write(arguments.name, {"shape": vars(draft.tree), "max_new_tokens": length, "results": results})
        return
    results = {
        "greedy": measure(target, draft, tokenizer, prompts, length, do_sample=False),
        "temperature_1": measure(target, draft, tokenizer, prompts, length, do_sample=True, temperature=1.0, top_k=0),
    }
    for name, control in controls.items():
        results[name] = measure(target, control, tokenizer, prompts[:20], length, do_sample=False)
    for name, result in results.items():
        print(f"{name:15} {result['tokens_per_round']:.2f} tokens per round, by depth {result['acceptance_by_depth']}")
    write(arguments.name, {"shape": vars(draft.tree), "max_new_tokens": length, "results": results})


if __name__ == "__main__":
    main()
