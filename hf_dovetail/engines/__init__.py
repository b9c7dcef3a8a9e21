"""Ways to run the target's layers on the CPU: an ordered list, the first that can take the model wins.

An engine changes how a model computes, never what it computes beyond its stated precision, and can be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel
from transformers.utils import logging

from .. import prefill
from ..anatomy import is_quantised
from ..dispatch import dispatch_of
from ..threads import chosen_threads
from . import activations, exact, int4, int8, ipex, layers, norms, onednn, quantised
from .swap import Swap, swap_of

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Engine:
    """One way to run a target.

    Args:
        why_not: the reason why it cannot take a model, or None.
        prepare: does it, in place; `swap_of` takes it back, also what a failure leaves half done.
        keeps_precision: whether it computes what the model's own layers compute, up to rounding; only such
            engines are chosen by "auto".
        why_not_streamed: what it does that no accelerator can do alike in long prompts ("the engine NAME ..."); without
            such a reason its kernels have `stored` and `ordered`, as `onednn.OneDnnKernel` has.
    """

    why_not: Callable[[PreTrainedModel], str | None]
    prepare: Callable[[PreTrainedModel], Swap]
    keeps_precision: bool = True
    why_not_streamed: str | None = None


ENGINES: dict[str, Engine] = {
    "onednn": Engine(onednn.why_not, onednn.prepare),
    "ipex": Engine(ipex.why_not, ipex.prepare, why_not_streamed=ipex.WHY_NOT_STREAMED),
    "int8": Engine(int8.why_not, int8.prepare, keeps_precision=False, why_not_streamed=quantised.WHY_NOT_STREAMED),
    "int4": Engine(int4.why_not, int4.prepare, keeps_precision=False, why_not_streamed=quantised.WHY_NOT_STREAMED),
}


_engines: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def engine_of(model: PreTrainedModel) -> str:
    """The name of the engine that runs the model; "eager" for its own layers."""
    return _engines.get(model, "eager")


def check_engine(model: PreTrainedModel, engine: str) -> None:
    """Refuse an engine that there is not, or that cannot take the model, prepared or not.

    Raises:
        ValueError: naming those that there are, or those that can.
    """
    if engine not in ("auto", "eager", *ENGINES):
        raise ValueError(f"engine is {engine!r}; expected auto, eager or one of {', '.join(ENGINES)}")
    reason = _why_not(model, engine) if engine in ENGINES else None
    if reason is not None:
        expected = ", ".join(("auto", "eager", *_fitting(model)))
        raise ValueError(f"engine {engine} cannot take {type(model).__name__}: {reason}; expected one of {expected}")


def start_engine(model: PreTrainedModel, engine: str) -> None:
    """Let the layers that a model has on the CPU run on an engine (`check_engine`), in place.

    `prepare.prepare_target` is for users. Whatever interrupts it, `stop_engine` takes back what was done.
    """
    reasons = {}
    for name in _candidates(engine):
        reason = _why_not(model, name)
        if reason is None:
            _switch_on(model, name)
            break
        reasons[name] = reason
    refused = "".join(f"; not {name}: {reason}" for name, reason in reasons.items())
    logger.info("%s runs on %s, %d threads%s", type(model).__name__, engine_of(model), chosen_threads(), refused)
    if engine != "eager" and dispatch_of(model) is None:  # layers with hooks of their own are not streamed
        stream_prompts(model)


def _switch_on(model: PreTrainedModel, name: str) -> None:
    _engines[model] = name
    ENGINES[name].prepare(model)
    exact.switch_on(model)
    activations.switch_on(model)
    norms.switch_on(model)
    layers.switch_on(model)  # last: it builds on the others


def stream_prompts(model: PreTrainedModel) -> None:
    """Let long prompts go through the accelerator, where that computes what the model's engine does, and faster."""
    name = engine_of(model)
    reason = ENGINES[name].why_not_streamed if name in ENGINES else None
    prefill.install(model, name, None if reason is None else f"the engine {name} {reason}")


def stop_engine(model: PreTrainedModel) -> None:
    """Give the model its own layers back, bit for bit; a prepared model's copy too, whose weights are its own already.

    Raises:
        RuntimeError: if the engine cannot give the weights back, saying why; the model then stays prepared.
    """
    swap = swap_of(model)
    if swap is not None:
        swap.undo()
    prefill.remove(model)  # gives the layers back what it found there
    exact.switch_off(model)
    layers.switch_off(model)
    activations.switch_off(model)
    norms.switch_off(model)
    _engines.pop(model, None)


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
