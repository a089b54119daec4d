"""Least recently used."""

from collections.abc import Callable, Iterator


class Lru:
    """The block that was used longest ago goes first."""

    name = "lru"

    def __init__(self, capacity_blocks: int) -> None:
        self._blocks: dict[int, None] = {}

    def stored(self, block_hash: int) -> None:
        self.touched(block_hash)

    def touched(self, block_hash: int) -> None:
        self._blocks.pop(block_hash, None)
        self._blocks[block_hash] = None

    def removed(self, block_hash: int) -> None:
        self._blocks.pop(block_hash, None)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        found = next((block for block in self._blocks if may_go(block)), None)
        if found is not None:
            del self._blocks[found]
        return found

    def blocks(self) -> Iterator[int]:
        return iter(tuple(self._blocks))

    def __len__(self) -> int:
        return len(self._blocks)
