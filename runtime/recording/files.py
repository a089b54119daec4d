"""The files of a recording: appended to, never half a frame, and moved aside when they are full."""

import contextlib
import os
import stat
from pathlib import Path

from sagec.runtime.recording.frames import RecordingError, check_first_line


class RotatingFile:
    """FILE, which is appended to; FILE.1 is the one before it, FILE.2 the one before that."""

    def __init__(self, path: Path, keep_files: int) -> None:
        """keep_files: how many older files stay. Raises OSError, and RecordingError where there is
        a file that is no recording: only recordings are moved aside."""
        self.path, self._keep_files = path, keep_files
        self.size_bytes = 0
        self._moves = _holds_recording(path)
        self._number = self._opened()

    def append(self, content: bytes) -> None:
        """Write it at the end, whole or not at all, in one write where the system lets it.

        Raises OSError.
        """
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._number, left) :]
        except OSError:
            if self._moves:
                # What was written of it goes again; a reader would skip it, were it to stay.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._number, self.size_bytes)
            raise
        self.size_bytes += len(content)

    def rotate(self) -> None:
        """Move the file aside and begin a new one.

        Raises OSError, RecordingError; then what is appended goes where it went before.
        """
        if self._moves:
            before, self._number = self._number, self._opened()
            os.close(before)
        self.size_bytes = 0

    def close(self) -> None:
        """Close the file."""
        os.close(self._number)

    def _opened(self) -> int:
        if self._moves:
            self._move_aside()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        number = os.open(self.path, flags, 0o666)
        self._moves = stat.S_ISREG(os.fstat(number).st_mode)
        return number

    def _move_aside(self) -> None:
        """FILE becomes FILE.1, FILE.1 becomes FILE.2, and so on; the oldest is overwritten."""
        names = [self.path, *(part_of(self.path, n) for n in range(1, self._keep_files + 1))]
        there = next((n for n, name in enumerate(names) if not name.exists()), len(names) - 1)
        for name in names[1 : there + 1]:
            if name.exists() and not _holds_recording(name):
                raise RecordingError(f"{name}: no recording, and in the way of an older one")
        for older, newer in zip(names[there:0:-1], names[there - 1 :: -1], strict=False):
            os.replace(newer, older)


def part_of(path: Path, number: int) -> Path:
    """The file that was moved aside so many times.

    >>> part_of(Path("serve.rec"), 2).name
    'serve.rec.2'
    """
    return path.with_name(f"{path.name}.{number}") if number else path


def _holds_recording(path: Path) -> bool:
    """Whether there is a recording at this place. Raises RecordingError where it is another file.

    What is no regular file, as a pipe, and what is empty is written to as it is.
    """
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        content = file.read(64)
    try:
        check_first_line(content, str(path))
    except RecordingError as error:
        raise RecordingError(f"{error}; a recording is not written over it") from None
    return True
