"""A target's last layers on an accelerator, on accelerate's hooks: which modules go, what crosses, and the way back.

The other layers stay on the host and compute there; nothing is streamed. Every tensor that the layers on the device
read crosses once per pass, however many of them read it. Knows modules and devices; knows nothing of budgets.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import find_device, recursively_apply
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

HOST = torch.device("cpu")
Move = Callable[[Tensor, torch.device], Tensor]
"""Copies a tensor to a device; counts what crosses, if it likes."""

_TRIED_TOKENS = 2


@dataclass(frozen=True)
class Anatomy:
    """The parts of a target, in the order in which a pass runs them.

    Args:
        decoder: what turns token ids into the LM head's inputs.
        tables: parts without weights that run before the layers and hand them tensors (rotary embeddings).
        layers: the decoder's layers.
        tail: what runs between the last layer and the LM head.
        head: the LM head.
        positions: bytes of one position in each layer's cache.
    """

    decoder: nn.Module
    tables: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    head: nn.Module
    positions: tuple[int, ...]


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """A decoder's layers: its list of as many modules as its configuration says; None if there is no such list."""
    config = getattr(decoder, "config", None)
    count = 0 if config is None else getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return next((layers for layers in lists if len(layers) == count > 0), None)


def why_not_apart(model: PreTrainedModel) -> str | None:
    """Why the layers of a model cannot be put on two devices, or None."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        return "it is quantised already and stays where it was loaded; load it with a device_map instead"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate has dispatched it already; load it without device_map"
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        return f"its weights are on {', '.join(sorted(devices))}, not on the CPU"
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model or decoder_layers(decoder) is None:
        return "it does not say which part is its decoder, or keeps its layers in no list of it"
    if head is None or getattr(head, "weight", None) is None:
        return "it has no LM head with a weight matrix"
    return None


@torch.no_grad()
def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Take a model to parts by watching a pass over two tokens.

    Raises:
        ValueError: if its layers cannot be told apart from the rest.
    """
    reason = why_not_apart(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be placed on two devices: {reason}")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layers = decoder_layers(decoder)
    ran: list[nn.Module] = []
    parts = [child for child in decoder.children() if child is not layers] + [layers[-1]]
    hooks = [part.register_forward_hook(lambda module, inputs, output: ran.append(module)) for part in parts]
    try:
        cache = _try(model)
    finally:
        for hook in hooks:
            hook.remove()
    last = ran.index(layers[-1])
    before, tail = ran[:last], tuple(dict.fromkeys(ran[last + 1 :]))
    tables = [part for part in dict.fromkeys(before) if not any(True for _ in part.parameters())]
    tables = [part for part in tables if any(True for _ in part.buffers())]
    states = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    positions = [sum(s.nbytes for s in pair if isinstance(s, Tensor)) // _TRIED_TOKENS for pair in states]
    positions += [0] * (len(layers) - len(positions))
    return Anatomy(decoder, tuple(tables), tuple(layers), tail, head, tuple(positions))


def _try(model: PreTrainedModel) -> DynamicCache:
    """A pass over two tokens; its cache."""
    ids, cache = torch.arange(_TRIED_TOKENS, device=HOST).unsqueeze(0), DynamicCache(config=model.config)
    with torch.random.fork_rng(devices=[]):
        return model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def nbytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of the weights and buffers of modules, shared ones once."""
    tensors = {id(t): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())


class Crossing(threading.local):
    """What the running pass of this thread has brought from one device to another.

    Attributes:
        move: how.
        verifying: whether the logits stay where they are, since whoever runs the pass takes from them what it needs.
        given: counterparts that are on the other device from the start, by id and device of their originals.
        brought: those and what has been moved since, each beside its original, which must live as long.
        source: device of the pass's inputs.
        trying: whether tables are compared with their twins.
    """

    move: Move = staticmethod(Tensor.to)
    verifying = trying = False
    source: torch.device | None = None

    def __init__(self) -> None:
        self.given: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.brought: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self.inputs: dict[int, tuple] = {}

    def bring(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on `device`; the same copy for all who ask in one pass."""
        if tensor.device == device:
            return tensor
        key = id(tensor), device
        if key not in self.brought:
            self.brought[key] = tensor, self.move(tensor, device)
        return self.brought[key][1]

    def __reduce__(self) -> tuple:
        raise RuntimeError(
            "a target with layers on two devices cannot be copied; call hf_dovetail.restore_target(model) first"
        )

    def __deepcopy__(self, memo: dict) -> Crossing:
        return self.__reduce__()


class _Enter(ModelHook):
    """Brings a module's inputs to its device."""

    def __init__(self, crossing: Crossing, device: torch.device, kept: frozenset[str]) -> None:
        self._crossing, self._device, self._kept = crossing, device, kept

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        bring = partial(self._crossing.bring, device=self._device)
        moved = {k: v if k in self._kept else recursively_apply(bring, v) for k, v in named.items()}
        return recursively_apply(bring, args), moved


class _EnterDecoder(_Enter):
    """A pass begins and ends with the decoder."""

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        self._crossing.brought = dict(self._crossing.given)
        return super().pre_forward(module, *args, **named)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._crossing.brought = {}
        return output


class _EnterModel(_Enter):
    """The model itself: inputs may be on any device, and outputs return there, as accelerate's own hooks do it."""

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        self._crossing.source = find_device([args, named])
        self._crossing.brought = {}
        return super().pre_forward(module, *args, **named)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        crossing, self._crossing.brought = self._crossing, {}
        if crossing.verifying or crossing.source is None:
            return output
        returned = partial(crossing.bring, device=crossing.source)
        if not isinstance(output, dict):
            return recursively_apply(returned, output)
        moved = {k: v if k in self._kept else recursively_apply(returned, v) for k, v in output.items()}
        crossing.brought = {}
        return type(output)(moved)


class _Twin(ModelHook):
    """Computes on the device what a table computes on the host, so that its output need not cross.

    Rotary embeddings read positions, and of the hidden states beside them only shape, precision and device: the twin
    gets NaN in their place, and is given up if that shows when it is tried.
    """

    def __init__(self, crossing: Crossing, device: torch.device, module: nn.Module) -> None:
        self._crossing, self._device = crossing, device
        self._twin: nn.Module | None = copy.deepcopy(module).to(device)

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> tuple[tuple, dict[str, Any]]:
        self._crossing.inputs[id(module)] = args, named
        return args, named

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        args, named = self._crossing.inputs.pop(id(module))
        if self._twin is None:
            return output
        twins = _leaves(self._twin(*recursively_apply(self._there, args), **recursively_apply(self._there, named)))
        originals = _leaves(output)
        if self._crossing.trying and not all(map(_alike, originals, twins)):
            self._twin = None
            return output
        for original, twin in zip(originals, twins, strict=True):
            self._crossing.brought[id(original), self._device] = original, twin
        return output

    def _there(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return self._crossing.bring(tensor, self._device)
        return torch.full((), float("nan"), dtype=tensor.dtype, device=self._device).expand(tensor.shape)


def _leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [leaf for part in output for leaf in _leaves(part)]


def _alike(original: Tensor, twin: Tensor) -> bool:
    return torch.allclose(original.float(), twin.to(original.device).float(), rtol=1e-2, atol=1e-2)


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
        kept = frozenset({"past_key_values", *(model._skip_keys_device_placement or ())})
        hooks: list[tuple[nn.Module, ModelHook]] = [
            (model, _EnterModel(self._crossing, HOST, kept)),
            (anatomy.decoder, _EnterDecoder(self._crossing, HOST, kept)),
            *((module, _Enter(self._crossing, self.device, kept)) for module in there),
        ]
        if self.layers:
            hooks += [(table, _Twin(self._crossing, self.device, table)) for table in anatomy.tables]
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
            _try(model)
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
