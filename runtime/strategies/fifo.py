"""First come, first served."""

import dataclasses

import numpy as np

from sagec.runtime.state import Decision, State
from sagec.runtime.strategies import _room


@dataclasses.dataclass(frozen=True)
class Fifo:
    """First come, first served; where KV runs out, the last to come leaves."""

    name = "fifo"

    def decide(self, state: State) -> Decision:
        """Admit in order of arrival what fits; reject what never will; preempt on overflow."""
        waiting = state.waiting
        too_long, reasons = _room.never_fitting(state)
        order = np.argsort(waiting.arrival_us, kind="stable")
        order = _room.without(order, too_long)
        leaving = _room.overflowing(state)
        admitted = order[:0] if len(leaving) else _room.fitting(state, order)
        return (
            Decision.admit(admitted, waiting, "its turn, and it fits", "no room before its turn")
            .reject(too_long, reasons)
            .preempt(leaving, "KV is full and it came last")
        )
