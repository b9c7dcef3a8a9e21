"""One run: engines in turns, all rows of an engine interleaved over prompts and repeats, and the result as one dict."""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibrate import calibrate
from ..config import TreeShape
from ..engines import ENGINES, quantised
from ..prepare import prepare_target
from . import llamacpp
from .machine import read_bandwidth, record
from .models import Models
from .parts import ROWS, draft_ms, read_bytes, verify_ms, weight_shapes
from .prompts import PromptSet
from .rows import PLAIN, Answer, answer

FORMAT = 1
KIND = "hf-dovetail bench"
TORCH_ENGINES = tuple(dict.fromkeys(("eager", *ENGINES)))
LLAMA_ENGINES = {f"llama.cpp-{kind}": kind for kind in llamacpp.TYPES}
ENGINE_NAMES = (*TORCH_ENGINES, *LLAMA_ENGINES)
_AGREEMENT = 32
_WARM_UP = 16
_CALIBRATION_S = 4.0
_NEEDS = (
    "a wide draft needs --widen, a wide or random one a --draft that reads features, dovetail-lm-auto and assisted-* "
    "need --assistant or --widen, llama.cpp has plain and lookup-10 only"
)


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Args:
        prompts: the sets.
        new_tokens: tokens of each answer.
        repeats: timed answers of each row to each prompt, in each turn of an engine.
        cycles: turns of each engine.
        engines, rows: names of those to run; `plain` always runs, since the others are compared with it.
        context: cached positions while the parts of a round are measured.
        part_repeats: timings of each part, in each turn of an engine.
        shape: of the fixed trees.
    """

    prompts: tuple[PromptSet, ...]
    new_tokens: int = 64
    repeats: int = 2
    cycles: int = 2
    engines: tuple[str, ...] = ENGINE_NAMES
    rows: tuple[str, ...] | None = None
    context: int = 300
    part_repeats: int = 7
    shape: TreeShape = field(default_factory=TreeShape)


@dataclass
class _Turn:
    """One engine, ready to decode.

    Args:
        engine: its name.
        rows: names of the rows it may run.
        decode: (row, prompt, new_tokens, seed, sampling) -> Answer; raises ValueError for what it cannot do.
        target: the prepared target, or None for llama.cpp.
        read_bytes: that one token reads.
    """

    engine: str
    rows: list[str]
    decode: Callable[[str, Tensor, int, int, dict[str, Any]], Answer]
    target: PreTrainedModel | None
    read_bytes: int


class Run:
    """One measurement.

    Args:
        models: what is measured.
        settings: how.
        say: told what is being done.

    Raises:
        ValueError: if a prompt with its answer is longer than the target's positions, or a row cannot be measured with
            these models and engines.
    """

    def __init__(self, models: Models, settings: Settings, say: Callable[[str], None] = lambda text: None) -> None:
        self._models, self._settings, self._say = models, settings, say
        self._record = record()  # of what runs, whatever is committed meanwhile
        self._prompts = [
            (group, [models.tokenizer(text, return_tensors="pt").input_ids for text in group.prompts])
            for group in settings.prompts
        ]
        self._check_lengths()
        self._check_rows()
        self._answers: dict[tuple[str, str, str], list[list[Answer]]] = {}
        self._same: dict[tuple[str, str, str], list[bool]] = {}
        self._reference: dict[tuple[str, int], Answer] = {}  # the first engine's plain answers
        self._skipped: dict[tuple[str, str | None, str | None], str] = {}
        self._ceilings: list[dict[str, Any]] = []
        self._verify: dict[str, list[dict[int, float]]] = {}
        self._drafts: dict[str, list[float]] = {}
        self._bytes: dict[str, int] = {}

    def results(self) -> Iterator[dict[str, Any]]:
        """Measure; after each engine's turn, the result so far as it is written to JSON, `complete` at the end."""
        with tempfile.TemporaryDirectory() as folder:
            for cycle in range(self._settings.cycles):
                for engine in self._settings.engines:
                    if (engine, None, None) in self._skipped:
                        continue
                    self._say(f"cycle {cycle + 1} of {self._settings.cycles}: {engine}")
                    try:
                        self._run_turn(engine, Path(folder))
                    except ValueError as error:
                        self._skip(engine, None, None, error)
                    if self._answers:
                        yield self._result(complete=False)
        if not self._answers:
            raise ValueError(f"no engine could run: {'; '.join(self._skipped.values())}")
        yield self._result(complete=True)

    def _check_lengths(self) -> None:
        limit = self._models.positions
        for group, prompts in self._prompts:
            for number, prompt in enumerate(prompts):
                length = prompt.shape[1]
                if length == 0 or length + self._settings.new_tokens > limit:
                    raise ValueError(
                        f"prompt {number} of {group.name} has {length} tokens, and {self._settings.new_tokens} new "
                        f"ones are asked for; expected at least 1, and at most {limit} together"
                    )

    def _check_rows(self) -> None:
        ours = [row.name for row in self._models.rows]
        names = [llamacpp.ROW_NAMES if engine in LLAMA_ENGINES else ours for engine in self._settings.engines]
        possible = list(dict.fromkeys(chain.from_iterable(names)))
        impossible = [name for name in self._settings.rows or () if name not in possible]
        if impossible:
            raise ValueError(
                f"--rows: with these models and engines there is no {', '.join(impossible)}; expected some of "
                f"{', '.join(possible)} ({_NEEDS})"
            )

    def _run_turn(self, engine: str, folder: Path) -> None:
        """One engine's turn; what it needed is free afterwards."""
        try:
            if engine in LLAMA_ENGINES:
                with closing(self._open_llama(LLAMA_ENGINES[engine], folder)) as model:
                    self._measure(self._llama_turn(engine, model))
            else:
                self._measure(self._torch_turn(engine))
        finally:
            gc.collect()

    def _torch_turn(self, engine: str) -> _Turn:
        target = self._models.make_target()
        shapes = weight_shapes(target)
        with _silent(quantised.logger):  # nobody wants the weights of a target that was made for this turn back
            prepare_target(target, engine=engine)
        rows = {row.name: row for row in self._models.rows}
        for row in rows.values():
            if self._wanted(row.name):
                row.before()
                if row.draft is not None and row.draft.tree == "auto":  # as after `hf-dovetail calibrate`
                    calibrate(target, row.draft, progress=False, budget_s=_CALIBRATION_S)

        def decode(row: str, prompt: Tensor, new: int, seed: int, sampling: dict[str, Any]) -> Answer:
            return answer(target, rows[row], prompt, new, seed, **sampling)

        return _Turn(engine, list(rows), decode, target, read_bytes(target, shapes, self._settings.context))

    def _llama_turn(self, engine: str, model: llamacpp.LlamaCpp) -> _Turn:
        def decode(row: str, prompt: Tensor, new: int, seed: int, sampling: dict[str, Any]) -> Answer:
            if sampling.get("do_sample"):
                raise ValueError("llama.cpp draws with a generator of its own; its rows are greedy")
            return model.answer(row, prompt, new)

        return _Turn(engine, list(llamacpp.ROW_NAMES), decode, None, model.file_bytes)

    def _open_llama(self, kind: str, folder: Path) -> llamacpp.LlamaCpp:
        path = folder / f"{kind}.gguf"
        if not path.exists():
            target = self._models.make_target()
            reason = llamacpp.why_not(target)
            if reason is not None:
                raise ValueError(reason)
            llamacpp.write_files(target, folder)
        longest = max(prompt.shape[1] for _, prompts in self._prompts for prompt in prompts)
        return llamacpp.LlamaCpp(path, longest + self._settings.new_tokens + 32)

    @torch.no_grad()
    def _measure(self, turn: _Turn) -> None:
        """One engine's turn: the machine, the parts of a round, and all rows interleaved."""
        self._bytes[turn.engine] = turn.read_bytes
        self._ceilings.append(read_bandwidth(repeats=5))
        if turn.target is not None:
            self._measure_parts(turn.engine, turn.target)
        rows = [name for name in turn.rows if name == PLAIN or self._wanted(name)]
        for name in rows:
            self._warm_up(turn, name)
        for repeat in range(self._settings.repeats):
            self._say(f"{turn.engine}: repeat {repeat + 1} of {self._settings.repeats}")
            for group, prompts in self._prompts:
                for name in rows:
                    if not self._is_skipped(turn.engine, name, group.name):
                        self._answers.setdefault((turn.engine, name, group.name), []).append([])
                for number, prompt in enumerate(prompts):
                    self._answer_all(turn, rows, group, number, prompt)

    def _wanted(self, name: str) -> bool:
        return self._settings.rows is None or name in self._settings.rows

    def _measure_parts(self, engine: str, target: PreTrainedModel) -> None:
        repeats = self._settings.part_repeats
        tokens = torch.cat([prompt for _, prompts in self._prompts for prompt in prompts], dim=1)
        needed = self._settings.context + 4 * (repeats + 2)
        text = tokens.repeat(1, -(-needed // tokens.shape[1]))[:, :needed]
        self._verify.setdefault(engine, []).append(verify_ms(target, text[:, : self._settings.context], repeats))
        for name, draft in self._models.drafts.items():
            cost = draft_ms(draft, target, self._settings.shape, text, repeats)
            self._drafts.setdefault(name, []).append(cost)

    def _warm_up(self, turn: _Turn, name: str) -> None:
        """One short answer of each kind; a row that cannot decode a set is left out, with the reason."""
        for group, prompts in self._prompts:
            if self._is_skipped(turn.engine, name, group.name):
                continue
            try:
                turn.decode(name, prompts[0], min(_WARM_UP, self._settings.new_tokens), 0, group.sampling)
            except ValueError as error:
                self._skip(turn.engine, name, group.name, error)

    def _answer_all(self, turn: _Turn, rows: list[str], group: PromptSet, number: int, prompt: Tensor) -> None:
        """One prompt, answered by all rows in turn."""
        plain = None
        for name in rows:
            if self._is_skipped(turn.engine, name, group.name):
                continue
            found = turn.decode(name, prompt, self._settings.new_tokens, number, group.sampling)
            key = (turn.engine, name, group.name)
            self._answers[key][-1].append(found)
            if name == PLAIN:
                plain = found
                self._reference.setdefault((group.name, number), found)
            if plain is not None:
                self._same.setdefault(key, []).append(found.tokens == plain.tokens)

    def _skip(self, engine: str, row: str | None, group: str | None, error: ValueError) -> None:
        self._skipped[engine, row, group] = str(error)
        self._say(f"skipped {' '.join(part for part in (engine, row, group) if part)}: {error}")

    def _is_skipped(self, engine: str, row: str, group: str) -> bool:
        return (engine, row, group) in self._skipped

    def _result(self, complete: bool) -> dict[str, Any]:
        """Everything so far, with medians."""
        settings = self._settings
        ceiling = statistics.median(part["read_gb_s"] for part in self._ceilings)
        return {
            "kind": KIND,
            "format": FORMAT,
            "complete": complete,
            "record": self._record,
            "widened": self._models.widened,
            "models": self._models.describe,
            "settings": {
                "new_tokens": settings.new_tokens,
                "repeats": settings.repeats,
                "cycles": settings.cycles,
                "context": settings.context,
                "shape": vars(settings.shape),
                "prompts": {
                    group.name: {"tokens": [p.shape[1] for p in prompts], **group.sampling}
                    for group, prompts in self._prompts
                },
            },
            "ceiling": {"read_gb_s": ceiling, "each_turn": self._ceilings},
            "engines": {engine: self._engine_result(engine, ceiling) for engine in self._bytes},
            "draft_ms_per_round": {name: _summary(values) for name, values in self._drafts.items()},
            "rows": [self._row_result(*key) for key in self._answers],
            "skipped": [
                {"engine": engine, "row": row, "prompts": group, "reason": reason}
                for (engine, row, group), reason in self._skipped.items()
            ],
        }

    def _engine_result(self, engine: str, ceiling: float) -> dict[str, Any]:
        """The engine's verification by rows, and how near one token comes to the ceiling."""
        size, turns = self._bytes[engine], self._verify.get(engine, [])
        result: dict[str, Any] = {"read_bytes_per_token": size}
        if turns:
            result["verify_ms"] = {str(rows): _summary([turn[rows] for turn in turns]) for rows in ROWS}
        if turns:
            one_token_ms = result["verify_ms"]["1"]["median"]
        else:  # llama.cpp: its forward pass is not timed alone
            keys = [key for key in self._answers if key[:2] == (engine, PLAIN)]
            one_token_ms = statistics.median(self._decode_ms(repeat) for key in keys for repeat in self._answers[key])
        result["one_token_ms"] = round(one_token_ms, 3)
        result["read_gb_s"] = round(size / one_token_ms / 1e6, 2)
        result["percent_of_ceiling"] = round(100 * size / one_token_ms / 1e6 / ceiling, 1)
        return result

    @staticmethod
    def _decode_ms(repeat: list[Answer]) -> float:
        return sum(a.decode_ms for a in repeat) / max(sum(a.decoded for a in repeat), 1)

    def _row_result(self, engine: str, row: str, group: str) -> dict[str, Any]:
        """One row: medians over the repeats, each the sum over all prompts."""
        key = (engine, row, group)
        repeats = self._answers[key]
        tokens = sum(len(a.tokens) for a in repeats[0])
        wall = [sum(a.wall_ms for a in repeat) / sum(len(a.tokens) for a in repeat) for repeat in repeats]
        rounds = sum(a.rounds for a in repeats[-1])
        same = self._same.get(key, [])
        return {
            "engine": engine,
            "row": row,
            "prompts": group,
            "widened": self._models.widened is not None,
            "ms_per_token": round(statistics.median(wall), 3),
            "decode_ms_per_token": round(statistics.median(map(self._decode_ms, repeats)), 3),
            "samples_ms_per_token": [round(value, 3) for value in wall],
            "tokens": tokens,
            "rounds": rounds,
            "tokens_per_round": round(sum(a.decoded for a in repeats[-1]) / max(rounds, 1), 3),
            **_parts(repeats),
            "identical_to_plain": f"{sum(same)} of {len(same)}",
            "agrees_with_first_engine": self._agreement(group, repeats[-1]),
        }

    def _agreement(self, group: str, answers: list[Answer]) -> float | None:
        """Share of the first 32 tokens that are the first engine's plain ones, position by position."""
        if (group, 0) not in self._reference:
            return None
        pairs = [
            pair
            for number, found in enumerate(answers)
            for pair in zip(found.tokens[:_AGREEMENT], self._reference[group, number].tokens[:_AGREEMENT], strict=True)
        ]
        return round(sum(a == b for a, b in pairs) / len(pairs), 3)


def _parts(repeats: list[list[Answer]]) -> dict[str, float]:
    """A Dovetail row's nodes and times per round, medians over the repeats; nothing for the other rows.

    And how many of its answers were disturbed by other processes.
    """
    if any(a.stats is None for repeat in repeats for a in repeat):
        return {}
    rounds = [max(sum(a.stats.rounds for a in repeat), 1) for repeat in repeats]
    result = {"answers_on_shared_cores": sum(a.stats.cores_shared for repeat in repeats for a in repeat)}
    for name in ("drafted", "draft_ms", "verify_ms", "overhead_ms"):
        sums = [sum(a.stats[name] for a in repeat) for repeat in repeats]
        shares = [value / count for value, count in zip(sums, rounds, strict=True)]
        key = "nodes_per_round" if name == "drafted" else f"{name}_per_round"
        result[key] = round(statistics.median(shares), 3)
    return result


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "each_turn": [round(value, 3) for value in values]}


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Keep a module's warnings to itself."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
