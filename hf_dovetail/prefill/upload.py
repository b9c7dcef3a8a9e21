"""Bytes between the host and an accelerator, beside its computation where it has streams.

Knows tensors and a device; knows no models.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_PIECE_BYTES = 32 << 20  # of page-locked memory; two pieces, so that filling one and sending the other overlap
_ALIGNED_BYTES = 256


class Lane:
    """Work of a device that runs beside its current stream. Without streams everything runs at once, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        try:
            self._stream: torch.Stream | None = torch.Stream(device=device)
        except (RuntimeError, NotImplementedError):
            self._stream = None

    @property
    def beside(self) -> bool:
        """Whether the device has streams."""
        return self._stream is not None

    def queue(self) -> AbstractContextManager:
        """What is enqueued inside the block runs in this lane."""
        return nullcontext() if self._stream is None else self._stream

    def mark(self) -> torch.Event | None:
        """The end of what is in this lane so far."""
        return None if self._stream is None else self._stream.record_event()

    def wait(self, event: torch.Event | None) -> None:
        """Let this lane's further work begin after `event`."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def current_mark(self) -> torch.Event | None:
        """The end of what is in the device's current stream so far."""
        return None if self._stream is None else torch.accelerator.current_stream(self.device).record_event()

    def current_waits(self, event: torch.Event | None) -> None:
        """Let the current stream's further work begin after `event`."""
        if self._stream is not None and event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)


class Upload:
    """Sends sets of tensors through one buffer on the device, the next while the last is computed with.

    Args:
        device: where to.
        capacity: bytes of the largest set, see `buffer_bytes`.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._lane = Lane(device)
        self._buffer = torch.empty(capacity, dtype=torch.uint8, device=device)
        self._lane.wait(self._lane.current_mark())  # the buffer's memory may have been another's
        self._pieces = [_page_locked(_PIECE_BYTES) for _ in range(2)] if self._lane.beside else [None]
        self._piece_sent: list[torch.Event | None] = [None, None]
        self._turn = 0
        self._sent: list[Tensor] = []
        self._arrived: torch.Event | None = None
        self._emptied: torch.Event | None = None

    def send(self, tensors: list[Tensor]) -> None:
        """Begin to bring a set of the host's tensors to the device; `receive` hands it out."""
        self._lane.wait(self._emptied)
        self._sent, end = [], 0
        with self._lane.queue():
            for tensor in tensors:
                data = tensor.detach().contiguous().view(-1).view(torch.uint8)
                place = self._buffer[end : end + data.numel()]
                self._send(data, place)
                self._sent.append(place.view(tensor.dtype).view(tensor.shape))
                end += _aligned(data.numel())
        self._arrived = self._lane.mark()

    def receive(self) -> list[Tensor]:
        """The set that was sent, in the device's buffer: to be copied on, before `emptied`, in the current stream."""
        self._lane.current_waits(self._arrived)
        return self._sent

    def emptied(self) -> None:
        """Allow the next `send`."""
        self._sent = []
        self._emptied = self._lane.current_mark()

    def _send(self, data: Tensor, place: Tensor) -> None:
        if self._pieces[0] is None:
            place.copy_(data)
            return
        for begin in range(0, data.numel(), _PIECE_BYTES):
            part = data[begin : begin + _PIECE_BYTES]
            self._turn = 1 - self._turn
            if self._piece_sent[self._turn] is not None:
                self._piece_sent[self._turn].synchronize()
            piece = self._pieces[self._turn][: part.numel()]
            piece.copy_(part)
            place[begin : begin + part.numel()].copy_(piece, non_blocking=True)
            self._piece_sent[self._turn] = self._lane.mark()


class Fetch:
    """Brings tensors from a device to the host, one set at a time, beside the computation that follows.

    Args:
        device: where from.
    """

    def __init__(self, device: torch.device) -> None:
        self._lane = Lane(device)
        self._sources: tuple[Tensor, ...] = ()
        self._copies: tuple[Tensor, ...] = ()
        self._done: torch.Event | None = None

    def begin(self, tensors: tuple[Tensor, ...]) -> None:
        """Begin to bring tensors that the current stream computes; `end` hands them out."""
        if not self._lane.beside:
            self._copies = tuple(tensor.to("cpu") for tensor in tensors)
            return
        self._sources = tensors  # their memory must not be given to others before the copies are done
        self._lane.wait(self._lane.current_mark())
        with self._lane.queue():
            self._copies = tuple(_fetched(tensor) for tensor in tensors)
        self._done = self._lane.mark()

    def end(self) -> tuple[Tensor, ...]:
        """The host's copies, once they are there; empty if nothing was begun."""
        if self._done is not None:
            self._done.synchronize()
        copies, self._sources, self._copies, self._done = self._copies, (), (), None
        return copies


def buffer_bytes(tensors: list[Tensor]) -> int:
    """What a set of tensors takes in an `Upload`'s buffer."""
    return sum(_aligned(tensor.nbytes) for tensor in tensors)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _page_locked(count: int) -> Tensor | None:
    """Host memory that a device can read by itself, or None where there is none."""
    try:
        return torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:
        return None


def _fetched(tensor: Tensor) -> Tensor:
    memory = _page_locked(tensor.nbytes)
    if memory is None:
        return tensor.to("cpu")
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)
