"""How KV travels between instances.

A channel is a file here that defines `open_channel(owner: str) -> Channel` and, where a process
that dies leaves segments behind, `free_left_by(pid: int, keep: Collection[str])`; nothing else
lists it.
`shared-memory` = shared_memory.py serves the processes of one host, `local` one process.
"""

import importlib
import pkgutil
from collections.abc import Collection
from typing import Any, Protocol


class ChannelError(RuntimeError):
    """Bytes that could not be sent or received; says which, why and what would help."""


class Channel(Protocol):
    """Segments of bytes with names: the sender fills one, the receiver reads and frees it.

    allocate: a new segment of num_bytes zeros: its place, and a writable buffer.
    receive: the buffer of a segment that another side allocated, of exactly num_bytes bytes.
    free: remove a segment, of whichever side; one that is gone already is no error.
    close: remove what this side allocated and nobody has freed.
    allocate and receive raise ChannelError.
    """

    def allocate(self, num_bytes: int) -> tuple[str, memoryview]: ...
    def receive(self, place: str, num_bytes: int) -> memoryview: ...
    def free(self, place: str) -> None: ...
    def close(self) -> None: ...


def known() -> list[str]:
    """Names of the channels that lie in this folder.

    >>> known()
    ['local', 'shared-memory']
    """
    names = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in names)


def open_channel(name: str, owner: str) -> Channel:
    """The channel `name`; `owner` stands in the names of its segments.

    Raises ChannelError where there is no such channel.
    """
    if name not in known():
        raise ChannelError(f"no channel {name!r}; there are: {', '.join(known())}")
    channel: Channel = _module(name).open_channel(owner)
    return channel


def free(place: str) -> None:
    """Free a segment that nobody will receive, whichever channel it is of."""
    for name in known():
        open_channel(name, "nobody").free(place)


def free_left_by(pid: int, keep: Collection[str] = ()) -> None:
    """Free the segments of a process that is dead, but for those that are still to be received."""
    for name in known():
        if hasattr(module := _module(name), "free_left_by"):
            module.free_left_by(pid, keep)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
