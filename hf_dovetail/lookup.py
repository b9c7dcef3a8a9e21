"""Prompt lookup (Saxena, 2023): what followed the answer's last tokens when they occurred before. Pure.

Costs no network. What it finds hangs beside the draft's nodes in the tree, and stands alone where no draft pays.
"""

from __future__ import annotations

from collections.abc import Iterable

_SHORTEST = 2  # tokens that must match
_LONGEST = 8  # tokens that are compared
CLASSES = 4
"""Of matches, the longest first; see `match_class`."""
SAYS = (0.8, 0.6, 0.45, 0.3)
"""Chance that a token is right, given those before it, by class of match: a guess, until rounds say more."""


def match_class(length: int) -> int:
    """The class of a match of `length` tokens: 0 for six or more, then four, three, two."""
    return 0 if length >= 6 else 1 if length >= 4 else 2 if length == 3 else 3


class Lookup:
    """An index of all pairs of tokens of one sequence, and where each occurred last."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}  # pair: the place behind it

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; a pair is entered once something follows it."""
        known = self._tokens
        for token in tokens:
            place = len(known)
            if place >= _SHORTEST:
                self._last[known[-2], known[-1]] = place
            known.append(token)

    def continuation(self, most: int) -> tuple[list[int], int]:
        """What followed the last occurrence of the sequence's end.

        Args:
            most: tokens to give at most.

        Returns:
            At most `most` tokens, and how many tokens before them match, up to eight; nothing and 0 without a match.
        """
        known = self._tokens
        place = self._last.get((known[-2], known[-1])) if len(known) >= _SHORTEST else None
        if place is None or most <= 0:
            return [], 0
        length = _SHORTEST
        while length < min(_LONGEST, place) and known[place - 1 - length] == known[-1 - length]:
            length += 1
        return self._repeated(place, most), length

    def _repeated(self, place: int, most: int) -> list[int]:
        """`most` tokens from `place` on; what reaches the sequence's end goes on with itself."""
        known, period = self._tokens, len(self._tokens) - place
        return [known[place + i % period] for i in range(most)]
