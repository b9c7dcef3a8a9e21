"""Whether drafting ahead while the target verifies would pay: hit rates and losses counted, speed computed.

    python benchmarks/overlap.py [--prompts 164]

While the target verifies a tree, the draft's device is idle. It could draft the next tree for the likeliest outcomes (a
path of the tree and the bonus token behind it), from its own features, since the target's are not there yet. Counted on
the demo pair, greedily, over HumanEval prompts, in every round whose outcome was among the first guesses: tokens that
the tree drafted ahead yields, and tokens that the tree drafted in the normal way yields at the same place. What a tree
yields is read off the target's own greedy answer. From this, and from the draft's measured time per round, the speed
with and without drafting ahead is computed for several verify times; nothing else of a round is counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from common import RESULTS, humaneval_prompts, write
from torch import Tensor
from tqdm.auto import tqdm

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import load_pair
from hf_dovetail.levels import expand_on_host
from hf_dovetail.plugin.sampling import SHARPEST
from hf_dovetail.steps import BlockSteps
from hf_dovetail.tree import DraftTree, rerank

SHAPE = TreeShape(nodes=16, depth=7, top_k=10)
GUESSES = (1, 2, 4, 8)
VERIFY_MS = (50, 150, 400)
ASSUMED_MS = (25, 50)
"""Draft times on weaker GPUs; not measured."""


@dataclass(frozen=True)
class Guess:
    """An outcome of a round: the tokens accepted and the bonus, and the draft's own features before each of them."""

    tokens: tuple[int, ...]
    features: Tensor  # (1, tokens, h)


@dataclass
class Counts:
    """Sums over all rounds."""

    rounds: int = 0
    tokens: int = 0
    hits: Counter = field(default_factory=Counter)  # by the guess's place
    normal: Counter = field(default_factory=Counter)  # tokens of the normal trees there, by the guess's place
    ahead: Counter = field(default_factory=Counter)  # tokens of the trees drafted ahead
    depths: Counter = field(default_factory=Counter)  # accepted nodes of the outcomes that were guessed first


def tree_behind(steps: BlockSteps, hidden: Tensor, root: int) -> DraftTree:
    """The tree under `root`, which the last committed row's hidden state (1, 1, h) predicts from."""
    packed = rerank(expand_on_host(steps, hidden, SHAPE), SHAPE.nodes)
    steps.forget()
    return DraftTree.unpack(torch.tensor([[root]]), packed)


def hidden_states(steps: BlockSteps, tree: DraftTree, hidden: Tensor) -> Tensor:
    """(N, h): the draft's feature of every node of a tree, the root's included."""
    states, order = hidden[0].repeat(tree.tokens.shape[1], 1), [0]
    for depth in range(1, int(tree.depths.max()) + 1):
        nodes = (tree.depths[0] == depth).nonzero().flatten().tolist()
        order += nodes
        visible = tree.ancestors[0][nodes][:, order[1:]]
        parents = states[tree.parents[0, nodes]]
        states[nodes] = steps.level(tree.tokens[:, nodes], parents.unsqueeze(0), visible)[0]
    steps.forget()
    return states


def guesses(steps: BlockSteps, tree: DraftTree, hidden: Tensor, count: int) -> list[Guess]:
    """The likeliest outcomes of verifying a tree, as the draft sees it, likeliest first."""
    states = hidden_states(steps, tree, hidden)
    log_probs = steps.logits(states.unsqueeze(0))[0].log_softmax(-1)  # (N, V)
    for node, parent in enumerate(tree.parents[0].tolist()):
        if parent >= 0:  # a child that is in the tree would be accepted
            log_probs[parent, tree.tokens[0, node]] = float("-inf")
    best, tokens = log_probs.max(-1)
    found = []
    for node in (tree.log_probs[0] + best).argsort(descending=True)[:count].tolist():
        path = tree.path(node)
        outcome = (*tree.tokens[0, path[1:]].tolist(), int(tokens[node]))
        found.append(Guess(outcome, states[path].unsqueeze(0)))
    return found


def outcome(tree: DraftTree, following: list[int]) -> tuple[int, ...]:
    """The tokens that verification gives, when the target goes on with `following`."""
    node, taken = 0, 0
    while taken < len(following) and (child := tree.child(node, following[taken])) is not None:
        node, taken = child, taken + 1
    return tuple(following[: taken + 1])


