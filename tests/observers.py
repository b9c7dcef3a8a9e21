"""What shows whether a call differed: the calls that a streamer got, and the state of the models afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs", "_state_dict_hooks")


class RecordingStreamer(BaseStreamer):
    """Notes every call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append((tuple(value.shape), value.device.type, value.tolist()))

    def end(self) -> None:
        self.calls.append("end")


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """What a call could leave behind in a model, but for a draft's `last_stats` and its shared weights."""
    return {
        "config": copy.deepcopy(model.config.to_dict()),
        "config attributes": sorted(vars(model.config)),
        "generation": copy.deepcopy(model.generation_config.to_dict()) if hasattr(model, "generation_config") else None,
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            (name, kind): dict(getattr(module, kind)) for name, module in model.named_modules() for kind in HOOKS
        },
        "training": {name: module.training for name, module in model.named_modules()},
        "weights": {name: (p.data_ptr(), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }
