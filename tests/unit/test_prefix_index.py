"""The prefix index: the longest match, what may go and what not, and hashes that collide."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.kv import block_contents, block_hashes
from sagec.runtime.kv.policies import create, known
from sagec.runtime.kv.prefix_index import CachedBlock, PrefixIndex


def index(policy: str = "lru", tiers: int = 1) -> PrefixIndex:
    made = [create(policy, 100) for _ in range(tiers)]
    return PrefixIndex(made[0], block_tokens=4, slower=made[1:])


def hashes(blocks: list[CachedBlock]) -> list[int]:
    return [block.hash for block in blocks]


def test_a_lookup_finds_the_longest_prefix_and_nothing_behind_a_gap():
    tree = index()
    tree.insert([1, 2, 3])
    tree.insert([1, 4])
    assert hashes(tree.lookup([1, 2, 9, 3])) == [1, 2]
    assert hashes(tree.lookup([1, 4, 3])) == [1, 4]
    assert tree.lookup([2, 3]) == tree.lookup([]) == []
    assert (len(tree), 2 in tree, 9 in tree) == (4, True, False)


def test_what_is_cached_keeps_its_place():
    tree = index()
    tree.insert([1, 2], places=[10, 11])
    again = tree.insert([1, 2, 3], places=[20, 21, 22])
    assert [block.place for block in again] == [10, 11, 22]


def test_blocks_go_from_the_end_of_a_prefix_and_the_oldest_prefix_first():
    tree = index()
    tree.insert([1, 2, 3])
    tree.insert([1, 4])
    tree.lookup([1, 2, 3])
    assert hashes(tree.evict(2)) == [4, 3]
    assert hashes(tree.lookup([1, 2, 3])) == [1, 2]
    assert hashes(tree.evict(9)) == [2, 1]
    assert tree.evict(1) == []
    tree.check_integrity()


def test_a_pinned_block_and_what_leads_to_it_never_goes():
    tree = index()
    pinned = tree.insert([1, 2])
    tree.insert([1, 2, 3, 4])
    tree.pin(pinned)
    tree.pin(pinned)
    assert hashes(tree.evict(9)) == [4, 3]
    tree.unpin(pinned)
    assert tree.evict(9) == []
    tree.unpin(pinned)
    assert hashes(tree.evict(9)) == [2, 1]


def test_invalidating_a_block_takes_what_follows_it_along():
    tree = index()
    tree.insert([1, 2, 3, 4])
    tree.insert([1, 2, 5])
    tree.insert([1, 6])
    assert set(hashes(tree.invalidate(2))) == {2, 3, 4, 5}
    assert tree.invalidate(2) == []
    assert hashes(tree.lookup([1, 2])) == [1]
    assert hashes(tree.lookup([1, 6])) == [1, 6]
    tree.check_integrity()


def test_who_has_pinned_an_invalidated_block_can_let_go_of_it():
    tree = index()
    blocks = tree.insert([1, 2])
    tree.pin(blocks)
    assert not tree.invalidate(2)[0].is_cached
    tree.check_integrity()
    tree.unpin(blocks)
    tree.check_integrity()
    assert [block.pins for block in blocks] == [0, 0]
    assert hashes(tree.insert([1, 2])) == [1, 2]


FIRST, SECOND = (5, 6, 7, 8), (9, 10, 11, 12)


def test_a_block_with_the_hash_of_another_ones_tokens_is_a_miss():
    tree = index()
    right, wrong = block_contents(FIRST, 4), block_contents(SECOND, 4)
    tree.insert([1], contents=right)
    assert hashes(tree.lookup([1], right)) == [1]
    assert tree.lookup([1], wrong) == []
    assert tree.insert([1, 2], contents=wrong + right) == []
    assert tree.statistics().collisions == 2
    tree.check_integrity()


def test_a_block_with_the_hash_of_one_elsewhere_in_the_tree_is_a_miss():
    tree = index()
    tree.insert([1, 2])
    tree.insert([3])
    assert hashes(tree.lookup([3, 2])) == [3]
    assert hashes(tree.insert([3, 2, 4])) == [3]
    assert (tree.statistics().collisions, 4 in tree) == (2, False)
    tree.check_integrity()


def test_a_block_that_nobody_described_is_no_hit_for_who_wants_it_checked():
    tree = index()
    tree.insert([1])
    assert tree.lookup([1], block_contents(FIRST, 4)) == []


def test_the_salt_is_part_of_what_is_checked():
    tree = index()
    tree.insert([1], contents=block_contents(FIRST, 4, "adapter"))
    assert tree.lookup([1], block_contents(FIRST, 4)) == []
    assert hashes(tree.lookup([1], block_contents(FIRST, 4, "adapter"))) == [1]


def test_figures_tell_queries_hits_and_what_left_why():
    tree = index()
    tree.insert([1, 2, 3])
    tree.lookup([1, 2, 9])
    tree.lookup([8])
    tree.match([1])
    tree.evict(1)
    tree.invalidate(1)
    figures = tree.statistics()
    assert (figures.queries, figures.queried_blocks, figures.hit_blocks) == (2, 4, 2)
    assert (figures.hit_tokens, figures.hit_rate) == (8, 0.5)
    assert (figures.stored_blocks, figures.evictions, figures.invalidations) == (3, 1, 2)
    assert figures.blocks == (0,)
    assert index().statistics().hit_rate == 0.0


@pytest.mark.parametrize("name", known())
def test_another_policy_takes_over_what_is_cached(name: str):
    tree = index()
    tree.insert([1, 2, 3])
    tree.insert([4])
    tree.use(create(name, 100))
    assert tree.policy().name == name
    tree.check_integrity()
    assert set(hashes(tree.evict(9))) == {1, 2, 3, 4}


def test_a_policy_with_blocks_of_its_own_cannot_take_over():
    tree, policy = index(), create("lru", 100)
    policy.stored(7)
    with pytest.raises(ValueError, match="policy 'lru' has 1 blocks; give an empty one"):
        tree.use(policy)


# Tiers


def test_blocks_move_from_their_end_to_slower_tiers_and_back_from_their_root():
    tree = index(tiers=3)
    first, second = tree.insert([1, 2], places=[10, 11])
    assert not tree.can_move(first, 1)
    assert tree.can_move(second, 2)
    tree.move(second, 2, place=0)
    tree.move(first, 1, place=5)
    tree.check_integrity()
    assert [(b.tier, b.place) for b in tree.lookup([1, 2])] == [(1, 5), (2, 0)]
    assert not tree.can_move(second, 0)
    assert tree.can_move(second, 1)
    tree.move(first, 0, place=10)
    tree.move(second, 0, place=11)
    tree.check_integrity()
    assert tree.statistics().blocks == (2, 0, 0)


def test_a_block_in_use_does_not_move():
    tree = index(tiers=2)
    (block,) = tree.insert([1])
    tree.pin([block])
    assert not tree.can_move(block, 1)


def test_a_victim_may_move_on_instead_of_leaving():
    tree = index(tiers=2)
    tree.insert([1, 2])
    block = tree.victim()
    assert block is not None
    assert block.hash == 2
    tree.move(block, 1, place=0)
    tree.check_integrity()
    assert hashes(tree.evict(1, tier=1)) == [2]
    assert hashes(tree.evict(1)) == [1]
    assert tree.statistics().evictions == 2


def test_what_follows_an_evicted_block_in_a_slower_tier_goes_with_it():
    tree = index(tiers=2)
    _, second = tree.insert([1, 2])
    tree.move(second, 1, place=0)
    assert hashes(tree.evict(1)) == [2, 1]
    assert len(tree) == 0
    tree.check_integrity()


def test_nothing_new_follows_a_block_of_a_slower_tier():
    tree = index(tiers=2)
    (first,) = tree.insert([1])
    tree.move(first, 1, place=0)
    with pytest.raises(ValueError, match="block 1 is in tier 1; move it to 0 first"):
        tree.insert([1, 2])


# Everything at once

PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["request", "begin", "end", "evict", "invalidate", "move", "use"]),
        PROMPTS,
        st.integers(0, 30),
    ),
    max_size=60,
)


@pytest.mark.parametrize("name", known())
@settings(max_examples=60, deadline=None)
@given(actions=ACTIONS, collide=st.booleans())
def test_whatever_happens_a_hit_is_a_prefix_that_was_stored(name, actions, collide: bool):
    """Against a set of prefixes; `collide` leaves hashes so few values that most collide."""
    tree = index(name, tiers=2)
    stored: set[tuple[int, ...]] = set()
    using: list[list[CachedBlock]] = []
    for action, prompt, number in actions:
        names = block_hashes(prompt, 1)
        if collide:
            names = tuple(value % 5 for value in names)
        contents = block_contents(prompt, 1)
        if action in ("request", "begin"):
            found = tree.lookup(names, contents)
            assert prompt[: len(found)] in stored or not found
            if all(block.tier == 0 for block in found):
                entered = tree.insert(names, range(len(names)), contents)
                assert entered[: len(found)] == found
                assert collide or len(entered) == len(prompt)
                stored |= {prompt[:end] for end in range(1, len(entered) + 1)}
                if action == "begin":
                    tree.pin(entered)
                    using.append(entered)
        elif action == "end" and using:
            tree.unpin(using.pop(number % len(using)))
        elif action == "evict":
            gone = tree.evict(number % 5, tier=number % 2)
            assert all(not block.pins for block in gone)
        elif action == "invalidate":
            tree.invalidate(names[-1])
        elif action == "move" and (block := tree.find(names[-1])) is not None:
            if tree.can_move(block, 1 - block.tier):
                tree.move(block, 1 - block.tier, place=number)
        elif action == "use":
            tree.use(create(known()[number % len(known())], 100))
        tree.check_integrity()
