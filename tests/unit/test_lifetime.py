"""How likely a cached block is to be used again: known processes, and any history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.kv.lifetime import EDGES_US, LifetimePredictor, kind_of

S = 1_000_000
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 20), min_size=1, max_size=5, unique=True),
        st.integers(-10 * S, 200 * S) | st.integers(0, 10**12),
    ),
    max_size=30,
)


def after(requests: list[tuple[list[int], int]], predictor: LifetimePredictor) -> int:
    """Feed the requests, each so long after the one before; when the last one was."""
    now_us = 0
    for blocks, gap_us in requests:
        now_us += gap_us
        predictor.used(blocks, now_us)
    return now_us


@given(requests=REQUESTS, within_us=st.integers(0, 10**13), wait_us=st.integers(0, 10**12))
def test_an_answer_is_a_probability_and_grows_with_the_time_that_is_asked_about(
    requests: list[tuple[list[int], int]], within_us: int, wait_us: int
) -> None:
    predictor = LifetimePredictor()
    now_us = after(requests, predictor) + wait_us
    shorter = predictor.reuse_probability(range(25), now_us, within_us)
    longer = predictor.reuse_probability(range(25), now_us, 2 * within_us + 1)
    assert shorter.shape == (25,)
    assert ((shorter >= 0) & (longer <= 1) & (shorter <= longer)).all()
    assert (predictor.reuse_probability(range(25), now_us, 0) == 0).all()


@given(requests=REQUESTS)
def test_the_same_history_gives_the_same_answers(requests: list[tuple[list[int], int]]) -> None:
    answers = []
    for _ in range(2):
        predictor = LifetimePredictor()
        now_us = after(requests, predictor)
        answers.append(predictor.reuse_probability(range(25), now_us, 60 * S).tolist())
    assert answers[0] == answers[1]


@given(requests=REQUESTS, most=st.integers(1, 8))
def test_no_more_blocks_are_followed_than_allowed(
    requests: list[tuple[list[int], int]], most: int
) -> None:
    predictor = LifetimePredictor(max_blocks=most)
    for blocks, gap_us in requests:
        predictor.used(blocks, gap_us)
        assert len(predictor) == len(list(predictor.followed())) <= most


def test_without_any_history_nothing_is_expected() -> None:
    predictor = LifetimePredictor()
    assert predictor.reuse_probability([1, 2], now_us=0, within_us=S).tolist() == [0, 0]
    assert predictor.reuse_probability([], now_us=5, within_us=S).tolist() == []


def test_the_block_that_has_waited_longest_is_given_up_first() -> None:
    predictor = LifetimePredictor(max_blocks=2)
    for second, block in enumerate((1, 2, 1, 3)):
        predictor.used([block], second * 60 * S)
    assert sorted(predictor.followed()) == [1, 3]


def test_a_block_that_was_forgotten_is_judged_like_any_other() -> None:
    predictor = LifetimePredictor()
    for second in range(100):
        predictor.used([1], second * S)
        predictor.used([1000 + second], second * S)
    before, stranger = predictor.reuse_probability([1, 5], 99 * S, 2 * S)
    predictor.forget(1)
    predictor.forget(1)
    assert 1 not in predictor.followed()
    assert predictor.reuse_probability([1], 99 * S, 2 * S)[0] == stranger < before


def test_blocks_that_are_used_at_random_are_predicted_as_the_exponential_law_says() -> None:
    random = np.random.default_rng(0)
    gaps_us = random.exponential(20 * S, (60, 200)).cumsum(axis=0)
    moments = sorted((int(moment), block) for (_, block), moment in np.ndenumerate(gaps_us))
    predictor = LifetimePredictor(half_life_us=1e12)
    for moment, block in moments:
        if moment > 600 * S:
            break
        predictor.used([block], moment)
    for within_s in (5, 20, 60):
        chances = predictor.reuse_probability(range(200), 600 * S, within_s * S)
        assert chances.mean() == pytest.approx(1 - np.exp(-within_s / 20), abs=0.06)


def test_a_block_that_is_overdue_is_given_up() -> None:
    predictor = LifetimePredictor()
    for second in range(0, 400, 4):
        predictor.used([1], second * S)
        predictor.used([2], second * S)
    end_us = 396 * S
    young, old = (
        predictor.reuse_probability([1], end_us + wait_us, 4 * S)[0] for wait_us in (0, 600 * S)
    )
    assert young > 0.8
    assert old < 0.2


def test_blocks_that_never_return_teach_that_they_do_not() -> None:
    predictor = LifetimePredictor()
    for second in range(300):
        predictor.used([second], second * S)
        predictor.used([10_000 + second % 2, second + 20_000], second * S)
    often, once = predictor.reuse_probability([10_000, 299], 299 * S, 10 * S)
    assert often > 0.95
    assert once < 0.1


def test_what_happens_between_two_questions_changes_the_second_answer() -> None:
    predictor = LifetimePredictor()
    answers = []
    for second in range(0, 40, 4):
        predictor.used([1], second * S)
        answers.append(predictor.reuse_probability([1], second * S, 8 * S)[0])
    assert answers[0] == 0
    assert answers[-1] > 0.8


def test_blocks_that_wait_still_count_before_they_are_used_or_given_up() -> None:
    predictor = LifetimePredictor()
    predictor.used([1], 0)
    predictor.used([2], 0)
    for block in range(100, 300):
        predictor.used([block], 10 * S)
    predictor.used([1], 100 * S)
    predictor.used([2], 100 * S)
    (chance,) = predictor.reuse_probability([100], 120 * S, 10 * S)
    assert 0 < chance < 0.05


def test_an_age_that_no_block_has_passed_is_judged_like_the_ages_before() -> None:
    predictor = LifetimePredictor()
    for second in range(0, 7, 3):
        predictor.used([1], second * S)
        predictor.used([100 + second], second * S)
    (chance,) = predictor.reuse_probability([100], 7 * S, 8 * S)
    assert 0.1 < chance < 0.9


def test_what_was_seen_long_ago_counts_less() -> None:
    def chance(half_life_us: float) -> float:
        predictor = LifetimePredictor(half_life_us)
        for second in range(200):  # every block twice, then every block once
            predictor.used([second], 2 * second * S)
            predictor.used([second], (2 * second + 1) * S)
        for second in range(200):
            predictor.used([1000 + second], (400 + 2 * second) * S)
        return float(predictor.reuse_probability([1199], 798 * S, 2 * S)[0])

    forgetful, long = chance(10 * S), chance(1e15)  # 80 half-lives, and none
    assert forgetful < 0.25 * long


def test_weights_of_a_long_history_stay_finite() -> None:
    predictor = LifetimePredictor(half_life_us=1.0)
    for step in range(200):
        predictor.used([step % 3], step * 1_000)
    chances = predictor.reuse_probability([0, 1, 2], 200_000, 10_000)
    assert np.isfinite(chances).all()
    assert (chances > 0).all()


def test_a_clock_that_runs_backwards_stands_still() -> None:
    predictor = LifetimePredictor()
    predictor.used([1], 50 * S)
    predictor.used([1, 2], 20 * S)
    at_latest = predictor.reuse_probability([1, 2], 50 * S, S)
    assert predictor.reuse_probability([1, 2], 0, S).tolist() == at_latest.tolist()


def test_ages_beyond_the_last_edge_are_not_expected_any_more() -> None:
    predictor = LifetimePredictor()
    predictor.used([1], 0)
    predictor.used([1], S)
    assert predictor.reuse_probability([1], int(EDGES_US[-1]) + 2 * S, 10**15).tolist() == [0]


def test_kinds_tell_depths_and_uses_apart_in_powers_of_two() -> None:
    assert kind_of(0, 1) != kind_of(1, 1) != kind_of(1, 2) == kind_of(1, 3)
    assert kind_of(10**6, 10**6) == kind_of(64, 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: LifetimePredictor(half_life_us=0), "half_life_us 0: more than 0"),
        (lambda: LifetimePredictor(max_blocks=0), "max_blocks 0: more than 0"),
        (lambda: LifetimePredictor().reuse_probability([1], 0, -1), "within_us -1: 0 or more"),
    ],
)
def test_what_cannot_be_is_named_with_its_value(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message):
        wrong()
