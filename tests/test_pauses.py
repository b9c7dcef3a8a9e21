"""When the draft rests and looks again, by numbers alone."""

from __future__ import annotations

import copy
import pickle

import pytest

from hf_dovetail.experience import Experience
from hf_dovetail.pauses import LOOK_NODES, Pauses, longest_pause, look_nodes


def paused() -> Pauses:
    """After a usual round that did not pay."""
    pauses = Pauses()
    pauses.judge(-0.1)
    return pauses


def test_pauses_double_while_looks_fail_and_end_with_one_that_pays() -> None:
    pauses, lengths = paused(), []
    for _ in range(6):
        lengths.append(pauses.length)
        pauses.pass_over(pauses.length + 1)
        assert pauses.wait == -1
        pauses.judge_look(0.3, right=False, cost=0.1)
        assert pauses.wait == pauses.length
    assert lengths == [4, 8, 16, 32, 64, 64]
    pauses.judge_look(-0.3, right=True, cost=0.1)
    assert pauses.length == 64
    pauses.proof, pauses.proofs = -5.0, 30.0
    pauses.judge_look(0.3, right=True, cost=0.1)
    assert (pauses.length, pauses.advantage, pauses.proof, pauses.proofs) == (0, 0.3, 0.0, 0.0)


def test_dear_looks_are_seldom() -> None:
    """Looks take at most a fiftieth of the time, whatever one costs."""
    assert [longest_pause(cost) for cost in (-0.5, 0.0, 1.0, 1.28, 4.0)] == [64, 64, 64, 64, 200]
    pauses = paused()
    for _ in range(9):
        pauses.judge_look(-1.0, right=True, cost=4.0)
    assert pauses.length == 200


def test_one_bad_round_does_not_stop_trees_that_paid() -> None:
    pauses = Pauses()
    for advantage in (1.0, 1.0, -2.0):
        pauses.judge(advantage)
    assert pauses.length == 0
    pauses.judge(-2.0)
    assert pauses.length == pauses.wait == 4


@pytest.mark.parametrize(("rounds", "pauses_now"), [(20, False), (40, True)])
def test_promises_that_are_not_kept_end_in_a_pause(rounds: int, pauses_now: bool) -> None:
    """Guards a draft that always expects to win and never does: after some twenty rounds what came counts."""
    pauses = Pauses()
    for _ in range(rounds):
        pauses.enter(1, 12.0, plain=0.1, alone=0.0)
        pauses.judge(0.5)
    assert (pauses.length > 0) == pauses_now


def test_what_lookup_wins_by_itself_is_no_merit_of_the_draft() -> None:
    proofs = []
    for alone in (0.0, 2.0):
        pauses = Pauses()
        pauses.enter(3, 12.0, plain=0.1, alone=alone)
        proofs.append(pauses.proof)
    assert proofs == pytest.approx([1.8, -0.2])


def test_a_new_answer_is_looked_into_early_where_that_is_cheap() -> None:
    for remaining, wait in ((10, 50), (1000, 4)):
        pauses = Pauses()
        pauses.length = pauses.wait = 50
        pauses.shorten(look_ms=5.0, remaining=remaining, plain_ms=10.0)
        assert (pauses.wait, pauses.length) == (wait, 50)
        pauses.wait = 2
        pauses.shorten(look_ms=5.0, remaining=remaining, plain_ms=10.0)
        assert pauses.wait == 2


def test_time_is_worth_at_least_what_plain_decoding_makes_of_it() -> None:
    pauses = Pauses()
    assert pauses.pace(0.1) == pytest.approx(0.1)
    for tokens, pace in ((1, 0.1), (5, 0.4)):
        for _ in range(200):
            pauses.enter(tokens, 12.0, plain=0.1, alone=0.0)
        assert pauses.pace(0.1) == pytest.approx(pace, abs=0.02)


def test_a_look_verifies_what_is_cheap_and_never_nothing() -> None:
    flat, steep = [10.0] * 33, [10.0 * max(rows, 1) for rows in range(33)]
    stairs = [10.0] * 5 + [20.0] * 28
    assert [look_nodes(flat, most) for most in (0, 1, 3, 31)] == [0, 1, 3, LOOK_NODES]
    assert [look_nodes(steep, most) for most in (0, 1, 31)] == [0, 1, 1]
    assert look_nodes(stairs, 31) == 3


def test_experience_is_copied_whole_and_shares_nothing() -> None:
    """Guards what is kept between calls: a copy is worth as much, and goes its own way."""
    experience = Experience()
    experience.pauses.judge(-1.0)
    experience.depths.learn({1: 0.5}, 20)
    for other in (copy.deepcopy(experience), pickle.loads(pickle.dumps(experience))):
        assert (other.pauses.length, other.depths.gains) == (4, experience.depths.gains)
        other.pauses.judge_look(1.0, right=True, cost=0.0)
        other.depths.learn({1: 9.0, 2: 9.5}, 20)
        other.depths.learn_retention(1, 1.0, 0.1)
    assert (experience.pauses.length, list(experience.depths.gains)) == (4, [1])
    assert experience.depths.retention(1) == experience.depths.retention(2)
