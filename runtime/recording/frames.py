"""Frames of a recording: a kind, a length, a checksum and a payload, each found by its mark.

    file   = FIRST_LINE frame*
    frame  = MARK kind length crc32 payload

All integers are little-endian. The mark is a byte that msgpack never uses and two letters, so that
a reader finds the next frame after damage.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

VERSION = 1
"""Grows with every change that an older reader could misread."""

FIRST_WORDS = b"sagec recording "
FIRST_LINE = b"%s%d\n" % (FIRST_WORDS, VERSION)

MARK = b"\xc1sg"
HEADER, KEYFRAME, ROUND, ENTRIES = b"H", b"K", b"R", b"E"
"""What a file is of; a round with everything it needs; one with what changed; all else."""

_HEAD = struct.Struct("<3scII")


class RecordingError(ValueError):
    """A file that is no recording of this version, or a part that does not hold together."""


class Frame(NamedTuple):
    """A frame that is whole; offset: where it begins in its file."""

    offset: int
    kind: bytes
    payload: bytes


class Damage(NamedTuple):
    """Bytes [offset, end) that are no frames; what is wrong with them."""

    offset: int
    end: int
    what: str


def framed(kind: bytes, payload: bytes) -> bytes:
    """The bytes of a frame.

    >>> len(framed(ROUND, b"abc"))
    15
    """
    return _HEAD.pack(MARK, kind, len(payload), _crc(kind, payload)) + payload


def check_first_line(content: bytes, source: str) -> None:
    """Raise RecordingError unless a file that begins so is a recording of this version."""
    if content.startswith(FIRST_LINE):
        return
    if not content:
        raise RecordingError(f"{source}: empty; a recording begins with {FIRST_LINE.decode()!r}")
    line = content[:40].partition(b"\n")[0]
    if line.startswith(FIRST_WORDS) and line[len(FIRST_WORDS) :].isdigit():
        version = line[len(FIRST_WORDS) :].decode()
        raise RecordingError(f"{source}: recording version {version}; this sagec reads {VERSION}")
    raise RecordingError(
        f"{source}: not a recording: it begins with {content[:16]!r}, "
        f"a recording with {FIRST_LINE.decode()!r}"
    )


def frames(content: bytes) -> Iterator[Frame | Damage]:
    """The frames of a file whose first line was checked; after damage from the next keyframe on."""
    at = len(FIRST_LINE)
    while at < len(content):
        wrong = _wrong(content, at)
        if wrong is None:
            _, kind, length, _ = _HEAD.unpack_from(content, at)
            begin = at + _HEAD.size
            yield Frame(at, kind, content[begin : begin + length])
            at = begin + length
        else:
            found = _next_keyframe(content, at + 1)
            yield Damage(at, found, wrong)
            at = found


def _wrong(content: bytes, at: int) -> str | None:
    """What is wrong with the frame at this place; None: nothing."""
    left = len(content) - at
    if left < _HEAD.size:
        return f"it ends within the head of a frame, after {left} of {_HEAD.size} bytes"
    mark, kind, length, crc = _HEAD.unpack_from(content, at)
    if mark != MARK:
        return f"no frame begins here: {mark!r} for {MARK!r}"
    begin = at + _HEAD.size
    if left - _HEAD.size < length:
        return f"it ends within a frame, after {left - _HEAD.size} of {length} bytes"
    if _crc(kind, content[begin : begin + length]) != crc:
        return f"the checksum of a frame of {length} bytes is wrong"
    return None


def _next_keyframe(content: bytes, at: int) -> int:
    """Where the next whole keyframe begins; the end of the file where there is none."""
    while (at := content.find(MARK + KEYFRAME, at)) >= 0:
        if _wrong(content, at) is None:
            return at
        at += 1
    return len(content)


def _crc(kind: bytes, payload: bytes) -> int:
    return zlib.crc32(payload, kind[0])
