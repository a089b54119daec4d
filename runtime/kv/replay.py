"""What a cache would have found: recorded requests through an eviction policy, and two bounds.

A request is the hashes of its blocks. Requests come one after the other: each finds its longest
cached prefix, and then all its blocks are cached, as far as there is room for them.

`unbounded` is the cache that never drops a block: no cache of any size finds more. `belady` knows
the future: where there is no room, it drops the block whose next use is farthest, be it the newest
one. No choice of victims finds more in a cache of that size. It also keeps to the rule that a block
goes only after those that follow it: whoever uses a block uses its parent just before, so that the
block whose next use is farthest is a leaf. One thing only it may do and a cache of a running engine
may not: leave out a block that is being computed. So it is a bound that is almost reached, and not
quite.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sagec.runtime.kv.policies import EvictionPolicy
from sagec.runtime.kv.prefix_index import PrefixIndex

Requests = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Replayed:
    """What came of the requests: blocks asked for, found, and dropped."""

    blocks: int
    hits: int
    evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Blocks found, of those asked for; 0 of none."""
        return self.hits / self.blocks if self.blocks else 0.0


def replay(requests: Requests, policy: EvictionPolicy, capacity_blocks: int) -> Replayed:
    """The requests through a prefix index of that size whose victims `policy` names.

    A request's own blocks are pinned while room is made for it. What finds no room is not cached.

    >>> from sagec.runtime.kv.policies import create
    >>> replay([[1, 2], [1, 3], [1, 2]], create("lru", 2), capacity_blocks=2)
    Replayed(blocks=6, hits=2, evictions=2)
    """
    index = PrefixIndex(policy, block_tokens=1)
    for hashes in requests:
        found = index.lookup(hashes)
        index.pin(found)
        index.evict(len(index) + len(hashes) - len(found) - capacity_blocks)
        room = capacity_blocks - len(index)
        index.insert(hashes[len(found) : len(found) + room], after=found[-1] if found else None)
        index.unpin(found)
    figures = index.statistics()
    return Replayed(figures.queried_blocks, figures.hit_blocks, figures.evictions)


def unbounded(requests: Requests) -> Replayed:
    """What a cache finds that never drops a block.

    >>> unbounded([[1, 2], [1, 3], [1, 2]])
    Replayed(blocks=6, hits=3, evictions=0)
    """
    blocks = sum(map(len, requests))
    return Replayed(blocks, blocks - len({block for hashes in requests for block in hashes}))


def belady(requests: Requests, capacity_blocks: int) -> Replayed:
    """What a cache of that size finds at best; what is never used again is not cached at all.

    >>> belady([[1, 2], [1, 3], [1, 2]], capacity_blocks=2)
    Replayed(blocks=6, hits=3, evictions=0)
    """
    uses = [block for hashes in requests for block in hashes]
    next_use: dict[int, int] = {}
    coming: list[int | None] = [None] * len(uses)
    for moment in range(len(uses) - 1, -1, -1):
        coming[moment] = next_use.get(uses[moment])
        next_use[uses[moment]] = moment
    cached: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = evictions = 0
    for block, after in zip(uses, coming, strict=True):
        # Its entry in `farthest` stays, but names a moment that is over: it never comes first.
        hits += cached.pop(block, None) is not None
        if after is None:
            continue
        cached[block] = after
        heapq.heappush(farthest, (-after, block))
        if len(cached) > capacity_blocks:
            _, dropped = heapq.heappop(farthest)
            del cached[dropped]
            evictions += dropped != block
    return Replayed(len(uses), hits, evictions)
