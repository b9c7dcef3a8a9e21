"""How a target runs: `prepare_target` chooses an engine and, under a memory budget, what lives on the accelerator.

Measures what `placement` plans with, and hands the plan to `dispatch`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .anatomy import Anatomy, anatomy_of, nbytes_of
from .config import TreeShape
from .devices import HOST, resolve_device
from .dispatch import Dispatch, dispatch_of
from .engines import check_engine, engine_of, start_engine, stop_engine, stream_prompts, why_not
from .experience import LARGEST
from .levels import tree_rows
from .modeling import DovetailAssistantModel
from .placement import DraftSizes, Limits, Plan, TargetSizes, plan, shown
from .rows import EXTENT, ROUND_ROWS
from .weights import check_fits

logger = logging.get_logger(__name__)

USUAL_CONTEXT = 2048
_CHUNK = 256  # rows of a prompt that a draft computes at a time (`steps`)
_TIMED = 7


def prepare_target(
    model: PreTrainedModel,
    engine: str = "auto",
    vram_budget: int | str | None = None,
    draft: DovetailAssistantModel | None = None,
    context: int | None = None,
) -> PreTrainedModel:
    """Choose how a target's layers run and where, in place, and return the target. `restore_target` undoes it.

    Args:
        model: the target, on the CPU; inside torch.compile's or PEFT's wrapper too.
        engine: for the layers on the CPU: "eager" (as they are), one of `engines.ENGINES`, or "auto" for the first that
            can take the model without changing what it computes.
        vram_budget: memory of the accelerator for the draft and as many target layers as fit, in bytes or as in
            "7GiB"; the plan is printed. None keeps the target on the CPU.
        draft: the draft that will work on the same device; None plans for the target alone.
        context: tokens of prompt and answer that caches are planned for; by default 2,048, or what the model takes.

    Raises:
        TypeError: if the draft is none.
        ValueError: if it is no model of transformers; if the engine is unknown or cannot take this model; or if there
            is no accelerator, the model cannot be placed on two devices, or the budget is no size or too small, saying
            what would fit.
        RuntimeError: if the model is prepared already, and its engine cannot give the weights back (`restore_target`).
    """
    given, model = model, _unwrapped(model)
    if draft is not None:
        check_draft(draft)
    check_engine(model, engine)
    budget = None if vram_budget is None else _bytes(vram_budget)
    if budget is None and dispatch_of(model) is None and engine == engine_of(model) != "eager":
        stream_prompts(model)
        return given
    restore_target(model)
    try:
        if budget is not None:
            _place(model, budget, draft, context)
        start_engine(model, engine)
        if dispatch_of(model) is not None or engine_of(model) != "eager":
            model._apply = _Apply(model)
    except BaseException:
        restore_target(model)
        raise
    return given


def restore_target(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `prepare_target`, and return the model with its original modules and weights, bit for bit.

    Raises:
        ValueError: if it is no model of transformers.
        RuntimeError: if the engine cannot give the weights back, saying why; the model then stays prepared. After any
            other failure, such as a lack of memory, call it again.
    """
    given, model = model, _unwrapped(model)
    stop_engine(model)
    dispatch = dispatch_of(model)
    if dispatch is not None:
        dispatch.undo(model)
    model.__dict__.pop("_apply", None)
    return given


