"""The draft tree as flat tensors, and the pure functions that build, pack and draw it.

Node 0 is the root: the last token of the answer so far, which the target has not seen yet. A node's parent
always has a smaller index. Everything is batch-first; this module knows no model and no device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Every node that a draft has considered in a round, in the order of its levels, on the draft's device.

    Args:
        tokens: (B, C) int64.
        parents: (B, C) int64, index of the parent candidate, -1 for children of the root.
        log_probs: (B, C) float32, the draft's cumulative log-probability of the path to the node.
        scores: (B, C) float32, what nodes are compared by: the same, or corrected by what was accepted so far. No child
            beats its parent.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    scores: Tensor


def rerank(candidates: Candidates, nodes: int) -> Tensor:
    """Keep the `nodes` candidates with the best scores (EAGLE-2, arXiv 2406.16858, section 4.2).

    Returns a packed tree without its root: (B, 3, N) int32 of tokens, parents (0 is the root) and the bits of
    the float32 log-probabilities, so that one copy takes it off the device. The sort is stable and a parent
    stands before its children, so a kept node's parent is kept.
    """
    order = candidates.scores.argsort(dim=-1, descending=True, stable=True)
    kept = order[:, :nodes].sort(dim=-1).values  # (B, N) candidate indices, parents first
    parents = candidates.parents.gather(1, kept)
    flat_parents = torch.searchsorted(kept, parents) + 1
    flat_parents = torch.where(parents < 0, torch.zeros_like(parents), flat_parents)
    tokens = candidates.tokens.gather(1, kept).int()
    log_probs = candidates.log_probs.gather(1, kept).float().view(torch.int32)
    return torch.stack((tokens, flat_parents.int(), log_probs), dim=1)


def rerank_on_host(candidates: Candidates, nodes: int) -> Tensor:
    """`rerank` by NumPy: for so few numbers torch's operations take longer to begin than to compute."""
    return torch.from_numpy(_best(*(part.numpy() for part in vars(candidates).values()), nodes))


def _best(tokens: np.ndarray, parents: np.ndarray, log_probs: np.ndarray, scores: np.ndarray, nodes: int) -> np.ndarray:
    """The `nodes` best of (B, C) candidates, as `rerank` packs them."""
    kept = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :nodes], axis=1)
    rows = np.arange(len(kept))[:, None]
    places = np.zeros((len(kept), scores.shape[1] + 1), dtype=np.int32)  # the last is the root's, which -1 leads to
    places[rows, kept] = np.arange(1, kept.shape[1] + 1)
    packed = np.empty((len(kept), 3, kept.shape[1]), dtype=np.int32)
    packed[:, 0], packed[:, 1] = tokens[rows, kept], places[rows, parents[rows, kept]]
    packed[:, 2] = log_probs[rows, kept].view(np.int32)
    return packed


