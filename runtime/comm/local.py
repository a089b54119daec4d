"""KV between instances of one process: a segment is memory that both sides know by name."""

import itertools

from sagec.runtime.comm import ChannelError

_SEGMENTS: dict[str, memoryview] = {}
_NUMBERS = itertools.count()


def open_channel(owner: str) -> "LocalChannel":
    """A side of the process's one local channel."""
    return LocalChannel(owner)


class LocalChannel:
    """Segments in this process's memory."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._allocated: set[str] = set()

    def allocate(self, num_bytes: int) -> tuple[str, memoryview]:
        """A new segment of zeros."""
        place = f"local:{self._owner}:{next(_NUMBERS)}"
        segment = _SEGMENTS[place] = memoryview(bytearray(num_bytes))
        self._allocated &= _SEGMENTS.keys()
        self._allocated.add(place)
        return place, segment

    def receive(self, place: str, num_bytes: int) -> memoryview:
        """The segment at `place`. Raises ChannelError where it is gone or of another size."""
        segment = _SEGMENTS.get(place)
        if segment is None:
            raise ChannelError(
                f"no segment {place!r} in this process; instances in several processes need "
                "channel shared-memory"
            )
        if len(segment) != num_bytes:
            raise ChannelError(f"segment {place!r}: {len(segment)} bytes, {num_bytes} announced")
        return segment

    def free(self, place: str) -> None:
        """Forget the segment at `place`."""
        _SEGMENTS.pop(place, None)

    def close(self) -> None:
        """Forget what this side allocated and nobody has freed."""
        for place in self._allocated:
            self.free(place)
        self._allocated.clear()
