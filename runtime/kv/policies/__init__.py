"""Eviction policies: which cached block goes when room is needed; one file each, found by its name.

The policy `s3-fifo` is the class `S3Fifo` in `s3_fifo.py`; nothing else lists it.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

from sagec.runtime import by_name


class PolicyError(ValueError):
    """A policy that does not exist; says which do."""


class EvictionPolicy(Protocol):
    """Orders the blocks of a cache, each named by its hash.

    stored: a block is in the cache now. touched: it was hit. removed: it left the cache for another
    reason than `victim`; its history is forgotten. victim: the next block to go, of those that may
    (no pinned one, no inner node of the prefix tree), or None; it has left the cache then, and what
    the policy remembers of evicted blocks, it remembers of this one. blocks: those in the cache,
    the first to go first, as far as that is known; another policy can take over in this order.

    released: the block may go now and could not before: its last pin or its last child has gone.
    A block that may not go when `victim` asks is set aside and keeps its place; the policy asks
    about it again when it is released or touched, and for want of any other. So a search passes a
    run of pinned blocks once, not every time. Who never says `released` gets right answers, but
    slow ones, and not those of the policy's order. Where nothing may go at all, `victim` asks about
    every block before it says None: who counts the blocks that may go need not call it then.

    A block that is not in the cache is neither touched nor released; saying so has no effect.
    """

    @property
    def name(self) -> str: ...
    def stored(self, block_hash: int) -> None: ...
    def touched(self, block_hash: int) -> None: ...
    def released(self, block_hash: int) -> None: ...
    def removed(self, block_hash: int) -> None: ...
    def victim(self, may_go: Callable[[int], bool]) -> int | None: ...
    def blocks(self) -> Iterator[int]: ...
    def __len__(self) -> int: ...


def known() -> list[str]:
    """Names of the policies that lie in this folder."""
    return by_name.names(__path__)


def create(name: str, capacity_blocks: int) -> EvictionPolicy:
    """The policy of this name for a cache of this size.

    Raises PolicyError where there is none.
    """
    if name not in known():
        raise PolicyError(by_name.no_such("eviction policy", name, known()))
    policy: EvictionPolicy = by_name.class_of(__name__, name)(capacity_blocks)
    return policy
