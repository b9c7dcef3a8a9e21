"""Training data as it lies on disk: plain text, JSON and `datasets`, read record by record.

Knows files and the forms of a record; knows nothing of tokens or models. A record that cannot be used is skipped and
counted, with file and line, or refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

EXPECTED = '"text", "messages", "conversations", or "prompt" and "completion"'
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_LINES_SHOWN = 10


@dataclass(frozen=True)
class Record:
    """One text, or one conversation.

    Args:
        where: file and line, or data set and row.
        text: a plain text; empty for a conversation.
        messages: a conversation's turns, `{"role": ..., "content": ...}`; empty for a plain text.
        prompt: opening of `text` that was given and is not to be learned.
    """

    where: str
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    prompt: str = ""


@dataclass
class Skipped:
    """Counts records that cannot be used; with `strict`, the first one is an error."""

    strict: bool = False
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Note one record.

        Raises:
            ValueError: if `strict`, naming file and line.
        """
        if self.strict:
            raise ValueError(f"{where}: {why}")
        self.count += 1
        if len(self.first) < _LINES_SHOWN:
            self.first.append(f"{where}: {why}")
            logger.warning("skipped %s: %s", where, why)


def read_records(source: str | Path, skipped: Skipped) -> Iterator[Record]:
    """The records of a source that can be used.

    Args:
        source: a `.jsonl` file (a record per line), a `.json` file (one array of records), any other file (one plain
            text), a folder that `datasets` saved, or the name of a data set on the hub, each of the latter two with
            `:SPLIT` behind it if it is not `train`.
        skipped: gets those that cannot.

    Raises:
        ValueError: if a plain text is not UTF-8, a `.json` file is no array, or a data set does not exist.
    """
    path = Path(source)
    if path.is_file():
        raw = {".jsonl": _jsonl, ".json": _json}.get(path.suffix, _plain)(path, skipped)
    else:
        raw = _dataset(str(source))
    for where, value in raw:
        try:
            yield as_record(where, value)
        except ValueError as error:
            skipped.add(where, str(error))


def as_record(where: str, value: Any) -> Record:
    """A record of any of the accepted forms.

    Raises:
        ValueError: saying what was found and what was expected.
    """
    if not isinstance(value, dict):
        raise ValueError(f"expected an object with {EXPECTED}, found {_short(value)}")
    if "messages" in value:
        return Record(where, messages=_turns(value["messages"], "role", "content"))
    if "conversations" in value:
        return Record(where, messages=_turns(value["conversations"], "from", "value"))
    if "text" in value:
        return Record(where, text=_string(value, "text"))
    if "prompt" in value and "completion" in value:
        prompt = _string(value, "prompt")
        return Record(where, text=prompt + _string(value, "completion"), prompt=prompt)
    raise ValueError(f"expected an object with {EXPECTED}, found the keys {', '.join(map(str, value)) or '(none)'}")


def _turns(turns: Any, role_key: str, content_key: str) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"expected a list of turns, found {_short(turns)}")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get(content_key), str):
            raise ValueError(f'a turn is {_short(turn)}; expected "{role_key}" and a string as "{content_key}"')
        role = turn.get(role_key)
        if role_key == "from":
            role = _SHAREGPT_ROLES.get(role)
        if not isinstance(role, str):
            raise ValueError(f'a turn has "{role_key}" {_short(turn.get(role_key))}; expected the name of a role')
        messages.append({"role": role, "content": _characters(turn[content_key], content_key)})
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn is the assistant's, so there is nothing to learn")
    return tuple(messages)


def _string(value: dict[str, Any], key: str) -> str:
    if not isinstance(value[key], str):
        raise ValueError(f'"{key}" is {_short(value[key])}; expected a string')
    if not value[key].strip():
        raise ValueError(f'"{key}" is empty')
    return _characters(value[key], key)


def _characters(text: str, key: str) -> str:
    """A string that UTF-8 can write, as tokenizers want it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" holds half of a surrogate pair, which is no character ({error})') from error
    return text


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _plain(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    if text.strip():
        yield str(path), {"text": text}
    else:
        skipped.add(str(path), "the file is empty")


def _jsonl(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """Lines end at a line feed only: JSON leaves other separators in its strings."""
    number = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where, line = f"{path}, line {number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                skipped.add(where, "the line is empty")
                continue
            try:
                yield where, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                skipped.add(where, f"{path.name} is not UTF-8 here ({error})")
            except (ValueError, RecursionError) as error:  # RecursionError: brackets in thousands of brackets
                skipped.add(where, f"not JSON ({error})")
    if not number:
        skipped.add(str(path), "the file is empty")


def _json(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """One array of records, as ShareGPT's conversations are published."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        values = error
    if not isinstance(values, list):
        raise ValueError(
            f"{path} is no array of records ({_short(values)}); records line by line belong into a .jsonl file, plain "
            "text into a .txt file"
        )
    if not values:
        skipped.add(str(path), "the array is empty")
    for number, value in enumerate(values, start=1):
        yield f"{path}, record {number}", value


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of a data set; the library is imported only here."""
    name, _, split = source.partition(":")
    try:
        from datasets import load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(
            f"there is no file {source}; to read it as a data set, install the library: pip install datasets"
        ) from error
    try:
        if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
            data = load_from_disk(name)
            data = data[split or "train"] if hasattr(data, "keys") else data
        else:
            data = load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise ValueError(f"{source} is neither a file nor a data set that can be loaded ({error})") from error
    for number, row in enumerate(data):
        yield f"{source}, row {number}", row
