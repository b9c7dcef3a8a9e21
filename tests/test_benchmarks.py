"""What benchmarks compute, where that is more than a clock: the ideal tree, lookup that is off, rounds at prices."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from machines import machine

from hf_dovetail import TreeShape, plugin, sharing
from hf_dovetail.bench.prompts import prompt_set
from hf_dovetail.controller import AutoController, Found
from hf_dovetail.demo import load_pair
from hf_dovetail.tree import DraftTree

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import busy
import entropy
import lookup
import priced

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize(("nodes", "levels"), [(16, 5), (5, 3), (16, 2), (1, 4)])
def test_the_ideal_tree_is_the_one_that_a_search_finds(nodes: int, levels: int) -> None:
    chances = (3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(nodes))).softmax(dim=-1)
    table = chances.tolist()
    following = lambda paths: torch.stack([chances[path[-1] if path else 0] for path in paths])  # noqa: E731
    everything = {}
    for length in range(1, levels + 1):
        for path in itertools.product(range(5), repeat=length):
            steps = zip((0, *path[:-1]), path, strict=True)
            everything[path] = math.prod(table[before][token] for before, token in steps)
    found = entropy.likeliest(following, nodes, levels)
    best = sorted(everything.values(), reverse=True)[:nodes]
    assert sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-5)
    assert all(everything[path] == pytest.approx(chance, rel=1e-5) for path, chance in found.items())


def test_lookup_is_off_where_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft, tokenizer = load_pair()
    inputs = tokenizer("x = [1, 2, 3]\ny = [1, 2, 3]\nx = [1, 2, 3]\n", return_tensors="pt")
    choose, matches = AutoController.choose, []

    def watched(self: AutoController, tree: DraftTree, found: Found, most: TreeShape) -> DraftTree:
        matches.append(found.match)
        return choose(self, tree, found, most)

    monkeypatch.setattr(AutoController, "choose", watched)
    for on in (True, False):
        matches.clear()
        with lookup.lookup(on):
            target.generate(**inputs, assistant_model=draft, max_new_tokens=24, do_sample=False)
        assert (max(matches) > 0) is on


def test_edits_ask_for_a_copy() -> None:
    prompts = lookup.edits(3)
    assert len(prompts) == 3
    assert all(lookup.NEW_NAME in prompt.splitlines()[-1] and prompt.endswith(":\n") for prompt in prompts)


def test_only_one_row_waits_in_loops_beside_neighbours(llama, noisy, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_others", lambda threads: 7)
    found: dict[str, set[int]] = {mode: set() for mode in busy.MODES}
    for mode, crowds in found.items():
        noisy.watch = lambda _, crowds=crowds: crowds.add(sharing._others(2))
        assert busy.seconds(mode, llama, noisy, ids, 4) > 0
    assert found == {"plain": set(), "dovetail, in loops": {0}, "dovetail": {7}}
    with busy.neighbours(1):
        pass


def test_rounds_are_paid_for() -> None:
    """Every part once: two trees of which the second has more to catch up with, and a plain round."""
    at = priced.Prices(machine("linear", "medium"))
    rounds = [priced.Spent(4, 3, 5, 2), priced.Spent(2, 1, 108, 1), priced.Spent(1, 0, 4, 1)]
    assert at.per_token(rounds) == pytest.approx((13.0 + 0.8 + 2 * 0.5 + 11.0 + 0.8 + 100 * 0.01 + 10.0) / 4)
    assert at.plain == 10.0


def test_real_rounds_at_prices() -> None:
    """Every token of an answer is some round's; cheap rows make trees pay, dear ones leave plain decoding's price."""
    target, draft, tokenizer = load_pair()
    before, decoding = plugin._controller, priced.Decoding(target, tokenizer, 24)
    group = prompt_set("easy")
    rounds = decoding.fixed(group, draft, TreeShape(3, 2, 1))
    assert sum(one.tokens for one in rounds) == 23 * len(group.prompts)
    assert max(one.rows for one in rounds) == 4
    assert rounds[1] == priced.Spent(4, 3, rounds[0].tokens, rounds[1].tokens)
    cheap, dear = (priced.Prices(machine(rows, "fast")) for rows in ("flat", "every row costs a pass"))
    assert decoding.automatic(group, draft, cheap) < 0.4 * cheap.plain
    assert 0.95 * dear.plain < decoding.automatic(group, draft, dear) < 1.1 * dear.plain
    assert plugin._controller is before
    assert list(priced.machines())
