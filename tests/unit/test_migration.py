"""Moves of cached blocks between tiers: by hand, and what holds for every plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.kv.migration import DEVICE, DISK, HOST, Candidates, CostBenefit, MigrationPlan

# A block takes 1000 us to compute, 100 us between device and host, 400 us between host and disk.
SPEEDS = {
    (DEVICE, HOST): 1e10,
    (HOST, DEVICE): 1e10,
    (HOST, DISK): 2.5e9,
    (DISK, HOST): 2.5e9,
}
MODEL = CostBenefit(
    block_bytes=1_000_000,
    block_tokens=10,
    prefill_us_per_token=100.0,
    bytes_per_s=SPEEDS,
    link_price=0.5,
)
ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.floats(0, 1), st.booleans()), min_size=1, max_size=12
)
ROOM = st.tuples(*[st.integers(0, 4)] * 3)


def moves(plan: MigrationPlan) -> list[tuple[int, int, int]]:
    """(block, source tier, target tier), in the plan's order."""
    columns = plan.migrations
    return list(
        zip(
            columns.block_hash.tolist(),
            columns.source_tier.tolist(),
            columns.target_tier.tolist(),
            strict=True,
        )
    )


def candidates_of(rows: list[tuple[int, float, bool]]) -> Candidates:
    tiers, chances, leaving = zip(*rows, strict=True)
    return Candidates.of(range(len(rows)), tiers, chances, leaving)


# By hand


def test_a_block_is_worth_the_time_that_it_is_likely_to_save() -> None:
    assert MODEL.recompute_us == 1000
    assert [MODEL.fetch_us(tier) for tier in (DEVICE, HOST, DISK)] == [0, 100, 500]
    assert [float(MODEL.value_us(tier, 0.5)) for tier in (DEVICE, HOST, DISK)] == [500, 450, 250]


def test_a_leaving_block_goes_where_it_gains_most() -> None:
    # To host: 0.5 * (1000 - 100) less half of 100; to disk: 0.5 * (1000 - 500) less half of 500.
    plan = MODEL.plan(Candidates.of([7], DEVICE, 0.5, leaving=True), room_blocks=(0, 1, 1))
    assert moves(plan) == [(7, DEVICE, HOST)]
    assert plan.gain_us.tolist() == [400]
    assert plan.reasons == (
        "50% likely to be used again: 100 us to fetch from host against 1000 us to recompute; "
        "the move takes 100 us",
    )
    plan = MODEL.plan(Candidates.of([7], DEVICE, 0.6, leaving=True), room_blocks=(0, 0, 1))
    assert moves(plan) == [(7, DEVICE, DISK)]
    assert plan.gain_us.tolist() == [50]


def test_a_leaving_block_that_is_not_worth_its_move_is_dropped() -> None:
    # To host it would gain 0.05 * 900 - 50 < 0.
    plan = MODEL.plan(Candidates.of([7], DEVICE, 0.05, leaving=True), room_blocks=(9, 9, 9))
    assert moves(plan) == []


def test_a_block_that_need_not_leave_stays_on_the_device() -> None:
    assert moves(MODEL.plan(Candidates.of([7], DEVICE, 1.0), room_blocks=(9, 9, 9))) == []


def test_a_block_is_fetched_early_where_that_is_likelier_to_pay_than_the_links_price() -> None:
    candidates = Candidates.of([7, 8], HOST, [0.6, 0.4])
    plan = MODEL.plan(candidates, room_blocks=(2, 0, 0))
    assert moves(plan) == [(7, HOST, DEVICE)]
    assert plan.gain_us == pytest.approx([10])  # 0.6 * 100 - 0.5 * 100
    assert "100 us to fetch from host; the move" in plan.reasons[0]


