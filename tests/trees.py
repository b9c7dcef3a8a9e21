"""What drafted and verified trees are held against: EAGLE-2 by brute force, and the mask of a tree, path by path."""

from __future__ import annotations

from collections.abc import Callable

import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.tree import DraftTree

Continuations = Callable[[tuple[int, ...]], Tensor]
"""The draft's log-probabilities (V,) of what follows a path below the root."""


@torch.no_grad()
def features_of(target: PreTrainedModel, ids: Tensor) -> Tensor:
    """What a draft reads: the hidden states behind the final norm."""
    return target(ids, output_hidden_states=True).hidden_states[-1]


def from_scratch(
    draft: DovetailAssistantModel, known: Tensor, features: Tensor, sharpness: float = 1.0
) -> Continuations:
    """`known` (1, n) ends with the root; `features` (1, n - 1, h) are the target's, of the tokens before it."""

    @torch.no_grad()
    def continuations(path: tuple[int, ...]) -> Tensor:
        tokens = torch.cat((known, torch.tensor([path], dtype=torch.long)), dim=1)
        if not draft.reads_features:
            return (sharpness * draft.lm(tokens).logits[0, -1]).log_softmax(-1)
        own = features
        for length in range(known.shape[1], tokens.shape[1] + 1):  # one more row of the draft's own in each turn
            hidden = draft(tokens[:, 1:length], own)
            own = torch.cat((features, hidden[:, features.shape[1] - 1 :]), dim=1)
        return (sharpness * draft.logits(hidden)[0, -1]).log_softmax(-1)

    return continuations


def eagle_2(continuations: Continuations, shape: TreeShape) -> dict[tuple[int, ...], float]:
    """EAGLE-2's expansion and re-ranking, written with paths and dictionaries: path -> log-probability."""

    def children(path: tuple[int, ...], score: float) -> dict[tuple[int, ...], float]:
        best = continuations(path).topk(min(shape.top_k, tiny.VOCAB))
        return {(*path, int(t)): score + float(v) for v, t in zip(best.values, best.indices, strict=True)}

    found = frontier = children((), 0.0)
    for _ in range(shape.depth):
        level: dict[tuple[int, ...], float] = {}
        for path, score in frontier.items():
            level |= children(path, score)
        found = found | level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: shape.top_k])
    return dict(sorted(found.items(), key=lambda item: -item[1])[: shape.nodes])


def paths(tree: DraftTree) -> dict[tuple[int, ...], float]:
    """Path of tokens below the root -> log-probability, of every node."""
    return {
        tuple(tree.tokens[0, tree.path(node)[1:]].tolist()): float(tree.log_probs[0, node])
        for node in range(1, tree.num_nodes + 1)
    }


PARENTS = (-1, 0, 0, 1, 1, 3, 2, 5, 5, 6, 8, 10, *range(7, 31), *range(33, 37))
"""Of 40 rows: more than the kernel looks at together, and paths that leave most of them out."""


def tree_mask(context: int, skipped: int) -> tuple[Tensor, list[list[int]]]:
    """(1, 1, T, context + T) mask of a tree whose rows do not see the first `skipped` keys, and what each row sees."""
    rows = len(PARENTS)
    allowed, seen = torch.zeros(1, 1, rows, context + rows, dtype=torch.bool), []
    for row in range(rows):
        path, node = [], row
        while node >= 0:
            path.append(context + node)
            node = PARENTS[node]
        seen.append([*range(skipped, context), *reversed(path)])
        allowed[0, 0, row, seen[-1]] = True
    return allowed, seen
