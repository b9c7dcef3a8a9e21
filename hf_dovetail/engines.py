"""Ways to run the target's layers on the CPU: an ordered list, the first that can take the model wins.

An engine changes how a model computes, never what it computes beyond its stated precision, and can be undone.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)

Engine = Callable[[PreTrainedModel], str | None]
"""Prepares a model in place; returns None, or the reason why it cannot."""


def _eager(model: PreTrainedModel) -> str | None:
    """The model's own layers, untouched."""
    return None


ENGINES: dict[str, Engine] = {"eager": _eager}


def prepare_target(model: PreTrainedModel, engine: str = "auto", vram_budget: str | None = None) -> PreTrainedModel:
    """Choose how a target's layers run, and return the target. This version has one engine: the layers as they are.

    Args:
        model: the target.
        engine: one of `ENGINES`, or "auto" for the first of them that can take the model.
        vram_budget: memory of the GPU that target layers may use; None keeps the target where it is.

    Raises:
        ValueError: if the engine is unknown or cannot take this model, or a VRAM budget is given.
    """
    if vram_budget is not None:
        raise ValueError(f"vram_budget={vram_budget!r}: this version leaves every target layer where it is; pass None")
    if engine != "auto" and engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected auto or one of {', '.join(ENGINES)}")
    reasons = []
    for name in ENGINES if engine == "auto" else [engine]:
        reason = ENGINES[name](model)
        if reason is None:
            logger.info("engine %s for %s%s", name, type(model).__name__, f" ({'; '.join(reasons)})" if reasons else "")
            return model
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no engine can take {type(model).__name__}: {'; '.join(reasons)}")


def restore_target(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `prepare_target`, and return the model with its original modules and weights."""
    return model
