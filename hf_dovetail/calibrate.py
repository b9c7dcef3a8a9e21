"""Measures the cost curves of a target and its draft on this machine, with the very passes that rounds make.

The caches are filled by repeating what a short prompt left in them, since only their length counts. Nothing of it
stays: no cache, no hook, no change of the random generator or of the models' mode.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging

from .accept import walk
from .acceptance import Acceptance
from .anatomy import CACHE
from .config import TreeShape
from .curves import MAX_ROWS, ROW_POINTS, CostCurves
from .dispatch import dispatch_of
from .draft import DraftSession
from .experience import LARGEST
from .learned import keep
from .modeling import DovetailAssistantModel
from .prepare import check_draft
from .sharing import SharedCores
from .target import Context, FeatureTap, Target, TreeTarget, open_target
from .threads import target_threads
from .tree import DraftTree
from .weights import feature_layers

logger = logging.get_logger(__name__)

_CONTEXTS = (512, 2048)  # beside the prompt's; as far as the model reaches
_PROMPT = 64  # tokens really computed
_CAUGHT_UP = 4  # tokens that the draft catches up with in a usual round
_LEVELS = 5  # of the tree that times a level
_MOST_REPEATS = 9
_DRAFT_SHARE = 0.25  # of the budget
_UNSTEADY = 0.2  # usual distance of a timing from the median, as a share, that other programs must be the cause of


@torch.no_grad()
def calibrate(
    target: PreTrainedModel, draft: DovetailAssistantModel, progress: bool = True, budget_s: float = 8.0
) -> CostCurves:
    """Measure what verifying and drafting cost, and keep the curves for `draft.tree = "auto"`.

    They go to the user's cache, where later processes find them.

    Args:
        target: the target, prepared as it will run.
        draft: its draft.
        progress: whether to show a progress bar.
        budget_s: about how long it may take; every size is timed at least once after a warm-up.

    Raises:
        TypeError: if the draft is none.
        ValueError: if the draft does not fit the target, or the target's cache can neither branch nor be cropped.
    """
    check_draft(draft)
    draft.meet(target)
    on_host = dispatch_of(target) is None and target.device.type == "cpu"
    with (
        tqdm(total=100, desc="calibrate", unit="%", disable=not progress, leave=False) as bar,
        target_threads() as threads,
        SharedCores(threads, on_host) as cores,
    ):
        verifier, features = _prefilled(target, draft)
        with verifier:
            timings = _verifications(verifier, cores, (1 - _DRAFT_SHARE) * budget_s, _advance(bar, 1 - _DRAFT_SHARE))
            overhead_ms, tree_ms = _rest(verifier)
        drafting = _drafting(draft, features, _DRAFT_SHARE * budget_s, _advance(bar, _DRAFT_SHARE))
    contexts = tuple(timings)
    lines = tuple(tuple(line) for line in timings.values())
    curves = CostCurves(ROW_POINTS, contexts, lines, *drafting, overhead_ms, tree_ms)
    keep(draft, target, curves)
    return curves


def _advance(bar: tqdm, share: float) -> Callable[[float], None]:
    """Moves the bar by a part (0 to 1) of this share of the whole."""
    return lambda part: bar.update(100 * share * part)


def _ids(model: PreTrainedModel, count: int) -> Tensor:
    """(1, count) token ids that do not depend on any random generator."""
    size = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(count, device="cpu") * 7919 % size).unsqueeze(0)


def _prefilled(target: PreTrainedModel, draft: DovetailAssistantModel) -> tuple[Target, Tensor | None]:
    """A verifier behind a short prompt, and the prompt's features if the draft reads them."""
    ids = _ids(target, _prompt_length(target)).to(target.device)
    positions = torch.arange(ids.shape[1], device=target.device).unsqueeze(0)
    cache = DynamicCache(config=target.config)
    context = Context(cache, None, positions, ids.shape[1], ids.shape[1] + MAX_ROWS)
    tap = FeatureTap(target, draft.reads_features, feature_layers(draft.config, target.config))
    verifier = open_target(target, context, tap, LARGEST.nodes)
    try:
        output = verifier.prefill(lambda past: target(input_ids=ids, use_cache=True, **{CACHE: past}))
    except BaseException:
        verifier.__exit__()
        raise
    return verifier, output.features


