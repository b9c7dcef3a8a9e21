"""A draft that fails in the middle of an answer costs a warning, not the answer; the next call tries it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from observers import RecordingStreamer
from torch import Tensor
from transformers import PreTrainedModel

import hf_dovetail
from hf_dovetail import DovetailAssistantModel, DovetailCandidateGenerator, TreeShape, draft, levels
from hf_dovetail.controller import AutoController
from hf_dovetail.decode import Round
from hf_dovetail.draft import DraftSession
from hf_dovetail.drafting import Drafting, Waiting
from hf_dovetail.experience import LARGEST
from hf_dovetail.recast import RecastLM
from hf_dovetail.tree import DraftTree

STEPS: dict[str, tuple[Any, str]] = {
    "the session's begin": (DraftSession, "begin"),
    "data for the device": (Waiting, "_moved"),
    "tokens to catch up with": (DraftSession, "commit"),
    "a pass of the network": (RecastLM, "logits"),
    "a level": (levels, "best_continuations"),
    "the best nodes": (draft, "rerank_on_host"),
    "the packed tree": (DraftTree, "unpack"),
    "the room": (DovetailCandidateGenerator, "room"),
    "the plan": (AutoController, "plan"),
    "another level": (AutoController, "_keep_going"),
    "the choice": (AutoController, "choose"),
    "what is learned": (AutoController, "learn"),
}
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.fixture(autouse=True)
def _lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DovetailAssistantModel, "strict", False)


class Fault:
    """Makes one step of a round fail at its `turn`-th call, and from then on while it is armed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str, turn: int, error: Exception) -> None:
        self.calls, self.armed = 0, True
        place, name = STEPS[step]
        sound = getattr(place, name)

        def failing(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.armed and self.calls >= turn:
                raise error
            return sound(*arguments, **options)

        static = isinstance(place, type) and not callable(place.__dict__[name])  # a class method
        monkeypatch.setattr(place, name, staticmethod(failing) if static else failing)


def warnings_of(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.fixture
def logged(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' loggers do not reach the root."""
    for module in ("drafting", "plugin"):
        monkeypatch.setattr(getattr(hf_dovetail, module).logger.parent, "propagate", True)
    return caplog


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("turn", [1, 4])
@pytest.mark.parametrize("step", STEPS)
def test_the_answer_goes_on_plainly(
    step: str, turn: int, sample: bool, llama: PreTrainedModel, ids: Tensor, logged: Any, monkeypatch: Any
) -> None:
    """Nothing is lost or repeated: tokens, scores and the streamer's calls are plain generate's. Then all is well."""
    noisy = tiny.draft_for(llama, "noisy")
    noisy.tree = "auto"
    streams = RecordingStreamer(), RecordingStreamer()
    plain = tiny.run(llama, ids, max_new_tokens=40, do_sample=sample, streamer=streams[0])
    fault = Fault(monkeypatch, step, turn, RuntimeError("the driver shut down"))
    ours = tiny.run(llama, ids, noisy, max_new_tokens=40, do_sample=sample, streamer=streams[1])
    tiny.assert_same(plain, ours)
    assert streams[0].calls == streams[1].calls
    once = step == "the session's begin"  # of an answer
    failed = turn == 1 or not once
    assert fault.calls == (1 if once else turn)
    assert len(warnings_of(logged)) == failed
    assert noisy.last_stats.draft_failed == failed
    assert noisy.last_stats.new_tokens == 40
    fault.armed = False
    rounds: list[Round] = []
    noisy.watch = rounds.append
    tiny.assert_same(plain, tiny.run(llama, ids, noisy, max_new_tokens=40, do_sample=sample))
    assert not noisy.last_stats.draft_failed
    assert sum(r.tree.num_nodes for r in rounds) > 0
    assert noisy.setbacks == 0


@pytest.mark.parametrize("step", STEPS)
def test_strict_drafts_raise(step: str, llama: PreTrainedModel, ids: Tensor, monkeypatch: Any) -> None:
    noisy = tiny.draft_for(llama, "noisy")
    noisy.tree, noisy.strict = "auto", True
    Fault(monkeypatch, step, 1, RuntimeError("the driver shut down"))
    with pytest.raises(RuntimeError, match="the driver shut down"):
        tiny.run(llama, ids, noisy, max_new_tokens=40)


@pytest.mark.parametrize("tree", ["auto", TreeShape(16, 7, 10)])
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_after_a_lack_of_memory_the_next_trees_are_smaller(
    kind: str, tree: Any, llama: PreTrainedModel, ids: Tensor, logged: Any, monkeypatch: Any
) -> None:
    """Half as many nodes at half the width, each time; a kept graph's memory is given back."""
    found = tiny.draft_for(llama, kind)
    found.tree, found.last_stats = tree, None
    plain = tiny.run(llama, ids, max_new_tokens=40)
    largest, sizes = [], []
    kept = Drafting.tree

    def tree_of(self: Drafting, *arguments: Any) -> DraftTree:
        largest.append(self._controller.largest)
        grown = kept(self, *arguments)
        sizes.append(grown.num_nodes)
        return grown

    monkeypatch.setattr(Drafting, "tree", tree_of)
    for failures in range(3):
        fault = Fault(monkeypatch, "the best nodes", 2, OUT_OF_MEMORY)
        tiny.assert_same(plain, tiny.run(llama, ids, found, max_new_tokens=40))
        shape = LARGEST if tree == "auto" else tree
        assert largest[-1] == TreeShape(shape.nodes >> failures, shape.depth, shape.top_k >> failures)
        assert max(sizes) <= shape.nodes >> failures
        assert found.setbacks == failures + 1
        assert len(warnings_of(logged)) == failures + 1
        assert "out of memory" in warnings_of(logged)[-1]
        if found.reads_features:
            assert found.pool.bench is None
        fault.armed = False
        sizes.clear()


def test_a_draft_that_does_not_fit_at_all(llama: PreTrainedModel, ids: Tensor, logged: Any, monkeypatch: Any) -> None:
    """Out of memory before the first token; other errors there are the caller's to see, and a misfit stays one."""
    untrained = tiny.draft_for(llama, "untrained")
    plain = tiny.run(llama, ids, max_new_tokens=20)
    meet: Callable = DovetailAssistantModel.meet
    for error, is_lack in (
        (OUT_OF_MEMORY, True),
        (RuntimeError("MPS backend out of memory"), True),
        (OSError("no driver"), False),
    ):

        def failing(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(DovetailAssistantModel, "meet", failing)
        if is_lack:
            tiny.assert_same(plain, tiny.run(llama, ids, untrained, max_new_tokens=20))
            assert untrained.last_stats.draft_failed
            assert untrained.last_stats.new_tokens == 20
        else:
            with pytest.raises(OSError, match="no driver"):
                tiny.run(llama, ids, untrained, max_new_tokens=20)
    assert len(warnings_of(logged)) == untrained.setbacks == 2
    untrained.strict = True
    monkeypatch.setattr(DovetailAssistantModel, "meet", meet)
    tiny.assert_same(plain, tiny.run(llama, ids, untrained, max_new_tokens=20))
    assert not untrained.last_stats.draft_failed


def test_a_failing_target_is_not_hidden(llama: PreTrainedModel, ids: Tensor, monkeypatch: Any) -> None:
    """Only the draft can be done without."""
    noisy = tiny.draft_for(llama, "noisy")
    calls = []

    def failing(*arguments: Any, **options: Any) -> None:
        calls.append(True)
        if len(calls) > 3:
            raise RuntimeError("no memory for the target")

    llama.lm_head.register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="no memory for the target"):
        tiny.run(llama, ids, noisy, max_new_tokens=40)
