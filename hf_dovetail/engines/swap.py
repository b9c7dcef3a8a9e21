"""Puts packed weights in the place of a model's linear weights, one at a time, and the original ones back.

A swap is known before anything is changed (`swap_of`), so that whatever interrupts it can be taken back.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..packed import Kernel, PackedWeight, would_change

logger = logging.get_logger(__name__)

_TRIM_BYTES = 16 << 20  # freed weights between two calls of `malloc_trim`
BASE_LAYER = "base_layer"  # PEFT's name for a layer that it has wrapped
_MADV_PAGEOUT = 21  # <asm-generic/mman-common.h>

DTYPES = (torch.bfloat16, torch.float32)
"""Precisions of the weights that engines pack."""

Pack = Callable[[str, Tensor, bool], Kernel | None]
"""Packs the weight of a name, which may also be an embedding's (last argument); None leaves it as it is."""


class LosslessKernel(Kernel, Protocol):
    """A kernel that holds a weight as it was."""

    @property
    def has_rows(self) -> bool:
        """Whether single rows can be read (`lookup`)."""


@dataclass(frozen=True)
class _Swapped:
    """A parameter (emptied once it is packed), the modules that had it as their `weight`, and its kernel."""

    original: nn.Parameter
    owners: tuple[nn.Module, ...]
    kernel: Kernel

    @property
    def is_emptied(self) -> bool:
        """Whether the kernel alone holds the weight."""
        return self.original.numel() == 0


class Swap:
    """The weights of one model that are packed at present. At no time are two copies of all weights in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)  # the model's entry among the swaps must not keep it alive
        self._swapped: list[_Swapped] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @torch.no_grad()
    def pack(self, model: PreTrainedModel, pack: Pack) -> int:
        """Pack every linear weight that `pack` takes; return how many. After a failure, `undo` takes back what was."""
        _swaps[model] = self
        self._hooks.append(model.register_state_dict_post_hook(_unpack_state))
        self._hooks.append(model.register_forward_pre_hook(_TrainingWarning()))
        self._hooks.extend(module.register_load_state_dict_pre_hook(_refuse_loading) for module in model.modules())
        files, freed = _mapped_files(), 0
        for name, owners in _linear_weights(model).items():
            original = owners[0].weight
            tied = any(isinstance(module, nn.Embedding) for module in owners)
            kernel = pack(name, original.detach(), tied)
            if kernel is None:
                continue
            packed = nn.Parameter(PackedWeight(kernel), requires_grad=False)
            packed.trainable = original.requires_grad
            self._swapped.append(_Swapped(original, owners, kernel))
            for module in owners:
                module.weight = packed
            _forget_pages(original, files)
            freed += original.nbytes
            original.data = original.new_empty(0)
            if freed > _TRIM_BYTES:
                freed = _return_memory()
        _return_memory()
        return len(self._swapped)

    @torch.inference_mode(False)
    @torch.no_grad()
    def undo(self) -> None:
        """Give the modules their own parameters back, bit for bit where the kernels are lossless.

        After a failure the next call goes on with what is still packed.
        """
        places = self._places()
        while self._swapped:
            swapped = self._swapped[-1]
            if swapped.is_emptied:
                swapped.original.data = self._original(swapped.kernel)
            for module, name in places.get(id(swapped.kernel), ()):
                setattr(module, name, swapped.original)
            self._swapped.pop()
        _return_memory()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _swaps.pop(self._model(), None)

    def _original(self, kernel: Kernel) -> Tensor:
        """The weight that a kernel stands for."""
        return kernel.dense()

    def _places(self) -> dict[int, list[tuple[nn.Module, str]]]:
        """Modules and attributes where a kernel's weight stands now, by the kernel's id.

        A module that has got another weight meanwhile keeps it; pruning keeps the packed one under another name.
        """
        owners = (module for swapped in self._swapped for module in swapped.owners)
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in {*self._model().modules(), *owners}:
            for name, parameter in module._parameters.items():
                if isinstance(parameter, PackedWeight):
                    places.setdefault(id(parameter.kernel), []).append((module, name))
        return places


_swaps: WeakKeyDictionary[PreTrainedModel, Swap] = WeakKeyDictionary()


def swap_of(model: PreTrainedModel) -> Swap | None:
    """What has packed weights of the model, or has begun to."""
    return _swaps.get(model)


PackOne = Callable[[Tensor], LosslessKernel | None]
"""Packs a weight for which `can_pack`, or leaves it."""


def swap_all(model: PreTrainedModel, pack_one: PackOne) -> Swap:
    """Pack every linear weight of the model, in place; the LM head that is the embedding too stays one matrix."""
    swap = Swap(model)
    swap.pack(model, lambda name, weight, is_embedding: packed_by(pack_one, weight, is_embedding))
    return swap


def packed_by(pack_one: PackOne, weight: Tensor, is_embedding: bool) -> LosslessKernel | None:
    """The kernel of one weight, or None if it must stay as it is."""
    if not can_pack(weight):
        return None
    packed = pack_one(weight)
    return packed if packed is not None and (packed.has_rows or not is_embedding) else None


def can_pack(weight: Tensor) -> bool:
    """Whether kernels know such a weight's precision and device, and there is something in it."""
    return weight.dtype in DTYPES and weight.device.type == "cpu" and weight.numel() > 0


