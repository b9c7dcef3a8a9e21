"""Lean layers: the bits of transformers' own, and their own forward wherever somebody could see a difference."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama
from transformers.models.nemotron import modeling_nemotron
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import output_capturing
from trees import tree_mask

from hf_dovetail import prepare_target, restore_target
from hf_dovetail.cache import GrowingCache
from hf_dovetail.engines import activations, int4, layers, native, norms, onednn, rotary
from hf_dovetail.engines.decoder_layer import DecoderLayer
from hf_dovetail.engines.quantised import QuantisedKernel, stack_of

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
ENGINES = ("onednn", "int8", "int4")
DTYPES = (torch.float32, torch.bfloat16)
CONTEXT = 7
INNER = (
    "self_attn",
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "input_layernorm",
    "post_attention_layernorm",
    "mlp",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.act_fn",
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The attention modules of the layers that were computed lean, call by call."""
    modules: list[nn.Module] = []
    own = DecoderLayer.compute

    def compute(kernels: DecoderLayer, attention: nn.Module, *args: Any) -> Tensor:
        modules.append(attention)
        return own(kernels, attention, *args)

    monkeypatch.setattr(DecoderLayer, "compute", compute)
    return modules


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model with transformers' own layers, on the same weights."""
    layers.switch_off(model)
    try:
        yield
    finally:
        layers.switch_on(model)


