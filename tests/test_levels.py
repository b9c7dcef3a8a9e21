"""A round in fixed shapes, as a graph would hold it, against the host's; and who may use a draft's kept buffers."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from sessions import COMMITS, Answer, assert_same, made, replaying
from torch import Tensor
from trees import eagle_2, features_of, from_scratch, paths

from hf_dovetail import TreeShape, graphs, rows
from hf_dovetail.draft import DraftSession
from hf_dovetail.tree import DraftTree


@pytest.mark.parametrize("shape", [TreeShape(12, 3, 3), TreeShape(4, 6, 1), TreeShape(9, 0, 9), TreeShape(16, 7, 10)])
@pytest.mark.parametrize(("family", "blocks"), [("llama", 2), ("gemma2", 1), ("gpt2", 3)])
def test_fixed_shapes_grow_the_hosts_tree(
    family: str, blocks: int, shape: TreeShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards padding, masks over an extent, positions and buffers that grow, with replays in between."""
    monkeypatch.setattr(rows, "EXTENT", 16)
    target, draft = made("dgf", family, blocks)
    answer, shapes = Answer(target, draft), [shape] * len(COMMITS)
    expected = answer.rounds(DraftSession(draft, sharpness=1.7), shapes)
    fixed = DraftSession(draft, on_host=False, sharpness=1.7)
    log = replaying(fixed, monkeypatch)
    found = answer.rounds(fixed, shapes)
    assert_same(found, expected)
    blunt = answer.rounds(DraftSession(draft), shapes)
    assert any(not torch.equal(one.log_probs, other.log_probs) for one, other in zip(blunt, expected, strict=True))
    assert fixed._rounds._bench.buffer.capacity > 64
    assert not log or log[0] == "capture"
    last = eagle_2(from_scratch(draft, answer.ids, answer.features[:, :-1], sharpness=1.7), shape)
    assert set(paths(found[-1])) == set(last)
    assert len({str(tree.tokens.tolist()) for tree in found}) > 1


@pytest.mark.parametrize("kind", ["dgf", "lm"])
def test_corrections_change_the_tree_alike_on_host_and_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards corrections that a graph would not see: other ones in every round, from the same captured kind.

    Zero ones change nothing; strong ones give the chain of first choices, whatever the draft is sure of.
    """
    target, draft = made(kind, "llama", 1)
    answer, shapes, rng = Answer(target, draft), [TreeShape(12, 5, 4)] * len(COMMITS), np.random.default_rng(0)
    if kind == "lm":
        answer.features = None
    shifts = [np.sort(rng.normal(0, 2, (20, 10)))[:, ::-1].astype(np.float32).copy() for _ in COMMITS]
    expected = answer.rounds(DraftSession(draft), shapes, shifts)
    plain = answer.rounds(DraftSession(draft), shapes)
    device = DraftSession(draft, on_host=False)
    log = replaying(device, monkeypatch)
    assert_same(answer.rounds(device, shapes, shifts), expected)
    assert log.count("capture") == 1
    assert sum(one.tokens.tolist() != other.tokens.tolist() for one, other in zip(plain, expected, strict=True)) > 5
    assert_same(answer.rounds(DraftSession(draft), shapes, [np.zeros((20, 10), np.float32)] * len(COMMITS)), plain)
    certain = np.concatenate((np.full((20, 1), 20.0), np.full((20, 9), -20.0)), axis=1).astype(np.float32)
    for tree in answer.rounds(DraftSession(draft), shapes, [certain] * len(COMMITS)):
        assert int(tree.depths.max()) == 6


def test_a_round_is_replayed_and_a_second_answer_reuses_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what a graph holds on to: data of the first answer must not show in the second, which captures nothing."""
    target, draft = made("dgf", "llama", 2)
    shapes = [TreeShape(12, 3, 3)] * len(COMMITS)
    first = DraftSession(draft, on_host=False)
    log = replaying(first, monkeypatch)
    answers = [Answer(target, draft, seed) for seed in (3, 8)]
    expected = [answer.rounds(DraftSession(draft), shapes) for answer in answers]
    assert_same(answers[0].rounds(first, shapes), expected[0])
    assert log == ["capture"] + ["replay"] * (len(COMMITS) - 2)
    buffer = draft.pool.bench.buffer.states.data_ptr()
    del first
    second = DraftSession(draft, on_host=False)
    assert_same(answers[1].rounds(second, shapes), expected[1])
    assert log.count("capture") == 1
    assert log.count("replay") == 2 * len(COMMITS) - 2
    assert draft.pool.bench.buffer.states.data_ptr() == buffer
    assert [tree.tokens.tolist() for tree in expected[0]] != [tree.tokens.tolist() for tree in expected[1]]


