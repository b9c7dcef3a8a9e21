"""What this process knows of a draft on a target: costs and experience, kept between calls and shared by threads.

Stored curves (`curves`, written by `calibrate`) are read at the first meeting, and written again when the machine
has left them. What rounds teach beyond that stays in memory.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .controller import AutoController
from .costs import Costs
from .curves import CostCurves, curves_path, load_curves, save_curves
from .dispatch import dispatch_of
from .engines import engine_of
from .experience import Experience
from .fingerprint import accelerator_name, cpu_name, geometry, versions
from .modeling import DovetailAssistantModel
from .threads import chosen_threads

logger = logging.get_logger(__name__)


class Learned:
    """Costs and experience of one draft on one target as they run now.

    Args:
        curves: measured ones, or None.
        path, description: of the file that they come from.
    """

    def __init__(self, curves: CostCurves | None, path: Path, description: dict[str, Any]) -> None:
        self.costs = Costs(curves)
        self._experiences = {False: Experience(), True: Experience()}  # of greedy decoding, and of sampling
        self._path, self._description = path, description

    def controller(self, do_sample: bool, on_host: bool) -> AutoController:
        """The controller of one call."""
        return AutoController(self.costs, self._experiences[do_sample], on_host)

    def refresh(self) -> None:
        """Where the machine has left the stored curves, rescale them and write them again."""
        with self.costs.lock:
            factors = self.costs.drift() if self.costs.measured else None
            if factors is None:
                return
            self.costs.rescale(*factors)
        logger.info("verification takes %.2f and drafting %.2f times as long as calibrated; rescaled", *factors)
        save_curves(self.costs.curves, self._path, self._description)


_known: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, dict[tuple, Learned]]]
_known = WeakKeyDictionary()
_lock = Lock()


def learned_of(draft: DovetailAssistantModel, target: PreTrainedModel) -> Learned:
    """What is known of this draft on this target, engine, number of threads and device; new at the first meeting."""
    where = str(draft.device), str(target.device), *_layers_there(target)
    setting = engine_of(target), chosen_threads(), *where, target.dtype, draft.dtype
    with _lock:
        settings = _known.setdefault(draft, WeakKeyDictionary()).setdefault(target, {})
        if setting not in settings:
            description = describe(target, draft)
            path = curves_path(description)
            settings[setting] = Learned(load_curves(path), path, description)
        return settings[setting]


def keep(draft: DovetailAssistantModel, target: PreTrainedModel, curves: CostCurves) -> Path | None:
    """Store measured curves and use them from now on; the file, or None if it could not be written."""
    description = describe(target, draft)
    path = curves_path(description)
    with _lock:
        _known.setdefault(draft, WeakKeyDictionary()).pop(target, None)
    return path if save_curves(curves, path, description) else None


def describe(target: PreTrainedModel, draft: DovetailAssistantModel) -> dict[str, Any]:
    """What the time of a round depends on: geometries, precisions, engine, threads, machine and versions."""
    return {
        "target": geometry(target),
        "draft": {**geometry(draft), "weight_bits": draft.weight_bits},
        "engine": engine_of(target),
        "threads": chosen_threads(),
        "cpu": [cpu_name(), torch.backends.cpu.get_cpu_capability()],
        "devices": [target.device.type, accelerator_name(draft.device), *_layers_there(target)],
        "versions": versions(),
    }


def _layers_there(target: PreTrainedModel) -> list[int]:
    """How many of the target's layers are on an accelerator, where at least its LM head is."""
    dispatch = dispatch_of(target)
    return [] if dispatch is None else [dispatch.layers]
