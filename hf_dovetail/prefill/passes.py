"""One pass whose layers are computed on an accelerator, while weights and cache stay on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import logging

from ..anatomy import decoder_layers
from ..cache import snapshot, streamable
from ..curves import MAX_ROWS
from ..packed import PackedWeight
from .calls import Blocks, Call, DeviceStates
from .modules import tensors_of, twin, unfit
from .upload import Fetch, Upload, buffer_bytes

logger = logging.get_logger(__name__)


@dataclass
class Streaming:
    """How the prompts of one target are streamed.

    Args:
        device: the accelerator.
        least_rows: rows of a pass from which on it is streamed.
        failed: whether a pass failed; from then on all stay on the CPU.
        busy: one pass at a time, since the link is what they would share.
    """

    device: torch.device
    least_rows: int
    failed: bool = False
    busy: RLock = field(default_factory=RLock)


@dataclass
class _Link:
    """What one pass has between host and device."""

    upload: Upload
    fetch: Fetch
    blocks: Blocks

    @classmethod
    def to(cls, device: torch.device, layers: list[nn.Module]) -> _Link:
        """A link through which each of the layers fits."""
        largest = max(buffer_bytes(sources(layer)) for layer in layers)
        return cls(Upload(device, largest), Fetch(device), Blocks(device))


class StreamedPass:
    """A pass whose layers are computed on the accelerator; the hidden states stay there from layer to layer.

    Args:
        streaming: device and threshold. decoder: whose pass it is.

    Attributes:
        began: whether it is streamed.
        broke: whether that failed. `undo` then takes the cache back to what it held before.
    """

    def __init__(self, streaming: Streaming, decoder: nn.Module) -> None:
        self._streaming, self._decoder = streaming, decoder
        self._layers: list[nn.Module] = []
        self._next, self._decided = 0, False
        self._link: _Link | None = None
        self._states: DeviceStates | None = None
        self.began = self.broke = False

    def takes(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> bool:
        """Decided at the first layer for all of them; every single token of an answer comes this way."""
        if not self._decided:
            self._decided = True
            batch, rows = (args[0] if args else next(iter(named.values()))).shape[:2]
            if rows > MAX_ROWS and batch * rows >= self._streaming.least_rows:
                self.began = self._begin(layer, Call.of(layer, args, named))
        return self.began

    def _begin(self, layer: nn.Module, call: Call) -> bool:
        self._layers = list(decoder_layers(self._decoder) or ())
        if not self._layers or layer is not self._layers[0] or unfit(self._layers) is not None:
            return False
        if call.hidden.device.type != "cpu" or call.cache is None or not streamable(call.cache):
            return False
        self.undo = snapshot(call.cache)
        self._streaming.busy.acquire()
        if self._streaming.failed:  # while this pass waited
            self._streaming.busy.release()
        return not self._streaming.failed

    def run(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> Tensor:
        """The layer's result on the accelerator, or on the CPU if it is the last."""
        try:
            return self._run(layer, args, named)
        except Exception:
            self.broke = True
            raise

    def _run(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> Tensor:
        """Compute the next layer, send the weights of the one after it, and take the states of the one before."""
        index, last = self._next, len(self._layers) - 1
        if layer is not self._layers[index]:
            raise RuntimeError(f"layer {index} was expected, and another one of {type(layer).__name__} came")
        self._next += 1
        if self._link is None:
            self._link = _Link.to(self._streaming.device, self._layers)
            self._link.upload.send(sources(layer))
        there = arrived(layer, self._link.upload)
        call = Call.of(layer, args, named)
        hidden, states = self._link.blocks(there, call)
        if index < last:
            self._link.upload.send(sources(self._layers[index + 1]))
        self._take(call.cache)
        self._states = states
        self._link.fetch.begin(states.new)
        if index < last:
            return hidden
        hidden = hidden.to("cpu")
        self._take(call.cache)
        return hidden

    def _take(self, cache: Cache) -> None:
        """Give the cache the states whose way back was begun last."""
        copies = self._link.fetch.end()
        if copies:
            cache.update(*copies, self._states.layer)

    def close(self) -> None:
        """Let the next pass begin; if this one has ended early, only when the device is done with what it was given."""
        if not self.began:
            return
        try:
            if self.broke or self._next < len(self._layers):
                _await(self._streaming.device)
            self._link = self._states = None
        finally:
            self._streaming.busy.release()


def sources(layer: nn.Module) -> list[Tensor]:
    """A layer's tensors as they lie in the host's memory."""
    return [t.kernel.stored if isinstance(t, PackedWeight) else t for t in tensors_of(layer)]


def arrived(layer: nn.Module, upload: Upload) -> nn.Module:
    """The layer's twin with the weights that were sent, in the order in which kernels read them."""
    there = {}
    for tensor, copy in zip(tensors_of(layer), upload.receive(), strict=True):
        ordered = tensor.kernel.ordered(copy) if isinstance(tensor, PackedWeight) else copy
        there[id(tensor)] = ordered.clone() if _shares(ordered, copy) else ordered
    upload.emptied()
    return twin(layer, there)


def _shares(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


def _await(device: torch.device) -> None:
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError as error:  # a device that has failed may not answer any more
        logger.info("%s does not answer: %s", device, error)