def _positions(model: PreTrainedModel) -> int:
    """Positions that the model can take, also where it would change its RoPE beyond fewer."""
    text = model.config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings"))
    return min((limit for limit in limits if limit), default=1 << 24)


def _prompt_length(target: PreTrainedModel) -> int:
    return max(min(_PROMPT, _positions(target) - MAX_ROWS - 1), 1)


def _verifications(
    verifier: Target, cores: SharedCores, budget_s: float, advance: Callable[[float], None]
) -> dict[int, list[float]]:
    """Median ms per context, one for each of `ROW_POINTS`; contexts and sizes take turns within one context."""
    begin = verifier.held
    contexts = [begin]
    if isinstance(verifier, TreeTarget):
        longest = _positions(verifier.model) - MAX_ROWS
        reached = {min(context, longest) for context in _CONTEXTS}
        contexts += sorted(context for context in reached if context >= 2 * begin)

    def timed() -> list[float]:
        return [_verify_ms(verifier, rows, cores) for rows in ROW_POINTS]

    timed()  # what libraries set up at first use is no cost of a round
    again = timed()
    once = sum(again) / 1e3
    repeats = int(budget_s / (len(contexts) * 1.3 * once))
    while repeats < 2 and len(contexts) > 2:  # rather fewer contexts than single shots
        contexts.pop(1)
        repeats = int(budget_s / (len(contexts) * 1.3 * once))
    repeats = min(max(repeats, 1), _MOST_REPEATS)
    timings, spread = {}, 0.0
    for context in contexts:
        _fill(verifier, context)
        if context != begin:
            _verify_ms(verifier, MAX_ROWS, cores)  # grows the buffers
        lines = [again] if context == begin else []
        for _ in range(repeats):
            lines.append(timed())
            advance(1 / (repeats * len(contexts)))
        timings[context] = [statistics.median(column) for column in zip(*lines, strict=True)]
        spread = max(spread, _spread(lines))
    if spread > _UNSTEADY:
        logger.warning(
            "repeated verifications differ by %.0f %% from each other: other programs keep this machine busy, and the "
            "curves say little; calibrate again when it is quiet. Until then, rounds correct them",
            100 * spread,
        )
    return timings


def _spread(lines: list[list[float]]) -> float:
    """How far repeated timings lie from their median, as a share of it: the median over sizes and repeats."""
    columns = [(statistics.median(column), column) for column in zip(*lines, strict=True)]
    return statistics.median(abs(ms - middle) / middle for middle, column in columns for ms in column)


