"""Which engines may have something to say: under a virtual clock nobody else needs to be asked."""

import heapq
from collections.abc import Iterable


class Alarms:
    """Engines that say when something happens next (`next_us`), and nothing before unless told.

    Each is asked when its time has come or it was told something; a cluster of hundreds of them
    costs what happens, and not what there is.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Everybody is to be asked once."""
        self._place = {name: place for place, name in enumerate(names)}
        self._awake = set(self._place)
        self._set: dict[str, int] = {}
        self._heap: list[tuple[int, int, str]] = []

    def wake(self, name: str) -> None:
        """The engine was told something, or is another one now."""
        self._awake.add(name)

    def set(self, name: str, at_us: int | None) -> None:
        """The engine was asked, and next has something to say at this time; None: never."""
        self._awake.discard(name)
        if at_us is None:
            self._set.pop(name, None)
        elif self._set.get(name) != at_us:
            self._set[name] = at_us
            heapq.heappush(self._heap, (at_us, self._place[name], name))

    def due(self, now_us: int) -> list[str]:
        """Whom to ask now, in the order of the instances; nobody else has anything to say."""
        while (next_us := self.next_us()) is not None and next_us <= now_us:
            self._awake.add(name := heapq.heappop(self._heap)[2])
            del self._set[name]
        if len(self._awake) < 2:
            return list(self._awake)
        return sorted(self._awake, key=self._place.__getitem__)

    @property
    def is_anyone_awake(self) -> bool:
        """Whether somebody is to be asked at once."""
        return bool(self._awake)

    def next_us(self) -> int | None:
        """When the next of those that were asked has something to say."""
        while self._heap and self._set.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
