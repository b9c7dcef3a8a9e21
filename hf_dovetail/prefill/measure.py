"""What one layer of a target takes on the CPU, on the accelerator, and on the way there: measured once, then kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from ..anatomy import CACHE, decoder_layers
from ..curves import described_path
from ..fingerprint import accelerator_name, cpu_name, geometry, versions
from ..threads import chosen_threads, target_threads
from .calls import BLOCK_ROWS, Blocks, Call
from .passes import arrived, sources
from .switch import current, redirect, switch_off
from .threshold import LayerTimes, least_rows, load_times, save_times
from .upload import Fetch, Upload, buffer_bytes

logger = logging.get_logger(__name__)

_FEW_ROWS = 64
_QUICK_MS = 100.0  # for `_FEW_ROWS` on the CPU; four times as many are timed too, else twice as many
_ENOUGH_MS = 200.0  # of repetitions of one measurement
_MOST_RUNS = 5
_MOST_TRIES = 3  # on a machine that others use too
_TOLERANCE = 0.05  # of the largest value; rounding to bf16 stays below 0.02, another function far above

_measured: dict[Any, LayerTimes] = {}


def measured_threshold(model: PreTrainedModel, engine: str, device: torch.device) -> tuple[int | None, str | None]:
    """The rows from which on a prompt is faster through `device`, or None and the reason.

    The times come from this process, from the user's cache, or from trying (a second for a 7 B target).

    Raises:
        RuntimeError: if the device computes a layer differently.
    """
    description = describe(model, engine, device)
    path = described_path("prefill", description)
    times = _measured.get(path) or load_times(path)
    if times is None:
        times = measure(model, device)
        save_times(times, path, description)
    _measured[path] = times
    rows = least_rows(times)
    (_, host_ms), (count, device_ms) = times.host[1], times.device[1]
    found = (
        f"a layer takes {host_ms:.1f} ms for {times.host[1][0]} rows on the CPU; on {device} {device_ms:.1f} ms for "
        f"{count} rows, after {times.upload_ms:.1f} ms of upload"
    )
    logger.info("%s", found)
    return rows, None if rows is not None else found


def describe(model: PreTrainedModel, engine: str, device: torch.device) -> dict[str, Any]:
    """What these times depend on."""
    return {
        "target": geometry(model),
        "engine": engine,
        "threads": chosen_threads(),
        "cpu": [cpu_name(), torch.backends.cpu.get_cpu_capability()],
        "device": [accelerator_name(device), device.index],
        "versions": versions(),
    }


@torch.no_grad()
def measure(model: PreTrainedModel, device: torch.device) -> LayerTimes:
    """Time the target's first layer on both sides.

    Raises:
        RuntimeError: if the device computes it differently, or the machine is too busy for its clock to tell.
    """
    text = model.config.get_text_config(decoder=True)
    most = min(BLOCK_ROWS, getattr(text, "max_position_embeddings", None) or BLOCK_ROWS)
    layers = decoder_layers(model.get_decoder())
    layer = layers[0]
    with target_threads():
        few, many = (_first_call(model, rows) for rows in (min(_FEW_ROWS, most // 4), most))
        upload, fetch = Upload(device, buffer_bytes(sources(layer))), Fetch(device)

        def send() -> nn.Module:
            upload.send(sources(layer))
            there = arrived(layer, upload)
            torch.accelerator.synchronize(device)
            return there

        def there(call: Call) -> Tensor:
            hidden, states = Blocks(device)(twin, call)
            fetch.begin(states.new)
            fetch.end()
            return hidden.to("cpu")

        def here(call: Call) -> Tensor:
            return type(layer).forward(layer, call.hidden, **call.named)

        twin = send()
        _compare(here(_again(few, text)), there(_again(few, text)), device)
        upload_ms = _best_ms(send)
        device_points = tuple((_rows(call), _best_ms(lambda c=call: there(_again(c, text)))) for call in (few, many))
        host_points = _host_points(model, lambda call: here(_again(call, text)), few)
    return LayerTimes(upload_ms, device_points, host_points)


def _host_points(model: PreTrainedModel, here: Callable[[Call], Any], few: Call) -> tuple:
    """Two points of the CPU's time.

    Raises:
        RuntimeError: if more rows took less time: such times are not worth keeping.
    """
    for _ in range(_MOST_TRIES):
        few_ms = _best_ms(lambda: here(few))
        more = _first_call(model, _rows(few) * (4 if few_ms < _QUICK_MS else 2))
        more_ms = _best_ms(lambda: here(more))  # noqa: B023 - run at once
        if more_ms > few_ms:
            return (_rows(few), few_ms), (_rows(more), more_ms)
    raise RuntimeError(f"the CPU took {few_ms:.1f} ms for {_rows(few)} rows and {more_ms:.1f} ms for {_rows(more)}")


class _Inputs:
    """A pass that computes nothing and keeps what the first layer is called with."""

    def __init__(self) -> None:
        self.call: Call | None = None

    def takes(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> bool:
        return True

    def run(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> Tensor:
        call = Call.of(layer, args, named)
        self.call = self.call or call
        return call.hidden


def _first_call(model: PreTrainedModel, rows: int) -> Call:
    """What a pass of `rows` tokens calls the first layer with."""
    decoder, inputs = model.get_decoder(), _Inputs()
    text = model.config.get_text_config(decoder=True)
    ids = (torch.arange(rows, device="cpu") % text.vocab_size).unsqueeze(0)
    with _asking(inputs, model):
        decoder.forward(input_ids=ids, use_cache=True, **{CACHE: DynamicCache(config=text)})
    return inputs.call


@contextmanager
def _asking(inputs: _Inputs, model: PreTrainedModel):
    layers = decoder_layers(model.get_decoder())
    redirect(layers)
    token = current.set(inputs)
    try:
        yield
    finally:
        current.reset(token)
        switch_off(model.get_decoder(), layers)


def _again(call: Call, text: Any) -> Call:
    """The same call with an empty cache."""
    cache = DynamicCache(config=text)
    named = {name: cache if value is call.cache else value for name, value in call.named.items()}
    return replace(call, named=named, cache=cache)


def _rows(call: Call) -> int:
    return call.hidden.shape[1]


def _best_ms(run: Callable[[], Any]) -> float:
    """The shortest of a few runs, after one that warms up."""
    spent: list[float] = []
    while len(spent) < 2 or (sum(spent) < _ENOUGH_MS and len(spent) < _MOST_RUNS):
        begin = time.perf_counter()
        run()
        spent.append(1e3 * (time.perf_counter() - begin))
    return min(spent[1:])


def _compare(host: Tensor, device: Tensor, name: torch.device) -> None:
    error, largest = (host.float() - device.float()).abs().max(), host.float().abs().max()
    if not bool(error <= _TOLERANCE * largest):
        raise RuntimeError(f"a layer's result on {name} differs by {float(error):.3g} of {float(largest):.3g}")
