"""Engines: the same model on faster layers, in place, reversible, and still an ordinary model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, pipeline

from hf_dovetail import DovetailAssistantModel, TreeShape, grouped, prepare_target, restore_target
from hf_dovetail.curves import MAX_ROWS
from hf_dovetail.demo import demo_prompts, load_pair, pair_path
from hf_dovetail.engines import engine_of, onednn
from hf_dovetail.engines.native import NativeBf16
from hf_dovetail.engines.onednn import why_not
from hf_dovetail.packed import PackedWeight

PRECISIONS = (torch.float32, torch.bfloat16)
ENGINE = "onednn"
pytestmark = pytest.mark.skipif(why_not(tiny.build("llama")) is not None, reason="oneDNN is not in this build of torch")


def load_target(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The demo target: grouped-query attention, and an LM head that is the embedding matrix too."""
    return AutoModelForCausalLM.from_pretrained(pair_path("target"), dtype=dtype)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if isinstance(parameter, PackedWeight)}


@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_a_row_does_not_depend_on_how_many_rows_there_are(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every shape of the demo model, of a 1 B Llama's small projections, and odd ones; by oneDNN alone too."""
    if not native:
        if not onednn.has_bf16():
            pytest.skip("oneDNN has no bfloat16 for this CPU")
        monkeypatch.setattr(NativeBf16, "takes", staticmethod(lambda blocks: False))
    shapes = {tuple(m.weight.shape) for m in load_target(dtype).modules() if isinstance(m, nn.Linear)}
    for outputs, inputs in [*sorted(shapes), (512, 2048), (2048, 2048), (1000, 96), (101, 32), (7, 33)]:
        kernel = onednn.pack(torch.randn(outputs, inputs).to(dtype))
        if kernel is None:  # no kernel here for this matrix, which stays as it is
            assert inputs % 2
            continue
        rows = torch.randn(MAX_ROWS, inputs).to(dtype)
        together = kernel.linear(rows, None)
        for count in range(1, MAX_ROWS):
            first = kernel.linear(rows[None, :count], None)[0]
            assert torch.equal(first, together[:count]), f"{outputs}x{inputs}: {count} rows"
            last = kernel.linear(rows[-count:], None)
            assert torch.equal(last, together[-count:]), f"{outputs}x{inputs}: the last {count} rows"
        assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("shape", [(4096, 192), (1000, 96), (101, 32), (7, 6), (1, 1)])
def test_a_packed_matrix_gives_its_rows_and_itself_back(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    kernel = onednn.pack(weight)
    if kernel is None:
        assert dtype == torch.bfloat16
        assert not onednn.has_bf16()
        assert shape[1] % 2
        return
    assert torch.equal(kernel.dense(), weight)
    rows = torch.randn(2, 3, shape[1]).to(dtype)
    expected = torch.nn.functional.linear(rows.double(), weight.double(), bias.double())
    error = (kernel.linear(rows, bias).double() - expected).abs()
    assert bool((error < 1e-4 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * expected.abs())).all())
    assert kernel.linear(rows[:, :0], bias).shape == (2, 0, shape[0])
    if kernel.has_rows:
        ids = torch.randint(shape[0], (2, 5))
        assert torch.equal(kernel.lookup(ids), weight[ids])


def test_rows_of_a_tied_embedding_can_be_read_on_this_machine() -> None:
    """Otherwise the LM head of tied models would stay slow, silently."""
    for dtype in PRECISIONS:
        assert onednn.pack(torch.randn(4096, 192).to(dtype)).has_rows


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_prepare_and_restore_leave_the_model_as_it_was(dtype: torch.dtype) -> None:
    model = load_target(dtype)
    before, parameters = weights(model), dict(model.named_parameters())
    modules, ids, size = dict(model.named_modules()), torch.arange(1, 40).unsqueeze(0), model.num_parameters()
    with torch.no_grad():
        logits = model(ids).logits
    assert prepare_target(model, engine=ENGINE) is model
    assert engine_of(model) == ENGINE
    assert len(packed_names(model)) == 8 * 7 + 1  # eight layers, and the embedding that is the LM head
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert dict(model.named_modules()) == modules
    assert model.num_parameters() == size
    assert (model.dtype, model.device) == (dtype, torch.device("cpu"))
    with torch.no_grad():
        faster = model(ids).logits
    assert (faster - logits).abs().max() < (1e-3 if dtype == torch.float32 else 0.5)
    prepare_target(model, engine=ENGINE)  # a second time changes nothing
    restore_target(restore_target(model))
    assert engine_of(model) == "eager"
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_a_prepared_model_is_saved_and_copied_like_any_other(tmp_path: Path) -> None:
    model = load_target()
    before, answer = weights(model), model.generate(tiny.prompt(), max_new_tokens=12, do_sample=False)
    prepare_target(model, engine=ENGINE)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.05 * 4 * model.num_parameters()  # tied weights once
    buffer = io.BytesIO(pickle.dumps(model))
    for other in (AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model), pickle.load(buffer)):
        assert engine_of(other) == "eager"
        assert not packed_names(other)
        assert other.lm_head.weight is other.get_input_embeddings().weight
        assert all(torch.equal(before[name], tensor) for name, tensor in weights(other).items())
        assert torch.equal(other.generate(tiny.prompt(), max_new_tokens=12, do_sample=False), answer)
        other.to(torch.bfloat16)
    assert engine_of(model) == ENGINE


