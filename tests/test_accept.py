"""The acceptance walk on trees made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_dovetail.accept import Accepted, walk
from hf_dovetail.tree import DraftTree

#        5            tokens: the token 7 stands in two branches
#      /   \
#     6     7          nodes:   0
#    / \     \               1     2
#   7   8     6            3   4     5
#   |                      6
#   9
TREE = DraftTree(torch.tensor([[5, 6, 7, 7, 8, 6, 9]]), torch.tensor([[-1, 0, 0, 1, 1, 2, 3]]), torch.zeros(1, 7))


class Target:
    """Answers by script and notes which node's logits it was shown (logits of node n are all n)."""

    def __init__(self, *choices: int, stop_after: int = 99) -> None:
        self.choices, self.stop_after, self.asked = choices, stop_after, []

    def __call__(self, logits: Tensor) -> tuple[int, bool]:
        assert logits.shape == (1, 4)
        self.asked.append(int(logits[0, 0]))
        return self.choices[len(self.asked) - 1], len(self.asked) == self.stop_after


def take(tree: DraftTree, target: Target) -> Accepted:
    return walk(tree, torch.arange(tree.num_nodes + 1).float()[None, :, None].expand(1, -1, 4), target)


def test_the_walk_follows_the_target_to_a_leaf_and_adds_a_bonus() -> None:
    target = Target(6, 7, 9, 50)
    assert take(TREE, target) == Accepted((0, 1, 3, 6), (6, 7, 9, 50), False)
    assert target.asked == [0, 1, 3, 6]


def test_a_token_that_is_no_child_ends_the_round_in_the_middle() -> None:
    """The token 9 stands in the tree, but not below node 1: it is a bonus, not an accepted node."""
    accepted = take(TREE, Target(6, 9))
    assert accepted == Accepted((0, 1), (6, 9), False)
    assert accepted.drafted == 1


def test_equal_tokens_in_two_branches_are_told_apart() -> None:
    """Guards a child lookup by token alone: 7, 6 is another path than 6, 7."""
    assert take(TREE, Target(7, 6, 8)).path == (0, 2, 5)
    assert take(TREE, Target(6, 7, 8)).path == (0, 1, 3)


def test_nothing_is_accepted_when_no_child_of_the_root_fits() -> None:
    accepted = take(TREE, Target(8))
    assert accepted == Accepted((0,), (8,), False)
    assert accepted.drafted == 0


def test_a_finished_answer_takes_no_further_node() -> None:
    """Guards output after EOS: the stopping token is in the tree and has children, and the walk stops all the same."""
    target = Target(6, 7, 9, 50, stop_after=2)
    assert take(TREE, target) == Accepted((0, 1), (6, 7), True)
    assert target.asked == [0, 1]


def test_a_root_alone_is_plain_decoding() -> None:
    assert take(DraftTree.root_only(torch.tensor([[5]])), Target(6)) == Accepted((0,), (6,), False)


def test_a_row_of_a_batch_walks_its_own_tree() -> None:
    other = DraftTree(TREE.tokens.flip(1), torch.tensor([[-1, 0, 1, 2, 3, 4, 5]]), torch.zeros(1, 7))
    both = DraftTree(
        *(
            torch.cat(pair)
            for pair in ((TREE.tokens, other.tokens), (TREE.parents, other.parents), (torch.zeros(1, 7),) * 2)
        )
    )
    logits = torch.arange(7).float()[None, :, None].expand(2, -1, 4)
    assert walk(both, logits, Target(6, 8, 1), row=0).path == (0, 1, 4)
    assert walk(both, logits, Target(6, 8, 1), row=1).path == (0, 1, 2)
