"""What the parts of a round cost: verification by rows, a draft's tree, and the bytes that one token reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..anatomy import CACHE, try_pass
from ..calibrate import timed_tree
from ..config import TreeShape
from ..draft import DraftSession
from ..modeling import DovetailAssistantModel
from ..target import Context, FeatureTap, Target, open_target
from ..threads import target_threads
from ..weights import feature_layers
from .machine import median_ms

_ACCEPTED = 4
ROWS = (1, 2, 4, 8, 16, 17, 24, 32)
"""Rows of a verification: the root and the nodes; 17 is the paper's shape."""


@torch.no_grad()
def verify_ms(model: PreTrainedModel, text: Tensor, repeats: int) -> dict[int, float]:
    """Median wall time of the whole target's forward pass over 1 to 32 rows, behind the cached (1, n) `text`.

    With the threads that a round verifies with. The numbers of rows take turns, so that drift of the machine hits all
    alike.
    """
    samples: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with target_threads(), _prefilled(model, text, max(ROWS))[0] as target:
        for repeat in range(repeats + 1):
            for rows in ROWS:
                tree = timed_tree(rows, model.config.get_text_config(decoder=True).vocab_size)
                begin = time.perf_counter()
                target.verify(tree)
                if repeat:  # the first turn warms up
                    samples[rows].append(1e3 * (time.perf_counter() - begin))
                target.commit(())
    return {rows: statistics.median(times) for rows, times in samples.items()}


@torch.no_grad()
def draft_ms(
    draft: DovetailAssistantModel, model: PreTrainedModel, shape: TreeShape, text: Tensor, repeats: int
) -> float:
    """Median wall time of a draft's round: take 4 more tokens of (1, n) `text`, grow a tree, bring it to the host.

    With the threads that a round drafts with, as in `verify_ms`.
    """
    device = draft.meet(model)
    session = DraftSession(draft, text.shape[1] + shape.nodes)
    layers = feature_layers(draft.config, model.config) if draft.reads_features else (-1,)
    target, features = _prefilled(model, text, 1, layers)
    start = text.shape[1] - 1 - _ACCEPTED * (repeats + 1)
    if start < 1:
        raise ValueError(f"{repeats} repeats need a text of more than {text.shape[1]} tokens")
    sizes = (start, *[_ACCEPTED] * (repeats + 1))
    tokens = iter(text[:, 1:].to(device).split(sizes, dim=1))
    given = iter(features[:, :-1].to(device).split(sizes, dim=1))

    def grow() -> Tensor:
        session.commit(next(tokens), next(given) if draft.reads_features else None)
        return session.grow(shape).cpu()

    with target_threads(), target:
        session.begin(text[:, :1].to(device), 0)
        grow()
        return median_ms(grow, repeats)


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer by its name, the LM head included; ask before an engine is chosen."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    return {name: tuple((m.weight.T if isinstance(m, Conv1D) else m.weight).shape) for name, m in layers.items()}


@torch.no_grad()
def read_bytes(model: PreTrainedModel, shapes: dict[str, tuple[int, int]], context: int) -> int:
    """Bytes that one token's forward pass must read: every matrix as its engine stores it, and the keys and values.

    Args:
        model: the prepared target.
        shapes: of `weight_shapes`, taken before it was prepared.
        context: positions in the cache.
    """
    modules = dict(model.named_modules())
    matrices = sum(_stored_bytes(modules.get(name), shape, model.dtype) for name, shape in shapes.items())
    return matrices + _position_bytes(model) * context


def _position_bytes(model: PreTrainedModel) -> int:
    """Bytes of one position's keys and values in all layers, as a short pass leaves them in the cache."""
    layers = try_pass(model).layers
    states = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(s.nbytes // s.shape[-2] for s in states if isinstance(s, Tensor))


def _stored_bytes(module: nn.Module | None, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of one matrix: of quantised weights what their kernel keeps, else its precision's."""
    kernel = getattr(getattr(module, "weight", None), "kernel", None)
    outputs, inputs = shape
    if kernel is None or kernel.lossless:
        return outputs * inputs * dtype.itemsize
    return kernel.stored_bytes


def _prefilled(
    model: PreTrainedModel, text: Tensor, nodes: int, layers: Sequence[int] = (-1,)
) -> tuple[Target, Tensor]:
    """A verifier that has read (1, n) `text`, and its features (1, n, f) of these layers (see `FeatureTap`)."""
    length = text.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    given = Context(DynamicCache(config=model.config), None, positions, length, length + nodes)
    target = open_target(model, given, FeatureTap(model, True, layers), nodes)
    output = target.prefill(lambda cache: model(input_ids=text, logits_to_keep=1, **{CACHE: cache}))
    return target, output.features
