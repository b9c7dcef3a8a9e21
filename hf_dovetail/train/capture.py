"""The target's features over the training text, captured once and kept in shards on disk.

A folder holds `manifest.json` (which target, text and layers), `shard-00000.safetensors` ... (ids, features of each
layer in bfloat16, what counts), and what a draft shares with its target, so that training needs the target's layers no
more. The LM head's inputs are always there: the target's logits follow from them. A shard is there whole or not at all;
a run that was killed makes those that are missing; of n processes each makes every n-th.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..blocks import finish_logits
from ..config import describe_head, describe_target
from ..modeling import DovetailAssistantModel
from ..prepare import prepared
from ..weights import feature_layers
from .features import Batch, capture, check_length, fingerprint, text_facts
from .files import check_facts, read_facts, write_whole
from .processes import this_process
from .text import Windows

MANIFEST, SHARED = "manifest.json", "shared.safetensors"
_OPEN_SHARDS = 32


def capture_features(
    target: PreTrainedModel,
    windows: Windows,
    folder: Path,
    shard_windows: int = 256,
    batch: int = 8,
    layers: Sequence[int] = (-1,),
    data: Sequence[str] = (),
) -> None:
    """Capture the features of all windows to `folder`; shards that are there are kept.

    Under `accelerate launch` each process makes its own shards on its own device.

    Args:
        target: in any precision; it is moved to the process's device, and stays there. On the CPU it runs on the best
            engine that computes the same (`prepare.prepared`).
        windows: of the training text.
        folder: for the shards, about `2 * hidden_size * layers + 5` bytes per token.
        shard_windows: windows per shard. batch: windows per forward pass.
        layers: whose features are stored, as `DovetailConfig.feature_layers` numbers them; the LM head's inputs (-1)
            are added if they are not among them.
        data: names of the training data, for the cards of drafts.

    Raises:
        ValueError: if `folder` holds the features of another target, text or layers, or windows are too long for the
            target, or a number is not positive.
        OSError: if a shard cannot be written; those before are kept.
    """
    if batch < 1 or shard_windows < 1:
        raise ValueError(f"batch is {batch} and shard_windows {shard_windows}; expected at least 1")
    check_length(target, windows.ids.shape[1])
    state, folder, layers = this_process(), Path(folder), sorted({*layers, -1})
    facts = {
        "target": fingerprint(target),
        "text": text_facts(windows),
        "target_name": describe_target(target.config)["target_name"],
        "layers": layers,
        "shard_windows": shard_windows,
        "hidden_size": target.config.get_text_config(decoder=True).hidden_size,
    }
    target.to(state.device).eval()
    with state.main_process_first():
        _open_folder(target, folder, facts, data)
    count = -(-len(windows) // shard_windows)
    mine = [i for i in range(state.process_index, count, state.num_processes) if not shard_path(folder, i).exists()]
    with prepared(target) if mine else nullcontext():
        for index in tqdm(mine, desc="capturing features", unit="shard", disable=not state.is_main_process):
            part = slice(index * shard_windows, (index + 1) * shard_windows)
            tensors = _shard(target, windows, part, batch, layers)
            write_whole(shard_path(folder, index), lambda path, tensors=tensors: save_file(tensors, path), "a shard")
    state.wait_for_everyone()


def shard_path(folder: Path, index: int) -> Path:
    """Name of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


def _open_folder(target: PreTrainedModel, folder: Path, facts: dict[str, Any], data: Sequence[str]) -> None:
    """Write the manifest of a new folder, or compare it."""
    manifest = folder / MANIFEST
    if manifest.exists():
        check_facts(facts, read_facts(manifest), folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    target.config.save_pretrained(folder)
    shared = {"embedding": target.get_input_embeddings().weight, "head": target.get_output_embeddings().weight}
    bias = getattr(target.get_output_embeddings(), "bias", None)
    shared |= {} if bias is None else {"bias": bias}
    tied = shared["embedding"] is shared["head"]
    kept = {name: tensor.detach() for name, tensor in shared.items() if not (tied and name == "head")}
    tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in kept.items()}  # unpacks packed ones
    write_whole(folder / SHARED, lambda path: save_file(tensors, path), "the target's embeddings and LM head")
    content = json.dumps({**facts, "data": list(data)}, indent=1) + "\n"
    write_whole(manifest, lambda path: path.write_text(content), "the manifest")


def _shard(
    target: PreTrainedModel, windows: Windows, part: slice, batch: int, layers: Sequence[int]
) -> dict[str, Tensor]:
    """A shard's tensors: ids (n, W) int32, features of each layer (n, W, h) bfloat16, and counted (n, W) bool, if not
    all count."""
    ids = windows.ids[part]
    features = torch.cat(
        [
            capture(target, rows.long().to(target.device), layers)[0].to("cpu", torch.bfloat16)
            for rows in ids.split(batch)
        ]
    )
    by_layer = zip(layers, features.chunk(len(layers), dim=-1), strict=True)
    tensors = {"ids": ids.int().contiguous(), **{_tensor_of(layer): part.contiguous() for layer, part in by_layer}}
    return tensors if windows.counted is None else {**tensors, "counted": windows.counted[part].contiguous()}