@contextmanager
def prepared(model: PreTrainedModel) -> Iterator[None]:
    """A model of the CPU on the best engine that computes the same meanwhile, and as it was afterwards.

    What is prepared already stays as it is, and so does what no engine may touch (quantised, on an accelerator).
    """
    inner = _unwrapped(model)
    if engine_of(inner) != "eager" or dispatch_of(inner) is not None or why_not(inner) is not None:
        yield
        return
    prepare_target(inner)
    try:
        yield
    finally:
        restore_target(inner)


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model itself, inside torch.compile's or PEFT's wrapper: its parts are what an engine replaces."""
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            raise ValueError(f"the target is a {type(model).__name__}; expected a model of transformers")
    return inner


def check_draft(draft: object) -> None:
    """Refuse what is no draft.

    Raises:
        TypeError: saying what was given, and how a draft is made.
    """
    if not isinstance(draft, DovetailAssistantModel):
        shown_as = repr(draft) if isinstance(draft, str | PathLike) else f"a {type(draft).__name__}"
        raise TypeError(
            f"draft is {shown_as}; expected a DovetailAssistantModel, as DovetailAssistantModel.from_pretrained loads "
            "it from a folder and DovetailAssistantModel.from_causal_lm makes it of a small model"
        )


def plan_of(model: PreTrainedModel) -> Plan | None:
    """The plan by which the model's layers were placed, or None: what `prepare_target` printed, to be read by programs.

    With its `layers`, and its bytes to be held against those that the device's own statistics name.
    """
    return _plans.get(model) if dispatch_of(model) is not None else None


def _place(model: PreTrainedModel, budget: int, draft: DovetailAssistantModel | None, context: int | None) -> None:
    """Plan, print, apply."""
    device = _device_of(draft)
    if draft is not None:
        check_fits(draft.config, model)
    sharing = draft if draft is not None and _works_on(draft, device, model) else None
    anatomy = anatomy_of(model)
    free = available_bytes(device, sharing)
    if free is not None and free < budget:
        logger.warning("vram_budget is %s, but %s has %s free; planning for those", shown(budget), device, shown(free))
        budget = free
    limits = Limits(budget, _context(model, context), _nodes(draft), headroom_bytes(device, model.dtype))
    sizes = None if sharing is None else draft_sizes_of(sharing, model)
    made = plan(target_sizes_of(model, anatomy), sizes, limits)
    host_ms, device_ms = head_times_ms(anatomy.head, limits.nodes + 1, device)
    if device_ms >= host_ms:
        logger.warning(
            "%s takes %.2f ms for a tree's logits and the CPU %.2f, so all of the target stays on the CPU",
            *(device, device_ms, host_ms),
        )
        return
    print(made.table())
    Dispatch(model, anatomy, device, made.layers, limits.context)
    _plans[model] = made
    if sharing is not None:
        sharing.meet(model)


_plans: WeakKeyDictionary[PreTrainedModel, Plan] = WeakKeyDictionary()


def target_sizes_of(model: PreTrainedModel, anatomy: Anatomy) -> TargetSizes:
    """The target's sizes: weights as they are; the working space of a pass as transformers' gated layers take it."""
    text, size = model.config.get_text_config(decoder=True), model.dtype.itemsize
    hidden, heads = text.hidden_size, text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = (getattr(text, "head_dim", None) or hidden // heads) * heads
    eager = text._attn_implementation == "eager"
    embedding = model.get_input_embeddings().weight
    return TargetSizes(
        layers=tuple(nbytes_of([layer]) for layer in anatomy.layers),
        positions=anatomy.positions,
        tail=nbytes_of(anatomy.tail),
        head=nbytes_of([anatomy.head]),
        embedding=embedding.nbytes,
        tied=anatomy.head.weight is embedding,
        row=size * 3 * (hidden + _inner_size(text)),
        key=2 * size * width if groups != heads else 0,
        pair=heads * (4 + 2 * size) if eager else 0,
        tail_row=hidden * (2 * size + 8),
        logits_row=text.vocab_size * (size + 4),
    )


def draft_sizes_of(draft: DovetailAssistantModel, target: PreTrainedModel) -> DraftSizes:
    """The draft's sizes; its weights as they are."""
    config, fused, size = draft.config, draft.reads_features, draft.dtype.itemsize
    text = config if fused else draft.lm.config.get_text_config(decoder=True)
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    features = config.feature_size * target.dtype.itemsize if fused else 0
    shape = draft.tree if isinstance(draft.tree, TreeShape) else LARGEST
    tensors = {id(t): t for t in (*draft.parameters(), *draft.buffers())}.values()
    return DraftSizes(
        weights=nbytes_of([draft]),
        blocks=tuple(nbytes_of([block]) for block in draft.layers) if fused else (),
        eighth=sum(min(t.numel(), t.nbytes) if t.ndim > 1 else t.nbytes for t in tensors),
        position=2 * groups * width * size * text.num_hidden_layers,
        spare_rows=max(ROUND_ROWS, shape.nodes, tree_rows(shape)),
        extent=EXTENT if fused else 1,
        prompt_row=2 * features,
        working=_CHUNK * size * 3 * (text.hidden_size + _inner_size(text)) + 12 * shape.top_k * text.vocab_size,
        shares_embedding=fused and not config.own_embeddings,
    )


def _inner_size(text: PreTrainedConfig) -> int:
    """Width of the MLP's inside for one row; of a mixture, of all experts that a row passes."""
    dense = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None) or 0
    return max(dense, experts * (getattr(text, "moe_intermediate_size", None) or dense))


