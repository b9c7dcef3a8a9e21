"""Whole decoder layers of Llama's kind out of kernels: rotary embedding, gated MLP, products of packed weights.

In transformers' own layers, what is not matrix work is mostly Python. A layer here is computed by few calls, with the
bits that its own forward would give; that one runs wherever somebody could see a difference: hooks on the modules
within, modules or functions that were exchanged, gradients, torch.compile, autocast, prompts, other devices.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from ..anatomy import CACHE, same_code
from ..forwards import take_out
from ..grouped import MOST_ROWS, NAME
from ..packed import PackedWeight
from . import activations, native, norms, rotary
from .decoder_layer import DecoderLayer, Linears
from .fused import NO_NORM

_ATTENTIONS: dict[str, tuple[str, ...]] = {"llama": (), "mistral": (), "qwen2": (), "qwen3": ("q_norm", "k_norm")}
"""Models of transformers whose attention is known, and its norms of queries and keys; each has a few copies."""
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_LINEAR = nn.Linear.forward  # somebody may put another in its place later
_ROTARY, _HALF = "apply_rotary_pos_emb", "rotate_half"
_QUIET, _HOOKS = ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), "_forward_hooks"


def switch_on(model: PreTrainedModel) -> None:
    """Let those layers of the model run on the kernels that can do so as they are now; where there are kernels."""
    if native.why_not() is not None:
        return
    for layer in model.modules():
        if "forward" not in vars(layer) and _look_into(layer) is not None:
            layer.forward = partial(_forward, _Lean(layer))


def switch_off(model: PreTrainedModel) -> None:
    """Give the layers their own functions back."""
    take_out(model.modules(), _forward)


class _Lean:
    """A layer and what was last found in it.

    It does not keep the layer alive: that would be a circle, and its weights would wait for the garbage collector.
    A copy belongs to the layer's copy.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self._parts: _Parts | None = None

    def __reduce__(self) -> tuple[type[_Lean], tuple[nn.Module | None]]:
        return _Lean, (self.layer,)

    @property
    def layer(self) -> nn.Module:
        """The layer.

        Raises:
            RuntimeError: if it is gone.
        """
        layer = self._layer()
        if layer is None:
            raise RuntimeError(
                "a shallow copy of a prepared decoder layer has outlived the layer; copy it by copy.deepcopy, or "
                "before prepare_target"
            )
        return layer

    def parts(self) -> _Parts | None:
        """The layer's parts, or None if it has to run as it is."""
        parts, layer = self._parts, self.layer
        if parts is None or type(layer) is not parts.kind or not (parts.found.unchanged() and parts.unmoved()):
            parts = self._parts = _look_into(layer)
        return None if parts is None or parts.found.watched() else parts


