"""What measurements on this machine depend on: a model's geometry, the CPU, the accelerator, the versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel


def versions() -> dict[str, str]:
    """The packages whose kernels and code are timed."""
    return {name: _version(name) for name in ("torch", "transformers", "hf_dovetail")}


def accelerator_name(device: torch.device) -> str:
    """The model of a CUDA or ROCm GPU, else the device's type."""
    return device.type if device.type != "cuda" else torch.cuda.get_device_name(device)


def geometry(model: PreTrainedModel) -> dict[str, Any]:
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
