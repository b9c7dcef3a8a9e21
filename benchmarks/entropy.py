"""What the demo target's own entropy allows at temperature 1: an ideal draft that does not know the target's draws.

    python benchmarks/entropy.py [--prompts 24] [--tokens 64]

The target samples answers to HumanEval's prompts. Then they are read again in rounds, each with the tree that a draft
with the target's own distribution would propose: of all continuations up to a depth, those that are likeliest. So many
of its tokens are right as the answer goes along it; expected are as many as its nodes' probabilities say in sum.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from common import RESULTS, humaneval_prompts, write
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from hf_dovetail import TreeShape
from hf_dovetail.anatomy import CACHE
from hf_dovetail.demo import load_pair

SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}
Tokens = tuple[int, ...]


def likeliest(following: Callable[[list[Tokens]], Tensor], nodes: int, levels: int) -> dict[Tokens, float]:
    """The `nodes` likeliest paths of 1 to `levels` tokens, with their probabilities.

    Args:
        following: (n, V) distributions of the token behind each of n paths of one length.
        nodes: of the tree. levels: its depth.
    """
    best: dict[Tokens, float] = {}
    frontier: dict[Tokens, float] = {(): 1.0}
    for _ in range(levels):
        rows = following(list(frontier))
        chances, tokens = rows.topk(min(nodes, rows.shape[1]), dim=-1)
        children = {
            (*path, token): reached * chance
            for (path, reached), row, ids in zip(frontier.items(), chances.tolist(), tokens.tolist(), strict=True)
            for chance, token in zip(row, ids, strict=True)
        }
        best = dict(sorted({**best, **children}.items(), key=lambda item: -item[1])[:nodes])
        frontier = {path: chance for path, chance in children.items() if path in best}
        if not frontier:
            break
    return best


class Distributions:
    """The target's next-token distributions behind a prefix."""

    def __init__(self, target: PreTrainedModel, prefix: Tensor) -> None:
        self._target, self._cache = target, DynamicCache()
        self._root = self._run(prefix, self._cache)

    def __call__(self, paths: list[Tokens]) -> Tensor:
        if paths == [()]:
            return self._root
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(paths))
        return self._run(torch.tensor(paths), cache)

    def _run(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """(B, V) behind the last of ids (B, T)."""
        return self._target(input_ids=ids, logits_to_keep=1, **{CACHE: cache}).logits[:, -1].softmax(dim=-1)


def rounds_of(target: PreTrainedModel, answer: Tensor, start: int, shape: TreeShape) -> list[tuple[float, int]]:
    """(expected, found) tokens of each round that reads `answer` (1, T) from position `start` on."""
    rounds, place = [], start
    while place < answer.shape[1]:
        tree = likeliest(Distributions(target, answer[:, :place]), shape.nodes, shape.levels)
        right = 0
        while tuple(answer[0, place : place + right + 1].tolist()) in tree and place + right + 1 < answer.shape[1]:
            right += 1
        rounds.append((1.0 + sum(tree.values()), right + 1))
        place += right + 1
    return rounds


def entropies(target: PreTrainedModel, answer: Tensor, start: int) -> list[float]:
    """Of the distributions from which the answer's tokens were drawn, in nats."""
    logs = target(input_ids=answer).logits[0, start - 1 : -1].log_softmax(dim=-1)
    return (-(logs.exp() * logs).sum(dim=-1)).tolist()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--name", default="entropy")
    arguments = parser.parse_args()
    target, _, tokenizer = load_pair()
    shape, nats, rounds = TreeShape(), [], []
    for number, prompt in enumerate(tqdm(humaneval_prompts()[: arguments.prompts])):
        inputs = tokenizer(prompt, return_tensors="pt")
        start = inputs.input_ids.shape[1]
        torch.manual_seed(number)
        answer = target.generate(**inputs, max_new_tokens=arguments.tokens, **SAMPLED)
        nats += entropies(target, answer, start)
        rounds += rounds_of(target, answer, start + 1, shape)  # the first token is the prompt's
    known = json.loads((RESULTS / "acceptance.json").read_text())
    result: dict[str, Any] = {
        "shape": vars(shape),
        "prompts": arguments.prompts,
        "tokens": len(nats),
        "rounds": len(rounds),
        "entropy_nats_per_token": round(sum(nats) / len(nats), 3),
        "expected_tokens_per_round": round(sum(expected for expected, _ in rounds) / len(rounds), 3),
        "found_tokens_per_round": round(sum(found for _, found in rounds) / len(rounds), 3),
        "trained_draft_with_known_draws": known["results"]["temperature_1"]["tokens_per_round"],
    }
    print(result)
    write(arguments.name, result)


if __name__ == "__main__":
    main()
