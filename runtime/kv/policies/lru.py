"""Least recently used."""

from collections.abc import Callable, Iterator
from itertools import count

from sagec.runtime.kv.policies._order import Order, insist


class Lru:
    """The block that was used longest ago goes first."""

    name = "lru"

    def __init__(self, capacity_blocks: int) -> None:
        self._order: Order[int] = Order()
        self._tick = count()

    def stored(self, block_hash: int) -> None:
        self._order.put(block_hash, next(self._tick))

    def touched(self, block_hash: int) -> None:
        if block_hash in self._order:
            self._order.put(block_hash, next(self._tick))

    def released(self, block_hash: int) -> None:
        self._order.release(block_hash)

    def removed(self, block_hash: int) -> None:
        self._order.discard(block_hash)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        found = insist(lambda: self._order.find(may_go), self._order)
        if found is not None:
            self._order.discard(found)
        return found

    def blocks(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
