"""What users do to a prepared model: the answer is the unprepared one's, or a refusal, never what lies beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from hf_dovetail import prepare_target
from hf_dovetail.engines import native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
IDS = tiny.prompt(5)


def both(family: str = "llama", **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """An unprepared model in bf16, with norms' weights and biases that matter, and the same one prepared."""
    plain = tiny.build(family, **tiny.WIDE, **changes)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
    plain = plain.to(torch.bfloat16)
    return plain, prepare_target(copy.deepcopy(plain), engine="onednn")


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def call(layer: nn.Module) -> None:
    """A call in between, in which a layer may take down what it finds."""
    layer(torch.ones(1, 1, 128).bfloat16(), position_embeddings=(torch.ones(1, 1, 32).bfloat16(),) * 2)


class Traced(nn.Module):
    """A model as torch.jit.trace takes it."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values).bfloat16())


def shorten(norm: nn.Module) -> None:
    norm.weight.data = norm.weight.data[:1]  # at the same address


def spread(layer: nn.Module) -> None:
    bias = layer.self_attn.q_proj.bias
    bias.data = bias.data[:1].expand(128)  # at the same address


def exchange_attribute(layer: nn.Module) -> None:
    """The weight is no parameter any more, and another tensor later."""
    norm, ramp = layer.input_layernorm, torch.linspace(-3, 3, 128).bfloat16()
    weight = norm.weight.data
    del norm.weight
    norm.weight = weight
    call(layer)
    norm.weight = weight * ramp


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def loosen(layer: nn.Module) -> None:
    layer.input_layernorm.variance_epsilon = epsilon = torch.tensor(1e-2)
    call(layer)
    epsilon.fill_(1e2)


def skip_class(layer: nn.Module) -> None:
    layer.__class__ = type("Skip", (type(layer),), {"forward": lambda self, hidden_states, **_: hidden_states})


def norm_class(layer: nn.Module) -> None:
    kind = type(layer.input_layernorm)
    layer.input_layernorm.__class__ = type("Other", (kind,), {"forward": lambda self, x: -kind.forward(self, x)})


def activation_class(layer: nn.Module) -> None:
    layer.mlp.act_fn.__class__ = type("Other", (nn.Module,), {"forward": lambda self, x: torch.relu(x)})


def builtin_activation(layer: nn.Module) -> None:
    del layer.mlp.act_fn
    layer.mlp.act_fn = torch.relu


CHANGES: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "a norm's weight is one number": (
        "llama",
        lambda layer: setattr(layer.input_layernorm, "weight", parameter(3.0)),
    ),
    "a norm's weight is a scalar": (
        "llama",
        lambda layer: setattr(layer.post_attention_layernorm, "weight", nn.Parameter(torch.tensor(-2.0).bfloat16())),
    ),
    "the input's norm shrinks in its place": ("llama", lambda layer: shorten(layer.input_layernorm)),
    "the MLP's norm shrinks in its place": ("llama", lambda layer: shorten(layer.post_attention_layernorm)),
    "each head has a norm of its own": (
        "qwen3",
        lambda layer: setattr(
            layer.self_attn.q_norm, "weight", nn.Parameter(torch.arange(128.0).view(4, 32).bfloat16())
        ),
    ),
    "a bias is one number": (
        "qwen2",
        lambda layer: setattr(layer.self_attn.q_proj, "bias", parameter(3.0)),
    ),
    "a bias is spread in its place": ("qwen2", spread),
    "a norm's weight is a plain attribute": ("llama", exchange_attribute),
    "a norm is parametrised": (
        "llama",
        lambda layer: parametrize.register_parametrization(layer.input_layernorm, "weight", Negated()),
    ),
    "a norm's epsilon is a tensor": ("llama", loosen),
    "a layer has another class": ("llama", skip_class),
    "a norm has another class": ("llama", norm_class),
    "an activation has another class": ("llama", activation_class),
    "an activation is a function": ("llama", builtin_activation),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts_as_it_does_unprepared(name: str) -> None:
    family, change = CHANGES[name]
    plain, model = both(family)
    before = logits(model)
    assert distance(before, logits(plain)) < 0.03
    for one in (plain, model):
        change(one.model.layers[0])
    assert distance(logits(model), logits(plain)) < 0.03
    assert distance(logits(model), before) > 0.05


@pytest.mark.parametrize("kind", ["linear", "norm", "activation", "layer"])
def test_a_function_that_is_exchanged_on_a_class_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the second call, once the change is no news."""
    plain, model = both()
    before = logits(model)
    classes = {
        "linear": nn.Linear,
        "norm": modeling_llama.LlamaRMSNorm,
        "activation": type(model.model.layers[0].mlp.act_fn),
        "layer": modeling_llama.LlamaDecoderLayer,
    }
    own = classes[kind].forward
    monkeypatch.setattr(classes[kind], "forward", lambda *args, **named: own(*args, **named) * 1.5)
    expected = logits(plain)
    assert distance(expected, before) > 0.1
    for _ in range(2):
        assert distance(logits(model), expected) < 0.03
    monkeypatch.undo()
    assert torch.equal(logits(model), before)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("width", [64, 256])
