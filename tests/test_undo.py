"""The way back from an engine: after interrupts, failures, refusals and copies, and what cannot come back says so."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_dovetail import grouped, prepare_target, restore_target
from hf_dovetail.demo import load_pair, pair_path
from hf_dovetail.engines import activations, engine_of, exact, int8, layers, norms, onednn, quantised, swap
from hf_dovetail.packed import PackedWeight

reason = int8.why_not(tiny.build("llama"))
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))
UP = "model.layers.0.mlp.up_proj.weight"


def packed(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, PackedWeight)}


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], list[int]]:
    """Values, parameters and hooks."""
    named = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    hooks = [
        len(module._state_dict_hooks) + len(module._load_state_dict_pre_hooks) + len(module._forward_pre_hooks)
        for module in model.modules()
    ]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, named, hooks


def assert_as_before(model: PreTrainedModel, before: tuple[dict[str, Tensor], dict[str, int], list[int]]) -> None:
    states, named, hooks = snapshot(model)
    assert engine_of(model) == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert (named, hooks) == before[1:]
    assert states.keys() == before[0].keys()
    assert all(torch.equal(states[name], before[0][name]) for name in states)
    assert not any({"forward", "_apply"} & set(vars(module)) for module in model.modules())


def failing(function: Callable, turn: int, error: BaseException) -> Callable:
    """The function, whose call of that number does its work and fails then."""
    calls = []

    def wrapped(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        calls.append(args)
        if len(calls) == turn:
            raise error
        return result

    return wrapped


STEPS = [
    (onednn, "pack", 5),
    (swap, "_forget_pages", 2),
    (swap, "_return_memory", 1),
    (exact, "switch_on", 1),
    (activations, "switch_on", 1),
    (norms, "switch_on", 1),
    (layers, "switch_on", 1),
]


@pytest.mark.parametrize(("place", "name", "turn"), STEPS)
def test_an_interrupt_leaves_the_model_as_it_was(
    place: Any, name: str, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build("llama", tie_word_embeddings=True)
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing(getattr(place, name), turn, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            prepare_target(model, "onednn")
    assert_as_before(model, before)
    assert engine_of(prepare_target(model, "onednn")) == "onednn"
    assert packed(model)
    assert model.config._attn_implementation == grouped.NAME
    assert_as_before(restore_target(model), before)


@pytest.mark.parametrize("name", ["_return_memory", "_forget_pages"])
def test_an_interrupt_while_quantising_reads_the_weights_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair_path("target"))
    before = snapshot(model)
    monkeypatch.setattr(swap, name, failing(getattr(swap, name), 1, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare_target(model, "int8")
    assert_as_before(model, before)


def test_a_failure_while_quantising_what_is_in_memory_only(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first weight is gone, nothing is lost; afterwards the model says what it is, and works."""
    model = tiny.build("llama")
    before, kernel = snapshot(model), quantised.QuantisedKernel
    monkeypatch.setattr(quantised, "QuantisedKernel", failing(kernel, 1, MemoryError("the first")))
    with pytest.raises(MemoryError, match="the first"):
        prepare_target(model, "int8")
    assert_as_before(model, before)
    monkeypatch.setattr(quantised, "QuantisedKernel", failing(kernel, 4, MemoryError("the fourth")))
    with pytest.raises(RuntimeError, match="cannot be given back: the model was built in memory") as raised:
        prepare_target(model, "int8")
    assert isinstance(raised.value.__context__, MemoryError)
    assert engine_of(model) == "int8"
    assert len(packed(model)) == 3
    assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize("engine", ["onednn", "int8"])
