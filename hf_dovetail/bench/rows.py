"""The rows of a measurement: ways to decode the same prompts, and one timed answer of a way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ..config import TreeShape
from ..modeling import DovetailAssistantModel
from ..stats import GenerationStats

PLAIN = "plain"
_CHAINS = (5, 8, 20)
_LOOKUPS = (8, 10)


@dataclass(frozen=True)
class Row:
    """A way to decode.

    Args:
        name: its name in the results.
        options: keyword arguments of `generate`.
        before: called before each answer.
        draft: the Dovetail draft among the options, or None.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[], None] = lambda: None
    draft: DovetailAssistantModel | None = None


@dataclass(frozen=True)
class Answer:
    """One timed answer.

    Args:
        tokens: the new ones.
        wall_ms: of the whole call, prompt included.
        decode_ms: after the first step, which also ran the prompt.
        decoded: tokens after that step.
        rounds: steps of the target after the first one.
        stats: what the Dovetail draft counted, or None.
    """

    tokens: tuple[int, ...]
    wall_ms: float
    decode_ms: float
    decoded: int
    rounds: int
    stats: GenerationStats | None = None


def make_rows(
    draft: DovetailAssistantModel,
    wide_draft: DovetailAssistantModel | None,
    random: DovetailAssistantModel | None,
    assistant: PreTrainedModel | None,
    shape: TreeShape,
) -> list[Row]:
    """All rows; `plain` first, since the others are compared with it.

    Args:
        draft: the target's Dovetail draft.
        wide_draft: the same draft in the geometry of a widened target, or None.
        random: a draft with random weights, or None.
        assistant: a small causal LM, for transformers' own assisted generation and as a Dovetail draft, or None.
        shape: of the fixed trees.
    """
    rows = [Row(PLAIN)]
    for prefix, model in (("dovetail", draft), ("dovetail-wide-draft", wide_draft)):
        if model is not None:
            rows += [dovetail(f"{prefix}-fixed", model, shape), dovetail(f"{prefix}-auto", model, "auto")]
    if random is not None:
        rows.append(dovetail("random-draft-auto", random, "auto"))
    if assistant is not None:
        rows.append(dovetail("dovetail-lm-auto", DovetailAssistantModel.from_causal_lm(assistant), "auto"))
        rows += [_assisted(f"assisted-{length}", assistant, length) for length in _CHAINS]
        rows.append(_assisted("assisted-default", assistant, None))
    rows += [Row(f"lookup-{length}", {"prompt_lookup_num_tokens": length}) for length in _LOOKUPS]
    return rows


ROW_NAMES = (
    PLAIN,
    *(f"dovetail-{draft}{shape}" for draft in ("", "wide-draft-") for shape in ("fixed", "auto")),
    "random-draft-auto",
    "dovetail-lm-auto",
    *(f"assisted-{length}" for length in (*_CHAINS, "default")),
    *(f"lookup-{length}" for length in _LOOKUPS),
)
"""The names that `make_rows` gives."""


def dovetail(name: str, draft: DovetailAssistantModel, tree: TreeShape | str) -> Row:
    """Dovetail with a copy of the draft, whose trees have this shape."""
    own = copy.deepcopy(draft)  # what a draft learns in one row stays there

    def before() -> None:
        if own.tree != tree:
            own.tree = tree

    return Row(name, {"assistant_model": own}, before, own)


def _assisted(name: str, assistant: PreTrainedModel, length: int | None) -> Row:
    """Transformers' assisted generation: chains of a constant length, or (None) its defaults."""
    config = copy.deepcopy(assistant.generation_config)
    if length is not None:
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = length, "constant"
        config.assistant_confidence_threshold = 0.0

    def before() -> None:
        assistant.generation_config = copy.deepcopy(config)

    return Row(name, {"assistant_model": assistant}, before)


@torch.no_grad()
def randomised(draft: DovetailAssistantModel) -> DovetailAssistantModel:
    """A copy of a draft that knows nothing: every matrix drawn anew."""
    random = copy.deepcopy(draft)
    generator = torch.Generator().manual_seed(0)
    for parameter in random.parameters():
        if parameter.ndim == 2:
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[0] ** -0.5
            parameter.copy_(values)
    return random


def never_ending(model: PreTrainedModel) -> PreTrainedModel:
    """The model without an end-of-sequence token, so that all answers have the same number of tokens."""
    config = model.generation_config
    if config.pad_token_id is None:
        config.pad_token_id = 0
    config.eos_token_id = None
    return model


class _Steps(StoppingCriteria):
    """Counts the target's forward passes and notes when the first step ended; stops nothing.

    Calls before the target's first pass are not its own: some transformers ask the criteria for the assistant too.
    """

    def __init__(self) -> None:
        self.passes, self.first, self.length = 0, 0.0, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.passes and not self.length:
            self.first, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def count(self, *forward: Any) -> None:
        """A forward hook of the target."""
        self.passes += 1


def answer(target: PreTrainedModel, row: Row, prompt: Tensor, new_tokens: int, seed: int, **sampling: Any) -> Answer:
    """Decode `new_tokens` tokens after the (1, n) prompt, timed.

    Raises:
        ValueError: if the row cannot decode with this target, or transformers refuses its options.
    """
    row.before()
    steps = _Steps()
    torch.manual_seed(seed)
    hook = target.register_forward_hook(steps.count)
    try:
        begin = time.perf_counter()
        output = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([steps]),
            **sampling,
            **row.options,
        )
        end = time.perf_counter()
    finally:
        hook.remove()
    tokens = tuple(output[0, prompt.shape[1] :].tolist())
    stats = row.draft.last_stats if row.draft is not None else None
    return Answer(
        tokens=tokens,
        wall_ms=1e3 * (end - begin),
        decode_ms=1e3 * (end - steps.first),
        decoded=prompt.shape[1] + len(tokens) - steps.length,
        rounds=stats.rounds if stats is not None else steps.passes - 1,
        stats=stats,
    )
