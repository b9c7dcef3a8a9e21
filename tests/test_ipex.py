"""The ipex engine: refusals anywhere; its kernels, its undo and Dovetail on top where IPEX is installed."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_dovetail.cli import main
from hf_dovetail.demo import demo_prompts, load_pair, pair_path
from hf_dovetail.engines import ENGINES, ipex, onednn
from hf_dovetail.packed import PackedWeight

PRECISIONS = (torch.float32, *(torch.bfloat16,) * onednn.has_bf16())
ROOT = Path(__file__).resolve().parent.parent

needs_ipex = pytest.mark.skipif(
    find_spec(ipex.PACKAGE) is None, reason=f"Intel Extension for PyTorch is not installed ({ipex.INSTALL})"
)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the bytes of everything in the state dict."""
    return {name: t.detach().clone().contiguous().view(torch.uint8) for name, t in model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def packed(model: nn.Module) -> list[str]:
    """Names of the weights that IPEX holds."""
    return [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, PackedWeight) and isinstance(parameter.kernel, ipex.IpexKernel)
    ]


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids).logits


def test_bfloat16_needs_a_cpu_with_its_products(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards users of AVX2 CPUs, where the native kernels let `onednn` take what IPEX cannot."""
    monkeypatch.setattr(onednn, "has_bf16", lambda: False)
    monkeypatch.setattr(onednn.native, "multiplies_bf16", lambda: True)
    assert "no bfloat16 for this CPU" in ipex.why_not(copy.deepcopy(llama).bfloat16())
    assert "no bfloat16" not in str(ipex.why_not(llama))


def test_without_ipex_the_reason_names_the_extra(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "find_spec", lambda name: None)
    reason = ipex.why_not(llama)
    assert 'pip install "hf_dovetail[ipex]"' in reason
    assert "torch 2.8" in reason


def test_another_torch_is_named(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipex, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    reason = ipex.why_not(llama)
    assert "needs torch 2.8, and this is 2.13.0+cpu" in reason
    assert "hf_dovetail[ipex]" in reason
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert ipex.why_not(llama) is None


def test_half_precision_is_refused(llama: PreTrainedModel) -> None:
    assert "float16" in ipex.why_not(llama.half())


def test_an_ipex_that_cannot_be_imported(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPEX leaves the interpreter on machines that it does not like."""
    monkeypatch.setattr(ipex, "PACKAGE", "ipex_that_exits")
    monkeypatch.setattr(ipex.importlib, "import_module", lambda name: sys.exit("no AVX2"))
    with pytest.raises(ValueError, match=r'cannot be imported: no AVX2; install it again .*engine="auto"'):
        ipex.prepare(llama)
    assert not packed(llama)


def test_a_broken_ipex_ends_the_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a traceback where an installation is broken, of which `why_not` cannot know."""
    (tmp_path / "broken_ipex.py").write_text("raise ImportError('undefined symbol: libtorch')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ipex, "PACKAGE", "broken_ipex")
    monkeypatch.setitem(ENGINES, "ipex", replace(ENGINES["ipex"], why_not=lambda model: None))
    models = ["--target", str(pair_path("target")), "--draft", str(pair_path("draft"))]
    assert main(["generate", "def f(", *models, "--engine", "ipex"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-dovetail: Intel Extension for PyTorch is installed and cannot be imported: undefined")
    assert error.endswith('or take engine="auto"')


def test_asking_imports_nothing_of_ipex() -> None:
    code = (
        "import sys, tiny; from hf_dovetail.engines import ipex\n"
        "ipex.why_not(tiny.build('llama')); assert ipex.PACKAGE not in sys.modules"
    )
    path = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\n"
    subprocess.run([sys.executable, "-c", path + code], check=True)


@needs_ipex
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_undo_is_bit_for_bit(llama: PreTrainedModel, ids: Tensor, dtype: torch.dtype) -> None:
    llama.to(dtype)
    eager = logits(llama, ids)
    odd = llama.model.layers[0].mlp.up_proj.weight.data.view(torch.uint8)
    odd[:8] = torch.arange(odd[:8].numel()).view(odd[:8].shape).to(torch.uint8)  # not-a-number, denormals, -0
    odd[8:10] = 255
    before, parameters = bits(llama), list(llama.parameters())
    swap = ipex.prepare(llama)
    assert len(packed(llama)) == 3 * 7 + 1
    assert_same_bits(bits(llama), before)  # the state dict is the plain model's
    swap.undo()
    assert not packed(llama)
    assert_same_bits(bits(llama), before)
    assert all(a is b for a, b in zip(llama.parameters(), parameters, strict=True))
    swap.undo()  # nothing left to do
    assert_same_bits(bits(llama), before)
    assert not torch.equal(logits(llama, ids), eager)  # the odd bits were really there


@needs_ipex
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with bias
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_kernels_are_those_of_ipex_optimize(family: str, ids: Tensor, dtype: torch.dtype) -> None:
    model, twin = tiny.build(family).to(dtype), tiny.build(family).to(dtype)
    eager = logits(model, ids)
    ipex.prepare(model)
    import intel_extension_for_pytorch

    twin = intel_extension_for_pytorch.optimize(twin, inplace=True, auto_kernel_selection=True)
    found = logits(model, ids)
    assert torch.equal(found, logits(twin, ids))
    tolerance = 1e-4 if dtype is torch.float32 else 0.3  # of logits that reach 20
    torch.testing.assert_close(found, eager, rtol=0, atol=tolerance)


@needs_ipex
@pytest.mark.parametrize("dtype", PRECISIONS)
@torch.no_grad()
def test_rows_bias_and_lookup(dtype: torch.dtype) -> None:
    """The plain layer's results for any number of rows, and its rows; most sizes fit no block."""
    ipex._load_operators()
    torch.manual_seed(0)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.1}
    for inputs, outputs in ((256, 640), (36, 101), (5, 7), (1, 3)):
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        rows, kept = torch.randn(2, 16, inputs).to(dtype), bias.clone()
        kernel = ipex.IpexKernel(weight)
        assert kernel.has_rows
        assert torch.equal(kernel.dense(), weight)
        assert torch.equal(kernel.lookup(torch.arange(outputs)[None]), weight[None])
        for added in (None, bias):
            expected = F.linear(rows, weight, added)
            torch.testing.assert_close(kernel.linear(rows, added), expected, **tolerance)
            for count in (1, 2, 3, 16):
                found = kernel.linear(rows[0, :count], added)
                torch.testing.assert_close(found, expected[0, :count], **tolerance)
        assert torch.equal(bias, kept)


