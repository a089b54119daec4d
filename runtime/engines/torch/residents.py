"""The requests on an instance, and which KV blocks they hold."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from sagec.runtime.engines.torch.model import Model
from sagec.runtime.engines.torch.rank import Rank
from sagec.runtime.engines.torch.row import Row
from sagec.runtime.engines.torch.sampling import draw_key
from sagec.runtime.kv.pool import BlockPool, PoolStatistics, QuotaExceeded
from sagec.runtime.kv.prefix_cache import Prefix, PrefixCache
from sagec.runtime.kv.prefix_index import IndexStatistics
from sagec.runtime.kv.tiers import TierStatistics
from sagec.runtime.request import Request
from sagec.runtime.row import Intake
from sagec.runtime.text import TokenizerFile


@dataclass(frozen=True)
class CacheStatistics:
    """How an instance's blocks are used, what its prefix cache found, and what moved.

    missed_tokens: those that plans took for cached, and that were computed beyond what the plan
    allows a step. index, tiers: None where there are none.
    """

    pool: PoolStatistics
    index: IndexStatistics | None
    tiers: TierStatistics | None
    missed_tokens: int


@dataclass
class Residents:
    """Rows by request id; every block of `pool` is free, some rows' or the prefix cache's.

    cache: None where nothing outlives its request. missed_tokens: as in the statistics.
    """

    rank: Rank
    pool: BlockPool
    max_context_tokens: int
    folder: Path
    cache: PrefixCache | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    missed_tokens: int = 0

    def __post_init__(self) -> None:
        config = self.model.config
        self._intake = Intake(
            vocab=config.vocab,
            eos_tokens=config.eos_tokens,
            room_tokens=self.max_context_tokens,
            tokenizer=TokenizerFile(self.folder),
            max_tokens=config.max_context_tokens,
        )

    @property
    def model(self) -> Model:
        """The model, or rank 0's share of it."""
        return self.rank.model

    def statistics(self) -> CacheStatistics:
        """Figures of this moment, and of what happened since the instance started."""
        filled = {
            row.slot: row.computed if row.host_kv is None else 0 for row in self.rows.values()
        }
        cache = self.cache
        return CacheStatistics(
            pool=self.pool.statistics(filled),
            index=cache.index.statistics() if cache is not None else None,
            tiers=cache.tiers.statistics() if cache is not None and cache.tiers else None,
            missed_tokens=self.missed_tokens,
        )

    def add(self, request: Request, output: tuple[int, ...] = ()) -> Row:
        """A row for `request`, without KV. Raises Refused where it cannot be served here."""
        fields = self._intake.fields(request, output)
        row = self.rows[request.id] = Row(
            **fields,
            slot=self.pool.open_slot(request.tenant),
            draw_key=draw_key(request),
            prefix=Prefix(self.pool.block_tokens, request.adapter),
        )
        return row

    def drop(self, row: Row) -> None:
        """Let go of all that the row holds and forget it; what can be cached, is."""
        del self.rows[row.id]
        self._let_go(row)
        self.pool.close_slot(row.slot)

    def reuse(self, row: Row, *, counted: bool) -> None:
        """Begin with what the prefix cache has of the row's tokens, if it has no KV of its own.

        counted: whether the cache's figures count it, for the row is to compute its first token.
        """
        if self.cache is not None and not row.started:
            row.computed = self.cache.attach(row.slot, row.prefix, row.tokens, counted=counted)
            row.reused = row.computed

    def store(self, row: Row) -> None:
        """Let others begin with what the row has computed."""
        if self.cache is not None and row.host_kv is None:
            self.cache.store(row.slot, row.prefix, row.tokens, row.computed)

    def reserve(self, row: Row, blocks: int) -> None:
        """Hold `blocks` blocks, or as many as the row's KV fills, if so many can be had."""
        self.grow(row, max(blocks, self.pool.blocks_for(row.computed)))

    def grow(self, row: Row, blocks: int) -> bool:
        """Hold `blocks` blocks, at the cost of cached ones; all of them, or none more and False.

        A tenant's quota is a want of room like any other.
        """
        try:
            if self.pool.grow(row.slot, blocks):
                return True
            more = blocks - self.pool.held(row.slot)
            if self.cache is None or not self.cache.make_free(more):
                return False
            return self.pool.grow(row.slot, blocks)
        except QuotaExceeded:
            return False

    def release(self, row: Row, blocks: int) -> None:
        """Hold no more than `blocks` blocks, or as many as the row's KV fills."""
        filled = 0 if row.host_kv is not None else self.pool.blocks_for(row.computed)
        self.pool.shrink(row.slot, max(blocks, filled))

    def begin(self, row: Row) -> None:
        """A chunk of the row's prompt is due: give it its cached prefix, where it holds nothing."""
        if not row.started:
            self.reuse(row, counted=True)

    def never_fits(self, row: Row, tokens: int) -> str:
        """Why the row could not have so many tokens here even alone; "" where it could."""
        needed, most = self.pool.blocks_for(tokens), self.pool.most_blocks(row.slot)
        if needed <= most:
            return ""
        whose = f"{row.request.tenant!r} may hold" if most < self.pool.num_blocks else "there are"
        return f"{tokens} tokens need {needed} KV blocks; {whose} {most}"

    def make_room(self, row: Row, tokens: int) -> bool:
        """Have blocks for the row's first `tokens` tokens, its KV in them; false: none are free."""
        if row.host_kv is None and tokens <= self.pool.held(row.slot) * self.pool.block_tokens:
            return True
        if not self.grow(row, self.pool.blocks_for(max(tokens, row.computed))):
            return False
        if row.host_kv is not None:
            self.rank.write_kv(self.filled(row), row.host_kv)
            row.host_kv = None
        return True

    def swap_out(self, row: Row) -> None:
        """Copy the row's KV to host memory and let go of its blocks."""
        host_kv = row.host_kv
        if host_kv is None and row.computed:
            host_kv = self.rank.read_kv(self.filled(row))
            row.started = True
        self._let_go(row)
        row.host_kv = host_kv

    def forget_kv(self, row: Row) -> None:
        """Let go of the row's blocks; its tokens stay and are to be computed, or found, again."""
        self._let_go(row)
        row.host_kv, row.computed, row.started, row.reused = None, 0, False, 0

    def filled(self, row: Row) -> torch.Tensor:
        """The blocks that the row's KV fills, [n]."""
        count = self.pool.blocks_for(row.computed)
        blocks = torch.from_numpy(self.pool.blocks(row.slot, count).astype("int64"))
        return blocks.to(self.rank.device)

    def _let_go(self, row: Row) -> None:
        """Cache what can be cached of the row's KV; its blocks are no longer its own."""
        if self.cache is None:
            self.pool.shrink(row.slot, 0)
        else:
            self.store(row)
            self.cache.release(row.slot, row.prefix)