class _TrainingWarning:
    """A forward hook that says, once, that packed weights do not learn."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if self._said or not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._said = True
        frozen = sum(isinstance(each, PackedWeight) and each.trainable for each in model.parameters())
        if frozen:
            logger.warning(
                "this model trains while it is prepared, and %d of its weights are packed and stay as they are; to "
                "train them, call hf_dovetail.restore_target(model) first",
                frozen,
            )


def _linear_weights(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """The plain parameters that are weights of `nn.Linear` modules, by name, each with all modules that share it.

    A parameter that is also something else than a linear or an embedding weight is left out, and so is an adapter's
    that is being trained.
    """
    adapters = adapter_paths(model)
    owners: dict[int, list[nn.Module]] = {}
    names: dict[int, str] = {}
    uses: dict[int, int] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
            if attribute == "weight" and isinstance(module, nn.Linear | nn.Embedding):
                owners.setdefault(id(parameter), []).append(module)
                plain = type(parameter) is nn.Parameter and parameter.layout == torch.strided
                if type(module) is nn.Linear and plain and not (path in adapters and parameter.requires_grad):
                    names.setdefault(id(parameter), f"{path}.weight")
    return {name: tuple(owners[key]) for key, name in names.items() if uses[key] == len(owners[key])}


def adapter_paths(model: nn.Module) -> set[str]:
    """The modules that PEFT has put beside a model's own layers, which it keeps as `base_layer`."""
    wrappers = [(path, module) for path, module in model.named_modules() if hasattr(module, BASE_LAYER)]
    return {
        f"{path}.{name}"
        for path, module in wrappers
        for name, _ in module.named_modules()
        if name and name.partition(".")[0] != BASE_LAYER
    }


def _return_memory() -> int:
    """Give freed memory back to the system, where the C library keeps it in pieces otherwise (glibc); returns 0."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return 0


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges that are mapped from files, where the system tells (Linux)."""
    if not sys.platform.startswith("linux"):
        return []
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = [line.split(maxsplit=5) for line in maps]
    ranges = [line[0].split("-") for line in lines if len(line) == 6 and line[5].startswith("/")]
    return [(int(begin, 16), int(end, 16)) for begin, end in ranges]


def _forget_pages(weight: Tensor, files: list[tuple[int, int]]) -> None:
    """Let the system take back the pages of a weight that is a view of its checkpoint's file.

    transformers maps safetensors files, and the mapping outlives the weight: its pages would count as a second copy
    of the model. `MADV_PAGEOUT` discards nothing; a page that is needed again is read again.
    """
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    if any(first <= begin and end <= last for first, last in files):
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(max(end - begin, 0)), _MADV_PAGEOUT)


def _unpack_state(module: nn.Module, state: dict, prefix: str, metadata: object) -> None:
    """A prepared model's `state_dict` holds ordinary tensors, tied ones once.

    Raises:
        RuntimeError: if the weights cannot be given back as they were.
    """
    dense: dict[int, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, PackedWeight):
            if id(value.kernel) not in dense:
                dense[id(value.kernel)] = value.original()
            state[name] = dense[id(value.kernel)]


def _refuse_loading(module: nn.Module, state: dict, prefix: str, metadata: dict, *rest: Any) -> None:
    """Refuse other values for packed weights before `load_state_dict` has changed the norms and biases beside them.

    With `assign=True` it replaces weights, which then stay.

    Raises:
        RuntimeError: naming the first such weight.
    """
    if metadata.get("assign_to_params_buffers", False):
        return
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, PackedWeight) and prefix + name in state:
            raise would_change(f"load_state_dict, given {prefix}{name},")
