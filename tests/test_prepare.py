"""A target on two devices, simulated: the same answers, every byte counted, and everything back as it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TextIteratorStreamer, pipeline
from two_devices import DEVICE, Accelerator, Remote, held_bytes

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare, prepare_target, restore_target
from hf_dovetail.anatomy import anatomy_of
from hf_dovetail.demo import load_pair, pair_path
from hf_dovetail.dispatch import Dispatch, dispatch_of
from hf_dovetail.engines import engine_of
from hf_dovetail.learned import describe
from hf_dovetail.packed import PackedWeight
from hf_dovetail.placement import WEIGHTS, Limits, planned

CONTEXT = 64
SHAPE = TreeShape(8, 3, 4)
HEAD_TIMES_MS = prepare.head_times_ms
TIED = {"tie_word_embeddings": True}
VARIANTS = {
    "llama-tied": ("llama", TIED),
    "mistral-eager": ("mistral", {"attention": "eager"}),
    "mixture": ("qwen3-moe", {"experts_implementation": "eager"}),
}


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated device is slower than the CPU, and would be left alone."""
    monkeypatch.setattr(prepare, "head_times_ms", lambda head, rows, device: (2.0, 1.0))


def target_of(name: str) -> PreTrainedModel:
    family, changes = VARIANTS.get(name, (name, {}))
    return tiny.build(family, **changes)


def draft_of(target: PreTrainedModel, kind: str = "untrained") -> DovetailAssistantModel:
    draft = tiny.draft_for(target, kind)
    draft.tree, draft.draft_device = SHAPE, str(DEVICE)
    return draft


def budget_for(target: PreTrainedModel, draft: DovetailAssistantModel | None, layers: int) -> int:
    """The least budget in which so many layers fit."""
    sizes = prepare.target_sizes_of(target, anatomy_of(target))
    draft_sizes = None if draft is None else prepare.draft_sizes_of(draft, target)
    nodes = prepare._nodes(draft)
    return planned(sizes, draft_sizes, Limits(0, CONTEXT, nodes, 0), layers).total * 64 // 63 + 1


def place(target: PreTrainedModel, draft: DovetailAssistantModel | None, layers: int, engine: str = "eager") -> None:
    prepare_target(target, engine, budget_for(target, draft, layers), draft, CONTEXT)
    assert dispatch_of(target).layers == prepare.plan_of(target).layers == layers


def on_device(target: nn.Module) -> set[str]:
    return {name for name, p in target.named_parameters(remove_duplicate=False) if isinstance(p, Remote)}


def snapshot(model: nn.Module) -> tuple[dict, dict, dict]:
    named = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {name: id(b) for name, b in model.named_buffers(remove_duplicate=False)}
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, named, buffers


def assert_restored(model: nn.Module, before: tuple[dict, dict, dict]) -> None:
    states, named, buffers = snapshot(model)
    assert states.keys() == before[0].keys()
    assert all(torch.equal(states[name], before[0][name]) for name in states)
    assert (named, buffers) == before[1:]
    assert not on_device(model)
    assert dispatch_of(model) is prepare.plan_of(model) is None
    for module in model.modules():
        left = {"_hf_hook", "_old_forward", "forward", "_apply", "hf_device_map", "__deepcopy__"} & set(vars(module))
        assert not left, left


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", 0),
        ("llama", 1),
        ("llama-tied", 3),
        ("gpt2", 1),
        ("gemma2", 1),
        ("mistral-eager", 2),
        ("granite", 1),
        ("mixture", 1),
    ],
)
def test_answers_are_the_same_wherever_the_layers_are(
    name: str, layers: int, ids: Tensor, accelerator: Accelerator
) -> None:
    """Plain generate and Dovetail, greedy and sampled, with scores; what the statistics say crossed is what crossed."""
    target = target_of(name)
    accelerator.waits = name == "mixture"  # its routing asks which experts were hit
    draft, before = draft_of(target), snapshot(target)
    runs = [{"do_sample": sample, "max_new_tokens": 12} for sample in (False, True)]
    plain = [tiny.run(target, ids, **options) for options in runs]
    with accelerator:
        place(target, draft, layers)
        assert target.device == torch.device("cpu")
        assert not isinstance(target.get_input_embeddings().weight, Remote)
        for options, expected in zip(runs, plain, strict=True):
            tiny.assert_same(expected, tiny.run(target, ids, **options))
            crossed = accelerator.bytes_in, accelerator.bytes_out
            ours = tiny.run(target, ids, draft, **options)
            tiny.assert_same(expected, ours)
            sliding = [layer for layer in ours.past_key_values.layers if hasattr(layer, "sliding_window")]
            constants = 8 * sum(isinstance(layer.keys, Remote) for layer in sliding)  # of the cache that is handed out
            crossed = accelerator.bytes_in - crossed[0] - constants, accelerator.bytes_out - crossed[1]
            if options["do_sample"]:  # the first call has put a draft's tables there
                assert crossed == (draft.last_stats.bytes_to_draft, draft.last_stats.bytes_to_target)
        count = target.config.num_hidden_layers
        names = {name for name in on_device(target) if ".layers." in name or ".h." in name}
        assert {int(name.split(".")[2]) for name in names} == set(range(count - layers, count))
        restore_target(target)
    assert_restored(target, before)
    for options, expected in zip(runs, plain, strict=True):
        again = tiny.run(target, ids, **options)
        assert torch.equal(again.sequences, expected.sequences)
        assert all(map(torch.equal, again.scores, expected.scores))


