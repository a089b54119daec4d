"""KV blobs as the patches take them in: checksum, layout, sizes, and what a refusal says."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.build import build
from sagec.runtime.engines.turbomind.native import Move, Native, NativeError, NativeInstance

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

HEADER = struct.Struct("<8sIIQqqiiIIII")
"""magic, version, ranks, layout, tokens, block_bytes, block_tokens, blocks, token checksum, 0,
checksum, 0."""

CHECKED_BYTES = 56
"""Of the header: what stands before its checksum."""

MAGIC = b"sagecKV\0"
BLOCK_BYTES, BLOCK_TOKENS, TOKENS = 32, 16, 40
INSTANCE = 61_000
SESSION = INSTANCE << 48 | 5


@pytest.fixture(scope="module")
def native() -> Native:
    """The patches, beside no TurboMind: what they do with blobs needs none."""
    return Native(build(""))


@pytest.fixture
def layout(native: Native) -> int:
    return native.layout(1, BLOCK_BYTES, BLOCK_TOKENS, 1)


@pytest.fixture
def instance(native: Native) -> Iterator[NativeInstance]:
    """An open instance of one rank."""
    opened = native.open(INSTANCE, decider=abi.STOCK)
    yield opened
    opened.close()


def blob(
    native: Native,
    layout: int,
    *,
    magic: bytes = MAGIC,
    version: int = 1,
    ranks: int = 1,
    tokens: int = TOKENS,
    block_bytes: int = BLOCK_BYTES,
    block_tokens: int = BLOCK_TOKENS,
    blocks: int = 3,
    parts: bytes = bytes(range(3 * BLOCK_BYTES)),
) -> bytearray:
    """A blob of 40 tokens in 3 blocks, unless told otherwise; its checksum is right."""
    fields = [magic, version, ranks, layout, tokens, block_bytes, block_tokens, blocks, 7, 0]
    checked = HEADER.pack(*fields, 0, 0)[:CHECKED_BYTES]
    return bytearray(HEADER.pack(*fields, native.crc32c(checked + parts), 0) + parts)


def refusal(instance: NativeInstance, *moves: Move) -> str:
    """What the instance says of these moves; empty where it takes them."""
    try:
        instance.migrate(moves)
    except NativeError as error:
        return str(error)
    return ""


def test_the_checksum_is_crc32c(native: Native) -> None:
    assert native.crc32c(b"123456789") == 0xE3069283
    assert native.crc32c(bytes(32)) == 0x8A9136AA
    assert native.crc32c(b"\xff" * 32) == 0x62A8AB43


@given(
    seed=st.integers(0, 255),
    num_bytes=st.integers(1, 300) | st.integers(12_200, 12_400) | st.integers(24_500, 40_000),
    offset=st.integers(0, 9),
)
def test_the_processors_instruction_and_the_table_agree(
    native: Native, seed: int, num_bytes: int, offset: int
) -> None:
    content = np.random.default_rng(seed).bytes(offset + num_bytes)
    shifted = memoryview(content)[offset:]
    assert native.crc32c(shifted) == native.crc32c(shifted, by_table=True)


def test_a_sound_blob_is_taken(native: Native, instance: NativeInstance, layout: int) -> None:
    sound = blob(native, layout)
    assert refusal(instance, Move(SESSION, sound, layout)) == ""
    instance.forget(SESSION)
    assert refusal(instance, Move(SESSION, sound, layout), Move(SESSION + 1)) == ""


@settings(max_examples=200)
@given(position=st.integers(0, 8 * (HEADER.size + 3 * BLOCK_BYTES) - 1))
def test_a_flipped_bit_is_noticed(native: Native, position: int) -> None:
    layout = native.layout(1, BLOCK_BYTES, BLOCK_TOKENS, 1)
    altered = blob(native, layout)
    altered[position // 8] ^= 1 << position % 8
    instance = native.open(INSTANCE, decider=abi.STOCK)
    try:
        assert refusal(instance, Move(SESSION, altered, layout)) != ""
    finally:
        instance.close()


@pytest.mark.parametrize(
    "num_bytes", [1, 63, 64, 65, 64 + 2 * BLOCK_BYTES, 64 + 3 * BLOCK_BYTES - 1]
)
def test_a_cut_blob_is_refused(
    native: Native, instance: NativeInstance, layout: int, num_bytes: int
) -> None:
    cut = blob(native, layout)[:num_bytes]
    said = refusal(instance, Move(SESSION, cut, layout))
    assert f"{num_bytes} bytes" in said


def test_a_blob_that_is_too_long_is_refused(
    native: Native, instance: NativeInstance, layout: int
) -> None:
    assert "cut" in refusal(instance, Move(SESSION, blob(native, layout) + b"\0", layout))


@given(
    ranks=st.integers(0, 2**32 - 1),
    tokens=st.integers(-(2**63), 2**63 - 1),
    block_bytes=st.integers(-(2**63), 2**63 - 1),
    block_tokens=st.integers(-(2**31), 2**31 - 1),
    blocks=st.integers(-(2**31), 2**31 - 1),
)
def test_sizes_that_do_not_fit_are_refused_though_the_checksum_is_right(
    native: Native, ranks: int, tokens: int, block_bytes: int, block_tokens: int, blocks: int
) -> None:
    layout = native.layout(1, BLOCK_BYTES, BLOCK_TOKENS, 1)
    odd = blob(
        native,
        layout,
        ranks=ranks,
        tokens=tokens,
        block_bytes=block_bytes,
        block_tokens=block_tokens,
        blocks=blocks,
    )
    fits = (
        ranks == 1
        and block_bytes > 0
        and block_tokens > 0
        and blocks * block_bytes == 3 * BLOCK_BYTES
        and tokens > 0
        and blocks == (tokens + block_tokens - 1) // block_tokens
    )
    instance = native.open(INSTANCE, decider=abi.STOCK)
    try:
        assert (refusal(instance, Move(SESSION, odd, layout)) == "") == fits
    finally:
        instance.close()


def test_refusals_say_what_and_what_would_be_right(
    native: Native, instance: NativeInstance, layout: int
) -> None:
    other = native.layout(2, BLOCK_BYTES, BLOCK_TOKENS, 1)
    said = refusal(instance, Move(SESSION, blob(native, other), layout))
    assert f"session {SESSION}" in said
    assert f"layout {other:#018x}" in said
    assert f"needed is {layout:#018x}" in said
    assert "same model" in said
    foreign = refusal(instance, Move(SESSION, blob(native, layout, magic=b"something"[:8]), layout))
    assert "no KV blob" in foreign
    newer = refusal(instance, Move(SESSION, blob(native, layout, version=2), layout))
    assert "version 2; this build reads version 1" in newer
    parts = bytes(6 * BLOCK_BYTES)
    two = refusal(instance, Move(SESSION, blob(native, layout, ranks=2, parts=parts), layout))
    assert "2 ranks; the instance has 1" in two
    assert "none of instance 61000's" in refusal(instance, Move(5))


def test_an_instance_takes_its_own_layout_alone(
    native: Native, instance: NativeInstance, layout: int
) -> None:
    instance.set_layout(native.layout(2, BLOCK_BYTES, BLOCK_TOKENS, 1))
    assert "not this instance's own" in refusal(
        instance, Move(SESSION, blob(native, layout), layout)
    )
    instance.set_layout(layout)
    assert refusal(instance, Move(SESSION, blob(native, layout), layout)) == ""


def test_every_part_of_a_layout_tells(native: Native) -> None:
    assert (
        len(
            {
                native.layout(*parts)
                for parts in [
                    (1, 64, 16, 1),
                    (2, 64, 16, 1),
                    (1, 65, 16, 1),
                    (1, 64, 17, 1),
                    (1, 64, 16, 2),
                ]
            }
        )
        == 5
    )


def test_an_export_that_is_not_there_cannot_be_taken(instance: NativeInstance) -> None:
    instance.migrate([Move(SESSION)])
    with pytest.raises(NativeError, match=f"no export of session {SESSION}"):
        instance.take_export(SESSION, bytearray(64))


def test_blocks_are_not_known_before_the_first_step(instance: NativeInstance) -> None:
    with pytest.raises(NativeError, match="rank 0 of instance 61000 has not taken a step"):
        instance.block_totals()


def test_a_closed_instance_takes_no_blob(native: Native, layout: int) -> None:
    closed = native.open(INSTANCE, decider=abi.STOCK)
    closed.close()
    assert "61000 is not open" in refusal(closed, Move(SESSION, blob(native, layout), layout))
