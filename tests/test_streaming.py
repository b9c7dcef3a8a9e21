"""What an answer is given to while it grows, and what it leaves behind: streamers, caches, the draft."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import tiny
import torch
from observers import RecordingStreamer
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from hf_dovetail import DovetailAssistantModel

FAMILIES = ["llama", "mistral", "gemma2", "gpt2"]


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("count", [1, 25])
def test_the_streamer_gets_the_same_calls(
    count: int, sample: bool, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards tokens streamed in groups, twice, or after the end."""
    plain, ours = RecordingStreamer(), RecordingStreamer()
    tiny.run(llama, ids, do_sample=sample, max_new_tokens=count, streamer=plain)
    tiny.run(llama, ids, noisy, do_sample=sample, max_new_tokens=count, streamer=ours)
    assert ours.calls == plain.calls
    assert ours.calls[-1] == "end"
    assert len(ours.calls) == 1 + count + 1


def test_processors_criteria_and_streamer_take_turns_as_in_plain_generate(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards the order of events for one token, for callers whose callbacks share state."""
    logs: list[list[tuple[str, int]]] = []
    for draft in (None, noisy):
        log: list[tuple[str, int]] = []
        streamer = RecordingStreamer()
        streamer.put = lambda value, log=log: log.append(("streamer", value.numel()))
        streamer.end = lambda log=log: log.append(("end", 0))

        def process(prefix: Tensor, scores: Tensor, log: list = log) -> Tensor:
            log.append(("processor", prefix.shape[1]))
            return scores

        def stop(prefix: Tensor, scores: Any, log: list = log, **kwargs: Any) -> Tensor:
            log.append(("criteria", prefix.shape[1]))
            return torch.zeros(1, dtype=torch.bool)

        tiny.run(
            llama,
            ids,
            draft,
            streamer=streamer,
            logits_processor=LogitsProcessorList([process]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        logs.append(log)
    assert logs[0] == logs[1]
    assert len(logs[1]) == 1 + 3 * 30 + 1


def test_a_text_streamer_in_a_thread(
    real_target: PreTrainedModel, real_draft: DovetailAssistantModel, real_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Guards the notebook and chat use: the text arrives in pieces in another thread."""
    inputs = real_tokenizer("Once upon a time", return_tensors="pt")
    options = {**inputs, "max_new_tokens": 60, "do_sample": False}
    expected = real_target.generate(**options)[0, inputs.input_ids.shape[1] :]
    streamer = TextIteratorStreamer(real_tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(
        target=real_target.generate, kwargs={**options, "assistant_model": real_draft, "streamer": streamer}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == real_tokenizer.decode(expected)
    assert len([piece for piece in pieces if piece]) > 3
    assert real_draft.last_stats.accepted > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("count", [1, 2, 26])
def test_the_returned_cache_is_plain_generates(count: int, kind: str, family: str) -> None:
    """Guards the kept path: any wrong position shows here although the tokens may agree."""
    target = tiny.build(family)
    draft = tiny.draft_for(target, kind)
    plain, ours = tiny.both(target, draft, tiny.prompt(), max_new_tokens=count)
    tiny.assert_same_cache(plain.past_key_values, ours.past_key_values)
    assert ours.past_key_values.get_seq_length() == 12 + count - 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_a_conversation_goes_on_from_either_cache(kind: str, family: str) -> None:
    """Guards continuing: from plain's cache with Dovetail and the other way round, three turns, past the window."""
    target = tiny.build(family)
    draft = tiny.draft_for(target, kind)
    for helpers in ((None, draft, draft), (draft, None, draft), (draft, draft, None)):
        ids, caches = tiny.prompt(5), (None, None)
        for turn, helper in enumerate(helpers):
            options = {"do_sample": turn == 1, "max_new_tokens": 11}
            plain = tiny.run(target, ids, past_key_values=caches[0], **options)
            ours = tiny.run(target, ids, helper, past_key_values=caches[1], **options)
            tiny.assert_same(plain, ours)
            tiny.assert_same_cache(plain.past_key_values, ours.past_key_values)
            caches = (plain.past_key_values, ours.past_key_values)
            ids = torch.cat((plain.sequences, tiny.prompt(4, seed=turn)), dim=1)
    assert ids.shape[1] == 5 + 3 * 15


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_a_conversation_goes_on_from_its_new_tokens_alone(kind: str, family: str) -> None:
    """Guards prompts shorter than the cache: the caller gives the new tokens, and the mask of everything."""
    target = tiny.build(family)
    draft, new = tiny.draft_for(target, kind), tiny.prompt(4, seed=8)
    first = tiny.run(target, tiny.prompt())
    whole = tiny.run(target, torch.cat((first.sequences, new), dim=1))
    ids = torch.cat((first.sequences[:, -1:], new), dim=1)  # the cache has not seen the last token yet
    options = {"attention_mask": torch.ones(1, 46, dtype=torch.long)}
    outputs = [
        tiny.run(target, ids, helper, past_key_values=copy.deepcopy(first.past_key_values), **options)
        for helper in (None, draft)
    ]
    tiny.assert_same(*outputs)
    tiny.assert_same_cache(*(output.past_key_values for output in outputs))
    assert outputs[1].sequences[0, 5:].tolist() == whole.sequences[0, 46:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_the_user_is_filled_in_place(family: str, ids: Tensor) -> None:
    """Guards a cache that is passed in and read later, without return_dict_in_generate."""
    target = tiny.build(family)
    draft, caches = tiny.draft_for(target, "noisy"), []
    for assistant in ({}, {"assistant_model": draft}):
        cache = DynamicCache(config=target.config)
        target.generate(ids, past_key_values=cache, max_new_tokens=15, do_sample=False, **assistant)
        caches.append(cache)
    tiny.assert_same_cache(*caches)
    assert caches[1].get_seq_length() == 26
    assert draft.last_stats.accepted > 0


def test_a_cache_made_without_a_configuration_works_too(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    caches = [DynamicCache(), DynamicCache()]
    plain = tiny.run(llama, ids, past_key_values=caches[0])
    ours = tiny.run(llama, ids, noisy, past_key_values=caches[1])
    tiny.assert_same(plain, ours)
    tiny.assert_same_cache(*caches)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize("chunk", [1, 5, 12, 50])
def test_a_chunked_prefill(chunk: int, kind: str, family: str, tiny_model: Any, ids: Tensor) -> None:
    """Guards the features of several passes, which must be joined for the draft."""
    target = tiny_model(family)
    draft = tiny.draft_for(target, kind)
    whole, _ = tiny.both(target, draft, ids, max_new_tokens=40)
    rounds = draft.last_stats.rounds
    chunked, _ = tiny.both(target, draft, ids, max_new_tokens=40, prefill_chunk_size=chunk)
    assert chunked.sequences.tolist() == whole.sequences.tolist()
    assert draft.last_stats.rounds == rounds
    assert draft.last_stats.accepted > 0


@pytest.mark.parametrize("kind", tiny.DRAFTS)
def test_a_second_call_is_like_the_first(kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards state that a session leaves in the draft."""
    draft, counts = tiny.draft_for(llama, kind), []
    for _ in range(3):
        tiny.both(llama, draft, ids, do_sample=True)
        counts.append((draft.last_stats.rounds, draft.last_stats.accepted_by_depth))
        tiny.both(llama, draft, tiny.prompt(7, seed=9))
    assert counts[0] == counts[1] == counts[2]


def test_two_targets_take_turns_with_one_draft(ids: Tensor) -> None:
    """Guards shared weights: with the other target's embeddings the draft would be a different one."""
    targets = [tiny.build("llama", seed=seed) for seed in (0, 7)]
    draft = tiny.draft_for(targets[0], "untrained")
    drafted = []
    for target in (*targets, *targets):
        plain, _ = tiny.both(target, draft, ids, max_new_tokens=60)
        fresh = tiny.draft_for(targets[0], "untrained")
        tiny.run(target, ids, fresh, max_new_tokens=60)
        assert draft.last_stats.accepted_by_depth == fresh.last_stats.accepted_by_depth
        assert draft._shared.embedding.data_ptr() == target.get_input_embeddings().weight.data_ptr()
        drafted.append(plain.sequences.tolist())
    assert drafted[0] == drafted[2] != drafted[1] == drafted[3]


@pytest.mark.parametrize("copied", [False, True])
@torch.no_grad()
def test_a_target_changed_in_place_is_noticed(copied: bool, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards copies of embeddings and LM head (another precision here) that outlive a training step."""
    draft = tiny.draft_for(llama, "untrained")
    if copied:
        draft = draft.to(torch.bfloat16)
    before, _ = tiny.both(llama, draft, ids)
    held = draft._shared.head.clone()
    assert (draft._shared.head.data_ptr() == llama.lm_head.weight.data_ptr()) is not copied
    llama.lm_head.weight.mul_(1.5).roll(1, dims=0)
    llama.get_input_embeddings().weight.add_(0.3)
    after, _ = tiny.both(llama, draft, ids)
    assert torch.equal(draft._shared.head, llama.lm_head.weight.to(draft.dtype))
    assert torch.equal(draft._shared.embedding, llama.get_input_embeddings().weight.to(draft.dtype))
    assert not torch.equal(draft._shared.head, held)
    assert before.sequences.tolist() != after.sequences.tolist()


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_inference_mode_and_back(kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards tensors made in inference mode, which outlive the first call here."""
    draft = tiny.draft_for(llama, kind).to(torch.bfloat16)
    with torch.inference_mode():
        tiny.both(llama, draft, ids)
    tiny.both(llama, draft, ids)
    with torch.inference_mode():
        tiny.both(llama, draft, ids, do_sample=True)
    assert draft.last_stats.drafted > 0


def test_a_deep_copy_of_the_target_is_another_target(
    llama: PreTrainedModel, untrained: DovetailAssistantModel, ids: Tensor
) -> None:
    tiny.both(llama, untrained, ids)
    other = copy.deepcopy(llama)
    tiny.both(other, untrained, ids)
    assert untrained._shared.embedding.data_ptr() == other.get_input_embeddings().weight.data_ptr()