def test_a_better_block_takes_the_place_of_a_worse_one_which_is_dropped() -> None:
    candidates = Candidates.of([1, 2, 3], [HOST, HOST, DEVICE], [0.1, 0.2, 0.9], [0, 0, 1])
    plan = MODEL.plan(candidates, room_blocks=(0, 0, 0))
    assert moves(plan) == [(3, DEVICE, HOST)]
    assert plan.drops.block_hash.tolist() == [1]
    assert plan.gain_us == pytest.approx([0.9 * 900 - 50 - 0.1 * 900])


def test_a_displaced_block_goes_further_down_where_that_pays() -> None:
    candidates = Candidates.of([1, 3], [HOST, DEVICE], [0.6, 0.9], [False, True])
    plan = MODEL.plan(candidates, room_blocks=(0, 0, 1))
    assert moves(plan) == [(1, HOST, DISK), (3, DEVICE, HOST)]
    assert not len(plan.drops)
    assert plan.gain_us == pytest.approx([100, 0.9 * 900 - 50 - (0.6 * 900 - 100)])
    assert plan.reasons[0] == "makes room for block 3, which gains more"


def test_a_block_does_not_displace_one_that_is_worth_more() -> None:
    candidates = Candidates.of([1, 3], [HOST, DEVICE], [0.9, 0.9], [False, True])
    plan = MODEL.plan(candidates, room_blocks=(0, 0, 0))
    assert moves(plan) == []
    assert not len(plan.drops)


def test_of_equal_blocks_the_ancestor_is_kept() -> None:
    candidates = Candidates.of([1, 2, 3], DEVICE, 0.5, leaving=True)
    plan = MODEL.plan(candidates, room_blocks=(0, 2, 0))
    assert moves(plan) == [(1, DEVICE, HOST), (2, DEVICE, HOST)]


def test_a_block_that_moves_by_choice_leaves_room_for_another() -> None:
    tiers, leaving = [HOST, DEVICE, DEVICE], [False, True, True]
    candidates = Candidates.of([1, 2, 3], tiers, [1.0, 0.07, 0.06], leaving)
    plan = MODEL.plan(candidates, room_blocks=(1, 0, 0))
    assert moves(plan) == [(1, HOST, DEVICE), (2, DEVICE, HOST)]  # and 3 has no room to take
    assert not len(plan.drops)


def test_without_a_link_nothing_moves() -> None:
    model = CostBenefit(1_000_000, 10, 100.0, {(DEVICE, HOST): 1e10})
    candidates = Candidates.of([1, 2, 3], [DEVICE, HOST, DISK], 1.0, leaving=True)
    assert moves(model.plan(candidates, room_blocks=(9, 9, 9))) == []


def test_where_computing_is_faster_than_fetching_nothing_moves() -> None:
    model = CostBenefit(1_000_000, 10, 5.0, SPEEDS)
    candidates = Candidates.of([1, 2, 3], [DEVICE, HOST, DISK], 1.0, leaving=True)
    assert moves(model.plan(candidates, room_blocks=(0, 9, 9))) == []


def test_of_no_candidates_nothing_moves() -> None:
    plan = MODEL.plan(Candidates.of([], [], []), room_blocks=(1, 1, 1))
    assert (moves(plan), plan.reasons, len(plan.drops)) == ([], (), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Candidates.of([1], 3, 0.5), r"tier\[0\]: 3 is not in \[0, 3\)"),
        (lambda: Candidates.of([1, 2], 0, [0.5, 1.5]), r"reuse_probability\[1\]: 1.5"),
        (lambda: Candidates.of([1], 0, float("nan")), r"reuse_probability\[0\]: nan"),
        (lambda: CostBenefit(-1, 1, 1.0, {}), "block_bytes -1: a number, 0 or more"),
        (lambda: CostBenefit(1, 1, float("nan"), {}), "prefill_us_per_token nan"),
        (lambda: CostBenefit(1, 1, 1.0, {(0, 1): 0.0}), r"bytes_per_s\[0, 1\] 0.0: more than 0"),
        (lambda: CostBenefit(1, 1, 1.0, {(1, 1): 1.0}), r"bytes_per_s\[1, 1\]: two different"),
        (lambda: MODEL.plan(Candidates.of([1], 0, 0.5), (1, 1)), r"room_blocks \[1, 1\]: 0 or"),
        (lambda: MODEL.plan(Candidates.of([1], 0, 0.5), (1, -1, 1)), "room_blocks"),
    ],
)
def test_what_cannot_be_is_named_with_its_value(wrong: object, message: str) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError, match=message):
        wrong()


