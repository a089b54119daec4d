"""Strategies: who is admitted, preempted and rejected, and why; one file each, found by its name.

The strategy `slo-aware` is the class `SloAware` in `slo_aware.py`; nothing else lists it.
"""

import difflib
import importlib
import pkgutil
from typing import Any, Protocol

from sagec.runtime.state import Decision, State


class StrategyError(ValueError):
    """A strategy that does not exist; says which do."""


class Strategy(Protocol):
    """Answers and changes nothing: the same state, the same decision."""

    @property
    def name(self) -> str: ...

    def decide(self, state: State) -> Decision: ...


def known() -> list[str]:
    """Names of the strategies that lie in this folder.

    >>> "fifo" in known()
    True
    """
    modules = pkgutil.iter_modules(__path__)
    return sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))


def create(name: str) -> Strategy:
    """The strategy of this name.

    Raises StrategyError where there is none.
    """
    if name not in known():
        close = difflib.get_close_matches(name, known(), n=1)
        listed = f"there are: {', '.join(known())}"
        hint = f"did you mean {close[0]!r}? ({listed})" if close else listed
        raise StrategyError(f"no strategy {name!r}; {hint}")
    module: Any = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    class_name = "".join(part.capitalize() for part in name.split("-"))
    strategy: Strategy = getattr(module, class_name)()
    return strategy
