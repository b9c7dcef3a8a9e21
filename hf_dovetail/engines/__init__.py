"""Ways to run the target's layers on the CPU: an ordered list, the first that can take the model wins.

An engine changes how a model computes, never what it computes beyond its stated precision, and can be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import prefill
from ..threads import chosen_threads
from . import activations, exact, int4, int8, ipex, onednn

logger = logging.get_logger(__name__)


class Undo(Protocol):
    """What an engine leaves behind, to take itself out again."""

    def undo(self) -> None:
        """Give the model its own modules and weights back.

        Raises:
            RuntimeError: saying in one sentence why that is impossible.
        """


@dataclass(frozen=True)
class Engine:
    """One way to run a target.

    Args:
        why_not: the reason why it cannot take a model, or None.
        prepare: does it, in place.
        keeps_precision: whether it computes what the model's own layers compute, up to rounding; only such
            engines are chosen by "auto".
    """

    why_not: Callable[[PreTrainedModel], str | None]
    prepare: Callable[[PreTrainedModel], Undo]
    keeps_precision: bool = True


ENGINES: dict[str, Engine] = {
    "onednn": Engine(onednn.why_not, onednn.prepare),
    "ipex": Engine(ipex.why_not, ipex.prepare),
    "int8": Engine(int8.why_not, int8.prepare, keeps_precision=False),
    "int4": Engine(int4.why_not, int4.prepare, keeps_precision=False),
}


@dataclass(frozen=True)
class _Prepared:
    engine: str
    undo: Undo
    attention: str | None


_prepared: WeakKeyDictionary[PreTrainedModel, _Prepared] = WeakKeyDictionary()


def engine_of(model: PreTrainedModel) -> str:
    """The name of the engine that runs the model; "eager" for its own layers."""
    return _prepared[model].engine if model in _prepared else "eager"


def prepare_target(model: PreTrainedModel, engine: str = "auto", vram_budget: str | None = None) -> PreTrainedModel:
    """Choose how a target's layers run, in place, and return the target. `restore_target` undoes it.

    Where an accelerator is faster at long prompts, the layers are streamed through it once per prompt (`prefill`),
    except with engine "eager", which leaves everything as it is.

    Args:
        model: the target, on the CPU.
        engine: "eager" (the layers as they are), one of `ENGINES`, or "auto" for the first that can take the model
            without changing what it computes.
        vram_budget: memory of the GPU that target layers may use; None keeps the target where it is.

    Raises:
        ValueError: if the engine is unknown or cannot take this model, or a VRAM budget is given.
    """
    if vram_budget is not None:
        raise ValueError(f"vram_budget={vram_budget!r}: this version leaves every target layer where it is; pass None")
    if engine not in ("auto", "eager", *ENGINES):
        raise ValueError(f"engine is {engine!r}; expected auto, eager or one of {', '.join(ENGINES)}")
    if engine == engine_of(model) != "eager":
        prefill.install(model, engine)
        return model
    restore_target(model)
    reasons = {}
    for name in _candidates(engine):
        reason = why_not(model) or ENGINES[name].why_not(model)
        if reason is None:
            _prepared[model] = _Prepared(name, ENGINES[name].prepare(model), exact.switch_on(model))
            activations.switch_on(model)
            model._apply = _Apply(model)
            break
        reasons[name] = reason
    if engine not in ("auto", "eager", engine_of(model)):
        raise ValueError(f"engine {engine} cannot take {type(model).__name__}: {reasons[engine]}")
    refused = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
    logger.info("%s runs on %s, %d threads%s", type(model).__name__, engine_of(model), chosen_threads(), refused)
    if engine != "eager":
        prefill.install(model, engine_of(model))
    return model


def restore_target(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `prepare_target`, and return the model with its original modules and weights, bit for bit.

    Raises:
        RuntimeError: if the engine cannot give the weights back, saying why; the model then stays prepared.
    """
    if model in _prepared:
        prepared = _prepared[model]
        prepared.undo.undo()
        exact.switch_off(model, prepared.attention)
        activations.switch_off(model)
        del _prepared[model], model._apply
    prefill.remove(model)
    return model


def why_not(model: PreTrainedModel) -> str | None:
    """Why no engine may touch the model, or None."""
    if getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        return "it is quantised already and runs on its own kernels"
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        return f"its weights are on {', '.join(sorted(devices))}, not on the CPU"
    return None


def _candidates(engine: str) -> list[str]:
    if engine == "eager":
        return []
    return [name for name, entry in ENGINES.items() if entry.keeps_precision] if engine == "auto" else [engine]


class _Apply:
    """Stands in for `Module._apply` while a model is prepared: packed weights stay where and what they are.

    It does not keep the model alive, and in a copy of the model it belongs to the copy, which is not prepared.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)

    def __reduce__(self) -> tuple:
        return _Apply, (self._model(),)

    def __call__(self, change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Apply a change.

        Raises:
            RuntimeError: if the weights would change their device or precision, before anything is changed.
        """
        model = self._model()
        changed = change(torch.empty(0, dtype=model.dtype, device="cpu"))
        if model in _prepared and (changed.dtype, changed.device.type) != (model.dtype, "cpu"):
            raise RuntimeError(
                f"this model is prepared for the engine {engine_of(model)} and cannot become {changed.dtype} on "
                f"{changed.device}; call hf_dovetail.restore_target(model), move it, and prepare it again"
            )
        return type(model)._apply(model, change, *args, **kwargs)
