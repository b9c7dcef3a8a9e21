"""Bad input is refused in a sentence that names it, and a correct call afterwards works."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    StaticCache,
    StoppingCriteriaList,
)

from hf_dovetail import DovetailAssistantModel, DovetailConfig, TreeShape
from hf_dovetail.devices import resolve_device

Edit = Callable[[dict[str, Tensor]], Any]


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings of the package, which transformers' loggers do not hand on to pytest."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("hf_dovetail")
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    yield seen
    logger.removeHandler(handler)


def refuse(
    target: PreTrainedModel, draft: DovetailAssistantModel, words: str, ids: Tensor | None = None, **options: Any
) -> None:
    """The call is refused with these words; a correct one afterwards gives plain generate's answer."""
    with pytest.raises(ValueError, match=words):
        tiny.run(target, tiny.prompt() if ids is None else ids, draft, **options)
    assert not target.get_decoder()._forward_hooks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 64}, r"hidden_size 32, .* has 64"),
        ({"vocab_size": 120}, r"vocab_size 101, .* has 120"),
    ],
)
def test_a_draft_for_another_target_names_both_numbers(
    changes: dict[str, int], words: str, llama: PreTrainedModel, untrained: DovetailAssistantModel, ids: Tensor
) -> None:
    refuse(tiny.build("llama", **changes), untrained, words)
    tiny.both(llama, untrained, ids)


def test_a_draft_for_another_kind_of_target_names_both(
    llama: PreTrainedModel, untrained: DovetailAssistantModel, ids: Tensor
) -> None:
    refuse(tiny.build("qwen3"), untrained, "model type llama, .* has qwen3")
    tiny.both(llama, untrained, ids)


def test_a_causal_lm_draft_of_another_vocabulary_names_both_sizes(llama: PreTrainedModel, ids: Tensor) -> None:
    draft = tiny.draft_for(tiny.build("qwen2", vocab_size=120), "accepting")
    refuse(llama, draft, r"vocab_size 120, .* has 101")
    tiny.both(llama, tiny.draft_for(tiny.build("qwen2", hidden_size=64), "accepting"), ids)  # widths may differ


CHECKPOINTS: dict[str, tuple[Edit, str]] = {
    "missing": (lambda w: w.pop("fusion.W_2"), r"missing: fusion\.W_2"),
    "missing_block": (lambda w: w.pop("layers.0.mlp.up_proj.weight"), r"missing: layers\.0\.mlp\.up_proj\.weight"),
    "extra": (
        lambda w: w.update({"layers.0.input_layernorm.weight": torch.ones(32)}),
        r"not part of .*layers\.0\.input_layernorm",
    ),
    "misshapen": (
        lambda w: w.update({"fusion.W_z": torch.ones(32, 32)}),
        r"W_z has shape \(32, 32\), expected \(64, 32\)",
    ),
    "nan": (lambda w: w["fusion.W_1"][3].fill_(float("nan")), r"weight fusion\.W_1 .* not finite"),
    "infinite": (lambda w: w["layers.0.mlp.gate_proj.weight"][0].fill_(float("inf")), "gate_proj.weight .* not finite"),
}


@pytest.mark.parametrize("loader", [DovetailAssistantModel, AutoModelForCausalLM])
@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_faulty_checkpoint_is_refused_by_the_weights_name(
    fault: str, loader: Any, llama: PreTrainedModel, untrained: DovetailAssistantModel, tmp_path: Path, ids: Tensor
) -> None:
    """Guards `load_state_dict(strict=False)` with its result unused."""
    untrained.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights, (edit, words) = load_file(file), CHECKPOINTS[fault]
    good = {name: tensor.clone() for name, tensor in weights.items()}
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        loader.from_pretrained(tmp_path)
    save_file(good, file, metadata={"format": "pt"})
    draft = loader.from_pretrained(tmp_path)
    draft.draft_device = "cpu"
    tiny.both(llama, draft, ids)


def test_a_faulty_causal_lm_checkpoint_is_refused_too(noisy: DovetailAssistantModel, tmp_path: Path) -> None:
    noisy.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing: {name}"):
        DovetailAssistantModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_reported_as_damaged(
    kept: float, untrained: DovetailAssistantModel, tmp_path: Path
) -> None:
    untrained.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(OSError, match=r"damaged|safetensors") as caught:
        DovetailAssistantModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    file.write_bytes(data)
    assert DovetailAssistantModel.from_pretrained(tmp_path).config.hidden_size == 32


def test_zero_nodes_are_plain_decoding(llama: PreTrainedModel, ids: Tensor) -> None:
    for kind in ("noisy", "untrained"):
        draft = tiny.draft_for(llama, kind)
        draft.tree = TreeShape(nodes=0)
        tiny.both(llama, draft, ids)
        stats = draft.last_stats
        assert (stats.rounds, stats.drafted, stats.accepted, stats.bytes_to_target) == (29, 0, 0, 0)


