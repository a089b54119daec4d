"""The prefix cache of an instance: blocks that outlive their requests, by what they hold.

A request *attaches* to the cached blocks of its prefix and holds them like its own. What it
computes it *stores*, whole blocks only, at once, so that others may attach while it runs. When it
ends, its blocks stay, idle, until their room is needed. Then they move to a slower tier, where it
pays, and come back when a request attaches to them.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sagec.runtime.kv.demotion import Always, Demotion
from sagec.runtime.kv.hashes import block_contents, block_hashes
from sagec.runtime.kv.migration import DEVICE, DISK, HOST
from sagec.runtime.kv.pool import BlockPool, QuotaExceeded
from sagec.runtime.kv.prefix_index import CachedBlock, PrefixIndex
from sagec.runtime.kv.tiers import TierError, Tiers


@dataclass(slots=True)
class Prefix:
    """The whole blocks of one owner's tokens, named as far as somebody asked.

    leased: its first blocks, as far as they are cached and it holds them.
    """

    block_tokens: int
    salt: str = ""
    hashes: tuple[int, ...] = ()
    contents: list[bytes] = field(default_factory=list)
    leased: list[CachedBlock] = field(default_factory=list)

    def extend(self, tokens: Sequence[int], num_blocks: int) -> None:
        """Name the first `num_blocks` blocks of `tokens`, which begin as they did before."""
        known = len(self.hashes)
        if num_blocks > known:
            named = tokens[: num_blocks * self.block_tokens]
            self.hashes = block_hashes(named, self.block_tokens, self.salt, self.hashes)
            self.contents += block_contents(named, self.block_tokens, self.salt, known)


class PrefixCache:
    """Keeps a pool, an index and tiers of one mind: a block is where the index says.

    tiers: None where there is none but the device; else the index has three policies. demotion:
    which blocks are worth a place in a slower tier.
    """

    def __init__(
        self,
        pool: BlockPool,
        index: PrefixIndex,
        tiers: Tiers | None = None,
        demotion: Demotion | None = None,
    ) -> None:
        self._pool = pool
        self._index = index
        self._tiers = tiers
        self._demotion = demotion or Always()
        self._changes: dict[int, bool] = {}  # hash -> whether it is cached now, and was not before

    @property
    def index(self) -> PrefixIndex:
        """What is cached; to look at, and to give another policy."""
        return self._index

    @property
    def tiers(self) -> Tiers | None:
        """Where blocks are that the device has no room for; None: nowhere."""
        return self._tiers

    def has_tier(self, tier: int) -> bool:
        """Whether blocks can be in that tier."""
        if tier == DEVICE:
            return True
        return self._tiers is not None and tier in (HOST, DISK) and self._tiers.capacity(tier) > 0

    def close(self) -> None:
        """Give back what the slower tiers take."""
        if self._tiers is not None:
            self._tiers.close()

    def attach(
        self, slot: int, prefix: Prefix, tokens: Sequence[int], *, counted: bool = True
    ) -> int:
        """Hold the longest cached prefix of `tokens`, but not their last one; how many tokens.

        The last token is left to compute, for its logits are wanted. The owner has computed nothing
        of its own yet; it may be attached already, and attaches to what has come since. counted:
        whether this is the one time that the request counts in the index's figures.
        """
        limit = (len(tokens) - 1) // prefix.block_tokens
        prefix.extend(tokens, limit)
        names = prefix.hashes[:limit], prefix.contents[:limit]
        found = self._index.lookup(*names) if counted else self._index.match(*names)
        if counted:
            self._demotion.used(names[0])
        if len(found) > len(prefix.leased) and found[: len(prefix.leased)] == prefix.leased:
            self._lease(slot, prefix, found)
        return len(prefix.leased) * prefix.block_tokens

    def store(self, slot: int, prefix: Prefix, tokens: Sequence[int], computed_tokens: int) -> None:
        """Cache the owner's whole blocks of computed tokens; it goes on holding them.

        Where another one has computed the same block before, the owner holds that one from now on.
        """
        count, begin = computed_tokens // prefix.block_tokens, len(prefix.leased)
        after = prefix.leased[-1] if begin else None
        if count <= begin or (after is not None and not after.is_cached):
            return
        prefix.extend(tokens, count)
        places = self._pool.blocks(slot, count)[begin:].tolist()
        names = prefix.hashes[begin:count], prefix.contents[begin:count]
        known = self._index.match(*names, after)
        for block, place in zip(known, places, strict=False):
            if block.tier != DEVICE:
                self._replace(block, place)
        after, begin = known[-1] if known else after, len(known)
        new = self._index.insert(names[0][begin:], places[begin:], names[1][begin:], after)
        for block in new:
            self._pool.keep(block.place)
            self._note(block.hash, cached=True)
        self._index.pin(known)
        self._index.pin(new)
        prefix.leased += known + new
        if known:
            self._pool.share(slot, [block.place for block in prefix.leased])

    def release(self, slot: int, prefix: Prefix) -> None:
        """Let go of all blocks of the owner; those that are cached stay so."""
        self._pool.shrink(slot, 0)
        self._index.unpin(prefix.leased)
        prefix.leased.clear()

    def make_free(self, blocks: int) -> bool:
        """Have so many free blocks, at the cost of idle ones; false where there are too few."""
        if self._pool.num_free + self._pool.num_idle < blocks:
            return False
        while self._pool.num_free < blocks:
            block = self._index.victim(DEVICE)
            if block is None:
                return False
            self._give_up(block)
        return True

    def evict(self, hashes: Iterable[int]) -> int:
        """Drop the blocks of these hashes, and what follows them, unless in use; how many went."""
        before = len(self._index)
        for block_hash in hashes:
            block = self._index.find(block_hash)
            if block is not None and not block.pins:
                self._drop(block)
        return before - len(self._index)

    def migrate(self, moves: Iterable[tuple[int, int, int]]) -> int:
        """Move blocks, each (hash, its tier, the tier it goes to); how many went.

        One that is elsewhere by now, in use or without room there stays where it is.
        """
        count = 0
        for block_hash, source, target in moves:
            block = self._index.find(block_hash)
            if block is None or block.tier != source or not self.has_tier(target):
                continue
            if not self._index.can_move(block, target):
                continue
            self._index.pin([block])  # what makes room for it must not take it
            count += self._fetch(block) if target == DEVICE else self._send(block, target)
            self._index.unpin([block])
        return count

    def computed(self, tokens: int, us: int) -> None:
        """A step computed so many prompt tokens and nothing else: what KV is worth."""
        self._demotion.computed(tokens, us)

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Hashes cached, and no longer cached, since this was asked last."""
        changes, self._changes = self._changes, {}
        stored = tuple(block_hash for block_hash, cached in changes.items() if cached)
        return stored, tuple(block_hash for block_hash, cached in changes.items() if not cached)

    def check_integrity(self, prefixes: Iterable[Prefix]) -> None:
        """Raise AssertionError unless pool, index and the owners' prefixes agree."""
        self._pool.check_integrity()
        self._index.check_integrity()
        pins: dict[int, int] = {}
        for prefix in prefixes:
            for block in prefix.leased:
                pins[block.hash] = pins.get(block.hash, 0) + block.is_cached
        places: tuple[set[int], ...] = (set(), set(), set())
        for block in self._index:
            places[block.tier].add(block.place)
            holders = 0 if block.tier else self._pool.holders(block.place)
            if not block.pins == pins.get(block.hash, 0) == holders:
                raise AssertionError(
                    f"block {block.hash}: {block.pins} pins, {pins.get(block.hash, 0)} leases, "
                    f"{holders} holders"
                )
        if self._tiers is not None:
            self._tiers.check_integrity((places[HOST], places[DISK]))
        if places[DEVICE] != {
            block for block in range(self._pool.num_blocks) if self._pool.is_kept(block)
        }:
            raise AssertionError("the pool keeps other blocks than the index names")

    def _lease(self, slot: int, prefix: Prefix, found: list[CachedBlock]) -> None:
        """Hold what was found, as far as it can be had on the device."""
        self._index.pin(found)  # what makes room for one of them must not take another
        here = list(itertools.takewhile(lambda b: b.tier == DEVICE or self._fetch(b), found))
        try:
            self._pool.share(slot, [block.place for block in here])
        except QuotaExceeded:
            here = prefix.leased  # the request asks for blocks of its own next, and hears the same
        self._index.pin(here[len(prefix.leased) :])
        self._index.unpin(found)
        prefix.leased = here

    def _fetch(self, block: CachedBlock) -> bool:
        """Bring a pinned block to the device; false where there is no room, or it is damaged."""
        assert self._tiers is not None
        if not block.is_cached or not self.make_free(1):
            return False
        place = self._pool.take_idle()
        try:
            self._tiers.move(block.tier, block.place, DEVICE, place)
        except TierError:
            self._pool.forget(place)
            self._drop(block)
            return False
        self._index.move(block, DEVICE, place)
        return True

    def _replace(self, block: CachedBlock, place: int) -> None:
        """Let a block of a slower tier be that one of the device, where it was computed again."""
        assert self._tiers is not None
        self._tiers.free(block.tier, block.place)
        self._index.move(block, DEVICE, place)
        self._pool.keep(place)

    def _give_up(self, block: CachedBlock) -> None:
        """Move a block that its policy gave up to the next tier where it pays, or drop it."""
        source = block.tier
        slower = range(source + 1, DISK + 1) if self._tiers is not None else ()
        for target in slower:
            if not self._index.can_move(block, target):
                continue
            if self._demotion.pays(block.hash, source, target) and self._send(block, target):
                return
        self._drop(block)

    def _send(self, block: CachedBlock, target: int) -> bool:
        """Move the block to a slower tier; false where that has no place for it."""
        tiers = self._tiers
        assert tiers is not None
        if not tiers.num_free(target) and (last := self._index.victim(target)) is not None:
            self._give_up(last)
        if not tiers.num_free(target):
            return False
        source, place = block.tier, block.place
        try:
            goal = tiers.move(source, place, target)
        except TierError:
            return False
        self._index.move(block, target, goal)
        if source == DEVICE:
            self._pool.forget(place)
        return True

    def _drop(self, block: CachedBlock) -> None:
        """Take the block, and what follows it, out of index and tiers."""
        for gone in self._index.remove(block):
            if gone.tier == DEVICE:
                self._pool.forget(gone.place)
            elif self._tiers is not None:
                self._tiers.free(gone.tier, gone.place)
            self._note(gone.hash, cached=False)

    def _note(self, block_hash: int, *, cached: bool) -> None:
        """Remember a change to tell; one that undoes an earlier one cancels it."""
        if self._changes.get(block_hash, cached) != cached:
            del self._changes[block_hash]
        else:
            self._changes[block_hash] = cached
