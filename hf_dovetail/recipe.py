"""How a draft is trained, as numbers. Light enough for the command line to import before it knows what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How a draft is trained.

    Args:
        steps: optimizer steps.
        batch: windows per step.
        window: tokens per window.
        learning_rate: peak of AdamW, after a linear warm-up and before a linear decay to zero.
        warmup: steps of warm-up.
        betas: of AdamW.
        clip: largest norm of the gradient.
        feature_weight: of SmoothL1 between the predicted and the target's feature.
        distribution_weight: of the cross-entropy with the target's distribution.
        noise: features get uniform noise of +-`noise` * 512 / `window`.
        unroll: steps on the draft's own features; 1 is the paper's.
        unroll_decay: weight of each further step relative to the one before.
        precision: "no" (float32) or "bf16" (autocast).
        seed: of data order and noise.
        save_every: steps between checkpoints.

    Raises:
        ValueError: if a number is out of range.
    """

    steps: int = 1000
    batch: int = 16
    window: int = 256
    learning_rate: float = 1e-3
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 0.5
    feature_weight: float = 1.0
    distribution_weight: float = 0.1
    noise: float = 0.1
    unroll: int = 1
    unroll_decay: float = 0.8
    precision: str = "no"
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "window": 8, "unroll": 1, "save_every": 1}
        least |= dict.fromkeys(("learning_rate", "warmup", "feature_weight", "distribution_weight", "noise"), 0)
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise ValueError(f"Recipe.{name} is {getattr(self, name)}; expected at least {value}")
        if not self.clip > 0:
            raise ValueError(f"Recipe.clip is {self.clip}; expected more than 0")
        if self.unroll > self.window // 2:
            raise ValueError(
                f"Recipe.unroll is {self.unroll}; a window of {self.window} tokens has room for {self.window // 2}"
            )
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"Recipe.precision is {self.precision!r}; expected no or bf16")

    def rate(self, step: int) -> float:
        """Learning rate of a step that starts after `step` finished ones."""
        warm = min((step + 1) / max(self.warmup, 1), 1.0)
        return self.learning_rate * warm * (1.0 - step / self.steps)


def option_help() -> dict[str, str]:
    """What each number means: the lines of `Recipe`'s own docstring."""
    return dict(re.findall(r"^ {8}(\w+): (.+)$", Recipe.__doc__ or "", flags=re.MULTILINE))
