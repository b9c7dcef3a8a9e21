"""The choice of a tree, without a clock: against brute force on recorded rounds, on machines made up of numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from fixed_costs import FixedCosts, verify_ms
from machines import MACHINES, ROWS, machine
from texts import humaneval_prompts

from hf_dovetail import TreeShape
from hf_dovetail.accept import Accepted
from hf_dovetail.acceptance import Acceptance, corrected
from hf_dovetail.controller import PROBE, AutoController, Found
from hf_dovetail.costs import WINDOW, Costs, Estimate, straight_line
from hf_dovetail.curves import ROW_POINTS, CostCurves
from hf_dovetail.decode import Round
from hf_dovetail.demo import load_pair
from hf_dovetail.experience import LARGEST, Experience
from hf_dovetail.tree import DraftTree
from hf_dovetail.worth import gains_of, nodes_of, sums_of


@dataclass(frozen=True)
class Recorded:
    """One round of the pair in the package: everything it drafted in 11 levels, and what was right of it."""

    tree: DraftTree
    right: frozenset[int]

    def grown(self, levels: int, scores: np.ndarray) -> DraftTree:
        """What a draft that stops after so many levels proposes; tokens are the nodes' numbers in `tree`.

        Args:
            scores: (C,) of all of the tree's nodes.
        """
        tree = self.above(levels)
        return tree.trimmed(LARGEST.nodes, scores[tree.tokens.numpy()[:, 1:] - 1])

    @cache  # noqa: B019  few rounds, for the length of the tests
    def above(self, levels: int) -> DraftTree:
        """The part of `tree` that so many levels find."""
        kept = (self.tree.depths[0] <= levels).nonzero().flatten()
        places = torch.zeros(self.tree.num_nodes + 1, dtype=torch.long)
        places[kept] = torch.arange(len(kept))
        parents = self.tree.parents[0][kept]
        parents = torch.where(parents < 0, parents, places[parents.clamp(min=0)])
        return DraftTree(kept[None], parents[None], self.tree.log_probs[:, kept])

    def path(self, tree: DraftTree) -> tuple[int, ...]:
        return tuple(place for place, node in enumerate(tree.tokens[0].tolist()) if node in self.right)


@pytest.fixture(scope="module")
def records() -> dict[str, list[Recorded]]:
    """Rounds of real text: greedy ones, in which the draft is good, and sampled ones, in which it is not."""
    target, draft, tokenizer = load_pair()
    draft.draft_device, draft.tree = "cpu", TreeShape(nodes=150, depth=10, top_k=10)
    prompts, records = humaneval_prompts()[5::20], {}
    for kind in ("greedy", "sampled"):
        rounds: list[Round] = []
        draft.watch = rounds.append
        for seed, prompt in enumerate(prompts):
            torch.manual_seed(seed)
            length = {"max_new_tokens": 110, "min_new_tokens": 110, "do_sample": kind == "sampled"}
            target.generate(**tokenizer(prompt, return_tensors="pt"), assistant_model=draft, **length)
        full = [r for r in rounds if r.tree.num_nodes > 60 and not r.accepted.finished]
        assert len(full) > 80
        records[kind] = [Recorded(r.tree, frozenset(r.accepted.path)) for r in full]
    return records


@pytest.fixture
def recorded(records: dict[str, list[Recorded]]) -> list[Recorded]:
    """The greedy ones."""
    return records["greedy"]


def round_ms(curves: CostCurves, levels: int, nodes: int) -> float:
    return (curves.first_ms + (levels - 1) * curves.level_ms if levels else 0.0) + verify_ms(curves, nodes + 1, 0)


def brute_force(rounds: list[Recorded], curves: CostCurves) -> float:
    """Tokens per ms of the best fixed shape: every depth, every number of nodes, knowing all rounds."""
    best = 1 / verify_ms(curves, 1, 0)
    for levels in range(1, LARGEST.levels + 1):
        trees = [r.grown(levels, r.tree.log_probs.numpy()[0, 1:]) for r in rounds]
        hits = np.zeros(LARGEST.nodes + 1)
        for r, tree in zip(rounds, trees, strict=True):
            order = torch.argsort(tree.log_probs[0, 1:], descending=True, stable=True).tolist()
            right = [tree.tokens[0, place + 1].item() in r.right for place in order]
            hits += np.cumsum([1, *right, *[0] * (LARGEST.nodes - len(right))])
        for nodes in range(1, LARGEST.nodes + 1):
            best = max(best, hits[nodes] / (len(rounds) * round_ms(curves, levels, nodes)))
    return best


@dataclass
class Played:
    """What a controller did with the rounds."""

    tokens: int = 0
    ms: float = 0.0
    plain: int = 0
    nodes: int = 0
    levels: int = 0

    @property
    def pace(self) -> float:
        return self.tokens / self.ms


def play(
    rounds: list[Recorded], curves: CostCurves, experience: Experience, on_host: bool = True, remaining: int = 1000
) -> Played:
    """Let a controller size the trees of these rounds at these costs, as the loop would."""
    controller = AutoController(FixedCosts(curves), experience, on_host, clock=lambda: 0.0)
    played = Played()
    for r in rounds:
        shape = controller.plan(LARGEST, 0, 3, remaining)
        levels, tree = 0, DraftTree.root_only(torch.zeros(1, 1, dtype=torch.long))
        if shape.nodes:
            scores = sums_of(r.tree, gains_of(r.tree, controller.shifts))
            levels = 1 if on_host else shape.levels
            while on_host and levels < shape.levels:
                found = r.tree.depths.numpy()[0, 1:] == levels
                if not controller.keep_going(levels, scores[found].astype(np.float32)):
                    break
                levels += 1
            tree = r.grown(levels, scores)
        tree = controller.choose(tree, Found(), LARGEST)
        path = r.path(tree)
        controller.learn(tree, Accepted(path, path, False), 1.0, 1.0, 2.0)
        played.tokens += len(path)
        played.ms += round_ms(curves, levels, tree.num_nodes)
        played.plain += shape.nodes == 0
        played.nodes += tree.num_nodes
        played.levels += levels
    return played


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
@pytest.mark.parametrize(
    ("draft", "on_host", "share"),
    [
        ("fast", True, 0.97),
        ("medium", True, 0.97),
        ("slow", True, 0.97),
        ("fast", False, 0.93),
        ("medium", False, 0.85),
    ],
)
@pytest.mark.parametrize("name", MACHINES)
def test_as_fast_as_the_best_fixed_shape_that_brute_force_finds(
    name: str, draft: str, on_host: bool, share: float, kind: str, records: dict[str, list[Recorded]]
) -> None:
    """The sweep knows every outcome and has 341 shapes to choose from; the controller has two passes to learn.

    Chosen ahead, where growth cannot stop early, the depth is worth less. Plain decoding is hardly undercut ever.
    """
    recorded, curves, experience = records[kind], machine(name, draft), Experience()
    order = np.random.default_rng(0).permutation(len(recorded))
    mixed = [recorded[i] for i in order]
    first = play(mixed, curves, experience, on_host)
    later = play(mixed, curves, experience, on_host)
    best = brute_force(recorded, curves)
    assert later.pace > share * best, later.pace / best
    assert min(first.pace, later.pace) > 0.93 / verify_ms(curves, 1, 0)


def test_the_machine_decides_the_tree(recorded: list[Recorded]) -> None:
    """Guards a controller that ignores its curves: more rows where they are free, more levels where they are cheap."""
    nodes = {name: play(recorded, machine(name, "fast"), Experience()).nodes for name in MACHINES}
    assert nodes["flat"] > 1.5 * nodes["memory-bound"] > 1.5**2 * nodes["linear"] > 0
    assert nodes["every row costs a pass"] < 0.2 * len(recorded)
    levels = [play(recorded, machine("flat", draft), Experience()).levels for draft in ("fast", "medium", "slow")]
    assert levels[0] > levels[1] > levels[2] > 0


@pytest.mark.parametrize("draft", ["fast", "medium"])
@pytest.mark.parametrize("name", MACHINES)
def test_a_draft_that_is_never_right_is_left_alone(name: str, draft: str, recorded: list[Recorded]) -> None:
    """A confident draft whose every node is rejected: at least 0.93 of plain speed at first, 0.97 soon."""
    wrong = [Recorded(r.tree, frozenset({0})) for r in recorded]
    curves, experience = machine(name, draft), Experience()
    plain = 1 / verify_ms(curves, 1, 0)
    assert play(wrong, curves, experience).pace > 0.93 * plain
    play(wrong, curves, experience)
    later = play(wrong, curves, experience)
    assert later.pace > 0.97 * plain
    assert later.plain < len(wrong)  # it still looks
    assert later.plain > 0.9 * len(wrong) or round_ms(curves, 1, 1) < 1.02 / plain  # where trees cost something


def test_trees_come_back_when_the_draft_is_right_again(recorded: list[Recorded]) -> None:
    """Guards a back-off that never ends, and counts that forbid what would correct them."""
    curves, experience = machine("memory-bound", "medium"), Experience()
    wrong = [Recorded(r.tree, frozenset({0})) for r in recorded]
    for _ in range(3):
        play(wrong, curves, experience)
    assert experience.pauses.length >= 32
    for _ in range(6):
        last = play(recorded, curves, experience)
    assert experience.pauses.length == 0
    assert last.plain < 0.1 * len(recorded)
    assert last.pace > 0.95 * brute_force(recorded, curves)


def test_a_prompt_is_only_read_by_the_draft_for_an_answer_that_pays(recorded: list[Recorded]) -> None:
    """Guards short answers behind long prompts: catching up must not cost more than trees will save."""
    curves = machine("memory-bound", "fast")
    experience = Experience()
    play(recorded, curves, experience)
    for remaining, pays in ((4, False), (200, True)):
        controller = AutoController(FixedCosts(curves), experience)
        assert (controller.plan(LARGEST, 4000, 4000, remaining).nodes > 0) == pays


def forced(rows_ms: Callable[[int], float], rounds: int) -> list[tuple[int, int]]:
    """Of rounds on a machine without curves, the probes: which round, and nodes; no draft pays, so others are plain."""
    costs, found = Costs(None), []
    for turn in range(rounds):
        experience = Experience()
        experience.pauses.length = experience.pauses.wait = 10
        controller, before = AutoController(costs, experience, clock=lambda: 0.0), costs.probes
        shape = controller.plan(LARGEST, 0, 3, 100)
        if costs.probes > before and (shape.nodes or turn == 0):
            found.append((turn, shape.nodes))
        costs.learn_verify(shape.nodes + 1, 0, rows_ms(shape.nodes + 1))
    return found


def test_the_first_rounds_on_an_unknown_machine_probe_it() -> None:
    """Guards probes that waste passes: dear rows are seen twice, large trees once they cost 3 % of the time so far."""
    assert forced(lambda rows: 10.0, 10) == [(0, 0), (1, 7), (2, 16), (3, 31)]
    some = forced(lambda rows: 10.0 + 1.0 * (rows - 1), 200)
    assert [nodes for _, nodes in some] == [0, 7, 16, 31]
    assert [turn for turn, _ in some] == [0, 1, 53, 102]
    dear = forced(lambda rows: 10.0 * rows, 1000)
    assert dear[:3] == [(0, 0), (1, 7), (2, 7)]
    assert 400 < dear[3][0] < 600
    hiccup = iter([10.0, 400.0, *[10.0] * 100])
    assert forced(lambda rows: next(hiccup), 20)[:4] == [(0, 0), (1, 7), (2, 7), (3, 16)]


def test_no_probe_is_larger_than_what_may_be_verified_or_comes_where_curves_are_known() -> None:
    controller = AutoController(Costs(None), Experience(), clock=lambda: 0.0)
    assert controller.plan(TreeShape(5, 1, 3), 0, 3, 100).nodes == 0
    assert controller.plan(TreeShape(5, 1, 3), 0, 3, 100) == TreeShape(5, 1, 3)
    known = AutoController(Costs(machine("flat", "fast")), Experience(), clock=lambda: 0.0)
    assert known.plan(LARGEST, 0, 3, 100) == LARGEST


def test_a_chosen_tree_saves_a_probe() -> None:
    costs = Costs(None)
    for rows in (1, 8, 20):
        costs.learn_verify(rows, 0, 10.0)
    costs.probes = 2
    controller = AutoController(costs, Experience(), clock=lambda: 0.0)
    assert controller.plan(LARGEST, 0, 3, 100).nodes == 31  # 16 are known
    assert costs.probes == len(PROBE)


def test_the_opening_draws_a_line() -> None:
    """Beyond what was seen the line goes on; of a size the least time counts; one size alone follows the guess."""
    points = (1, 2, 8, 32)
    assert straight_line([(1, 10.0)], points) == pytest.approx((10.0, 10.15, 11.05, 14.65))
    for pair in ([(8, 50.0), (8, 17.0)], [(8, 17.0), (8, 50.0)]):
        assert straight_line([(1, 10.0), *pair], points) == pytest.approx((10.0, 11.0, 17.0, 41.0))
    assert straight_line([(1, 10.0), (8, 9.0)], points) == (10.0,) * 4
    assert straight_line([(2, 10.0), (8, 16.0)], points) == pytest.approx((10.0, 10.0, 16.0, 40.0))
    costs = Costs(None)
    for rows, ms in ((1, 10.0), (8, 24.0)):
        costs.learn_verify(rows, 0, ms)
    np.testing.assert_allclose(costs.table(0)[[1, 8, 32]], [10.0, 24.0, 72.0])


def learned_from(rounds: int, truth: Callable[[np.ndarray, np.ndarray], np.ndarray], says: np.ndarray) -> Acceptance:
    """Rounds of 30 children of accepted nodes, which are taken as often as `truth` of their ranks and depths says."""
    acceptance, rng = Acceptance(LARGEST.levels, LARGEST.top_k), np.random.default_rng(1)
    depths, ranks = np.repeat([1, 2, 3, 7, 20], 6), np.tile([0, 1, 2, 3, 4, 9], 5)
    for _ in range(rounds):
        acceptance.learn(np.log(says[ranks]), ranks, depths, rng.random(30) < truth(ranks, depths))
    return acceptance


SAYS = np.array([0.6, 0.15, 0.08, 0.05, 0.04, 0.03, 0.02, 0.01, 0.01, 0.01])
"""What a draft says of its choices by rank."""


@pytest.mark.parametrize("truth", [0.02, 0.3, 0.98])
def test_acceptance_converges_to_the_truth(truth: float) -> None:
    """Whatever the draft says of its first choice, what happens wins; those of other ranks keep their own rate."""
    start = Acceptance(LARGEST.levels, LARGEST.top_k).shifts
    assert not start.any()
    np.testing.assert_array_equal(corrected(np.log(SAYS), start[0]), np.log(SAYS))
    acceptance = learned_from(150, lambda ranks, depths: np.where(ranks == 0, truth, 0.01), SAYS)
    for level in (0, 1, 6, 19):
        found = np.exp(corrected(np.log(SAYS), acceptance.shifts[level]))
        assert found[0] == pytest.approx(truth, abs=0.08)
        assert found[1:].max() < 0.05
    assert np.all(np.diff(acceptance.shifts, axis=1) <= 0)


def test_a_first_choice_that_is_always_right_is_known_after_ten_rounds() -> None:
    """Guards slow learning: a small model that always agrees must soon be trusted with chains of 20 tokens."""
    acceptance = learned_from(10, lambda ranks, depths: ranks == 0, SAYS)
    assert np.exp(corrected(np.log(0.6), acceptance.shifts[:, 0])).min() > 0.9
    assert np.exp(corrected(np.log(SAYS[1]), acceptance.shifts[:, 1])).max() < 0.06


def test_acceptance_differs_by_depth() -> None:
    """A draft that is right at first and wrong when it looks further."""
    acceptance = learned_from(150, lambda ranks, depths: np.where(ranks == 0, np.where(depths == 1, 0.9, 0.3), 0), SAYS)
    found = np.exp(corrected(np.log(0.6), acceptance.shifts[:, 0]))
    assert found[0] > 0.75
    assert found[1:].max() < 0.5


def test_acceptance_forgets_and_takes_infinite_log_probs() -> None:
    acceptance, says = Acceptance(LARGEST.levels, LARGEST.top_k), np.log(np.full(8, 0.6))
    ranks, depths = np.zeros(8, dtype=int), np.ones(8, dtype=int)
    for truth in (False, True, False):
        for _ in range(60):
            acceptance.learn(says, ranks, depths, np.full(8, truth))
        assert abs(np.exp(corrected(says, acceptance.shifts[0, 0]))[0] - truth) < 0.35
    broken = np.array([-np.inf, 0.0, -1e4], dtype=np.float32)
    acceptance.learn(broken, ranks[:3], depths[:3], np.array([False, True, False]))
    found = np.exp(corrected(broken, acceptance.shifts[0, :3]))
    assert found == pytest.approx([0, 1, 0], abs=1e-5)
    assert np.isfinite(acceptance.shifts).all()


@pytest.mark.parametrize("seed", range(20))
def test_corrected_scores_keep_trees_whole(seed: int) -> None:
    """Guards what trimming stands on: no child above its parent, siblings in order; and the shift of rank and depth."""
    rng = np.random.default_rng(seed)
    parents = [-1]
    parents += [int(rng.integers(max(0, node - 9), node)) for node in range(1, 24)]
    log_probs, ranks = np.zeros(24, dtype=np.float32), [0] * 24
    for node in range(1, 24):
        ranks[node] = sum(parents[other] == parents[node] for other in range(1, node))
        log_probs[node] = log_probs[parents[node]] - rng.choice([0.0, 1e-7, 0.2]) - 0.5 * ranks[node]
    tree = DraftTree(torch.arange(24)[None], torch.tensor([parents]), torch.from_numpy(log_probs)[None])
    shifts = np.minimum.accumulate(rng.normal(0, 3, (24, 10)).astype(np.float32), axis=1)
    scores = np.concatenate(([0.0], sums_of(tree, gains_of(tree, shifts))))
    found, own_ranks, depths, _ = nodes_of(tree)
    assert own_ranks.tolist() == ranks[1:]
    for node in range(1, 24):
        parent, log_prob = parents[node], np.float64(found[node - 1])
        odds = log_prob - np.log(max(-np.expm1(log_prob), 1e-30)) + shifts[depths[node - 1] - 1, ranks[node]]
        assert scores[node] - scores[parent] == pytest.approx(-np.log1p(np.exp(-odds)), abs=1e-4)
        assert scores[node] <= scores[parent]
    for nodes in range(24):
        assert tree.trimmed(nodes, scores[None, 1:]).num_nodes == nodes


def test_costs_are_learned_from_rounds_and_a_hiccup_is_not() -> None:
    """From a guess to the machine's own curve; then one round that takes ten times as long."""
    costs, truth = Costs(None), machine("linear", "medium")
    for step in range(120):
        rows = (1, 8, 16, 4)[step % 4]
        costs.learn_verify(rows, 0, verify_ms(truth, rows, 0))
        costs.learn_draft(3, 5, truth.first_ms + 4 * truth.level_ms, truth.level_ms)
    before = costs.table(0).copy()
    np.testing.assert_allclose(before[[1, 4, 8, 16]], [verify_ms(truth, r, 0) for r in (1, 4, 8, 16)], rtol=0.03)
    assert costs.draft_ms(5) == pytest.approx(truth.first_ms + 4 * truth.level_ms, rel=0.03)
    costs.learn_verify(8, 0, 10 * verify_ms(truth, 8, 0))
    assert 1.0 < costs.table(0)[8] / before[8] < 1.06
    for _ in range(60):
        costs.learn_verify(8, 0, 3 * verify_ms(truth, 8, 0))
    assert costs.table(0)[8] == pytest.approx(3 * verify_ms(truth, 8, 0), rel=0.05)