@needs_ipex
def test_a_layout_that_is_not_known_has_no_rows() -> None:
    ipex._load_operators()
    weight = torch.randn(101, 36)
    right = ipex.IpexKernel(weight)._context.get_weight()
    assert ipex._has_known_layout(right, weight)
    assert not ipex._has_known_layout(right.flip(1).contiguous(), weight)
    assert not ipex._has_known_layout(right[:1].contiguous(), weight)
    assert not ipex._has_known_layout(weight, weight)


@needs_ipex
def test_generate_and_dovetail_on_a_prepared_target() -> None:
    target, draft, tokenizer = load_pair(torch.float32)
    draft.draft_device = "cpu"
    options = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for prompt in demo_prompts()[:2]:
        inputs = tokenizer(prompt, return_tensors="pt")
        eager = target.generate(**inputs, **options)
        swap = ipex.prepare(target)
        plain = target.generate(**inputs, **options)
        ours = target.generate(**inputs, assistant_model=draft, **options)
        tiny.assert_same(eager, plain)
        tiny.assert_same(plain, ours)
        assert draft.last_stats.tokens_per_round > 2  # trees were verified, and the draft has the right LM head
        swap.undo()
        assert torch.equal(torch.cat(target.generate(**inputs, **options).logits), torch.cat(eager.logits))


@needs_ipex
@pytest.mark.parametrize("kind", tiny.DRAFTS)
def test_random_targets_and_drafts(llama: PreTrainedModel, ids: Tensor, kind: str) -> None:
    draft = tiny.draft_for(llama, kind)
    ipex.prepare(llama)
    tiny.both(llama, draft, ids)
    tiny.both(llama, draft, ids, do_sample=True, temperature=0.8)


@needs_ipex
def test_a_second_prepare(llama: PreTrainedModel, ids: Tensor) -> None:
    eager, swap = logits(llama, ids), ipex.prepare(llama)
    first = logits(llama, ids)
    swap.undo()
    assert torch.equal(logits(llama, ids), eager)
    again = ipex.prepare(llama)
    assert torch.equal(logits(llama, ids), first)
    again.undo()
    assert torch.equal(logits(llama, ids), eager)


@needs_ipex
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_tied_weights_stay_one_matrix(ids: Tensor, dtype: torch.dtype) -> None:
    model = tiny.build("llama", tie_word_embeddings=True).to(dtype)
    eager = logits(model, ids)
    swap = ipex.prepare(model)
    assert len(packed(model)) == 3 * 7 + 1  # parameters are listed once: the head is the embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.get_input_embeddings()(ids), model.state_dict()["lm_head.weight"][ids])
    torch.testing.assert_close(logits(model, ids), eager, rtol=0, atol=2e-4 if dtype is torch.float32 else 0.3)
    swap.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model, ids), eager)


@needs_ipex
def test_the_import_leaves_logging_and_threads_alone() -> None:
    """In a process of its own: IPEX replaces the logger class and adds a root handler when it is imported."""
    code = (
        "import logging, sys, torch; from hf_dovetail.engines import ipex; torch.set_num_threads(1)\n"
        "def state(): return logging.getLoggerClass(), list(logging.root.handlers), logging.root.level, "
        "torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_float32_matmul_precision()\n"
        "before = state(); ipex._load_operators(); assert state() == before; assert ipex.PACKAGE in sys.modules"
    )
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    subprocess.run([sys.executable, "-c", path + code], check=True)