def lean_layers(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is that of lean layers."""
    return [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) is layers._forward]


def prepared(
    family: str = "llama", engine: str = "onednn", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> PreTrainedModel:
    """A tiny model on an engine, with norms' weights and biases that matter."""
    model = tiny.build(family, **({"hidden_act": "gelu_pytorch_tanh"} if family == "mistral" else {}), **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
    return prepare_target(model.to(dtype), engine=engine)


def caches(config: Any) -> list[Any]:
    """Empty caches of several kinds, and none."""
    return [
        None,
        DynamicCache(config=config),
        GrowingCache(config.num_hidden_layers, 40),
        StaticCache(config=config, max_cache_len=40),
    ]


@torch.no_grad()
def passes(model: PreTrainedModel) -> list[Tensor]:
    """Hidden states and logits of prompts, single tokens, a tree and a padded batch, on several caches."""
    found: list[Tensor] = []

    def run(ids: Tensor, **options: Any) -> None:
        output = model.model(ids, **options)
        found.extend((output.last_hidden_state, model.lm_head(output.last_hidden_state)))

    for cache in caches(model.config):
        run(tiny.prompt(CONTEXT), past_key_values=cache)
        run(tiny.prompt(1, seed=4), past_key_values=cache)
    cache = GrowingCache(model.config.num_hidden_layers, 40)
    run(tiny.prompt(5), past_key_values=cache)
    tree, _ = tree_mask(5, 0)
    positions = 5 + tree[:, 0, :, 5:].sum(-1) - 1
    run(tiny.prompt(tree.shape[2]), past_key_values=cache, attention_mask=tree, position_ids=positions)
    two, mask = torch.cat((tiny.prompt(16), tiny.prompt(16, seed=5))), torch.ones(2, 17, dtype=torch.long)
    two[1, :5] = mask[1, :5] = 0
    cache, positions = DynamicCache(config=model.config), (mask.cumsum(1) - 1).clamp(min=0)
    run(two, past_key_values=cache, attention_mask=mask[:, :16], position_ids=positions[:, :16])
    run(two[:, :1], past_key_values=cache, attention_mask=mask, position_ids=positions[:, 16:])
    return found


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen2-sliding", "qwen3"])
def test_lean_layers_have_their_own_bits(family: str, dtype: torch.dtype, engine: str, taken: list) -> None:
    check_bits(prepared(family, engine, dtype), taken)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("engine", ENGINES)
def test_wide_layers_have_their_own_bits(family: str, engine: str, taken: list) -> None:
    check_bits(prepared(family, engine, **tiny.WIDE), taken)


def check_bits(model: PreTrainedModel, taken: list) -> None:
    found, lean = passes(model), len(taken)
    assert lean == 12 * model.config.num_hidden_layers
    with own_forward(model):
        expected = passes(model)
        assert len(taken) == lean
    assert_equal(found, expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "phi3", "olmo2", "cohere2", "mixtral", "gpt2"])
def test_layers_that_compute_something_else_are_left_alone(family: str) -> None:
    """Guards the decorator that all layers share in newer versions of transformers: it must not be compared alone."""
    assert lean_layers(prepare_target(tiny.build(family), engine="onednn")) == []


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ernie4_5", "helium"])
def test_another_rotary_embedding_is_seen_in_layers_of_the_same_code(kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**tiny.FAMILIES["qwen2"][1]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert lean_layers(prepare_target(model, engine="onednn")) == []


def test_each_function_of_the_rotary_embedding_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(lean_layers(prepare_target(tiny.build("qwen2"), engine="onednn"))) == 2
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", modeling_nemotron.apply_rotary_pos_emb)
    assert lean_layers(prepare_target(tiny.build("qwen2"), engine="onednn")) == []


def fused_layers(model: PreTrainedModel) -> int:
    """How many layers are two native calls."""
    return sum(layer.forward.args[0].parts().kernels[1].is_fused for layer in model.model.layers)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_layers_are_fused_where_native_kernels_multiply(dtype: torch.dtype, engine: str) -> None:
    """Else the tests of equal bits would compare the kernels, called one by one, with each other."""
    model = prepared("qwen3", engine, dtype, **tiny.WIDE)
    multiplies = engine != "onednn" or (dtype == torch.bfloat16 and native.multiplies_bf16())
    if engine == "int8" and "amx_int8" in native.cpu_flags():
        multiplies = False
    assert fused_layers(model) == (len(model.model.layers) if multiplies else 0)


@torch.no_grad()
@pytest.mark.parametrize("engine", ENGINES)
def test_what_two_calls_do_not_take_has_the_same_bits(engine: str) -> None:
    """More rows than native products are for, and hidden states that do not lie together."""
    model = prepared("llama", engine, **tiny.WIDE)
    layer, wide = model.model.layers[0], torch.randn(1, 5, 256).bfloat16()
    given = [wide[..., ::2], wide[:, :, :128], torch.randn(2, 20, 128).bfloat16()]

    def outputs() -> list[Tensor]:
        found = [model(tiny.prompt(40)).logits]
        for hidden in given:
            embeddings = model.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
            mask = torch.ones(1, 1, hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
            found.append(layer(hidden, attention_mask=mask, position_embeddings=embeddings))
        return found

    found = outputs()
    with own_forward(model):
        assert_equal(found, outputs())


@torch.no_grad()
def logits_while_weights_move(model: PreTrainedModel) -> list[Tensor]:
    """Logits at first, and after each change of a small weight or of a norm's epsilon."""
    blocks, found = model.model.layers, []

    def note() -> None:
        found.append(model(tiny.prompt(5)).logits)

    note()
    small = blocks[0].input_layernorm.weight, blocks[1].self_attn.q_proj.bias, blocks[1].self_attn.v_proj.bias
    for parameter in small:
        parameter.data = 10 * parameter.data
        note()
        parameter.data.mul_(3)  # in place
        note()
    blocks[2].post_attention_layernorm.variance_epsilon = 1e4
    note()
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_move_in_memory_are_followed(engine: str) -> None:
    """Guards the addresses that a fused layer holds: `.data` may be exchanged under the same parameter."""
    model, other = (prepared("qwen2", engine, num_hidden_layers=3, **tiny.WIDE) for _ in range(2))
    fused = fused_layers(model)
    found = logits_while_weights_move(model)
    assert fused_layers(model) == fused
    with own_forward(other):
        assert_equal(found, logits_while_weights_move(other))
    assert all(not torch.equal(one, other) for one, other in pairwise(found))


def test_only_a_whole_stack_in_its_order_is_one_product() -> None:
    matrix, other = int4.Int4Matrix(), int4.Int4Matrix()
    first, second, third = (QuantisedKernel("weight", torch.randn(n, 32), matrix) for n in (8, 16, 24))
    alone = QuantisedKernel("weight", torch.randn(8, 32), other)
    assert stack_of([first, second, third]) is matrix
    assert stack_of([alone]) is other
    for kernels in (
        [first, second],
        [second, first, third],
        [first, second, alone],
        [onednn.pack(torch.eye(8))],
    ):
        assert stack_of(kernels) is None


def test_a_forward_of_the_users_stays() -> None:
    model = tiny.build("llama")
    own = model.model.layers[1].forward = lambda hidden_states, **options: hidden_states
    prepare_target(model, engine="onednn")
    assert lean_layers(model) == [model.model.layers[0], model.model.layers[2]]
    assert model.model.layers[1].forward is own
    restore_target(model)
    assert lean_layers(model) == []
    assert model.model.layers[1].forward is own


def as_kernels_does(function: Callable) -> nn.Module:
    """The module that the `kernels` library makes of a function that it may exchange."""

    class Func(nn.Module):
        def forward(self, *args: Any, **named: Any) -> Any:
            return function(*args, **named)

    Func.__module__ = "kernels.layer.func"
    return Func()


@torch.no_grad()
def test_a_function_that_may_be_exchanged_counts_once_it_is(taken: list, monkeypatch: pytest.MonkeyPatch) -> None:
    module = as_kernels_does(layers._function(modeling_llama.apply_rotary_pos_emb))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", module)
    model, ids = prepared(), tiny.prompt(5)
    first = model(ids).logits
    assert len(taken) == 3
    module.forward = lambda query, key, cosines, sines: (query, key)
    assert not torch.equal(model(ids).logits, first)
    assert len(taken) == 3
    del module.forward
    handle = module.register_forward_pre_hook(lambda *_: None)
    model(ids)
    assert len(taken) == 3
    handle.remove()
    assert torch.equal(model(ids).logits, first)
    assert len(taken) == 6
    other = as_kernels_does(lambda query, key, cosines, sines: (query, key))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    model(ids)
    assert len(taken) == 6


def outputs_seen(model: PreTrainedModel, name: str) -> list[Tensor]:
    """What a hook on a module of the second layer sees of its outputs, and the logits."""
    seen: list[Tensor] = []
    module = model.model.layers[1].get_submodule(name)
    handle = module.register_forward_hook(
        lambda _, inputs, output: seen.append((output[0] if isinstance(output, tuple) else output).clone())
    )
    logits = model(tiny.prompt(5)).logits
    handle.remove()
    return [*seen, logits]


@torch.no_grad()
@pytest.mark.parametrize("engine", ENGINES)
def test_hooks_see_what_they_would_see_and_may_change_it(engine: str, taken: list) -> None:
    model = prepared("llama", engine)
    attentions, ids = [layer.self_attn for layer in model.model.layers], tiny.prompt(5)
    first = model(ids).logits
    assert taken == attentions
    for name in INNER:
        taken.clear()
        found = outputs_seen(model, name)
        assert taken == [attentions[0], attentions[2]], name
        with own_forward(model):
            assert_equal(found, outputs_seen(model, name))
        module = model.model.layers[0].get_submodule(name)
        for register, change in (
            (module.register_forward_hook, lambda _, inputs, output: None if isinstance(output, tuple) else 2 * output),
            (module.register_forward_pre_hook, lambda _, inputs: tuple(2 * each for each in inputs) or None),
        ):
            handle = register(change)
            changed = model(ids).logits
            with own_forward(model):
                assert torch.equal(model(ids).logits, changed)
            handle.remove()
        assert name in ("self_attn", "input_layernorm", "post_attention_layernorm") or not torch.equal(changed, first)
        taken.clear()
        assert torch.equal(model(ids).logits, first)
        assert taken == attentions
    taken.clear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert torch.equal(model(ids).logits, first)
    handle.remove()
    assert not taken


def _linear(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    own = layer.self_attn.q_proj
    layer.self_attn.q_proj = Doubled(own.in_features, own.out_features, bias=False)
    layer.self_attn.q_proj.weight = own.weight


def _kind(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.up_proj.__class__ = type("Negated", (nn.Linear,), {"forward": lambda m, x: -nn.Linear.forward(m, x)})


def _forward(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: 2 * own(x)


def _class_forward(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda module, x: 2 * own(module, x))


def _rotary(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))


def _half(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "rotate_half", lambda x: x)


def _weight(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.down_proj.weight = nn.Parameter(torch.randn(layer.mlp.down_proj.weight.shape).bfloat16())


def _bias(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.self_attn.k_proj.bias = nn.Parameter(torch.randn(layer.self_attn.k_proj.out_features).bfloat16())


def _activation(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.mlp.act_fn = nn.ReLU()


def _norm(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.input_layernorm = nn.Identity()


def _scale(layer: nn.Module, patch: pytest.MonkeyPatch) -> None:
    layer.self_attn.scaling = 2.0


LEAN_AGAIN = {_bias, _scale}  # what the kernels can compute too
EVERY_LAYER = {_class_forward, _rotary, _half}


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [_linear, _kind, _forward, _class_forward, _rotary, _half, _weight, _bias, _activation, _norm, _scale],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("engine", ["onednn", "int8"])
def test_what_is_exchanged_meanwhile_counts(
    change: Callable, engine: str, taken: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = prepared("llama", engine), tiny.prompt(5)
    before = model(ids).logits
    taken.clear()
    change(model.model.layers[1], monkeypatch)
    found, lean = model(ids).logits, [module for module in taken if module is model.model.layers[1].self_attn]
    assert len(lean) == (change in LEAN_AGAIN)
    assert bool(taken) == (change not in EVERY_LAYER)
    layers.switch_off(model)
    assert torch.equal(model(ids).logits, found)
    assert not torch.equal(found, before)


def test_calls_that_are_not_for_the_kernels_take_the_own_forward(taken: list) -> None:
    model, ids = prepared("llama", "onednn", torch.float32), tiny.prompt(5)
    model(ids).logits.sum().backward()
    assert model.model.norm.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model(tiny.prompt(65))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids)
        model.train()
        model(ids)
        model.eval().set_attn_implementation("eager")
        model(ids)
        assert not taken
        model.set_attn_implementation("dovetail_sdpa")
        model.model.layers[0].input_layernorm.to(torch.float64)
        wide = model(ids).logits
        assert not taken
        with own_forward(model):
            assert torch.equal(model(ids).logits, wide)
        model.model.layers[0].input_layernorm.to(torch.float32)
    model.model.layers[0].training = model.model.layers[1].self_attn.training = True
    with torch.inference_mode():
        model(ids)
    assert taken == [model.model.layers[2].self_attn]


@torch.no_grad()
def test_recorded_outputs_and_what_stays_of_the_recording(taken: list) -> None:
    model, ids = prepared(), tiny.prompt(5)
    model(ids)
    lean = len(taken)
    recorded = model(ids, output_hidden_states=True)
    with own_forward(model):
        expected = model(ids, output_hidden_states=True)
    assert_equal(list(recorded.hidden_states), list(expected.hidden_states))
    assert len(recorded.hidden_states) == 4
    assert len({id(states) for states in recorded.hidden_states}) == 4
    taken.clear()
    model(ids)
    assert len(taken) == lean == 3  # transformers' hooks stay on the attention
    output_capturing.install_output_capuring_hook(model.model.layers[1].mlp, "hidden_states", 0)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 5
    model.set_attn_implementation("eager")
    assert [weights.shape for weights in model(ids, output_attentions=True).attentions] == [(1, 4, 5, 5)] * 3


@torch.no_grad()
def test_copies_are_on_their_own_and_nothing_keeps_the_weights(taken: list) -> None:
    model, ids = prepared(), tiny.prompt(5)
    logits = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        taken.clear()
        assert all(layer.forward.args[0].layer is layer for layer in twin.model.layers)
        torch.testing.assert_close(twin(ids).logits, logits, rtol=0.02, atol=0.02)
        assert not taken  # its weights are ordinary ones
        prepare_target(twin, engine="onednn")
        assert torch.equal(twin(ids).logits, logits)
        assert len(taken) == 3
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model.model.layers[0].mlp.down_proj.weight.kernel)
        taken.clear()
        del model
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("engine", ENGINES)
def test_answers_are_the_same_and_the_own_forward_comes_back(engine: str, taken: list, tmp_path: Any) -> None:
    tiny.build("qwen3").bfloat16().save_pretrained(tmp_path)
    model = prepare_target(type(tiny.build("qwen3")).from_pretrained(tmp_path, dtype=torch.bfloat16), engine=engine)
    found = tiny.run(model, tiny.prompt(), max_new_tokens=10)
    assert len(taken) == 2 * 10
    with own_forward(model):
        assert_equal(list(found.logits), list(tiny.run(model, tiny.prompt(), max_new_tokens=10).logits))
    taken.clear()
    restore_target(model)
    assert not any("forward" in vars(module) for module in model.modules())
    tiny.run(model, tiny.prompt(), max_new_tokens=3)
    assert not taken


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 8, 40, 64, 96, 128])
@pytest.mark.parametrize("threads", [1, 3])
def test_rotary_embedding_has_transformers_bits(width: int, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    for batch, rows, positions in ((1, 1, 1), (2, 1, 2), (1, 60, 1), (3, 17, 3), (3, 17, 1)):
        stacked = torch.randn(batch * rows, 12 * width, generator=torch.Generator().manual_seed(width)).to(dtype)
        stacked[0, ::3], stacked[-1, 1::3] = 0.0, -0.0
        query, key = (part.view(batch, rows, -1, width) for part in (stacked[:, : 9 * width], stacked[:, 9 * width :]))
        cosines, sines = (torch.randn(positions, rows, width).to(dtype) for _ in range(2))
        sines[..., 0] = 0.0
        assert rotary.takes(stacked.view(batch, rows, -1), cosines, sines)
        expected = modeling_llama.apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cosines, sines)
        found = rotary.rotate(query, key, cosines, sines)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one.signbit(), other.signbit())
            assert one.stride() == other.stride() or 1 in one.shape
    assert not rotary.takes(stacked.view(batch, rows, -1), cosines.double(), sines.double())
    assert not rotary.takes(stacked.view(batch, rows, -1), cosines[:, :1], sines[:, :1])
    assert not rotary.takes(stacked.view(batch, rows, -1), cosines.transpose(0, 1), sines.transpose(0, 1))


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gated_product_is_rounded_twice(name: str, dtype: torch.dtype) -> None:
    module = nn.Sequential(ACT2FN[name])
    activations.switch_on(module)
    both = 4 * torch.randn(70, 2 * 1003, generator=torch.Generator().manual_seed(1)).to(dtype)
    gate, factor = both[:, :1003], both[:, 1003:]
    expected = module(gate) * factor
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(activations.gated(name, gate, factor), expected)
        assert torch.equal(activations.gated(name, gate[3:4], factor[3:4]), expected[3:4])
    if dtype == torch.bfloat16:
        assert not torch.equal((module(gate.float()) * factor.float()).bfloat16(), expected)
    assert activations.name_of(module[0]) == name
    assert activations.name_of(ACT2FN[name]) is None
    assert not norms.is_on(module[0])
