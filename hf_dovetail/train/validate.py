"""Validation as a draft is used: the real decode loop on held-out prompts, greedy, with a tree of fixed shape.

The answer is the target's own text whatever the draft proposes, so all validations of a run decode the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import TreeShape
from ..modeling import DovetailAssistantModel
from .processes import this_process
from .records import Record, Skipped, read_records
from .text import render_chat

SHAPE = TreeShape()
"""The paper's server setting."""


@dataclass(frozen=True)
class Validation:
    """What held-out prompts gave.

    Args:
        tokens_per_round: new tokens over rounds, over all prompts together; the prefill's token is no round's.
        acceptance_by_depth: share of the rounds that accept a node at depth 1, 2, ...
        rounds: how many there were.
    """

    tokens_per_round: float
    acceptance_by_depth: tuple[float, ...]
    rounds: int


def load_prompts(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, count: int, longest: int, skipped: Skipped
) -> list[Tensor]:
    """(1, n) ids of the first `count` prompts of a source, each cut to its first `longest` tokens.

    A conversation's prompt ends where its last answer begins; a text is its own prompt. `skipped` gets records that
    cannot be used.

    Raises:
        ValueError: if the source holds no prompt.
    """
    prompts: list[Tensor] = []
    for record in read_records(source, skipped):
        try:
            prompts.append(_prompt(record, tokenizer, longest))
        except ValueError as error:
            skipped.add(record.where, str(error))
        if len(prompts) == count:
            break
    if not prompts:
        raise ValueError(f"{source} holds no prompt to validate on")
    return prompts


def _prompt(record: Record, tokenizer: PreTrainedTokenizerBase, longest: int) -> Tensor:
    """(1, n) ids."""
    if not record.messages:
        return torch.tensor([tokenizer(record.prompt or record.text, verbose=False).input_ids[:longest]])
    text, spans = render_chat(tokenizer, record.messages)
    return torch.tensor([tokenizer(text[: spans[-1][0]], add_special_tokens=False).input_ids[:longest]])


def validate(
    draft: DovetailAssistantModel, target: PreTrainedModel, prompts: Sequence[Tensor], max_new_tokens: int
) -> Validation:
    """Decode the prompts with the draft; under several processes each takes its share of them.

    Args:
        draft: of this target; its mode, tree and statistics are left as they were.
        prompts: (1, n) ids each.
        max_new_tokens: length of an answer.
    """
    state, sums = this_process(), torch.zeros(SHAPE.levels + 2)  # rounds, tokens, rounds that accept depth 1, 2, ...
    with _drafting(draft):
        for prompt in prompts[state.process_index :: state.num_processes]:
            ids = prompt.to(target.device)
            target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=draft,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                synced_gpus=False,  # which ZeRO 3 would ask for; the target is whole on every process
            )
            stats = draft.last_stats
            sums[0] += stats.rounds
            sums[1] += stats.new_tokens - 1
            for depth, accepted in enumerate(stats.accepted_by_depth):
                sums[2 + depth] += accepted
    rounds, tokens, *by_depth = reduce(sums.to(state.device), "sum").tolist()
    rounds = max(rounds, 1.0)
    return Validation(tokens / rounds, tuple(count / rounds for count in by_depth), int(rounds))


@contextmanager
def _drafting(draft: DovetailAssistantModel) -> Iterator[None]:
    """A draft in training, as a draft for a while."""
    before = draft.training, draft.tree, draft.last_stats
    draft.eval()
    draft.tree = SHAPE
    try:
        yield
    finally:
        training, draft.tree, draft.last_stats = before
        draft.train(training)
