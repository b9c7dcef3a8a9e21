"""The parts of a causal LM: its decoder's layers, and what runs before and behind them.

Knows what modules say of themselves and what a pass runs; knows nothing of what is done with the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""What models call the cache among their arguments and outputs: since transformers 5.24, "cache"."""

_TRIED_TOKENS = 2
_CODE = ("co_code", "co_consts", "co_names", "co_varnames")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a target, in the order in which a pass runs them.

    Args:
        decoder: what turns token ids into the LM head's inputs.
        tables: parts without weights that run before the layers and hand them tensors (rotary embeddings).
        layers: the decoder's layers.
        tail: what runs between the last layer and the LM head.
        head: the LM head.
        positions: bytes of one position in each layer's cache.
    """

    decoder: nn.Module
    tables: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    tail: tuple[nn.Module, ...]
    head: nn.Module
    positions: tuple[int, ...]


def same_code(function: Any, known: Callable) -> bool:
    """Whether two functions are of one text, as models of transformers share theirs by copying; decorators included."""
    code, expected = (getattr(each, "__code__", None) for each in (function, known))
    if code is None or expected is None or any(getattr(code, part) != getattr(expected, part) for part in _CODE):
        return False
    decorated, inner = (getattr(each, "__wrapped__", None) for each in (function, known))
    return decorated is inner or (None not in (decorated, inner) and same_code(decorated, inner))


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """A decoder's layers: its list of as many modules as its configuration says; None if there is no such list."""
    config = getattr(decoder, "config", None)
    count = 0 if config is None else getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return next((layers for layers in lists if len(layers) == count > 0), None)


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether a model was loaded with quantised weights, which have kernels of their own."""
    return getattr(model.config, "quantization_config", None) is not None or getattr(model, "is_quantized", False)


def _why_not_apart(model: PreTrainedModel) -> str | None:
    """Why the layers of a model cannot be put on two devices, or None."""
    if is_quantised(model):
        return "it is quantised already and stays where it was loaded; load it with a device_map instead"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "accelerate has dispatched it already; load it without device_map"
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        return f"its weights are on {', '.join(sorted(devices))}, not on the CPU"
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is model or decoder_layers(decoder) is None:
        return "it does not say which part is its decoder, or keeps its layers in no list of it"
    if head is None or getattr(head, "weight", None) is None:
        return "it has no LM head with a weight matrix"
    return None


@torch.no_grad()
def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Take a model to parts by watching a pass over two tokens.

    Raises:
        ValueError: if its layers cannot be told apart from the rest, or it is quantised, dispatched, or not on the CPU.
    """
    reason = _why_not_apart(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot be placed on two devices: {reason}")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    layers = decoder_layers(decoder)
    ran: list[nn.Module] = []
    parts = [child for child in decoder.children() if child is not layers] + [layers[-1]]
    hooks = [part.register_forward_hook(lambda module, inputs, output: ran.append(module)) for part in parts]
    try:
        cache = try_pass(model)
    finally:
        for hook in hooks:
            hook.remove()
    last = ran.index(layers[-1])
    before, tail = ran[:last], tuple(dict.fromkeys(ran[last + 1 :]))
    tables = [part for part in dict.fromkeys(before) if not any(True for _ in part.parameters())]
    tables = [part for part in tables if any(True for _ in part.buffers())]
    states = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    positions = [sum(s.nbytes for s in pair if isinstance(s, Tensor)) // _TRIED_TOKENS for pair in states]
    positions += [0] * (len(layers) - len(positions))
    return Anatomy(decoder, tuple(tables), tuple(layers), tail, head, tuple(positions))


def try_pass(model: PreTrainedModel) -> DynamicCache:
    """A pass over two tokens; its cache."""
    ids, cache = torch.arange(_TRIED_TOKENS, device="cpu").unsqueeze(0), DynamicCache(config=model.config)
    with torch.random.fork_rng(devices=[]):
        return getattr(model(input_ids=ids, use_cache=True, **{CACHE: cache}), CACHE)


def nbytes_of(modules: Sequence[nn.Module]) -> int:
    """Bytes of the weights and buffers of modules, shared ones once."""
    tensors = {id(t): t.nbytes for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensors.values())
