"""Recording: what a file says, rounds and entries in their order, up to and after damage."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from sagec.runtime.recording.columns import all_kinds
from sagec.runtime.recording.entries import Entry, Header, RoundFrame
from sagec.runtime.recording.files import part_of
from sagec.runtime.recording.frames import (
    ENTRIES,
    FIRST_LINE,
    HEADER,
    KEYFRAME,
    ROUND,
    Damage,
    Frame,
    RecordingError,
    check_first_line,
    frames,
)
from sagec.runtime.recording.rounds import Round, RoundReader

_HEADERS = msgspec.msgpack.Decoder(Header)
_ROUNDS = msgspec.msgpack.Decoder(RoundFrame)
_ENTRIES = msgspec.msgpack.Decoder(list[Entry])


class Recording:
    """A recording that was made; the files that were moved aside belong to it.

    damages: what could not be read, a line each, as far as the reading has come.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """path: its newest file, or one that was moved aside, which is then read alone.

        Raises OSError, and RecordingError where it is no recording of this version.
        """
        self.path = Path(path)
        self.header = _header(self.path)
        self.damages: list[str] = []

    def files(self) -> list[Path]:
        """The files of the recording, oldest first."""
        found = [self.path]
        while (older := part_of(self.path, len(found))).is_file() and self._owns(older):
            found.append(older)
        return found[::-1]

    def everything(self) -> Iterator[Entry | Round]:
        """What happened, in order. A request that is served while a file is full comes twice."""
        return self._read((KEYFRAME, ROUND, ENTRIES))

    def rounds(self) -> Iterator[Round]:
        """Only the rounds."""
        return (one for one in self._read((KEYFRAME, ROUND)) if isinstance(one, Round))

    def entries(self) -> Iterator[Entry]:
        """Only what happened between rounds."""
        return (one for one in self._read((ENTRIES,)) if not isinstance(one, Round))

    def _read(self, kinds: Sequence[bytes]) -> Iterator[Entry | Round]:
        self.damages.clear()
        for path in self.files():
            yield from self._frames_of(path, kinds)

    def _owns(self, path: Path) -> bool:
        try:
            return _header(path).recording == self.header.recording
        except RecordingError:
            return False

    def _frames_of(self, path: Path, wanted: Sequence[bytes]) -> Iterator[Entry | Round]:
        kinds = _header(path).tables or all_kinds()
        reader: RoundReader | None = None
        for frame in frames(path.read_bytes()):
            if isinstance(frame, Damage):
                reader = None
                left = f"; left out up to {frame.end}"
                self.damages.append(f"{path}: at byte {frame.offset}: {frame.what}{left}")
                continue
            if frame.kind not in wanted:
                continue
            if frame.kind == KEYFRAME:
                reader = RoundReader(kinds)
            try:
                if frame.kind == ENTRIES:
                    yield from _ENTRIES.decode(frame.payload)
                elif reader is not None:
                    yield reader.round(_ROUNDS.decode(frame.payload), frame.offset)
            except (msgspec.MsgspecError, RecordingError) as error:
                reader = None
                self.damages.append(f"{path}: at byte {frame.offset}: {error}")


def _header(path: Path) -> Header:
    """The header of a file. Raises OSError, and RecordingError where there is none."""
    with path.open("rb") as file:
        content = file.read(len(FIRST_LINE) + (1 << 20))
    check_first_line(content, str(path))
    frame = next(frames(content), None)
    if not isinstance(frame, Frame) or frame.kind != HEADER:
        what = frame.what if isinstance(frame, Damage) else "there is none"
        raise RecordingError(f"{path}: its header cannot be read: {what}")
    try:
        return _HEADERS.decode(frame.payload)
    except msgspec.MsgspecError as error:
        raise RecordingError(f"{path}: its header cannot be read: {error}") from None
