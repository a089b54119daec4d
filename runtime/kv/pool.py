"""KV blocks: which are free, which are whose, and their tables as one array for the kernels.

A block is free, or held by the requests in whose tables it stands, or idle: kept for the prefix
cache while nobody holds it. A block may stand in several tables, but only when it is full: what is
shared is never written again, so that nobody needs a copy of his own to go on writing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BlockTable = npt.NDArray[np.int32]
GROWTH = 2


class QuotaExceeded(ValueError):
    """A tenant asks for more blocks than it may hold; says how many it holds, asks for and may."""

    def __init__(self, tenant: str, quota: int, held: int, asked: int) -> None:
        super().__init__(
            f"tenant {tenant!r} holds {held} KV blocks and asks for {asked} more; "
            f"it may hold {quota}"
        )
        self.tenant, self.quota, self.held, self.asked = tenant, quota, held, asked


@dataclass(frozen=True)
class PoolStatistics:
    """How a pool's blocks are used: free + held + idle = num_blocks.

    shared: blocks of those held that stand in more than one table. tenant_blocks: what counts
    against each tenant's quota. unused_tokens: token slots of held blocks without KV in them.
    """

    num_blocks: int
    block_tokens: int
    free: int
    held: int
    idle: int
    shared: int
    unused_tokens: int
    tenant_blocks: Mapping[str, int]

    @property
    def utilisation(self) -> float:
        """Held blocks, of all."""
        return self.held / self.num_blocks

    @property
    def internal_fragmentation(self) -> float:
        """Token slots without KV, of those in held blocks; blocks are fixed, so there is no other.

        What is reserved ahead of its tokens counts too.
        """
        return self.unused_tokens / (self.held * self.block_tokens) if self.held else 0.0


class BlockPool:
    """Blocks of `block_tokens` tokens each, with a count of the tables that each stands in.

    An owner (one request) has a *slot*, which is its row in `tables`; the first `held(slot)`
    entries of that row are its blocks, in the order of its tokens.

    >>> pool = BlockPool(num_blocks=4, block_tokens=16)
    >>> slot = pool.open_slot()
    >>> pool.grow(slot, pool.blocks_for(17)), pool.held(slot), pool.num_free
    (True, 2, 2)

    A second owner whose tokens begin with the same whole block shares it:

    >>> other = pool.open_slot()
    >>> pool.share(other, [pool.block(slot, 0)])
    >>> pool.num_held, pool.num_free
    (2, 2)

    quotas: tenant -> blocks that its requests may hold together. A block counts once in each table,
    shared or not, so that what a tenant may do does not depend on what others ask.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, quotas: Mapping[str, int] | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.tables: BlockTable = np.zeros((16, 16), np.int32)
        self.quotas = dict(quotas or {})
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._kept = bytearray(num_blocks)
        self._num_idle = 0
        self._held: dict[int, int] = {}
        self._tenants: dict[int, str] = {}
        self._tenant_blocks: Counter[str] = Counter()
        self._free_slots: list[int] = list(range(15, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and the prefix cache does not keep."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that nobody holds, kept for the prefix cache."""
        return self._num_idle

    @property
    def num_held(self) -> int:
        """Blocks that somebody holds, each counted once."""
        return self.num_blocks - len(self._free) - self._num_idle

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def open_slot(self, tenant: str = "") -> int:
        """A slot for a new owner, which holds no block yet."""
        if not self._free_slots:
            rows, columns = self.tables.shape
            self.tables = np.vstack((self.tables, np.zeros((rows, columns), np.int32)))
            self._free_slots = list(range(GROWTH * rows - 1, rows - 1, -1))
        slot = self._free_slots.pop()
        self._held[slot], self._tenants[slot] = 0, tenant
        return slot

    def close_slot(self, slot: int) -> None:
        """Let go of the owner's blocks and its slot."""
        self.shrink(slot, 0)
        del self._held[slot], self._tenants[slot]
        self._free_slots.append(slot)

    def held(self, slot: int) -> int:
        """How many blocks the owner holds."""
        return self._held[slot]

    def holders(self, block: int) -> int:
        """In how many tables the block stands."""
        return self._holders[block]

    def blocks(self, slot: int, count: int) -> BlockTable:
        """The owner's first `count` blocks."""
        return self.tables[slot, :count]

    def block(self, slot: int, index: int) -> int:
        """The owner's block number `index`."""
        return int(self.tables[slot, index])

    def most_blocks(self, slot: int) -> int:
        """What the owner could hold at best, if it were alone."""
        return min(self.num_blocks, self.quotas.get(self._tenants[slot], self.num_blocks))

    def grow(self, slot: int, blocks: int) -> bool:
        """Give the owner blocks until it holds `blocks`; all of them, or none and False.

        Raises QuotaExceeded, with nothing given, where its tenant may not hold so many.
        """
        held = self._held[slot]
        if (more := blocks - held) <= 0:
            return True
        self._check_quota(slot, more)
        if more > len(self._free):
            return False
        taken = self._free[: -more - 1 : -1]
        del self._free[-more:]
        for block in taken:
            self._holders[block] = 1
        self._append(slot, taken)
        return True

    def shrink(self, slot: int, blocks: int) -> None:
        """Take blocks from the owner's end until it holds at most `blocks`."""
        held = self._held[slot]
        if held > blocks:
            for block in self.tables[slot, blocks:held][::-1].tolist():
                self._let_go(block)
            self._held[slot] = blocks
            self._tenant_blocks[self._tenants[slot]] -= held - blocks

    def share(self, slot: int, blocks: Sequence[int]) -> None:
        """Make `blocks`, full ones that are held or idle, the owner's first ones.

        They take the places of those that it holds there. Raises QuotaExceeded, with nothing
        changed.
        """
        held = self._held[slot]
        if len(blocks) > held:
            self._check_quota(slot, len(blocks) - held)
        for block in blocks:  # before any is let go: the owner may hold some of them already
            self._num_idle -= not self._holders[block]
            self._holders[block] += 1
        instead = self.tables[slot, : min(held, len(blocks))]
        for block in instead.tolist():
            self._let_go(block)
        instead[:] = blocks[: len(instead)]
        if len(blocks) > held:
            self._append(slot, blocks[held:])

    def take_idle(self) -> int:
        """A free block, kept from now on though nobody holds it; IndexError where there is none."""
        block = self._free.pop()
        self._kept[block] = 1
        self._num_idle += 1
        return block

    def keep(self, block: int) -> None:
        """Do not free the block, which somebody holds, when nobody holds it any more."""
        self._kept[block] = 1

    def forget(self, block: int) -> None:
        """Keep the block no longer: it is free now, or as soon as nobody holds it."""
        self._kept[block] = 0
        if not self._holders[block]:
            self._num_idle -= 1
            self._free.append(block)

    def is_kept(self, block: int) -> bool:
        """Whether the prefix cache keeps the block."""
        return bool(self._kept[block])

    def statistics(self, computed_tokens: Mapping[int, int]) -> PoolStatistics:
        """Figures of this moment; computed_tokens: slot -> tokens with KV in the owner's blocks."""
        unused = sum(
            held * self.block_tokens - computed_tokens.get(slot, 0)
            for slot, held in self._held.items()
        )
        return PoolStatistics(
            num_blocks=self.num_blocks,
            block_tokens=self.block_tokens,
            free=self.num_free,
            held=self.num_held,
            idle=self.num_idle,
            shared=sum(count > 1 for count in self._holders),
            unused_tokens=unused,
            tenant_blocks={name: n for name, n in self._tenant_blocks.items() if n},
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is free once, idle once or held as often as said.

        Quotas hold too, and no slot is both free and an owner's.
        """
        standing = Counter(
            block
            for slot, held in self._held.items()
            for block in self.tables[slot, :held].tolist()
        )
        for block, holders in enumerate(self._holders):
            if standing[block] != holders:
                raise AssertionError(
                    f"block {block} stands in {standing[block]} tables; its count is {holders}"
                )
        idle = {b for b in range(self.num_blocks) if self._kept[b] and not standing[b]}
        seen = [*self._free, *standing, *idle]
        if len(idle) != self._num_idle or sorted(seen) != list(range(self.num_blocks)):
            raise AssertionError(
                f"{self.num_blocks} blocks, but {self.num_free} free, {len(idle)} idle (counted "
                f"{self._num_idle}) and {len(standing)} held, {len(set(seen))} different"
            )
        if set(self._free_slots) & self._held.keys():
            raise AssertionError("a slot is free and has an owner")
        self._check_tenants()

    def _check_tenants(self) -> None:
        held: Counter[str] = Counter()
        for slot, blocks in self._held.items():
            held[self._tenants[slot]] += blocks
        if held != self._tenant_blocks:
            raise AssertionError(f"tenants hold {held}; counted {self._tenant_blocks}")
        for tenant, quota in self.quotas.items():
            if held[tenant] > quota:
                raise AssertionError(f"tenant {tenant!r} holds {held[tenant]} of {quota} blocks")

    def _check_quota(self, slot: int, more: int) -> None:
        if self.quotas:
            tenant = self._tenants[slot]
            held, quota = self._tenant_blocks[tenant], self.quotas.get(tenant)
            if quota is not None and held + more > quota:
                raise QuotaExceeded(tenant, quota, held, more)

    def _append(self, slot: int, blocks: Sequence[int]) -> None:
        held = self._held[slot]
        end = held + len(blocks)
        while end > self.tables.shape[1]:
            self.tables = np.hstack((self.tables, np.zeros_like(self.tables)))
        self.tables[slot, held:end] = blocks
        self._held[slot] = end
        self._tenant_blocks[self._tenants[slot]] += len(blocks)

    def _let_go(self, block: int) -> None:
        self._holders[block] -= 1
        if not self._holders[block]:
            if self._kept[block]:
                self._num_idle += 1
            else:
                self._free.append(block)
