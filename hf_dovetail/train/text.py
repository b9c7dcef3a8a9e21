"""Records as tokens: which of them count in the loss, and windows of equal length to train on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .records import Record, Skipped, read_records

Span = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """The training text.

    Args:
        ids: (N, W) token ids. counted: (N, W) bool, the tokens that the draft shall learn to propose, or None for all.

    Raises:
        ValueError: if the shapes do not agree, or there is no window.
    """

    ids: Tensor
    counted: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or len(self.ids) == 0:
            raise ValueError(f"the training text is of shape {tuple(self.ids.shape)}; expected (windows, tokens)")
        if self.counted is not None and self.counted.shape != self.ids.shape:
            raise ValueError(
                f"counted is of shape {tuple(self.counted.shape)}; expected that of the ids, {tuple(self.ids.shape)}"
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoded:
    """One record as tokens.

    Args:
        ids: (length,) int32. counted: (length,) bool.
    """

    ids: Tensor
    counted: Tensor


def load_windows(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, window: int, skipped: Skipped
) -> Windows:
    """All records of all sources, one behind the other, cut into windows.

    Raises:
        ValueError: if there is too little text for one window, or a source cannot be read.
    """
    try:
        return pack(load_encoded(sources, tokenizer, skipped), window)
    except ValueError as error:
        if not skipped.count:
            raise
        raise ValueError(f"{error} ({skipped.count} records were skipped, the first: {skipped.first[0]})") from error


def load_encoded(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, skipped: Skipped
) -> Iterator[Encoded]:
    """The records of all sources as tokens; those that the tokenizer cannot render are skipped as well."""
    for source in sources:
        for record in read_records(source, skipped):
            try:
                yield encode(tokenizer, record)
            except ValueError as error:
                skipped.add(record.where, str(error))


def encode(tokenizer: PreTrainedTokenizerBase, record: Record) -> Encoded:
    """A record as tokens: a text opened as the tokenizer opens one (or by its EOS), a conversation by its template.

    A token of a conversation counts if it ends inside an assistant's turn, since then the target writes it.

    Raises:
        ValueError: if the tokenizer has no chat template, or cannot tell which characters a token covers.
    """
    if not record.messages:
        return _encode_text(tokenizer, record)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell characters of tokens; use its fast version")
    text, spans = render_chat(tokenizer, record.messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counted = [any(begin < end <= stop for begin, stop in spans) for _, end in encoded.offset_mapping]
    return _encoded(encoded.input_ids, counted)


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> tuple[str, list[Span]]:
    """A conversation as the target reads it, and the characters of the assistant's turns, their end marks included.

    A turn that the template renders otherwise once more turns follow (reasoning that is dropped, say) stands in the
    text as it is then, and counts only if its words follow what was asked.

    Raises:
        ValueError: if the tokenizer has no chat template, the template refuses the conversation, or no turn is found.
    """
    whole, spans = rendered(tokenizer, messages), []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            asked, answered = rendered(tokenizer, messages[:turn], ask=True), rendered(tokenizer, messages[: turn + 1])
            if span := _place(whole, asked, answered, message["content"].strip()):
                spans.append(span)
    if not spans:
        raise ValueError("no assistant turn can be found in what the chat template makes of this conversation")
    return whole, spans


def _place(whole: str, asked: str, answered: str, words: str) -> Span | None:
    """Where an answer stands in a conversation, its end mark included; None if it does not follow what was asked.

    Args:
        whole: the conversation. asked, answered: its beginning up to the answer, and with it, as the template renders
            them alone: what stands around the answer's words may be another there (Qwen 3's empty reasoning).
        words: of the answer.
    """
    begin = len(asked)
    if not whole.startswith(asked):
        return None
    if whole.startswith(answered) and len(answered) > begin:
        return begin, len(answered)
    _, found, mark = answered.rpartition(words)
    stands = words and found and whole.startswith(words + mark, begin)
    return (begin, begin + len(words + mark)) if stands else None


def rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], ask: bool = False) -> str:
    """What the chat template makes of turns; with `ask`, up to where an answer begins.

    Raises:
        ValueError: if the tokenizer has no chat template, or it refuses the turns.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give plain text, or the tokenizer of a chat model")
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # a template raises what it likes (jinja2.TemplateError)
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def _encode_text(tokenizer: PreTrainedTokenizerBase, record: Record) -> Encoded:
    """A text of which all counts, or a prompt and its completion, each tokenised alone as generation does."""
    if not record.prompt:
        ids = _opened(tokenizer, tokenizer(record.text, verbose=False).input_ids)
        return _encoded(ids, [True] * len(ids))
    given = _opened(tokenizer, tokenizer(record.prompt, verbose=False).input_ids)
    rest = tokenizer(record.text[len(record.prompt) :], add_special_tokens=False, verbose=False).input_ids
    if tokenizer.eos_token_id is not None:
        rest = [*rest, tokenizer.eos_token_id]
    return _encoded(given + rest, [False] * len(given) + [True] * len(rest))


