"""Time as an argument: the wall for real engines, a virtual clock that jumps for simulated ones."""

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
