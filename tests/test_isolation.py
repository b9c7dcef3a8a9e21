"""Nothing of the user's objects changes, also after an exception; everyone else's generate stays as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from observers import snapshot
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel

import hf_dovetail
from hf_dovetail import DovetailAssistantModel

ROOT = Path(hf_dovetail.__file__).resolve().parent.parent


class Bomb:
    """A logits processor that raises in its n-th call: in the middle of a round, while nodes are being accepted."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, prefix: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("boom")
        return scores


@pytest.mark.parametrize("kind", tiny.DRAFTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_call_changes_nothing_but_the_drafts_statistics(family: str, kind: str, ids: Tensor) -> None:
    target = tiny.build(family)
    draft = tiny.draft_for(target, kind)
    user = GenerationConfig(max_new_tokens=20, do_sample=True, temperature=0.9, eos_token_id=3, pad_token_id=0)
    before = [snapshot(target), snapshot(draft), copy.deepcopy(user.to_dict()), ids.clone()]
    target.generate(ids, generation_config=user, assistant_model=draft)
    assert snapshot(target) == before[0]
    assert snapshot(draft) == before[1]
    assert user.to_dict() == before[2]
    assert torch.equal(ids, before[3])
    assert draft.last_stats.rounds > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["noisy", "untrained"])
def test_an_exception_in_the_middle_leaves_no_trace(
    kind: str, error: type[BaseException], llama: PreTrainedModel, ids: Tensor
) -> None:
    """Guards hooks, grad mode and half-filled caches after an error or Ctrl-C; the next call works and is right."""
    draft = tiny.draft_for(llama, kind)
    before = snapshot(llama), snapshot(draft)
    for at in (1, 2, 7, 12):
        bomb, cache = Bomb(error, at), DynamicCache(config=llama.config)
        with pytest.raises(error, match="boom"):
            tiny.run(llama, ids, draft, past_key_values=cache, logits_processor=LogitsProcessorList([bomb]))
        assert bomb.calls == at
        assert (snapshot(llama), snapshot(draft)) == before
        tiny.both(llama, draft, ids)
    assert draft.last_stats.accepted > 0


