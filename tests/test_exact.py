"""Exact attention: what a row gets has the bits that it would have alone, so trees are verified bit for bit."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from trees import PARENTS, tree_mask

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare_target, restore_target
from hf_dovetail.demo import load_pair
from hf_dovetail.engines import activations, native, norms
from hf_dovetail.engines.exact import exact_attention
from hf_dovetail.grouped import NAME, grouped_attention

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
SIZES = (
    (1, 8, 2, 5, 77, 64),
    (2, 6, 6, 1, 33, 31),
    (1, 4, 1, 16, 300, 128),
    (3, 9, 3, 17, 129, 80),
    (1, 2, 2, 33, 40, 8),
)


def states(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the layouts in which a model hands them over."""
    batch, heads, groups, rows, keys, width = sizes
    torch.manual_seed(sum(sizes))
    query = torch.randn(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(batch, groups, keys + 9, width, dtype=dtype)[:, :, :keys] for _ in range(2))
    return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True, training=False)
    return exact_attention(module, query, key, value, mask, 0.0, 0.2)[0]


def reference(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention in float64, (B, T, H, D)."""
    share = query.shape[1] // key.shape[1]
    key, value = (each.double().repeat_interleave(share, 1) for each in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * 0.2).masked_fill(~allowed, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_softmax_attention(sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float, threads: int) -> None:
    torch.set_num_threads(threads)
    batch, heads, _, rows, keys, width = sizes
    given = states(sizes, dtype)
    allowed = torch.rand(batch, 1, rows, keys) > 0.3
    allowed[..., -1] = True
    expected = reference(*given, allowed)
    found = attend(*given, allowed)
    assert found.shape == (batch, rows, heads, width)
    assert (found - expected).abs().max() < tolerance
    added = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
    assert torch.equal(attend(*given, added), found)
    assert torch.equal(attend(*given, added[:1].expand(batch, -1, -1, -1)), attend(*given, allowed[:1]))
    everything = reference(*given, torch.ones_like(allowed))
    assert (found - everything).abs().max() > 3 * tolerance
    if rows == 1:
        assert (attend(*given, None) - everything).abs().max() < tolerance


def test_extreme_scores_and_broken_numbers() -> None:
    query, key, value = states((1, 2, 1, 3, 40, 16), torch.float32)
    allowed = torch.ones(1, 1, 3, 40, dtype=torch.bool)
    huge = attend(1e4 * query, 1e3 * key, value, allowed)
    assert torch.allclose(huge, reference(1e4 * query, 1e3 * key, value, allowed).float(), atol=1e-4)
    key[0, 0, 7, 3] = float("nan")
    assert attend(query, key, value, allowed).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_is_zero_and_spoils_no_other(dtype: torch.dtype) -> None:
    """Padding on the left of a batch: it gave NaN, which the next layer's rows then read."""
    given = states((2, 4, 2, 5, 40, 16), dtype)
    allowed = torch.rand(2, 1, 5, 40) > 0.3
    allowed[0, 0, :2] = allowed[1, 0, 4] = False
    allowed[0, 0, 2:, -1] = True
    found, added = attend(*given, allowed), torch.zeros(allowed.shape, dtype=dtype)
    unseen = ~allowed.any(-1)[:, 0]
    assert unseen.sum() == 3
    assert not found[unseen].any()
    assert found[~unseen].isfinite().all()
    assert (found - reference(*given, allowed))[~unseen].abs().max() < 0.02
    added.masked_fill_(~allowed, torch.finfo(dtype).min)
    assert torch.equal(attend(*given, added), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", [3, 100, 1003, 4000])
@pytest.mark.parametrize("skipped", [0, 2], ids=["all", "padded"])
def test_a_row_has_the_bits_that_it_would_have_alone(dtype: torch.dtype, context: int, skipped: int) -> None:
    rows = len(PARENTS)
    query, key, value = states((1, 8, 2, rows, context + rows, 64), dtype)
    allowed, seen = tree_mask(context, skipped)
    together, differs = attend(query, key, value, allowed), 0
    others = grouped_attention(query, key, value, allowed, 0.2)
    for row, keys in enumerate(seen):
        one = query[:, :, row : row + 1]
        alone = attend(one, key[:, :, keys], value[:, :, keys], None)
        assert torch.equal(together[:, row], alone[:, 0])
        window = keys[-50:]  # a sliding window, which moves with the row
        near = allowed.clone()
        near[0, 0, row] = False
        near[0, 0, row, window] = True
        alone = attend(one, key[:, :, window], value[:, :, window], None)
        assert torch.equal(attend(query, key, value, near)[:, row], alone[:, 0])
        alone = grouped_attention(one, key[:, :, keys], value[:, :, keys], None, 0.2)
        differs += not torch.equal(others[:, row], alone[:, 0])
    if context > 1000 and dtype == torch.float32:  # the comparison can see it; rounding to bfloat16 hides most
        assert differs > rows // 2


def test_what_the_kernel_does_not_take_goes_the_usual_way() -> None:
    query, key, value = states((1, 4, 2, 3, 20, 16), torch.float32)
    allowed = torch.ones(1, 1, 3, 20, dtype=torch.bool)
    expected = reference(query, key, value, allowed)
    turned = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.allclose(attend(query, turned, value, allowed), expected.float(), atol=1e-5)
    half = attend(query.half(), key.half(), value.half(), allowed)
    assert half.dtype == torch.float16
    assert torch.allclose(half.double(), expected, atol=0.01)
    query.requires_grad_()
    attend(query, key, value, allowed).sum().backward()
    assert query.grad.abs().sum() > 0


@pytest.mark.parametrize("name", sorted(activations._GATES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.02)])
def test_activations_do_not_depend_on_the_place(name: str, dtype: torch.dtype, tolerance: float) -> None:
    own, model = ACT2FN[name], torch.nn.Sequential(ACT2FN[name])
    values = torch.cat((torch.randn(17, 3001) * 4, torch.tensor([0.0, -0.0, 1e4, -1e4, 88.0, -90.0]).expand(17, -1)), 1)
    values = values.to(dtype)
    activations.switch_on(model)
    found = model(values)
    assert (found - own(values.double())).abs().max() < tolerance
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for begin, end in ((0, 1), (3, 4), (5, 12), (0, 17)):
            assert torch.equal(model(values[begin:end]), found[begin:end])
            assert torch.equal(model(values[begin:end, 7:2001]), found[begin:end, 7:2001])
    assert torch.equal(model(values[None, :, ::2]), found[None, :, ::2])
    assert model(torch.full((2, 5), float("nan"), dtype=dtype)).isnan().all()
    assert model(values[:0]).shape == (0, values.shape[1])
    assert torch.equal(model(values.half()), own(values.half()))
    values.requires_grad_()
    model(values).sum().backward()
    assert values.grad.abs().sum() > 0
    activations.switch_off(model)
    assert torch.equal(model(values), own(values))
    assert "forward" not in vars(model[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.0)])
