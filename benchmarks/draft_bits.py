"""Tokens per round of the demo pair with its draft's weights in bfloat16, in 8 bits, and, as a trial, in 4.

    python benchmarks/draft_bits.py [--prompts 80]

The target computes in float32, so that the draft takes copies of its embeddings and LM head, as it does on a GPU. 8
bits are `from_pretrained(..., weight_bits=8)`. 4 bits are no option of the package: here the same weights are rounded
in place to 16 steps in groups of inputs, each group's scale being the one of 15 tried that leaves the least squared
error.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from acceptance import measure
from common import humaneval_prompts, write
from torch import Tensor

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import load_pair, pair_path

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature_1": {"do_sample": True, "temperature": 1.0, "top_k": 0},
}


def in_4_bits(weight: Tensor, group: int) -> Tensor:
    """(N, K) weights, each one of 16 multiples of its group's scale."""
    groups = weight.float().unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 7.5
    tried = [
        (groups / scale).round().clamp(-8, 7) * scale for scale in (largest * f for f in torch.linspace(0.7, 1.05, 15))
    ]
    errors = torch.stack([(part - groups).square().sum(-1) for part in tried])  # (15, N, groups)
    best = errors.argmin(0)[None, ..., None].expand(1, *groups.shape)
    return torch.stack(tried).gather(0, best)[0].flatten(1).to(weight.dtype)


@torch.no_grad()
def round_to_4_bits(draft: DovetailAssistantModel, group: int) -> None:
    """Round all matrices of a draft that has met its target, those that it shares included."""
    for name, parameter in draft.named_parameters():
        if parameter.ndim == 2:
            turned = name.startswith("fusion.W_")  # used as x @ W
            rounded = in_4_bits(parameter.T if turned else parameter, group)
            parameter.copy_(rounded.T if turned else rounded)
    shared = draft._shared
    rounded = in_4_bits(shared.embedding, group)
    head = rounded if shared.head is shared.embedding else in_4_bits(shared.head, group)
    draft._shared = replace(shared, embedding=rounded, head=head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=80)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    target, _, tokenizer = load_pair(torch.float32)
    prompts, results = humaneval_prompts()[: arguments.prompts], {}
    cases = {
        "bfloat16": (None, 0),
        "8 bits": (8, 0),
        "4 bits, groups of 64": (None, 64),
        "4 bits, groups of 32": (None, 32),
    }
    for name, (bits, group) in cases.items():
        draft = DovetailAssistantModel.from_pretrained(pair_path("draft"), dtype=torch.bfloat16, weight_bits=bits)
        draft.draft_device, draft.tree = "cpu", TreeShape()
        draft.meet(target)
        if group:
            round_to_4_bits(draft, group)
        results[name] = {
            kind: measure(target, draft, tokenizer, prompts, arguments.max_new_tokens, **sampling)
            for kind, sampling in SAMPLINGS.items()
        }
        print(name, {kind: results[name][kind]["tokens_per_round"] for kind in SAMPLINGS}, flush=True)
    shape = vars(TreeShape())
    write("draft_bits", {"shape": shape, "max_new_tokens": arguments.max_new_tokens, "results": results})


if __name__ == "__main__":
    main()
