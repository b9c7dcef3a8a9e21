"""Dovetail speculative decoding for Hugging Face models: a draft on the GPU, the target on the CPU, the same text.

Importing the package registers it with transformers and imports nothing heavy; the names below load on use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .register import register, unregister

if TYPE_CHECKING:
    from .config import DovetailConfig, TreeShape
    from .modeling import DovetailAssistantModel
    from .plugin.candidates import DovetailCandidateGenerator
    from .prepare import prepare_target, restore_target
    from .stats import GenerationStats

try:
    __version__ = version("hf_dovetail")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "DovetailConfig": "config",
    "TreeShape": "config",
    "GenerationStats": "stats",
    "DovetailAssistantModel": "modeling",
    "DovetailCandidateGenerator": "plugin.candidates",
    "prepare_target": "prepare",
    "restore_target": "prepare",
}

__all__ = [*_HOMES, "register", "unregister", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register()
