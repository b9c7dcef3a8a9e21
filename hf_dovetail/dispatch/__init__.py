"""A target's last layers on an accelerator: which weights go, the hooks where something crosses, and the way back.

The other layers stay on the host and compute there; nothing is streamed. Knows modules and devices; knows nothing of
budgets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import CACHE, Anatomy, try_pass
from ..devices import HOST, Move
from .crossing import Crossing, Enter, EnterDecoder, EnterModel, Twin


@dataclass(frozen=True)
class _Moved:
    """A parameter whose content is on the device now: its owners there, and whether others hold it on the host."""

    original: nn.Parameter
    placed: nn.Parameter
    owners: tuple[tuple[nn.Module, str], ...]
    shared: bool

    def undo(self) -> None:
        if not self.shared:
            self.original.data = self.placed.detach().to(HOST)
        for module, name in self.owners:
            setattr(module, name, self.original)


class Dispatch:
    """The last layers of one model on a device, with all that follows them.

    Args:
        model: the target, on the host.
        anatomy: its parts.
        device: where the layers go.
        layers: how many; 0 moves the LM head and what stands before it only.
        context: positions that room was planned for.

    Raises:
        ValueError: if the model cannot run like this; it is then as it was.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, device: torch.device, layers: int, context: int
    ) -> None:
        self.device, self.layers, self.context = device, layers, context
        self.tied = anatomy.head.weight is model.get_input_embeddings().weight
        self._crossing, self._moved = Crossing(), []
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._hooked: list[nn.Module] = []
        self._handles: list[Any] = []
        first = len(anatomy.layers) - layers
        there = (*anatomy.layers[first:], *anatomy.tail, anatomy.head)
        try:
            self._move(model, there)
            self._hook(model, anatomy, there)
            model.hf_device_map = self._map(model, anatomy, first)
            _dispatched[model] = self
            self._try(model)
        except Exception as error:
            self.undo(model)
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{type(model).__name__} cannot run with {layers} of its layers on {device} "
                f"({type(error).__name__}: {error})"
            ) from error

    @torch.no_grad()
    def _move(self, model: PreTrainedModel, there: Sequence[nn.Module]) -> None:
        modules = {id(module): module for part in there for module in part.modules()}
        owners: dict[int, list[tuple[nn.Module, str]]] = {}
        uses: dict[int, int] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
                if id(module) in modules:
                    owners.setdefault(id(parameter), []).append((module, name))
        for key, held in owners.items():
            module, name = held[0]
            original = getattr(module, name)
            placed = nn.Parameter(original.detach().to(self.device), requires_grad=original.requires_grad)
            shared = uses[key] > len(held)
            self._moved.append(_Moved(original, placed, tuple(held), shared))
            for module, name in held:
                setattr(module, name, placed)
            if not shared:
                original.data = original.new_empty(0)
        for module in modules.values():
            for name, buffer in list(module.named_buffers(recurse=False)):
                self._buffers.append((module, name, buffer))
                module._buffers[name] = buffer.to(self.device)

    def _hook(self, model: PreTrainedModel, anatomy: Anatomy, there: Sequence[nn.Module]) -> None:
        kept = frozenset({CACHE, *(model._skip_keys_device_placement or ())})
        hooks: list[tuple[nn.Module, ModelHook]] = [
            (model, EnterModel(self._crossing, HOST, kept)),
            (anatomy.decoder, EnterDecoder(self._crossing, HOST, kept)),
            *((module, Enter(self._crossing, self.device, kept)) for module in there),
        ]
        if self.layers:
            hooks += [(table, Twin(self._crossing, self.device, table)) for table in anatomy.tables]
        self._hooked = [module for module, _ in hooks[1:]]  # not the model, which must be free to go
        for module, hook in hooks:
            add_hook_to_module(module, hook)
        model.__deepcopy__ = self._crossing.__deepcopy__
        shared = self._shared_names(model)
        self._handles.append(model.register_state_dict_post_hook(partial(_host_state, shared)))

    def _shared_names(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The parameters that are on both sides, by their names on the device."""
        originals = {id(moved.placed): moved.original for moved in self._moved if moved.shared}
        named = model.named_parameters(remove_duplicate=False)
        return {name: originals[id(parameter)] for name, parameter in named if id(parameter) in originals}

    def _map(self, model: PreTrainedModel, anatomy: Anatomy, first: int) -> dict[str, Any]:
        """Where everything is, as accelerate notes it; pipelines leave such a model where it is."""
        there = {id(module) for module in (*anatomy.layers[first:], *anatomy.tail, anatomy.head)}
        names = {id(module): name for name, module in model.named_modules()}
        parts = [*anatomy.decoder.children(), anatomy.head]
        parts = [each for part in parts for each in (part if isinstance(part, nn.ModuleList) else [part])]
        return {names[id(part)]: self.device if id(part) in there else "cpu" for part in parts}

    @torch.no_grad()
    def _try(self, model: PreTrainedModel) -> None:
        self._crossing.trying = True
        try:
            try_pass(model)
        finally:
            self._crossing.trying = False

    @torch.no_grad()
    def undo(self, model: PreTrainedModel) -> None:
        """Take the hooks out, and bring every weight back, bit for bit."""
        for module in (model, *self._hooked):
            remove_hook_from_module(module)
            if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
                del module.forward  # accelerate leaves the method as an attribute
        for handle in self._handles:
            handle.remove()
        while self._moved:
            self._moved.pop().undo()
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
        self._hooked, self._handles, self._buffers = [], [], []
        for name in ("hf_device_map", "__deepcopy__"):
            model.__dict__.pop(name, None)
        _dispatched.pop(model, None)

    @contextmanager
    def verifying(self, move: Move, given: Sequence[tuple[Tensor, Tensor]] = ()) -> Iterator[None]:
        """Inside, this thread's passes leave their logits where they are.

        Args:
            move: moves, and counts, what crosses.
            given: tensors on the host, each beside its counterpart on the device, which need not cross.
        """
        crossing = self._crossing
        before = crossing.move, crossing.verifying, crossing.given
        crossing.move, crossing.verifying = move, True
        crossing.given = {(id(host), self.device): (host, there) for host, there in given}
        try:
            yield
        finally:
            crossing.move, crossing.verifying, crossing.given = before
            crossing.brought = {}

    def wait(self) -> None:
        """Wait until the device is done."""
        torch.accelerator.synchronize(self.device)


_dispatched: WeakKeyDictionary[PreTrainedModel, Dispatch] = WeakKeyDictionary()


def dispatch_of(model: nn.Module) -> Dispatch | None:
    """Where the model's last layers are, if not on the host."""
    return _dispatched.get(model)


def _host_state(
    shared: dict[str, nn.Parameter], module: nn.Module, state: dict[str, Any], prefix: str, metadata: object
) -> None:
    """A `state_dict` on the host, tied weights once."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.device != HOST:
            original = shared.get(name.removeprefix(prefix))
            state[name] = value.to(HOST) if original is None else original.detach()
