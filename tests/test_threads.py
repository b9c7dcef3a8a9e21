"""Several answers at once on one target and one draft, as a server would ask for them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel


@pytest.mark.parametrize("kind", ["untrained", "noisy"])
def test_threads_that_share_target_and_draft_do_not_mix(kind: str, llama: PreTrainedModel) -> None:
    """Guards the feature tap: its hook stands on a module that other threads run too, plainly or assisted."""
    draft = tiny.draft_for(llama, kind)
    prompts = [tiny.prompt(length, seed=length) for length in (5, 9, 14, 20, 27, 33)]

    def answer(job: tuple[Tensor, DovetailAssistantModel | None]) -> list[int]:
        ids, assistant = job
        options: dict[str, Any] = {} if assistant is None else {"assistant_model": assistant}
        return llama.generate(ids, max_new_tokens=40, do_sample=False, **options)[0].tolist()

    alone = [answer((ids, None)) for ids in prompts]
    jobs = [(ids, assistant) for ids in prompts for assistant in (draft, None)]
    with ThreadPoolExecutor(max_workers=6) as pool:
        together = list(pool.map(answer, jobs))
    assert together == [tokens for tokens in alone for _ in range(2)]
    assert len({tuple(tokens[-10:]) for tokens in alone}) > 1


def test_an_answer_inside_an_answer_keeps_the_outer_statistics(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards `last_stats`: a processor may generate with the same draft; the last call to end is the outer one."""

    def nested(prefix: Tensor, scores: Tensor) -> Tensor:
        llama.generate(ids, max_new_tokens=3, assistant_model=noisy)
        return scores

    tiny.run(llama, ids, noisy, logits_processor=[nested], max_new_tokens=9)
    assert noisy.last_stats.new_tokens == 9


def test_a_draft_that_overflows_costs_acceptance_only(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards the tree against NaN below sound parents: it sorts before every number, so a child would stay alone."""
    draft = tiny.draft_for(llama, "untrained")
    tiny.both(llama, draft, ids)
    sound, broken = draft.logits, []

    def overflowing(hidden: Tensor) -> Tensor:
        logits = sound(hidden)
        if hidden.shape[1] > 1:  # a level below the first
            broken.append(True)
            logits[:, 1:] = float("nan")
        return logits

    draft.logits = overflowing
    tiny.both(llama, draft, ids)
    assert broken
    assert draft.last_stats.drafted > 0