# For every plan


@given(rows=ROWS, room=ROOM, price=st.floats(0, 2))
def test_no_move_costs_more_than_it_brings(
    rows: list[tuple[int, float, bool]], room: tuple[int, int, int], price: float
) -> None:
    model = CostBenefit(1_000_000, 10, 100.0, SPEEDS, price)
    plan = model.plan(candidates_of(rows), room)
    assert (plan.gain_us > 0).all()
    assert len(plan.reasons) == len(plan.gain_us) == len(plan.migrations)


@given(rows=ROWS, room=ROOM)
def test_no_tier_ever_holds_more_than_it_has_room_for(
    rows: list[tuple[int, float, bool]], room: tuple[int, int, int]
) -> None:
    plan = MODEL.plan(candidates_of(rows), room)
    free = list(room)
    gone = plan.drops.block_hash.tolist()
    for block in gone:
        tier, _, leaving = rows[block]
        assert not leaving
        free[tier] += 1
    for block, source, target in moves(plan):
        assert source == rows[block][0] != target
        assert free[target] > 0
        free[target] -= 1
        free[source] += not rows[block][2]
        gone.append(block)
    assert len(gone) == len(set(gone))


@given(rows=ROWS, room=ROOM)
def test_the_same_candidates_have_the_same_plan(
    rows: list[tuple[int, float, bool]], room: tuple[int, int, int]
) -> None:
    plans = [MODEL.plan(candidates_of(rows), room) for _ in range(2)]
    assert moves(plans[0]) == moves(plans[1])
    assert plans[0].reasons == plans[1].reasons


@given(rows=ROWS, factor=st.floats(1, 100))
def test_faster_links_save_every_leaving_block_that_slower_ones_save_and_gain_no_less(
    rows: list[tuple[int, float, bool]], factor: float
) -> None:
    faster = {pair: factor * speed for pair, speed in SPEEDS.items()}
    fast = CostBenefit(1_000_000, 10, 100.0, faster, MODEL.link_price)
    candidates = candidates_of([(tier, chance, True) for tier, chance, _ in rows])
    room = (len(rows),) * 3
    saved = {block for block, *_ in moves(MODEL.plan(candidates, room))}
    assert saved <= {block for block, *_ in moves(fast.plan(candidates, room))}
    for tier in (DEVICE, HOST, DISK):
        slow_gain, fast_gain = MODEL.gain_us(candidates, tier), fast.gain_us(candidates, tier)
        assert np.all((fast_gain >= slow_gain - 1e-9) | (slow_gain == -np.inf))
        assert np.all(fast.value_us(tier, 0.7) >= MODEL.value_us(tier, 0.7))


@given(rows=ROWS, room=ROOM)
def test_what_is_likelier_to_be_used_is_kept_rather(
    rows: list[tuple[int, float, bool]], room: tuple[int, int, int]
) -> None:
    leaving = candidates_of([(DEVICE, chance, True) for _, chance, _ in rows])
    plan = MODEL.plan(leaving, (0, room[HOST], 0))
    kept = leaving.reuse_probability[plan.migrations.block_hash]
    lost = np.delete(leaving.reuse_probability, plan.migrations.block_hash)
    assert len(kept) <= room[HOST]
    if len(kept) and len(lost):
        assert kept.min() >= lost.max()
