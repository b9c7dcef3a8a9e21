"""When the draft rests, since trees do not pay, and when it looks whether they pay again. Pure: numbers only.

A round with a tree is compared with what its time yields without the draft. The draft pauses once trees are expected
to lose, or have lost, and then looks: one tree, after which it either goes on or pauses twice as long.
"""

from __future__ import annotations

from collections.abc import Sequence

LOOK_NODES = 7
"""Largest tree that a look verifies against its own judgement."""

_LOOK_COST = 1.25  # most that its verification may cost, in plain ones
_LOOK_SHARE = 0.02  # of the time of plain decoding that looks may take
_SHORTEST, _LONGEST = 4, 64  # tokens; the longest pause is longer where looks are dear
_PACE = 0.97  # share of the sums behind the pace that a round leaves
_TREND = 0.8  # likewise for the advantage of trees in expected tokens
_PROOF = 0.97  # likewise for the advantage in real tokens
_PROVEN = 20.0  # rounds after which the real advantage counts


class Pauses:
    """What trees have won over plain decoding, and how long the draft rests for it.

    Attributes:
        length: tokens of plain decoding between two looks; 0 while trees pay.
        wait: tokens until the next look.
        advantage: of a tree over rounds without the draft, in expected tokens a round; None before the first.
        proof, proofs: the same in real tokens: their sum, and the number of rounds behind it.
        tokens, ms: of rounds with a tree: the pace.
    """

    def __init__(self) -> None:
        self.length = self.wait = 0
        self.advantage: float | None = None
        self.proof = self.proofs = 0.0
        self.tokens = self.ms = 0.0

    def pace(self, plain: float) -> float:
        """Tokens per ms that time is worth; never less than the `plain` ones of plain decoding."""
        return max(plain, (self.tokens + 2.0) / (self.ms + 2.0 / plain))

    def shorten(self, look_ms: float, remaining: int, plain_ms: float) -> None:
        """A new answer is new text: wait less, if a look costs little of what the answer will take.

        Args:
            look_ms: what a look adds to a plain round.
            remaining: tokens that the answer may get.
            plain_ms: of a plain round.
        """
        if look_ms < _LOOK_SHARE * remaining * plain_ms:
            self.wait = min(self.wait, _SHORTEST)

    def pass_over(self, tokens: int) -> None:
        """Enter a round without the draft."""
        self.wait -= tokens

    def enter(self, tokens: int, ms: float, plain: float, alone: float) -> None:
        """Enter a round with a tree.

        Args:
            tokens: that it gave.
            ms: that such a round takes.
            plain: tokens per ms of plain decoding.
            alone: tokens that prompt lookup by itself was expected to win over plain decoding.
        """
        self.tokens, self.ms = _PACE * self.tokens + tokens, _PACE * self.ms + ms
        self.proof = _PROOF * self.proof + tokens - ms * plain - alone
        self.proofs = _PROOF * self.proofs + 1

    def judge(self, advantage: float) -> None:
        """Pause if usual rounds do not pay; `advantage` is what the last one was expected to win, in tokens."""
        before = advantage if self.advantage is None else self.advantage
        self.advantage = _TREND * before + (1 - _TREND) * advantage
        if self.advantage < 0 or (self.proofs > _PROVEN and self.proof < 0):
            self.length = self.wait = _SHORTEST

    def judge_look(self, advantage: float, right: bool, cost: float) -> None:
        """Go on after a look that pays, pause twice as long after any other.

        Args:
            advantage: what it was expected to win, in tokens.
            right: whether any of the draft's nodes was accepted.
            cost: tokens that plain decoding would have yielded in the time it took beyond a plain round.
        """
        if advantage > 0 and right:
            self.length, self.advantage = 0, advantage
            self.proof = self.proofs = 0.0
        else:
            self.length = self.wait = min(2 * self.length, longest_pause(cost))


def longest_pause(cost: float) -> int:
    """Tokens between looks, each of which costs the time of so many tokens."""
    return max(_LONGEST, int(cost / _LOOK_SHARE))


def look_nodes(rows: Sequence[float], most: int) -> int:
    """Nodes to verify in a look, whatever they promise, since only verified nodes teach.

    Args:
        rows: ms of verifying 0 (as 1), 1, 2, ... rows.
        most: nodes that are there.
    """
    cheap = [n for n in range(1, min(most, LOOK_NODES) + 1) if rows[n + 1] <= _LOOK_COST * rows[1]]
    return max(cheap, default=min(most, 1))
