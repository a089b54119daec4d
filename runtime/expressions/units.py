"""Units of values: what may be added, compared, multiplied, and what comes of it."""

from enum import Enum


class Unit(Enum):
    """What a value counts: how a message calls it, and how one is written."""

    NUMBER = ("a number", "4")
    SHARE = ("a share (%)", "5%")
    TOKENS = ("tokens", "64 tokens")
    BLOCKS = ("blocks", "3 blocks")
    TIME = ("a time", "200ms")
    MOMENT = ("a moment", "arrival + 200ms")
    CONDITION = ("a condition", "running < 8")
    TEXT = ("a text", '"name"')

    def __init__(self, called: str, example: str) -> None:
        self.called = called
        self.example = example


LITERALS = {
    "": (Unit.NUMBER, 1.0),
    "%": (Unit.SHARE, 0.01),
    "token": (Unit.TOKENS, 1.0),
    "tokens": (Unit.TOKENS, 1.0),
    "block": (Unit.BLOCKS, 1.0),
    "blocks": (Unit.BLOCKS, 1.0),
    "us": (Unit.TIME, 1.0),
    "ms": (Unit.TIME, 1e3),
    "s": (Unit.TIME, 1e6),
}
"""Units of written numbers, with the factor to what expressions compute in; times are in us."""

_RATIOS = (Unit.NUMBER, Unit.SHARE)
_MEASURES = (*_RATIOS, Unit.TOKENS, Unit.BLOCKS, Unit.TIME)
ORDERED = (*_MEASURES, Unit.MOMENT, Unit.CONDITION)
"""What one can rank by; of conditions, those that do not hold come first."""


CONVERTED = {"blocks": (Unit.TOKENS, Unit.BLOCKS), "tokens": (Unit.BLOCKS, Unit.TOKENS)}
"""The functions that lead from one unit to another."""


def result(operator: str, left: Unit, right: Unit) -> Unit | None:
    """The unit of `left operator right`; None where that means nothing.

    >>> result("-", Unit.MOMENT, Unit.MOMENT), result("+", Unit.TOKENS, Unit.TIME)
    (<Unit.TIME: ('a time', '200ms')>, None)
    """
    match operator:
        case "and" | "or":
            return Unit.CONDITION if left is right is Unit.CONDITION else None
        case "==" | "!=":
            return Unit.CONDITION if left is right else None
        case "<" | "<=" | ">" | ">=":
            comparable = left is right and left in (*_MEASURES, Unit.MOMENT)
            return Unit.CONDITION if comparable else None
        case "+":
            return _sum(left, right)
        case "-":
            return _difference(left, right)
        case "*":
            return _product(left, right)
        case _:
            return _quotient(left, right)


def _sum(left: Unit, right: Unit) -> Unit | None:
    if {left, right} == {Unit.MOMENT, Unit.TIME}:
        return Unit.MOMENT
    return left if left is right and left in _MEASURES else None


def _difference(left: Unit, right: Unit) -> Unit | None:
    if left is Unit.MOMENT:
        return {Unit.MOMENT: Unit.TIME, Unit.TIME: Unit.MOMENT}.get(right)
    return left if left is right and left in _MEASURES else None


def _product(left: Unit, right: Unit) -> Unit | None:
    """A share or a number of something is something; tokens times tokens are nothing."""
    if left not in _MEASURES or right not in _MEASURES:
        return None
    if left in _RATIOS and right in _RATIOS:
        return Unit.SHARE if Unit.SHARE in (left, right) else Unit.NUMBER
    if left in _RATIOS:
        return right
    return left if right in _RATIOS else None


def _quotient(left: Unit, right: Unit) -> Unit | None:
    if left not in _MEASURES:
        return None
    if left is right:
        return Unit.NUMBER
    return left if right in _RATIOS else None
