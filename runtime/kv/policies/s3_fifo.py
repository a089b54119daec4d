"""Three FIFO queues: a small one that new blocks must survive, a main one, and ghosts."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count

from sagec.runtime.kv.policies._order import Order, insist

SMALL_SHARE, GHOST_SHARE = 0.1, 0.9
"""Of the cache's capacity: where `small` begins to give blocks, and how many ghosts there are."""

PROMOTE_USES, MOST_USES = 2, 3
"""Uses since it came that take a block from small to main; uses that are counted."""


class S3Fifo:
    """New blocks enter `small`, those whose ghost is still known enter `main`.

    At the head of small, a block that was used twice since it came moves on to main, its count at
    0; another one goes and leaves a ghost. At the head of main, a block that was used goes back to
    the end with one use less; another one goes. Small gives a block as long as it holds a tenth of
    the cache. A block that may not go keeps its place; where none may go in one queue, the other
    gives one.
    """

    name = "s3-fifo"

    def __init__(self, capacity_blocks: int) -> None:
        self.small_blocks = max(1, int(SMALL_SHARE * capacity_blocks))
        self.ghost_blocks = int(GHOST_SHARE * capacity_blocks)
        self._small: Order[int] = Order()
        self._main: Order[int] = Order()
        self._ghosts: OrderedDict[int, None] = OrderedDict()
        self._uses: dict[int, int] = {}
        self._tick = count()

    def stored(self, block_hash: int) -> None:
        if block_hash in self._uses:
            self.touched(block_hash)
            return
        known = block_hash in self._ghosts
        if known:
            del self._ghosts[block_hash]
        self._uses[block_hash] = 0
        (self._main if known else self._small).put(block_hash, next(self._tick))

    def touched(self, block_hash: int) -> None:
        if (uses := self._uses.get(block_hash)) is not None and uses < MOST_USES:
            self._uses[block_hash] = uses + 1
            # It may move on now, whether it may go or not.
            self.released(block_hash)

    def released(self, block_hash: int) -> None:
        self._small.release(block_hash)
        self._main.release(block_hash)

    def removed(self, block_hash: int) -> None:
        self._small.discard(block_hash)
        self._main.discard(block_hash)
        self._ghosts.pop(block_hash, None)
        self._uses.pop(block_hash, None)

    def victim(self, may_go: Callable[[int], bool]) -> int | None:
        found = insist(lambda: self._find(may_go), self._small, self._main)
        if found is None:
            return None
        leaves_ghost = found in self._small
        self.removed(found)
        if leaves_ghost:
            self._ghosts[found] = None
            if len(self._ghosts) > self.ghost_blocks:
                self._ghosts.popitem(last=False)
        return found

    def blocks(self) -> Iterator[int]:
        """Small before main, each in its order; which of them gives a block changes as they go."""
        yield from self._small
        yield from self._main

    def __len__(self) -> int:
        return len(self._uses)

    def _find(self, may_go: Callable[[int], bool]) -> int | None:
        """The block to go, after what precedes it has moved on."""
        if len(self._small) >= self.small_blocks:
            found = self._find_in_small(may_go)
            return self._find_in_main(may_go) if found is None else found
        found = self._find_in_main(may_go)
        return self._find_in_small(may_go) if found is None else found

    def _find_in_small(self, may_go: Callable[[int], bool]) -> int | None:
        while (block_hash := self._small.first()) is not None:
            if self._uses[block_hash] >= PROMOTE_USES:
                self._small.discard(block_hash)
                self._uses[block_hash] = 0
                self._main.put(block_hash, next(self._tick))
            elif may_go(block_hash):
                break
            else:
                self._small.set_aside(block_hash)
        return block_hash

    def _find_in_main(self, may_go: Callable[[int], bool]) -> int | None:
        while (block_hash := self._main.first()) is not None:
            if uses := self._uses[block_hash]:
                self._uses[block_hash] = uses - 1
                self._main.put(block_hash, next(self._tick))
            elif may_go(block_hash):
                break
            else:
                self._main.set_aside(block_hash)
        return block_hash