@pytest.mark.parametrize("width", [1, 64, 192, 2049])
def test_norms_are_transformers_and_rows_are_alone(width: int, dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 nearly all bits are transformers' own; those that are not differ by one rounding of the scale."""
    norm = Qwen3RMSNorm(width, eps=1e-6).to(dtype)
    rows = (torch.randn(70, width) * torch.logspace(-4, 4, 70)[:, None]).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.5 * torch.randn(width))
        expected = norm(rows)
        norms.switch_on(norm)
        assert "forward" in vars(norm)
        found = norm(rows)
        close = (found - expected).abs() <= tolerance * expected.abs()
        assert close.all() if tolerance else close.float().mean() > 0.99
        torch.testing.assert_close(found, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.0)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for begin, end in ((0, 1), (3, 4), (5, 12), (0, 70)):
                assert torch.equal(norm(rows[None, begin:end])[0], found[begin:end])
        assert torch.equal(norm(rows.repeat(1, 3)[:, width : 2 * width]), found)
        assert norm(torch.full((2, width), float("nan"), dtype=dtype)).isnan().all()
        assert norm(rows[:0]).shape == (0, width)
        assert torch.equal(norm(rows.double()), type(norm).forward(norm, rows.double()))
    rows.requires_grad_()
    norm(rows).sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    norms.switch_off(norm)
    assert "forward" not in vars(norm)


@pytest.mark.parametrize(("family", "taken"), [("llama", 7), ("qwen3", 9), ("gemma2", 0), ("gpt2", 0)])
def test_only_norms_that_compute_what_llamas_do_run_on_the_kernel(family: str, taken: int) -> None:
    """Guards Gemma's (1 + weight), and LayerNorm; two layers have four norms, or eight with those of the heads."""
    model = prepare_target(tiny.build(family), engine="onednn")
    found = [name for name, part in model.named_modules() if "norm" in name and "forward" in vars(part)]
    assert len(found) == taken, found
    restore_target(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_prepared_models_activations_survive_a_copy_and_leave_with_the_engine() -> None:
    target = prepare_target(tiny.build("llama"), engine="onednn")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(target)))
    assert torch.equal(twin(tiny.prompt()).logits, target(tiny.prompt()).logits)
    assert all("forward" in vars(layer.mlp.act_fn) for model in (target, twin) for layer in model.model.layers)
    restore_target(target)
    assert not any("forward" in vars(module) for module in target.modules())


def assert_same_bits(target: PreTrainedModel, draft: DovetailAssistantModel, prompt: Tensor) -> None:
    """Tokens, scores and logits of an answer are plain generate's, bit for bit, greedy and sampled."""
    for options in ({}, {"do_sample": True}):
        plain, ours = (tiny.run(target, prompt, model, max_new_tokens=40, **options) for model in (None, draft))
        assert torch.equal(plain.sequences, ours.sequences)
        assert torch.equal(torch.cat(plain.logits), torch.cat(ours.logits))
        assert torch.equal(torch.cat(plain.scores), torch.cat(ours.scores))
        assert 0 < draft.last_stats.accepted < draft.last_stats.drafted


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2", "cohere2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answers_logits_are_plain_generates_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    target = prepare_target(tiny.build(family).to(dtype), engine="onednn")
    assert target.config._attn_implementation == NAME
    draft = tiny.draft_for(tiny.build(family).to(dtype), "noisy")
    draft.tree = TreeShape(nodes=9, depth=4, top_k=3)
    assert_same_bits(target, draft, tiny.prompt())


@pytest.mark.parametrize("engine", ["onednn", "int8", "int4"])
def test_the_same_on_the_demo_pair_with_a_long_context(engine: str) -> None:
    target, draft, tokenizer = load_pair(torch.bfloat16)
    draft.draft_device = "cpu"
    text = tokenizer((__doc__ + test_it_is_softmax_attention.__name__) * 25, return_tensors="pt").input_ids[:, :800]
    prepare_target(target, engine=engine)
    assert_same_bits(target, draft, text)
