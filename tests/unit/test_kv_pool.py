"""The block pool: every block is free once, idle once, or stands in as many tables as it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.kv.pool import BlockPool, QuotaExceeded

Action = tuple[str, int, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "close", "grow", "shrink", "share", "keep", "forget"]),
        st.integers(0, 40),
        st.integers(0, 30),
    ),
    max_size=80,
)
TENANTS = ("red", "blue")


class Model:
    """What the pool should hold, in the plainest words."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.tables: dict[int, list[int]] = {}
        self.tenants: dict[int, str] = {}
        self.kept: set[int] = set()

    def slot(self, which: int) -> int:
        return sorted(self.tables)[which % len(self.tables)]

    def in_use(self, tenant: str) -> int:
        return sum(len(t) for slot, t in self.tables.items() if self.tenants[slot] == tenant)

    def free(self) -> int:
        busy = {block for table in self.tables.values() for block in table} | self.kept
        return self.pool.num_blocks - len(busy)

    def open(self, which: int, _: int) -> None:
        slot = self.pool.open_slot(TENANTS[which % 2])
        self.tables[slot], self.tenants[slot] = [], TENANTS[which % 2]

    def close(self, which: int, _: int) -> None:
        slot = self.slot(which)
        self.pool.close_slot(slot)
        del self.tables[slot]

    def grow(self, which: int, blocks: int) -> None:
        slot = self.slot(which)
        table, tenant = self.tables[slot], self.tenants[slot]
        more = blocks - len(table)
        if more > 0 and self.in_use(tenant) + more > self.pool.quotas.get(tenant, 10**9):
            with pytest.raises(QuotaExceeded):
                self.pool.grow(slot, blocks)
            return
        assert self.pool.grow(slot, blocks) == (more <= self.free())
        after = self.pool.blocks(slot, self.pool.held(slot)).tolist()
        assert after[: len(table)] == table
        self.tables[slot] = after

    def shrink(self, which: int, blocks: int) -> None:
        slot = self.slot(which)
        self.pool.shrink(slot, blocks)
        self.tables[slot] = self.tables[slot][:blocks]

    def share(self, which: int, blocks: int) -> None:
        """The first blocks of one owner become those of another, as after the same prefix."""
        slot, other = self.slot(which), self.slot(which + 1)
        shared = self.tables[slot][:blocks]
        table, tenant = self.tables[other], self.tenants[other]
        more = max(len(shared) - len(table), 0)
        if more and self.in_use(tenant) + more > self.pool.quotas.get(tenant, 10**9):
            with pytest.raises(QuotaExceeded):
                self.pool.share(other, shared)
            return
        self.pool.share(other, shared)
        self.tables[other] = shared + table[len(shared) :]

    def keep(self, which: int, index: int) -> None:
        table = self.tables[self.slot(which)]
        if table:
            self.pool.keep(block := table[index % len(table)])
            self.kept.add(block)

    def forget(self, which: int, _: int) -> None:
        if self.kept:
            self.pool.forget(block := sorted(self.kept)[which % len(self.kept)])
            self.kept.remove(block)


@given(actions=ACTIONS, quota=st.sampled_from([None, 20]))
def test_whatever_owners_do_no_block_is_lost_or_counted_wrong(
    actions: list[Action], quota: int | None
) -> None:
    pool = BlockPool(50, 4, {} if quota is None else {"red": quota})
    model = Model(pool)
    for action, which, blocks in actions:
        if model.tables or action == "open":
            getattr(model, action)(which, blocks)
        pool.check_integrity()
        for slot, table in model.tables.items():
            assert pool.blocks(slot, pool.held(slot)).tolist() == table
        held = {block for table in model.tables.values() for block in table}
        assert (pool.num_held, pool.num_idle) == (len(held), len(model.kept - held))
        assert pool.num_free == model.free()


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


