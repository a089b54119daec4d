"""Which cached block holds the KV of which prefix: a tree, whose nodes are blocks.

A block's hash stands for all tokens before its end (`block_hashes`), so that a request's blocks are
a path from the root. A node is one block; there is nothing to gain from longer edges, for a path is
asked for by its hashes, one a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sagec.runtime.kv.policies import EvictionPolicy


@dataclass(slots=True, eq=False)
class CachedBlock:
    """A block of the tree.

    content: what its tokens are, where hits are to be checked. tier and place: where its bytes are;
    a child lies in its parent's tier or in a slower one. pins: requests that use it. near: children
    in its own tier. chosen: its policy gave it up; it moves or leaves now.
    """

    hash: int
    content: bytes | None
    parent: "CachedBlock | None"
    place: int
    tier: int = 0
    pins: int = 0
    near: int = 0
    chosen: bool = False
    children: dict[int, "CachedBlock"] = field(default_factory=dict)

    @property
    def may_go(self) -> bool:
        """Whether it may leave its tier: nobody uses it, and no child would be cut off."""
        return not (self.pins or self.near)

    @property
    def is_cached(self) -> bool:
        """Whether it is in the tree still."""
        return self.parent is not None


@dataclass(frozen=True)
class IndexStatistics:
    """What was asked of an index since it was made, and what it holds.

    A query is a `lookup`; collisions: blocks that had the hash of a cached one and other tokens.
    blocks: cached ones, by tier.
    """

    block_tokens: int
    queries: int
    queried_blocks: int
    hit_blocks: int
    stored_blocks: int
    evictions: int
    invalidations: int
    collisions: int
    blocks: tuple[int, ...]

    @property
    def hit_tokens(self) -> int:
        """Tokens whose KV was found."""
        return self.hit_blocks * self.block_tokens

    @property
    def hit_rate(self) -> float:
        """Blocks found, of those asked for."""
        return self.hit_blocks / self.queried_blocks if self.queried_blocks else 0.0


class PrefixIndex:
    """A radix tree over block hashes, which an eviction policy keeps in bounds.

    Every operation takes time in proportion to the blocks that it is given (and what the policy
    takes); nothing depends on how many are cached. A block goes only when nobody has pinned it and
    it has no child, so that every cached block can be reached.

    >>> from sagec.runtime.kv.policies import create
    >>> index = PrefixIndex(create("lru", 3), block_tokens=16)
    >>> blocks = index.insert([11, 12, 13])
    >>> [block.hash for block in index.lookup([11, 12, 99])]
    [11, 12]
    >>> [block.hash for block in index.evict(2)], len(index)
    ([13, 12], 1)

    slower: policies of slower tiers, 1 and on, that blocks may be moved to.
    """

    def __init__(
        self, policy: EvictionPolicy, block_tokens: int, slower: Sequence[EvictionPolicy] = ()
    ) -> None:
        self.block_tokens = block_tokens
        self._policies = [policy, *slower]
        self._blocks: dict[int, CachedBlock] = {}
        # Above all tiers and always pinned, so that it needs no special care.
        self._root = CachedBlock(hash=0, content=None, parent=None, place=0, tier=-1, pins=1)
        self._num_blocks = [0] * len(self._policies)
        self._num_unpinned = [0] * len(self._policies)
        self._queries = self._queried_blocks = self._hit_blocks = 0
        self._stored = self._evictions = self._invalidations = self._collisions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._blocks

    def __iter__(self) -> Iterator[CachedBlock]:
        return iter(self._blocks.values())

    def find(self, block_hash: int) -> CachedBlock | None:
        """The block of this hash, whatever it follows."""
        return self._blocks.get(block_hash)

    def match(
        self,
        hashes: Sequence[int],
        contents: Sequence[bytes] | None = None,
        after: CachedBlock | None = None,
    ) -> list[CachedBlock]:
        """The blocks of the longest cached prefix; nobody takes note of it.

        after: the block that they follow; None: they are the first ones.

        contents: what the blocks' tokens are (`block_contents`). With them a hit is checked, and a
        block of the same hash but other tokens, here or before, is none.
        """
        found: list[CachedBlock] = []
        block = after or self._root
        for number, block_hash in enumerate(hashes):
            child = block.children.get(block_hash)
            if child is None:
                break
            if contents is not None and child.content != contents[number]:
                break
            block = child
            found.append(block)
        return found

    def lookup(
        self, hashes: Sequence[int], contents: Sequence[bytes] | None = None
    ) -> list[CachedBlock]:
        """The blocks of the longest cached prefix, as `match` gives them, counted and touched."""
        found = self.match(hashes, contents)
        for block in found:
            self._policies[block.tier].touched(block.hash)
        self._queries += 1
        self._queried_blocks += len(hashes)
        self._hit_blocks += len(found)
        if len(found) < len(hashes) and hashes[len(found)] in self._blocks:
            self._collisions += 1
        return found

    def insert(
        self,
        hashes: Sequence[int],
        places: Sequence[int] = (),
        contents: Sequence[bytes] | None = None,
        after: CachedBlock | None = None,
    ) -> list[CachedBlock]:
        """Enter the blocks of a prefix, or those that follow the block `after`; they, as cached.

        A block that is cached already stays as it is. The answer ends before a block whose hash
        another one has: what is cached has its name first. places: block numbers, 0 if not given.

        Raises ValueError where a new block would follow one of a slower tier; move that one first.
        """
        entered: list[CachedBlock] = []
        block = after or self._root
        for number, block_hash in enumerate(hashes):
            content = contents[number] if contents is not None else None
            child = block.children.get(block_hash)
            if child is None and block_hash not in self._blocks:
                child = self._enter(block, block_hash, content, places[number] if places else 0)
            elif child is None or child.content != content:
                self._collisions += 1
                break
            block = child
            entered.append(block)
        return entered

    def pin(self, blocks: Sequence[CachedBlock]) -> None:
        """Keep the blocks until as many calls of `unpin`."""
        for block in blocks:
            self._num_unpinned[block.tier] -= not block.pins
            block.pins += 1

    def unpin(self, blocks: Sequence[CachedBlock]) -> None:
        """Undo one `pin` of each of the blocks, also of those that were invalidated meanwhile."""
        for block in blocks:
            block.pins -= 1
            if not block.pins and block.is_cached:
                self._num_unpinned[block.tier] += 1
                self._released(block)

    def victim(self, tier: int = 0) -> CachedBlock | None:
        """The block that the tier's policy gives up, or None where all are in use.

        The policy has forgotten it: the caller moves or removes it.
        """
        if not self._num_unpinned[tier]:
            return None
        blocks = self._blocks
        block_hash = self._policies[tier].victim(lambda block_hash: blocks[block_hash].may_go)
        if block_hash is None:
            return None
        block = blocks[block_hash]
        block.chosen = True
        return block

    def evict(self, count: int, tier: int = 0) -> list[CachedBlock]:
        """Drop `count` blocks of the tier, or as many as may go, in the policy's order.

        A block whose children lie in a slower tier takes them with it, beyond the count.
        """
        gone: list[CachedBlock] = []
        for _ in range(count):
            block = self.victim(tier)
            if block is None:
                break
            gone += self.remove(block)
        return gone

    def remove(self, block: CachedBlock) -> list[CachedBlock]:
        """Drop the block, and all that follows it; what was dropped, the last one first.

        They count as evicted where a policy chose it, and else as invalidated.
        """
        path, order = [block], []
        while path:
            order.append(one := path.pop())
            path.extend(one.children.values())
        if block.chosen:
            self._evictions += len(order)
        else:
            self._invalidations += len(order)
        for one in reversed(order):
            self._leave(one)
        return order[::-1]

    def invalidate(self, block_hash: int) -> list[CachedBlock]:
        """Drop the block of this hash, and all that follows it, in use or not; what was dropped.

        Who has pinned one keeps what is at its place.
        """
        block = self._blocks.get(block_hash)
        return self.remove(block) if block is not None else []

    def can_move(self, block: CachedBlock, tier: int) -> bool:
        """Whether the block may go to that tier: parents lie no slower than their children."""
        parent = block.parent
        if parent is None or block.pins or tier == block.tier:
            return False
        if tier < block.tier:
            return parent.tier <= tier
        return all(child.tier >= tier for child in block.children.values())

    def move(self, block: CachedBlock, tier: int, place: int) -> None:
        """Write down that the block's bytes are in another tier now."""
        assert block.parent is not None
        parent, source = block.parent, block.tier
        if not block.chosen:
            self._policies[source].removed(block.hash)
        self._num_blocks[source] -= 1
        self._num_blocks[tier] += 1
        self._num_unpinned[source] -= not block.pins
        self._num_unpinned[tier] += not block.pins
        block.tier, block.place, block.chosen = tier, place, False
        block.near = sum(child.tier == tier for child in block.children.values())
        self._policies[tier].stored(block.hash)
        parent.near += (parent.tier == tier) - (parent.tier == source)
        self._released(parent)

    def use(self, policy: EvictionPolicy, tier: int = 0) -> None:
        """Let another policy, an empty one, choose from now on; it takes over the order."""
        if len(policy):
            raise ValueError(f"policy {policy.name!r} has {len(policy)} blocks; give an empty one")
        for block_hash in self._policies[tier].blocks():
            policy.stored(block_hash)
        self._policies[tier] = policy

    def policy(self, tier: int = 0) -> EvictionPolicy:
        """Who chooses what goes from that tier."""
        return self._policies[tier]

    def statistics(self) -> IndexStatistics:
        """Figures since the index was made."""
        return IndexStatistics(
            block_tokens=self.block_tokens,
            queries=self._queries,
            queried_blocks=self._queried_blocks,
            hit_blocks=self._hit_blocks,
            stored_blocks=self._stored,
            evictions=self._evictions,
            invalidations=self._invalidations,
            collisions=self._collisions,
            blocks=tuple(self._num_blocks),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless tree, counts and policies agree."""
        reached, waiting = 0, list(self._root.children.values())
        while waiting:
            block = waiting.pop()
            waiting.extend(block.children.values())
            reached += 1
            if self._blocks.get(block.hash) is not block:
                raise AssertionError(f"block {block.hash} is in the tree under another's name")
            near = sum(child.tier == block.tier for child in block.children.values())
            if near != block.near or block.pins < 0 or block.chosen:
                raise AssertionError(f"block {block.hash}: {block.near} near, {block.pins} pins")
            for child in block.children.values():
                if child.parent is not block or child.tier < block.tier:
                    raise AssertionError(f"block {child.hash} lies wrong under {block.hash}")
        if reached != len(self._blocks):
            raise AssertionError(f"{len(self._blocks)} blocks, of which {reached} are reached")
        self._check_tiers()

    def _check_tiers(self) -> None:
        for tier, policy in enumerate(self._policies):
            blocks = {block.hash for block in self if block.tier == tier}
            unpinned = sum(not self._blocks[block_hash].pins for block_hash in blocks)
            if {*policy.blocks()} != blocks or len(policy) != len(blocks):
                raise AssertionError(f"tier {tier}: policy {policy.name!r} has other blocks")
            if (len(blocks), unpinned) != (self._num_blocks[tier], self._num_unpinned[tier]):
                raise AssertionError(f"tier {tier}: {len(blocks)} blocks, {unpinned} not pinned")

    def _enter(
        self, parent: CachedBlock, block_hash: int, content: bytes | None, place: int
    ) -> CachedBlock:
        if parent.tier > 0:
            raise ValueError(f"block {parent.hash} is in tier {parent.tier}; move it to 0 first")
        block = CachedBlock(block_hash, content, parent, place)
        parent.children[block_hash] = self._blocks[block_hash] = block
        parent.near += parent.tier == 0
        self._num_blocks[0] += 1
        self._num_unpinned[0] += 1
        self._stored += 1
        self._policies[0].stored(block_hash)
        return block

    def _leave(self, block: CachedBlock) -> None:
        """Take a block without children out of the tree."""
        parent = block.parent
        assert parent is not None
        del self._blocks[block.hash], parent.children[block.hash]
        self._num_blocks[block.tier] -= 1
        self._num_unpinned[block.tier] -= not block.pins
        if not block.chosen:
            self._policies[block.tier].removed(block.hash)
        block.parent, block.chosen = None, False
        parent.near -= parent.tier == block.tier
        self._released(parent)

    def _released(self, block: CachedBlock) -> None:
        """Tell the policy of a block that may go now, whether or not it could before."""
        if block.may_go:
            self._policies[block.tier].released(block.hash)
