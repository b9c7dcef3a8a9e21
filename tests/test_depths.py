"""How many levels the next tree gets, by numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_dovetail.depths import Depths, depths_within, guessed_levels
from hf_dovetail.tree import DraftTree
from hf_dovetail.worth import deeper_pays, worth_of, worths_by_levels

FREE = np.zeros(32)
"""Prices of verifying 0 to 31 nodes on a machine on which rows cost nothing."""


def planned(depths: Depths, rounds: int, most: int = 20, level_ms: float = 1.0, explores: bool = True) -> list[int]:
    """The levels of so many trees, where a plain round takes 10 ms and yields a token."""
    return [depths.plan(most, 0.1, level_ms, 10.0, explores)[0] for _ in range(rounds)]


def test_depths_to_choose_from() -> None:
    assert depths_within(7) == [1, 2, 3, 4, 6]
    assert depths_within(20)[-1] == 20
    assert depths_within(0) == [0]


@pytest.mark.parametrize(("level_price", "levels"), [(0.0, 20), (0.1, 6), (0.4, 2), (2.0, 1)])
def test_the_first_guess_follows_the_price_of_a_level(level_price: float, levels: int) -> None:
    assert guessed_levels(20, level_price) == levels
    assert guessed_levels(2, level_price) == min(levels, 2)
    assert Depths(20).plan(20, level_price, 1.0, 10.0, True) == (levels, 20)


def test_the_depth_that_was_worth_most_is_taken() -> None:
    """Three levels win 2 tokens and the fourth next to nothing; a level costs 0.1."""
    depths = Depths(20)
    depths.learn({1: 1.0, 2: 1.6, 3: 2.0, 4: 2.05, 6: 2.06}, 20)
    assert depths.gains == pytest.approx({1: 1.0, 2: 0.6, 3: 0.4, 4: 0.05, 6: 0.01})
    assert planned(depths, 3) == [3, 3, 3]
    assert planned(depths, 1, most=2) == [2]
    assert planned(depths, 1, level_ms=5.0) == [2]
    assert depths.plan(20, 0.1, 1.0, 10.0, True) == (3, 3)


def test_now_and_then_more_levels_are_tried_but_never_in_a_look() -> None:
    """The three depths beyond the best take turns; the dearer they are, the longer it takes."""
    depths = Depths(20)
    depths.learn({1: 1.0, 2: 1.6, 3: 2.0, 4: 2.05}, 20)
    assert set(planned(depths, 100, explores=False)) == {3}
    trees = planned(depths, 100, level_ms=0.9)
    looks = [turn for turn, levels in enumerate(trees) if levels != 3]
    assert [trees[turn] for turn in looks] == [4, 6, 8, 4, 6, 8, 4]
    assert np.diff(looks).tolist() == [14, 23, 8, 14, 23, 8]
    assert set(planned(depths, 100, most=3)) == {3}


def test_levels_that_are_seen_seldom_count_more() -> None:
    depths = Depths(20)
    depths.learn({1: 1.0, 2: 1.0}, 1)
    depths.learn({1: 2.0, 2: 3.0}, 1)
    assert depths.gains == pytest.approx({1: 1.1, 2: 0.25})


def test_retention_is_learned_by_level_and_reaches_beyond_the_last() -> None:
    depths = Depths(3)
    for _ in range(200):
        depths.learn_retention(2, 1.0, 0.9)
    assert depths.retention(2) == pytest.approx(0.9, abs=0.01)
    assert depths.retention(1) == depths.retention(3) == depths.retention(9)


def test_a_tree_with_fewer_levels_is_worth_what_its_upper_part_is() -> None:
    parents, chances = torch.tensor([[-1, 0, 0, 1, 3]]), [0.8, 0.3, 0.4, 0.2]
    tree = DraftTree(torch.arange(5)[None], parents, torch.tensor([[0.0, *np.log(chances)]]))
    prices = 0.25 * np.arange(32)
    found = worths_by_levels(tree, np.log(chances), prices, (1, 2, 4))
    assert found == pytest.approx({1: 0.8 - 0.25 + 0.3 - 0.25, 2: 1.5 - 0.75, 4: 1.5 - 0.75})


def test_another_level_is_judged_together_with_those_behind_it() -> None:
    """One level alone replaces a node at a price of 0.3 tokens; a second and a third one add more than they cost."""
    best = frontier = np.array([0.9])
    assert not deeper_pays(best, frontier, [0.2], FREE, 0.3)
    assert deeper_pays(best, frontier, [0.5], FREE, 0.3)
    assert deeper_pays(best, frontier, [0.5, 1.0, 1.0], FREE + 0.3 * np.arange(32), 0.1)
    assert not deeper_pays(best, frontier, [], FREE, 0.3)
    assert not deeper_pays(best, np.array([0.2]), [1.0] * 3, FREE, 0.3)
    full = np.full(31, 0.5)
    assert worth_of(full, FREE) == 15.5
    assert not deeper_pays(full, np.full(10, 0.4), [1.0], FREE, 0.3)
