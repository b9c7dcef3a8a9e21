"""Engines with 8 and 4 bits: exact integer sums, rows that do not see each other, weights that come back from disk."""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from texts import humaneval_prompts
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_dovetail import TreeShape, prepare_target, restore_target
from hf_dovetail.demo import load_pair, pair_path
from hf_dovetail.engines import engine_of, int4, int8, native, onednn, quantised
from hf_dovetail.packed import PackedWeight

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((192, 192), (512, 192), (192, 512), (3, 5), (33, 70), (2048, 1024), (512, 4096))
reason = int8.why_not(tiny.build("llama"))
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


no_native = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
onednn_adds_exactly = pytest.mark.skipif(not int8._adds_exactly(), reason="oneDNN's 8-bit sums overflow on this CPU")
MATRICES = [
    pytest.param(lambda: int8.Int8Matrix(int8.OneDnnInt8), id="int8 by oneDNN", marks=onednn_adds_exactly),
    pytest.param(lambda: int8.Int8Matrix(native.NativeInt8), id="int8", marks=no_native),
    pytest.param(int4.Int4Matrix, id="int4", marks=no_native),
]
ENGINES = ["int8", pytest.param("int4", marks=no_native)]
each_matrix = pytest.mark.parametrize("matrix", MATRICES)
each_engine = pytest.mark.parametrize("engine", ENGINES)
Matrix = Callable[[], quantised.StackedMatrix]


def best_matrix() -> int8.Int8Matrix:
    """As `prepare_target` makes it here."""
    return int8.Int8Matrix(native.NativeInt8 if int8._native_why_not() is None else int8.OneDnnInt8)


def kernel(weight: torch.Tensor, matrix: Matrix = best_matrix) -> quantised.QuantisedKernel:
    return quantised.QuantisedKernel("weight", weight, matrix())