def test_drift_is_noticed_and_rescaled_away() -> None:
    """Guards the rule: the median of 32 rounds outside 0.75 to 1.33; ten slow rounds among 32 are no drift."""
    curves = machine("memory-bound", "medium")
    costs = Costs(curves)
    for step in range(WINDOW):
        costs.learn_verify(8, 0, (5 if step < 10 else 1.1) * verify_ms(curves, 8, 0))
    assert costs.drift() is None
    for _ in range(WINDOW):
        costs.learn_verify(8, 0, 2 * verify_ms(curves, 8, 0))
    verify, draft = costs.drift()
    assert (verify, draft) == (pytest.approx(2), 1)
    costs.rescale(verify, draft)
    assert verify_ms(costs.curves, 1, 0) == pytest.approx(2 * verify_ms(curves, 1, 0))
    assert costs.curves.level_ms == curves.level_ms
    assert costs.drift() is None


def test_an_estimate_starts_with_what_it_sees() -> None:
    estimate = Estimate(0.0)
    estimate.learn(5.0)
    assert estimate.value == 5.0
    for _ in range(20):
        estimate.learn(5.0)
    estimate.learn(5000.0)
    assert estimate.value < 5.3


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": (2, 32)},
        {"rows": (1, 8)},
        {"rows": (1, 8, 8, 32)},
        {"contexts": ()},
        {"contexts": (5, 2)},
        {"verify": ((1.0, 2.0),)},
        {"verify": (tuple([0.0] * 7),)},
        {"verify": (tuple([float("nan")] * 7),)},
        {"level_ms": -1.0},
        {"first_ms": float("inf")},
    ],
)
def test_numbers_that_are_no_curves_are_refused(changes: dict) -> None:
    values = {"rows": ROW_POINTS, "contexts": (0,), "verify": (tuple([1.0] * 7),)}
    costs = {"first_ms": 1.0, "row_ms": 0.1, "level_ms": 0.5}
    assert verify_ms(CostCurves(**values, **costs), 32, 100) == 1.0
    with pytest.raises(ValueError, match=r"cost curves|time"):
        CostCurves(**{**values, **costs, **changes})


