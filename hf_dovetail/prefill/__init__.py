"""Long prompts on the accelerator: the target's layers are streamed through it once, the rest stays on the CPU.

The switch is on the model, not in Dovetail's loop: on a prepared target every pass of enough rows is streamed, whoever
asks for it, so that plain `generate` and Dovetail see the same roundings. `prepare_target` installs it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..anatomy import decoder_layers, is_quantised
from ..attention import IMPLEMENTATIONS, TESTED_TYPES
from .measure import measured_threshold
from .modules import unfit
from .passes import Streaming
from .switch import switch_off, switch_on

logger = logging.get_logger(__name__)


def install(model: PreTrainedModel, engine: str, refusal: str | None = None) -> str | None:
    """Let long prompts of a prepared target be streamed where that is faster; the reason why not, or None.

    What it costs and from how many rows on it pays is measured once and kept in the user's cache (`measure`), so that
    it stays the same in later processes.

    Args:
        model: the target.
        engine: the name of what runs its layers.
        refusal: why an accelerator could not run them as that engine does, or None.
    """
    remove(model)
    reason = why_not(model, refusal)
    if reason is None:
        device = _accelerator()
        try:
            least_rows, reason = measured_threshold(model, engine, device)
        except Exception as error:  # whatever an accelerator raises: prompts stay on the CPU
            reason = f"a layer could not be tried on {device} ({type(error).__name__}: {error})"
        if reason is None:
            switch_on(model.get_decoder(), decoder_layers(model.get_decoder()), Streaming(device, least_rows))
            logger.info("prompts of %d tokens or more go through %s, layer by layer", least_rows, device)
            return None
    logger.info("prompts stay on the CPU: %s", reason)
    return reason


def remove(model: PreTrainedModel) -> None:
    """Undo `install`."""
    switch_off(model.get_decoder(), decoder_layers(model.get_decoder()) or ())


def why_not(model: PreTrainedModel, refusal: str | None = None) -> str | None:
    """Why no prompt of the model can be streamed, or None; `refusal` is its engine's reason."""
    text = model.config.get_text_config(decoder=True)
    if torch.accelerator.current_accelerator(check_available=True) is None:
        return "there is no accelerator"
    if refusal is not None:
        return refusal
    if is_quantised(model):
        return "the model is quantised, and its kernels are the CPU's"
    if text.model_type not in TESTED_TYPES:
        return f"models of type {text.model_type} were not tried; {', '.join(sorted(TESTED_TYPES))} were"
    if text._attn_implementation not in IMPLEMENTATIONS:
        return f"attention {text._attn_implementation!r} does not run on both devices; {IMPLEMENTATIONS} do"
    if model.training:
        return "the model is in training mode"
    layers = decoder_layers(model.get_decoder())
    if layers is None:
        return f"{type(model).__name__} keeps its layers in no list of the decoder"
    return _replaced(model.get_decoder()) or unfit(layers)


def _replaced(decoder: nn.Module) -> str | None:
    return "something has replaced the decoder's forward" if "forward" in vars(decoder) else None


def _accelerator() -> torch.device:
    kind = torch.accelerator.current_accelerator(check_available=True).type
    return torch.device(kind, torch.accelerator.current_device_index())