@torch.inference_mode()
def follow(draft: DovetailAssistantModel, ids: Tensor, features: Tensor, prompt: int, counts: Counts) -> None:
    """Draft along one answer, in the normal way, and compare with what was drafted ahead."""
    steps = BlockSteps(draft, draft.new_rows(ids.shape[1] + 64), SHARPEST)
    answer, known, ahead = ids[0].tolist(), prompt, {}
    hidden = steps.catch_up(ids[:, 1 : prompt + 1], features[:, :prompt])
    while len(answer) - 1 - known > SHAPE.levels:  # what is left must not bound what a tree can yield
        tree = tree_behind(steps, hidden, answer[known])
        result = outcome(tree, answer[known + 1 :])
        if ahead:
            place, other = ahead
            counts.hits[place] += 1
            counts.normal[place] += len(result)
            counts.ahead[place] += len(outcome(other, answer[known + 1 :]))
        counts.rounds += 1
        counts.tokens += len(result)
        ranked, ahead = guesses(steps, tree, hidden, max(GUESSES)), None
        for place, guess in enumerate(ranked):
            if guess.tokens == result:
                if place == 0:
                    counts.depths[len(result) - 1] += 1
                guessed = steps.catch_up(torch.tensor([guess.tokens]), guess.features)
                ahead = place, tree_behind(steps, guessed, guess.tokens[-1])
                steps.held -= len(guess.tokens)
        end = known + len(result)
        hidden = steps.catch_up(ids[:, known + 1 : end + 1], features[:, known:end])
        known = end


def payoff(counts: Counts, draft: dict[str, float], verify_ms: float, first: int) -> float:
    """Speed with drafting ahead over speed without; a tree drafted ahead costs the time that the host issues it."""
    draft_ms = draft["total_ms"]
    hits = sum(counts.hits[place] for place in range(first)) / counts.rounds
    lost = sum(counts.normal[place] - counts.ahead[place] for place in range(first)) / counts.rounds
    tokens = counts.tokens / counts.rounds
    ahead_ms = verify_ms + first * draft["issue_ms"] + (1 - hits) * draft_ms
    return (tokens - lost) / ahead_ms * (verify_ms + draft_ms) / tokens


def latencies() -> dict[str, dict[str, float]]:
    """Draft times per round in ms: measured on an H100, and assumed, as if issued like the measured ones."""
    cases = json.loads((RESULTS / "draft_latency_h100.json").read_text())["cases"]
    names = {False: "without graphs", True: "with graphs"}
    measured = {f"{case['case']}, {names[case['graphs']]}": case for case in cases if "1024" in case["case"]}
    issue_ms = min(case["issue_ms"] for case in measured.values() if "5 blocks" in case["case"])
    assumed = {f"weaker GPU, {ms} ms assumed": {"total_ms": ms, "issue_ms": issue_ms} for ms in ASSUMED_MS}
    return measured | assumed


def report(counts: Counts) -> dict[str, Any]:
    """All figures."""
    result: dict[str, Any] = {
        "rounds": counts.rounds,
        "tokens_per_round": round(counts.tokens / counts.rounds, 3),
        "accepted_nodes_of_first_guesses_hit": dict(sorted(counts.depths.items())),
        "first_guesses": [],
    }
    for first in GUESSES:
        sums = [sum(part[place] for place in range(first)) for part in (counts.hits, counts.normal, counts.ahead)]
        row = {
            "guesses": first,
            "hit_rate": round(sums[0] / counts.rounds, 4),
            "tokens_per_round_normal": round(sums[1] / sums[0], 3),
            "tokens_per_round_ahead": round(sums[2] / sums[0], 3),
            "computed_speed_ratio": {
                f"{name}: draft {draft['total_ms']:.1f} ms, verify {verify_ms} ms": round(
                    payoff(counts, draft, verify_ms, first), 4
                )
                for name, draft in latencies().items()
                for verify_ms in VERIFY_MS
            },
        }
        result["first_guesses"].append(row)
        print(json.dumps(row, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=164)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--name", default="overlap")
    arguments = parser.parse_args()
    target, draft, tokenizer = load_pair()
    draft.draft_device = "cpu"
    draft.meet(target)
    counts = Counts()
    for text in tqdm(humaneval_prompts()[: arguments.prompts], leave=False):
        prompt = tokenizer(text, return_tensors="pt").input_ids
        ids = target.generate(prompt, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        with torch.no_grad():
            features = target(ids, output_hidden_states=True).hidden_states[-1]
        follow(draft, ids, features, prompt.shape[1], counts)
    write(arguments.name, {"shape": vars(SHAPE), "max_new_tokens": arguments.max_new_tokens, **report(counts)})


if __name__ == "__main__":
    main()
