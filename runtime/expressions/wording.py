"""Conditions in words, with the values that one row had: the reasons of a decision."""

from typing import Any

import numpy as np

from sagec.runtime.expressions.closures import closure_of
from sagec.runtime.expressions.tree import (
    COMPARISONS,
    Expression,
    Operation,
    Prefixed,
    names_in,
)
from sagec.runtime.expressions.units import Unit
from sagec.runtime.expressions.values import ENDLESS


class Wording:
    """Words for conditions over the values of one place."""

    def __init__(self, values: Any) -> None:
        self._values = values
        self._columns: dict[Expression, Any] = {}

    def told(self, condition: Expression, row: int, holds: bool) -> str:
        """Why a condition holds for a row, or does not: "kv_free 3% is not > 5%"."""
        match condition:
            case Operation(operator="and" | "or" as operator):
                sides = (condition.left, condition.right)
                decisive = [side for side in sides if bool(self._at(side, row)) is holds]
                needs_all = holds is (operator == "and")
                chosen = decisive if needs_all else decisive[:1]
                return " and ".join(self.told(side, row, holds) for side in chosen)
            case Operation() if condition.operator in COMPARISONS:
                verb = "is" if holds else "is not"
                left, right = self._shown(condition.left, row), self._shown(condition.right, row)
                return f"{left} {verb} {condition.operator} {right}"
            case Prefixed():
                return self.told(condition.operand, row, not holds)
            case _:
                return f"{condition} is {str(holds).lower()}"

    def _at(self, expression: Expression, row: int) -> Any:
        """The expression's value for one row."""
        if expression not in self._columns:
            self._columns[expression] = closure_of(expression)(self._values)
        column = self._columns[expression]
        return column[row] if np.ndim(column) else column

    def _shown(self, side: Expression, row: int) -> str:
        """A side of a comparison with its value, unless it is written out itself."""
        if not any(names_in(side)):
            return str(side)
        return f"{side} {shown(self._at(side, row), side.unit)}"


def shown(value: Any, unit: Unit) -> str:
    """A value for people.

    >>> shown(0.034, Unit.SHARE), shown(1500, Unit.TIME), shown(ENDLESS, Unit.TIME)
    ('3.4%', '1.5ms', 'endless')
    """
    if unit in (Unit.TEXT, Unit.CONDITION):
        return f'"{value}"' if unit is Unit.TEXT else str(bool(value)).lower()
    if not abs(value) < ENDLESS / 2:
        return "endless"
    if unit in (Unit.TIME, Unit.MOMENT):
        return _time(float(value))
    if unit is Unit.SHARE:
        return f"{_digits(value * 100)}%"
    return f"{value:.0f}" if value == int(value) else _digits(value)


def _time(time_us: float) -> str:
    for suffix, factor in (("s", 1e6), ("ms", 1e3)):
        if abs(time_us) >= factor:
            return f"{_digits(time_us / factor)}{suffix}"
    return f"{_digits(time_us)}us"


def _digits(value: float) -> str:
    """Three digits at most, but all those before the point, so that few different texts occur."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
