"""A batch cut into lanes: whole requests, so that messages of one lane run beside compute of the
next."""

import itertools
from dataclasses import replace

import numpy as np
import torch

from sagec.runtime.engines.torch.batch import Batch, Bucket


def lanes_of(batch: Batch, count: int) -> tuple[Batch, ...]:
    """The batch's tokens in `count` parts, one behind the other, of about as many tokens each.

    A request is in one part. Where there are fewer requests than parts, some parts are empty.
    """
    total = len(batch.tokens)
    edges = np.append(np.flatnonzero(np.diff(batch.slots, prepend=-1)), total)  # of requests
    wanted = [total * lane // count for lane in range(count + 1)]
    cuts = [int(edges[np.abs(edges - row).argmin()]) for row in wanted]
    return tuple(_lane(batch, begin, end) for begin, end in itertools.pairwise(cuts))


def _lane(batch: Batch, begin: int, end: int) -> Batch:
    """The tokens [begin, end) of a batch."""
    sampled = batch.sampled[(batch.sampled >= begin) & (batch.sampled < end)] - begin
    first = int((batch.sampled < begin).sum())
    return replace(
        batch,
        tokens=batch.tokens[begin:end],
        positions=batch.positions[begin:end],
        kv_slots=batch.kv_slots[begin:end],
        slots=batch.slots[begin:end],
        num_short=min(max(batch.num_short - begin, 0), end - begin),
        chunks=tuple(
            replace(chunk, first=chunk.first - begin, last=chunk.last - begin)
            for chunk in batch.chunks
            if begin <= chunk.first < end
        ),
        buckets=tuple(
            part for bucket in batch.buckets if (part := _part(bucket, begin, end)) is not None
        ),
        sampled=sampled,
        samplers=batch.samplers[first : first + len(sampled)],
    )


def _part(bucket: Bucket, begin: int, end: int) -> Bucket | None:
    """Those of a bucket's tokens that are in [begin, end)."""
    chosen = torch.nonzero((bucket.tokens >= begin) & (bucket.tokens < end)).flatten()
    if not len(chosen):
        return None
    return Bucket(
        tokens=bucket.tokens[chosen] - begin,
        blocks=bucket.blocks.view(len(bucket.tokens), -1)[chosen].flatten(),
        mask=bucket.mask[chosen],
    )
