"""Text that the target writes itself, which is what a draft will be asked about.

`continue_stream` continues pieces of a text; `regenerate` replaces the answers in training data by the target's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..prepare import prepared
from .features import fingerprint
from .files import check_facts, read_facts, write_whole
from .processes import this_process
from .records import Record, Skipped, read_records
from .text import render_chat, rendered

FACTS = "answers.json"


@dataclass(frozen=True)
class Answering:
    """How the target answers.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of sampled answers.
        batch: conversations at a time; one file holds as many.
        opening: share of a plain text that is kept, at most `longest` tokens of it; the target writes the rest. A text
            that is longer than the rest can be is cut into pieces first (`answerable`).
        longest: tokens of a prompt, counted from its end for conversations; longer ones are cut.

    Raises:
        ValueError: if the length or the temperature is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    batch: int = 16
    opening: float = 0.25
    longest: int = 512

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"answers of {self.max_new_tokens} tokens at temperature {self.temperature}; expected at least 1 token "
                "and a temperature of at least 0"
            )


@torch.no_grad()
def continue_stream(
    target: PreTrainedModel, stream: Tensor, count: int, window: int, seed: int, batch: int = 64
) -> Tensor:
    """Windows (count, window) of the target's own greedy text, each begun by a quarter window of `stream`."""
    generator, prompt = torch.Generator().manual_seed(seed), window // 4
    windows = []
    for begin in tqdm(range(0, count, batch), desc="the target writes", unit="batch"):
        starts = torch.randint(len(stream) - prompt, (min(batch, count - begin),), generator=generator)
        prompts = torch.stack([stream[s : s + prompt] for s in starts]).to(target.device)
        windows.append(
            target.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=window - prompt,
                max_new_tokens=window - prompt,
                do_sample=False,
            ).cpu()
        )
    return torch.cat(windows)


def answerable(
    sources: Sequence[str | Path], tokenizer: PreTrainedTokenizerBase, how: Answering, skipped: Skipped
) -> Iterator[Record]:
    """The records of all sources as `regenerate` takes them, so that all of the data is used.

    Args:
        sources: as `read_records` takes them. tokenizer: the target's. how: sets the length of a piece.
        skipped: gets records that cannot be used, and conversations that the chat template refuses.

    Yields:
        Conversations and completions as they are, and plain texts in pieces of which the target can write all but the
        opening.
    """
    for source in sources:
        for record in read_records(source, skipped):
            if not record.messages:
                yield from _pieces(record, tokenizer, how)
                continue
            try:
                render_chat(tokenizer, record.messages)
            except ValueError as error:
                skipped.add(record.where, str(error))
            else:
                yield record


def _pieces(record: Record, tokenizer: PreTrainedTokenizerBase, how: Answering) -> Iterable[Record]:
    """A plain text, cut where it is longer than an opening and an answer."""
    size = round(how.max_new_tokens / (1 - how.opening))
    ids = [] if record.prompt else tokenizer(record.text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) <= size:
        return [record]
    texts = (tokenizer.decode(ids[begin : begin + size]) for begin in range(0, len(ids), size))
    return [Record(record.where, text=text) for text in texts if text.strip()]


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    how: Answering,
    folder: Path,
) -> list[Path]:
    """Replace every answer by the target's own, and write the records as JSONL files that training reads.

    A conversation keeps its other turns; each answer is given to what the target has answered before. Of a plain text
    the opening is kept. A file is there whole or not at all; a run that was killed makes those that are missing. Under
    `accelerate launch` each process makes its share.

    Args:
        target: in evaluation mode; it is moved to the process's device, and stays there. On the CPU it runs on the best
            engine that computes the same (`prepare.prepared`).
        tokenizer: the target's. records: the data, of `answerable`. how: length and sampling.
        folder: of the files.

    Returns:
        The files, in the order of the records.

    Raises:
        ValueError: if there are no records, or `folder` holds answers of another target, other data or other settings.
        OSError: if a file cannot be written; those before are kept.
    """
    if not records:
        raise ValueError("there are no records whose answers the target could replace")
    state, folder = this_process(), Path(folder)
    facts = {
        "target": fingerprint(target),
        "answering": asdict(how),
        "records": len(records),
        "text": _digest(json.dumps([(r.text, r.prompt, r.messages) for r in records])),
        "chat_template": _digest(json.dumps(tokenizer.chat_template)),
    }
    with state.main_process_first():
        _open_folder(folder, facts)
    target.to(state.device).eval()
    groups = [records[i : i + how.batch] for i in range(0, len(records), how.batch)]
    paths = [folder / f"answers-{number:05d}.jsonl" for number in range(len(groups))]
    mine = range(state.process_index, len(groups), state.num_processes)
    left = [number for number in mine if not paths[number].exists()]
    with prepared(target) if left else nullcontext():
        for number in tqdm(left, desc="the target answers", unit="batch", disable=not state.is_main_process):
            torch.manual_seed(how.seed + number)
            lines = "".join(json.dumps(value) + "\n" for value in _answered(target, tokenizer, groups[number], how))
            write_whole(paths[number], lambda path, lines=lines: path.write_text(lines), "answers")
    state.wait_for_everyone()
    return paths


