"""Prompt lookup in the tree: what it finds, how fast it is trusted and mistrusted, and that answers stay the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fixed_costs import FixedCosts
from machines import at_these_costs, machine
from torch import Tensor

from hf_dovetail import TreeShape
from hf_dovetail.accept import Accepted
from hf_dovetail.controller import AutoController, Found
from hf_dovetail.demo import load_pair
from hf_dovetail.experience import LARGEST, Experience
from hf_dovetail.lookup import CLASSES, SAYS, Lookup, match_class
from hf_dovetail.tree import DraftTree

pytestmark = pytest.mark.usefixtures("own_cache")


def by_search(tokens: list[int], most: int) -> tuple[list[int], int]:
    """The same, by looking everywhere."""
    for place in range(len(tokens) - 1, 1, -1):
        if tokens[place - 2 : place] == tokens[-2:]:
            length = 2
            while length < min(8, place) and tokens[place - 1 - length] == tokens[-1 - length]:
                length += 1
            endless = tokens[place:] * most
            return endless[:most], length
    return [], 0


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_search_finds(seed: int) -> None:
    """Guards the index: the last occurrence, matches that overlap the end, tokens that come in pieces."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 3, 200).tolist()
    lookup, given, lengths = Lookup(), 0, set()
    while given < len(tokens):
        step = int(rng.integers(1, 5))
        lookup.extend(tokens[given : given + step])
        given = min(given + step, len(tokens))
        for most in (0, 1, 7, 20):
            expected = by_search(tokens[:given], most) if most else ([], 0)
            assert lookup.continuation(most) == expected
        lengths.add(lookup.continuation(1)[1])
    assert len(lengths) > 4


def test_a_sequence_that_repeats_goes_on_repeating() -> None:
    lookup = Lookup()
    lookup.extend([9, 1, 2, 3, 1, 2])
    assert lookup.continuation(7) == ([3, 1, 2, 3, 1, 2, 3], 2)
    assert Lookup().continuation(5) == ([], 0)
    assert [match_class(n) for n in range(2, 9)] == [3, 2, 1, 1, 0, 0, 0]
    assert len(SAYS) == CLASSES == 4


def rounds_of(controller: AutoController, count: int, right: bool) -> list[int]:
    """Sizes of trees in rounds without a draft, in which six looked-up tokens are all right, or all wrong."""
    sizes = []
    for _ in range(count):
        controller.plan(TreeShape(0, 0, 10), 0, 0, 1000)
        root = DraftTree.root_only(torch.zeros(1, 1, dtype=torch.long))
        tree = controller.choose(root, Found([5, 6, 7, 8, 9, 10], 3), LARGEST)
        sizes.append(tree.num_nodes)
        path = tuple(range(tree.num_nodes + 1)) if right else (0,)
        tokens = (5, 6, 7, 8, 9, 10, 11)[: len(path)] if right else (40,)
        controller.learn(tree, Accepted(path, tokens, False), 0.0, 10.0, 10.0)
    return sizes


def test_it_is_trusted_while_it_is_right() -> None:
    """Also where no tree of the draft pays; and learned from what comes, though nothing of it is verified."""
    curves, experience = machine("linear", "slow"), Experience()
    controller = AutoController(FixedCosts(curves), experience, clock=lambda: 0.0)
    assert rounds_of(controller, 20, True)[-1] == 6
    wrong = rounds_of(controller, 60, False)
    assert wrong[0] == 6
    assert wrong[-1] == 0
    back = rounds_of(controller, 60, True)
    assert back[0] == 0
    assert back[-1] == 6


def test_what_both_propose_is_one_node() -> None:
    """The looked-up path goes through the draft's nodes and on behind them; each is learned from by itself."""
    parents = torch.tensor([[-1, 0, 0, 1]])
    tree = DraftTree(torch.tensor([[1, 5, 8, 6]]), parents, torch.tensor([[0.0, -0.7, -1.2, -1.5]]))
    whole, path = tree.with_path([5, 6, 7, 3])
    assert path == [1, 3, 4, 5]
    assert whole.tokens.tolist() == [[1, 5, 8, 6, 7, 3]]
    assert whole.parents.tolist() == [[-1, 0, 0, 1, 3, 4]]
    assert tree.with_path([5, 6]) == (tree, [1, 3])
    other, path = tree.with_path([6, 5])
    assert path == [4, 5]
    assert other.parents[0, 4:].tolist() == [0, 4]


