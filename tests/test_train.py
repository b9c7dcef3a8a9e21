"""Training on a real small target: it learns, and resumes exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import Interrupting, load_target, new_draft, python_rows
from transformers import AutoTokenizer

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.recipe import Recipe
from hf_dovetail.train import Extras, Windows, capture, continue_stream, draft_loss, pack, read_texts, train_draft

RECIPE = Recipe(steps=30, batch=8, window=64, learning_rate=3e-3, warmup=5, distribution_weight=1.0, save_every=10)


@pytest.fixture(scope="module")
def windows():
    return python_rows()


def loss_of(draft, target, windows, recipe=RECIPE) -> float:
    draft.meet(target)
    features, logits = capture(target, windows[:8])
    with torch.no_grad():
        return float(draft_loss(draft, windows[:8], features, logits, recipe, torch.Generator().manual_seed(0)))


def test_training_learns_and_the_draft_is_accepted(target, tokenizer, windows, tmp_path: Path) -> None:
    draft = new_draft(target)
    before = loss_of(draft, target, windows)
    train_draft(draft, target, windows, RECIPE, tmp_path, Extras(tokenizer))
    assert loss_of(draft, target, windows) < 0.75 * before  # 0.67 to 0.68 of it over several seeds
    loaded = DovetailAssistantModel.from_pretrained(tmp_path)
    assert loss_of(loaded, target, windows) == pytest.approx(loss_of(draft, target, windows))
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == tokenizer.vocab_size
    inputs = tokenizer("import os\n\ndef main():\n", return_tensors="pt")
    accepted = {}
    for name, candidate in (("trained", loaded), ("random", new_draft(target, seed=1))):
        candidate.tree = TreeShape()  # automatic ones follow the clock, and look up what is copied
        target.generate(**inputs, assistant_model=candidate, max_new_tokens=48, do_sample=False)
        accepted[name] = candidate.last_stats.accepted
    assert accepted["trained"] > accepted["random"]


def test_a_run_that_was_interrupted_ends_as_if_it_was_not(target, windows, tmp_path: Path) -> None:
    """Order of the data, noise, optimizer and rate all continue; a restart would end elsewhere."""
    whole = train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(Windows(windows), 15), RECIPE, tmp_path / "cut")
    resumed = train_draft(new_draft(target), target, windows, RECIPE, tmp_path / "cut")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    restarted = train_draft(new_draft(target), target, windows, replace(RECIPE, steps=20), tmp_path / "restarted")
    assert not torch.equal(whole.fusion.W_1, restarted.fusion.W_1)


def test_the_target_writes_greedy_text(target, windows) -> None:
    written = continue_stream(target, windows.flatten(), count=3, window=32, seed=0, batch=2)
    assert written.shape == (3, 32)
    alone = target.generate(written[1:2, :8], max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert torch.equal(alone[0], written[1])


def test_bad_training_input(target, windows, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(32, 8\).*windows of 64"):
        train_draft(new_draft(target), target, torch.zeros(32, 8).long(), RECIPE, tmp_path)
    with pytest.raises(ValueError, match=r"Recipe.unroll is 0"):
        Recipe(unroll=0)
    with pytest.raises(ValueError, match=r"Recipe.unroll is 8; a window of 8 tokens has room for 4"):
        Recipe(window=8, unroll=8)
    with pytest.raises(ValueError, match=r"Recipe.warmup is -5"):
        Recipe(warmup=-5)
    with pytest.raises(ValueError, match=r"Recipe.patience is 2, but nothing is validated"):
        Recipe(patience=2)
    with pytest.raises(ValueError, match=r"windows of -1 tokens; expected at least 1"):
        pack([], -1)
    broken = new_draft(target)
    broken.meet(target)
    torch.nn.init.constant_(broken.fusion.W_1, float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1"):
        train_draft(broken, target, windows, RECIPE, tmp_path)
    empty, malformed = tmp_path / "empty.txt", tmp_path / "lines.jsonl"
    empty.write_text("")
    malformed.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"body": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"no text in"):
        read_texts([empty])
    with pytest.raises(ValueError, match=r"lines.jsonl, line 2"):
        read_texts([malformed])


def test_a_folder_of_another_run_is_not_touched(target, windows, tmp_path: Path) -> None:
    """Guards a silent resume: a finished draft, or a checkpoint with another recipe, text, draft or target."""
    few = replace(RECIPE, steps=2, save_every=1)
    train_draft(new_draft(target), target, windows, few, tmp_path / "done")
    weights = (tmp_path / "done" / "model.safetensors").read_bytes()
    assert not (tmp_path / "done" / "checkpoint").exists()
    with pytest.raises(ValueError, match="holds a finished draft"):
        train_draft(new_draft(target), target, windows, few, tmp_path / "done")
    assert (tmp_path / "done" / "model.safetensors").read_bytes() == weights
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        train_draft(new_draft(target), target, Interrupting(Windows(windows), 1), few, cut)
    other = DovetailAssistantModel.from_target(target, num_hidden_layers=2)
    tuned = load_target()
    torch.nn.init.ones_(tuned.model.layers[2].input_layernorm.weight)
    for name, arguments in (
        ("recipe.learning_rate", (new_draft(target), target, windows, replace(few, learning_rate=0.5))),
        ("draft.num_hidden_layers", (other, target, windows, few)),
        ("text.windows", (new_draft(target), target, windows[:-1], few)),
        ("text.sha256", (new_draft(target), target, windows.flip(0), few)),  # as many tokens, and the same ones
        ("target", (new_draft(target), tuned, windows, few)),
    ):
        with pytest.raises(ValueError, match=f"belongs to another run: its {name} is"):
            train_draft(*arguments, cut)
    train_draft(new_draft(target), target, windows, few, cut)


def test_training_leaves_the_target_as_it_was(windows, tmp_path: Path) -> None:
    target = load_target().train()
    before = {name: parameter.clone() for name, parameter in target.named_parameters()}
    train_draft(new_draft(target), target, windows, replace(RECIPE, steps=2), tmp_path)
    assert target.training
    assert all(parameter.requires_grad for parameter in target.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in target.named_parameters())


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    """Guards `str.splitlines`, which also splits at characters that JSON leaves in its strings."""
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085"}, ensure_ascii=False) + "\n" + '{"text": "three"}\n')
    assert read_texts([path]) == ["one\u2028two\u0085", "three"]
    path.write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"line 1: .* expected a string"):
        read_texts([path])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"text.jsonl is not UTF-8"):
        read_texts([path])


def test_a_tree_of_a_new_draft_is_valid(target) -> None:
    draft = new_draft(target)
    draft.tree = TreeShape(nodes=40, depth=5, top_k=4)
    ids = torch.arange(10).unsqueeze(0)
    target.generate(ids, assistant_model=draft, max_new_tokens=8, do_sample=False)
    assert draft.last_stats.drafted > 0
