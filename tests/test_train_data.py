"""Training data: every accepted form, what counts in the loss, and what is skipped with file and line."""

import json
from pathlib import Path

import pytest
import torch
from training import load_tokenizer

from hf_dovetail.train import Skipped, Windows, hold_out, load_windows, pack, read_records
from hf_dovetail.train.losses import row_weights
from hf_dovetail.train.records import Record
from hf_dovetail.train.text import Encoded, encode, render_chat

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = (  # reasoning of turns before the last one is dropped, as some chat models do
    "{% for m in messages %}<{{ m['role'] }}>"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = (
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "what is len([])?"},
    {"role": "assistant", "content": "zero"},
    {"role": "user", "content": "and of [1]?"},
    {"role": "assistant", "content": "one, of course"},
)


@pytest.fixture
def tokenizer():
    loaded = load_tokenizer()
    loaded.chat_template = TEMPLATE
    return loaded


def lines(path: Path, *values) -> Path:
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


def test_only_the_assistants_turns_count_and_their_end_does(tokenizer) -> None:
    encoded = encode(tokenizer, Record("here", messages=CHAT))
    learned = tokenizer.decode(encoded.ids[encoded.counted])
    assert learned == "zero<end>one, of course<end>"
    assert tokenizer.decode(encoded.ids) == tokenizer.apply_chat_template(list(CHAT), tokenize=False)


def test_a_turn_that_the_template_rewrites_does_not_count_where_it_is_not(tokenizer) -> None:
    """Guards masks shifted by what a template drops: a wrong offset would teach the user's words."""
    tokenizer.chat_template = FORGETS
    turns = [dict(turn) for turn in CHAT]
    turns[2]["content"] = "hm</think>zero"
    text, spans = render_chat(tokenizer, turns)
    assert [text[a:b] for a, b in spans] == ["one, of course<end>"]
    assert "hm" not in text


def test_a_turn_counts_whatever_the_template_puts_before_the_last_one(tokenizer) -> None:
    """Guards Qwen 3, which writes empty reasoning before the last answer alone: no other turn would be learned."""
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    )
    text, spans = render_chat(tokenizer, CHAT)
    assert [text[a:b] for a, b in spans] == ["zero<end>", "<think></think>one, of course<end>"]


def test_a_completion_counts_and_its_prompt_does_not(tokenizer, tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", {"prompt": "def f(x):\n", "completion": "    return x\n"})
    encoded = encode(tokenizer, next(read_records(path, Skipped(strict=True))))
    assert tokenizer.decode(encoded.ids[encoded.counted]) == "    return x\n" + tokenizer.eos_token
    assert tokenizer.decode(encoded.ids[~encoded.counted]) == tokenizer.eos_token + "def f(x):\n"


def test_every_form_is_read(tmp_path: Path) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = lines(tmp_path / "d.jsonl", {"text": "plain"}, sharegpt, messages, {"prompt": "p", "completion": "c"})
    plain, first, second, completed = read_records(path, Skipped(strict=True))
    assert plain.text == "plain"
    assert first.messages == second.messages == tuple(messages["messages"])
    assert (completed.text, completed.prompt) == ("pc", "p")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", r"line 2: not JSON"),
        (" ", r"line 2: the line is empty"),
        ("[" * 100_000, r"line 2: not JSON"),  # a RecursionError
        ('{"text": ' + "1" * 5000 + "}", r"line 2: not JSON"),  # a ValueError that is no JSONDecodeError
        (r'{"text": "half a \ud800 pair"}', r"line 2: \"text\" holds half of a surrogate pair"),
        (r'{"messages": [{"role": "assistant", "content": "\ud800"}]}', r"line 2: \"content\" holds half"),
        ("[1]", r"line 2: expected an object with \"text\", .*found \[1\]"),
        ('{"body": "b"}', r"line 2: .*found the keys body"),
        ('{"text": ""}', r"line 2: \"text\" is empty"),
        ('{"text": 3}', r"line 2: \"text\" is 3; expected a string"),
        ('{"messages": []}', r"line 2: expected a list of turns"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"line 2: no turn is the assistant's"),
        ('{"messages": [{"role": "assistant", "content": null}]}', r"line 2: a turn is"),
        ('{"conversations": [{"from": "bing", "value": "a"}]}', r"line 2: a turn has \"from\" 'bing'"),
    ],
)
def test_a_bad_line_is_named_skipped_and_counted_or_refused(tokenizer, tmp_path: Path, line: str, why: str) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": "good one " * 9}, line, {"text": "good two " * 9})
    skipped = Skipped()
    windows = load_windows([path], tokenizer, 8, skipped)
    assert skipped.count == 1
    assert "good two" in tokenizer.decode(windows.ids.flatten())
    with pytest.raises(ValueError, match="d.jsonl, " + why):
        load_windows([path], tokenizer, 8, Skipped(strict=True))


