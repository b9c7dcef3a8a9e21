"""A small causal LM in lean blocks: the trees of its own layers, its own weights, and when its layers must do it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from sessions import COMMITS, Answer, assert_same, replaying
from torch import nn
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare_target, recast, rows
from hf_dovetail.draft import DraftSession
from hf_dovetail.steps import BlockSteps, LanguageModelSteps

ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama 3": ("llama", {"rope_parameters": ROPE | {"original_max_position_embeddings": 64}}),
    "with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
}


@torch.no_grad()
def lm_of(family: str, **changes: Any) -> PreTrainedModel:
    """A model in float64 whose every vector is random too: a norm or a bias that is left out must show."""
    lm, generator = tiny.build(family, **changes).double(), torch.Generator().manual_seed(5)
    for parameter in lm.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return lm


def drafting(lm: PreTrainedModel) -> DovetailAssistantModel:
    """A draft of the model, ready for a target with its vocabulary."""
    return tiny.met(DovetailAssistantModel.from_causal_lm(lm), tiny.build("llama").to(lm.dtype))


def answered(draft: DovetailAssistantModel) -> Answer:
    answer = Answer(tiny.build("llama").double(), draft)
    answer.features = None
    return answer


@pytest.mark.parametrize("kind", KINDS)
def test_the_trees_are_those_of_the_models_own_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards every part of a block, on the host and in fixed shapes, over ten rounds and with replays in between."""
    monkeypatch.setattr(rows, "EXTENT", 16)
    family, changes = KINDS[kind]
    draft = drafting(lm_of(family, **changes))
    answer, shapes = answered(draft), [TreeShape(12, 4, 4)] * len(COMMITS)
    host, device = DraftSession(draft), DraftSession(draft, on_host=False)
    assert isinstance(host._steps, BlockSteps)
    log = replaying(device, monkeypatch)
    draft._recast = None
    own = DraftSession(draft)
    assert isinstance(own._steps, LanguageModelSteps)
    expected = answer.rounds(own, shapes)
    assert_same(answer.rounds(host, shapes), expected)
    assert_same(answer.rounds(device, shapes), expected)
    assert log == ["capture"] + ["replay"] * (len(COMMITS) - 2) or log.count("capture") > 1  # extents that grow
    assert len({str(tree.tokens.tolist()) for tree in expected}) > 5


def hooked(lm: PreTrainedModel) -> None:
    lm.model.layers[1].register_forward_hook(lambda module, inputs, output: output)


def with_a_forward_of_its_own(lm: PreTrainedModel) -> None:
    attention = lm.model.layers[0].self_attn
    attention.forward = lambda *args, **options: type(attention).forward(attention, *args, **options)


def of_a_users_class(lm: PreTrainedModel) -> None:
    class Layer(type(lm.model.layers[0])):
        pass

    lm.model.layers[1].__class__ = Layer


def with_another_norm(lm: PreTrainedModel) -> None:
    """A module that is known, but computes something else."""
    lm.model.layers[1].input_layernorm.variance_epsilon = 100.0
    lm.model.layers[1].self_attn.scaling *= 40.0


LEFT: dict[str, tuple[str, Callable[[PreTrainedModel], None], str]] = {
    "another family": ("gemma2", lambda lm: None, "not known to fit"),
    "a window": ("mistral", lambda lm: None, "window"),
    "windows in some layers": ("qwen2-sliding", lambda lm: None, "window"),
    "a hook": ("llama", hooked, "hooks"),
    "a patched forward": ("llama", with_a_forward_of_its_own, "a forward of their own"),
    "a layer of the user's": ("qwen3", of_a_users_class, "not those of transformers"),
    "another computation": ("llama", with_another_norm, "something else"),
}


