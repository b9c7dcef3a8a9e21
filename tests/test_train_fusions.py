"""Training drafts of every kind: they learn, come back from disk, and compute what drafting computes."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from pathlib import Path

import pytest
import tiny
import torch
from published import CASES
from torch import Tensor
from training import new_draft, python_rows
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import demo_prompts
from hf_dovetail.draft import DraftSession
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, capture, draft_loss, train_draft
from hf_dovetail.weights import feature_layers

FUSIONS = ("eagle", "eagle3")
RECIPE = Recipe(steps=40, batch=8, window=64, learning_rate=5e-3, warmup=4, distribution_weight=1.0)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return python_rows()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_training_learns_and_the_draft_is_accepted(
    fusion: str,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    tmp_path: Path,
) -> None:
    """Real text and a real small target: more tokens per round than without training, and the same answer as plain."""
    trained = train_draft(new_draft(target, fusion), target, windows, RECIPE, tmp_path, Extras(tokenizer))
    loaded = DovetailAssistantModel.from_pretrained(tmp_path)
    assert trained.state_dict().keys() == loaded.state_dict().keys()
    rates = []
    for draft in (loaded, new_draft(target, fusion, seed=1)):
        draft.tree, rounds, tokens = TreeShape(nodes=12, depth=4, top_k=6), 0, 0
        for prompt in demo_prompts()[:4]:
            inputs = tokenizer(prompt, return_tensors="pt")
            answer = target.generate(**inputs, assistant_model=draft, max_new_tokens=48, do_sample=False)
            rounds, tokens = rounds + draft.last_stats.rounds, tokens + draft.last_stats.new_tokens - 1
        assert torch.equal(answer, target.generate(**inputs, max_new_tokens=48, do_sample=False))
        rates.append(tokens / rounds)
    assert rates[0] > rates[1] + 0.2, rates  # about 1.45 and 1.07


@pytest.mark.parametrize("fusion", ["dgf", *FUSIONS])
def test_unrolled_steps_compute_what_a_tree_computes(fusion: str, target: PreTrainedModel, windows: Tensor) -> None:
    """Step j at row t must be the hidden state of a node at depth j-1; an off-by-one in rows or masks shows here."""
    draft = new_draft(target, fusion)
    draft.meet(target)
    ids, row = windows[3:4, :24], 20  # tokens up to `row` are certain, and the text goes on with ids[row + 1] ...
    features, logits = capture(target, ids, feature_layers(draft.config, target.config))
    seen: list[Tensor] = []
    forward = DovetailAssistantModel.forward

    @wraps(forward)
    def spy(self: DovetailAssistantModel, *args: object, **kwargs: object) -> Tensor:
        seen.append(forward(self, *args, **kwargs))
        return seen[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(DovetailAssistantModel, "forward", spy)
        draft_loss(draft, ids, features, logits, replace(RECIPE, unroll=3, noise=0.0), torch.Generator())
        unrolled = [step[0, row + depth] for depth, step in enumerate(seen)]
        session = DraftSession(draft)
        session.begin(ids[:, :1], 0)
        session.commit(ids[:, 1 : row + 2], features[:, : row + 1])
        hidden = session._steps.catch_up(session._tokens, draft.encode(session._features))
        torch.testing.assert_close(hidden[0, 0], unrolled[0], rtol=1e-4, atol=1e-5)
        for depth in (1, 2):
            path = torch.ones(1, depth, dtype=torch.bool)
            hidden = session._steps.level(ids[:, row + depth + 1 : row + depth + 2], hidden, path)
            torch.testing.assert_close(hidden[0, 0], unrolled[depth], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unrolled[1], unrolled[2])


def test_a_reduced_vocabulary_learns_from_its_own_tokens_only(tmp_path: Path) -> None:
    """Guards the target's distribution: normalised over the draft's tokens, in the draft's order."""
    case = CASES["eagle3"]
    made_for = case.target()
    draft = tiny.met(DovetailAssistantModel.from_pretrained(case.write(tmp_path)), made_for)
    ids, recipe = tiny.prompt(12), replace(RECIPE, noise=0.0, unroll=1)
    features, logits = capture(made_for, ids, feature_layers(draft.config, made_for.config))
    with torch.no_grad():
        found = draft_loss(draft, ids, features, logits, recipe, torch.Generator())
        own = draft.logits(draft(ids[:, 1:], draft.encode(features[:, :-1]))).log_softmax(-1)
        wanted = logits[:, 1:][..., draft.vocabulary].softmax(-1)
        torch.testing.assert_close(found, -(wanted * own).sum(-1).mean())
        others = torch.ones(101, dtype=torch.bool).index_fill(0, draft.vocabulary, False)
        again = draft_loss(draft, ids, features, logits.masked_fill(others, 50.0), recipe, torch.Generator())
    torch.testing.assert_close(again, found)
