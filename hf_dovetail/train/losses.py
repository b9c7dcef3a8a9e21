"""The loss of a draft: the paper's two parts, unrolled as drafting unrolls. Pure functions of tensors and a draft.

Sources: arXiv 2412.18934, section 3.3 (SmoothL1 on features + 0.1 cross-entropy with the target's distribution);
HASS (arXiv 2408.15766: training on the draft's own features, top-k distillation) and EAGLE-3 (arXiv 2503.01840).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from ..modeling import DovetailAssistantModel
from ..recipe import Recipe


def draft_loss(
    draft: DovetailAssistantModel,
    ids: Tensor,
    features: Tensor,
    logits: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one batch whose every row counts, with noise drawn from `generator` (on the CPU).

    Shapes as in `unrolled_loss`.
    """
    return unrolled_loss(draft, ids, features, logits, recipe, draw_seeds(len(ids), generator))


def unrolled_loss(
    draft: DovetailAssistantModel,
    ids: Tensor,
    features: Tensor,
    logits: Tensor,
    recipe: Recipe,
    seeds: Sequence[int],
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of one batch, summed over the unrolled steps.

    Step 1 reads the target's features. Step j reads, at row t, what step j-1 predicted at row t-1, and sees
    the true rows up to t-j+1 and its own path of predictions behind them: just what a node at depth j-1 of a
    tree sees. EAGLE-3's hidden states imitate no feature: it learns from the distribution alone, over the tokens that
    it can propose (arXiv 2503.01840, section 3.1).

    Args:
        draft: the network, sharing the target's weights.
        ids: (B, T). features: (B, T, f). logits: (B, T, V), the target's.
        recipe: weights of the parts, size of the noise, number of steps.
        seeds: B numbers, of each window's noise.
        weights: (B, T-1) weights of the rows (see `row_weights`), as many in sum as there are batches to take the
            mean over; None: all alike.
    """
    following, wanted = ids[:, 1:], features[:, 1:].float()  # (B, T-1): token t+1 and feature t+1
    teacher = (logits if draft.target_ids is None else logits[..., draft.target_ids])[:, 1:].float()
    inputs = features[:, :-1].to(draft.dtype)
    if recipe.noise:
        inputs = inputs + draw_noise(seeds, inputs) * (2 * recipe.noise * 512 / recipe.window)
    inputs = draft.encode(inputs)
    rows = following.shape[1]
    slots = torch.arange(rows, device=ids.device).unsqueeze(0)
    cache, masks = DynamicCache(), draft.mask_builder()
    distances = distribution_distances(teacher, recipe.top_k)
    total = torch.zeros((), device=ids.device)
    for step in range(recipe.unroll):
        allowed, keys = _unrolled_mask(rows, step, ids.device)
        hidden = draft(following, inputs, slots, masks(allowed, slots, keys), cache).float()
        share = None if weights is None else weights[:, step:]
        feature_loss = 0.0
        if draft.predicts_features:
            feature_loss = feature_distance(hidden[:, step:], wanted[:, step:], share)
        distribution_loss = _weighted(distances(draft.logits(hidden[:, step:]), step), share)
        loss = recipe.feature_weight * feature_loss + recipe.distribution_weight * distribution_loss
        total = total + recipe.unroll_decay**step * loss
        inputs = torch.cat((inputs[:, :1], hidden[:, :-1].to(inputs.dtype)), dim=1)
    return total


def feature_distance(hidden: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    """SmoothL1 between (B, T, h) predicted and true features, each row's mean weighted by (B, T) or all alike."""
    if weights is None:
        return F.smooth_l1_loss(hidden, wanted)
    return _weighted(F.smooth_l1_loss(hidden, wanted, reduction="none").mean(dim=-1), weights)


def distribution_distances(teacher: Tensor, top_k: int) -> Callable[[Tensor, int], Tensor]:
    """A function (logits (B, T-s, V), s) -> (B, T-s) cross-entropies with the target's distribution from row s on.

    Args:
        teacher: (B, T, V) float32 logits of the target.
        top_k: compare on the target's so many likeliest tokens, with their probabilities made to sum to 1 (cheaper
            for large vocabularies); 0 compares on all.
    """
    if top_k and top_k < teacher.shape[-1]:
        likeliest, tokens = teacher.topk(top_k, dim=-1)
        probabilities = likeliest.softmax(dim=-1)

        def on_likeliest(logits: Tensor, step: int) -> Tensor:
            chosen = logits.gather(-1, tokens[:, step:])
            return logits.logsumexp(dim=-1) - (probabilities[:, step:] * chosen).sum(dim=-1)

        return on_likeliest
    distribution = teacher.softmax(dim=-1)

    def on_all(logits: Tensor, step: int) -> Tensor:
        return -(distribution[:, step:] * logits.log_softmax(dim=-1)).sum(dim=-1)

    return on_all


def row_weights(counted: Tensor) -> Tensor:
    """(B, T-1) float, 1 for the rows of (B, T) windows that count: row t asks for token t+2, so it counts if that does.

    Args:
        counted: (B, T) bool, the tokens that the draft shall learn to propose. What follows the window is unknown: its
            last row counts if the last token does.
    """
    return torch.cat((counted[:, 2:], counted[:, -1:]), dim=1).float()


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Seeds for the noise of `count` windows.

    Drawn even where the recipe gives noise no weight, so that runs with and without it read the same text.
    """
    return torch.randint(1 << 62, (count,), generator=generator).tolist()


def draw_noise(seeds: Sequence[int], inputs: Tensor) -> Tensor:
    """Uniform noise in -0.5..0.5 for (B, T, f) features, where they are, against errors of the draft's own features.

    Each window's is its seed's, so that it does not depend on which windows are computed together.
    """
    generator, noise = torch.Generator(inputs.device), torch.empty_like(inputs)
    for row, seed in zip(noise, seeds, strict=True):
        row.uniform_(-0.5, 0.5, generator=generator.manual_seed(seed))
    return noise


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).sum()


def _unrolled_mask(rows: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a row sees in unrolled step `step` (0-based): (1, T, T * (step + 1)) bool, and the keys' slots."""
    index = torch.arange(rows, device=device)
    behind = index[:, None] - index[None, :]
    blocks = [behind >= step] + [behind == step - block for block in range(1, step + 1)]
    return torch.cat(blocks, dim=1).unsqueeze(0), index.repeat(step + 1).unsqueeze(0)