def test_weights_are_where_the_plan_says_and_shared_ones_there_once(ids: Tensor, accelerator: Accelerator) -> None:
    """What is held on the device is the plan's weights, to the byte but for a rotary table's; all stays in the plan."""
    for changes in ({}, TIED):
        target = tiny.build("llama", hidden_size=64, head_dim=16, intermediate_size=96, **changes)
        draft, most = draft_of(target), []
        draft.watch = lambda done, most=most: most.append(held_bytes(collect=False))
        with accelerator:
            before = held_bytes()
            place(target, draft, 2)
            plan = prepare.plan_of(target)
            held = held_bytes() - before
            assert 0 <= held - plan.of(*WEIGHTS) <= 2 * 16 // 2 * 4
            head = target.lm_head.weight
            shared = draft._shared
            assert shared.head.data_ptr() == head.data_ptr()
            assert (shared.embedding.data_ptr() == head.data_ptr()) is bool(changes)
            tiny.run(target, ids, draft, max_new_tokens=40)
            caches = plan.of("draft's cache", "their cache")
            assert held + 0.9 * caches < max(most) - before < plan.total
            restore_target(target)
            draft.to("cpu")


def test_sizes_are_read_off_the_model() -> None:
    llama = tiny.build("llama")
    sizes = prepare.target_sizes_of(llama, anatomy_of(llama))
    layer = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)  # two of four heads have keys and values
    assert sizes.layers == (layer,) * 3
    assert sizes.positions == (2 * 2 * 8 * 4,) * 3
    assert (sizes.tail, sizes.head, sizes.embedding, sizes.tied) == (4 * 32, 4 * 101 * 32, 4 * 101 * 32, False)
    assert (sizes.row, sizes.key, sizes.pair) == (4 * 3 * (32 + 48), 2 * 4 * 32, 0)
    assert (sizes.tail_row, sizes.logits_row) == (32 * 16, 101 * 8)
    eager = tiny.build("qwen2", attention="eager", num_key_value_heads=4)
    sizes = prepare.target_sizes_of(eager, anatomy_of(eager))
    assert (sizes.key, sizes.pair) == (0, 4 * (4 + 2 * 4))
    mixture = tiny.build("qwen3-moe")
    sizes = prepare.target_sizes_of(mixture, anatomy_of(mixture))
    experts = 4 * (4 * 3 * 32 * 24 + 4 * 32)  # four experts and their router
    attention = 4 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 8)
    assert sizes.layers == (experts + attention + 4 * 2 * 32,) * 2
    assert sizes.row == 4 * 3 * (32 + 48)  # the two experts of a row: 2 * 24
    assert prepare.target_sizes_of(*tied("gpt2")).tied
    draft = DovetailAssistantModel.from_target(llama, num_hidden_layers=2)
    sizes = prepare.draft_sizes_of(draft, llama)
    assert sizes.blocks == (layer - 4 * 32, layer)
    assert sizes.weights == sum(sizes.blocks) + 4 * (4 * 32 * 32 + 32)
    assert sizes.eighth == sizes.weights // 4 + 3 * 32 * 4  # norms stay: one of the fusion, 1 + 2 of the blocks
    assert sizes.position == 2 * 2 * 2 * 8 * 4
    assert (sizes.prompt_row, sizes.shares_embedding) == (2 * 32 * 4, True)
    lm = DovetailAssistantModel.from_causal_lm(tiny.build("llama"))
    sizes = prepare.draft_sizes_of(lm, llama)
    assert sizes.weights == sum(p.nbytes for p in lm.parameters()) + sum(b.nbytes for b in lm.buffers())
    assert (sizes.blocks, sizes.prompt_row, sizes.shares_embedding) == ((), 0, False)