def _encoded(ids: list[int], counted: list[bool]) -> Encoded:
    return Encoded(torch.tensor(ids, dtype=torch.int32), torch.tensor(counted, dtype=torch.bool))


def _opened(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids that begin with the tokenizer's BOS, or else with its EOS."""
    if tokenizer.eos_token_id is None or ids[:1] == [tokenizer.bos_token_id]:
        return ids
    return [tokenizer.eos_token_id, *ids]


def pack(texts: Iterable[Encoded], window: int) -> Windows:
    """Texts one behind the other, cut into windows; windows in which nothing counts are left out.

    Raises:
        ValueError: if there is too little text for one window, or a window would be empty.
    """
    if window < 1:
        raise ValueError(f"windows of {window} tokens; expected at least 1")
    parts = list(texts)
    length = sum(len(part.ids) for part in parts)
    if length < window:
        raise ValueError(f"the text has {length} tokens; expected at least one window of {window}")
    whole = length // window * window
    ids = torch.cat([part.ids for part in parts])[:whole].view(-1, window)
    counted = torch.cat([part.counted for part in parts])[:whole].view(-1, window)
    if bool(counted.all()):
        return Windows(ids)
    some = counted[:, 2:].any(dim=1)
    if not some.any():
        raise ValueError("no window holds a token that counts; give more text, or longer windows")
    return Windows(ids[some], counted[some])


def hold_out(windows: Windows, count: int) -> tuple[Windows, list[Tensor]]:
    """Take `count` windows, at even distances, out of the text; their first halves, (1, W // 2) each, are prompts.

    Raises:
        ValueError: if no window would be left to train on.
    """
    if count >= len(windows):
        raise ValueError(
            f"the text has {len(windows)} windows; {count} of them cannot be held out: give more text, fewer prompts, "
            "or prompts of their own"
        )
    chosen = torch.linspace(0, len(windows) - 1, count).long()
    rest = torch.ones(len(windows), dtype=torch.bool)
    rest[chosen] = False
    prompts = windows.ids[chosen, : windows.ids.shape[1] // 2].long()
    left = Windows(windows.ids[rest], None if windows.counted is None else windows.counted[rest])
    return left, list(prompts.split(1))


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts in plain text files, or in the "text" field of JSONL files; nothing is skipped.

    Raises:
        ValueError: naming file and line of a record that is no text, or if there is no text at all.
    """
    texts: list[str] = []
    for path in paths:
        skipped = Skipped(strict=Path(path).suffix == ".jsonl")
        for record in read_records(path, skipped):
            if record.messages:
                raise ValueError(f'{record.where}: expected a "text", found a conversation')
            texts.append(record.text)
    if not texts:
        raise ValueError(f"no text in {', '.join(map(str, paths))}; give at least one file that is not empty")
    return texts


def token_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Tensor:
    """All texts as one stream of ids (length,) int64, each opened as the tokenizer opens a text, or by its EOS."""
    ids: list[int] = []
    for text in texts:
        ids.extend(_opened(tokenizer, tokenizer(text, verbose=False).input_ids))
    return torch.tensor(ids)