def test_a_chain_stays_a_chain() -> None:
    """Guards targets that cannot verify branches."""
    controller = AutoController(FixedCosts(machine("flat", "fast")), Experience(), clock=lambda: 0.0)
    chain = DraftTree(torch.tensor([[1, 5, 6]]), torch.tensor([[-1, 0, 1]]), torch.tensor([[0.0, -0.1, -0.2]]))
    most = TreeShape(20, 19, 1)
    for tokens, expected in (([5, 6, 7], [5, 6, 7]), ([5, 7], [5, 6]), ([7, 7], [5, 6]), ([5], [5, 6])):
        controller.plan(most, 0, 3, 1000)
        tree = controller.choose(chain, Found(tokens, 8), most)
        assert tree.tokens[0, 1:].tolist() == expected
        assert tree.parents[0].tolist() == list(range(-1, tree.num_nodes))


@pytest.mark.parametrize("sample", [False, True])
def test_copied_text_is_cheap_and_the_answer_the_same(sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is never right, on a text that the target goes on repeating: lookup alone makes rounds long."""
    target, _, tokenizer = load_pair()
    draft = tiny.draft_for(target, "untrained")
    draft.draft_device, draft.tree = "cpu", "auto"
    at_these_costs(monkeypatch, machine("memory-bound", "medium"), Experience())
    ids = tokenizer(
        "".join(f"    if name == 'a{i}':\n        return {i}\n" for i in range(12)), return_tensors="pt"
    ).input_ids
    options: dict[str, Any] = {"max_new_tokens": 100, "min_new_tokens": 100, "do_sample": sample}
    options |= {"temperature": 0.3} if sample else {}
    plain = tiny.run(target, ids, **options)
    rates = []
    for found in (Lookup.continuation, lambda self, most: ([], 0)):
        monkeypatch.setattr(Lookup, "continuation", found)
        tiny.assert_same(plain, tiny.run(target, ids, draft, **options))
        rates.append(draft.last_stats.tokens_per_round)
    assert rates[0] > 1.3 * rates[1]


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_the_index_holds_prompt_and_answer(family: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards tokens that are lost or doubled on the way; a fixed shape needs no index."""
    target, given = tiny.build(family), []
    draft, extend = tiny.draft_for(target, "untrained"), Lookup.extend

    def recorded(self: Lookup, tokens: Any) -> None:
        given.extend(tokens)
        extend(self, tokens)

    monkeypatch.setattr(Lookup, "extend", recorded)
    draft.tree = TreeShape(4, 2, 2)
    tiny.run(target, ids, draft, max_new_tokens=30)
    assert not given
    at_these_costs(monkeypatch, machine("flat", "fast"), Experience())
    draft.tree = "auto"
    sequence = tiny.run(target, ids, draft, max_new_tokens=30).sequences[0].tolist()
    assert len(given) > len(sequence) - LARGEST.levels - 1
    assert given == sequence[: len(given)]


def test_a_draft_that_only_says_what_lookup_says_is_left_alone() -> None:
    """Guards the comparison: a round with the draft against lookup alone, which costs nothing; not against plain."""
    asked = []
    for finds in (True, False):
        controller = AutoController(
            FixedCosts(machine("linear", "medium")), Experience(), on_host=False, clock=lambda: 0.0
        )
        found, drafted = Found([5, 6, 7, 8] if finds else [], 8 * finds), 0
        for turn in range(200):
            shape = controller.plan(LARGEST, 0, 3, 1000)
            tree = DraftTree.root_only(torch.zeros(1, 1, dtype=torch.long))
            if shape.nodes:
                drafted += turn >= 100
                levels = min(shape.levels, 4)
                tokens, log_probs = [[0, 5, 6, 7, 8][: levels + 1]], [[-0.02 * depth for depth in range(levels + 1)]]
                tree = DraftTree(torch.tensor(tokens), torch.arange(-1, levels)[None], torch.tensor(log_probs))
            tree = controller.choose(tree, found, LARGEST)
            path = tuple(range(tree.num_nodes + 1))
            controller.learn(tree, Accepted(path, (5, 6, 7, 8, 9)[: len(path)], False), 1.0, 10.0, 11.0)
        asked.append(drafted)
    assert asked[0] < 10
    assert asked[1] > 90


def test_what_follows_a_wrong_token_says_nothing() -> None:
    shifts = []
    for tokens in ((5, 40), (5, 40, 7, 8)):
        experience = Experience()
        controller = AutoController(FixedCosts(machine("flat", "fast")), experience, clock=lambda: 0.0)
        controller.plan(TreeShape(0, 0, 10), 0, 0, 1000)
        controller.choose(DraftTree.root_only(torch.zeros(1, 1, dtype=torch.long)), Found([5, 6, 7, 8], 3), LARGEST)
        root = DraftTree.root_only(torch.zeros(1, 1, dtype=torch.long))
        controller.learn(root, Accepted((0,), tokens, False), 0.0, 10.0, 10.0)
        shifts.append(experience.lookups.shifts)
    np.testing.assert_array_equal(*shifts)
    assert shifts[0].any()
