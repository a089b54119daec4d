"""KV between processes of one host: a segment is a file of the memory file system.

The files are mapped by hand and not through multiprocessing.shared_memory, whose tracker would
remove a segment when either process ends and warn of it. Where there is no /dev/shm, the folder
for temporary files takes its place.
"""

import contextlib
import errno
import mmap
import os
import re
import secrets
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from sagec.runtime.comm import ChannelError

FOLDER = Path("/dev/shm") if os.path.isdir("/dev/shm") else Path(tempfile.gettempdir())
_NAME = re.compile(r"sagec-[\w.-]+")
_STALE_S = 600
"""Age at which a segment is nobody's: its sender has died, and no receiver waits that long."""
_PRUNE_AT = 64
"""Segments after which a sender looks which of its own the receivers have freed."""


def open_channel(owner: str) -> "SharedMemoryChannel":
    """A side of the channel that all processes of this host share."""
    return SharedMemoryChannel(owner)


class SharedMemoryChannel:
    """Segments that any process of the host can map by name."""

    def __init__(self, owner: str) -> None:
        self._prefix = f"sagec-{re.sub(r'[^A-Za-z0-9_]', '_', owner)}-{os.getpid()}"
        self._allocated: set[str] = set()
        _sweep()

    def allocate(self, num_bytes: int) -> tuple[str, memoryview]:
        """A new segment of zeros. Raises ChannelError where the memory file system is full."""
        if len(self._allocated) >= _PRUNE_AT:
            self._allocated = {place for place in self._allocated if (FOLDER / place).exists()}
        place = f"{self._prefix}-{secrets.token_hex(8)}"
        try:
            file = os.open(FOLDER / place, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            self._allocated.add(place)
            try:
                _fill(file, num_bytes)  # full now is an error, full at the first write a SIGBUS
                return place, memoryview(mmap.mmap(file, num_bytes))
            finally:
                os.close(file)
        except OSError as error:
            self.free(place)
            remedy = "enlarge it" if error.errno == errno.ENOSPC else "check it"
            raise ChannelError(
                f"{FOLDER}: no segment of {num_bytes} bytes for KV ({error.strerror}); {remedy}"
            ) from None

    def receive(self, place: str, num_bytes: int) -> memoryview:
        """The segment at `place`. Raises ChannelError where it is gone or of another size."""
        if not _NAME.fullmatch(place):
            raise ChannelError(f"{place!r} is no name of a segment; it would begin with 'sagec-'")
        try:
            file = os.open(FOLDER / place, os.O_RDWR)
        except OSError as error:
            raise ChannelError(
                f"segment {place!r}: {error.strerror}; its sender has closed, or it was taken"
            ) from None
        try:
            if (size := os.fstat(file).st_size) != num_bytes or not size:
                raise ChannelError(f"segment {place!r}: {size} bytes, {num_bytes} announced")
            return memoryview(mmap.mmap(file, num_bytes))
        finally:
            os.close(file)

    def free(self, place: str) -> None:
        """Remove the name `place`; its memory goes when the last process unmaps it."""
        self._allocated.discard(place)
        if _NAME.fullmatch(place):
            (FOLDER / place).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what this side allocated and nobody has freed."""
        for place in list(self._allocated):
            self.free(place)


def free_left_by(pid: int, keep: Collection[str] = ()) -> None:
    """Remove the segments that process `pid`, which is dead, allocated, but for those in `keep`."""
    for path in FOLDER.glob(f"sagec-*-{pid}-*"):
        if path.name not in keep:
            path.unlink(missing_ok=True)


def _sweep() -> None:
    """Remove what senders left that were killed before anybody heard of it."""
    for path in FOLDER.glob("sagec-*-*-*"):
        pid = path.name.split("-")[-2]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and time.time() - path.stat().st_mtime > _STALE_S:
                _unlink_of_dead(path, int(pid))


def _unlink_of_dead(path: Path, pid: int) -> None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        path.unlink(missing_ok=True)


def _fill(file: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.ftruncate(file, num_bytes)
