"""The requests on a simulated instance, and the KV blocks that they and the prefix cache hold."""

from collections.abc import Iterable, Sequence

from sagec.runtime.engines.sim.row import Row
from sagec.runtime.kv import block_hashes, policies
from sagec.runtime.kv.prefix_index import CachedBlock, PrefixIndex
from sagec.runtime.request import Request


class Residents:
    """Rows by request id. Blocks are counted; only those of the prefix cache have names.

    A block is free, one row's own, or cached; rows hold cached blocks together.
    """

    def __init__(self, kv_blocks: int, block_tokens: int, eviction: str = "") -> None:
        """eviction: the policy of the prefix cache; "": there is none. Raises PolicyError."""
        self.kv_blocks, self.block_tokens = kv_blocks, block_tokens
        self.room_tokens = kv_blocks * block_tokens
        self.rows: dict[str, Row] = {}
        self.reused: list[tuple[str, int]] = []
        self.copied: list[int] = []  # tokens of each KV that went to host memory, or came back
        self._own_blocks = self._pinned_blocks = 0
        self._index: PrefixIndex | None = None
        if eviction:
            self._index = PrefixIndex(policies.create(eviction, kv_blocks), block_tokens)
        self._stored: dict[int, None] = {}
        self._evicted: dict[int, None] = {}

    @property
    def used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._own_blocks + self._pinned_blocks

    @property
    def _free_blocks(self) -> int:
        cached = len(self._index) if self._index is not None else 0
        return self.kv_blocks - self._own_blocks - cached

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)

    def refusal(self, request: Request) -> str:
        """Why the instance can never serve the request; "" where it can."""
        if len(request.prompt) < self.room_tokens:
            return ""
        return (
            f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in "
            f"{self.room_tokens} tokens of context"
        )

    def add(self, request: Request, output_tokens: int = 0) -> Row:
        """A row for `request` without KV; what was here of it is forgotten."""
        self.drop(request.id)
        prompt = len(request.prompt)
        limit = self.room_tokens
        if request.max_output_tokens is not None:
            limit = prompt + request.max_output_tokens
        row = self.rows[request.id] = Row(request, prompt, prompt + output_tokens, limit)
        return row

    def drop(self, request_id: str) -> None:
        """Forget a request and free its blocks; what is cached of it stays."""
        if row := self.rows.pop(request_id, None):
            self.let_go(row)

    def let_go(self, row: Row) -> None:
        """Have the row hold no block."""
        self._hold(row, len(row.leased))
        if self._index is not None and row.leased:
            self._index.unpin(row.leased)
            self._pinned_blocks -= sum(not block.pins for block in row.leased)
            row.leased = []
        row.blocks = 0

    def swap_out(self, row: Row) -> None:
        """Copy the row's KV to host memory and have it hold no block."""
        if row.computed and not row.swapped:
            self.copied.append(row.computed)
        self.let_go(row)
        row.swapped = True

    def begin(self, row: Row) -> None:
        """Give a row that holds nothing yet the longest cached prefix of its prompt."""
        if self._index is None or row.blocks or row.computed:
            return
        limit = (row.num_tokens - 1) // self.block_tokens
        found = self._index.lookup(self._hashes(row)[:limit])
        if found:
            self._lease(row, found)
            row.blocks = len(found)
            row.computed = len(found) * self.block_tokens
            self.reused.append((row.request.id, row.computed))

    def store(self, row: Row) -> None:
        """Cache the whole blocks of the prompt that the row has computed."""
        if self._index is None:
            return
        have = len(row.leased)
        new = self._hashes(row)[have : row.computed // self.block_tokens]
        if not new or (row.leased and not row.leased[-1].is_cached):
            return
        before = [block_hash in self._index for block_hash in new]
        blocks = self._index.insert(new, after=row.leased[-1] if have else None)
        self._own_blocks -= len(blocks)
        self._lease(row, [*row.leased, *blocks])
        for block_hash, was_there in zip(new[: len(blocks)], before, strict=False):
            if not was_there:
                _change(block_hash, self._stored, self._evicted)

    def make_room(self, row: Row, tokens: int, reserved: int = 0) -> bool:
        """Have blocks for the row's first `tokens` tokens, and those reserved for it where they
        are free; false where there are too few."""
        needed = self.blocks_for(tokens)
        if row.blocks >= max(needed, 1):
            return True
        more = needed - row.blocks
        if more > self._free_blocks:
            self._evict(more - self._free_blocks)
            if more > self._free_blocks:
                return False
        self._hold(row, max(needed, min(reserved, row.blocks + self._free_blocks)))
        if row.swapped:
            self.copied.append(row.computed)
            row.swapped = False
        return True

    def keep_only(self, reserved: dict[str, int]) -> None:
        """Take back blocks that hold no KV and that the new plan does not reserve."""
        for request_id, row in self.rows.items():
            if row.blocks > reserved.get(request_id, 0):
                filled = 0 if row.swapped else self.blocks_for(row.computed)
                self._hold(row, max(filled, reserved.get(request_id, 0)))

    def evict(self, hashes: Iterable[int]) -> None:
        """Drop cached blocks, unless they are in use."""
        for block_hash in hashes:
            block = self._index.find(block_hash) if self._index is not None else None
            if self._index is not None and block is not None and block.may_go:
                self._note_gone(self._index.invalidate(block_hash))

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Hashes cached, and no longer cached, since this was asked last."""
        changes = tuple(self._stored), tuple(self._evicted)
        self._stored.clear()
        self._evicted.clear()
        return changes

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is accounted for."""
        own = sum(row.blocks - len(row.leased) for row in self.rows.values())
        if own != self._own_blocks or self._free_blocks < 0:
            raise AssertionError(f"{self._own_blocks} of {self.kv_blocks} blocks, rows own {own}")
        if self._index is not None:
            self._index.check_integrity()
        pinned = {block.hash for row in self.rows.values() for block in row.leased}
        if len(pinned) != self._pinned_blocks:
            raise AssertionError(f"{self._pinned_blocks} blocks pinned, rows lease {len(pinned)}")

    def _hashes(self, row: Row) -> Sequence[int]:
        if row.hashes is None:
            given = row.request.block_hashes
            prompt, adapter = row.request.prompt, row.request.adapter
            row.hashes = given or block_hashes(prompt, self.block_tokens, adapter)
        return row.hashes

    def _lease(self, row: Row, blocks: list[CachedBlock]) -> None:
        assert self._index is not None
        new = blocks[len(row.leased) :]
        self._pinned_blocks += sum(not block.pins for block in new)
        self._index.pin(new)
        row.leased = blocks

    def _hold(self, row: Row, blocks: int) -> None:
        """Have the row hold so many blocks, those of the cache among them."""
        blocks = max(blocks, len(row.leased))
        self._own_blocks += blocks - row.blocks
        row.blocks = blocks

    def _evict(self, count: int) -> None:
        if self._index is not None:
            self._note_gone(self._index.evict(count))

    def _note_gone(self, blocks: Iterable[CachedBlock]) -> None:
        for block in blocks:
            _change(block.hash, self._evicted, self._stored)


def _change(block_hash: int, to: dict[int, None], undone: dict[int, None]) -> None:
    """Note a change; one that undoes an earlier one that nobody was told of cancels it."""
    if block_hash in undone:
        del undone[block_hash]
    else:
        to[block_hash] = None
