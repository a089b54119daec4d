"""Least frequently used, with aging."""

from collections.abc import Callable, Iterator
from itertools import count

from sagec.runtime.kv.policies._order import Order, insist


class Lfu:
    """The block of least worth goes first: its uses, plus the age in which the last of them was.

    The age is the worth of the last block that went. A new block starts one above it, so that an
    old favourite that nobody uses any more is overtaken (LFU with dynamic aging). Of equal worth
    the one goes first that was used longest ago.
    """

    name = "lfu"

    def __init__(self, capacity_blocks: int) -> None:
        self._order: Order[tuple[int, int]] = Order()
        self._uses: dict[int, int] = {}
        self._age = 0
        self._tick = count()

    def stored(self, block_hash: int) -> None:
        self._uses.setdefault(block_hash, 0)
        self.touched(block_hash)

    def touched(self, block_hash: int) -> None:
        if block_hash in self._uses:
            uses = self._uses[block_hash] = self._uses[block_hash] + 1
            self._order.put(block_hash, (self._age + uses, next(self._tick)))

    def released(self, block_hash: int) -> None:
        self._order.release(block_hash)

    def removed(self, block_hash: int) -> None:
        self._uses.pop(block_hash, None)
        self._order.discard(block_hash)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        found = insist(lambda: self._order.find(may_go), self._order)
        if found is not None:
            worth, _ = self._order.rank(found)
            self._age = max(self._age, worth)
            self.removed(found)
        return found

    def blocks(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