def test_a_training_target_stays_in_training(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    """Guards `eval()` called on the user's model; plain generate does not call it either."""
    llama.train()
    before = snapshot(llama)
    tiny.both(llama, noisy, ids)
    assert snapshot(llama) == before
    assert llama.training


@pytest.mark.parametrize("training", [False, True])
def test_wrapping_a_model_as_a_draft_leaves_it_as_it_is(training: bool, llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards `from_causal_lm`: the model is the user's, who may be training it; refusing is fine, eval() is not."""
    lm, refusal = tiny.perturbed(llama, 0.1).train(training), None
    before = snapshot(lm)
    try:
        draft = DovetailAssistantModel.from_causal_lm(lm)
        draft.draft_device = "cpu"
        tiny.both(llama, draft, ids)
    except ValueError as error:
        refusal = str(error)
    assert snapshot(lm) == before
    assert refusal is None or (training and "eval()" in refusal)


def others(ids: Tensor, target: PreTrainedModel) -> list[Any]:
    """Ways to generate that have nothing to do with Dovetail, each on fresh objects."""
    runs: list[Callable[[PreTrainedModel], Any]] = [
        lambda model: tiny.run(model, ids),
        lambda model: tiny.run(model, ids, do_sample=True),
        lambda model: tiny.run(model, ids, assistant_model=tiny.perturbed(target, 0.1)),
        lambda model: tiny.run(model, ids, assistant_model=tiny.perturbed(target, 0.1), do_sample=True),
        lambda model: tiny.run(model, ids, prompt_lookup_num_tokens=3),
        lambda model: tiny.run(model, ids, num_beams=3),
        lambda model: tiny.run(model, ids.repeat(2, 1), do_sample=True),
    ]
    return [run(copy.deepcopy(target)) for run in runs]


def test_other_ways_to_generate_are_untouched(llama: PreTrainedModel, ids: Tensor) -> None:
    """Guards the routing: stock assistants, prompt lookup, beams and plain generate never reach Dovetail's code."""
    registered = others(ids, llama)
    hf_dovetail.unregister()
    try:
        stock = others(ids, llama)
    finally:
        hf_dovetail.register()
    for one, two in zip(registered, stock, strict=True):
        assert torch.equal(one.sequences, two.sequences)
        assert torch.equal(torch.cat(one.scores), torch.cat(two.scores))
    assert registered[0].sequences.tolist() != registered[1].sequences.tolist()


def test_registering_twice_is_registering_once(
    llama: PreTrainedModel, noisy: DovetailAssistantModel, ids: Tensor
) -> None:
    hf_dovetail.register(), hf_dovetail.register()
    tiny.both(llama, noisy, ids)
    hf_dovetail.unregister(), hf_dovetail.unregister()
    try:
        from transformers import AutoConfig, GenerationMixin

        assert not hasattr(GenerationMixin._assisted_decoding, "__wrapped__") or "hf_dovetail" not in repr(
            GenerationMixin._assisted_decoding.__code__
        )
        with pytest.raises(ValueError, match="dovetail"):
            AutoConfig.for_model("dovetail")
    finally:
        hf_dovetail.register()
    tiny.both(llama, noisy, ids)
    assert noisy.last_stats.accepted > 0


def in_python(code: str, *args: str) -> str:
    """Run code in a fresh interpreter; an assertion that fails there fails here."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_costs_nothing_and_unregistering_cleans_up() -> None:
    """Guards the import time: neither torch nor transformers nor an optional package is imported."""
    in_python(
        "import sys; before = list(sys.meta_path)\n"
        "import hf_dovetail\n"
        "heavy = ('torch', 'transformers', 'numpy', 'torchao', 'matplotlib', 'datasets')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
        "assert sys.meta_path != before\n"
        "hf_dovetail.unregister(); assert sys.meta_path == before\n"
        "hf_dovetail.unregister(); assert sys.meta_path == before\n"
        "hf_dovetail.register(); hf_dovetail.register(); assert len(sys.meta_path) == len(before) + 1\n"
        "from transformers import GenerationMixin\n"
        "assert 'hf_dovetail' in GenerationMixin._assisted_decoding.__code__.co_filename\n"
        "optional = ('intel_extension_for_pytorch', 'torchao', 'matplotlib', 'datasets')\n"
        "assert not [name for name in optional if name in sys.modules]\n"
    )


def test_unregistering_restores_transformers_by_identity() -> None:
    """Guards `unregister` when transformers came first: the very same objects are back."""
    in_python(
        "from transformers import GenerationMixin, AutoModelForCausalLM, CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING\n"
        "import sys; path, attributes = list(sys.meta_path), dict(vars(GenerationMixin))\n"
        "contents = [dict(m._extra_content) for m in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)]\n"
        "import transformers.pipelines.base as pipelines; load = pipelines.load_assistant_model\n"
        "import hf_dovetail\n"
        "for _ in range(2):\n"
        "    changed = {k for k, v in vars(GenerationMixin).items() if v is not attributes.get(k)}\n"
        "    assert changed == {'_assisted_decoding', '_validate_generation_mode'}, changed\n"
        "    assert 'dovetail' in CONFIG_MAPPING\n"
        "    assert pipelines.load_assistant_model is not load\n"
        "    hf_dovetail.unregister()\n"
        "    assert pipelines.load_assistant_model is load\n"
        "    assert {k: id(v) for k, v in vars(GenerationMixin).items()} == {k: id(v) for k, v in attributes.items()}\n"
        "    assert [dict(m._extra_content) for m in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)] == contents\n"
        "    assert 'dovetail' not in CONFIG_MAPPING and sys.meta_path == path\n"
        "    hf_dovetail.register()\n"
    )


@pytest.mark.parametrize(
    "order",
    [
        "import hf_dovetail, transformers",
        "import transformers; transformers.AutoModelForCausalLM; import hf_dovetail",
        "import hf_dovetail.modeling",
        "from hf_dovetail import DovetailCandidateGenerator",
        "import hf_dovetail; from transformers import AutoTokenizer",
        "import hf_dovetail; from transformers import LlamaConfig",
    ],
)
def test_the_order_of_imports_does_not_matter(order: str, tmp_path: Path, llama: PreTrainedModel) -> None:
    """Guards the deferred registration, in the middle of transformers' own imports too; the user's code names
    nothing of Dovetail after importing it.
    """
    llama.save_pretrained(tmp_path / "target")
    tiny.draft_for(llama, "untrained").save_pretrained(tmp_path / "draft")
    out = in_python(
        f"{order}\nimport sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "target, draft = (AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/{n}') for n in ('target', 'draft'))\n"
        "ids = torch.tensor([[5, 6, 7]])\n"
        "plain = target.generate(ids, max_new_tokens=9, do_sample=False)\n"
        "assert torch.equal(plain, target.generate(ids, max_new_tokens=9, do_sample=False, assistant_model=draft))\n"
        "print(type(draft).__name__, draft.last_stats.new_tokens)\n",
        str(tmp_path),
    )
    assert out.split() == ["DovetailAssistantModel", "9"]


@pytest.mark.parametrize(
    "first", [f"hf_dovetail.{name}" for name in ("formats", "network", "modeling", "train", "plugin", "demo")]
)
def test_any_module_can_be_the_first_import(first: str) -> None:
    """Guards the circle modeling -> Auto classes -> registration -> modeling, which only a first import walks."""
    code = (
        f"import {first}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "from hf_dovetail import DovetailAssistantModel, DovetailConfig\n"
        "assert AutoConfig.for_model('dovetail').__class__ is DovetailConfig\n"
        "assert AutoModelForCausalLM._model_mapping[DovetailConfig] is DovetailAssistantModel\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
