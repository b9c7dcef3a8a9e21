"""Ways to run the target's layers on the CPU: an ordered list, the first that can take the model wins.

An engine changes how a model computes, never what it computes beyond its stated precision, and can be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel
from transformers.utils import logging

from .. import prefill
from ..anatomy import is_quantised
from ..dispatch import dispatch_of
from ..threads import chosen_threads
from . import activations, exact, int4, int8, ipex, layers, norms, onednn, quantised

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
        why_not_streamed: what it does that no accelerator can do alike in long prompts ("the engine NAME ..."); without
            such a reason its kernels have `stored` and `ordered`, as `onednn.OneDnnKernel` has.
    """

    why_not: Callable[[PreTrainedModel], str | None]
    prepare: Callable[[PreTrainedModel], Undo]
    keeps_precision: bool = True
    why_not_streamed: str | None = None


ENGINES: dict[str, Engine] = {
    "onednn": Engine(onednn.why_not, onednn.prepare),
    "ipex": Engine(ipex.why_not, ipex.prepare, why_not_streamed=ipex.WHY_NOT_STREAMED),
    "int8": Engine(int8.why_not, int8.prepare, keeps_precision=False, why_not_streamed=quantised.WHY_NOT_STREAMED),
    "int4": Engine(int4.why_not, int4.prepare, keeps_precision=False, why_not_streamed=quantised.WHY_NOT_STREAMED),
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


def check_engine(engine: str) -> None:
    """Refuse an engine that there is not.

    Raises:
        ValueError: naming those that there are.
    """
    if engine not in ("auto", "eager", *ENGINES):
        raise ValueError(f"engine is {engine!r}; expected auto, eager or one of {', '.join(ENGINES)}")


def start_engine(model: PreTrainedModel, engine: str) -> None:
    """Let the layers that a model has on the CPU run on an engine, in place; `prepare.prepare_target` is for users.

    Raises:
        ValueError: if the engine cannot take this model, naming those that can.
    """
    reasons = {}
    for name in _candidates(engine):
        reason = _why_not(model, name)
        if reason is None:
            _prepared[model] = _Prepared(name, ENGINES[name].prepare(model), exact.switch_on(model))
            activations.switch_on(model)
            norms.switch_on(model)
            layers.switch_on(model)  # last: it builds on the others
            break
        reasons[name] = reason
    if engine not in ("auto", "eager", engine_of(model)):
        expected = ", ".join(("auto", "eager", *_fitting(model)))
        raise ValueError(
            f"engine {engine} cannot take {type(model).__name__}: {reasons[engine]}; expected one of {expected}"
        )
    refused = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
    logger.info("%s runs on %s, %d threads%s", type(model).__name__, engine_of(model), chosen_threads(), refused)
    if engine != "eager" and dispatch_of(model) is None:  # layers with hooks of their own are not streamed
        stream_prompts(model)


def stream_prompts(model: PreTrainedModel) -> None:
    """Let long prompts go through the accelerator, where that computes what the model's engine does, and faster."""
    name = engine_of(model)
    reason = ENGINES[name].why_not_streamed if name in ENGINES else None
    prefill.install(model, name, None if reason is None else f"the engine {name} {reason}")


def stop_engine(model: PreTrainedModel) -> None:
    """Give the model its own layers back, bit for bit.

    Raises:
        RuntimeError: if the engine cannot give the weights back, saying why; the model then stays prepared.
    """
    if model in _prepared:
        _prepared[model].undo.undo()
    prefill.remove(model)  # gives the layers back what it found there
    if model in _prepared:
        exact.switch_off(model, _prepared.pop(model).attention)
        layers.switch_off(model)
        activations.switch_off(model)
        norms.switch_off(model)


def why_not(model: PreTrainedModel) -> str | None:
    """Why no engine may touch the model, or None."""
    if is_quantised(model):
        return "it is quantised already and runs on its own kernels"
    dispatch = dispatch_of(model)
    elsewhere = set() if dispatch is None else {dispatch.device.type}
    devices = {parameter.device.type for parameter in model.parameters()} - elsewhere
    if devices != {"cpu"}:
        return f"its weights are on {', '.join(sorted(devices))}, not on the CPU"
    return None


def _why_not(model: PreTrainedModel, engine: str) -> str | None:
    return why_not(model) or ENGINES[engine].why_not(model)


def why_not_each(model: PreTrainedModel) -> dict[str, str | None]:
    """Of each engine, why it cannot take the model, or None."""
    return {name: _why_not(model, name) for name in ENGINES}


def _fitting(model: PreTrainedModel) -> list[str]:
    return [name for name, reason in why_not_each(model).items() if reason is None]


def _candidates(engine: str) -> list[str]:
    if engine == "eager":
        return []
    return [name for name, entry in ENGINES.items() if entry.keeps_precision] if engine == "auto" else [engine]
