"""`generate(assistant_model=draft)` against `generate`: processors, and where the answer stops."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_dovetail import DovetailAssistantModel, TreeShape

STORY = "Once upon a time, there was a little"


def only_multiples_of_three(batch: int, prefix: Tensor) -> list[int]:
    """A prefix-dependent vocabulary."""
    return [token for token in range(3, 100) if token % 3 == len(prefix) % 3]


PROCESSORS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7, "do_sample": True},
    "hot": {"temperature": 1.7, "do_sample": True},
    "top_k": {"top_k": 5, "do_sample": True},
    "top_p": {"top_p": 0.7, "top_k": 0, "do_sample": True},
    "min_p": {"min_p": 0.1, "do_sample": True},
    "typical_p": {"typical_p": 0.6, "do_sample": True},
    "epsilon_eta": {"epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "do_sample": True},
    "all_warpers": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "do_sample": True},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_penalty_sampled": {"repetition_penalty": 1.3, "do_sample": True},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[26], [45, 53], [61]]},
    "forced_eos": {"forced_eos_token_id": 2},
    "suppress": {"suppress_tokens": list(range(10, 60))},
    "begin_suppress": {"begin_suppress_tokens": list(range(3, 70))},
    "sequence_bias": {"sequence_bias": [[[20], 3.0], [[33, 20], -8.0]]},
    "prefix_allowed_tokens": {"prefix_allowed_tokens_fn": only_multiples_of_three},
    "length_penalty": {"exponential_decay_length_penalty": (5, 1.4), "eos_token_id": 7, "pad_token_id": 0},
    "guidance": {"guidance_scale": 1.5},
}


def real_ids(tokenizer: PreTrainedTokenizerBase, text: str = STORY) -> Tensor:
    return tokenizer(text, return_tensors="pt").input_ids


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_see_each_nodes_own_prefix(
    name: str, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards a bonus token that ignores the processors, and processors run on a wrong prefix."""
    plain, _ = tiny.both(llama, noisy, ids, max_new_tokens=40, **PROCESSORS[name])
    assert noisy.last_stats.accepted > 0
    neutral = {"do_sample": PROCESSORS[name].get("do_sample", False)}
    assert plain.sequences.tolist() != tiny.run(llama, ids, max_new_tokens=40, **neutral).sequences.tolist()


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_on_a_real_model(
    name: str, real_target: PreTrainedModel, real_draft: DovetailAssistantModel, real_tokenizer: PreTrainedTokenizerBase
) -> None:
    """The same with two models trained by others, whose draft is mostly right."""
    tiny.both(real_target, real_draft, real_ids(real_tokenizer), max_new_tokens=40, **PROCESSORS[name])
    assert real_draft.last_stats.accepted > 0


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}])
def test_long_answers_of_a_real_model(
    options: dict[str, Any],
    real_target: PreTrainedModel,
    real_draft: DovetailAssistantModel,
    real_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A whole story at the default shape; the pair agrees on 9 tokens of 10, so rounds must be few."""
    plain, _ = tiny.both(real_target, real_draft, real_ids(real_tokenizer), max_new_tokens=150, **options)
    assert real_draft.tree == TreeShape()
    assert real_draft.last_stats.tokens_per_round > (2 if options == {"do_sample": True} else 3)
    assert plain.sequences.shape[1] > 60


@pytest.mark.parametrize("sample", [False, True])
def test_a_stateful_processor_is_called_once_per_token_in_order(
    sample: bool, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards processors that count: run on drafted nodes that are not taken, they would drift."""
    logs: tuple[list, list] = ([], [])
    outputs = [
        tiny.run(llama, ids, draft, do_sample=sample, logits_processor=LogitsProcessorList([tiny.call_log(log)]))
        for draft, log in zip((None, noisy), logs, strict=True)
    ]
    tiny.assert_same(*outputs)
    assert logs[0] == logs[1]
    assert len(logs[1]) == 30
    assert noisy.last_stats.accepted > 0


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_a_processor_that_runs_the_target_does_not_disturb_the_draft(
    kind: str, llama: PreTrainedModel, ids: Tensor
) -> None:
    """Guards the feature tap: hidden states of foreign forward passes (guidance) are not the answer's."""
    draft = tiny.draft_for(llama, kind)

    def run_target(prefix: Tensor, scores: Tensor) -> Tensor:
        llama(prefix[:, -3:])
        return scores

    tiny.both(llama, draft, ids, max_new_tokens=60)
    alone = (draft.last_stats.rounds, draft.last_stats.accepted_by_depth)
    tiny.both(llama, draft, ids, max_new_tokens=60, logits_processor=LogitsProcessorList([run_target]))
    assert (draft.last_stats.rounds, draft.last_stats.accepted_by_depth) == alone
    assert draft.last_stats.accepted > 0


@pytest.mark.parametrize("kind", tiny.DRAFTS)
def test_the_random_state_afterwards_is_plain_generates(kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards random numbers drawn by the draft or twice for one token: the next call would differ."""
    draft, states = tiny.draft_for(llama, kind), []
    for assistant in (None, draft):
        tiny.run(llama, ids, assistant, do_sample=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    torch.manual_seed(5)
    assert not torch.equal(torch.get_rng_state(), states[0])


@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("kind", tiny.DRAFTS)
def test_max_new_tokens_is_exact(count: int, kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards output beyond the limit, and trees deeper than what may still be emitted."""
    draft = tiny.draft_for(llama, kind)
    _, ours = tiny.both(llama, draft, ids, max_new_tokens=count)
    assert ours.sequences.shape[1] == 12 + count
    assert draft.last_stats.new_tokens == count
    if count == 2:  # only the bonus token fits: nothing is drafted in vain
        assert (draft.last_stats.rounds, draft.last_stats.drafted) == (1, 0)


@pytest.mark.parametrize("length", [13, 14, 20, 33])
def test_max_length_is_exact(length: int, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    _, ours = tiny.both(llama, noisy, ids, max_new_tokens=None, max_length=length)
    assert ours.sequences.shape[1] == length


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("kind", tiny.DRAFTS)
def test_the_answer_ends_at_any_of_several_eos_tokens(
    kind: str, sample: bool, llama: PreTrainedModel, ids: Tensor
) -> None:
    """Guards output after EOS, wherever in a path it stands."""
    draft = tiny.draft_for(llama, kind)
    free = tiny.run(llama, ids, do_sample=sample).sequences[0, 12:].tolist()
    lengths = set()
    for stop in range(1, 25, 4):
        options = {"eos_token_id": [99, free[stop]], "pad_token_id": 0, "do_sample": sample}
        _, ours = tiny.both(llama, draft, ids, **options)
        assert ours.sequences[0, -1] == free[stop]
        assert ours.sequences.shape[1] == 12 + free.index(free[stop]) + 1
        lengths.add(ours.sequences.shape[1])
    assert len(lengths) > 3


def test_min_new_tokens_holds_eos_back(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    eos = {"eos_token_id": [int(tiny.run(llama, ids).sequences[0, 15])], "pad_token_id": 0}
    early, _ = tiny.both(llama, noisy, ids, **eos)
    late, _ = tiny.both(llama, noisy, ids, min_new_tokens=14, **eos)
    by_length, _ = tiny.both(llama, noisy, ids, min_length=25, **eos)
    assert early.sequences.shape[1] <= 16
    assert late.sequences.shape[1] >= 26
    assert by_length.sequences.shape[1] >= 25


class RecordingCriteria(StoppingCriteria):
    """Stops at a length and notes every call: the sequence and how many scores there were."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append((input_ids[0].tolist(), None if scores is None else len(scores)))
        return torch.full((1,), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("length", [13, 18, 27])
@pytest.mark.parametrize("scores", [False, True])
def test_criteria_are_asked_after_each_token(
    scores: bool, length: int, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards criteria that are only looked at after a round; `max_time` is one of them."""
    plain, ours = RecordingCriteria(length), RecordingCriteria(length)
    outputs = [
        tiny.run(llama, ids, draft, output_scores=scores, stopping_criteria=StoppingCriteriaList([criteria]))
        for draft, criteria in ((None, plain), (noisy, ours))
    ]
    tiny.assert_same(*outputs)
    assert ours.seen == plain.seen
    assert len(ours.seen) == length - 12
    assert outputs[1].sequences.shape[1] == length


def test_max_time_ends_the_answer_after_a_token(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    _, ours = tiny.both(llama, noisy, ids, max_time=1e-9)
    assert ours.sequences.shape[1] == 13
    assert tiny.run(llama, ids, noisy, max_time=600).sequences.shape[1] == 42


@pytest.mark.parametrize("stop", ["Lily", " wa", "e", ". "])
def test_stop_strings_end_inside_a_path(
    stop: str, real_target: PreTrainedModel, real_draft: DovetailAssistantModel, real_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Guards the stop position: characters are tokens here, so a string ends in the middle of a round."""
    options = {"tokenizer": real_tokenizer, "max_new_tokens": 80}
    ids = real_ids(real_tokenizer, "Once upon a time")
    free = tiny.run(real_target, ids, **options)
    plain, _ = tiny.both(real_target, real_draft, ids, stop_strings=[stop, "zzz"], **options)
    assert real_tokenizer.decode(plain.sequences[0]).endswith(stop)
    assert plain.sequences.shape[1] < free.sequences.shape[1]


def test_plain_outputs_without_a_dict(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    """Without return_dict_in_generate a tensor comes back; without output_scores none are kept."""
    plain = llama.generate(ids, max_new_tokens=20, do_sample=False)
    ours = llama.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=noisy)
    assert type(ours) is Tensor
    assert torch.equal(plain, ours)
    bare, _ = tiny.both(llama, noisy, ids, output_scores=False, output_logits=False)
    assert bare.scores is None
    by_dict = llama.generate(
        **{"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        max_new_tokens=20,
        do_sample=False,
        assistant_model=noisy,
    )
    assert torch.equal(plain, by_dict)


@pytest.mark.parametrize(
    "shape", [TreeShape(0), TreeShape(1, 0, 1), TreeShape(60, 12, 9), TreeShape(5, 30, 1), TreeShape(8, 0, 200)]
)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_every_shape_gives_the_same_answer(kind: str, shape: TreeShape, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards extreme shapes: none, one node, wider than the vocabulary, deeper than the answer."""
    draft = tiny.draft_for(llama, kind)
    draft.tree = shape
    for sample in (False, True):
        tiny.both(llama, draft, ids, do_sample=sample)
    stats = draft.last_stats
    assert (stats.drafted == 0) == (shape.nodes == 0)
    assert len(stats.accepted_by_depth) <= shape.levels
    assert sum(stats.accepted_by_depth) == stats.accepted
