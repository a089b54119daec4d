"""Strategies: who is admitted, preempted and rejected, and why; one file each, found by its name.

The strategy `slo-aware` is the class `SloAware` in `slo_aware.py`; nothing else lists it. It is a
frozen dataclass, and its fields are its options.
"""

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

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
    modules = (m for m in pkgutil.iter_modules(__path__) if not m.ispkg)
    return sorted(m.name.replace("_", "-") for m in modules if not m.name.startswith("_"))


def create(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """The strategy of this name, with these of its options changed.

    Raises StrategyError where there is no such strategy or option, or a value is of a wrong type.
    """
    kind = class_of(name)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    given = {}
    for option, value in (options or {}).items():
        if (field := fields.get(option.replace("-", "_"))) is None:
            known_options = [field.replace("_", "-") for field in fields]
            raise StrategyError(f"strategy {name}: {_no('option', option, known_options)}")
        given[field.name] = _fitting(name, option, value, field.default)
    strategy: Strategy = kind(**given)
    return strategy


def class_of(name: str) -> Any:
    """The class of the strategy of this name. Raises StrategyError where there is none."""
    if name not in known():
        raise StrategyError(_no("strategy", name, known()))
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return getattr(module, "".join(part.capitalize() for part in name.split("-")))


def _no(what: str, name: str, there: list[str]) -> str:
    close = difflib.get_close_matches(name, there, n=1)
    listed = f"there are: {', '.join(there)}" if there else "there are none"
    hint = f"did you mean {close[0]!r}? ({listed})" if close else listed
    return f"no {what} {name!r}; {hint}"


def _fitting(strategy: str, option: str, value: Any, default: Any) -> Any:
    """The value, in the type of the option's default. Raises StrategyError."""
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
        raise StrategyError(f"strategy {strategy}: option {option}: {value!r} is not {words[kind]}")
    return value
