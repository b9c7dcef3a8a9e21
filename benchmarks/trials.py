"""The trials of `ablation.py`: recipes and geometries, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hf_dovetail.recipe import Recipe

WINDOW = 128
OURS = Recipe(
    batch=32,
    window=WINDOW,
    optimizer="muon",
    learning_rate=2e-2,
    warmup=10,
    feature_weight=1.0,
    distribution_weight=1.0,
    noise=0.0,
    unroll=3,
    precision="bf16",
)
ADAMW = replace(OURS, optimizer="adamw", learning_rate=2e-3)
PAPER = replace(ADAMW, learning_rate=3e-5, warmup=20, distribution_weight=0.1, noise=0.1, unroll=1)


@dataclass(frozen=True)
class Trial:
    """One draft: a recipe and a geometry.

    Args:
        recipe: how it is trained; its steps are set by the clock.
        blocks: decoder blocks.
        fusion: how features and tokens meet, "dgf" or "eagle".
        mlp: width of the blocks' MLP relative to the target's.
        sharpness: the target's logits are multiplied by it before the draft imitates them.
        own_share: share of windows that the target wrote itself.
        own_embedding: whether the draft trains a copy of the embeddings.
        vocabulary: tokens that the draft may propose, the most frequent ones; 0 is all. No part of training.
    """

    recipe: Recipe = OURS
    blocks: int = 2
    fusion: str = "dgf"
    mlp: float = 1.0
    sharpness: float = 1.0
    own_share: float = 1 / 3
    own_embedding: bool = False
    vocabulary: int = 0


def _with(**changes: Any) -> Trial:
    return Trial(replace(OURS, **changes))


_ONE = replace(OURS, unroll=1)
_LOSSES = replace(_ONE, distribution_weight=0.1, noise=0.1)
TRIALS = {
    "ours": Trial(),
    "adamw 2e-3": Trial(ADAMW),
    "adamw 2e-3, seed 1": Trial(replace(ADAMW, seed=1)),
    "adamw 4e-3": Trial(replace(ADAMW, learning_rate=4e-3)),
    "rate 2e-3": _with(learning_rate=2e-3),
    "rate 4e-3": _with(learning_rate=4e-3),
    "blocks 1": Trial(blocks=1),
    "paper": Trial(PAPER),
    "unroll 1": _with(unroll=1),
    "blocks 1, unroll 1": Trial(_ONE, blocks=1),
    "paper's losses, our rate and optimizer": Trial(_LOSSES),
    "distribution 0.1, unroll 1": Trial(replace(_ONE, distribution_weight=0.1)),
    "distribution 0.1": _with(distribution_weight=0.1),
    "paper's losses, our rate and optimizer, 1 block": Trial(_LOSSES, blocks=1),
    "paper's losses, our rate and optimizer, 3 blocks": Trial(_LOSSES, blocks=3),
    "paper's losses, distribution 0.03": Trial(replace(_LOSSES, distribution_weight=0.03)),
    "paper's losses, rate 4e-2": Trial(replace(_LOSSES, learning_rate=4e-2)),
    "paper's losses, rate 1e-2": Trial(replace(_LOSSES, learning_rate=1e-2)),
    "paper's losses, adamw 4e-3": Trial(replace(_LOSSES, optimizer="adamw", learning_rate=4e-3)),
    "unroll 2": _with(unroll=2),
    "blocks 3, unroll 1": Trial(_ONE, blocks=3),
    "unroll 1, feature weight 0.1": Trial(replace(_ONE, feature_weight=0.1)),
    "unroll 1, rate 4e-2": Trial(replace(_ONE, learning_rate=4e-2)),
    "unroll 1, batch 16": Trial(replace(_ONE, batch=16)),
    "blocks 4, unroll 1": Trial(_ONE, blocks=4),
    "blocks 5, unroll 1": Trial(_ONE, blocks=5),
    "blocks 6, unroll 1": Trial(_ONE, blocks=6),
    "blocks 3": Trial(blocks=3),
    "rate 4e-2": _with(learning_rate=4e-2),
    "feature weight 0.1": _with(feature_weight=0.1),
    "adamw 8e-3": Trial(replace(ADAMW, learning_rate=8e-3)),
    "batch 16": _with(batch=16),
    "blocks 5": Trial(blocks=5),
    "unroll 5": _with(unroll=5),
    "top-k 16": _with(top_k=16),
    "seed 1": _with(seed=1),
    "blocks 4": Trial(blocks=4),
    "blocks 6": Trial(blocks=6),
    "own text only": Trial(own_share=1.0),
    "read text only": Trial(own_share=0.0),
    "sharpness 1.7": Trial(sharpness=1.7),
    "feature weight 10": _with(feature_weight=10.0),
    "feature weight 0": _with(feature_weight=0.0),
    "paper, 1 block": Trial(PAPER, blocks=1),
    "paper, 3 blocks": Trial(PAPER, blocks=3),
    "paper, 4 blocks": Trial(PAPER, blocks=4),
    "paper, 5 blocks": Trial(PAPER, blocks=5),
    "paper, 6 blocks": Trial(PAPER, blocks=6),
    "MLP twice as wide": Trial(mlp=2.0),
    "MLP half as wide": Trial(mlp=0.5),
    "noise 0.1": _with(noise=0.1),
    "plateau": _with(schedule="plateau"),
    "cosine": _with(schedule="cosine"),
    "decay 1": _with(unroll_decay=1.0),
    "decay 0.5": _with(unroll_decay=0.5),
    "own embedding": Trial(own_embedding=True),
    "vocabulary 2048": Trial(vocabulary=2048),
    "batch 64": _with(batch=64),
    "EAGLE fusion": Trial(fusion="eagle"),
    "paper's losses, EAGLE fusion": Trial(_LOSSES, fusion="eagle"),
    "paper's losses, 1 block, EAGLE fusion": Trial(_LOSSES, blocks=1, fusion="eagle"),
    "paper, EAGLE fusion": Trial(PAPER, fusion="eagle"),
    "paper's losses, cosine": Trial(replace(_LOSSES, schedule="cosine")),
    "paper's losses, plateau": Trial(replace(_LOSSES, schedule="plateau")),
    "paper's losses, MLP twice as wide": Trial(_LOSSES, mlp=2.0),
    "paper's losses, MLP half as wide": Trial(_LOSSES, mlp=0.5),
    "paper's losses, own embedding": Trial(_LOSSES, own_embedding=True),
    "paper's losses, vocabulary 2048": Trial(_LOSSES, vocabulary=2048),
    "paper's losses, seed 1": Trial(replace(_LOSSES, seed=1)),
    "paper's losses, our rate and optimizer, 4 blocks": Trial(_LOSSES, blocks=4),
    "paper's losses, our rate and optimizer, 5 blocks": Trial(_LOSSES, blocks=5),
    "paper's losses, our rate and optimizer, 6 blocks": Trial(_LOSSES, blocks=6),
    "paper's losses, 3 blocks, EAGLE fusion": Trial(_LOSSES, blocks=3, fusion="eagle"),
    "paper's losses, 4 blocks, EAGLE fusion": Trial(_LOSSES, blocks=4, fusion="eagle"),
    "paper's losses, 5 blocks, EAGLE fusion": Trial(_LOSSES, blocks=5, fusion="eagle"),
    "paper's losses, 6 blocks, EAGLE fusion": Trial(_LOSSES, blocks=6, fusion="eagle"),
}
