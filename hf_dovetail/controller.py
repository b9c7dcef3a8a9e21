"""Chooses the tree of every round: as large as pays on this machine for this text, or none.

Pure: costs in ms and the draft's confidences go in, shapes and numbers of nodes come out. A choice is worth its
expected tokens minus its time times the pace, the tokens per ms that rounds yield at the moment. What maximises that
in each round maximises tokens per second over all of them (Dinkelbach's method for ratios, with the pace as its
parameter), whereas the ratio within one round would treat time that is already spent as if it could be saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .accept import Accepted
from .acceptance import corrected
from .config import TreeShape
from .costs import Costs
from .curves import MAX_ROWS
from .experience import LARGEST, RETENTION, Experience
from .levels import KeepGoing
from .lookup import SAYS, match_class
from .tree import DraftTree
from .worth import gains_of, nodes_of, sums_of, worth_of

PROBE = (TreeShape(), TreeShape(0), TreeShape(7, 4, 10), TreeShape(0), TreeShape(MAX_ROWS - 1, 10, 10))
"""The first rounds on a machine without curves. They decode like any round, so measuring costs almost nothing."""

_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 20)  # chosen ahead: few kinds of round, since each may be captured as a graph
_LOOK_DEEPER = 8  # rounds
_PACE = 0.97  # share of the sums behind the pace that a round leaves
_TREND = 0.8  # likewise for the advantage of trees in expected tokens, and for their size
_PROOF = 0.97  # likewise for the advantage in real tokens
_PROVEN = 20.0  # rounds after which the real advantage counts
_SHORTEST_PAUSE, _LONGEST_PAUSE = 4, 64  # tokens
_LOOK_SHARE = 0.02  # of the time of plain decoding that looks may take
_LOOK_NODES = 7  # largest tree that a look verifies against its own judgement
_LOOK_COST = 1.25  # most that its verification may cost, in plain ones
_SPARE_NODES = (1.5, 4)  # times and plus what was verified of late: a smaller tree has narrower levels
_LOOKAHEAD = 3  # levels that the next one is judged together with; depths beyond the best that looks go to
_LOOKED_UP = np.log(SAYS)


@dataclass(frozen=True)
class Found:
    """What prompt lookup has found behind the answer so far (`lookup.Lookup.continuation`).

    Args:
        tokens: at most as many as a path may have.
        match: tokens before them that match; 0 if nothing was found.
    """

    tokens: Sequence[int] = ()
    match: int = 0


class Controller:
    """What the loop asks: here the answers for a fixed shape.

    Attributes:
        largest: no tree exceeds this shape.
    """

    def __init__(self, shape: TreeShape) -> None:
        self.largest = shape

    keep_going: KeepGoing | None = None
    """Asked by a draft on the CPU after each level: whether to grow another."""
    shifts: np.ndarray | None = None
    """What the draft corrects its nodes' log-odds by before it compares them, see `acceptance.Acceptance`."""

    def plan(self, most: TreeShape, context: int, waiting: int, remaining: int) -> TreeShape:
        """The shape to grow in this round.

        Args:
            most: what target, draft and answer allow.
            context: positions in the target's cache.
            waiting: tokens that the draft has to catch up with.
            remaining: tokens that the answer may still get.
        """
        return most

    looks_up = False
    """Whether `choose` wants what prompt lookup finds."""

    def choose(self, tree: DraftTree, found: Found, most: TreeShape) -> DraftTree:
        """What to verify.

        Args:
            tree: the draft's; its root alone in rounds without.
            found: by prompt lookup.
            most: what the target and the answer allow.
        """
        return tree

    def learn(self, tree: DraftTree, accepted: Accepted, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        """Enter what the round took and gave."""


class AutoController(Controller):
    """Sizes trees by costs and experience; one per call.

    Args:
        costs, experience: what is known, shared by calls and improved by this one.
        on_host: whether the draft is on the CPU and asks `keep_going`; elsewhere the depth is chosen ahead.
        clock: seconds.
    """

    def __init__(
        self,
        costs: Costs,
        experience: Experience,
        on_host: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(LARGEST)
        self.looks_up = True
        self._costs, self._experience, self._on_host, self._clock = costs, experience, on_host, clock
        if on_host:
            self.keep_going = self._keep_going
        self._forced = self._looks = False
        self._starts, self._usual = True, LARGEST.levels
        self._plan, self._context, self._waiting = LARGEST, 0, 0
        self._found, self._own, self._alone = Found(), 0, 0.0

    def plan(self, most: TreeShape, context: int, waiting: int, remaining: int) -> TreeShape:
        """The shape to grow in this round; no nodes: decode plainly."""
        experience = self._experience
        self._context, self._waiting, self._forced = context, waiting, False
        with self._costs.lock:
            self.shifts = experience.acceptance.shifts
            if self._starts:
                self._look_early(waiting, remaining)
            self._looks = experience.pause > 0
            if most.nodes == 0 or (experience.wait > 0 and not self._probes()):
                self._plan = TreeShape(0, 0, most.top_k)
            elif self._probes():
                probe = PROBE[experience.probed]
                experience.probed += 1
                self._forced, self._plan = True, _within(probe, most)
            else:
                self._plan = self._free(most, waiting, remaining)
            self._looks = self._looks and self._plan.nodes > 0
            self._open()
            return self._plan

    def _look_early(self, waiting: int, remaining: int) -> None:
        """A new answer is new text: shorten the pause, if a look costs little of what the answer will take."""
        self._starts, rows = False, self._costs.table(self._context)
        look = waiting * self._costs.row.value + self._costs.draft_ms(1) + float(rows[_LOOK_NODES + 1] - rows[1])
        if look < _LOOK_SHARE * remaining * self._costs.plain_ms(self._context):
            self._experience.wait = min(self._experience.wait, _SHORTEST_PAUSE)

    def _probes(self) -> bool:
        return not self._costs.measured and self._experience.probed < len(PROBE)

    def _free(self, most: TreeShape, waiting: int, remaining: int) -> TreeShape:
        """What to grow when nothing forbids it."""
        plain, pace = self._plain_pace(), self._pace()
        if waiting > 2 * MAX_ROWS and self._experience.ms:  # a prompt: will the answer make up for reading it?
            saved = remaining * (1 / plain - 1 / pace)
            if saved < waiting * self._costs.row.value:
                return TreeShape(0, 0, most.top_k)
        if not self._on_host:
            return most.clipped(self._levels_ahead(most.levels, pace))
        nodes = int(_SPARE_NODES[0] * self._experience.nodes + _SPARE_NODES[1])
        return TreeShape(min(most.nodes, nodes), most.depth, most.top_k)

    def _open(self) -> None:
        """Get ready for a tree's levels."""
        self._rows = self._costs.table(self._context)
        self._price = self._pace()
        self._times = [self._clock()]
        self._went_on = False
        self._mass, self._expected = 0.0, 1.0
        self._best = np.zeros(0)

    def _plain_pace(self) -> float:
        return 1 / self._costs.plain_ms(self._context)

    def _pace(self) -> float:
        """Tokens per ms that time is worth; never less than plain decoding's."""
        plain, experience = self._plain_pace(), self._experience
        return max(plain, (experience.tokens + 2.0) / (experience.ms + 2.0 / plain))

    def _levels_ahead(self, most: int, price: float) -> int:
        """The depth that was worth most in past trees; now and then one more, to see what it would be worth."""
        experience = self._experience
        experience.planned += 1
        possible = [levels for levels in _DEPTHS if levels <= most] or [most]
        values, worth = {}, 0.0
        for n in possible:
            if n in experience.gains:
                worth += experience.gains[n]
                values[n] = worth - n * price * self._costs.level.value
        if not values:  # what the first guess of a level's gain says
            level_price = price * self._costs.level.value
            gains = np.cumprod(np.full(max(possible), RETENTION)).cumsum()
            return max(possible, key=lambda levels: gains[levels - 1] - levels * level_price)
        best = self._usual = max(values, key=values.__getitem__)
        deeper = [levels for levels in possible if levels > best]
        if deeper and not self._looks:
            look = deeper[experience.deeper % min(_LOOKAHEAD, len(deeper))]
            rounds = (look - best) * self._costs.level.value / self._costs.plain_ms(self._context)
            if experience.planned >= max(_LOOK_DEEPER, rounds / _LOOK_SHARE):
                experience.planned = 0
                experience.deeper += 1
                return look
        return best

    def _keep_going(self, level: int, scores: np.ndarray) -> bool:
        self._times.append(self._clock())
        chances = np.exp(np.sort(scores)[: -MAX_ROWS - 1 : -1])
        frontier = chances[: LARGEST.top_k]
        self._learn_retention(level, float(frontier.sum()))
        self._best = np.sort(np.concatenate((self._best, chances)))[:-MAX_ROWS:-1]
        self._went_on = level < self._plan.levels and (self._forced or self._pays(level, frontier))
        return self._went_on

    def _learn_retention(self, level: int, mass: float) -> None:
        if level > 1 and self._mass > 0:
            with self._costs.lock:
                experience = self._experience
                experience.kept[level - 1] = _PACE * experience.kept[level - 1] + mass
                experience.mass[level - 1] = _PACE * experience.mass[level - 1] + self._mass
        self._mass = mass

    def _pays(self, level: int, frontier: np.ndarray) -> bool:
        """Whether one of the next levels is expected to be worth more than the time until it is there."""
        price, level_price = self._price, self._price * self._costs.level.value
        if float(frontier.sum()) <= level_price:  # not even if every frontier node had a certain child
            return False
        rows = price * self._rows[1:]  # by number of nodes, in tokens
        now = worth_of(self._best, rows)
        best, ahead = self._best, frontier
        for step in range(1, min(_LOOKAHEAD, self._plan.levels - level) + 1):
            ahead = ahead * self._experience.retention(min(level + step - 1, len(self._experience.mass) - 1))
            best = np.sort(np.concatenate((best, ahead)))[:-MAX_ROWS:-1]
            if worth_of(best, rows) - step * level_price > now:
                return True
        return False

    def choose(self, tree: DraftTree, found: Found, most: TreeShape) -> DraftTree:
        """The nodes that are worth their verification, the draft's and those that were looked up."""
        drafted = tree.num_nodes
        self._found = found = Found() if self._forced else found
        gains = gains_of(tree, self.shifts)
        if self._plan.nodes and not self._on_host:
            self._learn_depths(tree, sums_of(tree, gains))
        tree, gains = self._with_found(tree, gains, found, most)
        scores = sums_of(tree, gains)
        order = np.argsort(-scores, kind="stable")
        chances = np.exp(scores[order[: MAX_ROWS - 1]])
        nodes = tree.num_nodes if self._forced else min(self._best_number(chances), most.nodes)
        self._own = int((order[:nodes] < drafted).sum())
        self._expected = 1.0 + float(chances[:nodes].sum())
        return tree.trimmed(nodes, scores[None])

    def _with_found(
        self, tree: DraftTree, gains: np.ndarray, found: Found, most: TreeShape
    ) -> tuple[DraftTree, np.ndarray]:
        """The tree with the looked-up path, and all nodes' log-probabilities given their parents."""
        self._alone = 0.0
        if not found.tokens:
            return tree, gains
        kind = match_class(found.match)
        looked_up = corrected(_LOOKED_UP[kind], self._experience.lookups.shifts[: len(found.tokens), kind])
        paths = np.exp(looked_up.cumsum())[: len(self._rows) - 2]
        prices = self._plain_pace() * (self._rows[2 : len(paths) + 2] - self._rows[1])
        self._alone = float((paths.cumsum() - prices).max(initial=0.0))
        whole, path = tree.with_path(found.tokens)
        new = whole.num_nodes - tree.num_nodes
        if most.top_k == 1 and 0 < new != len(path) - tree.num_nodes:
            return tree, gains  # it would branch, and the target verifies chains only
        gains = np.concatenate((gains, np.full(new, -np.inf)))
        places = np.array(path) - 1
        gains[places] = np.maximum(gains[places], looked_up)
        return whole, gains

    def _best_number(self, chances: np.ndarray) -> int:
        """Nodes worth verifying, of nodes with these chances (N,)."""
        values = np.concatenate(((0.0,), chances.cumsum())) - self._price * self._rows[1 : len(chances) + 2]
        nodes = int(values.argmax())
        return max(nodes, self._look_nodes(len(chances))) if self._looks else nodes

    def _learn_depths(self, tree: DraftTree, scores: np.ndarray) -> None:
        """Enter what this tree would have been worth with fewer levels, for `_levels_ahead`.

        Texts differ more than depths do, so depths are compared within a tree.
        """
        order = np.argsort(-scores, kind="stable")
        chances, depths = np.exp(scores[order]), tree.depths.numpy()[0, 1:][order]
        gains, before = self._experience.gains, 0.0
        with self._costs.lock:
            for levels in _DEPTHS:
                if levels <= self._plan.levels:
                    worth = worth_of(chances[depths <= levels], self._price * self._rows[1:])
                    share = 0.1 if levels <= self._usual else 0.25  # these are seen seldom
                    gains[levels] = (1 - share) * gains.get(levels, worth - before) + share * (worth - before)
                    before = worth

    def _look_nodes(self, most: int) -> int:
        """Nodes to verify in a look, whatever they promise, since only verified nodes teach."""
        rows = self._rows
        cheap = [n for n in range(1, min(most, _LOOK_NODES) + 1) if rows[n + 1] <= _LOOK_COST * rows[1]]
        return max(cheap, default=min(most, 1))

    def learn(self, tree: DraftTree, accepted: Accepted, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        """Enter what the round took and gave."""
        drafted, tokens = self._plan.nodes > 0, len(accepted.tokens)
        with self._costs.lock:
            self._learn_costs(tree, tokens, draft_ms, verify_ms, round_ms)
            if not accepted.finished:  # what follows an answer's last token was not asked for
                self._learn_lookups(accepted.tokens)
            if drafted and not accepted.finished:
                self._judge(tree, accepted)
                self._learn_nodes(tree, accepted)
            elif not drafted:
                self._experience.wait -= tokens
                self._experience.unverified += 1

    def _levels_grown(self) -> int:
        if self._on_host and len(self._times) > 1:
            return len(self._times) - 1 + self._went_on
        return self._plan.levels

    def _learn_costs(self, tree: DraftTree, tokens: int, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        costs = self._costs
        costs.learn_verify(tree.num_nodes + 1, self._context, verify_ms)
        costs.learn_rest(tree.num_nodes > 0, tokens, round_ms - draft_ms - verify_ms)
        if self._plan.nodes:
            levels, level_ms = self._levels_grown(), None
            if len(self._times) > 2:
                level_ms = 1e3 * (self._times[-1] - self._times[1]) / (len(self._times) - 2)
            costs.learn_draft(self._waiting, levels, draft_ms, level_ms)

    def _judge(self, tree: DraftTree, accepted: Accepted) -> None:
        """Compare this round with one without the draft; pause it when it does not pay, resume when a look says so."""
        experience, costs, plain, tokens = self._experience, self._costs, self._plain_pace(), len(accepted.tokens)
        extra = costs.tree.value if tree.num_nodes else 0.0
        ms = costs.draft_ms(self._levels_grown()) + float(self._rows[tree.num_nodes + 1]) + costs.overhead.value + extra
        experience.tokens, experience.ms = _PACE * experience.tokens + tokens, _PACE * experience.ms + ms
        experience.proof = _PROOF * experience.proof + tokens - ms * plain - self._alone
        experience.proofs = _PROOF * experience.proofs + 1
        advantage = self._expected - ms * plain - self._alone
        if self._forced:
            return
        experience.nodes = _TREND * experience.nodes + (1 - _TREND) * self._own
        if self._looks:
            if advantage > 0 and any(0 < node <= self._own for node in accepted.path):
                experience.pause, experience.advantage = 0, advantage
                experience.proof = experience.proofs = 0.0
            else:
                experience.pause = min(2 * experience.pause, self._longest_pause(ms * plain - 1.0))
                experience.wait = experience.pause
            return
        before = advantage if experience.advantage is None else experience.advantage
        experience.advantage = _TREND * before + (1 - _TREND) * advantage
        if experience.advantage < 0 or (experience.proofs > _PROVEN and experience.proof < 0):
            experience.pause = experience.wait = _SHORTEST_PAUSE

    @staticmethod
    def _longest_pause(look: float) -> int:
        """Tokens between looks that cost `look` tokens' time each more than plain rounds."""
        return max(_LONGEST_PAUSE, int(look / _LOOK_SHARE))

    def _learn_nodes(self, tree: DraftTree, accepted: Accepted) -> None:
        """Enter which of the draft's children of accepted nodes were accepted."""
        if self._own:
            experience, own = self._experience, slice(self._own)
            kept = np.zeros(tree.num_nodes + 1, dtype=bool)
            kept[list(accepted.path)] = True
            log_probs, ranks, depths, parents = (values[own] for values in nodes_of(tree))
            tried = kept[parents]
            experience.acceptance.learn(
                log_probs[tried], ranks[tried], depths[tried], kept[1:][own][tried], 1 + experience.unverified
            )
            experience.unverified = 0

    def _learn_lookups(self, tokens: Sequence[int]) -> None:
        """Compare what was looked up with what came, verified or not."""
        right: list[bool] = []
        for looked_up, token in zip(self._found.tokens, tokens, strict=False):
            right.append(looked_up == token)
            if not right[-1]:
                break
        if right:
            count, kind = len(right), match_class(self._found.match)
            log_probs, ranks = np.full(count, _LOOKED_UP[kind]), np.full(count, kind)
            self._experience.lookups.learn(log_probs, ranks, np.arange(1, count + 1), np.array(right))


def _within(shape: TreeShape, most: TreeShape) -> TreeShape:
    """The part of `shape` that `most` allows."""
    if shape.nodes == 0 or most.nodes == 0:
        return TreeShape(0, 0, most.top_k)
    return TreeShape(min(shape.nodes, most.nodes), min(shape.depth, most.depth), min(shape.top_k, most.top_k))
