"""The block pool: every block is free once or one owner's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from sagec.runtime.engines.torch.pool import BlockPool

Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "grow", "shrink"]), st.integers(0, 40), st.integers(0, 30)
    ),
    max_size=80,
)


@given(actions=ACTIONS)
def test_whatever_owners_do_no_block_is_lost_or_held_twice(actions: list[Action]):
    pool = BlockPool(num_blocks=50, block_tokens=4)
    held: dict[int, list[int]] = {}
    for action, which, blocks in actions:
        slots = sorted(held)
        slot = slots[which % len(slots)] if slots else None
        if action == "open":
            held[pool.open_slot()] = []
        elif slot is None:
            continue
        elif action == "close":
            pool.close_slot(slot)
            del held[slot]
        elif action == "grow":
            free = pool.num_free
            before = held[slot]
            assert pool.grow(slot, blocks) == (blocks - len(before) <= free)
            held[slot] = pool.blocks(slot, pool.held(slot)).tolist()
            assert held[slot][: len(before)] == before
        else:
            pool.shrink(slot, blocks)
            held[slot] = held[slot][:blocks]
        pool.check_integrity()
        assert {s: pool.blocks(s, pool.held(s)).tolist() for s in held} == held
        assert pool.num_used == sum(map(len, held.values()))


def test_tables_grow_with_owners_and_with_long_requests():
    pool = BlockPool(num_blocks=200, block_tokens=1)
    slots = [pool.open_slot() for _ in range(40)]
    assert len(set(slots)) == 40
    assert pool.grow(slots[-1], 150)
    assert len(set(pool.blocks(slots[-1], 150).tolist())) == 150
    pool.check_integrity()


def test_a_growth_that_does_not_fit_takes_nothing():
    pool = BlockPool(num_blocks=3, block_tokens=16)
    slot, other = pool.open_slot(), pool.open_slot()
    assert pool.grow(slot, 2)
    assert not pool.grow(other, 2)
    assert (pool.held(other), pool.num_free) == (0, 1)


def test_the_check_finds_a_block_that_two_hold():
    pool = BlockPool(num_blocks=4, block_tokens=16)
    slots = pool.open_slot(), pool.open_slot()
    for slot in slots:
        pool.grow(slot, 2)
    pool.tables[slots[1], 0] = pool.tables[slots[0], 0]
    with pytest.raises(AssertionError, match="4 blocks, but 0 free and 4 held, 3 different"):
        pool.check_integrity()
