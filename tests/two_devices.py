"""Two devices on a machine that has one: tensors of a simulated accelerator live on the CPU and say otherwise.

`Accelerator()` is a dispatch mode. Inside it `device="xpu:0"` works: such tensors are `Remote` ones, which compute with
each other only. Mixing them with the CPU's raises, as it would on a real one, and so does whatever would stop the host
until the device is done (`item`, boolean indexing). Copies from one side to the other are counted.

Copies that nobody waits for happen late: until the host waits, a copy to it holds rubbish, and what is copied to the
device must stay as it is.

`install_streams` gives the device streams as adverse as they may be: a copy that is allowed to run beside the host
(`non_blocking=True` in a stream of its own) runs when somebody waits for it, and no earlier.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE = torch.device("xpu:0")
_ops = torch.ops.aten
_STOPS_THE_HOST = {
    _ops._local_scalar_dense,
    _ops.nonzero,
    _ops.masked_select,
    _ops.equal,
    _ops.is_nonzero,
    _ops.unique_consecutive,
    _ops._unique2,
}


_alive: WeakIdKeyDictionary = WeakIdKeyDictionary()  # every remote tensor that somebody has


class Remote(Tensor):
    """A tensor on the simulated device; `held` is its data on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        with torch.inference_mode(False):
            remote = Tensor._make_wrapper_subclass(
                cls,
                held.shape,
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device="meta",  # torch itself must not look for the device
                requires_grad=held.requires_grad,
            )
        remote.held = held
        _alive[remote] = True
        return remote

    @property
    def device(self) -> torch.device:
        return DEVICE

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, None)

    def __repr__(self, **options: Any) -> str:
        return f"Remote({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()


class Accelerator(TorchDispatchMode):
    """Makes `xpu:0` a device.

    Attributes:
        bytes_in, bytes_out: copied to the device, and from it.
        copies: every copy, as ("in" or "out", shape, bytes).
        blocking: of these, the ones for which the host stands still.
        awaited: how often the host has waited for an event.
        waits: whether the host may wait for the device; what a draft does must not.
        memory: bytes that the device says it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.memory = False, 8 << 30
        self.bytes_in = self.bytes_out = 0
        self.copies: list[tuple[str, tuple[int, ...], int]] = []
        self.blocking: list[tuple[str, tuple[int, ...], int]] = []
        self.awaited = 0
        self._leaving: list[tuple[Tensor, Tensor]] = []  # pinned memory and what it is to hold
        self._coming: list[tuple[Tensor, Tensor]] = []  # pinned memory and what it held when its copy was asked for

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if Stream.entered and func.overloadpacket is _ops.copy_ and args[2:] == (True,):
            return self._postponed(*args[:2])
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        result = _computed(func, args, kwargs, self._copied, self.waits)
        return _pin(result) if pinned else result

    def _postponed(self, into: Tensor, source: Tensor) -> Tensor:
        """A copy between the sides that runs when its stream is waited for."""
        here, there = (t.held if isinstance(t, Remote) else t for t in (into, source))
        self.count("in" if isinstance(into, Remote) else "out", here)
        Stream.entered[-1].postponed.append(lambda: here.copy_(there))
        return into

    def count(self, way: str, data: Tensor) -> None:
        """Enter a copy of `data` to the device, or from it."""
        self.copies.append((way, tuple(data.shape), data.nbytes))
        if way == "in":
            self.bytes_in += data.nbytes
        else:
            self.bytes_out += data.nbytes

    def _copied(self, way: str, host: Tensor, data: Tensor, waits: bool) -> None:
        """Enter a copy of `data` between `host`, a tensor there, and the device."""
        self.count(way, data)
        if waits:
            self.blocking.append(self.copies[-1])
        elif not getattr(host, "pinned", False):
            raise RuntimeError(f"a copy of {tuple(data.shape)} that nobody waits for needs pinned memory")
        elif way == "in":
            self._coming.append((host, data.clone()))
        else:
            self._leaving.append((host, data.clone()))
            host.view(torch.uint8).fill_(0x5A)

    def wait(self) -> None:
        """What waiting for an event does: all copies are done."""
        self.awaited += 1
        for host, data in self._coming:
            if not torch.equal(host, data):
                raise RuntimeError(f"pinned memory of {tuple(host.shape)} changed before it was copied to the device")
        for host, data in self._leaving:
            host.copy_(data)
        self._leaving, self._coming = [], []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch find the device, its pinned memory and its events."""
        _device_constructors()  # which torch remembers from the first use of `torch.device` as a context on
        event = SimpleNamespace(synchronize=self.wait)
        stream = SimpleNamespace(record_event=lambda: event)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device=None: stream)
        monkeypatch.setattr(Tensor, "pin_memory", lambda data, device=None: _pin(data.clone()))
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
        monkeypatch.setattr(torch.xpu, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch, "tensor", _tensor)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        monkeypatch.setattr(torch.xpu, "mem_get_info", lambda device=None: (self.memory - held_bytes(), self.memory))
        monkeypatch.setattr(torch.xpu, "memory_allocated", lambda device=None: held_bytes())
        monkeypatch.setattr(torch.xpu, "memory_reserved", lambda device=None: held_bytes())

    def install_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the device streams and page-locked memory (see the module's first lines)."""
        computing = Stream(DEVICE)
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: computing)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))


