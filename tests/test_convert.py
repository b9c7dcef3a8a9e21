"""`hf-dovetail convert`: the draft that comes out is the draft that went in, settled for its target."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import tiny
import torch
from published import CASES, Case
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.cli import main
from hf_dovetail.demo import pair_path


def target_folder(case: Case, folder: Path) -> str:
    """The tiny target of a case, with a tokenizer, as a folder."""
    case.target().save_pretrained(folder)
    AutoTokenizer.from_pretrained(pair_path("target")).save_pretrained(folder)
    return str(folder)


def folders(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source").mkdir()
    return tmp_path / "source", tmp_path / "out"


@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("name", ["dgf", "eagle-vicuna", "eagle3", "speculators-new"])
def test_the_converted_draft_drafts_the_same_trees(name: str, with_target: bool, tmp_path: Path) -> None:
    """Guards the whole way through the command: weights, vocabulary, layers; loadable by the Auto classes."""
    case = CASES[name]
    source, out = folders(tmp_path)
    case.write(source)
    path = target_folder(case, tmp_path / "target")
    assert main(["convert", str(source), str(out), *(["--target", path] if with_target else [])]) == 0
    target, trees = AutoModelForCausalLM.from_pretrained(path), []
    for draft in (DovetailAssistantModel.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)):
        draft.draft_device, draft.tree, turns = "cpu", TreeShape(8, 3, 3), []
        draft.watch = turns.append
        tiny.run(target, tiny.prompt(), draft, max_new_tokens=10)
        trees.append([turn.tree.tokens.tolist() for turn in turns])
    assert trees[0] == trees[1]
    config, card = draft.config, (out / "README.md").read_text()
    assert type(draft) is DovetailAssistantModel
    assert list(out.glob("*.safetensors"))
    assert not list(out.glob("*.bin"))
    assert (out / "tokenizer.json").exists() == with_target
    assert str(tmp_path) not in card + (out / "config.json").read_text()
    assert "Converted from source by" in card
    if with_target:
        assert (config.target_type, config.target_hidden_size, config.bos_token_id) == (case.family, 32, 1)
        assert case.layers is None or config.feature_layers == list(case.layers)
        assert "Draft for target" in card


@pytest.mark.parametrize("same", [True, False])
def test_embeddings_that_are_the_targets_are_left_out(same: bool, tmp_path: Path) -> None:
    case = CASES["eagle-vicuna"]
    source, out = folders(tmp_path)
    path, tensors = target_folder(case, tmp_path / "target"), case.tensors()
    if same:
        tensors["embed_tokens.weight"] = case.target().model.embed_tokens.weight.detach()
    case.write(source, tensors)
    assert main(["convert", str(source), str(out), "--target", path]) == 0
    draft = DovetailAssistantModel.from_pretrained(out)
    assert draft.config.own_embeddings is not same
    assert ("embed_tokens.weight" in draft.state_dict()) is not same


def test_a_language_model_is_wrapped(tmp_path: Path) -> None:
    lm = tiny.build("llama")
    lm.save_pretrained(tmp_path / "lm")
    assert main(["convert", str(tmp_path / "lm"), str(tmp_path / "out")]) == 0
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert draft.config.fusion == "none"
    assert torch.equal(draft.lm.lm_head.weight, lm.lm_head.weight)


def test_a_full_disk_leaves_no_half_of_a_draft(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A limit on the size of files stands for the full disk; the same command works afterwards."""
    source, out = folders(tmp_path)
    command = ["convert", str(CASES["dgf"].write(source)), str(out)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"could not write the draft to {out} (" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    assert main(command) == 0
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md", "mine.txt"}
    DovetailAssistantModel.from_pretrained(out)


def test_what_cannot_be_converted_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    case = CASES["eagle3"]
    source, out = folders(tmp_path)
    case.write(source)
    tiny.build("llama", hidden_size=64, num_hidden_layers=8).save_pretrained(tmp_path / "wide")
    cases = [
        ((str(source), str(out), "--target", str(tmp_path / "wide")), "made for hidden_size 32"),
        ((str(source), str(source)), "holds a model; choose another folder"),
        ((str(pair_path("draft")), str(out)), "a draft of this package; there is nothing to convert"),
        (("/no/such/folder", str(out)), "there is no folder /no/such/folder"),
    ]
    for arguments, message in cases:
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
