"""Long prompts through an accelerator, simulated: the same answers, every byte once, and nothing left behind."""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import two_devices
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from two_devices import DEVICE, Accelerator, Remote, Stream

from hf_dovetail import DovetailAssistantModel, prefill, prepare_target, restore_target
from hf_dovetail.anatomy import decoder_layers
from hf_dovetail.cache import GrowingCache, held_states, num_cache_layers
from hf_dovetail.curves import MAX_ROWS
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.engines import ENGINES, layers, native, onednn
from hf_dovetail.engines.decoder_layer import DecoderLayer
from hf_dovetail.prefill import calls, measure, passes, upload
from hf_dovetail.prefill.switch import streaming_of
from hf_dovetail.target import FeatureTap

LEAST = 40
LONG = tiny.prompt(60)
REMOTE = Remote(torch.ones(48, 32))
needs_onednn = pytest.mark.skipif(onednn.why_not(tiny.build("llama")) is not None, reason="no oneDNN in this torch")


@pytest.fixture
def accelerator(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """The simulated device, on which passes of `LEAST` rows are streamed; it is there inside `crossed` only."""
    monkeypatch.setattr(prefill, "measured_threshold", lambda *_: (LEAST, None))
    return accelerator


def streamed(model: PreTrainedModel, engine: str = "auto") -> PreTrainedModel:
    """The model, prepared and with its prompts streamed; MoE layers on kernels that the simulation has."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    prepare_target(model, engine)
    assert streaming_of(model.get_decoder()) is not None
    return model


def crossed(accelerator: Accelerator, run: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes to the device and from it while `run` runs, and its result."""
    before = accelerator.bytes_in, accelerator.bytes_out
    with accelerator:
        result = run()
    return accelerator.bytes_in - before[0], accelerator.bytes_out - before[1], result


def layer_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in decoder_layers(model.get_decoder()).parameters())


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None, **named: Any) -> tuple[Tensor, Any]:
    """All logits of one pass, and its cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    output = model(ids, past_key_values=cache, use_cache=True, **named)
    return output.logits, output.past_key_values


EAGER = ("llama", "mistral", "gpt2")


@pytest.mark.parametrize(
    ("family", "attention"), [*((name, None) for name in tiny.FAMILIES), *((n, "eager") for n in EAGER)]
)
def test_a_streamed_prompt_gives_the_answer_and_the_cache_of_the_cpu(
    family: str, attention: str | None, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of rows and in several, on prepare_target's own engine, in float32 token for token."""
    model = tiny.build(family, attention=attention)
    if hasattr(model.config, "num_experts_per_tok"):  # routing tokens to experts looks at them
        monkeypatch.setattr(two_devices, "_STOPS_THE_HOST", set())
    plain = tiny.run(model, LONG, max_new_tokens=4)
    streamed(model)
    for block in (1024, 16):
        monkeypatch.setattr(calls, "BLOCK_ROWS", block)
        to_device, back, ours = crossed(accelerator, lambda: tiny.run(model, LONG, max_new_tokens=4))
        tiny.assert_same(plain, ours)
        tiny.assert_same_cache(plain.past_key_values, ours.past_key_values)
        assert to_device > layer_bytes(model)
        assert back > 0
    assert not streaming_of(model.get_decoder()).failed
    assert not any(isinstance(states, Remote) for states in tiny.cache_states(ours.past_key_values))


@needs_onednn
@pytest.mark.parametrize("engine", ["auto", "onednn"])
def test_each_weight_crosses_once_and_states_come_back_once(
    engine: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides: the hidden states once each way, and what all layers share (RoPE, positions) once per prompt."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # oneDNN's blocks of 64 are full
    model = streamed(tiny.build("llama", **sizes), engine)
    monkeypatch.setattr(calls, "BLOCK_ROWS", 16)
    for _ in range(2):
        to_device, back, _ = crossed(accelerator, lambda: logits(model, LONG))
        rows, text = LONG.shape[1], model.config
        hidden = rows * text.hidden_size * 4
        rope, positions = 2 * rows * text.head_dim * 4, rows * 8
        assert to_device == layer_bytes(model) + hidden + rope + positions
        assert back == hidden + 2 * text.num_hidden_layers * rows * text.num_key_value_heads * text.head_dim * 4


def test_real_prompts_and_dovetail_on_a_streamed_target(accelerator: Accelerator) -> None:
    """Plain generate on the CPU, on the streamed target, and Dovetail on it, write the same tokens."""
    target, draft, tokenizer = load_pair()
    draft.draft_device = "cpu"
    for prompt in demo_prompts()[:1]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids.shape[1] >= LEAST
        restore_target(target)
        expected = target.generate(ids, max_new_tokens=16, do_sample=False)
        streamed(target)
        to_device, _, plain = crossed(
            accelerator, lambda ids=ids: target.generate(ids, max_new_tokens=16, do_sample=False)
        )
        to_device_too, _, ours = crossed(
            accelerator,
            lambda ids=ids: target.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=draft),
        )
        assert plain.tolist() == expected.tolist() == ours.tolist()
        assert to_device == to_device_too > layer_bytes(target)  # of the whole answer: the prompt, and nothing else
        assert draft.last_stats.accepted > 0


