"""`DovetailCandidateGenerator` as a chain generator inside transformers' own assisted loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, DovetailCandidateGenerator, TreeShape, register


def through_the_extension_point(
    target: PreTrainedModel, draft: DovetailAssistantModel, **options: Any
) -> tuple[Any, list[int]]:
    """Run the stock loop with our candidates; returns the output and how many candidates each round had."""
    counts: list[int] = []

    class Counting(DovetailCandidateGenerator):
        def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
            candidates, logits = super().get_candidates(input_ids, **kwargs)
            counts.append(candidates.shape[1] - input_ids.shape[1])
            return candidates, logits

    target._get_candidate_generator = lambda **kwargs: Counting(draft, target)
    try:
        return tiny.run(target, prompt_lookup_num_tokens=1, **options), counts
    finally:
        del target._get_candidate_generator


def assert_chains_help(
    target: PreTrainedModel, draft: DovetailAssistantModel, ids: Tensor, most: int, **options: Any
) -> None:
    plain = tiny.run(target, ids, **options)
    stock, counts = through_the_extension_point(target, draft, ids=ids, **options)
    tiny.assert_same(plain, stock)
    new = plain.sequences.shape[1] - ids.shape[1]
    assert counts[0] == 0  # no features yet
    assert 0 < max(counts[1:]) <= draft.tree.levels
    assert len(counts) <= most <= new


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize(("kind", "most"), [("accepting", 12), ("noisy", 35), ("untrained", 40)])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_greedy_answers_are_plain_generates_in_fewer_passes(
    kind: str, most: int, family: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    """Guards the chain-only contract: features, known tokens and rejections as the stock loop reports them."""
    target = tiny_model(family)
    assert_chains_help(target, tiny.draft_for(target, kind), tiny.prompt(), most, max_new_tokens=40)


@pytest.mark.usefixtures("unregistered")
def test_a_dgf_draft_gets_the_same_features_as_in_our_own_loop(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards the feature rows of the stock loop: shifted by one, acceptance would fall (here to that of noise)."""
    draft = tiny.draft_for(llama, "untrained")
    draft.tree = TreeShape(nodes=3, depth=2, top_k=1)
    stock, counts = through_the_extension_point(llama, draft, ids=ids, max_new_tokens=60)
    register()
    ours = tiny.run(llama, ids, draft, max_new_tokens=60)
    tiny.assert_same(stock, ours)
    assert len(counts) == draft.last_stats.rounds + 1
    assert draft.last_stats.accepted > 0


@pytest.mark.usefixtures("unregistered")
def test_zero_nodes_propose_nothing(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    noisy.tree = TreeShape(0)
    stock, counts = through_the_extension_point(llama, noisy, ids=ids)
    tiny.assert_same(tiny.run(llama, ids), stock)
    assert counts == [0] * 30


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_a_left_padded_prompt_in_the_stock_loop(kind: str, llama: PreTrainedModel) -> None:
    """Guards padding. (A conversation's cache is no case: the stock loop itself computes the whole prompt again.)"""
    padded = torch.nn.functional.pad(tiny.prompt(), (4, 0), value=0)
    options = {"attention_mask": (padded != 0).long()}
    stock, counts = through_the_extension_point(llama, tiny.draft_for(llama, kind), ids=padded, **options)
    tiny.assert_same(tiny.run(llama, padded, **options), stock)
    assert max(counts) > 0
