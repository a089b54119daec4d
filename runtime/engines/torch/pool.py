"""KV blocks: which are free, which are whose, and their tables as one array for the kernels."""

import numpy as np
import numpy.typing as npt

BlockTable = npt.NDArray[np.int32]
GROWTH = 2


class BlockPool:
    """Blocks of `block_tokens` tokens, each free or one owner's.

    An owner (one request) has a *slot*, which is its row in `tables`; the first `held(slot)`
    entries of that row are its blocks, in the order of its tokens.

    >>> pool = BlockPool(num_blocks=4, block_tokens=16)
    >>> slot = pool.open_slot()
    >>> pool.grow(slot, pool.blocks_for(17)), pool.held(slot), pool.num_free
    (True, 2, 2)
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.tables: BlockTable = np.zeros((16, 16), np.int32)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._held: dict[int, int] = {}
        self._free_slots: list[int] = list(range(15, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def open_slot(self) -> int:
        """A slot for a new owner, which holds no block yet."""
        if not self._free_slots:
            rows, columns = self.tables.shape
            self.tables = np.vstack((self.tables, np.zeros((rows, columns), np.int32)))
            self._free_slots = list(range(GROWTH * rows - 1, rows - 1, -1))
        slot = self._free_slots.pop()
        self._held[slot] = 0
        return slot

    def close_slot(self, slot: int) -> None:
        """Free the owner's blocks and its slot."""
        self.shrink(slot, 0)
        del self._held[slot]
        self._free_slots.append(slot)

    def held(self, slot: int) -> int:
        """How many blocks the owner holds."""
        return self._held[slot]

    def blocks(self, slot: int, count: int) -> BlockTable:
        """The owner's first `count` blocks."""
        return self.tables[slot, :count]

    def grow(self, slot: int, blocks: int) -> bool:
        """Give the owner blocks until it holds `blocks`; all of them, or none and False."""
        held = self._held[slot]
        if (more := blocks - held) <= 0:
            return True
        if more > len(self._free):
            return False
        while blocks > self.tables.shape[1]:
            self.tables = np.hstack((self.tables, np.zeros_like(self.tables)))
        self.tables[slot, held:blocks] = self._free[: -more - 1 : -1]
        del self._free[-more:]
        self._held[slot] = blocks
        return True

    def shrink(self, slot: int, blocks: int) -> None:
        """Take blocks from the owner's end until it holds at most `blocks`."""
        held = self._held[slot]
        if held > blocks:
            self._free.extend(self.tables[slot, blocks:held][::-1].tolist())
            self._held[slot] = blocks

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is free once or held once."""
        seen = list(self._free)
        for slot, held in self._held.items():
            seen.extend(self.tables[slot, :held].tolist())
        if sorted(seen) != list(range(self.num_blocks)):
            raise AssertionError(
                f"{self.num_blocks} blocks, but {len(self._free)} free and "
                f"{sum(self._held.values())} held, {len(set(seen))} different"
            )
        if set(self._free_slots) & self._held.keys():
            raise AssertionError("a slot is free and has an owner")
