"""The draft as transformers' generation knows it: a `CandidateGenerator`, one for each call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator
from transformers.utils import logging

from ..config import TreeShape
from ..devices import to_device, to_host
from ..draft import DraftSession
from ..draws import SharedDraws
from ..levels import KeepGoing
from ..modeling import DovetailAssistantModel
from ..weights import feature_layers

logger = logging.get_logger(__name__)


class DovetailCandidateGenerator(CandidateGenerator):
    """One call's drafting session: a tree for Dovetail's loop, a chain for transformers' own assisted loop.

    Args:
        draft: the draft.
        target: the model that verifies.
        capacity: positions to reserve in the draft's cache; a hint.
        sharpness: how much surer the target's choice is than its distribution, see `sampling.sharpness_of`.
        draws: of a target that samples, if they can be known; for drafts on the CPU.

    Raises:
        ValueError: if the draft does not fit the target, or was never loaded.
    """

    requires_model_outputs = True

    def __init__(
        self,
        draft: DovetailAssistantModel,
        target: PreTrainedModel,
        capacity: int = 0,
        sharpness: float = 1.0,
        draws: SharedDraws | None = None,
    ) -> None:
        self.draft, self.device = draft, draft.meet(target)
        self.reads_features = draft.reads_features
        self.feature_layers = feature_layers(draft.config, target.config)
        self.model_kwargs_overrides = {"output_hidden_states": True} if self.reads_features else {}
        self.session = DraftSession(draft, capacity, sharpness=sharpness, draws=draws)
        self._known = 0  # tokens of `input_ids` that the session has; for the stock loop
        self._warned = False

    def begin(self, first: Tensor, start: int) -> None:
        """Open the session with the first token (1, 1) that the target has read, at position `start`."""
        self.session.begin(first, start)

    def commit(self, tokens: Tensor, features: Tensor | None) -> None:
        """Add certain tokens (1, T) and the features (1, T, f) of the positions before them."""
        self.session.commit(tokens, features)

    def propose(
        self, shape: TreeShape, keep_going: KeepGoing | None = None, shifts: np.ndarray | None = None
    ) -> Tensor:
        """(1, 3, N) int32: the packed tree of a round (`tree.rerank`)."""
        return self.session.grow(shape, keep_going, shifts)

    @property
    def noise_bytes(self) -> int:
        """What the noise of the target's draws has taken to the draft's device."""
        return self.session.noise_bytes

    def give_up(self, error: Exception) -> None:
        """Leave the session after a failure, and free what it holds; after a lack of memory the next one is smaller."""
        self.session = None
        self.draft.release(out_of_memory=is_out_of_memory(error))

    def room(self, waiting: int = 0) -> int:
        """Levels that the draft's positions still allow behind `waiting` tokens that are not committed yet; without
        room the target goes on alone.
        """
        end, length = self.draft.config.max_position_embeddings, self.session.length + waiting
        room = max(end - length, 0)
        if room == 0 and not self._warned:
            self._warned = True
            logger.warning(
                "the sequence has reached the draft's last position (%d of %d): the target goes on alone, "
                "at plain speed; the output stays the same",
                length,
                end,
            )
        return room

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.LongTensor, None]:
        """A chain of candidates behind `input_ids` (1, n), for transformers' stock assisted loop.

        The first iteration proposes nothing, since it has no features yet. No logits are returned, so the
        stock loop accepts by comparing tokens.
        """
        if is_first_iteration or model_outputs is None:
            return input_ids, None
        if self._known == 0:  # a continued conversation starts in the middle
            first = input_ids.shape[1] - 1 - model_outputs.hidden_states[-1].shape[1] if self.reads_features else 0
            self.begin(to_device(input_ids[:, first : first + 1], self.device), first)
            self._known = first + 1
        tokens = to_device(input_ids[:, self._known :], self.device)
        features = None
        if self.reads_features:
            states = [model_outputs.hidden_states[layer][:, : tokens.shape[1]] for layer in self.feature_layers]
            features = torch.cat([to_device(each, self.device) for each in states], dim=-1)
        self.commit(tokens, features)
        self._known = input_ids.shape[1]
        tree = self.draft.tree
        shape = (tree if isinstance(tree, TreeShape) else TreeShape()).as_chain().clipped(self.room())
        if shape.nodes == 0:
            return input_ids, None
        chain = to_host(self.propose(shape)).wait()[:, 0].to(input_ids)
        return torch.cat((input_ids, chain), dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt; older transformers call it after each round."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory left; not every backend has an exception of its own for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error).lower() for words in ("out of memory", "can't allocate memory"))