def test_states_of_another_width_are_refused_as_unprepared(rows: int, width: int) -> None:
    """Guards memory beside the model's: kernels read and write by addresses."""
    for model in both():
        for _ in range(3):
            with pytest.raises(RuntimeError, match=r"must match the size|cannot be multiplied"):
                model(inputs_embeds=torch.ones(1, rows, width).bfloat16())


@torch.no_grad()
def test_a_rotary_embedding_of_another_width_is_refused_as_unprepared() -> None:
    for model in both():
        layer = model.model.layers[0]
        tables = (torch.ones(1, 5, 16).bfloat16(),) * 2
        with pytest.raises(RuntimeError, match="must match the size"):
            layer(torch.ones(1, 5, 128).bfloat16(), position_embeddings=tables)


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        ((1, 1, 5, 5), True),
        ((1, 1, 5, 1), True),
        ((1, 1, 1, 5), True),
        ((1, 4, 5, 5), True),
        ((3, 1, 5, 5), True),
        ((1, 1, 5, 3), False),
        ((1, 1, 5, 9), False),
        ((1, 1, 3, 5), False),
        ((2, 1, 5, 5), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32])
def test_masks_mean_what_they_mean_unprepared(shape: tuple[int, ...], fits: bool, dtype: torch.dtype) -> None:
    plain, model = both()
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    seen[..., 0] = True
    mask = seen if dtype == torch.bool else torch.zeros(shape, dtype=dtype).masked_fill(~seen, -1e9)
    batch = IDS.expand(3, 5)
    if not fits:
        for one in (plain, model):
            with pytest.raises(RuntimeError, match="size"):
                one(batch, attention_mask=mask)
        return
    found, expected = (one(batch, attention_mask=mask).logits.float() for one in (model, plain))
    assert distance(found, expected) < 0.03
    if shape[3] == 5:
        assert distance(found, model(batch).logits.float()) > 0.1


def test_an_attention_that_somebody_registered_as_sdpa_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(*args: Any, **named: Any) -> tuple[Tensor, None]:
        return sdpa_attention_forward(*args, **named)[0] / 2, None

    usual = logits(both()[1])
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", halved)
    plain, model = both()
    assert distance(logits(model), logits(plain)) < 0.03
    assert distance(logits(model), usual) > 0.1


@torch.no_grad()
def test_whoever_follows_torchs_operations_gets_them_or_a_refusal() -> None:
    plain, model = both()
    with pytest.raises(RuntimeError, match="restore_target"):
        torch.jit.trace(Traced(model), (IDS,), check_trace=False)
    mlp, other = model.model.layers[0].mlp, plain.model.layers[0].mlp
    hidden = torch.randn(1, 3, 128).bfloat16()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        found, expected = (forward_ad.unpack_dual(each(dual)).tangent.float() for each in (mlp, other))
    assert distance(found, expected) < 0.03


@torch.no_grad()
def test_a_shallow_copy_of_a_layer_that_is_gone_says_what_to_do() -> None:
    model = both()[1]
    model.model.layers[1] = copy.copy(model.model.layers[1])
    with pytest.raises(RuntimeError, match=r"copy\.deepcopy"):
        model(IDS)
