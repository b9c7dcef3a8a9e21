"""A drafting session: the draft's cache for one answer, and the growth of a tree on the draft's device.

Knows the draft network, not the target. Rows of the network pair a feature with the token that follows it;
row i stands for position i of the answer. A tree is grown behind the committed rows and forgotten again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TreeShape
from .modeling import DovetailAssistantModel
from .tree import Candidates, rerank


class DraftSession:
    """Drafts for one answer: `begin`, then `commit` and `grow` in turns.

    Args:
        draft: the network, placed and sharing its target's weights.
        capacity: positions to reserve in the cache; a hint.
    """

    def __init__(self, draft: DovetailAssistantModel, capacity: int = 0) -> None:
        self._draft, self._device = draft, draft.device
        self._cache = draft.new_cache(capacity)
        self._mask = draft.mask_builder()
        self._prunes = self._device.type == "cpu"  # elsewhere it would stop the host once a level
        self._start = 0  # position of the first row: a continued conversation starts in the middle
        self._tokens = torch.empty(1, 0, dtype=torch.long, device=self._device)
        self._features: Tensor | None = None

    @property
    def length(self) -> int:
        """Positions known to the session, from the start of the answer's sequence."""
        return self._start + self._cache.length + self._tokens.shape[1]

    def begin(self, first: Tensor, start: int) -> None:
        """Open the session with the first token (1, 1) that the target has read, at position `start`."""
        self._start = start
        if not self._draft.reads_features:
            self._tokens = first

    def commit(self, tokens: Tensor, features: Tensor | None) -> None:
        """Add what is certain now; it is computed by the next `grow`.

        Args:
            tokens: (1, T) the tokens that follow the positions of `features`; the last one is the next root.
            features: (1, T, h) the target's features, on the draft's device; None for a draft that reads none.
        """
        self._tokens = torch.cat((self._tokens, tokens), dim=1)
        if features is not None:
            features = features.to(self._draft.dtype)
            self._features = features if self._features is None else torch.cat((self._features, features), dim=1)

    def grow(self, shape: TreeShape) -> Tensor:
        """Propose the best tree of this shape (EAGLE-2's expansion and re-ranking).

        Returns:
            (1, 3, N) int32, the packed tree of `tree.rerank`, on the draft's device.
        """
        hidden = self._catch_up()
        committed = self._cache.length
        try:
            return rerank(self._expand(hidden, shape), shape.nodes)
        finally:
            self._cache.truncate(committed)

    def _catch_up(self) -> Tensor:
        """Compute the committed rows that are new; return the last one's hidden state (1, 1, h)."""
        count, held = self._tokens.shape[1], self._cache.length
        slots = torch.arange(held, held + count, device=self._device).unsqueeze(0)
        keys = torch.arange(held + count, device=self._device).unsqueeze(0)
        mask = self._mask(keys[:, None, :] <= slots[:, :, None], slots, keys)
        hidden = self._step(self._tokens, self._features, slots, mask)
        self._tokens, self._features = self._tokens[:, :0], None
        return hidden[:, -1:]

    def _step(self, tokens: Tensor, features: Tensor | None, slots: Tensor, mask: Tensor | dict) -> Tensor:
        return self._draft(tokens, features, self._start + slots, mask, self._cache)

    def _expand(self, hidden: Tensor, shape: TreeShape) -> Candidates:
        """All candidates of the tree: `top_k` children of the root, then of the `top_k` best nodes per level.

        A node that `nodes` others of its level beat cannot be kept, so no level is wider than `nodes`.
        """
        held, width = self._cache.length, min(shape.top_k, shape.nodes)
        scores, tokens = self._best(hidden, width)  # (1, 1, k) each: children of the root
        scores, tokens = scores[:, 0], tokens[:, 0]  # (1, k): the frontier
        frontier = torch.arange(scores.shape[1], device=self._device).unsqueeze(0)
        hidden = hidden.expand(-1, frontier.shape[1], -1)
        found = [(tokens, torch.full_like(frontier, -1), scores)]
        ancestry = torch.empty(1, frontier.shape[1], 0, dtype=torch.bool, device=self._device)  # (1, k, rows so far)
        slots = torch.empty(1, 0, dtype=torch.long, device=self._device)  # of the tree's rows so far
        for level in range(1, shape.levels):
            own = torch.eye(frontier.shape[1], dtype=torch.bool, device=self._device).unsqueeze(0)
            ancestry = torch.cat((ancestry, own), dim=-1)
            here = torch.full_like(frontier, held + level - 1)
            slots = torch.cat((slots, here), dim=1)
            hidden = self._step(tokens, hidden, here, self._level_mask(ancestry, here, slots, held))
            gains, children = self._best(hidden, width)  # (1, k, w)
            totals = (scores.unsqueeze(-1) + gains).flatten(1)
            before = sum(part[0].shape[1] for part in found)
            found.append((children.flatten(1), frontier.repeat_interleave(gains.shape[-1], dim=1), totals))
            if level == shape.levels - 1:
                break
            scores, best = totals.topk(min(width, totals.shape[1]), dim=-1)
            hopeful = self._hopeful(scores, found, shape.nodes)
            if hopeful == 0:
                break
            scores, best = scores[:, :hopeful], best[:, :hopeful]
            rows = best // gains.shape[-1]  # which frontier node each new frontier node descends from
            tokens = children.flatten(1).gather(1, best)
            hidden = hidden.gather(1, rows.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            ancestry = ancestry.gather(1, rows.unsqueeze(-1).expand(-1, -1, ancestry.shape[-1]))
            frontier = before + best
        return Candidates(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))

    def _hopeful(self, scores: Tensor, found: list[tuple[Tensor, Tensor, Tensor]], nodes: int) -> int:
        """How many of the next frontier's nodes, best first, can still have a child among the `nodes` best of all.

        A child never beats its parent, so the tree is the same without the others.
        """
        if not self._prunes:
            return scores.shape[1]
        all_scores = torch.cat([part[2] for part in found], dim=1)
        if all_scores.shape[1] < nodes:
            return scores.shape[1]
        least = all_scores.topk(nodes, dim=-1).values[:, -1:]
        return int((scores > least).sum())

    def _best(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens of the `count` likeliest continuations of each row, (1, T, count)."""
        log_probs = self._draft.logits(hidden).log_softmax(dim=-1)
        log_probs = log_probs.nan_to_num(nan=float("-inf"))  # an overflow costs acceptance, not the answer
        return log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)

    def _level_mask(self, ancestry: Tensor, here: Tensor, slots: Tensor, held: int) -> Tensor | dict:
        """The mask of one level: every committed row, and the node's own path behind them."""
        committed = torch.ones(1, ancestry.shape[1], held, dtype=torch.bool, device=self._device)
        keys = torch.cat((torch.arange(held, device=self._device).unsqueeze(0), slots), dim=1)
        return self._mask(torch.cat((committed, ancestry), dim=-1), here, keys)
