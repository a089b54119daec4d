"""What one step computes, flattened: the tokens of all its spans in one dimension.

A span is the tokens [begin, end) of one request; a decode is a span of one token. Short spans come
first, for they attend token by token; then the chunks, which attend a span at a time.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


SHORT_PAIRS = 8192
"""Pairs of tokens that a short span of several tokens has at most. Token by token, a pair takes
longer; as a chunk, a span begins later. With so many pairs both were measured to take as long."""


class Tables(Protocol):
    """The block tables of requests by slot, as a pool keeps them and a `Cut` carries them."""

    @property
    def tables(self) -> Int32: ...  # [slots, blocks]
    @property
    def block_tokens(self) -> int: ...


@dataclass(frozen=True)
class Cut:
    """Some rows of a pool's tables, as far as a step reads them."""

    tables: Int32
    block_tokens: int


def cut(spans: Sequence["Span"], pool: Tables) -> tuple[list["Span"], Cut]:
    """The spans with slots from 0 on, and the tables' rows of these slots: all that another process
    needs to build the same batch."""
    blocks = max(_blocks_for(span.end, pool) for span in spans)
    tables = np.ascontiguousarray(pool.tables[[span.slot for span in spans], :blocks])
    renumbered = [
        Span(slot, span.begin, list(span.tokens), span.samples) for slot, span in enumerate(spans)
    ]
    return renumbered, Cut(tables, pool.block_tokens)


@dataclass(slots=True)
class Span:
    """Tokens of one request, from position `begin` on; its blocks are in the pool, under slot."""

    slot: int
    begin: int
    tokens: Sequence[int]
    samples: bool

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.begin + len(self.tokens)


@dataclass(frozen=True)
class Chunk:
    """Tokens [first, last) of a batch, which attend to `context` tokens of KV in `blocks`."""

    first: int
    last: int
    context: int
    blocks: torch.Tensor

    @property
    def begin(self) -> int:
        """The position of its first token: so many tokens have KV already."""
        return self.context - (self.last - self.first)


@dataclass(frozen=True)
class Bucket:
    """Single tokens of requests of like length, padded to one number of blocks for torch."""

    tokens: torch.Tensor  # [n], which of the batch's
    blocks: torch.Tensor  # [n * blocks], a request after the other
    mask: torch.Tensor  # [n, 1, 1, blocks * block_tokens], true where there is a token


@dataclass(frozen=True)
class Batch:
    """One step, ready for the model. T tokens, the first num_short of them in short spans."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    kv_slots: torch.Tensor  # [T], where each token's KV goes: block * block_tokens + offset
    slots: Int32  # [T], the pool's slot of each token's request
    tables: Int32  # the pool's block tables
    num_short: int
    chunks: tuple[Chunk, ...]
    buckets: tuple[Bucket, ...]
    sampled: torch.Tensor  # [S], which tokens' logits are wanted
    samplers: tuple[int, ...]  # the spans that sample, as `sampled` lists them


def build_batch(
    spans: Sequence[Span], pool: Tables, device: torch.device, short_tokens: int, padded: bool
) -> Batch:
    """Flatten `spans`, whose blocks the pool holds already.

    Spans of at most `short_tokens` tokens attend token by token where they attend to little;
    `padded` groups these tokens for an attention in torch, which needs it (spans of one token only
    then).
    """
    is_long = [not _is_short(span, short_tokens) for span in spans]
    order = sorted(range(len(spans)), key=is_long.__getitem__)
    lengths = np.array([len(spans[i].tokens) for i in order], np.int64)
    ends = lengths.cumsum()
    begins = np.array([spans[i].begin for i in order], np.int64)
    slots = np.array([spans[i].slot for i in order], np.int32)
    total = int(ends[-1])
    positions = np.arange(total) + np.repeat(begins - (ends - lengths), lengths)
    owners = np.repeat(slots, lengths)
    tokens = np.fromiter(itertools.chain.from_iterable(spans[i].tokens for i in order), np.int64)
    blocks, offsets = np.divmod(positions, pool.block_tokens)
    kv_slots = pool.tables[owners, blocks] * np.int64(pool.block_tokens) + offsets
    chunked = range(len(spans) - sum(is_long), len(spans))
    num_short = int(lengths[: chunked.start].sum())
    samplers = [k for k, i in enumerate(order) if spans[i].samples]

    def tensor(array: Int64) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        tokens=tensor(tokens),
        positions=tensor(positions),
        kv_slots=tensor(kv_slots),
        slots=owners,
        tables=pool.tables,
        num_short=num_short,
        chunks=tuple(_chunk(spans[order[k]], int(ends[k]), pool, device) for k in chunked),
        buckets=_buckets(owners[:num_short], positions[:num_short], pool, device) if padded else (),
        sampled=tensor(ends[samplers] - 1),
        samplers=tuple(order[k] for k in samplers),
    )


def _is_short(span: Span, short_tokens: int) -> bool:
    count = len(span.tokens)
    return count == 1 or (count <= short_tokens and count * span.end <= SHORT_PAIRS)


def _blocks_for(tokens: int, pool: Tables) -> int:
    return -(-tokens // pool.block_tokens)


def _chunk(span: Span, last: int, pool: Tables, device: torch.device) -> Chunk:
    blocks = pool.tables[span.slot, : _blocks_for(span.end, pool)].astype(np.int64)
    first = last - len(span.tokens)
    return Chunk(first, last, span.end, torch.from_numpy(blocks).to(device))


def _buckets(
    owners: Int32, positions: Int64, pool: Tables, device: torch.device
) -> tuple[Bucket, ...]:
    """Group tokens by the power of two that their blocks fill, so that padding at most doubles."""
    counts = positions // pool.block_tokens + 1
    sizes = np.frexp(counts - 0.5)[1]
    buckets = []
    for size in np.unique(sizes):
        members = np.flatnonzero(sizes == size)
        width = int(counts[members].max())
        filled = np.arange(width * pool.block_tokens) <= positions[members, None]
        blocks = np.where(
            np.arange(width) < counts[members, None], pool.tables[owners[members], :width], 0
        )
        buckets.append(
            Bucket(
                tokens=torch.from_numpy(members).to(device),
                blocks=torch.from_numpy(blocks.ravel().astype(np.int64)).to(device),
                mask=torch.from_numpy(filled[:, None, None, :]).to(device),
            )
        )
    return tuple(buckets)
