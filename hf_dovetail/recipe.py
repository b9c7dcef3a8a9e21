"""How a draft is trained, as numbers. Light enough for the command line to import before it knows what to do."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

CHOICES = {
    "precision": ("no", "bf16"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("linear", "cosine", "plateau"),
}
"""What the recipe's words may be."""


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Args:
        steps: optimizer steps.
        batch: windows per step.
        window: tokens per window.
        accumulate: parts that a step's windows are computed in, each on every process; less memory, the same step.
        optimizer: "adamw", or "muon" (matrices by Muon, all else by AdamW; torch 2.9 or newer).
        learning_rate: peak, after a linear warm-up and before the decay to zero.
        warmup: steps of warm-up.
        schedule: how the rate falls: "linear", "cosine", or "plateau" (linear over the last half).
        betas: of AdamW.
        clip: largest norm of the gradient.
        feature_weight: of SmoothL1 between the predicted and the target's feature.
        distribution_weight: of the cross-entropy with the target's distribution.
        top_k: the cross-entropy is over the target's so many likeliest tokens; 0 is all of them.
        noise: features get uniform noise of +-`noise` * 512 / `window`.
        unroll: steps on the draft's own features; 1 is the paper's.
        unroll_decay: weight of each further step relative to the one before.
        precision: "no" (float32) or "bf16" (autocast).
        seed: of data order and noise.
        save_every: steps between checkpoints.
        validate_every: steps between validations by real decoding; 0 is none.
        patience: validations without a better one after which training stops; 0 is never.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 1000
    batch: int = 16
    window: int = 256
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 50
    schedule: str = "linear"
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.5
    feature_weight: float = 1.0
    distribution_weight: float = 0.1
    top_k: int = 0
    noise: float = 0.1
    unroll: int = 1
    unroll_decay: float = 0.8
    precision: str = "no"
    seed: int = 0
    save_every: int = 200
    validate_every: int = 0
    patience: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "window": 8, "accumulate": 1, "unroll": 1, "save_every": 1}
        least |= dict.fromkeys(("learning_rate", "warmup", "feature_weight", "distribution_weight"), 0)
        least |= dict.fromkeys(("noise", "top_k", "validate_every", "patience"), 0)
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)}; expected at least {value}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.patience and not self.validate_every:
            raise ValueError(f"Recipe.patience is {self.patience}, but nothing is validated; set validate_every")
        if not self.clip > 0:
            raise ValueError(f"Recipe.clip is {self.clip}; expected more than 0")
        if self.unroll > self.window // 2:
            raise ValueError(
                f"Recipe.unroll is {self.unroll}; a window of {self.window} tokens has room for {self.window // 2}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of a step that starts after `step` finished ones."""
        warm, progress = min((step + 1) / max(self.warmup, 1), 1.0), step / self.steps
        fall = {
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "plateau": min(1.0, 2.0 * (1.0 - progress)),
        }
        return self.learning_rate * warm * fall[self.schedule]


PAPER = Recipe(
    steps=20_000,
    batch=16,
    window=2048,
    learning_rate=3e-5,
    warmup=2000,
    feature_weight=1.0,
    distribution_weight=0.1,
    noise=0.1,
    unroll=1,
    precision="bf16",
)
"""arXiv 2412.18934's recipe, with window and clip of EAGLE's code; the paper names no number of steps."""

_OURS = Recipe(feature_weight=1.0, distribution_weight=0.1, noise=0.1, unroll=1, precision="bf16")
MEASURED_WIDTH, _MUON_RATE, _ADAMW_RATE = 192, 2e-2, 4e-3


def default_recipe(hidden_size: int, muon: bool) -> Recipe:
    """What gave most tokens per round at equal training time on the demo target (docs/training.md).

    The rates were measured at a width of 192 and are carried over by theory: the size of Muon's update, as a matrix
    norm, grows with the root of the width, that of AdamW's with the width.

    Args:
        hidden_size: of the target.
        muon: whether torch has Muon and weights stay whole; else AdamW.
    """
    share = MEASURED_WIDTH / hidden_size
    if muon:
        return replace(_OURS, optimizer="muon", learning_rate=_MUON_RATE * math.sqrt(share))
    return replace(_OURS, learning_rate=_ADAMW_RATE * share)


def option_help() -> dict[str, str]:
    """What each number means: the lines of `Recipe`'s own docstring."""
    return dict(re.findall(r"^ {8}(\w+): (.+)$", Recipe.__doc__ or "", flags=re.MULTILINE))
