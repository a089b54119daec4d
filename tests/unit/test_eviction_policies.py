"""Eviction policies: what holds for all of them, and each one's victims in small cases by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.kv.policies import EvictionPolicy, PolicyError, create, known
from sagec.runtime.kv.policies.arc import Arc
from sagec.runtime.kv.policies.lfu import Lfu
from sagec.runtime.kv.policies.lru import Lru
from sagec.runtime.kv.policies.s3_fifo import S3Fifo

CAPACITY = 12
PAIRS = list(itertools.product(known(), known()))
Action = tuple[str, int]
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["request", "request", "touch", "pin", "unpin", "remove", "evict"]),
        st.integers(0, 1000),
    ),
    max_size=120,
)


class Tree:
    """A cache of at most CAPACITY blocks in the plainest way: a set, with parents and pins.

    Block b follows block (b - 1) // 2, so that blocks make a binary tree. tells: whether the policy
    hears that a block may go again.
    """

    def __init__(self, policy: EvictionPolicy, tells: bool = True) -> None:
        self.policy = policy
        self.tells = tells
        self.cached: set[int] = set()
        self.pins: set[int] = set()
        self.victims: list[int] = []

    def may_go(self, block: int) -> bool:
        is_inner = {2 * block + 1, 2 * block + 2} & self.cached
        return block not in self.pins and not is_inner

    def apply(self, action: str, number: int) -> None:
        there = sorted(self.cached)
        block = there[number % len(there)] if there else None
        if action == "request":
            self.request(number % 31)
        elif action == "evict":
            self.evict()
        elif block is None:
            return
        elif action == "touch":
            self.policy.touched(block)
        elif action == "pin":
            self.pins.add(block)
        elif action == "unpin":
            self.pins.discard(block)
            self.release(block)
        elif action == "remove" and self.may_go(block):
            self.cached.remove(block)
            self.policy.removed(block)
            self.release((block - 1) // 2)

    def request(self, block: int) -> None:
        """Use a block and those before it, and cache what is not there, if there is room."""
        path = [block]
        while path[-1]:
            path.append((path[-1] - 1) // 2)
        held = self.pins
        self.pins = held | set(path)
        for one in reversed(path):
            if one in self.cached:
                self.policy.touched(one)
            elif len(self.cached) < CAPACITY or self.evict() is not None:
                self.policy.stored(one)
                self.cached.add(one)
            else:
                break
        self.pins = held
        for one in path:
            self.release(one)

    def evict(self) -> int | None:
        could_go = {block for block in self.cached if self.may_go(block)}
        found = self.policy.victim(self.may_go)
        assert found in could_go if could_go else found is None
        if found is not None:
            self.cached.remove(found)
            self.victims.append(found)
            self.release((found - 1) // 2)
        return found

    def release(self, block: int) -> None:
        if self.tells and block in self.cached and self.may_go(block):
            self.policy.released(block)


def replayed(name: str, actions: list[Action], tells: bool = True) -> Tree:
    tree = Tree(create(name, CAPACITY), tells)
    for action in actions:
        tree.apply(*action)
        assert len(tree.policy) == len(tree.cached)
        assert sorted(tree.policy.blocks()) == sorted(tree.cached)
    return tree


def drained(policy: EvictionPolicy) -> list[int]:
    """The victims until nothing is left, where everything may go."""
    victims = iter(lambda: policy.victim(lambda _: True), None)
    return [block for block in victims if block is not None]


def filled(policy: EvictionPolicy, *blocks: int) -> None:
    for block in blocks:
        policy.stored(block)


@pytest.mark.parametrize("tells", (True, False))
@pytest.mark.parametrize("name", known())
@given(actions=ACTIONS)
def test_a_victim_may_go_and_there_is_none_only_if_nothing_may(
    name: str, tells: bool, actions: list[Action]
) -> None:
    tree = replayed(name, actions, tells)
    while tree.cached:
        tree.pins.clear()
        assert tree.evict() is not None
    assert tree.policy.victim(lambda _: True) is None
    assert len(tree.policy) == 0


@pytest.mark.parametrize("name", known())
@given(actions=ACTIONS)
def test_the_same_sequence_has_the_same_victims(name: str, actions: list[Action]) -> None:
    assert replayed(name, actions).victims == replayed(name, actions).victims


@pytest.mark.parametrize(("old", "new"), PAIRS)
@settings(max_examples=20)
@given(actions=ACTIONS)
def test_another_policy_takes_over_every_block(old: str, new: str, actions: list[Action]) -> None:
    tree = replayed(old, actions)
    successor = create(new, CAPACITY)
    filled(successor, *tree.policy.blocks())
    assert sorted(successor.blocks()) == sorted(tree.cached)
    assert sorted(drained(successor)) == sorted(tree.cached)


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_who_takes_over_keeps_the_order_of_blocks_that_were_used_alike(old: str, new: str) -> None:
    policy, successor = create(old, 100), create(new, 100)
    filled(policy, *range(8))
    filled(successor, *policy.blocks())
    assert list(successor.blocks()) == drained(successor) == list(range(8))


@pytest.mark.parametrize("name", known())
def test_a_run_of_pinned_blocks_is_passed_once(name: str) -> None:
    policy = create(name, 4000)
    filled(policy, *range(4000))
    asked: list[int] = []

    def is_not_pinned(block: int) -> bool:
        asked.append(block)
        return block >= 3000

    victims = [policy.victim(is_not_pinned) for _ in range(1000)]
    assert victims == list(range(3000, 4000))
    assert len(asked) == 4000


@pytest.mark.parametrize("name", known())
def test_a_released_block_has_kept_its_place(name: str) -> None:
    policy = create(name, 100)
    filled(policy, *range(6))
    assert policy.victim(lambda block: block not in (0, 1, 3)) == 2
    for block in (3, 1):
        policy.released(block)
    assert [policy.victim(lambda block: block != 0) for _ in range(4)] == [1, 3, 4, 5]
    assert policy.victim(lambda block: block != 0) is None
    assert policy.victim(lambda _: True) == 0


@pytest.mark.parametrize("name", known())
def test_what_is_not_in_the_cache_is_neither_touched_nor_released_nor_removed(name: str) -> None:
    policy = create(name, 100)
    filled(policy, 1)
    for tell in (policy.touched, policy.released, policy.removed):
        tell(2)
    assert list(policy.blocks()) == drained(policy) == [1]


@pytest.mark.parametrize("name", known())
def test_storing_a_block_twice_keeps_it_once(name: str) -> None:
    policy = create(name, 100)
    filled(policy, 1, 2, 1)
    assert len(policy) == 2
    assert sorted(drained(policy)) == [1, 2]


@pytest.mark.parametrize("name", known())
def test_a_policy_keeps_its_memory_in_bounds(name: str) -> None:
    policy = create(name, 50)
    for round in range(20_000):
        if len(policy) >= 50 and round % 3:
            policy.victim(lambda _: True)
        policy.stored(round % 997)
        if len(policy) > 50:
            policy.victim(lambda _: True)
        policy.touched(round * 7 % 997)
    assert len(policy) <= 50
    held = [thing for thing in vars(policy).values() if hasattr(thing, "__len__")]
    for order in [thing for thing in held if hasattr(thing, "_heap")]:
        assert len(order._heap) <= 2 * 50 + 64
    assert all(len(thing) <= 100 for thing in held)


def test_an_unknown_policy_is_named_with_those_that_there_are() -> None:
    with pytest.raises(PolicyError, match="no eviction policy 's3fifo'; did you mean 's3-fifo'"):
        create("s3fifo", 10)
    with pytest.raises(PolicyError, match=r"'x'; there are: arc, lfu, lru, s3-fifo"):
        create("x", 10)


@pytest.mark.parametrize("name", known())
def test_every_policy_is_found_by_its_file_and_described(name: str) -> None:
    policy = create(name, 10)
    assert policy.name == name
    assert type(policy).__doc__


# Each by hand


def test_lru_drops_what_was_used_longest_ago() -> None:
    policy = Lru(3)
    filled(policy, 1, 2, 3)
    policy.touched(1)
    assert list(policy.blocks()) == [2, 3, 1]
    assert policy.victim(lambda block: block != 2) == 3
    policy.stored(4)
    policy.released(2)
    assert drained(policy) == [2, 1, 4]


def test_a_block_that_is_touched_however_often_while_pinned_keeps_its_place_in_the_order() -> None:
    for touches in range(1, 200):
        policy = Lru(2)
        filled(policy, 0, 1)
        assert policy.victim(lambda _: False) is None
        for _ in range(touches):
            policy.touched(0)
        policy.touched(1)
        assert policy.victim(lambda _: True) == 0


def test_lfu_drops_what_was_used_least_and_of_those_the_oldest() -> None:
    policy = Lfu(3)
    filled(policy, 1, 2, 3)
    for block in (1, 1, 3, 2):
        policy.touched(block)
    assert list(policy.blocks()) == [3, 2, 1]
    assert drained(policy) == [3, 2, 1]


def test_lfu_lets_an_old_favourite_go() -> None:
    policy = Lfu(2)
    filled(policy, 100)
    for _ in range(3):
        policy.touched(100)  # its worth is 4
    victims = []
    for block in range(1, 5):
        policy.stored(block)  # worth one more than the last that went: 1, 2, 3, and then 4
        victims.append(policy.victim(lambda _: True))
    assert victims == [1, 2, 3, 100]


def test_the_age_of_lfu_does_not_fall_with_a_block_from_an_earlier_age() -> None:
    policy = Lfu(4)
    filled(policy, 1)
    for block in (2, 3, 4):
        policy.stored(block)
        policy.touched(block)
        assert policy.victim(lambda block: block != 1) == block
    policy.released(1)
    filled(policy, 5)
    assert policy.victim(lambda _: True) == 1
    filled(policy, 6)
    assert policy._order.rank(6)[0] == policy._order.rank(5)[0] == 7


def test_arc_moves_its_target_towards_the_list_whose_ghost_comes_back() -> None:
    policy = Arc(2)
    filled(policy, 1, 2)
    policy.touched(1)
    assert policy.sizes() == (1, 1, 0, 0)
    assert policy.victim(lambda _: True) == 2  # T1 is longer than the target, 0
    assert policy.sizes() == (0, 1, 1, 0)
    policy.stored(2)  # back from B1: a longer T1 would have kept it
    assert (policy.sizes(), policy.target) == ((0, 2, 0, 0), 1)
    assert policy.victim(lambda _: True) == 1
    policy.stored(3)
    assert policy.sizes() == (1, 1, 0, 1)
    assert policy.victim(lambda _: True) == 2  # T1 is as long as it should be
    policy.stored(1)  # back from B2: a longer T2 would have kept it
    assert (policy.sizes(), policy.target) == ((1, 1, 0, 1), 0)
    assert list(policy.blocks()) == [3, 1]


def test_arc_steps_further_where_the_other_ghosts_are_more() -> None:
    policy = Arc(4)
    filled(policy, 1, 2, 3)
    for block in (1, 2, 3):
        policy.touched(block)
    policy.stored(4)
    assert [policy.victim(lambda block: block < 4) for _ in range(3)] == [1, 2, 3]
    assert policy.victim(lambda _: True) == 4
    assert policy.sizes() == (0, 0, 1, 3)
    policy.stored(4)
    assert policy.target == 3
    filled(policy, 5, 6)
    assert [policy.victim(lambda block: block > 4) for _ in range(2)] == [5, 6]
    policy.removed(1)
    policy.removed(2)
    assert policy.sizes() == (0, 1, 2, 1)
    policy.stored(3)
    assert policy.target == 1


def test_arc_forgets_what_was_removed() -> None:
    policy = Arc(4)
    filled(policy, 1, 2)
    policy.touched(2)
    assert [policy.victim(lambda _: True) for _ in range(2)] == [1, 2]
    assert policy.sizes() == (0, 0, 1, 1)
    policy.removed(1)
    policy.removed(2)
    filled(policy, 1, 2)
    assert (policy.sizes(), policy.target) == ((2, 0, 0, 0), 0)


def test_arc_remembers_no_more_than_twice_what_it_may_hold() -> None:
    policy = Arc(4)
    for block in range(50):
        policy.stored(block)
        policy.touched(block)
        assert policy.victim(lambda _: True) == block
    assert policy.sizes() == (0, 0, 0, 8)
    for block in range(100, 150):
        policy.stored(block)
        assert policy.victim(lambda _: True) == block
    assert policy.sizes() == (0, 0, 4, 4)


@given(actions=ACTIONS)
def test_arcs_lists_stay_within_their_bounds(actions: list[Action]) -> None:
    policy = Arc(CAPACITY)
    tree = Tree(policy)
    for action in actions:
        tree.apply(*action)
        once, often, once_ghosts, often_ghosts = policy.sizes()
        assert once + often == len(tree.cached)
        assert once + once_ghosts <= CAPACITY
        assert once + often + once_ghosts + often_ghosts <= 2 * CAPACITY
        assert 0 <= policy.target <= CAPACITY
        ghosts = {*policy._once_ghosts, *policy._often_ghosts}
        assert len(ghosts) == once_ghosts + often_ghosts
        assert not ghosts & tree.cached


def test_s3_fifo_promotes_what_was_used_twice_and_forgets_the_rest_to_a_ghost() -> None:
    policy = S3Fifo(10)  # small gives blocks as long as it has any: a tenth is 1
    filled(policy, 1, 2, 3)
    for block in (1, 1, 2):
        policy.touched(block)
    assert policy.victim(lambda _: True) == 2  # 1 moves on to main; 2 was used only once
    assert list(policy.blocks()) == [3, 1]
    policy.stored(2)  # its ghost is known: into main
    assert list(policy.blocks()) == [3, 1, 2]
    assert drained(policy) == [3, 1, 2]


def test_s3_fifo_gives_a_used_block_of_main_another_turn_for_each_use() -> None:
    policy = S3Fifo(10)
    filled(policy, 1, 2)
    assert drained(policy) == [1, 2]
    filled(policy, 1, 2)
    for _ in range(5):
        policy.touched(1)  # counted up to 3
    policy.touched(2)
    assert list(policy.blocks()) == [1, 2]
    # 1 goes back with 2 left, 2 with 0; 1 again with 1; then 2 goes.
    assert policy.victim(lambda _: True) == 2
    assert policy._uses == {1: 1}


def test_s3_fifo_knows_nine_tenths_as_many_ghosts_as_it_may_hold_blocks() -> None:
    policy = S3Fifo(10)
    filled(policy, *range(10))
    assert drained(policy) == list(range(10))
    filled(policy, 0, 1)
    assert list(policy.blocks()) == [0, 1]
    assert policy.victim(lambda _: True) == 0  # in small, for 9 others went after it
    assert policy.victim(lambda _: True) == 1


def test_s3_fifo_takes_from_main_while_small_holds_less_than_a_tenth() -> None:
    policy = S3Fifo(20)
    filled(policy, 1, 2)
    assert [policy.victim(lambda _: True) for _ in range(2)] == [1, 2]
    filled(policy, 1, 2, 3)
    assert policy.victim(lambda _: True) == 1
    assert policy.victim(lambda block: block == 3) == 3  # main has nothing else that may go


def test_s3_fifo_forgets_what_was_removed() -> None:
    policy = S3Fifo(20)
    filled(policy, 1, 2)
    assert policy.victim(lambda _: True) == 1
    policy.removed(1)
    filled(policy, 1)
    assert list(policy._small) == [2, 1]


def test_a_used_block_that_may_not_go_leaves_small_for_main() -> None:
    policy = S3Fifo(10)
    filled(policy, 1, 2)
    assert policy.victim(lambda block: block == 2) == 2
    policy.touched(1)
    policy.touched(1)
    filled(policy, 3)
    assert policy.victim(lambda block: block != 1) == 3
    assert list(policy._main) == [1]


@pytest.mark.parametrize("name", ("arc", "lfu", "s3-fifo"))
def test_a_scan_does_not_flush_what_is_used_often(name: str) -> None:
    def hits_of(policy: EvictionPolicy) -> int:
        cached: set[int] = set()
        hits = 0
        for round in range(200):
            scan = range(1000 + 30 * round, 1030 + 30 * round)
            for block in [*range(10), *range(10), *scan]:
                if block in cached:
                    hits += block < 10
                    policy.touched(block)
                    continue
                if len(cached) == 30:
                    victim = policy.victim(lambda _: True)
                    assert victim is not None
                    cached.remove(victim)
                policy.stored(block)
                cached.add(block)
        return hits

    assert hits_of(Lru(30)) == 200 * 10
    assert hits_of(create(name, 30)) > 1.8 * 200 * 10
