"""Strategies: who is admitted, preempted and rejected, and why; one file each, found by its name.

The strategy `slo-aware` is the class `SloAware` in `slo_aware.py`; nothing else lists it. It is a
frozen dataclass, and its fields are its options.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from sagec.runtime import by_name
from sagec.runtime.state import Decision, State


class StrategyError(ValueError):
    """A strategy or an option of it that does not exist; says which do."""


class Strategy(Protocol):
    """Answers and changes nothing: the same state, the same decision.

    What it has to remember it says in its decision, and reads from the next state.
    """

    @property
    def name(self) -> str: ...

    def decide(self, state: State) -> Decision: ...


def known() -> list[str]:
    """Names of the strategies that lie in this folder.

    >>> "fifo" in known()
    True
    """
    return by_name.names(__path__)


def create(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy of this name, with these of its options changed.

    Raises StrategyError where there is no such strategy or option, or a value is of a wrong type.
    """
    kind = class_of(name)
    found = by_name.options_of(kind, f"strategy {name}", options, StrategyError)
    strategy: Strategy = kind(**found)
    return strategy


def class_of(name: str) -> Any:
    """The class of the strategy of this name. Raises StrategyError where there is none."""
    if name not in known():
        raise StrategyError(by_name.no_such("strategy", name, known()))
    return by_name.class_of(__name__, name)