def test_restore_goes_on_where_it_failed(engine: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a weight that was taken off the list before it was back."""
    model = AutoModelForCausalLM.from_pretrained(pair_path("target"))
    before = snapshot(model)
    names = packed(prepare_target(model, engine))
    for turn in (5, 1):
        with monkeypatch.context() as patch:
            original = failing(swap.Swap._original, turn, MemoryError("no memory"))
            patch.setattr(swap.Swap, "_original", original)
            patch.setattr(
                quantised.QuantisedSwap, "_original", failing(quantised.QuantisedSwap._original, turn, MemoryError())
            )
            with pytest.raises(MemoryError):
                restore_target(model)
        assert engine_of(model) == engine
        assert packed(model) < names
        assert len(packed(model)) == len(names) - 4
        assert model(ids).logits.isfinite().all()
    assert_as_before(restore_target(model), before)


def test_pruned_weights_come_back_under_their_new_name() -> None:
    """Guards the weight of a module that has no `weight` any more, which a refused `prune.remove` leaves behind."""
    model = tiny.build("llama")
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    module, original = model.model.layers[0].mlp.up_proj, model.get_parameter(UP)
    prepare_target(model, "onednn")
    prune.l1_unstructured(module, "weight", amount=0.5)
    assert isinstance(module.weight_orig, PackedWeight)
    with pytest.raises(RuntimeError, match="restore_target"):
        prune.remove(module, "weight")
    assert not hasattr(module, "weight")
    restore_target(model)
    assert not packed(model)
    assert module.weight_orig is original
    assert torch.equal(original, values[UP])
    prune.remove(module, "weight")
    assert module.weight is original
    assert torch.equal(original, values[UP] * (original != 0))
    assert int((original == 0).sum()) == original.numel() // 2
    del values[UP]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in values.items())


def test_a_refused_state_changes_nothing(ids: Tensor) -> None:
    """Guards norms and biases that were overwritten before the first packed weight refused."""
    model = tiny.build("qwen2")
    other = tiny.build("qwen2", seed=1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.5)
    before, state = snapshot(model), other.state_dict()
    prepare_target(model, "onednn")
    plain = {name: tensor.clone() for name, tensor in model.named_parameters() if not isinstance(tensor, PackedWeight)}
    inner = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    layer = model.model.layers[0].self_attn.q_proj
    for module, values in (
        (model, state),
        (model.model, inner),
        (layer, other.model.layers[0].self_attn.q_proj.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=r"load_state_dict, given .*weight, would change .*restore_target"):
            module.load_state_dict(values, strict=False)
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in plain.items())
    assert_as_before(restore_target(model), before)
    norms_only = {name: tensor for name, tensor in state.items() if "norm" in name}
    prepare_target(model, "onednn").load_state_dict(norms_only, strict=False)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in norms_only.items())
    restore_target(model).load_state_dict(state)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_state_that_is_assigned_replaces_packed_weights(ids: Tensor) -> None:
    model, other = tiny.build("llama"), tiny.build("llama", seed=1)
    prepare_target(model, "onednn").load_state_dict(other.state_dict(), assign=True)
    assert not packed(model)
    assert torch.allclose(model(ids).logits, other(ids).logits, atol=1e-4)
    assert torch.equal(restore_target(model)(ids).logits, other(ids).logits)


def test_a_refused_engine_leaves_the_earlier_one(ids: Tensor) -> None:
    model = prepare_target(tiny.build("gpt2"), "onednn")
    logits, weight = model(ids).logits, model.lm_head.weight
    for engine, message in (("int8", r"no nn\.Linear layers"), ("warp", "expected auto, eager")):
        with pytest.raises(ValueError, match=message):
            prepare_target(model, engine)
        assert engine_of(model) == "onednn"
        assert model.lm_head.weight is weight
        assert torch.equal(model(ids).logits, logits)
    prepare_target(model, "eager")
    assert not packed(model)


def test_copies_get_their_own_attention_and_layers_back(ids: Tensor) -> None:
    model = tiny.build("llama")
    logits = model(ids).logits
    prepare_target(model, "onednn")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.config._attn_implementation == grouped.NAME
        again = copy.deepcopy(other)
        assert packed(prepare_target(other, "onednn"))
        for each in (other, again):
            restore_target(each)
            assert each.config._attn_implementation == "sdpa"
            assert not any({"forward", "_apply"} & set(vars(module)) for module in each.modules())
            assert torch.equal(each(ids).logits, logits)
    assert engine_of(model) == "onednn"
    assert model.config._attn_implementation == grouped.NAME


WRITES = {
    "an index": lambda weight: weight.__setitem__(0, 0.0),
    "a mask": lambda weight: weight.__setitem__(torch.ones(48, 32, dtype=torch.bool), 0.0),
    "its data's index": lambda weight: weight.data.__setitem__(0, 0.0),
    "a list": lambda weight: torch._foreach_mul_([torch.ones(2), weight], 2),
    "a list's sources": lambda weight: torch._foreach_add_([weight], [torch.ones(48, 32)]),
    "out": lambda weight: torch.mul(torch.ones(48, 32), 2.0, out=weight),
    "a matrix product's out": lambda weight: torch.mm(torch.ones(48, 4), torch.ones(4, 32), out=weight),
    "in place": lambda weight: weight.mul_(2),
}


@pytest.mark.parametrize("way", WRITES)
@torch.no_grad()
def test_writing_into_a_packed_weight_is_refused(way: str, ids: Tensor) -> None:
    """Guards writes that went into an unpacked copy, and were lost without a word."""
    model = prepare_target(tiny.build("llama"), "onednn")
    logits, weight = model(ids).logits, model.get_parameter(UP)
    with pytest.raises(RuntimeError, match=r"would change a weight that is packed .*restore_target"):
        WRITES[way](weight)
    assert torch.equal(model(ids).logits, logits)
    WRITES[way](restore_target(model).get_parameter(UP))
    assert not torch.equal(model(ids).logits, logits)


@torch.no_grad()
def test_reading_a_packed_weight_is_not_writing() -> None:
    model = tiny.build("llama")
    own = model.get_parameter(UP).clone()
    weight, others = prepare_target(model, "onednn").get_parameter(UP), [torch.zeros(48, 32) for _ in range(4)]
    others[0][:] = weight
    others[1].copy_(weight)
    torch._foreach_add_([others[2]], [weight])
    torch.mul(weight, 1.0, out=others[3])
    assert all(torch.equal(other, own) for other in others)


def _from_disk(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(pair_path("target"))


def _sharded(folder: Path) -> PreTrainedModel:
    load_pair()[0].save_pretrained(folder, max_shard_size="4MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _without_safetensors(folder: Path) -> PreTrainedModel:
    model = load_pair()[0]
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return AutoModelForCausalLM.from_pretrained(folder)


def _in_memory(folder: Path) -> PreTrainedModel:
    return tiny.build("llama")


def _file_gone(folder: Path) -> PreTrainedModel:
    load_pair()[0].save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return model


def _folder_gone(folder: Path) -> PreTrainedModel:
    model = _file_gone(folder / "gone")
    for file in (folder / "gone").iterdir():
        file.unlink()
    (folder / "gone").rmdir()
    return model


def _tuned(folder: Path) -> PreTrainedModel:
    model = _from_disk(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_in_memory, "the model was built in memory"),
        (_file_gone, "holds no weights"),
        (_folder_gone, "gone' cannot be read"),
        (_tuned, "layers.2.mlp.up_proj.weight is not the weight in its checkpoint"),
        (_from_disk, None),
        (_sharded, None),
        (_without_safetensors, None),
    ],
)
def test_what_could_not_come_back_is_said_once_before_it_is_gone(
    make: Callable[[Path], PreTrainedModel], message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(tmp_path)
    with caplog.at_level("WARNING", logger="hf_dovetail"):
        prepare_target(model, "onednn")
        restore_target(model)
        assert not caplog.messages
        prepare_target(model, "int8")
    assert engine_of(model) == "int8"
    if message is None:
        assert not caplog.messages
        assert engine_of(restore_target(model)) == "eager"
        return
    assert len(caplog.messages) == 1
    assert message in caplog.text
    assert "save the model and load it from there before it is prepared" in caplog.text
    with pytest.raises(RuntimeError, match="cannot be given back"):
        restore_target(model)


def test_a_relative_path_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_pair()[0].save_pretrained(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("model")
    before = snapshot(model)
    with caplog.at_level("WARNING", logger="hf_dovetail"):
        prepare_target(model, "int8")
        os.chdir("elsewhere")
        restore_target(model)
    assert_as_before(model, before)
    assert not caplog.messages