class Stream:
    """Stands in for `torch.Stream`. What is enqueued in the device's current one has run already.

    Attributes:
        entered: the streams in whose `with` blocks the host is.
        waited: how often a stream was told to wait for another.
    """

    entered: ClassVar[list[Stream]] = []
    waited: ClassVar[list[tuple[Stream, Stream]]] = []

    def __init__(self, device: Any) -> None:
        self.postponed: list[Callable[[], Any]] = []
        self.done = 0

    def __enter__(self) -> Stream:
        Stream.entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        Stream.entered.remove(self)

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        Stream.waited.append((self, event.stream))
        event.synchronize()


class Event:
    """Stands in for `torch.Event`: the end of what was in a stream when it was recorded."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.end = stream, len(stream.postponed)

    def synchronize(self) -> None:
        while self.stream.done < self.end:
            self.stream.postponed[self.stream.done]()
            self.stream.done += 1


def _pin(data: Tensor) -> Tensor:
    data.pinned = True
    return data


_plain_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which makes its result below the dispatcher. A program's constant is no data that crosses."""
    made = _plain_tensor(data, **options)
    return Remote(made) if device is not None and torch.device(device).type == DEVICE.type else made


def held_bytes(collect: bool = True) -> int:
    """What live tensors hold on the simulated device; without `collect` also dead ones in cycles."""
    if collect:
        gc.collect()
    storages = {remote.held.untyped_storage().data_ptr(): remote.held.untyped_storage() for remote in _alive}
    return sum(storage.nbytes() for storage in storages.values())


def _computed(
    func: Any, args: tuple, kwargs: dict[str, Any], count: Callable[..., None] | None, may_wait: bool = False
) -> Any:
    packet = func.overloadpacket
    tensors = [value for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Remote)]
    goes = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if goes is not None and goes.type == "meta":  # what torch takes a remote tensor's device for
        goes = DEVICE
    moves = packet in (_ops._to_copy, _ops.to, _ops.copy_)
    if remote and here and not moves and any(tensor.ndim > 0 for tensor in here):
        raise RuntimeError(
            f"{func}: expected all tensors on one device, got {[(tuple(t.shape), str(t.device)) for t in tensors]}"
        )
    if remote and packet in _STOPS_THE_HOST and not may_wait:
        raise RuntimeError(f"{func} would stop the host until the device is done")
    if (
        remote
        and not may_wait
        and packet in (_ops.index, _ops.index_put, _ops.index_put_)
        and any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in args[1])
    ):
        raise RuntimeError(f"{func} with a boolean mask would stop the host until the device is done")
    if remote and packet is _ops._fused_sdp_choice:
        return 0  # the composite of plain operations: that device's own kernels are not here
    if goes is not None and goes.type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = _pytree.tree_map_only(Remote, lambda tensor: tensor.held, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    on_device = bool(remote)
    if packet in (_ops._to_copy, _ops.to) and goes is not None:  # in inference mode the latter comes as it is
        on_device = goes.type == DEVICE.type
        if on_device != bool(remote) and count is not None:
            count("in" if on_device else "out", inner_args[0], result, not kwargs.get("non_blocking"))
    elif packet is _ops.copy_:
        on_device = isinstance(args[0], Remote)
        if on_device != isinstance(args[1], Remote) and count is not None:
            host, waits = args[1] if on_device else args[0], not (args[2:3] or (kwargs.get("non_blocking"),))[0]
            count("in" if on_device else "out", host, inner_args[1], waits)
    elif goes is not None:
        on_device = goes.type == DEVICE.type
    if func._schema.is_mutable and isinstance(args[0], Remote) and result is inner_args[0]:
        return args[0]
    return _pytree.tree_map_only(Tensor, Remote, result) if on_device else result
