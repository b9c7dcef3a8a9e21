"""A draft that knows the target's draws: what it predicts, what that is worth; the answers stay plain generate's."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from sessions import COMMITS, Answer, assert_same, made, replaying
from texts import humaneval_prompts
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_dovetail import TreeShape, plugin
from hf_dovetail.demo import load_pair
from hf_dovetail.draft import DraftSession
from hf_dovetail.draws import Choice, SharedDraws
from hf_dovetail.plugin.sampling import draws_of


@pytest.mark.parametrize("size", [7, 101, 4096, 151_936])
def test_the_draws_of_multinomial_are_known_ahead(size: int) -> None:
    """Some drawn, some looked at, others drawing in between; a look changes nothing. The next token's are wrong."""
    torch.manual_seed(5)
    draws, logits = SharedDraws(size, (), 1.0), torch.randn(size, generator=torch.Generator().manual_seed(1))
    right = wrong = total = 0
    for turn, drawn in enumerate((3, 1, 4, 0, 2, 5)):
        draws.catch_up()
        guesses = [int(Choice(draws, (), 1.0).perturbed(logits[None], level).argmax()) for level in range(6)]
        before = torch.get_rng_state()
        found = [int(torch.multinomial(logits.softmax(-1)[None], num_samples=1)) for _ in range(drawn)]
        right += sum(one == other for one, other in zip(guesses, found, strict=False))
        wrong += sum(one == other for one, other in zip(guesses[1:], found, strict=False))
        total += drawn
        if turn == 2:
            torch.rand(3)
        assert drawn == 0 or not torch.equal(before, torch.get_rng_state())
    assert right == total
    assert size < 1000 or wrong < 3


def test_warpers_come_before_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the target filters out is never guessed, and a reduced vocabulary has its own entries of the noise."""
    draws = SharedDraws(50, [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3), TopPLogitsWarper(0.9)], 2.0)
    draws.catch_up()
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    choice = Choice(draws, draws.warpers, draws.sharpness)
    found = choice.perturbed(logits, 1)
    assert (found.isfinite().sum(-1) <= 3).all()
    kept = found.isfinite()
    torch.testing.assert_close(found[kept], ((logits / 0.5 - draws[1]) * 2)[kept])
    ids = torch.randperm(50)[:20]
    reduced = Choice(draws, (), 1.0).perturbed(logits[:, :20], 0, ids)
    torch.testing.assert_close(reduced, logits[:, :20] - draws[0][ids])


class Drawing(LogitsProcessor):
    """Draws random numbers of its own."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        torch.rand(1)
        return scores


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"temperature": 0.7, "top_p": 0.8}, {"min_p": 0.1}])
def test_a_draft_that_is_its_target_guesses_every_token(
    options: dict[str, Any], llama: PreTrainedModel, ids: Tensor
) -> None:
    """Sampled at temperature 1 from nearly even distributions; somebody else's draws cost acceptance only."""
    draft = tiny.draft_for(llama, "accepting")
    draft.tree = TreeShape(6, 5, 1)
    options = {"do_sample": True, "max_new_tokens": 43, **options}
    plain = tiny.run(llama, ids, **options)
    ours = tiny.run(llama, ids, draft, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert draft.last_stats.tokens_per_round > 6.5
    disturbed = tiny.run(llama, ids, draft, logits_processor=[Drawing()], **options)
    assert (
        disturbed.sequences.tolist() == tiny.run(llama, ids, logits_processor=[Drawing()], **options).sequences.tolist()
    )
    assert draft.last_stats.tokens_per_round < 4


def test_the_pair_is_accepted_far_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real prompts at temperature 1: 3.1 tokens per round with the target's draws, 2.2 with draws unknown."""
    target, draft, tokenizer = load_pair()
    draft.draft_device, draft.tree, rates = "cpu", TreeShape(), []
    for known in (True, False):
        if not known:
            monkeypatch.setattr(plugin, "draws_of", lambda *_: None)
        tokens = rounds = 0
        for seed, prompt in enumerate(humaneval_prompts()[::16]):
            inputs = tokenizer(prompt, return_tensors="pt")
            answers = []
            for assistant in ({"assistant_model": draft}, {}):
                torch.manual_seed(seed)
                answers.append(target.generate(**inputs, **assistant, do_sample=True, top_k=0, max_new_tokens=64))
            assert torch.equal(*answers)
            tokens, rounds = tokens + draft.last_stats.new_tokens - 1, rounds + draft.last_stats.rounds
        rates.append(tokens / rounds)
    assert rates[0] > 2.6 > 2.5 > rates[1]


@pytest.mark.parametrize("kind", ["dgf", "lm"])
def test_host_and_device_guess_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards graphs: the noise of this round, not of the captured one; other warpers are another kind of round."""
    target, draft = made(kind, "llama", 1)
    answer, shapes = Answer(target, draft), [TreeShape(12, 4, 4)] * len(COMMITS)
    if kind == "lm":
        answer.features = None
    log: list[str] = []
    for temperature in (1.0, 0.6):
        trees = []
        for on_host in (True, False):
            torch.manual_seed(3)
            draws = SharedDraws(tiny.VOCAB, [TemperatureLogitsWarper(temperature)], 1.3)
            session = DraftSession(draft, on_host=on_host, draws=draws)
            if kind == "dgf" and not on_host:
                log = replaying(session, monkeypatch)
            trees.append(drawn_between(answer, session, shapes))
            assert (session.noise_bytes > 0) != on_host
            del session
        assert_same(trees[1], trees[0])
        assert kind == "lm" or log.count("capture") == 1
    torch.manual_seed(4)
    other = drawn_between(answer, DraftSession(draft, draws=SharedDraws(tiny.VOCAB, [], 1.3)), shapes)
    assert [tree.tokens.tolist() for tree in other] != [tree.tokens.tolist() for tree in trees[0]]


def drawn_between(answer: Answer, session: DraftSession, shapes: list[TreeShape]) -> list[Any]:
    """The trees of an answer whose target draws two tokens in every round."""
    trees = []
    session.begin(answer.ids[:, :1], 0)
    for turn, shape in enumerate(shapes):
        trees.append(answer.round(session, turn, shape))
        for _ in range(2):
            torch.multinomial(torch.ones(1, tiny.VOCAB), num_samples=1)
    return trees


def test_no_draws_are_known_where_they_cannot_be(llama: PreTrainedModel, ids: Tensor) -> None:
    config = llama.generation_config
    assert draws_of(llama, config, [], ids) is None
    sampling = type(config)(do_sample=True)
    assert draws_of(llama, sampling, [TopKLogitsWarper(3), Drawing()], ids).warpers[0].top_k == 3
    assert draws_of(llama, sampling, [], ids.to("meta")) is None
