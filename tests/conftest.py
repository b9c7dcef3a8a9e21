"""Fixtures: tiny targets (made once per session), drafts for them, the demo's target and text to train on, and the real
models beside the repository."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny models are slower on more, and others run beside
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: no test may need the hub

import pytest
import tiny
import torch
from torch import Tensor
from training import load_target, load_tokenizer, python_windows
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from two_devices import Accelerator

import hf_dovetail
from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.train import Windows

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT.parent / "shared" / "models"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Whatever the test before has set."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `gpu` use an accelerator; the others mean the CPU, on every machine."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that fails would go unnoticed otherwise: the answers stay the same."""
    monkeypatch.setattr(DovetailAssistantModel, "strict", True)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package keeps what it measured, in the test's own folder and not in the user's."""
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hf_dovetail"


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """Makes the tiny model of a family, once."""
    return cache(tiny.build)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny Llama that a test may change."""
    return tiny.build("llama")


@pytest.fixture
def noisy(llama: PreTrainedModel) -> DovetailAssistantModel:
    """A draft that `llama` accepts often, not always."""
    return tiny.draft_for(llama, "noisy")


@pytest.fixture
def untrained(llama: PreTrainedModel) -> DovetailAssistantModel:
    """A new DGF draft for `llama`, nearly always rejected."""
    return tiny.draft_for(llama, "untrained")


@pytest.fixture
def ids() -> Tensor:
    """A prompt for the tiny models."""
    return tiny.prompt()


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    """The demo's target, for which drafts are trained."""
    return load_target()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return load_tokenizer()


@pytest.fixture(scope="module")
def windows() -> Windows:
    """Text to train on."""
    return python_windows()


def _real(name: str) -> Path:
    folder = MODELS / name
    if not (folder / "config.json").exists():
        pytest.skip(f"the real model {name} is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def real_target() -> PreTrainedModel:
    """The babyllama of shared/models that writes stories."""
    return AutoModelForCausalLM.from_pretrained(_real("babyllama-tok361as105"), dtype=torch.float32)


@pytest.fixture(scope="session")
def real_tokenizer() -> PreTrainedTokenizerBase:
    """Its tokenizer."""
    return AutoTokenizer.from_pretrained(_real("babyllama-tok361as105"))


@pytest.fixture(scope="session")
def real_draft() -> DovetailAssistantModel:
    """Another babyllama of the same vocabulary, as a draft."""
    lm = AutoModelForCausalLM.from_pretrained(_real("babyllama-tok105"), dtype=torch.float32)
    draft = DovetailAssistantModel.from_causal_lm(lm)
    draft.draft_device, draft.tree = "cpu", TreeShape()
    return draft


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """A simulated second device, there inside `with accelerator:`."""
    simulated = Accelerator()
    simulated.install(monkeypatch)
    return simulated


@pytest.fixture
def unregistered() -> Iterator[None]:
    """transformers as it is without hf_dovetail; registered again afterwards."""
    hf_dovetail.unregister()
    try:
        yield
    finally:
        hf_dovetail.register()
