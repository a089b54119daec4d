"""A request's KV as bytes: whole blocks, a layer after the other, behind a header that proves them.

    header   magic, version, layout digest, computed tokens, payload bytes, checksum: 64 bytes
    payload  [layers, blocks, block_tokens, 2, kv_heads, head_dim] in the KV's dtype

The heads are those of all ranks, so that either side may have any number of them. Without ranks it
is one copy out of the KV tensors into the channel's segment, one from there into the receiver's.
"""

import hashlib
import struct
import zlib

import numpy as np
import torch

from sagec.runtime.comm import Channel, ChannelError
from sagec.runtime.engines import KVHandle
from sagec.runtime.engines.torch.config import ModelConfig
from sagec.runtime.engines.torch.rank import Rank

_HEADER = struct.Struct("<8sI32sQQI")
HEADER_BYTES = 64
_MAGIC, _VERSION = b"sagec-kv", 1
_PAGE_WORDS = 512


def kv_layout(config: ModelConfig, dtype: torch.dtype, block_tokens: int, identity: str) -> str:
    """A fingerprint of all that two instances must share for one to read the other's KV; config is
    of the whole model, for how many ranks share out its heads does not matter."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}:{config.layers}x{block_tokens}x2x{config.kv_heads}x{config.head_dim}:{identity}"


def checksum(payload: memoryview) -> int:
    """CRC-32 of the sums of the pages of `payload`, whose length is a multiple of 8 bytes.

    Any one flipped bit changes it, and so do pages out of order; it reads at the speed of memory.
    """
    words = np.frombuffer(payload, np.uint64)
    whole = len(words) // _PAGE_WORDS * _PAGE_WORDS
    sums = words[:whole].reshape(-1, _PAGE_WORDS).sum(axis=1, dtype=np.uint64)
    return zlib.crc32(words[whole:].tobytes(), zlib.crc32(sums.tobytes()))


def send_kv(
    channel: Channel,
    rank: Rank,
    blocks: torch.Tensor,
    computed_tokens: int,
    layout: str,
) -> tuple[str, int]:
    """Copy `blocks` of every layer into a new segment; its place and number of bytes.

    Raises ChannelError.
    """
    num_bytes = rank.block_bytes * len(blocks)
    place, segment = channel.allocate(HEADER_BYTES + num_bytes)
    payload = segment[HEADER_BYTES:]
    rank.read_kv(blocks, _layers(payload, rank, len(blocks)))
    _HEADER.pack_into(
        segment, 0, _MAGIC, _VERSION, _digest(layout), computed_tokens, num_bytes, checksum(payload)
    )
    return place, len(segment)


def check_layout(handle: KVHandle, layout: str) -> None:
    """Raise ChannelError unless the KV of `handle` has this instance's layout."""
    if handle.layout != layout:
        raise ChannelError(
            f"KV from {handle.source!r} has layout {handle.layout}, here it is {layout}; both "
            "instances need one model, dtype and block_tokens"
        )


def receive_kv(channel: Channel, rank: Rank, blocks: torch.Tensor, handle: KVHandle) -> None:
    """Copy what `handle` announces into `blocks` of every layer; the segment stays.

    Raises ChannelError, with nothing copied, where the bytes are not those that were sent.
    """
    segment = channel.receive(handle.place, handle.num_bytes)
    expected = HEADER_BYTES + rank.block_bytes * len(blocks)
    if len(segment) != expected:
        raise ChannelError(f"KV of {len(segment)} bytes; {expected} hold {len(blocks)} blocks")
    payload = segment[HEADER_BYTES:]
    magic, version, layout, computed, num_bytes, checked = _HEADER.unpack_from(segment)
    if (magic, version) != (_MAGIC, _VERSION):
        raise ChannelError(f"segment {handle.place!r} holds no KV of version {_VERSION}")
    if layout != _digest(handle.layout) or computed != handle.computed_tokens:
        raise ChannelError(f"segment {handle.place!r} holds other KV than its handle says")
    if num_bytes != len(payload) or checked != checksum(payload):
        raise ChannelError(
            f"KV from {handle.source!r} was damaged on the way (its checksum differs); "
            "compute the request again"
        )
    rank.write_kv(blocks, _layers(payload, rank, len(blocks)))


def _layers(payload: memoryview, rank: Rank, num_blocks: int) -> torch.Tensor:
    """The payload as [layers, blocks, *block_shape], sharing its memory."""
    kv = rank.model.kv
    flat = torch.frombuffer(payload, dtype=kv[0].dtype)
    return flat.view(len(kv), num_blocks, *rank.block_shape)


def _digest(layout: str) -> bytes:
    return hashlib.sha256(layout.encode()).digest()
