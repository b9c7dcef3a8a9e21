"""What this process knows of a draft on a target: costs and experience, kept between calls and shared by threads.

Stored curves (`curves`, written by `calibrate`) are read at the first meeting, and written again when the machine
has left them. What rounds teach beyond that stays in memory.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .controller import AutoController, Experience
from .costs import Costs
from .curves import CostCurves, curves_path, load_curves, save_curves
from .engines import engine_of
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
    setting = engine_of(target), chosen_threads(), str(draft.device), str(target.device), target.dtype, draft.dtype
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
    accelerator = draft.device.type if draft.device.type != "cuda" else torch.cuda.get_device_name(draft.device)
    return {
        "target": _geometry(target),
        "draft": _geometry(draft),
        "engine": engine_of(target),
        "threads": chosen_threads(),
        "cpu": [cpu_name(), torch.backends.cpu.get_cpu_capability()],
        "devices": [target.device.type, accelerator],
        "versions": {name: _version(name) for name in ("torch", "transformers", "hf_dovetail")},
    }


def _geometry(model: PreTrainedModel) -> dict[str, Any]:
    """The numbers of a model's configuration that shape its computation, its precision and its attention."""
    config: PreTrainedConfig = model.config.get_text_config(decoder=True)
    values = {**config.to_dict(), **(getattr(config, "causal_lm", None) or {})}
    sizes = {k: v for k, v in values.items() if isinstance(v, int | float) and not k.endswith("token_id")}
    return {
        **sizes,
        "model_type": config.model_type,
        "layer_types": values.get("layer_types"),
        "quantization": str(values.get("quantization_config")),
        "dtype": str(model.dtype),
        "attention": config._attn_implementation,
    }


def cpu_name() -> str:
    """The CPU's model, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
