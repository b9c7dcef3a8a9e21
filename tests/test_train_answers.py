"""The target's own answers in place of the data's, and the commands that lead from data to a draft."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from texts import humaneval_prompts
from training import ROOT, load_tokenizer
from transformers import AutoTokenizer

from hf_dovetail import DovetailAssistantModel
from hf_dovetail.cli import main
from hf_dovetail.demo import pair_path
from hf_dovetail.engines import engine_of
from hf_dovetail.train import Answering, Skipped, answerable, load_prompts, load_windows, read_records, regenerate
from hf_dovetail.train.records import Record

TEMPLATE = (
    "{% for m in messages %}# {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)
HOW = Answering(max_new_tokens=6, batch=2)


def chat(*questions: str) -> Record:
    turns = []
    for question in questions:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": "never said"}]
    return Record("here", messages=tuple(turns))


RECORDS = [
    chat("def f(x):"),
    chat("import os", "class A:\n    def __init__(self):"),
    Record("there", text="def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n"),
    Record("there", text="for i in range(3):\n    print(i)", prompt="for i in range(3):\n"),
    chat("x = 1"),
]


@pytest.fixture(scope="module")
def tokenizer():
    loaded = load_tokenizer()
    loaded.chat_template = TEMPLATE
    return loaded


def values(paths: list[Path]) -> list[dict]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def answer(target, tokenizer, prompt: str) -> str:
    """The target's answer to one prompt alone, without padding."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    out = target.generate(**inputs, max_new_tokens=HOW.max_new_tokens, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_answers_are_the_targets_own_turn_by_turn(target, tokenizer, tmp_path: Path) -> None:
    """Padding, the order of records and the answers of earlier turns: each answer is what the target says alone."""
    found = values(regenerate(target, tokenizer, RECORDS, HOW, tmp_path))
    assert [list(value) for value in found] == [
        ["messages"],
        ["messages"],
        *[["prompt", "completion"]] * 2,
        ["messages"],
    ]
    for record, value in zip(RECORDS, found, strict=True):
        for turn, message in enumerate(value.get("messages", ())):
            if message["role"] == "user":
                assert message == record.messages[turn]
                continue
            asked = tokenizer.apply_chat_template(value["messages"][:turn], tokenize=False, add_generation_prompt=True)
            assert message["content"] == answer(target, tokenizer, asked) != "never said"
    text, completed = found[2], found[3]
    assert RECORDS[2].text.startswith(text["prompt"])
    assert text["completion"] == answer(target, tokenizer, text["prompt"])
    assert completed["prompt"] == RECORDS[3].prompt
    windows = load_windows(sorted(tmp_path.glob("*.jsonl")), tokenizer, 16, Skipped(strict=True))
    assert 0 < int(windows.counted.sum()) < windows.ids.numel()


def test_the_target_answers_on_the_best_engine_and_is_given_back(target, tokenizer, tmp_path: Path) -> None:
    seen = []
    hook = target.register_forward_pre_hook(lambda *_: seen.append(engine_of(target)))
    paths = regenerate(target, tokenizer, RECORDS[3:], HOW, tmp_path)
    assert set(seen) == {"onednn"}
    assert engine_of(target) == "eager"
    seen.clear()
    assert regenerate(target, tokenizer, RECORDS[3:], HOW, tmp_path) == paths
    assert seen == []
    hook.remove()


def test_a_killed_run_makes_only_the_missing_files(target, tokenizer, tmp_path: Path) -> None:
    """Sampled: a file's answers depend on the seed and its number, not on what ran before."""
    how = replace(HOW, temperature=1.0, seed=3)
    paths = regenerate(target, tokenizer, RECORDS, how, tmp_path)
    before = [path.read_text() for path in paths]
    paths[1].unlink()
    kept = paths[0].stat().st_mtime_ns
    assert regenerate(target, tokenizer, RECORDS, how, tmp_path) == paths
    assert [path.read_text() for path in paths] == before
    assert paths[0].stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match=r"belongs to another run: its answering.seed is 3, this run's is 4"):
        regenerate(target, tokenizer, RECORDS, replace(how, seed=4), tmp_path)
    with pytest.raises(ValueError, match="its records is 5, this run's is 4"):
        regenerate(target, tokenizer, RECORDS[:4], how, tmp_path)
    swapped = [replace(RECORDS[3], text=RECORDS[3].text.replace("3", "4")), *RECORDS[1:3], RECORDS[0], RECORDS[4]]
    with pytest.raises(ValueError, match="its text is"):
        regenerate(target, tokenizer, swapped, how, tmp_path)
    tokenizer.chat_template = TEMPLATE.replace("# ", "## ")
    try:
        with pytest.raises(ValueError, match="its chat_template is"):
            regenerate(target, tokenizer, RECORDS, how, tmp_path)
    finally:
        tokenizer.chat_template = TEMPLATE
    other = regenerate(target, tokenizer, RECORDS, replace(how, seed=4), tmp_path / "other")
    assert [path.read_text() for path in other] != before