def test_curves_are_bilinear() -> None:
    line = tuple(float(rows) for rows in ROW_POINTS)
    curves = CostCurves(ROW_POINTS, (100, 200), (line, tuple(3 * x for x in line)), 1.0, 0.1, 0.5)
    assert [verify_ms(curves, rows, 100) for rows in (1, 3, 12, 32)] == [1, 3, 12, 32]
    assert [verify_ms(curves, 12, context) for context in (0, 150, 200, 300)] == [12, 24, 36, 60]


@pytest.mark.parametrize("nodes", [0, 1, 5, 11, 12, 40])
def test_the_best_nodes_of_a_tree_are_a_tree(nodes: int) -> None:
    """Guards parents that move, and ties: equally good nodes keep their order."""
    log_probs = torch.tensor([[0.0, -0.1, -0.5, -0.5, -0.5, -0.6, -2.0, -0.7, -0.9, -3.0, -4.0, -0.5, -9.0]])
    parents = torch.tensor([[-1, 0, 0, 1, 1, 3, 2, 5, 7, 6, 9, 3, 0]])
    tree = DraftTree(torch.arange(13)[None] + 50, parents, log_probs)
    small = tree.trimmed(nodes)
    kept = min(nodes, 12)
    assert small.num_nodes == kept
    order = sorted(range(1, 13), key=lambda node: -log_probs[0, node])[:kept]
    assert small.tokens[0].tolist() == [50] + [50 + node for node in sorted(order)]
    for node, parent in enumerate(small.parents[0].tolist()[1:], start=1):
        assert small.tokens[0, parent] - 50 == parents[0, small.tokens[0, node] - 50]
    assert small.log_probs[0].tolist() == [log_probs[0, token - 50].item() for token in small.tokens[0].tolist()]


@pytest.mark.parametrize(("retention", "goes_on"), [(0.95, True), (0.3, False)])
def test_a_level_more_is_tried_where_levels_have_kept_their_probability(retention: float, goes_on: bool) -> None:
    """A level costs 0.4 tokens here, and its parent has 0.9 of one: what past levels left of that decides."""
    experience = Experience()
    depths = experience.depths
    depths.kept = retention * depths.mass
    controller = AutoController(Costs(CostCurves(ROWS, (0,), ((10.0,) * len(ROWS),), 0.1, 0.01, 4.0)), experience)
    controller.plan(LARGEST, 100, 1, 100)
    assert controller.keep_going(1, np.log([0.9], dtype=np.float32)) is goes_on
    before = depths.retention(1)
    controller.keep_going(2, np.log([0.45], dtype=np.float32))
    assert abs(depths.retention(1) - 0.5) < abs(before - 0.5)
    assert depths.retention(2) == before