def test_a_kept_block_is_idle_when_its_last_holder_goes_and_free_when_it_is_forgotten():
    pool = BlockPool(num_blocks=3, block_tokens=16)
    slot, other = pool.open_slot(), pool.open_slot()
    pool.grow(slot, 1)
    block = pool.block(slot, 0)
    pool.keep(block)
    pool.share(other, [block])
    pool.close_slot(slot)
    assert (pool.num_held, pool.num_idle, pool.holders(block)) == (1, 0, 1)
    pool.close_slot(other)
    assert (pool.num_held, pool.num_idle, pool.num_free) == (0, 1, 2)
    pool.forget(block)
    assert (pool.num_idle, pool.num_free) == (0, 3)


def test_more_than_a_tenants_quota_is_refused_with_the_numbers():
    pool = BlockPool(10, 16, {"red": 4})
    slots = [pool.open_slot("red"), pool.open_slot("red"), pool.open_slot("blue")]
    pool.grow(slots[0], 3)
    assert pool.most_blocks(slots[1]) == 4
    with pytest.raises(QuotaExceeded) as refusal:
        pool.grow(slots[1], 2)
    assert str(refusal.value) == (
        "tenant 'red' holds 3 KV blocks and asks for 2 more; it may hold 4"
    )
    assert (refusal.value.tenant, refusal.value.quota) == ("red", 4)
    assert (refusal.value.held, refusal.value.asked) == (3, 2)
    assert pool.grow(slots[2], 7)
    pool.shrink(slots[0], 2)
    pool.shrink(slots[2], 0)
    assert pool.grow(slots[1], 2)
    pool.check_integrity()


def test_a_shared_block_counts_in_the_quota_of_each_who_has_it():
    pool = BlockPool(10, 16, {"red": 4})
    first, second = pool.open_slot("red"), pool.open_slot("red")
    pool.grow(first, 3)
    with pytest.raises(QuotaExceeded):
        pool.share(second, pool.blocks(first, 2).tolist())
    pool.share(second, pool.blocks(first, 1).tolist())
    assert pool.statistics({}).tenant_blocks == {"red": 4}
    assert pool.num_held == 3


def test_statistics_tell_what_is_used_and_what_is_wasted():
    pool = BlockPool(num_blocks=10, block_tokens=8)
    first, second = pool.open_slot("red"), pool.open_slot()
    pool.grow(first, 3)
    pool.keep(pool.block(first, 0))
    pool.share(second, [pool.block(first, 0)])
    pool.grow(second, 2)
    figures = pool.statistics({first: 17, second: 9})
    assert (figures.free, figures.held, figures.idle, figures.shared) == (6, 4, 0, 1)
    assert figures.unused_tokens == 7 + 7
    assert figures.internal_fragmentation == 14 / 32
    assert figures.utilisation == 0.4
    assert figures.tenant_blocks == {"red": 3, "": 2}
    for slot in (first, second):
        pool.close_slot(slot)
    empty = pool.statistics({})
    assert (empty.free, empty.held, empty.idle) == (9, 0, 1)
    assert empty.internal_fragmentation == empty.utilisation == 0.0


def test_the_check_finds_a_block_in_a_table_that_its_count_does_not_know():
    pool = BlockPool(num_blocks=4, block_tokens=16)
    slots = pool.open_slot(), pool.open_slot()
    for slot in slots:
        pool.grow(slot, 2)
    pool.tables[slots[1], 0] = pool.tables[slots[0], 0]
    with pytest.raises(AssertionError, match="block 0 stands in 2 tables; its count is 1"):
        pool.check_integrity()


def test_the_check_finds_a_block_that_is_lost_and_one_that_is_free_twice():
    pool = BlockPool(num_blocks=4, block_tokens=16)
    pool._free.pop()
    with pytest.raises(AssertionError, match="4 blocks, but 3 free"):
        pool.check_integrity()
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="and 0 held, 3 different"):
        pool.check_integrity()


def test_the_check_finds_tenants_who_hold_what_they_may_not():
    pool = BlockPool(4, 16)
    pool.grow(pool.open_slot("red"), 3)
    pool.quotas["red"] = 2
    with pytest.raises(AssertionError, match="tenant 'red' holds 3 of 2 blocks"):
        pool.check_integrity()
    pool._tenant_blocks["red"] = 1
    with pytest.raises(AssertionError, match="tenants hold"):
        pool.check_integrity()