def siblings(new_matrix: Matrix = best_matrix, count: int = 3) -> list[quantised.QuantisedKernel]:
    matrix = new_matrix()
    weights = torch.randn(count, 24, 16, generator=torch.Generator().manual_seed(1))
    return [quantised.QuantisedKernel(f"weight{index}", weight, matrix) for index, weight in enumerate(weights)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_matrix
def test_products_are_those_of_the_quantised_numbers(
    shape: tuple[int, int], dtype: torch.dtype, matrix: Matrix
) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(shape).to(dtype), torch.randn(2, 5, shape[1]).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    packed = kernel(weight, matrix)
    levels, magnitudes = int8.quantise(rows.view(10, -1))
    quantised = (levels.double() - 128) / 127 * magnitudes.double()
    expected = (quantised @ packed.matrix.dense(0).double().T + bias.double()).view(2, 5, -1)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(packed.linear(rows, bias).double(), expected, **tolerance)
    assert packed.linear(rows, bias).dtype == dtype
    steps = (
        127 if isinstance(packed.matrix, int8.Int8Matrix) else 5
    )  # a group of 4 bits keeps at least 0.8 of its range
    torch.testing.assert_close(packed.dense().float(), weight.float(), rtol=0, atol=float(weight.abs().max()) / steps)
    assert not torch.equal(packed.dense(), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@each_matrix
def test_a_row_does_not_see_the_others(shape: tuple[int, int], dtype: torch.dtype, matrix: Matrix) -> None:
    torch.manual_seed(0)
    packed, rows = kernel(torch.randn(shape).to(dtype), matrix), torch.randn(140, shape[1]).to(dtype)
    rows[7] *= 1000  # a scale for all rows would leave the others few levels
    together = packed.linear(rows, None)
    for count in (*range(1, 34), 61, 121):
        assert torch.equal(packed.linear(rows[5 : 5 + count], None), together[5 : 5 + count])
    assert not torch.equal(together[5], together[6])


@pytest.mark.parametrize("dtype", DTYPES)
@each_matrix
def test_zero_rows_zero_weights_and_broken_rows(dtype: torch.dtype, matrix: Matrix) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(16, 32).to(dtype), torch.randn(6, 32).to(dtype)
    weight[3], rows[1] = 0, 0
    rows[2, 4], rows[3, 5], rows[4] = float("nan"), float("inf"), rows[4] * 1e-20
    packed = kernel(weight, matrix)
    found = packed.linear(rows, None)
    assert not found[:, 3][[0, 1, 4, 5]].any()
    assert not packed.dense()[3].any()
    assert not found[1].any()
    assert found[0].any()
    assert found[2].isnan().all()
    assert not found[3].isfinite().any()
    expected = (rows.float() @ weight.float().T)[[0, 4, 5]]
    close = 0.03 if isinstance(packed.matrix, int8.Int8Matrix) else 0.2
    assert ((found[[0, 4, 5]].float() - expected).norm(dim=1) < close * expected.norm(dim=1)).all()
    assert torch.equal(found[5], packed.linear(rows[5:], None)[0])
    assert packed.linear(rows[:0], None).shape == (0, 16)


@each_matrix
def test_siblings_share_one_product_and_never_an_old_one(matrix: Matrix, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = siblings(matrix)
    alone = [kernel(each.dense(), matrix) for each in (first, second, third)]
    calls = []
    stack = type(first.matrix)
    product = stack.product
    monkeypatch.setattr(stack, "product", lambda self, rows: calls.append(rows) or product(self, rows))
    rows = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    parts = [each.linear(rows, None) for each in (first, second, third)]
    assert len(calls) == 1
    for part, each in zip(parts, alone, strict=True):
        torch.testing.assert_close(part, each.linear(rows, None), rtol=1e-2, atol=5e-2)
    kept = parts[0].clone()
    assert torch.equal(first.linear(rows, None).zero_(), torch.zeros_like(kept))  # the taker may overwrite its part
    assert torch.equal(first.linear(rows, None), kept)
    rows.mul_(-1)  # between two siblings
    assert torch.equal(second.linear(rows, None), -parts[1])
    assert torch.equal(third.linear(rows, None), -parts[2])
    assert torch.equal(third.linear(rows * -1, None), parts[2])
    with torch.inference_mode():  # whose tensors do not count their changes
        rows = rows.clone()
        first.linear(rows, None)
        rows.mul_(-1)
        assert torch.equal(second.linear(rows, None), parts[1])


def test_a_shared_product_lives_no_longer_than_its_input_and_belongs_to_its_thread() -> None:
    first, second, _ = siblings()
    rows = torch.randn(4, 16)
    expected = second.linear(rows, None)
    first.linear(rows, None)
    found = []
    other = threading.Thread(target=lambda same=rows: found.append(second.linear(same, None)))
    other.start()
    other.join()
    assert torch.equal(found[0], expected)
    first.linear(rows, None)
    assert quantised._thread.pending is not None
    del rows, other
    gc.collect()
    assert quantised._thread.pending is None


@pytest.mark.parametrize("dtype", DTYPES)
@each_engine
def test_dovetail_gives_plain_decodings_text(dtype: torch.dtype, engine: str) -> None:
    """Linear layers are exact in the number of rows, attention is not: a level that rounds the other way may end in
    another token at a near tie."""
    target, draft, tokenizer = load_pair(dtype)
    before = target(**tokenizer("def f(", return_tensors="pt")).logits
    assert prepare_target(target, engine=engine) is target
    assert engine_of(target) == engine
    assert not torch.equal(target(**tokenizer("def f(", return_tensors="pt")).logits, before)
    draft.tree = TreeShape()
    for prompt in humaneval_prompts()[:6]:
        inputs = tokenizer(prompt, return_tensors="pt")
        plain = target.generate(**inputs, max_new_tokens=40, do_sample=False)
        assert torch.equal(plain, target.generate(**inputs, max_new_tokens=40, do_sample=False))
        ours = target.generate(**inputs, assistant_model=draft, max_new_tokens=40, do_sample=False)
        assert draft.last_stats.accepted > 0
        if not torch.equal(plain, ours):
            assert parting_gap(target, plain[0], ours[0]) < 0.05


@torch.no_grad()
def parting_gap(target: PreTrainedModel, plain: torch.Tensor, ours: torch.Tensor) -> float:
    """How far apart two answers' first different tokens are in the target's logits, in spreads of the logits."""
    first = int((plain != ours).nonzero()[0])
    logits = target(plain[None, :first]).logits[0, -1].float()
    return float((logits[plain[first]] - logits[ours[first]]).abs() / (logits.max() - logits.mean()))


@each_engine
def test_head_ties_and_routers_keep_their_precision(engine: str) -> None:
    target, _, _ = load_pair(torch.bfloat16)
    prepare_target(target, engine=engine)
    kernels = {name: p.kernel for name, p in target.named_parameters() if isinstance(p, PackedWeight)}
    assert isinstance(kernels.pop("model.embed_tokens.weight"), onednn.OneDnnKernel | onednn.NativeKernel)
    assert target.lm_head.weight is target.model.embed_tokens.weight
    assert len(kernels) == 56
    assert all(isinstance(each, quantised.QuantisedKernel) for each in kernels.values())
    layer = target.model.layers[3]
    matrices = {p.kernel.matrix for p in (layer.self_attn.q_proj.weight, layer.self_attn.v_proj.weight)}
    assert len(matrices) == 1
    assert layer.mlp.up_proj.weight.kernel.matrix not in matrices


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3", "granite"])
@each_engine
def test_families_stay_close_to_themselves(family: str, engine: str) -> None:
    model = tiny.build(family)
    ids = tiny.prompt(20)
    with torch.no_grad():
        before = model(ids).logits
        prepare_target(model, engine=engine)
        after = model(ids).logits
    assert 0 < (after - before).norm() < (0.2 if engine == "int8" else 0.6) * before.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@each_engine
def test_weights_come_back_from_the_checkpoint(dtype: torch.dtype, engine: str, tmp_path: Path) -> None:
    load_pair(dtype)[0].save_pretrained(tmp_path)
    target = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for _ in range(2):
        prepare_target(target, engine=engine)
        for copied in (target.state_dict, lambda: copy.deepcopy(target), lambda: pickle.dumps(target)):
            with pytest.raises(RuntimeError, match="quantised"):
                copied()
        restore_target(target)
        assert engine_of(target) == "eager"
        after = target.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(isinstance(parameter, PackedWeight) for parameter in target.parameters())
        assert target.lm_head.weight is target.model.embed_tokens.weight


def _in_memory(folder: Path) -> torch.nn.Module:
    return tiny.build("llama")


def _files_gone(folder: Path) -> torch.nn.Module:
    load_pair()[0].save_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    return target


def _changed_since(folder: Path) -> torch.nn.Module:
    target = AutoModelForCausalLM.from_pretrained(pair_path("target"))
    weight = target.model.layers[2].mlp.up_proj.weight.data
    weight[1, 2] += 1e-3
    return target


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_in_memory, "built in memory.*; build it again, or save it"),
        (_files_gone, "no longer be read"),
        (_changed_since, "layers.2.mlp.up_proj"),
    ],
)
def test_what_cannot_come_back_is_refused_and_goes_on_working(make, message: str, tmp_path: Path) -> None:
    model = make(tmp_path)
    prepare_target(model, engine="int8")
    ids = tiny.prompt()
    before = model(ids).logits
    with pytest.raises(RuntimeError, match=message):
        restore_target(model)
    assert engine_of(model) == "int8"
    assert torch.equal(model(ids).logits, before)


@each_engine
def test_never_chosen_unasked_and_refuses_what_it_cannot_do(engine: str) -> None:
    model = prepare_target(tiny.build("llama"))
    assert engine_of(model) != engine
    with pytest.raises(ValueError, match="float64"):
        prepare_target(tiny.build("llama").double(), engine=engine)
    with pytest.raises(ValueError, match=r"no nn\.Linear layers"):
        prepare_target(tiny.build("gpt2"), engine=engine)
    with pytest.raises(ValueError, match=r"; expected one of auto, eager, onednn(, ipex)?$"):
        prepare_target(tiny.build("gpt2"), engine=engine)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (48, 32)


@each_engine
def test_weights_that_are_not_finite_keep_their_precision(engine: str) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    prepare_target(model, engine=engine)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight.kernel, onednn.OneDnnKernel | onednn.NativeKernel)
    assert isinstance(model.model.layers[0].mlp.gate_proj.weight.kernel, quantised.QuantisedKernel)
