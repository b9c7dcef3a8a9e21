"""Step 4: the target on the CPU on every engine that takes it, plain, with prompt lookup, and with Dovetail.

All rows answer the same prompts in turn, in an order that rotates; a prompt counts when every row has answered it.
What a row or an engine refuses is part of the result. Times are of whole calls of `generate`, prefill included.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import humaneval_prompts
from demo_corpus import SEPARATOR
from transformers import AutoTokenizer, PreTrainedModel

from hf_dovetail import DovetailAssistantModel, TreeShape, prepare_target
from hf_dovetail.engines import ENGINES

from .drafts import load_target
from .machine import describe, read_gb_per_s
from .plan import Size, Work, read_json, write_json

SHAPE = TreeShape(nodes=16, depth=7, top_k=10)
LOOKUP_TOKENS, WARM_UP_TOKENS, SAMPLED_EVERY = 10, 16, 4
SAMPLING = {
    "greedy": {"do_sample": False},
    "temperature_1": {"do_sample": True, "temperature": 1.0, "top_k": 0},
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Label:
    """Which row of the result an answer belongs to.

    Args:
        engine: that runs the target.
        method: "plain", "prompt_lookup" or "dovetail".
        blocks: of the draft, or None.
        draft_device: "cuda" or "cpu", or None.
        shape: of the tree, "16/7/10" or "auto", or None.
    """

    engine: str
    method: str
    blocks: int | None = None
    draft_device: str | None = None
    shape: str | None = None


@dataclass
class Row:
    """A way to answer: a target and what else `generate` is given."""

    label: Label
    target: PreTrainedModel
    draft: DovetailAssistantModel | None = None
    options: dict[str, Any] = field(default_factory=dict)
    refusal: str | None = None

    def answer(self, inputs: dict[str, Any], length: int, sampling: str, seed: int) -> dict[str, Any]:
        """One timed call; the draft's own statistics where there is a draft."""
        torch.manual_seed(seed)
        options = {**self.options, **SAMPLING[sampling]}
        if self.draft is not None:
            options["assistant_model"] = self.draft
        begin = time.perf_counter()
        sequence = self.target.generate(**inputs, **options, max_new_tokens=length)
        wall_ms = 1e3 * (time.perf_counter() - begin)
        ids = sequence[0, inputs["input_ids"].shape[1] :].tolist()
        found = {**vars(self.label), "sampling": sampling, "wall_ms": round(wall_ms, 2), "ids": ids}
        if self.draft is not None:
            stats = self.draft.last_stats
            names = ("rounds", "drafted", "prefill_ms", "draft_ms", "verify_ms", "overhead_ms")
            found |= {name: round(stats[name], 2) for name in names}
        return found


