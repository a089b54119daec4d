"""Sees to it that instances live: makes failed ones again after a pause, ends those that hang."""

import dataclasses
from collections.abc import Callable, MutableMapping
from typing import Any

from sagec.runtime.engines import Engine, EngineError, Failed
from sagec.runtime.loop import Joined, Restarting

MAX_RESTARTS = 8
"""After so many in a row an instance is left alone."""

FIRST_PAUSE_US, MAX_PAUSE_US = 500_000, 30_000_000
"""Before the second restart in a row; before each later one it is twice as long, up to a limit."""

STEADY_US = 60_000_000
"""An instance that lived so long starts its restarts over when it fails."""

LOOK_US = 250_000
"""How often to look whether somebody hangs."""

STALL_FACTOR = 10.0
"""An instance is not late before it is silent for so many times its longest step."""


@dataclasses.dataclass
class _Life:
    """restarts: in a row. since_us: of its last coming up. at_us: when it is to be made again.

    coming: whether it was made again and is not up yet.
    """

    restarts: int = 0
    since_us: int = 0
    at_us: int | None = None
    coming: bool = False


class Supervisor:
    """Looks after the engines of an executor while it serves; it acts when it is asked."""

    def __init__(
        self,
        engines: MutableMapping[str, Engine],
        make: Callable[[str], Engine] | None,
        stall_s: float | None,
    ) -> None:
        """engines: by instance; those made again take their place in it. make: None: nobody is."""
        self._engines, self._make, self._stall_s = engines, make, stall_s
        self._lives = {name: _Life() for name in engines}
        self._dead: dict[str, _Life] = {}  # of those that are to be made again, or coming up
        self._look_us = 0

    @property
    def next_us(self) -> int | None:
        """When an instance is to be made again; None: none is."""
        if not self._dead:
            return None
        times = [life.at_us for life in self._dead.values() if life.at_us is not None]
        return min(times, default=None)

    def coming(self) -> list[str]:
        """Instances that were made again and are not up yet."""
        return [name for name, life in self._dead.items() if life.coming]

    def bury(self, name: str, now_us: int) -> Restarting | None:
        """An instance has failed; when it will be made again, None for never."""
        life = self._lives[name]
        if life.at_us is not None:
            return Restarting(name, life.at_us)
        if life.restarts and not life.coming and now_us - life.since_us > STEADY_US:
            life.restarts = 0
        life.coming = False
        self._dead.pop(name, None)
        if self._make is None or life.restarts == MAX_RESTARTS:
            return None
        life.at_us = now_us + _pause_us(life.restarts)
        life.restarts += 1
        self._dead[name] = life
        return Restarting(name, life.at_us)

    def revive(self, now_us: int) -> list[Joined | Failed]:
        """Make instances again whose time has come; those that came up, and those that cannot."""
        said: list[Joined | Failed] = []
        for name, life in list(self._dead.items()):
            if life.at_us is not None and life.at_us <= now_us:
                life.at_us, life.coming = None, True
                if error := self._remake(name):
                    said.append(Failed(instance=name, request_id=None, error=error))
                    continue
            if life.coming and getattr(self._engines[name], "is_up", True):
                life.coming, life.since_us = False, now_us
                del self._dead[name]
                said.append(Joined(name))
        return said

    def end_hung(self, now_us: int, step_bound_us: Callable[[str], float]) -> None:
        """Kill processes that have a plan and have long said nothing.

        step_bound_us: what the longest step of an instance's plan should take.
        """
        if self._stall_s is None or now_us < self._look_us:
            return
        self._look_us = now_us + LOOK_US
        for name, engine in self._engines.items():
            silent_s = getattr(engine, "silent_s", 0.0)
            if silent_s <= self._stall_s:
                continue
            if silent_s > STALL_FACTOR * step_bound_us(name) / 1e6:
                process: Any = engine
                process.kill(f"it had a plan and said nothing for {silent_s:.1f} s")

    def _remake(self, name: str) -> str:
        """Put a new engine in a failed one's place; why that cannot be, where it cannot."""
        assert self._make is not None
        self._engines[name].close()
        try:
            self._engines[name] = self._make(name)
        except EngineError as error:
            return str(error)
        return ""


def _pause_us(restarts: int) -> int:
    """Before the next restart, after so many in a row.

    >>> [_pause_us(restarts) for restarts in (0, 1, 2, 20)]
    [0, 500000, 1000000, 30000000]
    """
    return min(MAX_PAUSE_US, FIRST_PAUSE_US << restarts - 1) if restarts else 0
