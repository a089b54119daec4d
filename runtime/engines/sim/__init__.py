"""An engine that computes nothing and takes the time that a cost model says.

It is driven by the same loop and plans as a real one, under a virtual clock or by the wall. It
counts tokens and does not know them; a request goes on for as many as it may have.
"""

from sagec.runtime.clock import WallClock
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim.engine import SimEngine

__all__ = ["SimEngine", "create"]


def create(spec: InstanceSpec) -> SimEngine:
    """A simulated instance that keeps the wall's time. Raises EngineError."""
    return SimEngine(spec, WallClock())