def test_bytes_that_are_no_text_and_templates_that_refuse_are_skipped_too(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "' + b"ok " * 30 + b'"}\n\xff\xfe\n\n' + json.dumps({"messages": CHAT}).encode())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    skipped = Skipped()
    assert len(load_windows([path], tokenizer, 8, skipped)) > 1
    assert "line 2" in skipped.first[0]
    assert "line 3: the line is empty" in skipped.first[1]
    assert "line 4: the chat template refuses this conversation: roles must alternate" in skipped.first[2]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="line 2: the tokenizer has no chat template"):
        load_windows([lines(path, {"text": "ok"}, {"messages": CHAT})], tokenizer, 8, Skipped(strict=True))


def test_nothing_usable_says_why(tokenizer, tmp_path: Path) -> None:
    for name in ("empty.txt", "empty.jsonl"):
        (tmp_path / name).write_text(" \n" if name == "empty.txt" else "")
        with pytest.raises(
            ValueError, match=rf"0 tokens; expected .* window of 8 \(1 records.*{name}: the file is empty"
        ):
            load_windows([tmp_path / name], tokenizer, 8, Skipped())


def test_a_mark_of_byte_order_is_no_text(tokenizer, tmp_path: Path) -> None:
    """Guards files written on Windows: a lost first record, or a character that no target writes."""
    for name, content in (
        ("d.jsonl", '{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("d.txt", "one"),
        ("d.json", '[{"text": "one"}]'),
    ):
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
        found = list(read_records(tmp_path / name, Skipped(strict=True)))
        assert [record.text for record in found] == ["one", "two"][: len(found)]
        assert len(found) == (2 if name == "d.jsonl" else 1)


def test_an_array_of_records_is_read(tmp_path: Path) -> None:
    """Guards ShareGPT's own file, which as one plain text would teach a draft to write JSON."""
    path, skipped = tmp_path / "sharegpt.json", Skipped()
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path.write_text(json.dumps([{"id": 1, "conversations": turns}, {"id": 2}, {"text": "c"}], indent=1))
    chat, text = read_records(path, skipped)
    assert (chat.messages[1]["content"], text.text) == ("b", "c")
    assert skipped.first == [f"{path}, record 2: {skipped.first[0].split(': ', 1)[1]}"]
    for content in ('{"text": "a"}', '{"text": "a"}\n{"text": "b"}', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"sharegpt.json is no array of records .*\.jsonl file"):
            list(read_records(path, Skipped()))
    path.write_text("[]")
    assert (list(read_records(path, skipped)), skipped.count) == ([], 2)


def test_windows_without_a_token_that_counts_are_left_out() -> None:
    ids = torch.arange(24, dtype=torch.int32)
    counted = torch.zeros(24, dtype=torch.bool)
    counted[[12, 16]] = True  # the second window's middle; the third window's first token, which no row asks for
    windows = pack([Encoded(ids, counted)], 8)
    assert windows.ids.tolist() == [list(range(8, 16))]
    assert windows.counted.nonzero().tolist() == [[0, 4]]
    assert pack([Encoded(ids, torch.ones(24, dtype=torch.bool))], 8).counted is None
    with pytest.raises(ValueError, match="no window holds a token that counts"):
        pack([Encoded(ids, torch.zeros(24, dtype=torch.bool))], 8)


def test_a_row_counts_if_the_token_that_it_asks_for_does() -> None:
    """Row t has read token t+1 and proposes token t+2."""
    counted = torch.tensor([[False, False, True, False, True]])
    assert row_weights(counted).tolist() == [[1.0, 0.0, 1.0, 1.0]]


def test_held_out_prompts_are_not_trained_on() -> None:
    windows = Windows(torch.arange(80).view(10, 8))
    left, prompts = hold_out(windows, 3)
    assert [p.shape for p in prompts] == [(1, 4)] * 3
    assert len(left) == 7
    assert not {int(p[0, 0]) for p in prompts} & {int(w[0]) for w in left.ids}
    with pytest.raises(ValueError, match="10 windows; 10 of them cannot be held out"):
        hold_out(windows, 10)


def test_a_saved_data_set_is_read(tokenizer, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library datasets is not installed")
    data = datasets.Dataset.from_dict({"text": ["one two three four five six seven", "", "eight nine ten eleven"]})
    data.save_to_disk(tmp_path / "saved")
    skipped = Skipped()
    texts = [record.text for record in read_records(tmp_path / "saved", skipped)]
    assert texts == ["one two three four five six seven", "eight nine ten eleven"]
    assert "saved, row 1" in skipped.first[0]
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "split")
    assert next(read_records(f"{tmp_path / 'split'}:test", Skipped())).text == texts[0]
    with pytest.raises(ValueError, match="neither a file nor a data set"):
        next(read_records(tmp_path / "split", Skipped()))
    (tmp_path / "folder").mkdir()
    lines(tmp_path / "folder" / "d.jsonl", "{not json")
    with pytest.raises(ValueError, match="neither a file nor a data set"):
        next(read_records(tmp_path / "folder", Skipped()))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.jsonl"):
        next(read_records(tmp_path / "nothing.jsonl", Skipped()))