def test_an_answer_that_is_sampled_does_not_replay_the_graphs_of_a_greedy_one(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = made("dgf", "llama", 2)
    answer, shapes = Answer(target, draft), [TreeShape(12, 3, 3)] * len(COMMITS)
    for sharpness in (1.7, 1.0):
        session = DraftSession(draft, on_host=False, sharpness=sharpness)
        log = replaying(session, monkeypatch)
        assert_same(answer.rounds(session, shapes), answer.rounds(DraftSession(draft, sharpness=sharpness), shapes))
        assert log.count("capture") == 1
        del session


def test_two_sessions_at_once_have_buffers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards one draft in two threads: their rounds may come in any order."""
    target, draft = made("dgf", "llama", 1)
    one, two = (DraftSession(draft, on_host=False) for _ in range(2))
    assert one._rounds._bench is draft.pool.bench is not two._rounds._bench
    replaying(one, monkeypatch)
    two._rounds._bench.captures = False
    shape, answers, trees = TreeShape(8, 3, 4), [Answer(target, draft, seed) for seed in (3, 8)], [[], []]
    for session, answer in zip((one, two), answers, strict=True):
        session.begin(answer.ids[:, :1], 0)
    for turn in range(len(COMMITS)):
        for session, answer, grown in zip((one, two), answers, trees, strict=True):
            grown.append(answer.round(session, turn, shape))
    for answer, grown in zip(answers, trees, strict=True):
        assert_same(grown, answer.rounds(DraftSession(draft), [shape] * len(COMMITS)))
    del one, session
    gc.collect()
    assert not draft.pool.taken


def test_kept_graphs_are_dropped_when_the_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards addresses: a graph reads the weights where they lay, also when the draft has left."""
    target, draft = made("dgf", "llama", 1)
    kept = DraftSession(draft, on_host=False)._rounds._bench
    assert DraftSession(draft, on_host=False)._rounds._bench is kept
    draft.to(torch.float32).meet(target)
    moved = DraftSession(draft, on_host=False)._rounds._bench
    assert moved is not kept
    assert moved.buffer.states.dtype == torch.float32
    for other in (copy.deepcopy(draft), pickle.loads(pickle.dumps(draft))):
        assert other.pool.bench is None
        assert other.pool is not draft.pool


def test_a_failed_capture_costs_nothing_but_the_graph(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Guards the way back: capturing is tried once, and every tree is there all the same."""
    target, draft = made("dgf", "llama", 1)
    answer, shapes = Answer(target, draft), [TreeShape(8, 3, 4)] * len(COMMITS)
    session, tried = DraftSession(draft, on_host=False), []

    def capture(*args: object) -> None:
        tried.append(True)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    session._rounds._bench.captures = True
    assert_same(answer.rounds(session, shapes), answer.rounds(DraftSession(draft), shapes))
    assert len(tried) == 1


def test_an_overflow_in_a_tree_does_not_outlive_it() -> None:
    """Guards rows that are masked, not absent: zero times NaN is NaN."""
    target, draft = made("dgf", "llama", 2)
    answer, shape = Answer(target, draft), TreeShape(8, 3, 4)
    expected = answer.rounds(DraftSession(draft), [shape] * 3)
    session, sound = DraftSession(draft, on_host=False), draft.step

    def overflowing(tokens: Tensor, hidden: Tensor, *rest: Any) -> Tensor:
        return sound(tokens, hidden * float("nan") if tokens.shape[1] == 4 else hidden, *rest)

    session.begin(answer.ids[:, :1], 0)
    draft.step = overflowing
    assert answer.round(session, 0, shape).num_nodes == 8
    del draft.step
    assert_same([answer.round(session, turn, shape) for turn in (1, 2)], expected[1:])


@pytest.mark.parametrize("kind", ["dgf", "lm"])
def test_the_expansion_stops_when_it_is_told_to(kind: str) -> None:
    """Guards `keep_going`: what it sees after each level, and the tree of the levels done."""
    target, draft = made(kind, "llama")
    ids = tiny.prompt(12)
    features = features_of(target, ids)[:, :-1] if kind == "dgf" else None
    seen: list[tuple[int, np.ndarray]] = []

    def grown(shape: TreeShape, keep_going: Any = None, on_host: bool = True) -> DraftTree:
        session = DraftSession(draft, on_host=on_host)
        session.begin(ids[:, :1], 0)
        session.commit(ids[:, 1:], features)
        return DraftTree.unpack(ids[:, -1:], session.grow(shape, keep_going))

    def twice(level: int, scores: np.ndarray) -> bool:
        seen.append((level, scores))
        return level < 2

    shape = TreeShape(12, 3, 2)
    tree = grown(shape, twice)
    assert [level for level, _ in seen] == [1, 2]
    assert [scores.shape for _, scores in seen] == [(2,), (4,)]
    assert all(scores.dtype == np.float32 for _, scores in seen)
    assert np.concatenate([scores for _, scores in seen]) == pytest.approx(tree.log_probs[0, 1:].numpy(), abs=1e-6)
    assert_same([tree], [grown(TreeShape(12, 1, 2))])
    assert int(grown(shape).depths.max()) > 2
    assert_same([grown(shape, lambda *_: True)], [grown(shape)])
    seen.clear()
    grown(shape, twice, on_host=False)
    assert not seen