def _tensor_of(layer: int) -> str:
    """Name of a layer's features in a shard."""
    return "features" if layer < 0 else f"features.{layer}"


class StoredFeatures:
    """Captured features, read as they are needed.

    Args:
        folder: of `capture_features`.
        target: the target, if it is at hand (for validation); else a stand-in takes its place.

    Raises:
        ValueError: if shards are missing, or they are another target's.
        OSError: if a file is damaged.
    """

    def __init__(self, folder: Path, target: PreTrainedModel | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds no captured features; make them with hf-dovetail capture")
        self.facts = read_facts(self.folder / MANIFEST, ("target", "target_name", "text", "layers", "shard_windows"))
        if target is not None:
            check_facts({"target": fingerprint(target)}, self.facts, self.folder)
        self._count, self.window = self.facts["text"]["windows"]
        shards = range(-(-self._count // self.facts["shard_windows"]))
        missing = [i for i in shards if not shard_path(self.folder, i).exists()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]}; run hf-dovetail "
                "capture again, it makes those that are missing"
            )
        self._head: torch.nn.Module | None = None
        self._open = lru_cache(_OPEN_SHARDS)(_opened)
        self.target = target if target is not None else _stand_in(self.folder, self.facts["target_name"])
        self.counted = None
        if "counted" in self.facts["text"]:
            self.counted = torch.cat([self._open(shard_path(self.folder, i)).get_tensor("counted") for i in shards])

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: Tensor, length: int, draft: DovetailAssistantModel) -> Batch:
        """Windows `rows` from the shards; the target's logits are its LM head's of its own inputs.

        Raises:
            ValueError: if the draft reads layers of the target that are not captured.
        """
        layers = feature_layers(draft.config, self.target.config)
        if not {*layers} <= {*self.facts["layers"]}:
            raise ValueError(
                f"{self.folder} holds the features of layers {self.facts['layers']} (-1: the LM head's inputs), but "
                f"this draft (fusion {draft.config.fusion!r}) reads {list(layers)}; capture those into another folder "
                f"(hf-dovetail capture --fusion {draft.config.fusion}), or train on text (--target and --data)"
            )
        names = ["ids", *map(_tensor_of, layers)]
        ids, *features = (part.to(draft.device) for part in self._read(rows, length, names))
        features = torch.cat(features, dim=-1).to(draft.dtype)
        with torch.no_grad():
            if draft.predicts_features:
                return Batch(ids.long(), features, draft.logits(features))
            (last,) = self._read(rows, length, [_tensor_of(-1)])
            return Batch(ids.long(), features, self._target_logits(last.to(draft.device)))

    def _read(self, rows: Tensor, length: int, names: Sequence[str]) -> list[Tensor]:
        """(B, length, ...) of windows `rows`, for each name."""
        read = []
        for row in rows.tolist():
            index, within = divmod(row, self.facts["shard_windows"])
            shard = self._open(shard_path(self.folder, index))
            read.append([shard.get_slice(name)[within, :length] for name in names])
        return [torch.stack(parts) for parts in zip(*read, strict=True)]

    def _target_logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) float32 logits of (B, T, h) LM head's inputs, for a draft that has a head of its own."""
        if self._head is None or self._head.weight.device != hidden.device:
            head = self.target.get_output_embeddings()
            self._head = head if head.weight.device == hidden.device else copy.deepcopy(head).to(hidden.device)
        logits = self._head(hidden.to(self._head.weight.dtype)).float()
        return finish_logits(logits, **describe_head(self.target.config))


def _opened(path: Path) -> safe_open:
    """A file of tensors.

    Raises:
        OSError: if it is damaged, naming it.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"{path} is damaged ({error}); copy it again, or delete it and run hf-dovetail capture again, which makes "
            "what is missing"
        ) from error


def _stand_in(folder: Path, name: str | None) -> PreTrainedModel:
    """A model of the target's class whose embeddings and LM head are real, and whose layers have no storage."""
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = name or ""
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    with _opened(folder / SHARED) as file:
        shared = {key: nn.Parameter(file.get_tensor(key), requires_grad=False) for key in file.keys()}  # noqa: SIM118
    target.get_input_embeddings().weight = shared["embedding"]
    target.get_output_embeddings().weight = shared.get("head", shared["embedding"])
    if "bias" in shared:
        target.get_output_embeddings().bias = shared["bias"]
    return target.eval()
