"""What stands in for a decoder's and its layers' forward, and takes itself out again.

The decoder's opens a pass, which its layers find in a context variable: other threads see nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..attention import IMPLEMENTATIONS
from ..forwards import stand_in, take_out
from .passes import StreamedPass, Streaming

logger = logging.get_logger(__name__)

_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class Pass(Protocol):
    """A pass of the decoder, as its layers see it."""

    def takes(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> bool:
        """Whether the layer's call is this pass's to answer; it is computed on the CPU otherwise."""

    def run(self, layer: nn.Module, args: tuple, named: dict[str, Any]) -> Tensor:
        """What the layer returns."""


_streamings: WeakKeyDictionary[nn.Module, Streaming] = WeakKeyDictionary()
current: ContextVar[Pass | None] = ContextVar("hf_dovetail_pass", default=None)


def switch_on(decoder: nn.Module, layers: Iterable[nn.Module], streaming: Streaming) -> None:
    """Let the passes of `decoder` be streamed."""
    _streamings[decoder] = streaming
    decoder.forward = partial(_decode, decoder)
    redirect(layers)


def redirect(layers: Iterable[nn.Module]) -> None:
    """Let layers ask the current pass what to do; what it leaves to them they compute as before."""
    for layer in layers:
        layer.forward = partial(_layer, layer, vars(layer).get("forward"))


def switch_off(decoder: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Undo `switch_on` and `redirect`; a forward that others have put in the place of these is left alone."""
    _streamings.pop(decoder, None)
    take_out((decoder,), _decode)
    for layer in layers:
        mine = stand_in(layer, _layer)
        take_out((layer,), _layer)
        if mine is not None and mine.args[1] is not None:
            layer.forward = mine.args[1]


def streaming_of(decoder: nn.Module) -> Streaming | None:
    """How the decoder's prompts are streamed, or None if they are not.

    On a GPU it tells afterwards from how many tokens on prompts went through it, and whether a pass failed there.
    """
    return _streamings.get(decoder)


def _decode(decoder: nn.Module, *args: Any, **named: Any) -> Any:
    """Stands in for the decoder's forward while it is switched on."""
    plain = partial(type(decoder).forward, decoder)
    # None for a copy of the model; torch.compile cannot trace the look-up
    streaming = None if torch.compiler.is_compiling() else _streamings.get(decoder)
    if streaming is None or not _may_stream(decoder, streaming, named):
        return plain(*args, **named)
    streamed = StreamedPass(streaming, decoder)
    token = current.set(streamed)
    try:
        return plain(*args, **named)
    except Exception as error:
        if not streamed.broke:
            raise
        streaming.failed = True
        logger.warning(
            "streaming a prompt through %s failed (%s: %s); it is computed on the CPU instead, as all further prompts "
            "are until prepare_target is called again",
            streaming.device,
            type(error).__name__,
            error,
        )
    finally:
        current.reset(token)
        streamed.close()
    streamed.undo()
    return plain(*args, **named)


def _may_stream(decoder: nn.Module, streaming: Streaming, named: dict[str, Any]) -> bool:
    """Whether a pass may be streamed, whatever its rows: evaluation, and nothing wanted from within the layers."""
    config = decoder.config
    return not (
        streaming.failed
        or torch.is_grad_enabled()
        or decoder.training
        or torch.is_autocast_enabled("cpu")
        or config._attn_implementation not in IMPLEMENTATIONS
        or any(getattr(config, name, False) if named.get(name) is None else named[name] for name in _OUTPUTS)
    )


def _layer(layer: nn.Module, before: Callable | None, *args: Any, **named: Any) -> Any:
    """Stands in for a layer's forward, or for `before`, which it had instead, while its decoder is switched on."""
    now = None if torch.compiler.is_compiling() else current.get()
    if now is not None and now.takes(layer, args, named):
        return now.run(layer, args, named)
    return type(layer).forward(layer, *args, **named) if before is None else before(*args, **named)
