"""The random numbers of the target's next choices, known ahead, so that a draft can choose as the target will.

`torch.multinomial` takes the token that maximises p / q, with q exponential noise from the generator. So a sampled
token is the greedy choice among perturbed logits, log p - log q, and whoever knows q and guesses p guesses the token.
Drafts that use the same noise are accepted far more often; the answer is the target's own either way
(M. Daliri, C. Musco, A. T. Suresh: "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Warper = Callable[[None, Tensor], Tensor]
"""Changes (T, V) logits as the target's own are changed before it draws."""


@dataclass(frozen=True)
class Choice:
    """How a target that samples chooses in a round.

    Args:
        log_noise: by level, (V,) log q of the next tokens' draws, on the draft's device.
        warpers: temperature, top-k, top-p and the like, in their order.
        sharpness: what perturbed logits are multiplied by before nodes are compared.
    """

    log_noise: Tensor | SharedDraws
    warpers: Sequence[Warper]
    sharpness: float

    @property
    def kind(self) -> tuple:
        """What the choice depends on beside the noise, if that is a tensor (levels, V); hashable."""
        parts = ((type(warper).__name__, *sorted(map(str, vars(warper).items()))) for warper in self.warpers)
        return self.log_noise.shape, *parts, self.sharpness

    def perturbed(self, logits: Tensor, level: int, target_ids: Tensor | None = None) -> Tensor:
        """The logits of a level's next tokens, as the target will choose among them.

        Args:
            logits: (T, V) float32. level: 0 for the token after the root.
            target_ids: (V,) int64, the target's ids of the columns; None: their places, maybe not up to the last.
        """
        for warper in self.warpers:
            logits = warper(None, logits)
        noise = self.log_noise[level]
        noise = noise[: logits.shape[-1]] if target_ids is None else noise[target_ids]
        return (logits - noise) * self.sharpness


class SharedDraws:
    """What `torch.multinomial` will draw for the next tokens, from the default generator of the CPU.

    Args:
        size: entries of the target's vocabulary.
        warpers, sharpness: see `Choice`.
    """

    def __init__(self, size: int, warpers: Sequence[Warper], sharpness: float) -> None:
        self._size, self.warpers, self.sharpness = size, warpers, sharpness
        self._generator = torch.Generator(device="cpu")
        self._ahead: deque[tuple[Tensor, Tensor]] = deque()  # the generator's state before a draw, and log q (V,)

    def catch_up(self) -> None:
        """Forget what was drawn since the last round; all of it, if others drew in between."""
        state = torch.get_rng_state()
        while self._ahead and not torch.equal(self._ahead[0][0], state):
            self._ahead.popleft()
        if not self._ahead:
            self._generator.set_state(state)

    def __getitem__(self, index: int) -> Tensor:
        """(V,) float16 log q of the `index`-th draw from now; made when it is asked for."""
        while len(self._ahead) <= index:
            state = self._generator.get_state()
            noise = torch.empty(1, self._size, dtype=torch.float32, device="cpu")
            noise.exponential_(1, generator=self._generator)
            self._ahead.append((state, noise[0].log_().half()))
        return self._ahead[index][1]
