"""Drafts out of native kernels: the rows of the network itself, its weights as they are, and when it has to run."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape, host
from hf_dovetail.curves import MAX_ROWS
from hf_dovetail.draft import DraftSession
from hf_dovetail.engines import native
from hf_dovetail.steps import BlockSteps, Network

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gating": ("draft", {"num_hidden_layers": 2}),
    "linear": ("draft", {"fusion": "eagle"}),
    "llama": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
TREE = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)


@torch.no_grad()
def draft_of(kind: str, dtype: torch.dtype = torch.float32) -> DovetailAssistantModel:
    """A draft whose every weight is random, placed for a target of its precision."""
    family, changes = KINDS[kind]
    target, generator = tiny.build("llama"), torch.Generator().manual_seed(7)
    if family == "draft":
        draft: Any = DovetailAssistantModel.from_target(target, **changes)
        for parameter in draft.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    else:
        lm = tiny.build(family, **changes)
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        draft = DovetailAssistantModel.from_causal_lm(lm)
    return tiny.met(draft.to(dtype), target.to(dtype))


@torch.no_grad()
def computed(network: Network, width: int = 32) -> list[Tensor]:
    """Hidden states of committed rows, of one more, and of two levels of a tree; and all keys and values."""
    generator = torch.Generator().manual_seed(1)
    steps = BlockSteps(network, network.new_rows(64))
    steps.start = 3

    def rows(count: int) -> tuple[Tensor, Tensor]:
        features = torch.randn(1, count, width, generator=generator).to(network.dtype)
        return tiny.prompt(count, seed=count), features if network.input_size else features[..., :0]

    found = [steps.catch_up(*rows(count)) for count in (5, 1, MAX_ROWS + 9, 2)]
    tokens, hidden = rows(4)
    for level in range(2):
        visible = torch.cat((TREE,) * (level + 1), dim=1)
        hidden = steps.level(tokens, hidden, visible)
        found.append(hidden)
    return [*found, steps.buffer.states[..., : steps.held + 8, :]]


def differences(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]


def exact(draft: DovetailAssistantModel) -> list[Tensor]:
    """What a draft's network computes of its own weights in float32."""
    wide = copy.deepcopy(draft).float()
    return computed(tiny.met(wide, tiny.build("llama").to(draft.dtype).float()).network)


