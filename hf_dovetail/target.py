"""The verifier: one forward pass of the target over a whole tree, and a cache that keeps the accepted path.

Two kinds: `TreeTarget` for models whose attention can be given branches, `ChainTarget` for models whose cache
can only be cropped (hybrid and recurrent ones). Both leave in the cache exactly the answer so far, without
its last token. Knows models and caches; knows nothing of drafts, sampling or generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from .anatomy import CACHE, decoder_layers
from .attention import BranchingMask, why_not_branching
from .cache import GrowingCache, can_branch, num_cache_layers
from .config import TreeShape
from .devices import Move
from .dispatch import dispatch_of
from .probe import branches_rightly
from .tree import DraftTree


@dataclass(frozen=True)
class TargetOutput:
    """What the target says of each row it computed.

    Args:
        logits: (B, T, V) in the model's precision; after `prefill` of the last position only (T = 1).
        features: (B, T, f) what `FeatureTap` takes of every row (the LM head's inputs: f = h), or None.
    """

    logits: Tensor
    features: Tensor | None


@dataclass
class Context:
    """Where the sequence stands before a verification, as `generate` prepared it.

    Args:
        cache: the `Cache` that `generate` prepared or the user gave.
        attention_mask: (1, n) 2D mask of the prompt (padding on the left), or None when nothing is masked.
        position_ids: (..., n) of the prompt, or None for a model that takes none.
        prompt_length: tokens given, with or without those that the cache holds already; a hint for the cache.
        max_length: longest sequence that will be asked for, as a hint for the cache.
        options: further keyword arguments that every forward pass gets, such as `output_router_logits`.
        move: copies a tensor to a device, and counts what crosses; for targets whose layers are on two devices.
    """

    cache: Cache
    attention_mask: Tensor | None
    position_ids: Tensor | None
    prompt_length: int
    max_length: int
    options: dict[str, Any] = field(default_factory=dict)
    move: Move = Tensor.to

    @property
    def padding(self) -> int:
        """Masked positions at the start of the prompt."""
        return 0 if self.attention_mask is None else int(self.attention_mask[0].argmax())


class FeatureTap:
    """Runs forward passes and takes hidden states on the way: the LM head's inputs, or the inputs of some layers.

    The hooks are there during a pass only: a logits processor may run the model too (classifier-free guidance).

    Args:
        model: the target.
        enabled: whether to take anything.
        layers: -1 for the decoder's last hidden states, the LM head's inputs; i for the inputs of layer i, which is
            transformers' `hidden_states[i]`. Those of several layers stand side by side, in this order.

    Raises:
        ValueError: if the model does not say which part is its decoder, or what its layers are.
    """

    def __init__(self, model: PreTrainedModel, enabled: bool, layers: Sequence[int] = (-1,)) -> None:
        self._enabled, self._places = enabled, list(layers)
        decoder = model.get_decoder()
        if enabled and decoder is model:
            raise ValueError(f"{type(model).__name__} does not say which part is its decoder (get_decoder)")
        inner = _layers(model, decoder) if enabled and max(layers) >= 0 else []
        self._decoder, self._modules = decoder, [decoder if layer < 0 else inner[layer] for layer in layers]

    def __call__(self, forward: Callable[[], Any], move: Move = Tensor.to) -> tuple[Any, Tensor | None]:
        """The pass's output, and features of all its rows (several decoder passes, if it is chunked).

        The features are (B, T, n * h), those of n layers side by side, where the last of them is; `move` brings the
        others there, if the target's layers are on two devices.
        """
        if not self._enabled:
            return forward(), None
        taken: list[list[Tensor]] = [[] for _ in self._places]
        passes: list[None] = []  # those of the decoder that are done
        with ExitStack() as hooks:
            for module, place, into in zip(self._modules, self._places, taken, strict=True):
                hooks.callback(_hook(module, place, into, passes).remove)
            hooks.callback(self._decoder.register_forward_hook(_counting(passes)).remove)
            output = forward()
        layers = [_joined(parts, dim=1) for parts in taken]
        return output, _joined([move(layer, layers[-1].device) for layer in layers], dim=-1)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _counting(passes: list[None]) -> Callable[..., None]:
    """A hook that counts this thread's passes."""
    owner = get_ident()
    return lambda *_: passes.append(None) if get_ident() == owner else None


def _hook(module: nn.Module, layer: int, into: list[Tensor], passes: list[None]) -> RemovableHandle:
    """Append what `FeatureTap` takes of `module` in every pass of this thread to `into`."""
    owner = get_ident()
    on_host = layer >= 0 and next(module.parameters()).device.type == "cpu"

    def take(states: Tensor) -> None:
        if get_ident() == owner:  # other threads may run the same model
            del into[len(passes) :]  # of a pass that was begun again, after a failure of a device
            into.append(states.cpu() if on_host else states)  # a long prompt's are elsewhere for a moment

    if layer < 0:
        return module.register_forward_hook(
            lambda _, inputs, output: take(output[0] if isinstance(output, tuple) else output.last_hidden_state)
        )
    return module.register_forward_pre_hook(
        lambda _, inputs, named: take(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
    )


def _layers(model: PreTrainedModel, decoder: nn.Module) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        ValueError: if it keeps them in no list.
    """
    layers = decoder_layers(decoder)
    if layers is not None:
        return layers
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    raise ValueError(
        f"{type(model).__name__} keeps its {count} layers in no list of the decoder, so a draft that reads their "
        "inputs (EAGLE-3) cannot draft for it; use a draft that reads the LM head's inputs"
    )


class Target(AbstractContextManager):
    """What both kinds of verifier share; entered for the length of an answer.

    Args:
        model: the target.
        context: where the sequence stands.
        tap: runs the forward passes and takes the features.
        nodes: largest tree to expect, as a hint for the cache.

    Attributes:
        first: first position that a draft can learn of; those before are padding, or of an earlier call.
        held: positions that the cache holds: the answer so far, without its last token.
    """

    cache: Cache

    def __init__(self, model: PreTrainedModel, context: Context, tap: FeatureTap, nodes: int) -> None:
        self.model, self._context, self._tap, self._nodes = model, context, tap, nodes
        self._device, self._end = model.device, _last_position(model)
        self._dispatch = dispatch_of(model)
        self._move = Tensor.to if self._dispatch is None else context.move
        self._past = self.held = context.cache.get_seq_length()
        self.first = max(self._past, context.padding)
        self._root: Tensor | None = None  # position of the first new token
        if context.position_ids is not None:
            self._root = (context.position_ids[..., -1:] + 1).to(self._device)
            self._first_position = int(self._root.max())
        self._adopt()

    def __exit__(self, *error: object) -> None:
        """Nothing to undo."""

    def prefill(self, forward: Callable[[Cache], Any]) -> TargetOutput:
        """Run the prompt; `forward` calls the model with the cache that it is given.

        The features are those of the positions from `first` on.
        """
        output, features = self._run(lambda: forward(self.cache))
        cache = getattr(output, CACHE)
        if cache is not self.cache:  # a model may start a cache of its own (longrope)
            self._context.cache = cache
            self._adopt()
        self.held = self._prompt_end = self.cache.get_seq_length()
        if features is not None:
            features = features[:, self.first - self._past :]
        return TargetOutput(output.logits[:, -1:], features)

    def allowed(self, shape: TreeShape) -> TreeShape:
        """The part of `shape` that this target can verify at the current position."""
        if self._root is None or self._end is None:
            return shape
        return shape.clipped(max(self._end - self._first_position - self._new, 0))

    @property
    def _new(self) -> int:
        """New tokens that the cache holds."""
        return self.held - self._prompt_end

    def _adopt(self) -> None:
        raise NotImplementedError

    def verify(self, tree: DraftTree) -> TargetOutput:
        """One forward pass over the root and all nodes of the tree."""
        raise NotImplementedError

    def commit(self, path: tuple[int, ...]) -> None:
        """Keep a path of the verified tree, root first, and forget its other nodes."""
        raise NotImplementedError

    def finish(self) -> Cache:
        """The cache in the form in which plain `generate` returns it."""
        raise NotImplementedError

    def _run(
        self, forward: Callable[[], Any], given: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> tuple[Any, Tensor | None]:
        """A pass and its features; of a target on two devices the logits stay where they are.

        `given`: tensors that the pass reads, each beside the same on the other device.
        """
        if self._dispatch is None:
            return self._tap(forward)
        with self._dispatch.verifying(self._move, given):
            result = self._tap(forward, self._move)
        self._dispatch.wait()
        return result

    def _forward(
        self, tree: DraftTree, attention_mask: Any, given: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> TargetOutput:
        positions = {}
        if self._root is not None:
            positions["position_ids"] = self._root + self._new + tree.depths.to(self._device)
        inputs = {"input_ids": tree.tokens.to(self._device), **positions, **self._context.options}
        output, features = self._run(
            lambda: self.model(**inputs, attention_mask=attention_mask, use_cache=True, **{CACHE: self.cache}),
            given,
        )
        return TargetOutput(output.logits, features)

    def _causal_mask(self, rows: int) -> Tensor | None:
        """The prompt's 2D mask, with `rows` more positions than the cache holds."""
        mask = self._context.attention_mask
        if mask is None:
            return None
        return torch.cat((mask, mask.new_ones(1, self._new + rows)), dim=1)


class TreeTarget(Target):
    """Verifies trees: tree mask, depth positions, and a cache that keeps one path in place."""

    def _adopt(self) -> None:
        self._branching = BranchingMask(self.model)
        mask = self._context.attention_mask
        hides = mask is not None and not mask.all()
        self._prompt_masks = {mask.device: mask.bool()} if hides else {}  # (1, n), where they were needed so far
        soon = self._context.prompt_length + 256
        if self._dispatch is not None:  # room was planned for; growing would take it twice for a moment
            soon = max(soon, self._dispatch.context)
        capacity = min(self._context.max_length, soon) + self._nodes + 1
        self.cache = GrowingCache.adopt(self._context.cache, num_cache_layers(self.model.config), capacity)

    def verify(self, tree: DraftTree) -> TargetOutput:
        """One forward pass over the root and all nodes of the tree."""
        if tree.num_nodes == 0:  # plain decoding: the model makes its own mask, as it would there
            return self._forward(tree, self._causal_mask(1))
        parts = tree.ancestors, tree.depths
        here, dispatch = self._tree_mask(*parts, self._device), self._dispatch
        if dispatch is None or dispatch.layers == 0:
            return self._forward(tree, here)
        there = self._tree_mask(*parts, dispatch.device)  # made there: a tree is small, a mask is not
        pairs = [(here[name], there[name]) for name in here] if isinstance(here, dict) else [(here, there)]
        return self._forward(tree, here, pairs)

    def _tree_mask(self, ancestors: Tensor, depths: Tensor, device: torch.device) -> Tensor | dict[str, Tensor]:
        """The mask of a tree on a device, from (1, R, R) and (1, R) of its rows."""
        held, rows = self.held, depths.shape[1]
        allowed = torch.ones(1, rows, held + rows, dtype=torch.bool, device=device)
        mask = self._prompt_mask(device)
        if mask is not None:
            allowed[:, :, : mask.shape[1]] = mask
        allowed[:, :, held:] = self._move(ancestors, device)
        if not self._branching.reads_slots:
            return self._branching(allowed)
        slots = held + self._move(depths, device)
        keys = torch.cat((torch.arange(held, device=device).unsqueeze(0), slots), dim=1)
        return self._branching(allowed, slots, keys)

    def _prompt_mask(self, device: torch.device) -> Tensor | None:
        """(1, n) bool; it goes to a device once."""
        masks = self._prompt_masks
        if masks and device not in masks:
            masks[device] = self._move(next(iter(masks.values())), device)
        return masks.get(device)

    def commit(self, path: tuple[int, ...]) -> None:
        """Keep a path of the verified tree, root first, and forget its other nodes."""
        self.cache.keep(self.held, path, self._move)
        self.held += len(path)

    def finish(self) -> Cache:
        """The cache in the form in which plain `generate` returns it."""
        self.cache.export(self._context.cache)
        return self._context.cache


class ChainTarget(Target):
    """Verifies chains on the model's own cache, which is cropped after each round."""

    def _adopt(self) -> None:
        self.cache, self._rows = self._context.cache, 0
        self._recorders = [layer for layer in self.cache.layers if getattr(layer, "record_past", None) is False]
        self.cache.activate_past_recording()

    def __exit__(self, *error: object) -> None:
        """Stop recording the past where it was not recorded before."""
        for layer in self._recorders:
            layer.record_past = False

    def prefill(self, forward: Callable[[Cache], Any]) -> TargetOutput:
        """Run the prompt; only then is it known whether the cache holds recurrent states, which cannot be cropped."""
        output = super().prefill(forward)
        if not self.cache.is_croppable:
            raise _not_croppable(self.cache, "use another target")
        self.cache.crop(0)
        return output

    def allowed(self, shape: TreeShape) -> TreeShape:
        """The chain within `shape`."""
        return super().allowed(shape.as_chain())

    def verify(self, tree: DraftTree) -> TargetOutput:
        """One forward pass over the root and the chain below it."""
        self._rows = tree.tokens.shape[1]
        return self._forward(tree, self._causal_mask(self._rows))

    def commit(self, path: tuple[int, ...]) -> None:
        """Keep the first `len(path)` rows of the verified chain."""
        self.cache.crop(len(path) - self._rows)
        self.held += len(path)

    def finish(self) -> Cache:
        """The cache in the form in which plain `generate` returns it."""
        return self.cache


def open_target(model: PreTrainedModel, context: Context, tap: FeatureTap, nodes: int) -> Target:
    """The verifier that suits the model and its cache.

    Raises:
        ValueError: if the model's cache can neither branch nor be cropped.
    """
    three_dimensional = context.position_ids is not None and context.position_ids.ndim > 2
    takes_masks = why_not_branching(model) is None and not three_dimensional
    if takes_masks and can_branch(context.cache) and branches_rightly(model):
        return TreeTarget(model, context, tap, nodes)
    if type(context.cache) is not DynamicCache or context.cache.offloading:
        raise _not_croppable(context.cache, f"leave out cache_implementation and {CACHE}")
    return ChainTarget(model, context, tap, nodes)


def _not_croppable(cache: Cache, advice: str) -> ValueError:
    return ValueError(
        f"Dovetail cannot verify drafts on this {type(cache).__name__}: its positions cannot be taken back; {advice}, "
        "or call generate without assistant_model"
    )


def _last_position(model: PreTrainedModel) -> int | None:
    """The last position that a path may reach, or None for no limit.

    Learned position embeddings end; a dynamic RoPE changes with each token beyond its original length, so that
    no forward pass may hold two such lengths.
    """
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    end = getattr(text, "max_position_embeddings", None)
    if end is not None and (not rope or rope.get("rope_type") == "dynamic"):
        return end - 1
    return None
