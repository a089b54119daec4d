"""KV on its way between TurboMind instances: from the engine's host memory into a channel and back.

What travels is the blob that the native side exports: it carries its own layout and checksum, and
the other side refuses one that is cut, altered or of another layout.
"""

from collections.abc import Collection

from sagec.runtime.comm import Channel, ChannelError
from sagec.runtime.engines import KVHandle
from sagec.runtime.engines.turbomind.native import NativeInstance
from sagec.runtime.engines.turbomind.native_events import Exported
from sagec.runtime.engines.turbomind.rows import Row


class Handovers:
    """An instance's side of a channel: KV that it sends, and KV that waits for its request."""

    def __init__(self, instance: str, channel: Channel, native: NativeInstance, layout: str):
        self._instance, self._layout = instance, layout
        self._channel, self._native = channel, native
        self._waiting: dict[str, KVHandle] = {}

    def send(self, row: Row, kept: Exported, target: str) -> KVHandle:
        """Put the KV that is kept of the row into the channel, for another instance.

        Raises ChannelError where the channel takes no more.
        """
        place, segment = self._channel.allocate(kept.num_bytes)
        self._native.take_export(kept.session, segment)
        row.kept = None
        return KVHandle(
            request=row.request,
            source=self._instance,
            target=target,
            output=row.output,
            computed_tokens=kept.tokens,
            layout=self._layout,
            place=place,
            num_bytes=kept.num_bytes,
            begin_us=kept.begin_us,
        )

    def announce(self, handle: KVHandle) -> None:
        """KV waits in the channel until a plan names its request."""
        self.discard(handle.request.id)
        self._waiting[handle.request.id] = handle

    def waits_for(self, id: str) -> bool:
        """Whether KV waits for the request."""
        return id in self._waiting

    def waiting(self, ids: Collection[str]) -> list[KVHandle]:
        """The KV that waits for these requests, in the order of its arrival."""
        return [handle for id, handle in self._waiting.items() if id in ids]

    def open(self, handle: KVHandle) -> memoryview:
        """The blob that `handle` announces. Raises ChannelError where it cannot be of use here."""
        if handle.layout != self._layout:
            raise ChannelError(
                f"KV from {handle.source!r} has layout {handle.layout}, here it is {self._layout}; "
                "both instances need one model, precision, block_tokens and tp"
            )
        return self._channel.receive(handle.place, handle.num_bytes)

    def discard(self, id: str) -> None:
        """Free the KV that waits for the request, if there is any."""
        if handle := self._waiting.pop(id, None):
            self._channel.free(handle.place)

    def close(self) -> None:
        """Free all that waits here, and what nobody has received of this side."""
        for id in list(self._waiting):
            self.discard(id)
        self._channel.close()
