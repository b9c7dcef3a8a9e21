"""What a process has set for all its tensors: default device, default precision, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, prepare_target
from hf_dovetail.engines import native

ENGINES = ["eager", "onednn", "int8", "int4"]


def default_device() -> torch.device:
    """Tensors that nobody placed are nowhere."""
    return torch.device("meta")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def prepared(model: PreTrainedModel, engine: str) -> PreTrainedModel:
    if engine == "int4" and native.why_not():
        pytest.skip(native.why_not())
    return prepare_target(model, engine)


def stats_of(target: PreTrainedModel, draft: DovetailAssistantModel, ids: Tensor, **options: object) -> tuple:
    """What the draft proposed and the target took, in an answer that is plain generate's."""
    tiny.both(target, draft, ids, max_new_tokens=40, **options)
    stats = draft.last_stats
    assert stats.drafted > 0
    return stats.rounds, stats.drafted, stats.accepted_by_depth


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
@pytest.mark.parametrize(
    "setting",
    [
        default_device,
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
    ],
    ids=["device", "bfloat16", "float64"],
)
def test_defaults_of_the_process_change_nothing(
    setting: object, kind: str, sample: bool, llama: PreTrainedModel, ids: Tensor
) -> None:
    """Guards the loop's own tensors, which must say where and in what precision they are."""
    expected = stats_of(llama, tiny.draft_for(llama, kind), ids, do_sample=sample)
    draft = tiny.draft_for(llama, kind)
    with setting():
        assert stats_of(llama, draft, ids, do_sample=sample) == expected
        draft.tree = "auto"
        tiny.both(llama, draft, ids, do_sample=sample)
    draft.tree = tiny.draft_for(llama, kind).tree
    assert stats_of(llama, draft, ids, do_sample=sample) == expected


@pytest.mark.parametrize("engine", ENGINES)
def test_models_are_prepared_whatever_the_defaults_are(engine: str, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards the packing and the kernels' own tensors; what is computed is the same."""
    expected = prepared(llama, engine)(ids).logits
    for setting in (default_device, lambda: default_dtype(torch.bfloat16)):
        other = tiny.build("llama")
        draft = tiny.draft_for(other, "noisy")
        with setting():
            prepared(other, engine)
            assert torch.equal(other(ids).logits, expected)
            tiny.both(other, draft, ids)


def assert_same_up_to_a_tie(plain: Any, ours: Any) -> None:
    """The same tokens, up to the first where plain decoding's bfloat16 logits of both are at most two steps apart."""
    different = (plain.sequences != ours.sequences)[0].nonzero()
    if len(different):
        at = int(different[0]) - (plain.sequences.shape[1] - len(plain.logits))
        logits = plain.logits[at][0].float()
        gap = logits.max() - logits[ours.sequences[0, different[0]]]
        assert gap <= logits.abs().max() * 2**-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_answers_within_autocast_are_plain_generates(kind: str, engine: str, llama: PreTrainedModel) -> None:
    """Guards drafts and kernels against inputs of another precision, and what stays of them afterwards."""
    ids, draft = tiny.prompt(), tiny.draft_for(llama, kind)
    outside = tiny.run(llama, ids).sequences
    prepared(llama, engine)
    with autocast():
        assert_same_up_to_a_tie(tiny.run(llama, ids), tiny.run(llama, ids, draft))
        assert llama(ids).logits.dtype == torch.bfloat16
    assert draft.last_stats.drafted > 0
    after, _ = tiny.both(llama, draft, ids)
    if engine in ("eager", "onednn"):
        assert torch.equal(after.sequences, outside)


def test_a_packed_layer_within_autocast_is_the_layer_within_autocast(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards autocast's precision: the packed weights must not compute in their own there."""
    with autocast(), torch.no_grad():
        expected = llama(ids).logits
        prepare_target(llama, "onednn")
        found = llama(ids).logits
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