def measure(
    work: Work,
    size: Size,
    minutes: float,
    device: torch.device,
    began: float,
    out: Path,
    threads: int | None = None,
    engines: list[str] | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Answer as many prompts as the minutes allow, write `out` after each of them, and return its content.

    Raises:
        FileNotFoundError: if the target or every draft is missing.
        ValueError: if a number of threads is asked for that cannot be.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"--threads is {threads}; expected at least 1")
    work.need(work.target / "training.json", "target")
    if not work.drafts():
        raise FileNotFoundError(f"there is no trained draft in {work.folder}; run the step `draft` first")
    tokenizer, prompts = AutoTokenizer.from_pretrained(work.target), humaneval_prompts()
    chosen = range(0, len(prompts), len(prompts) // size.prompts)[: size.prompts]
    records = _recorded(work.folder / "runs.jsonl")
    threads = choose_threads(work, size, tokenizer(prompts[1], return_tensors="pt"), threads, records)
    torch.set_num_threads(threads["chosen"])
    refusals: list[dict[str, Any]] = []
    rows = list(open_rows(work, device, engines, refusals))
    rows = warm_up(rows, encode(tokenizer, prompts[1]), min(WARM_UP_TOKENS, size.new_tokens), refusals)
    result = {
        "record": describe(device, commit),
        "read_gb_per_s": read_gb_per_s(size.probe_bytes),
        "threads": threads,
        "corpus": read_json(work.corpus / "corpus.json"),
        "target": read_json(work.target / "training.json"),
        "drafts": [read_json(work.draft(blocks) / "training.json") for blocks in work.drafts()],
        "prompts": [f"HumanEval/{index}" for index in chosen],
        "max_new_tokens": size.new_tokens,
        "shape": vars(SHAPE),
    }
    print(f"{len(rows)} rows, ready after {time.perf_counter() - began:.0f} s", flush=True)
    longest_s, deadline = 0.0, began + 60 * minutes
    for turn, index in enumerate(chosen):
        if index in {record["prompt"] for record in records}:
            continue
        begin = time.perf_counter()
        if longest_s and begin + longest_s > deadline:
            print(f"out of time before prompt {index}", flush=True)
            break
        found = answer_all(rows, encode(tokenizer, prompts[index]), size.new_tokens, turn, threads["chosen"])
        for record in found:
            record["prompt"] = index
        _append(work.folder / "runs.jsonl", found)
        records += found
        rows = able(rows, refusals)
        _write(out, result, records, refusals, len(chosen))
        longest_s = max(longest_s, time.perf_counter() - begin)
        print(f"prompt {index}: {len(found)} answers in {time.perf_counter() - begin:.1f} s", flush=True)
    return _write(out, result, records, refusals, len(chosen))


def _write(
    out: Path, result: dict[str, Any], records: list[dict[str, Any]], refusals: list[dict[str, Any]], wanted: int
) -> dict[str, Any]:
    answered = len({record["prompt"] for record in records})
    whole = {**result, "answered": answered, "complete": answered == wanted}
    whole |= {"refused": refusals, "rows": summarize(records)}
    write_json(out, whole)
    return whole


def encode(tokenizer: Any, prompt: str) -> dict[str, torch.Tensor]:
    """A prompt as the target saw texts in training: opened by the separator."""
    encoded = tokenizer(SEPARATOR + prompt, return_tensors="pt")
    return {"input_ids": encoded.input_ids, "attention_mask": encoded.attention_mask}


def choose_threads(
    work: Work, size: Size, inputs: Any, asked: int | None, records: list[dict[str, Any]]
) -> dict[str, Any]:
    """The number of threads: as asked or as before the interruption, else the one on which plain decoding is fastest.

    Returns:
        `chosen`, and `plain_ms_per_token` by the numbers tried.
    """
    if records:
        return {"chosen": records[0]["threads"], "plain_ms_per_token": {}}
    if asked is not None:
        return {"chosen": asked, "plain_ms_per_token": {}}
    target, most = load_target(work, CPU), torch.get_num_threads()
    length, tried = min(24, size.new_tokens), {}
    for count in sorted({most, max(most // 2, 1), max(most // 4, 1)}, reverse=True):
        torch.set_num_threads(count)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            target.generate(
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
            )
            times.append(1e3 * (time.perf_counter() - begin) / length)
        tried[count] = round(statistics.median(times), 3)
    print(f"plain ms per token by threads: {tried}", flush=True)
    return {"chosen": min(tried, key=tried.__getitem__), "plain_ms_per_token": tried}


def open_rows(
    work: Work, device: torch.device, engines: list[str] | None, refusals: list[dict[str, Any]]
) -> Iterable[Row]:
    """Every row of every engine that takes the target, each with a draft of its own; the others go to `refusals`."""
    for name in engines or engine_names():
        try:
            target = prepare_target(load_target(work, CPU), engine=name)
        except Exception as error:
            refusals.append({**vars(Label(name, "prepare_target")), "reason": _reason(error)})
            continue
        yield Row(Label(name, "plain"), target)
        yield Row(Label(name, "prompt_lookup"), target, options={"prompt_lookup_num_tokens": LOOKUP_TOKENS})
        places = [(blocks, device, shape) for blocks in work.drafts() for shape in (SHAPE, "auto")]
        if device != CPU:  # for comparison, the smallest draft beside the target
            places.append((work.drafts()[0], CPU, SHAPE))
        for blocks, place, shape in places:
            shape_name = shape if shape == "auto" else f"{shape.nodes}/{shape.depth}/{shape.top_k}"
            label = Label(name, "dovetail", blocks, place.type, shape_name)
            draft = DovetailAssistantModel.from_pretrained(work.draft(blocks), dtype=torch.bfloat16)
            draft.draft_device = place
            try:
                draft.tree = shape
            except ValueError as error:
                refusals.append({**vars(label), "reason": _reason(error)})
                continue
            yield Row(label, target, draft)


def engine_names() -> list[str]:
    """The package's engines, the untouched layers first: they are the baseline."""
    return ["eager", *(name for name in ENGINES if name != "eager")]


def warm_up(rows: list[Row], inputs: dict[str, Any], length: int, refusals: list[dict[str, Any]]) -> list[Row]:
    """A first answer of every row, which loads kernels and calibrates; the rows that were able to give it."""
    for row in rows:
        _try(row, inputs, length, "greedy", 0)
    return able(rows, refusals)


def able(rows: list[Row], refusals: list[dict[str, Any]]) -> list[Row]:
    """The rows that have not failed; why the others did goes to `refusals`."""
    refusals += [{**vars(row.label), "reason": row.refusal} for row in rows if row.refusal]
    return [row for row in rows if not row.refusal]


def answer_all(rows: list[Row], inputs: dict[str, Any], length: int, turn: int, threads: int) -> list[dict[str, Any]]:
    """One prompt, answered by every row in turn; every fourth also sampled, plainly and with the fixed shape."""
    found = []
    shift = turn % max(len(rows), 1)
    for sampling in SAMPLING if turn % SAMPLED_EVERY == 0 else ("greedy",):
        for row in rows[shift:] + rows[:shift]:
            if sampling != "greedy" and (row.label.method == "prompt_lookup" or row.label.shape == "auto"):
                continue
            answer = _try(row, inputs, length, sampling, seed=turn)
            if answer is not None:
                found.append({**answer, "threads": threads})
    return found


def _try(row: Row, inputs: dict[str, Any], length: int, sampling: str, seed: int) -> dict[str, Any] | None:
    """An answer, or None from a row that cannot; the measurement of the others goes on."""
    if row.refusal:
        return None
    try:
        return row.answer(inputs, length, sampling, seed)
    except Exception as error:  # recorded in the result, and shown here
        traceback.print_exc()
        row.refusal = _reason(error)
        return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _recorded(path: Path) -> list[dict[str, Any]]:
    """The answers of a measurement that was interrupted."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    """All answers to a prompt in one write."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per label and sampling: medians over the prompts, ratios of medians, and identical answers.

    `speedup` is against plain decoding on the same engine, `speedup_over_eager` against that on the eager engine.
    """
    names = (*Label.__dataclass_fields__, "sampling")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)

    def plain(engine: str, sampling: str) -> dict[int, dict[str, Any]]:
        return {r["prompt"]: r for r in groups.get((engine, "plain", None, None, None, sampling), [])}

    rows = []
    for key, group in groups.items():
        label = dict(zip(names, key, strict=True))
        row = {**label, "answers": len(group), "ms_per_token_median": _ms_per_token(group)}
        for name, engine in (("speedup", label["engine"]), ("speedup_over_eager", "eager")):
            base = plain(engine, label["sampling"])
            same = [base[r["prompt"]] for r in group if r["prompt"] in base]
            row[name] = round(_ms_per_token(same) / row["ms_per_token_median"], 3) if same else None
        base = plain(label["engine"], label["sampling"])
        row["identical_to_plain"] = sum(r["ids"] == base[r["prompt"]]["ids"] for r in group if r["prompt"] in base)
        rows.append(row | _per_round(group))
    return sorted(rows, key=lambda row: (row["sampling"], row["engine"] != "eager", row["engine"]))


def _ms_per_token(group: list[dict[str, Any]]) -> float:
    return round(statistics.median(r["wall_ms"] / len(r["ids"]) for r in group), 3)


def _per_round(group: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens per round (the prefill's token is no round's), and where the time of a round goes."""
    rounds = sum(r.get("rounds", 0) for r in group)
    if not rounds:
        return {}
    parts = {f"{p}_ms_per_round": sum(r[f"{p}_ms"] for r in group) / rounds for p in ("draft", "verify", "overhead")}
    tokens = sum(len(r["ids"]) - 1 for r in group) / rounds
    nodes = sum(r["drafted"] for r in group) / rounds
    return {k: round(v, 3) for k, v in {"tokens_per_round": tokens, "nodes_per_round": nodes, **parts}.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines to read."""
    lines = [f"{'row':52} {'ms/token':>9} {'speedup':>8} {'tok/round':>9} {'draft':>7} {'verify':>7} identical"]
    for row in rows:
        parts = (row["sampling"], row["engine"], row["method"], row["blocks"], row["draft_device"], row["shape"])
        numbers = [row.get(k) for k in ("tokens_per_round", "draft_ms_per_round", "verify_ms_per_round")]
        cells = ["" if n is None else f"{n:.2f}" for n in numbers]
        lines.append(
            f"{' '.join(str(p) for p in parts if p is not None):52} {row['ms_per_token_median']:9.2f} "
            f"{row['speedup'] or 0:8.2f} {cells[0]:>9} {cells[1]:>7} {cells[2]:>7} "
            f"{row['identical_to_plain']}/{row['answers']}"
        )
    return "\n".join(lines)