def tied(family: str) -> tuple:
    model = tiny.build(family)
    return model, anatomy_of(model)


def test_each_tensor_crosses_once_per_pass(ids: Tensor, accelerator: Accelerator) -> None:
    """Of a verification over eight nodes: the hidden states, and what masks and positions are made of; masks and
    rotations are made on the device, also where layers read several of them."""
    for family, changes in (("llama", {}), ("gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 2})):
        target = tiny.build(family, num_hidden_layers=4, **changes)
        draft = draft_of(target)
        with accelerator:
            place(target, draft, 3)
            tiny.run(target, ids, draft, max_new_tokens=4)
            before = len(accelerator.copies)
            tiny.run(target, ids, draft, max_new_tokens=16, output_scores=False, output_logits=False)
            copies, rounds = Counter(accelerator.copies[before:]), draft.last_stats.rounds
        way_in = {shape: n for (way, shape, _), n in copies.items() if way == "in"}
        hidden = {shape: n for shape, n in way_in.items() if shape[2:] == (32,)}
        assert sum(hidden.values()) == rounds + 1  # the prompt's, and each round's
        assert {shape[2] for shape in way_in if len(shape) == 4} <= {1, 12}  # masks of the prompt and of plain rounds
        others = {shape for shape in way_in if len(shape) == 3} - hidden.keys()
        assert others <= {(1, rows, rows) for rows in range(10)}
        assert way_in[1, 9] <= 2 * rounds  # positions of the rows, and depths
        assert max(n for (way, shape, _), n in copies.items() if way == "out" and shape != (1,)) <= rounds
        assert ("out", (1, 101), 404) not in copies  # no logits: nobody looks at them


def test_processors_criteria_and_streamers_see_what_they_expect(ids: Tensor, accelerator: Accelerator) -> None:
    """On the CPU, whole rows; also a processor that runs the model itself (classifier-free guidance)."""
    target, calls = tiny.build("llama"), []
    draft = draft_of(target)

    def stop(prefix: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        assert prefix.device == torch.device("cpu")
        return torch.tensor([prefix.shape[1] > 26])

    _, _, tokenizer = load_pair()
    options = {"guidance_scale": 1.5, "stopping_criteria": [stop], "output_scores": False, "output_logits": False}
    logs: list[list] = [[], [], []]
    plain = tiny.run(target, ids, logits_processor=[tiny.call_log(logs[0])], **options)
    with accelerator:
        place(target, draft, 1)
        tiny.assert_same(plain, tiny.run(target, ids, logits_processor=[tiny.call_log(logs[1])], **options))
        streamer = TextIteratorStreamer(tokenizer)
        processors = [tiny.call_log(logs[2]), lambda prefix, scores: calls.append(scores.device) or scores]
        ours = tiny.run(target, ids, draft, logits_processor=processors, streamer=streamer, **options)
        tiny.assert_same(plain, ours)
    assert logs[0] == logs[1] == logs[2]
    assert set(calls) == {torch.device("cpu")}
    assert 12 < ours.sequences.shape[1] == 27
    assert len("".join(streamer)) > 0


def test_a_prompt_may_be_on_the_device(ids: Tensor, accelerator: Accelerator) -> None:
    target = tiny.build("llama")
    draft = draft_of(target)
    plain = tiny.run(target, ids, max_new_tokens=20)
    accelerator.waits = True  # transformers' own loop asks the device after each token
    with accelerator:
        place(target, draft, 2)
        there = ids.to(DEVICE)
        mask = torch.ones_like(there)
        for assistant in (None, draft):
            before = len(accelerator.copies)
            ours = tiny.run(target, there, assistant, max_new_tokens=20, attention_mask=mask)
            assert isinstance(ours.sequences, Remote)
            logits = [shape for _, shape, _ in accelerator.copies[before:] if shape[-1:] == (101,)]
            assert not logits or assistant is None  # transformers asks the model from the CPU
            assert ours.sequences.cpu().tolist() == plain.sequences.tolist()
            scores = torch.cat(ours.scores).cpu()
            torch.testing.assert_close(scores, torch.cat(plain.scores), rtol=1e-4, atol=2e-4)
        assert 0 < draft.last_stats.bytes_to_target < 8 << 10


@pytest.mark.parametrize("engine", ["onednn", "int8"])
def test_engines_take_the_layers_on_the_cpu(engine: str, accelerator: Accelerator) -> None:
    """Packed weights and weights on the device side by side; the demo target, whose LM head is the embedding."""
    target, draft, tokenizer = load_pair()
    draft.tree, draft.draft_device = TreeShape(), str(DEVICE)
    inputs, before = tokenizer("def add(a, b):\n", return_tensors="pt"), snapshot(target)
    with accelerator:
        place(target, draft, 3, engine)
        assert engine_of(target) == engine
        packed = {name for name, p in target.named_parameters() if isinstance(p, PackedWeight)}
        assert {int(name.split(".")[2]) for name in packed} == set(range(5))
        assert not packed & on_device(target)
        plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
        ours = target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=draft)
        assert torch.equal(plain, ours)
        assert draft.last_stats.accepted > 0
        restore_target(target)
    assert_restored(target, before)


def test_preparing_again_and_after_restoring(ids: Tensor, accelerator: Accelerator) -> None:
    target = tiny.build("llama")
    draft, before = draft_of(target), snapshot(target)
    plain = tiny.run(target, ids, max_new_tokens=12)
    with accelerator:
        keys, budgets = [], {layers: budget_for(target, draft, layers) for layers in (1, 3, 0, 2)}
        for layers, budget in budgets.items():
            prepare_target(target, "eager", budget, draft, CONTEXT)
            assert dispatch_of(target).layers == layers
            tiny.assert_same(plain, tiny.run(target, ids, draft, max_new_tokens=12))
            keys.append(str(describe(target, draft)["devices"]))
        assert len(set(keys)) == 4  # costs are learned for each placement by itself
        held = held_bytes()
        prepare_target(target, "onednn")  # without a budget: back to the CPU
        assert dispatch_of(target) is None
        assert not on_device(target)
        assert engine_of(target) == "onednn"
        tiny.assert_same(plain, tiny.run(target, ids, draft, max_new_tokens=12), tolerance=1e-3)
        restore_target(restore_target(target))
        assert_restored(target, before)
        place(target, draft, 2)
        tiny.assert_same(plain, tiny.run(target, ids, draft, max_new_tokens=12))
        assert held_bytes() == held
        restore_target(target)
    assert_restored(target, before)


@pytest.mark.parametrize("kind", ["noisy", "eagle3", "accepting"])
def test_every_kind_of_draft(kind: str, ids: Tensor, accelerator: Accelerator) -> None:
    """A small LM, features of layers on both devices, and a target that drafts for itself from two devices."""
    target = tiny.build("llama", num_hidden_layers=4)
    if kind == "eagle3":
        torch.manual_seed(0)
        draft = DovetailAssistantModel.from_target(target, fusion="eagle3")
        draft.tree, draft.draft_device = SHAPE, str(DEVICE)
    else:
        draft = draft_of(target, kind)
    plain = tiny.run(target, ids)
    with accelerator:
        place(target, draft if kind != "accepting" else None, 1)
        tiny.run(target, ids, draft)
        crossed = accelerator.bytes_in, accelerator.bytes_out
        tiny.assert_same(plain, tiny.run(target, ids, draft))
        crossed = accelerator.bytes_in - crossed[0], accelerator.bytes_out - crossed[1]
        if kind != "accepting":
            assert crossed == (draft.last_stats.bytes_to_draft, draft.last_stats.bytes_to_target)
    assert (draft.last_stats.accepted > 0) is (kind != "eagle3")


def test_padding_conversations_and_caches(ids: Tensor, accelerator: Accelerator) -> None:
    target = tiny.build("mistral")
    draft = draft_of(target, "noisy")
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    plain = tiny.run(target, ids, attention_mask=mask, max_new_tokens=20)
    longer = torch.cat((plain.sequences, ids), dim=1)
    rest = torch.cat((mask, torch.ones(1, longer.shape[1] - mask.shape[1], dtype=torch.long)), dim=1)
    expected = tiny.run(target, longer, attention_mask=rest, past_key_values=copy.deepcopy(plain.past_key_values))
    with accelerator:
        place(target, draft, 1)
        ours = tiny.run(target, ids, draft, attention_mask=mask, max_new_tokens=20)
        tiny.assert_same(plain, ours)
        devices = [layer.keys.device for layer in ours.past_key_values.layers]
        assert devices == [torch.device("cpu"), DEVICE]
        for layer, other in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
            torch.testing.assert_close(layer.keys.cpu(), other.keys, rtol=1e-4, atol=2e-4)
            torch.testing.assert_close(layer.values.cpu(), other.values, rtol=1e-4, atol=2e-4)
        again = tiny.run(target, longer, draft, attention_mask=rest, past_key_values=ours.past_key_values)
        tiny.assert_same(expected, again)


def test_a_chain_target_on_two_devices(ids: Tensor, accelerator: Accelerator) -> None:
    target = tiny.build("lfm2")
    draft = draft_of(target)
    plain = tiny.run(target, ids)
    with accelerator:
        place(target, draft, 1)
        tiny.assert_same(plain, tiny.run(target, ids, draft))


def test_saving_pipelines_and_moves(tmp_path: Path, accelerator: Accelerator) -> None:
    target, draft, tokenizer = load_pair()
    draft.tree, draft.draft_device = TreeShape(), str(DEVICE)
    before = snapshot(target)
    with accelerator:
        place(target, draft, 4)
        assert all(torch.equal(tensor, before[0][name]) for name, tensor in target.state_dict().items())
        target.save_pretrained(tmp_path)
        write = pipeline("text-generation", model=target, assistant_model=draft, tokenizer=tokenizer)
        assert write.device == torch.device("cpu")
        text = write("def add(", max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert text.startswith("def add(")
        assert target.to("cpu").float() is target
        for change in (lambda: target.to(DEVICE), lambda: target.half(), lambda: copy.deepcopy(target)):
            with pytest.raises(RuntimeError, match="restore_target"):
                change()
        assert text == write("def add(", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    size = sum(p.nbytes for p in load_pair()[0].parameters())  # tied weights once
    assert size < (tmp_path / "model.safetensors").stat().st_size < 1.05 * size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in before[0].items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vram_budget": "7 gigs"}, "expected a number of bytes"),
        ({"vram_budget": -1}, "expected a number of bytes"),
        ({"vram_budget": "infGiB"}, "expected a number of bytes"),
        ({"vram_budget": 1.5}, "expected a number of bytes"),
        ({"vram_budget": True}, "expected a number of bytes"),
        ({"vram_budget": "1GiB", "context": 0}, "context is 0; expected a number of tokens, 1 to the model's 256"),
        ({"vram_budget": "1GiB", "context": 257}, "context is 257"),
        ({"vram_budget": "1GiB", "engine": "warp"}, "auto, eager or one of"),
        ({"vram_budget": "10KiB"}, "vram_budget is 0.01 MiB, but the draft, its cache and the LM head take"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(given: dict, message: str, accelerator: Accelerator) -> None:
    target = tiny.build("llama")
    draft, before = draft_of(target), snapshot(target)
    with accelerator, pytest.raises(ValueError, match=message):
        prepare_target(target, draft=draft, **given)
    assert_restored(target, before)


@pytest.mark.parametrize("budget", ["1GiB", None])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("a/folder", "draft is 'a/folder'; expected a DovetailAssistantModel"),
        (Path("a/folder"), r"draft is \w+\('a/folder'\); expected"),
        (nn.Linear(2, 2), "draft is a Linear; expected"),
    ],
)
def test_a_draft_of_a_wrong_type_is_refused_and_changes_nothing(
    wrong: Any, said: str, budget: str | None, accelerator: Accelerator
) -> None:
    """Guards a target that is prepared already, whose weights would come back before the error."""
    target = prepare_target(tiny.build("llama"), "onednn")
    with accelerator, pytest.raises(TypeError, match=said):
        prepare_target(target, "eager", vram_budget=budget, draft=wrong)
    assert engine_of(target) == "onednn"


def test_without_an_accelerator_a_budget_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="vram_budget needs an accelerator, and torch finds none"):
        prepare_target(llama, vram_budget="7GiB")
    assert engine_of(llama) == "eager"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.config, "quantization_config", {"quant_method": "torchao"}), "quantised already"),
        (lambda model: model.to("meta"), "on meta, not on the CPU"),
        (lambda model: setattr(model.model.layers[0], "_hf_hook", object()), "accelerate has dispatched it already"),
        (lambda model: model.set_output_embeddings(None), "no LM head"),
        (lambda model: setattr(model.config, "num_hidden_layers", 2), "in no list of it"),
    ],
)
def test_models_that_cannot_be_placed_say_why(change: Callable, message: str, accelerator: Accelerator) -> None:
    target = tiny.build("llama")
    change(target)
    with accelerator, pytest.raises(ValueError, match=f"cannot be placed on two devices: .*{message}"):
        prepare_target(target, vram_budget="1GiB")
    assert dispatch_of(target) is None


