"""A drafting session: what is certain goes in, a tree comes out, on the draft's device.

Knows the draft network, not the target. Rows of the network pair a feature with the token that follows it;
row i stands for position i of the answer. A tree is grown behind the committed rows and forgotten again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import TreeShape
from .devices import to_device
from .draws import Choice, SharedDraws
from .graphs import DeviceRounds
from .host import for_host
from .levels import KeepGoing, expand_on_device, expand_on_host
from .network import DraftNetwork
from .steps import BlockSteps, LanguageModelSteps
from .tree import rerank, rerank_on_host


class DraftSession:
    """Drafts for one answer: `begin`, then `commit` and `grow` in turns.

    Args:
        draft: the network, placed and sharing its target's weights.
        capacity: positions to reserve in the cache; a hint.
        on_host: whether the host may look at what is found after every level: by default on the CPU only, since
            elsewhere it would stop the host once a level.
        sharpness: what the draft's logits are multiplied by (its inverse temperature), before nodes are compared.
        draws: of a target that samples, if they can be known; they replace the sharpness.

    Attributes:
        noise_bytes: of the draws' noise that went to the draft's device so far.
    """

    def __init__(
        self,
        draft: DraftNetwork,
        capacity: int = 0,
        on_host: bool | None = None,
        sharpness: float = 1.0,
        draws: SharedDraws | None = None,
    ) -> None:
        self._draft, self._device, self._dtype = draft, draft.device, draft.dtype
        self._last_token = draft.config.vocab_size - 1
        self._on_host = self._device.type == "cpu" if on_host is None else on_host
        self._draws, self.noise_bytes = draws, 0
        sharpness = sharpness if draws is None else 1.0
        network, self._rounds = draft.network, None
        if network is None:
            self._steps = LanguageModelSteps(draft, capacity, sharpness)
        elif self._on_host:
            self._steps = BlockSteps(for_host(network), network.new_rows(capacity), sharpness)
        else:
            self._rounds = DeviceRounds(network, draft.pool, capacity, sharpness)
            self._steps = self._rounds.steps
        self._tokens = torch.empty(1, 0, dtype=torch.long, device=self._device)
        self._features: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions known to the session, from the start of the answer's sequence."""
        return self._steps.start + self._steps.held + self._tokens.shape[1]

    def begin(self, first: Tensor, start: int) -> None:
        """Open the session with the first token (1, 1) that the target has read, at position `start`."""
        self._steps.start = start
        if not self._draft.reads_features:
            self._tokens = self._known(first)

    def commit(self, tokens: Tensor, features: Tensor | None) -> None:
        """Add what is certain now; it is computed by the next `grow`.

        Args:
            tokens: (1, T) the tokens that follow the positions of `features`; the last one is the next root.
            features: (1, T, f) the target's features, on the draft's device; None for a draft that reads none.
        """
        tokens = self._known(tokens)
        self._tokens = tokens if self._tokens.shape[1] == 0 else torch.cat((self._tokens, tokens), dim=1)
        if features is not None:
            features = features.to(self._dtype)
            self._features = features if self._features is None else torch.cat((self._features, features), dim=1)

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens of the target as the draft may read them: its last in place of one that only the target has."""
        return tokens.clamp(max=self._last_token)

    def grow(self, shape: TreeShape, keep_going: KeepGoing | None = None, shifts: np.ndarray | None = None) -> Tensor:
        """Propose the best tree of this shape (EAGLE-2's expansion and re-ranking).

        Args:
            shape: nodes, depth and width.
            keep_going: asked on the CPU after each level (`levels.KeepGoing`); the tree is expanded no further once
                it returns False. Never asked on an accelerator.
            shifts: (levels, ranks) float32 at least as large as the shape, by which nodes' log-odds are corrected
                before they are compared (`acceptance.Acceptance`); by default not at all.

        Returns:
            (1, 3, N) int32, the packed tree of `tree.rerank`, on the draft's device.
        """
        tokens, features = self._tokens, self._features
        self._tokens, self._features = tokens[:, :0], None
        choice, corrections = self._choice(shape.levels), None
        if shifts is not None and not self._on_host:
            corrections = to_device(torch.from_numpy(shifts), self._device)
        # A wrapped LM is the caller's and may keep what it computes; inference tensors would trouble its training.
        computes = torch.inference_mode() if self._draft.reads_features else torch.no_grad()
        with computes, torch.autocast(self._device.type, enabled=False):  # the user's; a draft has its own precision
            if features is None:
                features = torch.empty(*tokens.shape, 0, dtype=self._dtype, device=self._device)
            else:
                features = self._draft.encode(features)
            if self._rounds is not None:
                return self._rounds.grow(tokens, features, shape, corrections, choice)
            hidden = self._steps.catch_up(tokens, features)
            try:
                if self._on_host:
                    found = expand_on_host(self._steps, hidden, shape, keep_going, shifts, choice)
                    return rerank_on_host(found, shape.nodes)
                return rerank(expand_on_device(self._steps, hidden, shape, corrections, choice), shape.nodes)
            finally:
                self._steps.forget()

    def _choice(self, levels: int) -> Choice | None:
        """How the target will choose in this round, if that can be known."""
        draws = self._draws
        if draws is None or levels == 0:
            return None
        draws.catch_up()
        if self._on_host:
            return Choice(draws, draws.warpers, draws.sharpness)
        noise = torch.stack([draws[level] for level in range(levels)])
        self.noise_bytes += noise.nbytes
        return Choice(to_device(noise, self._device), draws.warpers, draws.sharpness)