@dataclass(frozen=True)
class DraftTree:
    """A tree of proposed tokens on the host.

    Args:
        tokens: (B, N) int64; column 0 is the root.
        parents: (B, N) int64; -1 for the root, otherwise smaller than the node's own index.
        log_probs: (B, N) float32, cumulative log-probability in the draft; 0 for the root, -inf for nodes that are
            not the draft's.

    Raises:
        ValueError: if the shapes differ or a parent does not stand before its child.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or not self.tokens.shape == self.parents.shape == self.log_probs.shape:
            shapes = [tuple(t.shape) for t in (self.tokens, self.parents, self.log_probs)]
            raise ValueError(f"tokens, parents and log_probs of a tree must share one (B, N) shape, got {shapes}")
        for root, *parents in self.parents.tolist():
            if root < 0 and all(0 <= parent < node for node, parent in enumerate(parents, start=1)):
                continue
            raise ValueError(f"every node's parent must stand before it, got parents {self.parents.tolist()}")

    @classmethod
    def unpack(cls, root: Tensor, packed: Tensor) -> DraftTree:
        """The tree under `root` (B, 1) from `rerank`'s packed form (B, 3, N) on the host."""
        return cls._under(root.numpy(), packed.numpy())

    @classmethod
    def _under(cls, root: np.ndarray, packed: np.ndarray) -> DraftTree:
        shape = len(packed), packed.shape[2] + 1
        tokens, parents, log_probs = np.empty(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, np.float32)
        tokens[:, :1], tokens[:, 1:] = root, packed[:, 0]
        parents[:, 0], parents[:, 1:] = -1, packed[:, 1]
        log_probs[:, 1:] = packed[:, 2].view(np.float32)
        return cls(*map(torch.from_numpy, (tokens, parents, log_probs)))

    @classmethod
    def root_only(cls, root: Tensor) -> DraftTree:
        """The tree that proposes nothing: plain decoding. `root`: (B, 1) int64."""
        return cls(root, torch.full_like(root, -1), torch.zeros_like(root, dtype=torch.float32))

    def trimmed(self, nodes: int, scores: np.ndarray | None = None) -> DraftTree:
        """The tree of the root and its `nodes` best nodes, in their order; of equally good ones, the earlier.

        Args:
            nodes: how many to keep.
            scores: (B, N) of the nodes behind the root, no child above its parent: then the best nodes are a tree.
                By default their log-probabilities.
        """
        if nodes >= self.num_nodes:
            return self
        tokens, parents, log_probs = (column.numpy() for column in (self.tokens, self.parents, self.log_probs))
        scores = log_probs[:, 1:] if scores is None else scores
        packed = _best(tokens[:, 1:], parents[:, 1:] - 1, log_probs[:, 1:], scores, nodes)
        return DraftTree._under(tokens[:, :1], packed)

    def with_path(self, tokens: Sequence[int]) -> tuple[DraftTree, list[int]]:
        """A tree of batch 1 with a path of these tokens from its root, and the nodes of that path.

        Nodes that are there already are used; new ones stand behind all others, with log-probability -inf.
        """
        path, node = [], 0
        for token in tokens:
            child = self.child(node, token)
            if child is None:
                break
            path.append(child)
            node = child
        new = list(tokens[len(path) :])
        if not new:
            return self, path
        places = list(range(self.tokens.shape[1], self.tokens.shape[1] + len(new)))
        added = [new], [[node, *places[:-1]]], np.full((1, len(new)), -np.inf, dtype=np.float32)
        columns = zip((self.tokens, self.parents, self.log_probs), added, strict=True)
        whole = (np.concatenate((column.numpy(), more), axis=1) for column, more in columns)
        return DraftTree(*map(torch.from_numpy, whole)), path + places

    @property
    def num_nodes(self) -> int:
        """Proposed nodes, not counting the root."""
        return self.tokens.shape[1] - 1

    @cached_property
    def ancestors(self) -> Tensor:
        """(B, N, N) bool: whether the column's node is the row's node or one of its ancestors."""
        size = self.tokens.shape[1]
        found = np.eye(size, dtype=bool)[None].repeat(len(self.tokens), axis=0)
        for reach, parents in zip(found, self.parents.tolist(), strict=True):
            for node, parent in enumerate(parents[1:], start=1):
                reach[node] |= reach[parent]
        return torch.from_numpy(found)

    @cached_property
    def depths(self) -> Tensor:
        """(B, N) int64: edges between the node and the root."""
        found = []
        for parents in self.parents.tolist():
            depths = [0]
            for parent in parents[1:]:
                depths.append(depths[parent] + 1)
            found.append(depths)
        return torch.from_numpy(np.array(found, dtype=np.int64))

    @cached_property
    def ranks(self) -> Tensor:
        """(B, N) int64: how many nodes before it have the same parent; 0 for the root."""
        found = []
        for parents in self.parents.tolist():
            children, ranks = [0] * len(parents), [0]
            for parent in parents[1:]:
                ranks.append(children[parent])
                children[parent] += 1
            found.append(ranks)
        return torch.from_numpy(np.array(found, dtype=np.int64))

    @cached_property
    def _children(self) -> list[dict[tuple[int, int], int]]:
        """Of each row of the batch: the first node with this parent and token."""
        found = []
        for parents, tokens in zip(self.parents.tolist(), self.tokens.tolist(), strict=True):
            edges = zip(reversed(parents), reversed(tokens), strict=True)
            found.append(dict(zip(edges, reversed(range(len(tokens))), strict=True)))  # the first comes last, and stays
        return found

    def child(self, node: int, token: int, row: int = 0) -> int | None:
        """The first child of `node` that carries `token`, or None."""
        return self._children[row].get((node, token))

    def path(self, node: int, row: int = 0) -> list[int]:
        """The nodes from the root to `node`, both included."""
        return self.ancestors[row, node].nonzero().flatten().tolist()

    def draw(self, decode: Callable[[int], str] = str, accepted: tuple[int, ...] = (), row: int = 0) -> str:
        """The tree as text, one node a line: token, the draft's probability of its path, a mark on accepted nodes."""
        tokens, parents = self.tokens[row].tolist(), self.parents[row].tolist()
        probabilities = self.log_probs[row].exp().tolist()
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            children.setdefault(parent, []).append(node)
        lines: list[str] = []

        def visit(node: int, indent: str, branch: str, below: str) -> None:
            mark = " *" if node in accepted else ""
            known = self.log_probs[row, node] > float("-inf")
            share = "" if node == 0 else f"  {probabilities[node]:.2f}" if known else "  looked up"
            lines.append(f"{indent}{branch}{decode(tokens[node])!r}{share}{mark}")
            kids = children.get(node, [])
            for kid in kids:
                last = kid == kids[-1]
                visit(kid, indent + below, "`- " if last else "|- ", "   " if last else "|  ")

        visit(0, "", "", "")
        return "\n".join(lines)
