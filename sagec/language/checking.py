"""Expressions whose units go together, or what is wrong with them and what would be right."""

from __future__ import annotations

from sagec.diagnostics import there_are
from sagec.runtime.expressions.tree import (
    Call,
    Expression,
    Name,
    Operation,
    Place,
    Prefixed,
    Quantity,
)
from sagec.runtime.expressions.units import CONVERTED, Unit, result
from sagec.runtime.expressions.values import (
    AdmissionValues,
    PlacingValues,
    RunningValues,
    VictimValues,
    WaitingValues,
    names_of,
)

FUNCTIONS = {
    "min": "the smallest of its arguments",
    "max": "the largest of its arguments",
    "abs": "its argument without the sign",
    "blocks": "the blocks that so many tokens take, rounded up",
    "tokens": "the tokens that so many blocks hold",
}
"""All functions; `blocks` and `tokens` alone lead from one unit to another."""

PLACES = {
    WaitingValues: "order by",
    AdmissionValues: "admit while",
    PlacingValues: "prefill on",
    RunningValues: "preempt",
    VictimValues: "preempt ... when",
}
"""Where expressions stand: the values that they may use there, and a rule to name it by."""

_SUFFIXES = {Unit.SHARE: "%", Unit.TOKENS: " tokens", Unit.BLOCKS: " blocks", Unit.TIME: "ms"}


class ExpressionError(ValueError):
    """An expression that means nothing: where it stands, what is wrong, what would be right."""

    def __init__(self, at: Place, message: str, hint: str) -> None:
        super().__init__(message)
        self.at, self.message, self.hint = at, message, hint


def name(word: str, place: type, at: Place) -> Name:
    """The value of this name in a place. Raises ExpressionError, as all functions here."""
    names = names_of(place)
    if (value := names.get(word)) is not None:
        return Name(word, value.unit, at=at)
    elsewhere = [rule for other, rule in PLACES.items() if word in names_of(other)]
    if elsewhere:
        message = f"'{word}' is known in '{elsewhere[0]}', not in '{PLACES[place]}'"
        raise ExpressionError(at, message, f"there are: {', '.join(sorted(names))}")
    raise ExpressionError(at, f"no value '{word}'", there_are(word, names))


def prefixed(operator: str, operand: Expression, at: Place) -> Prefixed:
    """`-operand` or `not operand`."""
    if operator == "not":
        condition(operand)
    else:
        _require_measure(f"-{operand}", operand)
    return Prefixed(operator, operand, at=at)


def joined(operator: str, left: Expression, right: Expression, place: type) -> Operation:
    """`left operator right`."""
    at = (left.at[0], right.at[1])
    operation = Operation(operator, left, right, at=at)
    if result(operator, left.unit, right.unit) is not None:
        return operation
    if operator in ("and", "or"):
        condition(left)
        condition(right)
    message = f"'{operator}' does not join {left.unit.called} and {right.unit.called}"
    raise ExpressionError(at, message, _remedy(operation, place))


def called(function: str, arguments: tuple[Expression, ...], at: Place) -> Call:
    """`function(arguments)`."""
    if function not in FUNCTIONS:
        raise ExpressionError(at, f"no function '{function}'", there_are(function, FUNCTIONS))
    call = Call(function, arguments, at=at)
    gives = f"it gives {FUNCTIONS[function]}"
    several = function in ("min", "max")
    if (len(arguments) < 2) if several else (len(arguments) != 1):
        needs = "two or more" if several else "one"
        raise ExpressionError(at, f"'{function}' of {len(arguments)}, not of {needs}", gives)
    first = arguments[0].unit
    if function in CONVERTED and first is not CONVERTED[function][0]:
        message = f"'{function}' of {first.called}, not of {CONVERTED[function][0].called}"
        raise ExpressionError(arguments[0].at, message, gives)
    for argument in arguments:
        _require_measure(str(call), argument, moments=several)
        if argument.unit is not first:
            message = f"'{function}' of {first.called} and {argument.unit.called}"
            hint = f"as in: {function}({arguments[0]}, {first.example})"
            raise ExpressionError(argument.at, message, hint)
    return call


def condition(expression: Expression) -> Expression:
    """The expression, which must be a condition."""
    unit = expression.unit
    if unit is not Unit.CONDITION:
        compared = f"== {unit.example}" if unit is Unit.TEXT else f"> {unit.example}"
        message = f"'{expression}' is {unit.called}, not a condition"
        raise ExpressionError(expression.at, message, f"as in: {expression} {compared}")
    return expression


def ordered(expression: Expression) -> Expression:
    """The expression, which must be something that one can rank by."""
    if expression.unit is Unit.TEXT:
        message = f"'{expression}' is a text, and one cannot rank by it"
        raise ExpressionError(expression.at, message, f'as in: {expression} == "name"')
    return expression


def _require_measure(what: str, operand: Expression, moments: bool = False) -> None:
    unit = operand.unit
    if unit in (Unit.TEXT, Unit.CONDITION) or (unit is Unit.MOMENT and not moments):
        message = f"'{what}' means nothing, for '{operand}' is {unit.called}"
        raise ExpressionError(operand.at, message, "what does: something that is counted")


def _remedy(operation: Operation, place: type) -> str:
    """What would be right instead of an operation whose units do not go together."""
    left, right = operation.left.unit, operation.right.unit
    if left is right:
        return _alike(left, operation)
    match {left, right}:
        case both if both == {Unit.TOKENS, Unit.BLOCKS}:
            return "blocks(...) makes blocks of tokens, and tokens(...) tokens of blocks"
        case both if both == {Unit.MOMENT, Unit.TIME}:
            return "the time since a moment is: now - arrival"
    for side, other in ((operation.left, right), (operation.right, left)):
        if isinstance(side, Quantity) and side.unit is Unit.NUMBER and other in _SUFFIXES:
            return f"with its unit it is: {side}{_SUFFIXES[other]}"
        if other is Unit.BLOCKS and f"{side}_blocks" in names_of(place):
            return f"in blocks it is: {side}_blocks"
    return f"as in: {operation.left} {operation.operator} {left.example}"


def _alike(unit: Unit, operation: Operation) -> str:
    match unit:
        case Unit.TEXT:
            return "what does: == and !="
        case Unit.CONDITION:
            return "what does: and, or, not, == and !="
        case Unit.MOMENT:
            return "between moments there is: now - arrival"
        case _:
            return f"without its unit it is: {operation.right} / {unit.example}"
