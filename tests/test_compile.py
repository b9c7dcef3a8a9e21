"""torch.compile over a prepared model: its packed weights are operations of one graph, and its tokens stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dovetail import prepare_target, restore_target
from hf_dovetail.engines import ENGINES, engine_of, onednn
from hf_dovetail.packed import PackedWeight

pytestmark = pytest.mark.skipif(onednn.why_not(tiny.build("llama")) is not None, reason="oneDNN is not in this torch")
TRACED = {"backend": "aot_eager", "fullgraph": True}
"""All of torch.compile but its code generator, which takes most of its time."""


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def prepared(engine: str, **changes: Any) -> PreTrainedModel:
    """A tiny model of one layer; the engine int4 may be missing here."""
    model = tiny.build("llama", num_hidden_layers=1, **changes)
    reason = ENGINES[engine].why_not(model)
    if reason is not None:
        pytest.skip(reason)
    return prepare_target(model, engine)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_a_compiled_forward_is_one_graph_and_keeps_its_tokens(ids: Tensor) -> None:
    """The head is the embedding, so one weight is read in two ways."""
    model = prepared("onednn", tie_word_embeddings=True)
    plain = tiny.run(model, ids, max_new_tokens=3)
    model.forward = torch.compile(model.forward, **TRACED)
    tiny.assert_same(plain, tiny.run(model, ids, max_new_tokens=3))
    assert isinstance(model.lm_head.weight, PackedWeight)
    assert model.model.embed_tokens.weight is model.lm_head.weight


@pytest.mark.parametrize("engine", ["int8", "int4"])
def test_quantised_products_are_operations_of_one_graph(engine: str, ids: Tensor) -> None:
    """Siblings share one product in a graph too, and none gets another's part."""
    model = prepared(engine)
    compiled = torch.compile(model, **TRACED)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_generated_code_of_a_prepared_model_gives_its_logits(ids: Tensor) -> None:
    """Guards the memory layout that torch's code generator expects of each product."""
    model = prepared("int8", tie_word_embeddings=True)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.xfail(
    torch.__version__ < "2.9", reason="torch 2.8 cannot trace the attention of a model prepared after torch.compile"
)
def test_a_graph_follows_its_model_from_engine_to_engine(ids: Tensor) -> None:
    """Compiled first, prepared and restored afterwards, by the wrapper and by the model."""
    model = tiny.build("llama", num_hidden_layers=1)
    before, compiled = logits(model, ids), torch.compile(model, **TRACED)
    torch.testing.assert_close(logits(compiled, ids), before)
    assert prepare_target(compiled, "onednn") is compiled
    assert engine_of(model) == "onednn"
    torch.testing.assert_close(logits(compiled, ids), logits(model, ids))
    restore_target(compiled)
    assert engine_of(model) == "eager"
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(logits(compiled, ids), 2 * before)


def test_compiled_gradients_and_autocast_are_those_of_the_model(ids: Tensor) -> None:
    model = prepared("int8")
    embeddings, gradients = torch.randn(1, 5, model.config.hidden_size, requires_grad=True), []
    compiled = torch.compile(model, **TRACED)
    for each in (model, compiled):
        each(inputs_embeds=embeddings).logits[0, -1, 7].backward()
        gradients.append(embeddings.grad)
        embeddings.grad = None
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = logits(compiled, ids), logits(model, ids)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()  # its norms are torch's own


def test_dovetail_on_a_compiled_target_is_plain_generate_on_it(ids: Tensor) -> None:
    model = prepared("onednn")
    draft = tiny.draft_for(model, "noisy")
    model.forward = torch.compile(model.forward, backend="aot_eager")
    tiny.both(model, draft, ids, max_new_tokens=5)
    assert 0 < draft.last_stats.accepted < draft.last_stats.drafted
