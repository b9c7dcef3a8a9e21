"""The acceptance walk: which drafted nodes the target itself would have produced. Pure functions.

No draft probability enters the result. At each visited node the caller's `select` takes the next token from
the target's logits exactly as plain decoding does, so the answer is plain decoding's, token by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .tree import DraftTree

Select = Callable[[Tensor], tuple[int, bool]]
"""Takes the target's logits (1, V) of a node; returns the next token and whether the answer ends with it."""


@dataclass(frozen=True)
class Accepted:
    """What a round added to the answer.

    Args:
        path: visited nodes, root first; exactly the positions that the caches keep.
        tokens: tokens selected along the path; the last one is the bonus token or the answer's last.
        finished: whether a stopping criterion ended the answer.
    """

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    finished: bool

    @property
    def drafted(self) -> int:
        """Tokens of this round that the draft had proposed, at depths 1 to `drafted`."""
        return len(self.path) - 1


def walk(tree: DraftTree, logits: Tensor, select: Select, row: int = 0) -> Accepted:
    """Walk one verified tree from its root, following the target's own choices.

    Args:
        tree: the proposed tree.
        logits: (B, N, V) of the target at every node.
        select: the target's choice at a node; called once per emitted token, in order.
        row: which row of the batch to walk.
    """
    node, path, tokens, logits = 0, [0], [], logits[row]
    while True:
        token, finished = select(logits[node : node + 1])
        tokens.append(token)
        child = None if finished else tree.child(node, token, row)
        if child is None:
            return Accepted(tuple(path), tuple(tokens), finished)
        node = child
        path.append(node)
