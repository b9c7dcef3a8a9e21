"""Training against the clock: the schedule follows elapsed time, and a killed run goes on from its checkpoint.

Knows a model, an optimizer and a source of losses; knows nothing of what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .plan import Size, Work

PLATEAU_SHARE = 0.4  # of the time; then the rate falls linearly to zero
LOG_EVERY_S = 10.0


def rate(step: int, warmup: int, progress: float) -> float:
    """Share of the peak learning rate: warm-up by steps (compilation takes time, not steps), decay by time."""
    return min((step + 1) / warmup, 1.0) * min((1.0 - progress) / (1.0 - PLATEAU_SHARE), 1.0)


class TimedRun:
    """The steps of a run that has `budget_s` seconds in all, however often it is killed and started again.

    Args:
        path: of the checkpoint; read at once if it is there.
        model, optimizer: what the checkpoint holds.
        budget_s: seconds from `began` on; those of earlier runs, up to their last checkpoint, count.
        save_every_s: seconds between checkpoints.
        facts: what a checkpoint must have in common with this run.
        began: `time.perf_counter()` when this run began, before anything was loaded.

    Attributes:
        step: finished steps.
        log: (elapsed_s, step, loss) about every `LOG_EVERY_S` seconds.
        resumed: how often the run was resumed.

    Raises:
        ValueError: if the checkpoint belongs to another run.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget_s: float,
        save_every_s: float,
        facts: dict[str, Any],
        began: float,
    ) -> None:
        self.path, self.model, self.optimizer, self.facts = path, model, optimizer, facts
        self.budget_s, self.save_every_s = budget_s, save_every_s
        self.step, self.resumed, self.log = 0, 0, []
        self._before_s, self._began, self._pending, self._last = 0.0, began, None, None
        if path.exists():
            self._resume()
        self._logged_s = -LOG_EVERY_S

    @property
    def elapsed_s(self) -> float:
        """Seconds spent by this run and by those that it continues."""
        return self._before_s + time.perf_counter() - self._began

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(self.elapsed_s / self.budget_s, 1.0)

    def steps(self) -> Iterator[int]:
        """Numbers of the steps that there is time for, at least one; saves a checkpoint in between."""
        saved = time.perf_counter()
        while self.progress < 1.0 or self.step == 0:
            yield self.step
            self.step += 1
            if time.perf_counter() - saved >= self.save_every_s:
                self._look(None)  # no checkpoint behind a loss that is not finite
                self.save()
                saved = time.perf_counter()
        self._look(None)
        self._note()

    def watch(self, loss: Tensor) -> None:
        """Look at the loss of the step before, which the device has finished: it never waits for this one.

        Raises:
            FloatingPointError: if that loss is not finite; the last checkpoint stays usable.
        """
        self._look((self.step, loss.detach()))

    def _look(self, pending: tuple[int, Tensor] | None) -> None:
        pending, self._pending = self._pending, pending
        if pending is None:
            return
        step, loss = pending[0], pending[1].item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}; lower the learning rate and start again")
        self._last = (step + 1, round(loss, 4))
        if self.elapsed_s - self._logged_s >= LOG_EVERY_S:
            self._note()

    def _note(self) -> None:
        """Enter the last loss that was looked at into the log, once."""
        if self._last is None or (self.log and self.log[-1][1] == self._last[0]):
            return
        self._logged_s = self.elapsed_s
        self.log.append((round(self.elapsed_s, 1), *self._last))
        print(f"{self.elapsed_s:6.0f} s of {self.budget_s:.0f}, step {self._last[0]}, loss {self._last[1]}", flush=True)

    def save(self) -> None:
        """Write a checkpoint; an interruption leaves the one before."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "resumed": self.resumed,
            "log": self.log,
            "facts": self.facts,
        }
        fresh = self.path.with_name(self.path.name + ".new")
        torch.save(state, fresh)
        fresh.replace(self.path)

    def _resume(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.facts.items():
            if state["facts"].get(name) != value:
                raise ValueError(
                    f"{self.path} belongs to another run: its {name} is {state['facts'].get(name)}, this run's is "
                    f"{value}; choose another --work, or delete that file"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log, self._before_s = state["step"], state["log"], state["elapsed_s"]
        self.resumed = state["resumed"] + 1
        print(f"resuming after step {self.step}, {self._before_s:.0f} s", flush=True)

    def finish(self) -> None:
        """Delete the checkpoint; the result is written."""
        self.path.unlink(missing_ok=True)

    def facts_of_training(self, tokens_per_step: int) -> dict[str, Any]:
        """Steps, tokens, minutes, rate and log, for the JSON."""
        pairs = zip(self.log, self.log[1:], strict=False)
        rates = sorted((b[1] - a[1]) * tokens_per_step / (b[0] - a[0]) for a, b in pairs if b[0] - a[0] > 1)
        return {
            "steps": self.step,
            "tokens": self.step * tokens_per_step,
            "minutes": round(self.elapsed_s / 60, 2),
            "tokens_per_s_median": round(rates[len(rates) // 2]) if rates else None,
            "resumed": self.resumed,
            "log_elapsed_s_step_loss": self.log,
        }


def optimize(
    run: TimedRun, losses: Callable[[int], Iterable[Tensor]], learning_rate: float, warmup: int, clip: float
) -> None:
    """All steps that there is time for; `losses(step)` yields the parts whose sum is the step's loss."""
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for step in run.steps():
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate * rate(step, warmup, run.progress)
        total = torch.zeros((), device=parameters[0].device)
        for part in losses(step):
            part.backward()
            total += part.detach()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.watch(total)


def adamw(model: nn.Module, weight_decay: float, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, its step in one kernel on a GPU, with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


def draw_windows(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) int64 windows that start anywhere in the stream, drawn and gathered on its device."""
    starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator, device=stream.device)
    return stream[starts + torch.arange(length, device=stream.device)].long()


def spread_windows(stream: Tensor, count: int, length: int) -> Tensor:
    """(count, length) int64 windows at even distances: the same in every run."""
    starts = torch.linspace(0, len(stream) - length, count, device=stream.device).long().unsqueeze(1)
    return stream[starts + torch.arange(length, device=stream.device)].long()


def load_stream(work: Work, split: str, device: torch.device, least: int) -> Tensor:
    """(length,) int32 tokens of "train" or "held_out" on the device.

    Raises:
        FileNotFoundError: if the corpus was not made.
        ValueError: if it is shorter than `least` tokens.
    """
    work.need(work.corpus / "corpus.json", "data")
    stream = torch.from_numpy(np.load(work.corpus / f"{split}.npy").astype(np.int32)).to(device)
    if len(stream) < least:
        raise ValueError(f"the {split} corpus has {len(stream)} tokens; expected at least {least}: read more files")
    return stream


def reserve_s(budget_s: float) -> float:
    """Seconds of a step's budget that are kept for validation and for writing the result."""
    return min(0.08 * budget_s, 15.0)


def size_facts(size: Size) -> dict[str, Any]:
    """What makes two runs of different size two runs."""
    return {"hidden_size": size.hidden_size, "layers": size.layers, "vocab_size": size.vocab_size}
