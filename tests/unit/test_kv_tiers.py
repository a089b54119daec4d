"""Tiers: bytes that leave the device come back as they were, or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.clock import VirtualClock
from sagec.runtime.kv.demotion import Always, WhereItPays
from sagec.runtime.kv.migration import DEVICE, DISK, HOST
from sagec.runtime.kv.policies import create, known
from sagec.runtime.kv.pool import BlockPool
from sagec.runtime.kv.prefix_cache import Prefix, PrefixCache
from sagec.runtime.kv.prefix_index import PrefixIndex
from sagec.runtime.kv.tiers import TierError, Tiers

BLOCK_BYTES = 64


class ArrayBlocks:
    """A device whose memory is an array."""

    block_bytes = BLOCK_BYTES

    def __init__(self, num_blocks: int) -> None:
        self.array = np.zeros((num_blocks, BLOCK_BYTES), np.uint8)

    def memory(self, num_blocks: int):
        return np.zeros((num_blocks, BLOCK_BYTES), np.uint8)

    def save(self, block: int, target) -> None:
        target[:] = self.array[block]

    def load(self, block: int, source) -> None:
        self.array[block] = source


def pattern(seed: int):
    return np.random.default_rng(seed).integers(0, 256, BLOCK_BYTES, np.uint8)


def damage(tiers: Tiers, place: int) -> None:
    """Flip a bit of a block on disk."""
    assert tiers.disk is not None
    byte = os.pread(tiers.disk.descriptor, 1, place * BLOCK_BYTES)
    os.pwrite(tiers.disk.descriptor, bytes([byte[0] ^ 1]), place * BLOCK_BYTES)


WAYS = [
    (HOST,),
    (DISK,),
    (HOST, DISK),
    (DISK, HOST),
    (HOST, DISK, HOST),
]


@pytest.mark.parametrize("way", WAYS)
def test_bytes_come_back_from_wherever_they_were(way: tuple[int, ...]):
    device = ArrayBlocks(4)
    tiers = Tiers(device, host_blocks=2, disk_blocks=2)
    device.array[3] = pattern(1)
    tier, place = DEVICE, 3
    for target in way:
        tier, place = target, tiers.move(tier, place, target)
    tiers.move(tier, place, DEVICE, 0)
    assert np.array_equal(device.array[0], pattern(1))
    figures = tiers.statistics()
    assert figures.used == (0, 0)
    assert sum(moved.blocks for moved in figures.moved) == len(way) + 1
    assert {moved.bytes for moved in figures.moved} == {BLOCK_BYTES}
    tiers.close()


def test_figures_tell_what_moved_between_which_tiers_and_how_fast():
    class Ticking(VirtualClock):
        def now_us(self) -> int:
            self.advance_to(super().now_us() + 8)
            return super().now_us()

    device = ArrayBlocks(4)
    tiers = Tiers(device, host_blocks=3, clock=Ticking())
    places = [tiers.move(DEVICE, block, HOST) for block in range(2)]
    tiers.move(HOST, places[0], DEVICE, 0)
    down, up = tiers.statistics().moved
    assert (down.source, down.target, down.blocks, down.bytes, down.us) == (0, 1, 2, 128, 16)
    assert (up.source, up.target, up.blocks, up.us) == (1, 0, 1, 8)
    assert down.bytes_per_s == 8e6
    assert tiers.statistics().capacity == (3, 0)
    assert tiers.statistics().used == (1, 0)
    tiers.check_integrity(({places[1]}, set()))
    with pytest.raises(AssertionError, match="host: 3 places, 2 free, 2 in use"):
        tiers.check_integrity(({0, 1}, set()))


def test_a_damaged_block_of_the_disk_is_refused_and_its_device_block_untouched():
    device = ArrayBlocks(2)
    tiers = Tiers(device, host_blocks=0, disk_blocks=2)
    device.array[0] = pattern(1)
    place = tiers.move(DEVICE, 0, DISK)
    damage(tiers, place)
    with pytest.raises(TierError, match="block 0 of the spool file is damaged"):
        tiers.move(DISK, place, DEVICE, 1)
    assert not device.array[1].any()
    assert (tiers.statistics().failed, tiers.statistics().used) == (1, (0, 1))


def test_a_truncated_spool_file_is_refused():
    tiers = Tiers(ArrayBlocks(2), host_blocks=0, disk_blocks=2)
    place = tiers.move(DEVICE, 0, DISK)
    os.ftruncate(tiers.disk.descriptor, 10)
    with pytest.raises(TierError, match="damaged"):
        tiers.move(DISK, place, DEVICE, 1)


def test_a_disk_that_takes_nothing_keeps_the_block_where_it_is():
    device = ArrayBlocks(2)
    tiers = Tiers(device, host_blocks=1, disk_blocks=2)
    place = tiers.move(DEVICE, 0, HOST)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, tiers.disk.descriptor)
    os.close(full)
    with pytest.raises(TierError, match="takes no block: No space left on device"):
        tiers.move(HOST, place, DISK)
    assert tiers.statistics().used == (1, 0)


def test_the_spool_file_has_no_name_that_could_stay_behind(tmp_path: Path):
    tiers = Tiers(ArrayBlocks(2), host_blocks=0, disk_blocks=2, spool=tmp_path)
    tiers.move(DEVICE, 0, DISK)
    assert os.fstat(tiers.disk.descriptor).st_size == BLOCK_BYTES
    tiers.close()
    assert not list(tmp_path.iterdir())


def test_a_spool_folder_that_does_not_exist_is_an_error(tmp_path: Path):
    with pytest.raises(OSError, match="No such file or directory"):
        Tiers(ArrayBlocks(2), 0, 2, tmp_path / "absent")


# Under a cache


class Served:
    """A cache over three tiers, and requests whose blocks hold a pattern that their tokens give."""

    def __init__(self, blocks=(6, 3, 3), policy: str = "lru", demotion=None) -> None:
        self.device = ArrayBlocks(blocks[0])
        self.tiers = Tiers(self.device, *blocks[1:])
        self.pool = BlockPool(blocks[0], 2)
        made = [create(policy, max(count, 1)) for count in blocks]
        self.index = PrefixIndex(made[0], 2, made[1:])
        demotion = demotion(self.tiers) if demotion else Always()
        self.cache = PrefixCache(self.pool, self.index, self.tiers, demotion)
        self.running: list[tuple[int, Prefix]] = []
        self.known: set[int] = set()
        self.computed = 0

    def begin(self, tokens: tuple[int, ...]) -> int | None:
        """Serve a request whose blocks stay in use; how many it found, None without room."""
        slot, prefix = self.pool.open_slot(), Prefix(2)
        self.running.append((slot, prefix))
        found = self.cache.attach(slot, prefix, tokens) // 2
        for number in range(found):
            self.check(slot, tokens, number)
        blocks = self.pool.blocks_for(len(tokens))
        if not self.pool.grow(slot, blocks) and not (
            self.cache.make_free(blocks - self.pool.held(slot)) and self.pool.grow(slot, blocks)
        ):
            return None
        for number in range(found, len(tokens) // 2):
            self.device.array[self.pool.block(slot, number)] = self.bytes_of(tokens, number)
            self.computed += 1
        self.cache.store(slot, prefix, tokens, len(tokens))
        for number in range(len(tokens) // 2):
            self.check(slot, tokens, number)
        return found

    def end(self, which: int = 0) -> None:
        slot, prefix = self.running.pop(which % len(self.running))
        self.cache.release(slot, prefix)
        self.pool.close_slot(slot)

    def serve(self, *tokens: int) -> int | None:
        found = self.begin(tokens)
        self.end(-1)
        return found

    def bytes_of(self, tokens: tuple[int, ...], number: int):
        return pattern(hash(tokens[: 2 * number + 2]) & 0xFFFF_FFFF)

    def check(self, slot: int, tokens: tuple[int, ...], number: int) -> None:
        block = self.device.array[self.pool.block(slot, number)]
        assert np.array_equal(block, self.bytes_of(tokens, number)), (tokens, number)

    def check_integrity(self) -> None:
        self.cache.check_integrity([prefix for _, prefix in self.running])
        stored, gone = self.cache.take_changes()
        assert not (set(stored) & self.known or set(gone) - self.known)
        self.known = (self.known | set(stored)) - set(gone)
        assert self.known == {block.hash for block in self.index}

    def tiers_of(self, *tokens: int) -> list[int]:
        prefix = Prefix(2)
        prefix.extend(tokens, len(tokens) // 2)
        return [block.tier for block in self.index.match(prefix.hashes, prefix.contents)]


LONG = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def test_what_the_device_has_no_room_for_goes_to_host_memory_and_then_to_disk():
    served = Served((6, 3, 4))
    served.serve(*LONG)
    served.serve(11, 12, 13, 14, 15, 16, 17, 18, 19)
    assert served.tiers_of(*LONG) == [DEVICE, HOST, HOST, HOST]
    served.serve(21, 22, 23, 24, 25, 26, 27, 28, 29)
    assert served.tiers_of(*LONG) == [DISK] * 4
    served.check_integrity()
    assert served.serve(*LONG) == 4
    assert served.tiers_of(*LONG) == [DEVICE] * 4
    assert served.computed == 12
    served.check_integrity()


def test_what_no_tier_has_room_for_is_dropped():
    served = Served((6, 1, 1))
    served.serve(*LONG)
    served.serve(11, 12, 13, 14, 15, 16, 17, 18, 19)
    assert served.tiers_of(*LONG) == [DEVICE, HOST, DISK]
    served.check_integrity()


def test_there_may_be_a_disk_without_host_memory():
    served = Served((6, 0, 4))
    served.serve(*LONG)
    served.serve(11, 12, 13, 14, 15, 16, 17, 18, 19)
    assert served.tiers_of(*LONG) == [DEVICE, DISK, DISK, DISK]
    assert served.serve(*LONG) == 4
    served.check_integrity()


def test_a_damaged_block_and_what_follows_it_is_a_miss():
    served = Served((6, 0, 4))
    served.serve(*LONG)
    served.serve(11, 12, 13, 14, 15, 16, 17, 18, 19)
    assert served.tiers_of(*LONG) == [DEVICE, DISK, DISK, DISK]
    third = list(served.index)[2]
    damage(served.tiers, third.place)
    assert served.serve(*LONG) == 2
    assert served.tiers.statistics().failed == 1
    served.check_integrity()


def test_a_block_that_is_computed_again_replaces_its_copy_in_a_slower_tier():
    """The copy came too late: the request had begun to compute."""
    served = Served()
    served.serve(*LONG)
    slot, prefix = served.pool.open_slot(), Prefix(2)
    served.running.append((slot, prefix))
    hashes = [block.hash for block in served.index]
    served.cache.migrate((block_hash, DEVICE, HOST) for block_hash in hashes[:0:-1])
    served.pool.grow(slot, 4)
    for number in range(4):
        served.device.array[served.pool.block(slot, number)] = served.bytes_of(LONG, number)
    assert served.tiers_of(*LONG) == [DEVICE, HOST, HOST, HOST]
    served.cache.store(slot, prefix, LONG, 8)
    assert served.tiers_of(*LONG) == [DEVICE] * 4
    assert served.tiers.statistics().used == (0, 0)
    served.check_integrity()


def test_a_plan_moves_blocks_that_are_where_it_thinks_and_not_in_use():
    served = Served()
    served.serve(*LONG)
    first, _, third, last = (block.hash for block in served.index)
    assert served.cache.migrate([(first, DEVICE, HOST), (99, DEVICE, HOST)]) == 0
    assert served.cache.migrate([(last, DEVICE, DISK), (third, DEVICE, HOST)]) == 2
    assert served.tiers_of(*LONG) == [DEVICE, DEVICE, HOST, DISK]
    assert served.cache.migrate([(third, DEVICE, HOST), (last, DISK, DEVICE)]) == 0
    assert served.cache.migrate([(third, HOST, DEVICE), (last, DISK, DEVICE)]) == 2
    served.begin(LONG)
    assert served.cache.migrate([(last, DEVICE, HOST)]) == 0
    served.check_integrity()


def test_a_cache_says_which_tiers_it_has():
    served = Served((6, 0, 4))
    assert [served.cache.has_tier(tier) for tier in (-1, 0, 1, 2, 3)] == [
        False, True, False, True, False
    ]  # fmt: skip
    plain = PrefixCache(served.pool, served.index)
    assert [plain.has_tier(tier) for tier in (0, 1)] == [True, False]


def test_a_block_moves_where_its_reuse_is_worth_the_copy():
    """Computing is dear or cheap; the block is asked for every second, or was asked for once."""
    clock = VirtualClock()
    tiers = Tiers(ArrayBlocks(4), host_blocks=4, disk_blocks=4, clock=clock)
    demotion = WhereItPays(tiers, block_tokens=2, clock=clock)
    assert demotion.pays(7, DEVICE, HOST)
    for second in range(200):
        clock.advance_to(second * 1_000_000)
        demotion.used([7, 1000 + second])
    demotion.computed(tokens=10, us=10_000)
    assert demotion.pays(7, DEVICE, HOST)
    assert demotion.pays(7, HOST, DISK)
    cheap = WhereItPays(tiers, block_tokens=2, clock=clock)
    cheap.used([7])
    cheap.computed(tokens=10_000, us=1)
    assert not cheap.pays(7, DEVICE, HOST)
    demotion.computed(tokens=1, us=10_000)
    clock.advance_to(10**10)
    assert not demotion.pays(1000, HOST, DISK)


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=11).map(tuple)
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "begin", "end", "evict", "migrate", "damage", "free", "use"]),
        PROMPTS,
        st.integers(0, 40),
    ),
    max_size=40,
)


@pytest.mark.parametrize("name", known())
@settings(max_examples=60, deadline=None)
@given(
    actions=ACTIONS,
    blocks=st.tuples(st.integers(4, 12), st.integers(0, 4), st.integers(0, 4)),
    learns=st.booleans(),
)
def test_whatever_moves_a_request_finds_the_bytes_that_its_tokens_gave(
    name: str, actions, blocks, learns: bool
):
    served = Served(blocks, name, (lambda tiers: WhereItPays(tiers, 2)) if learns else None)
    for action, tokens, number in actions:
        cached = list(served.index)
        block = cached[number % len(cached)] if cached else None
        if action == "begin":
            served.begin(tokens)
        elif action == "end" and served.running:
            served.end(number)
        elif action == "evict" and block is not None:
            served.cache.evict([block.hash])
        elif action == "migrate" and block is not None:
            moves = [(block.hash, block.tier, number % 3)]
            served.cache.migrate(moves if served.cache.has_tier(number % 3) else ())
        elif action == "damage" and block is not None and block.tier == DISK:
            damage(served.tiers, block.place)
        elif action == "free":
            served.cache.make_free(number % 5)
        elif action == "use":
            served.index.use(create(known()[number % len(known())], 10), number % 3)
        served.check_integrity()
    while served.running:
        served.end()
        served.check_integrity()
    assert served.pool.num_held == 0
    served.tiers.close()
