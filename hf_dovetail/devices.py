"""Which device a name means, and what crosses between the host and a device.

Copies to and from an accelerator go through pinned memory and nobody waits for them, but for `Arrival.wait`, which is
the one place in a round where the host stands still.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HOST = torch.device("cpu")
Move = Callable[[Tensor, torch.device], Tensor]
"""Copies a tensor to a device; counts what crosses, if it likes."""

_ASYNCHRONOUS = ("cuda", "xpu")
"""Types of devices with a link to pinned memory of the host; "cuda" is ROCm's too. MPS shares the host's memory."""
_MOST_PINNED = 1 << 24
"""Bytes; more, such as the features of a long prompt, go once and as they are: pinned memory is never given back."""


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that `device` names; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: if there is no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        device = accelerator or torch.device("cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"draft_device is {device!r}; expected auto, cpu, or a device such as cuda:1") from error
    if device.type == "cpu" or accelerator is None or device.type != accelerator.type:
        found = "no accelerator" if accelerator is None else f"a device of type {accelerator.type}"
        if device.type not in ("cpu", "meta"):
            raise ValueError(
                f"draft_device is {str(device)!r}, but torch finds {found} on this machine; use 'auto' or 'cpu'"
            )
        return device
    count = torch.accelerator.device_count()
    if (device.index or 0) >= count:
        last = "" if count == 1 else f" to {device.type}:{count - 1}"
        raise ValueError(
            f"draft_device is {str(device)!r}; this machine has {count} of them: expected auto, cpu, or "
            f"{device.type}:0{last}"
        )
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.device(device.type, index)


def to_device(data: Tensor, device: torch.device) -> Tensor:
    """Data on the device; from the host it is on its way, and in order with all that the device does afterwards.

    `data` may be changed as soon as this returns. Pinned memory comes from torch's own cache, which gives none out
    again before the copies from it are done.
    """
    if data.device.type != "cpu" or device.type not in _ASYNCHRONOUS or data.nbytes > _MOST_PINNED:
        return data.to(device)
    return data.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Arrival:
    """Data on its way to the host."""

    _data: Tensor
    _done: torch.Event | None

    def wait(self) -> Tensor:
        """The data, once it is there: all that the device was given before it is done by then."""
        if self._done is not None:
            self._done.synchronize()
        return self._data


def to_host(data: Tensor) -> Arrival:
    """Send a device's data to the host; it may be read after `wait`."""
    if data.device.type not in _ASYNCHRONOUS:
        return Arrival(data.cpu(), None)
    host = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=True)
    host.copy_(data, non_blocking=True)
    return Arrival(host, torch.accelerator.current_stream(data.device).record_event())