def available_bytes(device: torch.device, draft: DovetailAssistantModel | None) -> int | None:
    """What a plan may use of a device: what is free, and what the draft holds there; None if it does not say."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free = module.mem_get_info(device)[0] + module.memory_reserved(device) - module.memory_allocated(device)
    held = [] if draft is None else [*draft.parameters(), *draft.buffers(), *draft.shared_tensors()]
    return free + sum(t.nbytes for t in held if t.device == device)


_headroom: dict[torch.device, int] = {}


def headroom_bytes(device: torch.device, dtype: torch.dtype) -> int:
    """What libraries take for themselves on a device at their first use, measured once by using them."""
    module = torch.get_device_module(device)
    if device not in _headroom and hasattr(module, "mem_get_info"):

        def taken() -> int:
            torch.accelerator.synchronize(device)
            return module.memory_allocated(device) - module.memory_reserved(device) - module.mem_get_info(device)[0]

        ones = torch.ones(1, 8, 64, 64, dtype=dtype, device=device)
        before = taken()
        mixed = F.scaled_dot_product_attention(ones, ones, ones)
        F.linear(mixed[0, 0], ones[0, 0]).softmax(dim=-1).cpu()
        del mixed
        _headroom[device] = max(taken() - before, 0)
    return _headroom.get(device, 0)


def head_times_ms(head: nn.Module, rows: int, device: torch.device) -> tuple[float, float]:
    """Median ms of the logits of so many rows and their best tokens: on the CPU, and on the device and back."""
    weight, bias = head.weight.detach(), getattr(head, "bias", None)
    states = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=HOST)
    there = [None if t is None else t.detach().to(device) for t in (weight, bias)]

    def on(place: torch.device, parts: list[Tensor | None]) -> Callable[[], Tensor]:
        return lambda: F.linear(states.to(place), *parts).argmax(dim=-1).to(HOST)

    return _median_ms(on(HOST, [weight, bias])), _median_ms(on(device, there))


@torch.no_grad()
def _median_ms(compute: Callable[[], Any]) -> float:
    spent = []
    for _ in range(_TIMED):
        begin = time.perf_counter()
        compute()
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent[2:])


def _device_of(draft: DovetailAssistantModel | None) -> torch.device:
    """The accelerator that the draft works on, or the current one."""
    if torch.accelerator.current_accelerator(check_available=True) is None:
        raise ValueError("vram_budget needs an accelerator, and torch finds none on this machine; leave it out")
    device = resolve_device("auto" if draft is None else draft.draft_device)
    return device if device.type != "cpu" else resolve_device("auto")


def _works_on(draft: DovetailAssistantModel, device: torch.device, target: PreTrainedModel) -> bool:
    """Whether the draft takes room of its own there; a target that drafts for itself does not."""
    return resolve_device(draft.draft_device) == device and (draft.reads_features or draft.lm is not target)


def _bytes(budget: int | str) -> int:
    try:
        size = convert_file_size_to_int(budget) if isinstance(budget, int | str) else -1
    except (ValueError, OverflowError):  # of an infinite number
        size = -1
    if size <= 0 or isinstance(budget, bool):
        raise ValueError(f'vram_budget is {budget!r}; expected a number of bytes, or a size such as "7GiB" or "800MB"')
    return size


def _context(model: PreTrainedModel, context: int | None) -> int:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 24
    if context is None:
        return min(USUAL_CONTEXT, most)
    if not isinstance(context, int) or isinstance(context, bool) or not 1 <= context <= most:
        raise ValueError(f"context is {context!r}; expected a number of tokens, 1 to the model's {most}")
    return context


def _nodes(draft: DovetailAssistantModel | None) -> int:
    return draft.tree.nodes if draft is not None and isinstance(draft.tree, TreeShape) else LARGEST.nodes


class _Apply:
    """Stands in for `Module._apply` while a model is prepared: its weights stay where and what they are.

    It does not keep the model alive, and in a copy of the model it belongs to the copy, which is not prepared.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = ref(model)

    def __reduce__(self) -> tuple:
        return _Apply, (self._model(),)

    def __call__(self, change: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Apply a change.

        Raises:
            RuntimeError: if the weights would change their device or precision, before anything is changed.
        """
        model = self._model()
        changed = change(torch.empty(0, dtype=model.dtype, device="cpu"))
        dispatch, engine = dispatch_of(model), engine_of(model)
        prepared = dispatch is not None or engine != "eager"  # a copy is not
        if prepared and (changed.dtype, changed.device.type) != (model.dtype, "cpu"):
            where = "" if dispatch is None else f", with its last {dispatch.layers} layers on {dispatch.device},"
            raise RuntimeError(
                f"this model is prepared for the engine {engine}{where} and cannot become {changed.dtype} on "
                f"{changed.device}; call hf_dovetail.restore_target(model), move it, and prepare it again"
            )
        return model if dispatch is not None else type(model)._apply(model, change, *args, **kwargs)
