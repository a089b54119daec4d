"""A strategy that preempts without need, to see that nothing is lost by it."""

import dataclasses

import numpy as np

from sagec.runtime.plan import SWAP
from sagec.runtime.state import Decision, State
from sagec.runtime.strategies import create


@dataclasses.dataclass(frozen=True)
class TakesTurns:
    """First come first served, but a third of those that run lose their place, `most` times each.

    only_on: on this instance; None: on any.
    """

    how: int = SWAP
    most: int = 2
    only_on: str | None = None
    name = "takes-turns"

    def decide(self, state: State) -> Decision:
        running = state.running
        chosen = (running.sequence + state.round) % 3 == 0
        chosen &= ~running.arriving & (running.preemptions < self.most)
        if self.only_on is not None:
            chosen &= state.instances.ids[running.instance] == self.only_on
        decision = create("fifo").decide(state)
        chosen[decision.preempt_rows] = False
        return decision.preempt(np.flatnonzero(chosen), "its turn ends", self.how)
