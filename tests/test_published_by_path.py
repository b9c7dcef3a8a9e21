"""A published draft given by its path, in a pipeline and to the Auto classes: used, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from published import CASES, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    pipeline,
)

from hf_dovetail import DovetailAssistantModel

PROMPT = " ".join(f"t{i}" for i in tiny.prompt(10)[0].tolist())


def writer(target: PreTrainedModel, assistant: str | PreTrainedModel | None = None) -> TextGenerationPipeline:
    """A pipeline of a tiny target, whose words are t0, t1, ..."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")
    options = {} if assistant is None else {"assistant_model": assistant}
    return pipeline("text-generation", model=target, tokenizer=tokenizer, device="cpu", **options)


def text(write: TextGenerationPipeline) -> str:
    return write(PROMPT, max_new_tokens=16, do_sample=False)[0]["generated_text"]


@pytest.mark.parametrize("by_path", [True, False], ids=["path", "loaded"])
@pytest.mark.parametrize("name", ["dgf", "eagle-llama3", "eagle3", "speculators"])
def test_a_pipeline_takes_a_published_draft(name: str, by_path: bool, tmp_path: Path) -> None:
    """Its configuration names special tokens that are not the target's, which transformers would not let pass."""
    case = CASES[name]
    target, folder = case.target().double(), str(case.write(tmp_path))
    write = writer(target, folder if by_path else DovetailAssistantModel.from_pretrained(folder))
    draft = write.assistant_model
    assert draft.config.eos_token_id != target.config.eos_token_id
    assert draft.dtype == (torch.float64 if by_path else torch.float32)
    draft.draft_device = "cpu"
    assert text(write) == text(writer(case.target().double()))
    assert draft.last_stats.drafted > 0


def test_a_pipeline_loads_other_assistants_as_before(llama: PreTrainedModel, tmp_path: Path) -> None:
    tiny.perturbed(llama, 0.1).save_pretrained(tmp_path / "small")
    writer(llama).tokenizer.save_pretrained(tmp_path / "small")
    assert type(writer(llama, str(tmp_path / "small")).assistant_model) is type(llama)
    assert writer(llama).assistant_model is None
    with pytest.raises(OSError, match="nothing"):
        writer(llama, str(tmp_path / "nothing"))


def test_a_damaged_published_draft_is_refused_in_our_words(llama: PreTrainedModel, tmp_path: Path) -> None:
    case = CASES["eagle-llama3"]
    tensors = case.tensors()
    del tensors["layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"looks like EAGLE-1/2.*missing: layers\.0\.mlp\.up_proj\.weight"):
        writer(llama, str(case.write(tmp_path, tensors)))
    with pytest.raises(ValueError, match="a speculator of type 'dflash'; supported are 'eagle3'"):
        writer(llama, str(case.write(tmp_path, config={"speculators_model_type": "dflash"})))


@pytest.mark.parametrize("name", ["dgf", "eagle-llama3", "eagle3-full"])
def test_what_transformers_makes_of_a_published_draft_cannot_draft(name: str, tmp_path: Path, ids: Tensor) -> None:
    """The Auto classes make a Llama of it, most of whose weights are random: no error, and no token accepted."""
    case = CASES[name]
    target, misread = case.target(), AutoModelForCausalLM.from_pretrained(case.write(tmp_path))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"is a published draft \(.*from_pretrained\('.*hf-dovetail convert .* OUT"
        ):
            target.generate(ids, assistant_model=misread, max_new_tokens=4)
    misread.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # a Llama's own files: not ours to judge
    plain = target.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(target.generate(ids, assistant_model=again, max_new_tokens=4, do_sample=False), plain)