def errors(draft: DovetailAssistantModel) -> tuple[float, float]:
    """How far the rows of the kernels, and those of the network itself, are from what they should be."""
    expected = exact(draft)
    fast, own = (differences(computed(network), expected) for network in (host.for_host(draft.network), draft.network))
    return max(fast), max(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_the_networks_own(kind: str, dtype: torch.dtype) -> None:
    draft = draft_of(kind, dtype)
    assert isinstance(host.for_host(draft.network), host.HostNetwork)

    def check(what: str) -> None:
        fast, own = errors(draft)
        assert fast < (2e-5 if dtype == torch.float32 else max(0.15, 2 * own)), what  # a wrong weight: 0.5 and more

    check("as it was made")
    with pytest.MonkeyPatch.context() as patch:
        for most in ("_MOST_BYTES", "_MOST_BYTES_WITHOUT_ONEDNN"):
            patch.setattr(host, most, 0)  # too many to be copied, or to be looked at before each answer
        patch.setattr(host, "fingerprint", lambda weight: pytest.fail("weights were read"))
        check("not copied")
    before = computed(host.for_host(draft.network))
    for name, parameter in (draft if draft.reads_features else draft.lm).named_parameters():
        if "embed" in name or "head" in name or name.startswith("model.norm"):
            continue
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(parameter.roll(1, 0))
            # each weight has its place, and a new value counts
            assert max(differences(computed(host.for_host(draft.network)), before)) > 0.02, name
            check(name)
            parameter.copy_(kept)


def test_sessions_use_them_and_propose_the_same_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = draft_of("gating")

    def trees() -> list[Tensor]:
        session, found = DraftSession(draft), []
        session.begin(tiny.prompt(1), 0)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            session.commit(tiny.prompt(3, seed=seed), torch.randn(1, 3, 32, generator=generator))
            found.append(session.grow(TreeShape(12, 4, 4)))
        return found

    used: list[int] = []
    step = host.HostNetwork.step
    monkeypatch.setattr(host.HostNetwork, "step", lambda *args: used.append(args[1].shape[1]) or step(*args))
    fast = trees()
    assert len(used) > 8
    monkeypatch.setattr("hf_dovetail.draft.for_host", lambda network: network)
    own = trees()
    assert all(torch.equal(a[:, :2], b[:, :2]) for a, b in zip(fast, own, strict=True))
    scores = [torch.cat([tree[:, 2].view(torch.float32) for tree in each]) for each in (fast, own)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-3)
    assert len({str(tree.tolist()) for tree in fast}) == 4


@torch.no_grad()
def test_packed_weights_are_made_once_and_again_when_they_change() -> None:
    draft = draft_of("gating", torch.bfloat16)
    first = host.for_host(draft.network)
    assert host.for_host(draft.network)._parts is first._parts
    before = computed(first)
    draft.layers[1].mlp.down_proj.weight.data[3, 4] += 1  # nothing counts such a change
    second = host.for_host(draft.network)
    assert second._parts is not first._parts
    assert max(differences(computed(second), before)) > 0.001
    assert errors(draft)[0] < 0.15
    gone = weakref.ref(draft.layers[1].mlp.down_proj.weight)
    del draft, first, second
    gc.collect()
    assert gone() is None


def hooked(draft: DovetailAssistantModel) -> None:
    draft.layers[0].mlp.up_proj.register_forward_hook(lambda module, inputs, output: output)


def with_a_hooked_fusion(draft: DovetailAssistantModel) -> None:
    draft.fusion.input_layernorm.register_forward_pre_hook(lambda module, inputs: None)


def with_another_norm(draft: DovetailAssistantModel) -> None:
    draft.layers[1].input_layernorm = nn.LayerNorm(32)


def with_a_forward_of_its_own(draft: DovetailAssistantModel) -> None:
    attention = draft.layers[1].self_attn
    attention.forward = lambda *args: type(attention).forward(attention, *args)


def with_another_layer(draft: DovetailAssistantModel) -> None:
    class Scaled(nn.Linear):
        def forward(self, rows: Tensor) -> Tensor:
            return 2 * super().forward(rows)

    own = draft.layers[0].mlp.gate_proj
    scaled = Scaled(own.in_features, own.out_features, bias=False)
    scaled.weight = own.weight
    draft.layers[0].mlp.gate_proj = scaled


def in_two_precisions(draft: DovetailAssistantModel) -> None:
    draft.layers[1].mlp.bfloat16()


def with_an_unknown_activation(draft: DovetailAssistantModel) -> None:
    draft.layers[1].mlp.act_fn = nn.ReLU()


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        with_a_hooked_fusion,
        with_another_norm,
        with_a_forward_of_its_own,
        with_another_layer,
        in_two_precisions,
        with_an_unknown_activation,
    ],
)
def test_what_somebody_changed_runs_as_it_is(change: Callable[[DovetailAssistantModel], None]) -> None:
    draft = draft_of("gating")
    assert isinstance(host.for_host(draft.network), host.HostNetwork)
    change(draft)
    assert host.for_host(draft.network) is draft.network


def test_other_networks_compute_themselves(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {
        "float64": draft_of("gating").double(),
        "kernels for LayersFusion": DovetailAssistantModel.from_target(llama, fusion="eagle3"),
        "linear layers": draft_of("gating")._quantise(8, "this draft") or None,
    }
    for reason, draft in others.items():
        if draft is not None:
            assert host.for_host(draft.network) is draft.network
            assert reason in str(host.why_not(draft.network))
    monkeypatch.setattr(native, "loaded", lambda: (None, "no kernels"))
    draft = draft_of("gating")
    assert host.for_host(draft.network) is draft.network
