"""One process or several: which one this is, and a draft whose weights are split over them, put together."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch import nn

from ..modeling import DovetailAssistantModel


def this_process() -> PartialState:
    """The state of this process, the same before and after an `Accelerator` is made (which alone reads the flag)."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def splits_weights(accelerator: Accelerator) -> bool:
    """Whether no process has whole weights, as with FSDP and DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def tell_batch(accelerator: Accelerator, windows: int) -> None:
    """Tell DeepSpeed how many windows a process computes at a time, where its configuration leaves that to a data
    loader: there is none."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
            config["train_micro_batch_size_per_gpu"] = windows


def as_number(norm: torch.Tensor | float | None) -> float:
    """A gradient's norm, which FSDP may leave in parts, and DeepSpeed may not know (0)."""
    if norm is None:
        return 0.0
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def whole_draft(draft: DovetailAssistantModel, module: nn.Module, accelerator: Accelerator) -> DovetailAssistantModel:
    """A draft that can draft: itself, or a copy on every process if its weights are split over them.

    Args:
        draft: in training. module: the prepared `steps.DraftLoss` of it.
    """
    if not splits_weights(accelerator):
        return draft
    weights = accelerator.get_state_dict(module)  # on the main process; others may get nothing
    copy = DovetailAssistantModel(draft.config)
    if accelerator.is_main_process:
        copy.load_state_dict({name.removeprefix("draft."): weight for name, weight in weights.items()})
    copy.to(accelerator.device)
    for tensor in copy.state_dict().values():
        torch.distributed.broadcast(tensor, src=0)
    copy.draft_device, copy.tokenizer_source = draft.draft_device, draft.tokenizer_source
    return copy.eval()