def test_all_of_the_data_is_answered_and_what_cannot_be_is_named(tokenizer, tmp_path: Path) -> None:
    """Guards a long text of which one answer would be left, and a template's error in the middle of answering."""
    source, chats = ROOT / "hf_dovetail" / "tree.py", tmp_path / "chats.jsonl"
    pieces = list(answerable([source], tokenizer, Answering(max_new_tokens=90), Skipped(strict=True)))
    assert "".join(piece.text for piece in pieces) == source.read_text()
    assert {len(tokenizer(piece.text).input_ids) for piece in pieces[:-1]} <= set(range(110, 125))
    system = {"role": "system", "content": "be short"}
    turns = [list(RECORDS[0].messages), [system, *RECORDS[0].messages]]
    chats.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    )
    try:
        skipped = Skipped()
        (usable,) = answerable([chats], tokenizer, HOW, skipped)
        assert usable.messages == RECORDS[0].messages
        assert skipped.first == [f"{chats}, line 2: the chat template refuses this conversation: no system"]
        assert len(load_prompts(chats, tokenizer, 5, 20, skipped)) == 1
        assert skipped.count == 2
        with pytest.raises(ValueError, match=r"chats.jsonl, line 2: the chat template refuses"):
            load_prompts(chats, tokenizer, 5, 20, Skipped(strict=True))
    finally:
        tokenizer.chat_template = TEMPLATE


def test_no_records_are_refused(target, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no records whose answers"):
        regenerate(target, tokenizer, [], HOW, tmp_path)


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    source = "\n".join(humaneval_prompts())
    lines = [json.dumps({"text": source[i : i + 900]}) for i in range(0, 5400, 900)]
    path.write_text("\n".join([*lines[:3], "not json", *lines[3:]]) + "\n")
    return path


COMMON = ["--target", str(pair_path("target"))]
SHORT = ["--steps", "2", "--batch", "2", "--window", "32", "--warmup", "1"]


def test_train_from_data_with_its_own_answers_and_validation(tmp_path: Path, capsys) -> None:
    out = tmp_path / "draft"
    options = ["--regenerate", "--answer-tokens", "12", "--validate-every", "2", "--validation-prompts", "1"]
    command = ["train", *COMMON, "--data", str(data(tmp_path)), "--out", str(out), *SHORT, *options]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "skipped 1 records that cannot be used, the first: " in said
    assert "data.jsonl, line 4: not JSON" in said
    assert (out / "answers" / "answers-00000.jsonl").exists()
    draft = DovetailAssistantModel.from_pretrained(out)
    assert draft.dtype == torch.bfloat16
    assert "| data | data.jsonl, with the target's own answers (greedy) |" in (out / "README.md").read_text()
    assert main(command) == 2
    assert "holds a finished draft" in capsys.readouterr().err


def test_train_from_captured_features_without_the_target(tmp_path: Path, capsys) -> None:
    features, out = str(tmp_path / "features"), tmp_path / "draft"
    capture = ["capture", *COMMON, "--data", str(data(tmp_path)), "--out", features, "--window", "32"]
    capture += ["--fusion", "eagle3"]
    assert main([*capture, "--strict"]) == 2
    assert "line 4: not JSON" in capsys.readouterr().err
    assert main(capture) == 0
    changes = ["--recipe", "paper", "--unroll", "2", "--noise", "0", "--fusion", "eagle3"]
    assert main(["train", "--features", features, "--out", str(out), *SHORT, *changes]) == 0
    assert DovetailAssistantModel.from_pretrained(out).config.feature_layers == [2, 4, 5]
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["learning_rate"], recipe["steps"], recipe["unroll"], recipe["noise"]) == (3e-5, 2, 2, 0.0)
    assert AutoTokenizer.from_pretrained(out).vocab_size == 4096
    card = (out / "README.md").read_text()
    assert "| data | data.jsonl |" in card
    assert "LM head of its own, embeddings are the target's" in card
    text = ["--data", str(ROOT / "hf_dovetail" / "target.py")]
    for options, said in (
        (["--features", features, "--validate-every", "1"], "give --target"),
        (["--features", features, "--data", "x"], "holds the text already"),
        (["--features", features, *COMMON, "--validate-every", "1"], "give prompts with --validate-on"),
        (COMMON, "give the training data with --data"),
        ([*COMMON, *text, "--window", "1025"], "windows have 1025 tokens, the target has 1024 positions"),
        ([*COMMON, *text, "--validate-every", "1", "--validation-prompts", "0"], "--validation-prompts is 0"),
        ([*COMMON, *text, "--regenerate", "--answer-temperature", "-1"], "at temperature -1.0; expected"),
        (["--data", "x"], "give the target with --target"),
    ):
        assert main(["train", *SHORT, *options, "--out", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err


def test_validation_prompts_of_their_own(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "os.sep"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"text": "def f(x):\n" * 9}) + "\n")
    chatted, text = load_prompts(path, tokenizer, 5, 20, Skipped())
    assert tokenizer.decode(chatted[0]) == "# user\nimport os\n# assistant\n"
    assert text.shape == (1, 20)
    assert len(load_prompts(path, tokenizer, 1, 20, Skipped())) == 1
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        load_prompts(path, tokenizer, 5, 20, Skipped())
    assert [r.where for r in read_records(path, Skipped())] == []
