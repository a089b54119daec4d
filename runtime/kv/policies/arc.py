"""Adaptive replacement: recency against frequency, balanced by what came back."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count

from sagec.runtime.kv.policies._order import Order, insist

Ghosts = OrderedDict[int, None]


class Arc:
    """Blocks used once since they came (T1) or more often (T2), each list by age.

    B1 and B2 remember the blocks that went from T1 and T2. One of them that comes back says that
    its list was too short, and moves `target` (p), the length that T1 should have, towards it.
    Whichever of T1 and T2 is longer than that allows gives the next block; where nothing in it may
    go, the other one.

    With c = capacity_blocks, |T1| + |B1| <= c and all four together <= 2c, as long as the cache
    holds no more than c. The cache asks for a victim before it says what it makes room for, so that
    a block's return moves the target after the eviction that it caused, not before.
    """

    name = "arc"

    def __init__(self, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.target = 0.0
        self._once: Order[int] = Order()
        self._often: Order[int] = Order()
        self._once_ghosts: Ghosts = OrderedDict()
        self._often_ghosts: Ghosts = OrderedDict()
        self._tick = count()

    def stored(self, block_hash: int) -> None:
        if block_hash in self._once or block_hash in self._often:
            self.touched(block_hash)
        elif block_hash in self._once_ghosts:
            step = max(len(self._often_ghosts) / len(self._once_ghosts), 1)
            self.target = min(self.target + step, self.capacity_blocks)
            del self._once_ghosts[block_hash]
            self._often.put(block_hash, next(self._tick))
        elif block_hash in self._often_ghosts:
            step = max(len(self._once_ghosts) / len(self._often_ghosts), 1)
            self.target = max(self.target - step, 0)
            del self._often_ghosts[block_hash]
            self._often.put(block_hash, next(self._tick))
        else:
            self._once.put(block_hash, next(self._tick))
        self._trim()

    def touched(self, block_hash: int) -> None:
        if block_hash in self._once:
            self._once.discard(block_hash)
            self._often.put(block_hash, next(self._tick))
        elif block_hash in self._often:
            self._often.put(block_hash, next(self._tick))

    def released(self, block_hash: int) -> None:
        self._once.release(block_hash)
        self._often.release(block_hash)

    def removed(self, block_hash: int) -> None:
        self._once.discard(block_hash)
        self._often.discard(block_hash)
        self._once_ghosts.pop(block_hash, None)
        self._often_ghosts.pop(block_hash, None)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        found = insist(lambda: self._find(may_go), self._once, self._often)
        if found is None:
            return None
        ghosts = self._once_ghosts if found in self._once else self._often_ghosts
        self._once.discard(found)
        self._often.discard(found)
        ghosts[found] = None
        self._trim()
        return found

    def blocks(self) -> Iterator[int]:
        for order in self._lists():
            yield from order

    def sizes(self) -> tuple[int, int, int, int]:
        """Lengths of T1, T2, B1 and B2."""
        ghosts = len(self._once_ghosts), len(self._often_ghosts)
        return len(self._once), len(self._often), *ghosts

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def _lists(self) -> tuple[Order[int], Order[int]]:
        """T1 and T2, first the one that is to give a block."""
        lists = self._once, self._often
        return lists if len(self._once) > self.target else lists[::-1]

    def _find(self, may_go: Callable[[int], bool]) -> int | None:
        first, second = self._lists()
        found = first.find(may_go)
        return second.find(may_go) if found is None else found

    def _trim(self) -> None:
        """Forget the oldest ghosts that are too many."""
        capacity = self.capacity_blocks
        while self._once_ghosts and len(self._once) + len(self._once_ghosts) > capacity:
            self._once_ghosts.popitem(last=False)
        while self._often_ghosts and sum(self.sizes()) > 2 * capacity:
            self._often_ghosts.popitem(last=False)
