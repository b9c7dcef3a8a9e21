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
from .depths import depths_within
from .experience import LARGEST, Experience
from .levels import KeepGoing
from .lookup import SAYS, match_class
from .pauses import LOOK_NODES, look_nodes
from .tree import DraftTree
from .worth import deeper_pays, gains_of, nodes_of, sums_of, worths_by_levels

PROBE = (TreeShape(0), TreeShape(7, 4, 10), TreeShape(7, 4, 10), TreeShape(), TreeShape(MAX_ROWS - 1, 10, 10))
"""Rounds that show what they cost on a machine without curves, and decode like any other: two at once; the second again
if it was dear, which a hiccup may have been; the larger ones once the time spent so far makes them cheap, unless a tree
of that size was chosen meanwhile."""

_AGAIN, _DEAR = 2, 2.0  # which probe is a repetition, and how many plain rounds make the one before it dear
_PROBE_SHARE = 0.03  # of the time of all verifications so far that a larger probe may cost

_SPARE_NODES = (1.5, 4)  # times and plus what was verified of late: a smaller tree has narrower levels
_SIZE_TREND = 0.8  # share of that which a tree leaves
_LOOKAHEAD = 3  # levels that the next one is judged together with
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


class _Growth:
    """A tree on the host while it grows.

    Attributes:
        best: (C,) chances of its best nodes so far, surest first, as many as can be verified.
        mass: probability of the last level, as far as it can be expanded.
        goes_on: whether another level was wanted.
    """

    def begin(self, now: float) -> None:
        self._times, self.best, self.mass, self.goes_on = [now], np.zeros(0), 0.0, False

    def add(self, scores: np.ndarray, now: float) -> np.ndarray:
        """Enter a level's scores (C,); the chances of the nodes that the next one may expand, surest first."""
        self._times.append(now)
        chances = np.exp(np.sort(scores)[: -MAX_ROWS - 1 : -1])
        self.best = np.sort(np.concatenate((self.best, chances)))[:-MAX_ROWS:-1]
        frontier = chances[: LARGEST.top_k]
        self.mass = float(frontier.sum())
        return frontier

    @property
    def levels(self) -> int:
        """Levels grown; 0 if nobody asked after each of them."""
        return len(self._times) - 1 + self.goes_on

    @property
    def level_ms(self) -> float | None:
        """Of a level behind the first, if that was timed."""
        levels = len(self._times) - 2
        return 1e3 * (self._times[-1] - self._times[1]) / levels if levels > 0 else None


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
        self._growth, self._expected = _Growth(), 1.0
        self._found, self._own, self._alone = Found(), 0, 0.0

    def plan(self, most: TreeShape, context: int, waiting: int, remaining: int) -> TreeShape:
        """The shape to grow in this round; no nodes: decode plainly."""
        experience = self._experience
        self._context, self._waiting, self._forced = context, waiting, False
        with self._costs.lock:
            self.shifts = experience.acceptance.shifts
            if self._starts:
                self._begin_answer(waiting, remaining)
            self._looks = experience.pauses.length > 0
            probe = self._probe() if most.nodes else None
            if probe is not None:
                self._forced, self._plan = True, probe.within(most)
            elif most.nodes == 0 or experience.pauses.wait > 0:
                self._plan = TreeShape(0, 0, most.top_k)
            else:
                self._plan = self._free(most, waiting, remaining)
            self._looks = self._looks and self._plan.nodes > 0
            self._open()
            return self._plan

    def _begin_answer(self, waiting: int, remaining: int) -> None:
        """Look early, if that costs little."""
        self._starts, costs, rows = False, self._costs, self._costs.table(self._context)
        look_ms = waiting * costs.row.value + costs.draft_ms(1) + float(rows[LOOK_NODES + 1] - rows[1])
        self._experience.pauses.shorten(look_ms, remaining, costs.plain_ms(self._context))

    def _probe(self) -> TreeShape | None:
        """The next probe, if it is time for one."""
        costs = self._costs
        while not costs.measured and costs.probes < len(PROBE):
            turn, shape, rows = costs.probes, PROBE[costs.probes], costs.table(self._context)
            plain_ms, ms = rows[1], rows[shape.nodes + 1]
            if turn > _AGAIN and ms - plain_ms > _PROBE_SHARE * costs.verified_ms:
                return None
            costs.probes += 1
            needless = ms < _DEAR * plain_ms if turn == _AGAIN else turn > _AGAIN and costs.most_rows > shape.nodes
            if not needless:
                return shape
        return None

    def _free(self, most: TreeShape, waiting: int, remaining: int) -> TreeShape:
        """What to grow when nothing forbids it."""
        plain, pace = self._plain_pace(), self._pace()
        if waiting > 2 * MAX_ROWS and self._experience.pauses.ms:  # a prompt: will the answer make up for reading it?
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
        self._prices = self._price * self._rows[1:]  # in tokens, of verifying 0, 1, 2, ... nodes
        self._growth.begin(self._clock())
        self._expected = 1.0

    def _plain_pace(self) -> float:
        return 1 / self._costs.plain_ms(self._context)

    def _pace(self) -> float:
        """Tokens per ms that time is worth."""
        return self._experience.pauses.pace(self._plain_pace())

    def _levels_ahead(self, most: int, price: float) -> int:
        level_ms, plain_ms = self._costs.level.value, self._costs.plain_ms(self._context)
        levels, self._usual = self._experience.depths.plan(most, price, level_ms, plain_ms, not self._looks)
        return levels

    def _keep_going(self, level: int, scores: np.ndarray) -> bool:
        growth, before = self._growth, self._growth.mass
        frontier = growth.add(scores, self._clock())
        if before > 0:
            with self._costs.lock:
                self._experience.depths.learn_retention(level - 1, before, growth.mass)
        growth.goes_on = level < self._plan.levels and (self._forced or self._pays(level, frontier))
        return growth.goes_on

    def _pays(self, level: int, frontier: np.ndarray) -> bool:
        """Whether one of the next levels is expected to be worth more than the time until it is there."""
        beyond = range(level, min(level + _LOOKAHEAD, self._plan.levels))
        kept = map(self._experience.depths.retention, beyond)
        return deeper_pays(self._growth.best, frontier, kept, self._prices, self._price * self._costs.level.value)

    def choose(self, tree: DraftTree, found: Found, most: TreeShape) -> DraftTree:
        """The nodes that are worth their verification, the draft's and those that were looked up."""
        drafted = tree.num_nodes
        self._found = found = Found() if self._forced else found
        gains = gains_of(tree, self.shifts)
        if self._plan.nodes and not self._on_host:
            levels = depths_within(self._plan.levels)
            worths = worths_by_levels(tree, sums_of(tree, gains), self._prices, levels)
            with self._costs.lock:
                self._experience.depths.learn(worths, self._usual)
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
        values = np.concatenate(((0.0,), chances.cumsum())) - self._prices[: len(chances) + 1]
        nodes = int(values.argmax())
        return max(nodes, look_nodes(self._rows, len(chances))) if self._looks else nodes

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
                self._experience.pauses.pass_over(tokens)
                self._experience.unverified += 1

    def _levels_grown(self) -> int:
        return self._growth.levels or self._plan.levels

    def _learn_costs(self, tree: DraftTree, tokens: int, draft_ms: float, verify_ms: float, round_ms: float) -> None:
        costs = self._costs
        costs.learn_verify(tree.num_nodes + 1, self._context, verify_ms)
        costs.learn_rest(tree.num_nodes > 0, tokens, round_ms - draft_ms - verify_ms)
        if self._plan.nodes:
            costs.learn_draft(self._waiting, self._levels_grown(), draft_ms, self._growth.level_ms)

    def _judge(self, tree: DraftTree, accepted: Accepted) -> None:
        """Compare this round with one without the draft; pause it when it does not pay, resume when a look says so."""
        experience, costs, plain = self._experience, self._costs, self._plain_pace()
        extra = costs.tree.value if tree.num_nodes else 0.0
        ms = costs.draft_ms(self._levels_grown()) + float(self._rows[tree.num_nodes + 1]) + costs.overhead.value + extra
        experience.pauses.enter(len(accepted.tokens), ms, plain, self._alone)
        if self._forced:
            return
        experience.nodes = _SIZE_TREND * experience.nodes + (1 - _SIZE_TREND) * self._own
        advantage = self._expected - ms * plain - self._alone
        if self._looks:
            right = any(0 < node <= self._own for node in accepted.path)
            experience.pauses.judge_look(advantage, right, ms * plain - 1.0)
        else:
            experience.pauses.judge(advantage)

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