def _fill(verifier: Target, context: int) -> None:
    """Lengthen the target's cache to `context` positions by repeating what it holds."""
    missing = context - verifier.held
    if missing <= 0:
        return
    for layer in verifier.cache.layers:
        states = [s.repeat(1, 1, -(-missing // s.shape[-2]), 1)[:, :, :missing] for s in (layer.keys, layer.values)]
        layer.update(*states)
    verifier.held = context


def timed_tree(rows: int, vocab_size: int) -> DraftTree:
    """A tree of so many rows, root included: two children at each node, as wide as real ones."""
    tokens = (torch.arange(rows, device="cpu") * 31 % vocab_size).unsqueeze(0)
    parents = ((torch.arange(rows, device="cpu") - 1) // 2).unsqueeze(0)
    return DraftTree(tokens, parents.clamp(min=-1), -torch.arange(rows, dtype=torch.float32, device="cpu")[None])


def _chain(rows: int, vocab_size: int) -> DraftTree:
    tokens = (torch.arange(rows, device="cpu") * 31 % vocab_size).unsqueeze(0)
    parents = torch.arange(-1, rows - 1, device="cpu").unsqueeze(0)
    return DraftTree(tokens, parents, -torch.arange(rows, dtype=torch.float32, device="cpu")[None])


def _made(verifier: Target, rows: int) -> DraftTree:
    size = verifier.model.config.get_text_config(decoder=True).vocab_size
    return timed_tree(rows, size) if isinstance(verifier, TreeTarget) else _chain(rows, size)


def _verify_ms(verifier: Target, rows: int, cores: SharedCores) -> float:
    """Time one verification, and take it back."""
    tree = _made(verifier, rows)
    begin = time.perf_counter()
    with cores.observed():
        verifier.verify(tree)
    spent = 1e3 * (time.perf_counter() - begin)
    verifier.commit(())
    return spent


def _rest(verifier: Target) -> tuple[float, float]:
    """Median ms of a plain round outside the models, and what a tree adds to that; greedy, nothing accepted."""
    rounds: list[list[float]] = [[], []]
    for _ in range(5):
        for times, rows in zip(rounds, (1, 16), strict=True):
            tree = _made(verifier, rows)
            output = verifier.verify(tree)
            begin = time.perf_counter()
            walk(tree.trimmed(rows - 1), output.logits, lambda logits: (int(logits.float().argmax()), True))
            verifier.commit(())
            times.append(1e3 * (time.perf_counter() - begin))
    plain, tree = (statistics.median(times) for times in rounds)
    return plain, max(tree - plain, 0.0)


def _drafting(
    draft: DovetailAssistantModel, features: Tensor | None, budget_s: float, advance: Callable[[float], None]
) -> tuple[float, float, float]:
    """Median ms of the first level behind a usual round, of each token to catch up with, and of a further level."""
    session = DraftSession(draft)
    tokens = _ids(draft, _PROMPT + 1).to(draft.device)
    session.begin(tokens[:, :1], 0)
    if features is not None:
        features = features.to(draft.device, draft.dtype)
    shifts = Acceptance(LARGEST.levels, LARGEST.top_k).shifts
    room = draft.config.max_position_embeddings - session.length - LARGEST.levels
    count = max(min(tokens.shape[1] - 1, room - 4 * _CAUGHT_UP, features.shape[1] if features is not None else room), 1)

    def grow(new: int, levels: int) -> float:
        session.commit(tokens[:, :new], None if features is None else features[:, :new])
        begin = time.perf_counter()
        session.grow(TreeShape(LARGEST.nodes, levels - 1, LARGEST.top_k), shifts=shifts).cpu()
        return 1e3 * (time.perf_counter() - begin)

    caught_up = min(_CAUGHT_UP, count)
    grow(count, 1)
    pair_s = (grow(caught_up, 1) + grow(caught_up, _LEVELS)) / 1e3
    left = (room - count - 2 * caught_up) // (2 * caught_up)  # pairs of trees that the draft's positions allow
    repeats = max(min(int(budget_s / max(pair_s, 1e-6)), _MOST_REPEATS, left), 1)
    first, deep = [], []
    for _ in range(repeats):
        first.append(grow(caught_up, 1))
        deep.append(grow(caught_up, _LEVELS))
        advance(1 / repeats)
    first_ms, deep_ms = statistics.median(first), statistics.median(deep)
    level_ms = max(deep_ms - first_ms, 0.0) / (_LEVELS - 1)
    return first_ms, max(_prompt_ms(draft, tokens, features, count) - first_ms, 0.0) / count, level_ms


def _prompt_ms(draft: DovetailAssistantModel, tokens: Tensor, features: Tensor | None, count: int) -> float:
    """Time the first level behind a whole prompt, in a new session; the second of two."""
    spent: Any = 0.0
    for _ in range(2):
        session = DraftSession(draft)
        session.begin(tokens[:, :1], 0)
        session.commit(tokens[:, :count], None if features is None else features[:, :count])
        begin = time.perf_counter()
        session.grow(TreeShape(LARGEST.nodes, 0, LARGEST.top_k)).cpu()
        spent = 1e3 * (time.perf_counter() - begin)
    return spent
