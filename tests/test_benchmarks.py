"""What benchmarks compute, where that is more than a clock: the ideal tree, and lookup that is off."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from hf_dovetail import TreeShape, sharing
from hf_dovetail.controller import AutoController, Found
from hf_dovetail.demo import load_pair
from hf_dovetail.tree import DraftTree

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import busy
import entropy
import lookup

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
