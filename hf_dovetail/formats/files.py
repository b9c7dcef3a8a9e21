"""Reads a checkpoint's configuration and tensors from a folder or the Hub, whoever wrote it.

Runs no code that it may hold. Knows files only: neither formats nor networks.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
"""What is looked for, the first that is there is read; an index names further files."""
_HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "force_download")


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a `from_pretrained` call that say where a file is found."""
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def read_config(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """The dictionary in a checkpoint's `config.json`; `options` of `hub_options`.

    Raises:
        OSError: if there is none, or it is no JSON.
    """
    found, _ = PreTrainedConfig.get_config_dict(source, **options)
    if not found:
        raise OSError(f"{source} holds no config.json; expected the folder or the name of a model")
    return found


def read_tensors(
    source: str, options: dict[str, Any], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """The wanted tensors of a checkpoint by name, on the CPU; pages are read when they are used.

    Args:
        source: a folder, or a name on the Hub.
        options: of `hub_options`.
        wanted: which names; files without any are not looked at.

    Raises:
        OSError: if there is no file with weights, or one is damaged.
        ValueError: if a `.bin` file holds anything but tensors.
    """
    for name in _FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **options)
        if path is None:
            continue
        if not name.endswith(".json"):
            return _read(Path(path), wanted)
        places = _places(Path(path))
        tensors: dict[str, Tensor] = {}
        for part in sorted({part for tensor, part in places.items() if wanted(tensor)}):
            tensors |= _read(Path(cached_file(source, part, **options)), wanted)
        return tensors
    raise OSError(f"{source} holds no weights; expected one of {', '.join(_FILES)}")


def _places(index: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{index} is no index of weights ({error!r}); copy or download it again") from error


def _read(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors of one file."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} holds more than tensors and is not loaded, since that would run code of its author "
            f"({str(error).splitlines()[0]}); ask for a safetensors file"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise OSError(f"{path} is damaged ({error}); copy or download it again") from error
    strange = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{path.name} holds entries that are no tensors: {', '.join(map(str, strange[:5]))}; ask for a "
            "safetensors file, or save the state dict alone"
        )
    return {name: tensor for name, tensor in tensors.items() if wanted(name)}
