"""Time as an argument: the wall for real engines, a virtual clock that jumps for simulated ones."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Microseconds since some fixed moment; never goes backwards."""

    def now_us(self) -> int: ...


class WallClock:
    """Microseconds of the monotonic clock, the same in every process of one machine."""

    def now_us(self) -> int:
        return time.monotonic_ns() // 1000


class VirtualClock:
    """A clock that stands still until it is told the time."""

    def __init__(self, now_us: int = 0) -> None:
        self._now_us = now_us

    def now_us(self) -> int:
        return self._now_us

    def advance_to(self, now_us: int) -> None:
        """Jump to `now_us`; a moment that has passed leaves the clock where it is."""
        self._now_us = max(self._now_us, now_us)


class SteadyClock:
    """Another clock's time that goes on from where it was when that one jumps back.

    >>> times = iter([5, 9, 2, 4])
    >>> class Jumping:
    ...     def now_us(self):
    ...         return next(times)
    >>> clock = SteadyClock(Jumping())
    >>> [clock.now_us() for _ in range(3)]
    [9, 9, 11]
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last_us, self._behind_us = clock.now_us(), 0
        self._lock = threading.Lock()

    def now_us(self) -> int:
        """The other clock's microseconds, and what it has lost since the beginning."""
        with self._lock:
            read_us = self._clock.now_us()
            self._behind_us += max(0, self._last_us - read_us)
            self._last_us = read_us
            return read_us + self._behind_us
