"""The flat tree and its re-ranking, against brute force on random trees."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dovetail import TreeShape
from hf_dovetail.tree import Candidates, DraftTree, rerank, rerank_on_host

SEEDS = range(12)


def random_parents(rng: random.Random, size: int) -> list[int]:
    """Parents of a random tree whose node 0 is the root."""
    return [-1, *(rng.randrange(node) for node in range(1, size))]


def tree_of(parents: list[int], tokens: list[int] | None = None) -> DraftTree:
    size = len(parents)
    return DraftTree(torch.tensor([tokens or list(range(size))]), torch.tensor([parents]), torch.zeros(1, size))


def climb(parents: list[int], node: int) -> list[int]:
    """The path to `node`, root first, one step at a time."""
    return [node] if node == 0 else [*climb(parents, parents[node]), node]


@pytest.mark.parametrize("seed", SEEDS)
def test_ancestors_depths_and_paths_are_those_of_a_walk_up_the_tree(seed: int) -> None:
    """Guards the tree mask: a node that saw a sibling, or not its grandparent, would get wrong logits."""
    parents = random_parents(random.Random(seed), 1 + seed * 2)
    tree = tree_of(parents)
    for node in range(len(parents)):
        path = climb(parents, node)
        assert tree.path(node) == path
        assert tree.depths[0, node] == len(path) - 1
        assert tree.ranks[0, node] == parents[:node].count(parents[node])
        assert tree.ancestors[0, node].nonzero().flatten().tolist() == path
    assert tree.num_nodes == len(parents) - 1


def test_rows_of_a_batch_do_not_mix() -> None:
    """Guards the batch dimension, which batched decoding will need."""
    rows = [random_parents(random.Random(seed), 9) for seed in (1, 2)]
    assert rows[0] != rows[1]
    tree = DraftTree(torch.arange(9).repeat(2, 1), torch.tensor(rows), torch.zeros(2, 9))
    for row, parents in enumerate(rows):
        assert [tree.path(node, row) for node in range(9)] == [climb(parents, node) for node in range(9)]
        assert tree.child(parents[8], 8, row) == 8
        assert torch.equal(tree.depths[row], tree_of(parents).depths[0])
        assert torch.equal(tree.ranks[row], tree_of(parents).ranks[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_child_is_the_first_that_carries_the_token(seed: int) -> None:
    """Guards the walk: equal tokens under different parents, and twice under one parent."""
    rng = random.Random(seed)
    parents = random_parents(rng, 20)
    tokens = [rng.randrange(4) for _ in parents]
    tree = tree_of(parents, tokens)
    for node in range(20):
        for token in range(5):
            kids = [k for k in range(1, 20) if parents[k] == node and tokens[k] == token]
            assert tree.child(node, token) == (kids[0] if kids else None)


@pytest.mark.parametrize(
    ("parents", "tokens"),
    [([[-1, 1, 0]], [[1, 2, 3]]), ([[-1, 2, 0]], [[1, 2, 3]]), ([[0, 0]], [[1, 2]]), ([[-1, -1]], [[1, 2]])],
)
def test_a_parent_behind_its_child_is_refused(parents: list[list[int]], tokens: list[list[int]]) -> None:
    """Guards `ancestors`, which is right only when parents come first."""
    with pytest.raises(ValueError, match="parent must stand before it"):
        DraftTree(torch.tensor(tokens), torch.tensor(parents), torch.zeros(1, len(tokens[0])))


def test_tensors_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        DraftTree(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 3), -1), torch.zeros(1, 2))


def random_candidates(rng: random.Random, size: int, ties: bool) -> Candidates:
    """Candidates as a draft makes them: parents first, a path never likelier than its start."""
    parents = [rng.randrange(-1, node) for node in range(size)]
    scores: list[float] = []
    for parent in parents:
        loss = rng.randrange(3) if ties else rng.random() * 2
        scores.append((scores[parent] if parent >= 0 else 0.0) - loss)
    tokens, log_probs = [rng.randrange(50) for _ in range(size)], [-rng.random() for _ in range(size)]
    return Candidates(*(torch.tensor([values]) for values in (tokens, parents, log_probs, scores)))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_rerank_keeps_the_best_and_every_parent_of_them(seed: int, ties: bool) -> None:
    """Guards the stable sort: a child with probability 1 ties with its parent and must not replace it; and the two
    numbers of a node: it is ranked by its score, and its log-probability is what is told of it."""
    rng = random.Random(seed)
    found = random_candidates(rng, 60, ties)
    tokens, parents, log_probs, scores = (t[0].tolist() for t in vars(found).values())
    for nodes in (1, 7, 16, 60, 99):
        kept = sorted(sorted(range(60), key=lambda i: (-scores[i], i))[:nodes])
        packed = rerank(found, nodes)
        assert torch.equal(rerank_on_host(found, nodes), packed)
        tree = DraftTree.unpack(torch.tensor([[77]]), packed)
        assert tree.tokens[0].tolist() == [77, *(tokens[i] for i in kept)]
        assert tree.parents[0].tolist() == [-1, *(kept.index(parents[i]) + 1 if parents[i] >= 0 else 0 for i in kept)]
        assert tree.log_probs[0].tolist() == pytest.approx([0.0, *(log_probs[i] for i in kept)])
    assert not ties or len(set(scores)) < 20


@pytest.mark.parametrize("ranked", [rerank, rerank_on_host])
def test_rerank_ranks_each_row_of_a_batch_by_itself(ranked: Callable[[Candidates, int], Tensor]) -> None:
    one, two = (random_candidates(random.Random(seed), 30, False) for seed in (1, 2))
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    packed = ranked(Candidates(*(torch.cat(pair) for pair in pairs)), 8)
    assert torch.equal(packed, torch.cat((ranked(one, 8), ranked(two, 8))))
    assert not torch.equal(packed[0], packed[1])


def test_packing_keeps_the_bits_of_the_log_probabilities() -> None:
    """Guards the one-copy form: float32 travels as int32 bits, large token ids stay exact."""
    log_probs = torch.tensor([[-0.1, -1e-30 - 0.7]])
    found = Candidates(torch.tensor([[250_000, 3]]), torch.tensor([[-1, 0]]), log_probs, log_probs)
    packed = rerank(found, 2)
    tree = DraftTree.unpack(torch.tensor([[9]]), packed)
    assert packed.dtype == torch.int32
    assert tree.tokens.tolist() == [[9, 250_000, 3]]
    assert torch.equal(tree.log_probs[:, 1:], found.log_probs)


def test_draw_shows_every_node_where_it_hangs() -> None:
    """Guards the picture of the demo."""
    tree = DraftTree(
        torch.tensor([[5, 6, 7, 8, 9]]),
        torch.tensor([[-1, 0, 0, 1, 3]]),
        torch.tensor([[0.0, 0.5, 0.25, 0.5, 0.125]]).log(),
    )
    assert tree.draw(decode=chr, accepted=(0, 1)).splitlines() == [
        f"{chr(5)!r} *",
        f"|- {chr(6)!r}  0.50 *",
        f"|  `- {chr(8)!r}  0.50",
        f"|     `- {chr(9)!r}  0.12",
        f"`- {chr(7)!r}  0.25",
    ]
    assert DraftTree.root_only(torch.tensor([[5]])).draw() == "'5'"
    assert tree.with_path([7, 4])[0].draw().splitlines()[-2:] == ["`- '7'  0.25", "   `- '4'  looked up"]


@pytest.mark.parametrize("name", ["nodes", "depth", "top_k"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None])
def test_a_shape_that_is_no_shape_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"TreeShape\.{name} is {value!r}"):
        TreeShape(**{name: value})


def test_top_k_of_zero_is_refused_and_zero_nodes_is_not() -> None:
    with pytest.raises(ValueError, match="top_k is 0"):
        TreeShape(top_k=0)
    assert TreeShape(nodes=0).levels == 0


def test_a_shape_within_another_exceeds_neither() -> None:
    assert TreeShape(16, 2, 10).within(TreeShape(9, 7, 4)) == TreeShape(9, 2, 4)
    assert TreeShape(16, 2, 10).within(TreeShape(0, 3, 4)) == TreeShape(0, 0, 4)
    assert TreeShape(0, 2, 10).within(TreeShape(9, 7, 4)) == TreeShape(0, 0, 4)


def test_the_default_shape_is_the_papers_server_setting() -> None:
    assert TreeShape() == TreeShape(nodes=16, depth=7, top_k=10)
    assert TreeShape().levels == 8


@pytest.mark.parametrize(
    "shape", [TreeShape(), TreeShape(7, 4, 10), TreeShape(3, 9, 2), TreeShape(1, 0, 1), TreeShape(0, 5, 2)]
)
def test_clipping_and_chains_bound_the_levels(shape: TreeShape) -> None:
    """Guards `max_new_tokens` and position limits, which clip the tree to what may still be emitted."""
    for levels in range(-1, 12):
        clipped = shape.clipped(levels)
        assert clipped.levels == max(min(levels, shape.levels), 0)
        assert (clipped.nodes == 0) == (clipped.levels == 0)
        assert clipped.top_k == shape.top_k
    chain = shape.as_chain()
    assert chain.levels == chain.nodes == shape.levels
    assert chain.top_k == 1