@pytest.mark.parametrize("fusion", ["dgf", "eagle3"])
def test_features_of_a_streamed_prompt_reach_the_draft(fusion: str, accelerator: Accelerator) -> None:
    """Also the inputs of layers, which are on the device then; the draft is on either side."""
    model = tiny.build("llama", num_hidden_layers=6)
    torch.manual_seed(2)
    draft = DovetailAssistantModel.from_target(model, fusion=fusion)
    plain = tiny.run(model, LONG, max_new_tokens=12)
    streamed(model)
    for device in ("cpu", str(DEVICE)):
        draft.draft_device = device
        tiny.assert_same(plain, crossed(accelerator, lambda: tiny.run(model, LONG, draft, max_new_tokens=12))[2])
        assert draft.last_stats.drafted > 0


def test_only_long_evaluating_passes_that_fill_a_cache_are_streamed(accelerator: Accelerator) -> None:
    model = streamed(tiny.build("llama"))
    draft = tiny.draft_for(model, "noisy")
    unstreamed: dict[str, Callable[[], Any]] = {
        "a short prompt": lambda: logits(model, LONG[:, : LEAST - 1]),
        "a verification's rows": lambda: logits(model, LONG[:, :MAX_ROWS].repeat(4, 1)),
        "rounds of a short prompt": lambda: tiny.run(model, LONG[:, :20], draft),
        "gradients": lambda: model(LONG, use_cache=True),
        "no cache": lambda: torch.no_grad()(model)(LONG, use_cache=False),
        "hidden states": lambda: logits(model, LONG, output_hidden_states=True),
        "training": lambda: logits(model.train(), LONG),
    }
    for name, run in unstreamed.items():
        assert crossed(accelerator, run)[:2] == (0, 0), name
    model.eval()
    for name, run in {
        "a prompt": lambda: logits(model, LONG[:, :LEAST]),
        "a batch": lambda: logits(model, LONG[:, : MAX_ROWS + 1].repeat(2, 1)),
    }.items():
        assert crossed(accelerator, run)[0] > layer_bytes(model), name
    model = tiny.build("llama")
    assert prefill.install(model, "eager") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert crossed(accelerator, lambda: logits(model, LONG))[0] == 0
    assert crossed(accelerator, lambda: logits(model, LONG))[0] > layer_bytes(model)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_conversation_goes_on_behind_a_streamed_prompt(
    family: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier states come along, whole or the window's, in DynamicCache and GrowingCache, and with padding."""
    monkeypatch.setattr(calls, "BLOCK_ROWS", 16)
    model = tiny.build(family)
    first, second = tiny.prompt(50), tiny.prompt(45, seed=7)
    mask = torch.ones(1, 95, dtype=torch.long)
    mask[:, :9] = 0

    def talk(cache: Any) -> tuple[Tensor, Any]:
        begin, _ = logits(model, first, cache, attention_mask=mask[:, :50])
        rest, _ = logits(model, second, cache, attention_mask=mask)
        return torch.cat((begin[:, 9:], rest), dim=1), cache

    def caches() -> tuple:
        return DynamicCache(config=model.config), DynamicCache(), GrowingCache(num_cache_layers(model.config))

    on_cpu = [talk(cache) for cache in caches()]
    streamed(model)
    for (expected, kept), cache in zip(on_cpu, caches(), strict=True):
        to_device, _, (found, _) = crossed(accelerator, lambda cache=cache: talk(cache))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        tiny.assert_same_cache(kept, cache)
        assert to_device > 2 * layer_bytes(model)
    assert not streaming_of(model.get_decoder()).failed


def test_of_a_layer_that_records_its_past_only_what_masks_count_comes_along() -> None:
    """A sliding layer then holds more than its window."""
    cache = DynamicCache(config=tiny.build("mistral").config)
    cache.activate_past_recording()
    states = torch.arange(50.0).view(1, 1, 50, 1)
    cache.update(states, -states, 0)
    assert cache.layers[0].keys.shape[-2] == 50
    keys, values = held_states(cache, 0, 10)
    assert keys.flatten().tolist() == list(range(50 - tiny.WINDOW + 1, 50))
    assert torch.equal(values, -keys)
    assert held_states(cache, 1, 10) is None
    assert held_states(DynamicCache(), 0, 10) is None


def failing(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the copy number `at` find no memory."""
    counted, count = [0], accelerator.count

    def fail(way: str, data: Tensor) -> None:
        counted[0] += 1
        if counted[0] == at:
            raise torch.OutOfMemoryError("XPU out of memory")
        count(way, data)

    monkeypatch.setattr(accelerator, "count", fail)


def test_a_device_without_memory_leaves_the_prompt_to_the_cpu(
    accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    """At whichever copy it happens: bit for bit the CPU's logits and cache, one warning, and no second try."""
    model, earlier = tiny.build("llama", num_hidden_layers=2), tiny.prompt(5, seed=9)

    def talk() -> tuple[Tensor, Any]:
        return logits(model, LONG, logits(model, earlier)[1])

    prepare_target(model, "onednn")
    state = streaming_of(model.get_decoder())
    state.failed = True
    expected, kept = talk()
    at, failures = 0, 0
    while at == failures:
        at, state.failed = at + 1, False
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:
            failing(accelerator, patch, at)
            _, _, (found, cache) = crossed(accelerator, talk)
        failures += state.failed
        if state.failed:
            assert torch.equal(found, expected), at
            for one, other in zip(tiny.cache_states(kept), tiny.cache_states(cache), strict=True):
                assert torch.equal(one, other)
            assert [r.levelname for r in caplog.records if "OutOfMemoryError" in r.message] == ["WARNING"]
            assert crossed(accelerator, talk)[:2] == (0, 0)
            assert [r.levelname for r in caplog.records].count("WARNING") == 1
            assert not state.busy._is_owned()
    assert failures > 20
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
    state.failed = True
    prepare_target(model, "onednn")
    assert crossed(accelerator, talk)[0] > layer_bytes(model)


def test_features_are_those_of_the_pass_that_was_finished(accelerator: Accelerator) -> None:
    """The tap's hooks fire on the layers of a streamed pass, and again when it breaks and the CPU begins anew."""
    model = tiny.build("llama", num_hidden_layers=4)
    tap = FeatureTap(model, True, (3, 1, -1))
    prepare_target(model)
    prefill.remove(model)

    def features() -> Tensor:
        return tap(lambda: model(LONG, past_key_values=DynamicCache(config=model.config), use_cache=True))[1]

    with torch.no_grad():
        expected = features()
        streamed(model, "onednn")
        to_device, _, found = crossed(accelerator, features)
        assert to_device > layer_bytes(model)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        with pytest.MonkeyPatch.context() as patch:
            failing(accelerator, patch, 40)  # one of the last layer's weights
            assert torch.equal(crossed(accelerator, features)[2], expected)
    assert streaming_of(model.get_decoder()).failed


def test_an_error_of_somebody_elses_is_raised_and_the_stream_goes_on(accelerator: Accelerator) -> None:
    model = streamed(tiny.build("llama"))
    hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: 1 / 0)
    with accelerator, pytest.raises(ZeroDivisionError):
        logits(model, LONG)
    hook.remove()
    assert not streaming_of(model.get_decoder()).failed
    assert crossed(accelerator, lambda: logits(model, LONG))[0] > layer_bytes(model)


def test_hooks_of_others_see_every_layer_and_change_it(accelerator: Accelerator) -> None:
    """On layers and within them, as often as on the CPU."""
    model, seen = tiny.build("llama"), []
    decoder = model.get_decoder()
    decoder.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append("mlp") or output * 0.5)
    decoder.layers[2].register_forward_pre_hook(lambda module, args: seen.append("layer") or (args[0] * 2.0,))
    expected, _ = logits(model, LONG)
    streamed(model)
    found, _ = crossed(accelerator, lambda: logits(model, LONG))[2]
    assert seen == ["mlp", "layer"] * 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def test_restore_leaves_nothing_and_copies_are_ordinary(accelerator: Accelerator) -> None:
    model = tiny.build("llama")
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    streamed(model)
    twin = copy.deepcopy(model)
    to_device, _, (found, _) = crossed(accelerator, lambda: logits(twin, LONG))
    assert to_device == 0
    restore_target(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert "forward" not in vars(module)
    assert crossed(accelerator, lambda: logits(model, LONG))[0] == 0
    torch.testing.assert_close(logits(model, LONG)[0], found, rtol=1e-4, atol=2e-4)
    assert crossed(accelerator, lambda: logits(streamed(model), LONG))[0] > layer_bytes(model)
    prepare_target(model, "eager")
    assert streaming_of(model.get_decoder()) is None


def test_threads_share_a_streamed_target(accelerator: Accelerator) -> None:
    """Two long prompts and two short ones at once; the simulation's mode belongs to its thread, so each enters one."""
    model = tiny.build("llama")
    prompts = [tiny.prompt(length, seed=length) for length in (60, 20, 50, 12)]
    expected = [tiny.run(model, ids, max_new_tokens=12).sequences.tolist() for ids in prompts]
    streamed(model)
    gate = threading.Barrier(len(prompts))

    def answer(ids: Tensor) -> tuple[list, int]:
        torch.set_num_threads(1)
        with Accelerator() as own:
            gate.wait()
            return tiny.run(model, ids, max_new_tokens=12).sequences.tolist(), own.bytes_in

    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(answer, prompts))
    assert [tokens for tokens, _ in found] == expected
    assert [count > 0 for _, count in found] == [True, False, True, False]