def test_a_copy_learns_what_the_model_would_have_learned() -> None:
    """Guards a copy with frozen weights: a packed weight has no gradient, its copy is an ordinary parameter."""
    model = tiny.build("llama", tie_word_embeddings=True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prepare_target(model, engine=ENGINE)
    assert {name: p.requires_grad for name, p in model.named_parameters()} != trainable
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restore_target(model)):
        assert {name: p.requires_grad for name, p in other.named_parameters()} == trainable
        other.train()(tiny.prompt(), labels=tiny.prompt()).loss.backward()
        assert {name: p.grad is not None for name, p in other.named_parameters()} == trainable


def test_training_a_prepared_model_says_what_does_not_learn(
    ids: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepare_target(tiny.build("llama"), engine=ENGINE)
    with caplog.at_level("WARNING", logger="hf_dovetail"):
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model.train()(ids)
        assert not caplog.messages
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
        assert len(caplog.messages) == 1
        assert "22 of its weights are packed" in caplog.text
        caplog.clear()
        restore_target(model)(ids)
        prepare_target(model.requires_grad_(False), engine=ENGINE)(ids)  # nothing would have learned anyway
        copy.deepcopy(model).train()(ids)
    assert not caplog.messages


def test_a_padded_batch_has_the_answers_of_its_prompts() -> None:
    target, _, tokenizer = load_pair(torch.float32)
    tokenizer.padding_side = "left"
    prompts = ["def add(a, b):\n", "import os\n\n\ndef read(path, mode):\n", "class A"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    prepare_target(target, engine=ENGINE)
    together = target.generate(**batch, max_new_tokens=12, do_sample=False)
    for prompt, row in zip(prompts, together, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = target.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        assert row[-12:].tolist() == alone[-12:].tolist()


def test_what_would_break_a_prepared_model_is_refused_and_loses_nothing() -> None:
    model = prepare_target(load_target(), engine=ENGINE)
    logits = model(tiny.prompt()).logits
    for change in (
        lambda: model.to(torch.bfloat16),
        lambda: model.half(),
        lambda: model.load_state_dict(load_target().state_dict()),
        lambda: nn.init.zeros_(model.lm_head.weight),
        lambda: model.model.half(),
        lambda: model.share_memory(),
        lambda: model.resize_token_embeddings(model.config.vocab_size + 4),
        lambda: set_module_tensor_to_device(model.model.layers[0].mlp, "up_proj.weight", "meta"),
    ):
        with pytest.raises(RuntimeError, match="restore_target"):
            change()
        assert torch.equal(model(tiny.prompt()).logits, logits)
    assert model.to("cpu").to(torch.float32) is model  # what a pipeline does
    restore_target(model).to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_copy_works_in_another_process(tmp_path: Path) -> None:
    """Guards what a copied model asks for by name, such as its attention, where nothing was prepared."""
    model = prepare_target(load_target(), engine=ENGINE)
    assert model.config._attn_implementation == grouped.NAME
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = "import pickle, sys, torch\nmodel = pickle.load(open(sys.argv[1], 'rb'))\n"
    code += "print(model.half()(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pkl")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(model(torch.tensor([[5, 6, 7]])).logits.argmax(-1).tolist()), done.stderr


def test_a_prepared_model_is_freed_with_its_last_reference() -> None:
    """Guards gigabytes that would wait for the garbage collector."""
    model = prepare_target(tiny.build("llama"), engine=ENGINE)
    gone = weakref.ref(model)
    del model
    assert gone() is None


def test_what_was_changed_meanwhile_stays(ids: torch.Tensor) -> None:
    """Guards weights, embeddings and attention that the user has set on the prepared model."""
    model = tiny.build("llama")
    own = nn.Parameter(torch.zeros_like(model.model.layers[0].mlp.up_proj.weight))
    original = model.model.layers[1].mlp.up_proj.weight
    prepare_target(model, engine=ENGINE)
    model.model.layers[0].mlp.up_proj.weight = own
    model.set_attn_implementation("eager")
    model.resize_token_embeddings(tiny.VOCAB + 4)  # new modules, since this model's head is not its embedding
    logits = model(ids).logits
    with torch.inference_mode():
        restore_target(model)
    assert model.model.layers[0].mlp.up_proj.weight is own
    assert model.model.layers[1].mlp.up_proj.weight is original
    assert model.config._attn_implementation == "eager"
    assert torch.allclose(model(ids).logits, logits, atol=1e-4)
    model(ids, labels=ids).loss.backward()  # nothing of inference mode is left
    assert original.grad is not None


def test_hooks_pipelines_and_gradients_work_on_a_prepared_model() -> None:
    model, seen = load_target(), []
    model.model.layers[3].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    embeddings = torch.randn(1, 5, model.config.hidden_size, requires_grad=True)
    model(inputs_embeds=embeddings).logits[0, -1, 7].backward()
    expected, embeddings.grad = embeddings.grad, None
    prepare_target(model, engine=ENGINE)
    model(inputs_embeds=embeddings).logits[0, -1, 7].backward()
    assert torch.allclose(embeddings.grad, expected, atol=1e-5)
    assert expected.abs().max() > 0
    assert len(seen) == 2
    _, _, tokenizer = load_pair()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def add(", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].startswith("def add(")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "phi3", "mistral", "qwen2-sliding", "cohere"])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.9}])
def test_dovetail_on_a_prepared_target_is_plain_generate_on_it(family: str, sampling: dict) -> None:
    model = prepare_target(tiny.build(family), engine=ENGINE)
    assert packed_names(model)
    draft = tiny.draft_for(model, "noisy")
    draft.tree = TreeShape()
    plain, ours = tiny.both(model, draft, tiny.prompt(), max_new_tokens=24, **sampling)
    tiny.assert_same(plain, ours)
    assert 0 < draft.last_stats.accepted < draft.last_stats.drafted


def test_the_draft_follows_its_target_from_engine_to_engine() -> None:
    target, draft, tokenizer = load_pair()
    draft.draft_device, draft.tree = "cpu", TreeShape()
    inputs = tokenizer(demo_prompts()[1], return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=40, do_sample=False)
    rates = []
    for engine in ("eager", ENGINE, "eager"):
        prepare_target(target, engine=engine)
        assert torch.equal(target.generate(**inputs, max_new_tokens=40, do_sample=False, assistant_model=draft), plain)
        rates.append(draft.last_stats.tokens_per_round)
    assert min(rates) > 1.5


def test_a_target_can_draft_for_itself_while_prepared() -> None:
    target, _, tokenizer = load_pair()
    prepare_target(target, engine=ENGINE)
    draft = DovetailAssistantModel.from_causal_lm(target)
    draft.tree = TreeShape()
    inputs = tokenizer(demo_prompts()[0], return_tensors="pt")
    plain = target.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(target.generate(**inputs, max_new_tokens=24, do_sample=False, assistant_model=draft), plain)
    assert draft.last_stats.tokens_per_round > 3


@pytest.mark.parametrize(
    ("engine", "change", "message"),
    [
        ("warp", lambda model: model, "auto, eager or one of onednn"),
        (ENGINE, lambda model: model.half(), "float16, not bfloat16 or float32"),
        (ENGINE, lambda model: model.to("meta"), "on meta, not on the CPU"),
    ],
)
def test_an_engine_that_cannot_take_a_model_says_why(engine: str, change: object, message: str) -> None:
    model = change(tiny.build("llama"))
    with pytest.raises(ValueError, match=message):
        prepare_target(model, engine=engine)
    assert not packed_names(model)
    assert engine_of(prepare_target(model, "auto" if model.dtype == torch.float16 else "eager")) == "eager"


def test_a_quantised_target_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("llama")
    model.config.quantization_config = {"quant_method": "torchao"}
    with caplog.at_level("INFO", logger="hf_dovetail"):
        prepare_target(model)
    assert engine_of(model) == "eager"
    assert "quantised already" in caplog.text
    assert not packed_names(model)
    plain, ours = tiny.both(model, tiny.draft_for(model, "noisy"), tiny.prompt(), max_new_tokens=8)
    tiny.assert_same(plain, ours)


def test_a_failure_on_the_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_target()
    before, made = weights(model), []

    def failing(weight: torch.Tensor) -> onednn.OneDnnKernel | onednn.NativeKernel | None:
        made.append(weight.shape)
        if len(made) == 5:
            raise MemoryError("no memory for the fifth")
        return plain(weight)

    plain = onednn.pack
    monkeypatch.setattr(onednn, "pack", failing)
    with pytest.raises(MemoryError):
        prepare_target(model, engine=ENGINE)
    assert engine_of(model) == "eager"
    assert not packed_names(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())


_PEAK = """
import re, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hf_dovetail import prepare_target
def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.set_default_dtype(torch.bfloat16)
def llama(layers):
    heads = dict(num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=True)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, **heads)
    )
prepare_target(llama(1))  # oneDNN compiles a kernel for each number of rows, about 0.1 GB whatever the model
model = llama(14)
if len(sys.argv) > 1:  # as users load it: transformers maps the file
    model.save_pretrained(sys.argv[1])
    del model
    model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
    [float(p.sum()) for p in model.parameters()]  # every page is in memory
size, before = sum(p.nbytes for p in model.parameters()), status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
prepare_target(model)
print(size, status("VmRSS") - before, status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("loaded", [False, True])
def test_memory_never_holds_two_copies_of_the_weights(loaded: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PEAK, *([str(tmp_path)] if loaded else [])]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    size, kept, peak = (int(word) for word in output.split()[-3:])
    assert size > 300 << 20
    assert kept <= peak
    assert peak < 0.15 * size
