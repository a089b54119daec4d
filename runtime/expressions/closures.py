"""An expression as a function of values: numpy over whole columns, put together once."""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from sagec.runtime.expressions.tree import (
    COMPARISONS,
    Call,
    Expression,
    Name,
    Operation,
    Prefixed,
    Quantity,
    Text,
)
from sagec.runtime.expressions.values import ENDLESS

Closure = Callable[[Any], Any]
"""From the values of a place to a column, or to one value for all rows."""


def closure_of(expression: Expression) -> Closure:
    """The function that computes a checked expression; numpy's warnings mean nothing in it.

    >>> from types import SimpleNamespace
    >>> from sagec.runtime.expressions.units import Unit
    >>> x = Name("x", Unit.NUMBER)
    >>> closure_of(Operation("+", x, x))(SimpleNamespace(x=np.array([1, 2])))
    array([2., 4.])
    """
    match expression:
        case Quantity() | Text():
            value = expression.value
            return lambda values: value
        case Name():
            return operator.attrgetter(expression.name)
        case Prefixed():
            compute = {"-": np.negative, "not": np.logical_not}[expression.operator]
            operand = closure_of(expression.operand)
            return lambda values: compute(operand(values))
        case Operation():
            return _joined(
                _OPERATORS[expression.operator],
                closure_of(expression.left),
                closure_of(expression.right),
            )
        case Call():
            return _called(expression.function, [closure_of(a) for a in expression.arguments])


def _joined(compute: Callable[[Any, Any], Any], left: Closure, right: Closure) -> Closure:
    return lambda values: compute(left(values), right(values))


def _called(function: str, arguments: list[Closure]) -> Closure:
    first = arguments[0]
    match function:
        case "min" | "max":
            pair = np.minimum if function == "min" else np.maximum
            return lambda values: reduce(pair, [argument(values) for argument in arguments])
        case "abs":
            return lambda values: np.abs(first(values))
        case "blocks":
            return lambda values: np.ceil(first(values) / values.block_tokens)
        case _:
            return lambda values: first(values) * values.block_tokens


def _in_floats(compute: np.ufunc) -> Callable[[Any, Any], Any]:
    """Arithmetic that does not wrap where a value is endless."""
    return lambda left, right: compute(left, right, dtype=np.float64)


def _divided(left: Any, right: Any) -> Any:
    """By zero, what is not zero is endless; zero stays."""
    quotient = np.true_divide(left, right)
    return np.where(np.isfinite(quotient), quotient, np.sign(left) * ENDLESS)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": _in_floats(np.add),
    "-": _in_floats(np.subtract),
    "*": _in_floats(np.multiply),
    "/": _divided,
    "and": np.logical_and,
    "or": np.logical_or,
    **dict(
        zip(
            COMPARISONS,
            (operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne),
            strict=True,
        )
    ),
}