@pytest.mark.parametrize("engine", ["auto", pytest.param("onednn", marks=needs_onednn)])
def test_copies_beside_the_computation_are_waited_for(
    engine: str, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On streams that run as late as they may; weights cross in many pieces of two small buffers."""
    accelerator.install_streams(monkeypatch)
    monkeypatch.setattr(upload, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(Stream, "waited", [])
    model = tiny.build("llama")
    expected, kept = logits(model, LONG)
    streamed(model, engine)
    for _ in range(2):
        to_device, _, (found, cache) = crossed(accelerator, lambda: logits(model, LONG))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)
        tiny.assert_same_cache(kept, cache)
        assert to_device > layer_bytes(model)
    assert not streaming_of(model.get_decoder()).failed


def test_weights_are_not_sent_over_those_that_are_still_read(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second set waits for the end of what the device did with the first, not only for the first copy."""
    accelerator.install_streams(monkeypatch)
    computing, waits = torch.accelerator.current_stream(DEVICE), []
    with accelerator:
        link = upload.Upload(DEVICE, 256)
        monkeypatch.setattr(Stream, "waited", waits)
        for value in (1.0, 2.0):
            link.send([torch.full((8,), value)])
            (there,) = link.receive()
            assert there.cpu().tolist() == [value] * 8
            link.emptied()
    lane = waits[0][1]
    assert waits == [(computing, lane), (lane, computing), (computing, lane)]


@pytest.mark.parametrize("engine", ["eager", pytest.param("onednn", marks=needs_onednn)])
def test_a_layer_keeps_its_weights_while_the_next_ones_arrive(engine: str, accelerator: Accelerator) -> None:
    """The device may still compute with them: they are no views of the buffer that is written next."""
    model = tiny.build("llama")
    weights = [{name: weight.clone() for name, weight in layer.state_dict().items()} for layer in model.model.layers]
    prepare_target(model, engine)
    first, second = list(model.model.layers)[:2]
    with accelerator:
        link = upload.Upload(DEVICE, upload.buffer_bytes(passes.sources(first)))
        link.send(passes.sources(first))
        there = passes.arrived(first, link)
        link.send(passes.sources(second))
        link.receive()
        for name, weight in weights[0].items():
            found = there.get_submodule(name.rpartition(".")[0])._parameters["weight"]
            assert isinstance(found, Remote)
            assert torch.equal(found.cpu(), weight)
    assert not torch.equal(weights[0]["mlp.up_proj.weight"], weights[1]["mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model: setattr(model.config, "quantization_config", {}), "quantised"),
        (lambda model: setattr(model.config, "model_type", "another"), "another"),
        (lambda model: model.train(), "training"),
        (lambda model: setattr(model.get_decoder(), "forward", print), "decoder's forward"),
        (lambda model: setattr(model.get_decoder().layers[1].mlp, "forward", print), "mlp"),
        (lambda model: setattr(model.get_decoder().layers[1].mlp, "scale", torch.ones(1)), "outside its parameters"),
        (lambda model: setattr(model.get_decoder().layers[1].mlp.up_proj, "weight", nn.Parameter(REMOTE)), "xpu:0"),
        (lambda model: setattr(model.get_decoder(), "layers", nn.ModuleList()), "no list"),
    ],
)
def test_targets_that_cannot_be_streamed_say_why(
    break_it: Callable[[PreTrainedModel], Any],
    message: str,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.build("llama")
    assert prefill.why_not(model) is None
    break_it(model)
    assert message in prefill.install(model, "eager")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert prefill.why_not(model) == "there is no accelerator"


@needs_onednn
def test_an_engine_says_itself_why_its_prompts_are_not_streamed(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards the promise that another engine is a module and a line in `ENGINES`: nothing else knows their names."""
    refusals = {name: entry.why_not_streamed for name, entry in ENGINES.items()}
    assert {name for name, refusal in refusals.items() if refusal is None} == {"onednn"}
    monkeypatch.setitem(ENGINES, "another", replace(ENGINES["onednn"], why_not_streamed="computes in reverse"))
    with caplog.at_level(logging.INFO, "hf_dovetail"):
        model = prepare_target(tiny.build("llama"), "another")
        prepare_target(model, "another")  # which is another way: it is prepared already
    assert streaming_of(model.get_decoder()) is None
    assert caplog.messages.count("prompts stay on the CPU: the engine another computes in reverse") == 2
    monkeypatch.setitem(ENGINES, "another", ENGINES["onednn"])
    streamed(model, "another")
    assert crossed(accelerator, lambda: logits(model, LONG))[0] > layer_bytes(model)


def test_a_target_that_left_the_cpu_after_it_was_prepared_is_not_streamed(accelerator: Accelerator) -> None:
    model = streamed(tiny.build("llama"))
    prefill.remove(model)
    restore_target(model)
    prefill.install(model, "eager")
    model.get_decoder().layers[1].mlp.forward = model.get_decoder().layers[1].mlp.forward
    assert crossed(accelerator, lambda: logits(model, LONG))[:2] == (0, 0)


def test_the_threshold_is_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever this machine's clocks say at first; then the file decides, in this process and in the next."""
    simulated = Accelerator()
    simulated.install(monkeypatch)
    model, caplog_level = tiny.build("llama"), caplog.at_level(logging.INFO, "hf_dovetail")
    with simulated, caplog_level:
        prepare_target(model)
        (path,) = (own_cache / "prefill").iterdir()
        kept = json.loads(path.read_text())
        assert kept["times"]["upload_ms"] > 0
        monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured again"))
        prepare_target(restore_target(model))
        kept["times"] |= {"upload_ms": 10.0, "device": [[64, 1.0], [1024, 2.0]], "host": [[64, 10.0], [256, 40.0]]}
        path.write_text(json.dumps(kept))
        measure._measured.clear()  # as in another process
        prepare_target(restore_target(model))
        assert streaming_of(model.get_decoder()).least_rows == 79
        assert path.read_text() == json.dumps(kept)
        path.write_text("{}")
        prepare_target(restore_target(model))
        assert streaming_of(model.get_decoder()).least_rows == 79
        for layer in decoder_layers(model.get_decoder()):
            assert set(vars(layer)) - set(vars(decoder_layers(tiny.build("llama").get_decoder())[0])) == {"forward"}


def test_a_device_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    simulated = Accelerator()
    simulated.install(monkeypatch)
    arrived = passes.arrived

    def damaged(layer: nn.Module, link: Any) -> nn.Module:
        twin = arrived(layer, link)
        twin.mlp._modules["down_proj"]._parameters["weight"] *= 1.5
        return twin

    monkeypatch.setattr(measure, "arrived", damaged)
    model = tiny.build("llama")
    with simulated:
        assert "differs" in prefill.install(model, "eager")
    assert streaming_of(model.get_decoder()) is None
    assert not (own_cache / "prefill").exists()


@needs_onednn
@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@torch.no_grad()
def test_layers_out_of_kernels_stay_so_for_few_rows(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the order in which two stand-ins for a layer's forward come and go."""
    lean: list[Any] = []
    own = DecoderLayer.compute
    monkeypatch.setattr(DecoderLayer, "compute", lambda kernels, *args: lean.append(kernels) or own(kernels, *args))
    model = tiny.build("llama")
    expected = logits(model, tiny.prompt(5))[0]
    streamed(model, "onednn")
    for one in (model, copy.deepcopy(model)):
        for layer in one.model.layers:
            before = layer.forward.args[1]
            assert before.func is layers._forward
            assert before.args[0].layer is layer
    torch.testing.assert_close(logits(model, tiny.prompt(5))[0], expected, rtol=1e-4, atol=1e-4)
    assert len(lean) == 3
    into, _, _ = crossed(accelerator, lambda: logits(model, LONG))
    assert into > 0
    assert len(lean) == 3
    prefill.remove(model)
    assert all(layer.forward.func is layers._forward for layer in model.model.layers)
    restore_target(model)
    assert not any("forward" in vars(module) for module in model.modules())