@pytest.mark.parametrize("step", ["_hook", "_try"])
@pytest.mark.parametrize("error", [RuntimeError("a module has other ideas"), torch.OutOfMemoryError("out of memory")])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(
    step: str, error: Exception, ids: Tensor, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tiny.build("llama", tie_word_embeddings=True)
    before, plain = snapshot(target), tiny.run(target, ids)

    def failing(self: Dispatch, *args: Any) -> None:
        original(self, *args)
        raise error

    original = getattr(Dispatch, step)
    monkeypatch.setattr(Dispatch, step, failing)
    expected = type(error) if isinstance(error, torch.OutOfMemoryError) else ValueError
    with accelerator, pytest.raises(expected, match=r"other ideas|out of memory"):
        place(target, draft_of(target), 2)
    assert_restored(target, before)
    tiny.assert_same(plain, tiny.run(target, ids))


def test_a_device_with_less_memory_or_less_speed_gets_less(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tiny.build("llama")
    draft = draft_of(target)
    with accelerator, caplog.at_level("WARNING", logger="hf_dovetail"):
        accelerator.memory = held_bytes() + budget_for(target, draft, 1)
        prepare_target(target, "eager", "1GiB", draft, CONTEXT)
        assert prepare.plan_of(target).layers == 1
        assert "vram_budget is 1.00 GiB, but xpu:0 has" in caplog.text
        prepare_target(target, "eager", "1GiB", draft, CONTEXT)  # what the draft holds there by now is its own room
        assert prepare.plan_of(target).layers == 1
        monkeypatch.setattr(prepare, "head_times_ms", lambda head, rows, device: (1.0, 3.0))
        prepare_target(target, "eager", "1GiB", draft, CONTEXT)
        assert dispatch_of(target) is None
        assert "xpu:0 takes 3.00 ms for a tree's logits and the CPU 1.00" in caplog.text


def test_the_head_is_timed_on_both_sides(accelerator: Accelerator) -> None:
    head = tiny.build("llama").lm_head
    with accelerator:
        times = HEAD_TIMES_MS(head, 9, DEVICE)
    ways = Counter(accelerator.copies)
    assert min(times) > 0
    assert ways == {("in", (101, 32), 4 * 101 * 32): 1, ("in", (9, 32), 4 * 9 * 32): 7, ("out", (9,), 8 * 9): 7}


def test_the_plan_is_printed(accelerator: Accelerator, capsys: pytest.CaptureFixture) -> None:
    target, draft, _ = load_pair()
    draft.draft_device = str(DEVICE)
    with accelerator:
        prepare_target(target, vram_budget="1GiB", draft=draft)
        assert prepare.plan_of(target).table() in capsys.readouterr().out
        assert prepare.plan_of(target).limits.context == min(prepare.USUAL_CONTEXT, 1024)
        assert pair_path("target").exists()