@pytest.mark.parametrize("case", LEFT)
def test_other_models_draft_with_their_own_layers(case: str, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against trees that the model would not have grown, and says why."""
    family, change, reason = LEFT[case]
    lm = lm_of(family, sliding_window=64) if case == "a window" else lm_of(family)
    change(lm)
    monkeypatch.setattr(recast.logger.parent, "propagate", True)
    with caplog.at_level("INFO"):
        draft = drafting(lm)
    assert draft.network is None
    assert reason in caplog.text
    assert isinstance(DraftSession(draft)._steps, LanguageModelSteps)
    assert isinstance(DraftSession(draft, on_host=False)._steps, LanguageModelSteps)


def test_a_hook_that_comes_later_is_heard_and_one_that_goes_is_forgotten() -> None:
    lm = lm_of("llama")
    draft = drafting(lm)
    first = draft.network
    assert first is not None
    handle = lm.model.norm.register_forward_hook(lambda module, inputs, output: output)
    assert drafting(lm).network is None
    handle.remove()
    assert drafting(lm).network is not None
    assert drafting(lm).network is drafting(lm).network


def test_modules_that_are_replaced_are_the_ones_that_draft() -> None:
    """Guards adapters: what stands in a module's place later (LoRA) computes from then on."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.base(hidden) + hidden[..., :1]

    lm = lm_of("llama")
    draft, shapes = drafting(lm), [TreeShape(12, 4, 4)] * len(COMMITS)
    before = answered(draft).rounds(DraftSession(draft), shapes)
    for layer in lm.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    draft = drafting(lm)
    assert draft.network is not None
    after = answered(draft).rounds(DraftSession(draft), shapes)
    draft._recast = None
    assert_same(after, answered(draft).rounds(DraftSession(draft), shapes))
    assert [tree.tokens.tolist() for tree in after] != [tree.tokens.tolist() for tree in before]


def test_nothing_is_copied_and_nothing_shows() -> None:
    """Guards memory and checkpoints: the same parameters, in no second place."""
    lm = lm_of("qwen3")
    names = set(DovetailAssistantModel.from_causal_lm(lm).state_dict())
    draft = drafting(lm)
    assert set(draft.state_dict()) == names
    assert {address for address, _ in draft.network.addresses()} <= {p.data_ptr() for p in lm.parameters()}
    for other in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert other.network is None
        ours = tiny.met(other, tiny.build("llama").double()).network.addresses()
        assert not set(ours) & set(draft.network.addresses())


@torch.no_grad()
def padded(target: PreTrainedModel, family: str, size: int) -> PreTrainedModel:
    """A model that mostly agrees with the target, with a vocabulary of `size`; it wants what only it has."""
    lm = tiny.build(family, vocab_size=size)
    if family == "llama":
        for (name, ours), theirs in zip(lm.named_parameters(), target.parameters(), strict=True):
            rows = min(len(ours), len(theirs))
            ours[:rows] = theirs[:rows]
            if name == "lm_head.weight":
                ours[rows:] = 3 * ours[:rows].abs().max()
    return lm


@pytest.mark.parametrize("size", [tiny.VOCAB - 1, tiny.VOCAB + 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tree", ["auto", TreeShape(12, 4, 4)], ids=["auto", "fixed"])
def test_vocabularies_may_differ_by_padding(family: str, size: int, tree: Any) -> None:
    """Guards Qwen 2.5, whose sizes pad differently: no token is drafted that the target lacks."""
    target = tiny.build("llama")
    with torch.no_grad():
        target.lm_head.weight[-1] *= 2.0  # the token that the smaller draft lacks is a frequent one
    draft = tiny.met(DovetailAssistantModel.from_causal_lm(padded(target, family, size)), target)
    draft.tree, draft.strict = tree, True
    assert (draft.network is None) == (family == "gemma2")
    seen = set()
    for seed in range(3):
        for sample in (False, True):
            ids = torch.cat((tiny.prompt(12, seed=seed), torch.tensor([[tiny.VOCAB - 1, 5]])), dim=1)
            torch.manual_seed(seed)
            plain = tiny.run(target, ids, do_sample=sample)
            torch.manual_seed(seed)
            tiny.assert_same(plain, tiny.run(target, ids, draft, do_sample=sample))
            seen.update(plain.sequences[0, ids.shape[1] :].tolist())
            if family == "llama" and not sample and tree != "auto":  # whose trees depend on the machine
                assert draft.last_stats.accepted > 3
    assert tiny.VOCAB - 1 in seen


def test_a_change_of_precision_or_engine_is_followed() -> None:
    """Guards what is kept between answers: weights that moved, and packed ones."""
    lm = tiny.build("llama")
    draft = drafting(lm)
    answer = tiny.prompt(12)
    for change in (lambda: lm.to(torch.bfloat16), lambda: prepare_target(lm, engine="onednn")):
        change()
        target = tiny.build("llama").to(torch.bfloat16)
        draft.tree = TreeShape(8, 3, 4)
        expected = tiny.run(target, answer).sequences
        assert torch.equal(tiny.run(target, answer, draft).sequences, expected)
        assert draft.network is not None
        assert draft.network.dtype == torch.bfloat16
        assert draft.last_stats.draft_failed is False