def test_negative_shapes_are_refused_before_they_are_used(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    for values in ({"nodes": -1}, {"depth": -2}, {"top_k": -3}):
        ((name, value),) = values.items()
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            noisy.tree = TreeShape(**values)
    tiny.both(llama, noisy, ids)


def test_an_empty_prompt_is_refused(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    refuse(llama, noisy, "prompt is empty", torch.empty(1, 0, dtype=torch.long))
    tiny.both(llama, noisy, ids)


def test_no_prompt_at_all_starts_with_bos_as_in_plain_generate(
    llama: PreTrainedModel, noisy: DovetailAssistantModel
) -> None:
    options = {"do_sample": False, "max_new_tokens": 9}
    assert torch.equal(llama.generate(**options), llama.generate(**options, assistant_model=noisy))


@pytest.mark.parametrize("length", [10, 22, 40])
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_a_prompt_beyond_the_drafts_positions_warns_once_and_goes_on(
    kind: str, length: int, llama: PreTrainedModel, warnings_seen: list[str]
) -> None:
    """Guards the draft's end (24): before it drafts, then the target goes on alone with the same answer."""
    draft = tiny.draft_for(llama, kind)
    draft.config.max_position_embeddings = 24
    tiny.both(llama, draft, tiny.prompt(length), max_new_tokens=45)
    said = [text for text in warnings_seen if "last position" in text]
    assert len(said) == 1
    assert "of 24" in said[0]
    assert (draft.last_stats.drafted > 0) == (length < 23)
    assert draft.last_stats.new_tokens == 45
    tiny.both(llama, draft, tiny.prompt(5), max_new_tokens=9)
    assert draft.last_stats.accepted > 0 or kind == "untrained"


def short_gpt2(positions: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A target with few learned positions, and the same model with all of them."""
    long, short = tiny.build("gpt2"), tiny.build("gpt2", n_positions=positions)
    weights = long.state_dict()
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:positions]
    short.load_state_dict(weights)
    return short, long


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_the_targets_last_position_is_reached_like_plain_generate_does(kind: str, warnings_seen: list[str]) -> None:
    """Guards learned positions (40 of them): no node of a tree may stand beyond the last one."""
    target, long = short_gpt2(40)
    draft = tiny.draft_for(long if kind == "noisy" else target, kind)
    draft.config.max_position_embeddings = 500  # the draft itself has room
    plain, _ = tiny.both(target, draft, tiny.prompt(20), max_new_tokens=21)
    assert plain.sequences.shape[1] == 41
    assert draft.last_stats.drafted > 0
    with pytest.raises(IndexError):
        tiny.run(target, tiny.prompt(41), max_new_tokens=3)
    with pytest.raises((IndexError, ValueError)):
        tiny.run(target, tiny.prompt(41), draft, max_new_tokens=3)
    tiny.both(target, draft, tiny.prompt(39), max_new_tokens=2)


@pytest.mark.parametrize("length", range(36, 42))
def test_a_tree_stays_within_the_targets_positions_when_the_answer_may_be_longer(length: int) -> None:
    """Guards an answer that a criterion ends in time: plain generate computes no position beyond it, nor may we."""
    target, long = short_gpt2(40)
    draft = tiny.draft_for(long, "noisy")
    draft.tree = TreeShape(nodes=12, depth=7, top_k=2)

    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((1,), ids.shape[1] >= length)

    criteria = StoppingCriteriaList([stop])
    plain, _ = tiny.both(target, draft, tiny.prompt(20), max_new_tokens=100, stopping_criteria=criteria)
    assert plain.sequences.shape[1] == length
    assert draft.last_stats.accepted > 0


REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, r"num_beams=2"),
    "beam_sampling": ({"num_beams": 3, "do_sample": True}, r"num_beams=3"),
    "return_sequences": ({"num_return_sequences": 2, "do_sample": True}, r"num_return_sequences.*2"),
    "static_cache": ({"cache_implementation": "static"}, r"[Ss]tatic"),
    "no_cache": ({"use_cache": False}, r"use_cache"),
    "attentions": ({"output_attentions": True}, r"output_attentions=True"),
    "hidden_states": ({"output_hidden_states": True}, r"output_hidden_states=True"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, r"prompt_lookup_num_tokens=3"),
    "dola": ({"dola_layers": "low"}, r"dola_layers='low'"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_dovetail_does_not_decode_is_refused_by_name(
    name: str, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards options that would be swallowed."""
    options, words = REQUESTS[name]
    refuse(llama, noisy, words, **options)
    tiny.both(llama, noisy, ids)


class Wrapper(torch.nn.Module):
    """Holds a model as PEFT does, and forwards what is asked for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


@pytest.mark.parametrize("wrap", [torch.compile, Wrapper])
def test_a_draft_within_another_module_is_refused_by_name(
    wrap: Any, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards wrappers, which transformers would take for a language model and fail on."""
    wrapped = wrap(noisy)
    refuse(llama, wrapped, f"{type(wrapped).__name__} around a Dovetail draft")
    with pytest.raises(ValueError, match=f"{type(wrapped).__name__}, expected a transformers model"):
        DovetailAssistantModel.from_causal_lm(wrap(llama))
    tiny.both(llama, noisy, ids)


def test_a_batch_is_refused(llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor) -> None:
    refuse(llama, noisy, "batch of 2", ids.repeat(2, 1))
    tiny.both(llama, noisy, ids)


@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_input_embeddings_are_refused(kind: str, llama: PreTrainedModel, ids: Tensor) -> None:
    draft = tiny.draft_for(llama, kind)
    embeddings = llama.get_input_embeddings()(ids)
    for extra in ({}, {"input_ids": ids}):
        with pytest.raises(ValueError, match="inputs_embeds"):
            llama.generate(inputs_embeds=embeddings, assistant_model=draft, max_new_tokens=3, **extra)
    tiny.both(llama, draft, ids)


def test_caches_that_cannot_be_taken_back_are_refused(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    static = StaticCache(config=llama.config, max_cache_len=64)
    refuse(llama, noisy, "StaticCache", past_key_values=static)
    refuse(llama, noisy, "DynamicCache", past_key_values=tiny.offloaded(llama.config))
    tiny.both(llama, noisy, ids, past_key_values=None)


def test_an_encoder_decoder_target_is_refused(noisy: DovetailAssistantModel, ids: Tensor) -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=tiny.VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    target = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        target.generate(ids, assistant_model=noisy, max_new_tokens=3)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        DovetailAssistantModel.from_target(target)
    assert target.generate(ids, max_new_tokens=3).shape[1] == 4


def test_a_target_without_an_lm_head_matrix_is_refused(
    llama: PreTrainedModel, untrained: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards heads that have no weight, such as some quantised ones."""
    head = llama.lm_head

    class Opaque(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return head(hidden)

    llama.lm_head = Opaque()
    refuse(llama, untrained, "no LM head with a weight matrix")
    llama.lm_head = head
    tiny.both(llama, untrained, ids)


def test_configurations_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers is 9; a draft has 1 to 6 blocks"):
        DovetailConfig(num_hidden_layers=9)
    with pytest.raises(ValueError, match="set own_head=True, or leave draft_vocab_size out"):
        DovetailConfig(fusion="eagle3", draft_vocab_size=40, own_head=False)
    with pytest.raises(ValueError, match=r"'mean'.*dgf, eagle, eagle3, none"):
        DovetailConfig(fusion="mean")
    with pytest.raises(ValueError, match="causal_lm"):
        DovetailAssistantModel(DovetailConfig(fusion="none"))


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "draft_device is 'gpu'"), ("cuda:97", "draft_device is 'cuda:97'")]
)
def test_a_device_that_is_not_there(
    device: str, message: str, llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    noisy.draft_device = device
    with pytest.raises(ValueError, match=message):
        tiny.run(llama, ids, noisy)
    noisy.draft_device = "cpu"
    tiny.both(llama, noisy, ids)


@pytest.mark.parametrize(
    ("count", "device", "message"),
    [
        (None, "cuda", "torch finds no accelerator on this machine; use 'auto' or 'cpu'"),
        (1, "cuda", "torch finds a device of type xpu on this machine; use 'auto' or 'cpu'"),
        (1, "xpu:1", "this machine has 1 of them: expected auto, cpu, or xpu:0$"),
        (3, "xpu:3", "this machine has 3 of them: expected auto, cpu, or xpu:0 to xpu:2$"),
    ],
)
def test_a_device_that_is_not_there_names_those_that_are(
    count: int | None, device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if count is None else torch.device("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    with pytest.raises(ValueError, match=message):
        resolve_device(device)


def test_a_draft_is_not_a_target_for_a_draft(untrained: DovetailAssistantModel) -> None:
    for make in (DovetailAssistantModel.from_target, DovetailAssistantModel.from_causal_lm):
        with pytest.raises(ValueError, match="Dovetail draft"):
            make(untrained)


def test_gradient_checkpointing_in_training_mode_is_refused(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    llama.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing .* call target.eval"):
        tiny.run(llama.train(), ids, noisy)
    tiny.both(llama.eval(), noisy, ids)


def test_features_of_other_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"feature_layers is \[2, 4\]"):
        DovetailConfig(feature_layers=[2, 4])
