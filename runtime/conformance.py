"""Whether engines computed what plans told them to.

conformance = Conformance.of(reports)
print(conformance)  # 411 of 412 steps as planned, 1 otherwise
"""

import dataclasses
from collections.abc import Iterable, Sized
from enum import StrEnum
from typing import Protocol

from sagec.runtime.engines import DecidedBy


class Step(Protocol):
    """What a step says of itself: as an engine reports it, or as it was recorded."""

    @property
    def steps(self) -> int: ...
    @property
    def decided_by(self) -> DecidedBy: ...
    @property
    def deviations(self) -> Sized: ...


class Outcome(StrEnum):
    """What a step is against its plan.

    AT_DEADLINE: no decision came in time, and the engine took its own. STOCK: nobody decides for
    the engine, so there is nothing to hold the step against.
    """

    OBEYED = "obeyed"
    DEVIATED = "deviated"
    AT_DEADLINE = "at_deadline"
    STOCK = "stock"


def outcome_of(step: Step) -> Outcome:
    """Whether the step did what it was told."""
    if step.decided_by is DecidedBy.DEADLINE:
        return Outcome.AT_DEADLINE
    if step.decided_by is DecidedBy.STOCK:
        return Outcome.STOCK
    return Outcome.DEVIATED if step.deviations else Outcome.OBEYED


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conformance:
    """How many steps had which outcome."""

    obeyed: int = 0
    deviated: int = 0
    at_deadline: int = 0
    stock: int = 0

    @classmethod
    def of(cls, steps: Iterable[Step]) -> "Conformance":
        """The sum of these steps; several like ones in one count as so many."""
        counts = dict.fromkeys(Outcome, 0)
        for step in steps:
            counts[outcome_of(step)] += step.steps
        return cls(**{outcome.value: count for outcome, count in counts.items()})

    @property
    def decided(self) -> int:
        """Steps that somebody was to decide."""
        return self.obeyed + self.deviated + self.at_deadline

    def __str__(self) -> str:
        """One line.

        >>> str(Conformance(obeyed=3, deviated=1))
        '3 of 4 steps as planned, 1 otherwise'
        >>> str(Conformance(stock=2))
        '2 steps as the engine itself decided'
        """
        parts = [f"{self.obeyed} of {_steps(self.decided)} as planned"] if self.decided else []
        parts += [f"{self.deviated} otherwise"] if self.deviated else []
        parts += [f"{self.at_deadline} without a decision in time"] if self.at_deadline else []
        parts += [f"{_steps(self.stock)} as the engine itself decided"] if self.stock else []
        return ", ".join(parts) or "no steps"


NO_STEPS = Conformance()


def _steps(count: int) -> str:
    return f"{count} step{'s' * (count != 1)}"
