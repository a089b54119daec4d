"""Blocks in the order in which they would go, where some may not go now."""

import heapq
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Rank = TypeVar("Rank", int, tuple[int, int])

_SPARE = 64
"""Entries of the heap that may be stale however few blocks there are."""


class Order(Generic[Rank]):
    """Blocks with a rank each, no two alike; the least goes first.

    A block that may not go is set aside, so that nobody asks about it again until `put` or
    `release` says that it is worth it: a long run of pinned blocks is passed once, not by every
    search. Every operation takes O(log n) amortised.

    >>> order: Order[int] = Order()
    >>> for block, rank in ((7, 0), (8, 1), (9, 2)):
    ...     order.put(block, rank)
    >>> order.find(lambda block: block != 7), list(order)
    (8, [7, 8, 9])
    >>> order.find(lambda block: True)  # 7 is not asked about
    8
    >>> order.release(7)
    >>> order.find(lambda block: True)
    7
    """

    def __init__(self) -> None:
        self._ranks: dict[int, Rank] = {}
        self._aside: set[int] = set()
        # Every block that is not set aside, with its rank; entries of other ranks are stale.
        self._heap: list[tuple[Rank, int]] = []

    def put(self, block_hash: int, rank: Rank) -> None:
        """Add the block, or give it another rank; it is asked about again."""
        self._ranks[block_hash] = rank
        self._aside.discard(block_hash)
        heapq.heappush(self._heap, (rank, block_hash))
        if len(self._heap) > 2 * len(self._ranks) + _SPARE:
            self._heap = [(r, b) for b, r in self._ranks.items() if b not in self._aside]
            heapq.heapify(self._heap)

    def rank(self, block_hash: int) -> Rank:
        """The block's rank."""
        return self._ranks[block_hash]

    def discard(self, block_hash: int) -> None:
        """Take the block out, if it is in."""
        if self._ranks.pop(block_hash, None) is not None:
            self._aside.discard(block_hash)

    def release(self, block_hash: int) -> None:
        """Ask about the block again, if it was set aside; its rank stays."""
        if block_hash in self._aside:
            self._aside.remove(block_hash)
            heapq.heappush(self._heap, (self._ranks[block_hash], block_hash))

    def release_all(self) -> None:
        """Ask about every block again."""
        for block_hash in tuple(self._aside):
            self.release(block_hash)

    def first(self) -> int | None:
        """The block of least rank of those that are not set aside."""
        while self._heap:
            rank, block_hash = self._heap[0]
            if self._ranks.get(block_hash) == rank:
                return block_hash
            heapq.heappop(self._heap)
        return None

    def set_aside(self, first: int) -> None:
        """Pass over the block that `first` answered until `put` or `release`."""
        heapq.heappop(self._heap)
        self._aside.add(first)

    def find(self, may_go: Callable[[int], bool]) -> int | None:
        """The first block that may go, which stays in; those before it are set aside."""
        while (block_hash := self.first()) is not None and not may_go(block_hash):
            self.set_aside(block_hash)
        return block_hash

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._ranks

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._ranks, key=self._ranks.__getitem__))

    def __len__(self) -> int:
        return len(self._ranks)


def insist(find: Callable[[], int | None], *orders: Order[Any]) -> int | None:
    """What `find` finds in these; where that is nothing, once more with all that was set aside."""
    found = find()
    if found is None:
        for order in orders:
            order.release_all()
        found = find()
    return found