def _forward(
    lean: _Lean,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """A decoder layer's forward, in transformers' interface.

    Args:
        hidden_states: (B, T, h). attention_mask: (B, 1, T, S) or None. position_embeddings: two of (1 or B, T, D).
        cache: called `past_key_values` before transformers 5.24.

    Returns:
        (B, T, h).
    """
    options |= {"position_ids": position_ids, "use_cache": use_cache}
    cache = options.pop("past_key_values", cache)
    layer = lean.layer
    takes = native.kernels() is not None and _takes(hidden_states, position_embeddings)
    parts = lean.parts() if takes and not layer.training else None
    if parts is None or not parts.fit(hidden_states, position_embeddings[0]):
        options |= {"attention_mask": attention_mask, CACHE: cache}
        return type(layer).forward(layer, hidden_states, position_embeddings=position_embeddings, **options)
    compute = parts.kernels[1].compute
    return compute(parts.attention, hidden_states, position_embeddings, attention_mask, cache, options)


def _takes(hidden: Tensor, embeddings: tuple[Tensor, Tensor] | None) -> bool:
    """Whether the kernels compute such a call as transformers does, if the layer's modules are as they were."""
    if type(hidden) is not Tensor or hidden.ndim != 3 or not hidden.is_cpu or embeddings is None:
        return False
    if not 0 < hidden.shape[1] <= MOST_ROWS or hidden.shape[0] == 0:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch_module._has_any_global_hook():
        return False
    return rotary.takes(hidden, *embeddings)


class _Found:
    """What was found in a layer, to see whether it is still so; looked up in every call, by few steps of Python.

    Args:
        modules: those within.
        kinds: classes, and their functions.
        tables: dictionaries, a name in each, and what was found there.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        kinds: Sequence[tuple[type, Callable]],
        tables: Sequence[tuple[dict[str, Any], str, Any]],
    ) -> None:
        self._modules, self._types, self._kinds = modules, [type(module) for module in modules], kinds
        hooks = [(vars(module), name, vars(module)[name]) for module in modules for name in (*_QUIET, _HOOKS)]
        self._tables, self._names, self._values = zip(*tables, *hooks, strict=True)
        self._ids = list(map(id, self._values))
        self._quiet = [held for _, name, held in hooks if name in _QUIET]
        self._hooks = [held for _, name, held in hooks if name == _HOOKS]

    def unchanged(self) -> bool:
        """Whether a call of the modules would compute what it would have computed then."""
        if list(map(id, map(dict.get, self._tables, self._names))) != self._ids:
            return False
        return list(map(type, self._modules)) == self._types and all(kind.forward is own for kind, own in self._kinds)

    def watched(self) -> bool:
        """Whether hooks see what goes in or out of the modules; transformers' recording ones only while they record."""
        if any(self._quiet):
            return True
        return any(self._hooks) and not all(_is_at_rest(hook) for hooks in self._hooks for hook in hooks.values())


def _is_at_rest(hook: Callable) -> bool:
    collector = getattr(output_capturing, "_active_collector", None)
    ours = collector is not None and getattr(hook, "__module__", None) == output_capturing.__name__
    return ours and not collector.get()


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a layer is computed from, looked up once.

    Args:
        kind: the layer's class.
        found: where the rest comes from.
        attention: the module.
        norms: of the layer's input, of the MLP's, and of queries and keys, if there are any.
        linears: of queries, keys and values; back from attention; the gated MLP, and back.
        activation: the name of the gate's function.
    """

    kind: type
    found: _Found
    attention: nn.Module
    norms: tuple[nn.Module, ...]
    linears: tuple[Linears, ...]
    activation: str

    @functools.cached_property
    def kernels(self) -> tuple[tuple, DecoderLayer]:
        """What computes the layer, and what tells that it reads what the modules hold."""
        settings, norms = self._settings(), [(norm.weight, norm.variance_epsilon) for norm in self.norms]
        pairs = norms[:2], norms[2:] or (NO_NORM, NO_NORM)
        head_dim = self.attention.head_dim
        return settings, DecoderLayer(*self.linears, *pairs, head_dim=head_dim, activation=self.activation)

    @functools.cached_property
    def _small_weights(self) -> list[Tensor]:
        """Of norms, and biases."""
        biases = (bias for each in self.linears for bias in each.biases)
        return [*(norm.weight for norm in self.norms), *(bias for bias in biases if bias is not None)]

    def _settings(self) -> tuple:
        """Changes with what the kernels would not notice: how small weights lie in memory, and numbers."""
        weights, epsilons = self._small_weights, [norm.variance_epsilon for norm in self.norms]
        places, sizes = list(map(Tensor.data_ptr, weights)), list(map(Tensor.numel, weights))
        kinds = [weight.dtype for weight in weights]
        return self.attention.head_dim, places, sizes, kinds, all(map(Tensor.is_contiguous, weights)), epsilons

    def unmoved(self) -> bool:
        """Whether the kernels read what the modules hold."""
        return self.kernels[0] == self._settings()

    def fit(self, hidden: Tensor, cosines: Tensor) -> bool:
        """Whether states are as wide and precise as the weights, and the model uses this package's attention."""
        attention, weight = self.attention, self.norms[0].weight
        if attention.training or attention.config._attn_implementation != NAME or weight.dtype != hidden.dtype:
            return False
        return hidden.shape[2] == len(weight) and cosines.shape[2] == attention.head_dim


def _look_into(layer: nn.Module) -> _Parts | None:
    """What to compute a layer from, or None if it has to run as it is."""
    attention, mlp = (getattr(layer, name, None) for name in ("self_attn", "mlp"))
    linears = [getattr(attention, name, None) for name in _ATTENTION_LINEARS]
    linears += [getattr(mlp, name, None) for name in _MLP_LINEARS]
    if not all(type(each) is nn.Linear and isinstance(each.weight, PackedWeight) for each in linears):
        return None
    head_norms = _names_of_head_norms(layer)
    if head_norms is None or not all(map(_are_plain, linears)) or len({each.weight.dtype for each in linears}) != 1:
        return None
    width, dtype = linears[0].weight.shape[1], linears[0].weight.dtype
    norms_within = [(getattr(layer, name), width) for name in _NORMS]
    norms_within += [(getattr(attention, name), attention.head_dim) for name in head_norms]
    activation = activations.name_of(mlp.act_fn)
    if activation is None or not all(_is_plain_norm(norm, dtype, size) for norm, size in norms_within):
        return None
    if not all(map(_runs_its_class, (attention, mlp, *linears))):
        return None
    query, key, value, output, gate, up, down = linears
    return _Parts(
        kind=type(layer),
        found=_found(layer, _globals_of(type(attention).forward)),
        attention=attention,
        norms=tuple(norm for norm, _ in norms_within),
        linears=(Linears.of(query, key, value), Linears.of(output), Linears.of(gate, up), Linears.of(down)),
        activation=activation,
    )


def _is_plain_norm(norm: nn.Module, dtype: torch.dtype, size: int) -> bool:
    """Whether a norm runs on the kernel, and its weight is a parameter that the kernel takes."""
    weight = norm._parameters.get("weight")
    known = norms.is_on(norm) and norm.weight is weight and isinstance(norm.variance_epsilon, (int, float))
    return known and norms.can_normalise(weight, dtype, size)


def _are_plain(linear: nn.Linear) -> bool:
    """Whether a linear layer computes what torch's do, and its bias is a parameter with a number for each output."""
    bias = linear.bias
    if nn.Linear.forward is not _LINEAR or bias is not linear._parameters.get("bias"):
        return False
    return bias is None or (bias.shape == linear.weight.shape[:1] and bias.dtype == linear.weight.dtype)


def _found(layer: nn.Module, functions: dict[str, Any]) -> _Found:
    """What there is in a layer, and among the functions that its attention finds by their names."""
    within, rotate = list(layer.modules())[1:], functions[_ROTARY]
    within += [rotate] if isinstance(rotate, nn.Module) else []
    tables: list[tuple[dict[str, Any], str, Any]] = []
    for module in (layer, *within):
        for held in (module._modules, module._parameters):
            tables += [(held, name, value) for name, value in held.items()]
    for module in within:
        tables += [(vars(module), "forward", vars(module).get("forward")), (vars(module), "_compiled_call_impl", None)]
    halves = _function(rotate).__globals__
    tables += [(functions, _ROTARY, rotate), (halves, _HALF, halves[_HALF])]
    kinds = {type(module) for module in (layer, *within)}
    return _Found(within, [(kind, kind.forward) for kind in kinds], tables)


def _names_of_head_norms(layer: nn.Module) -> tuple[str, ...] | None:
    """Where a layer of known code has its norms of queries and keys (most have none), or None for other layers."""
    llama, attention = _reference("llama"), type(layer.self_attn)
    functions = _globals_of(attention.forward)
    rotate = _function(functions.get(_ROTARY))
    known = (
        (type(layer).forward, llama.LlamaDecoderLayer.forward),
        (type(layer.mlp).forward, llama.LlamaMLP.forward),
        (rotate, _function(llama.apply_rotary_pos_emb)),
        (getattr(rotate, "__globals__", {}).get(_HALF), llama.rotate_half),
    )
    if functions.get("ALL_ATTENTION_FUNCTIONS") is not ALL_ATTENTION_FUNCTIONS:
        return None
    if not all(_is_copy(function, own) for function, own in known):
        return None
    for name, head_norms in _ATTENTIONS.items():
        if _is_copy(attention.forward, getattr(_reference(name), f"{name.capitalize()}Attention").forward):
            return head_norms
    return None


def _globals_of(function: Callable) -> dict[str, Any]:
    """What a function finds by names, within decorators (transformers 5.24 renames an argument by one)."""
    return getattr(inspect.unwrap(function), "__globals__", {})


def _function(found: Any) -> Any:
    """A function that the `kernels` library has made a module of, until it exchanges the module's forward."""
    if (
        not isinstance(found, nn.Module)
        or not type(found).__module__.startswith("kernels.")
        or not _runs_its_class(found)
    ):
        return found
    cells = type(found).forward.__closure__ or ()
    return next((cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)), None)


@functools.cache
def _reference(name: str) -> ModuleType:
    """transformers' file of a model, imported when it is needed: it imports the Auto classes."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def _is_copy(function: Any, known: Callable) -> bool:
    """Whether a function is transformers' own and of known code; other libraries put theirs in the same places."""
    return getattr(function, "__module__", "").startswith("transformers.models.") and same_code(function, known)


def _runs_its_class(module: nn.Module) -> bool:
    """Whether a module has no forward but its class's; accelerate leaves that one as an attribute."""
    forward = vars(module).get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return forward is None or own