def _open_folder(folder: Path, facts: dict[str, Any]) -> None:
    path = folder / FACTS
    if path.exists():
        check_facts(facts, read_facts(path), folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda fresh: fresh.write_text(json.dumps(facts)), "the manifest of the answers")


def _digest(text: str) -> str:
    """What tells one text from another."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _answered(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], how: Answering
) -> Iterator[dict[str, Any]]:
    """The records with the target's answers, as values of JSONL lines."""
    texts = [record for record in records if not record.messages]
    prompts = [_opening(tokenizer, record, how) for record in texts]
    completions = iter(zip(prompts, _answers(target, tokenizer, prompts, how), strict=True))
    chats = iter(_chats(target, tokenizer, [r for r in records if r.messages], how))
    for record in records:
        if record.messages:
            yield {"messages": next(chats)}
        else:
            prompt, completion = next(completions)
            yield {"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "completion": completion}


def _opening(tokenizer: PreTrainedTokenizerBase, record: Record, how: Answering) -> list[int]:
    """The tokens of a plain text's given part, or of its prompt."""
    if record.prompt:
        return tokenizer(record.prompt).input_ids[-how.longest :]
    ids = tokenizer(record.text, verbose=False).input_ids
    return ids[: min(max(1, round(len(ids) * how.opening)), how.longest)]


def _chats(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], how: Answering
) -> list[list[dict[str, str]]]:
    """All conversations, turn by turn together; each answer follows the answers before."""
    chats: list[list[dict[str, str]]] = [[] for _ in records]
    for turn in range(max((len(record.messages) for record in records), default=0)):
        asked = []
        for number, record in enumerate(records):
            if turn < len(record.messages):
                if record.messages[turn]["role"] == "assistant":
                    asked.append(number)
                else:
                    chats[number].append(record.messages[turn])
        prompts = [_question(tokenizer, chats[number], how) for number in asked]
        for number, answer in zip(asked, _answers(target, tokenizer, prompts, how), strict=True):
            chats[number].append({"role": "assistant", "content": answer})
    return chats


def _question(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], how: Answering) -> list[int]:
    text = rendered(tokenizer, messages, ask=True)
    return tokenizer(text, add_special_tokens=False).input_ids[-how.longest :]


@torch.no_grad()
def _answers(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], how: Answering
) -> list[str]:
    """The target's answers to all prompts, computed together with padding on the left."""
    if not prompts:
        return []
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling: dict[str, Any] = {"do_sample": False}
    if how.temperature:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0}
    written = target.generate(
        ids.to(target.device),
        attention_mask=mask.to(target.device),
        max_new_tokens=how.max_new_tokens,
        pad_token_id=padding,
        **sampling,
    )
    return tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
