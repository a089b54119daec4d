"""The most important first, as vLLM does it."""

import dataclasses

import numpy as np

from sagec.runtime.state import Decision, Ints, Running, State, Waiting
from sagec.runtime.strategies import _admission, _checks, _room


@dataclasses.dataclass(frozen=True)
class Priority:
    """The smallest priority value first, ties by arrival; where KV runs out, the largest leaves.

    Those that wait are admitted only in rounds in which nobody has to leave, and nobody leaves to
    admit them, however important. chooser: who says where; "" leaves it to the compiler.
    """

    chooser: str = ""
    name = "priority"

    def __post_init__(self) -> None:
        _checks.check_chooser(self.chooser)

    def decide(self, state: State) -> Decision:
        """Preempt on overflow; else admit by priority what fits; reject what never will."""
        waiting = state.waiting
        too_long, reasons = _room.never_fitting(state)
        leaving = _room.overflowing(state, _by_priority(state.running))
        values, code = np.unique(waiting.priority, return_inverse=True)
        because = _admission.words(code, [f"priority {value}" for value in values.tolist()])
        order = _room.without(_by_priority(waiting), too_long)
        decision = _admission.decide(state, order, because, self.chooser, len(leaving))
        why = [
            f"KV is full, and its priority {value} comes last"
            for value in state.running.priority[leaving].tolist()
        ]
        return decision.reject(too_long, reasons).preempt(leaving, why)


def _by_priority(asked: Waiting | Running) -> Ints:
    """Rows, the most important first; of equals the first that came."""
    return np.lexsort((asked.sequence, asked.arrival_us, asked.priority))
