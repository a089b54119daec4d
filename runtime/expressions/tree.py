"""An expression as data, with its units, and its canonical text."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sagec.runtime.expressions.units import CONVERTED, Unit, result

Place = tuple[int, int]
"""Characters [begin, end) of the text that an expression was read from."""


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """Two expressions are equal that say the same, wherever they were read."""

    at: Place = field(default=(0, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return _text(self, 0)


@dataclass(frozen=True)
class Quantity(_Placed):
    """A written number: its value (a share of 1, times in us), and how it is written."""

    value: float
    unit: Unit
    text: str


@dataclass(frozen=True)
class Text(_Placed):
    """A text; written: in its quotes."""

    value: str
    written: str

    unit = Unit.TEXT


@dataclass(frozen=True)
class Name(_Placed):
    """A value by its name; its unit is that of the place where it stands."""

    name: str
    unit: Unit


@dataclass(frozen=True)
class Prefixed(_Placed):
    """`-operand` or `not operand`."""

    operator: str
    operand: "Expression"

    @property
    def unit(self) -> Unit:
        return self.operand.unit


@dataclass(frozen=True)
class Operation(_Placed):
    """`left operator right`, whose units go together."""

    operator: str
    left: "Expression"
    right: "Expression"

    @property
    def unit(self) -> Unit:
        unit = result(self.operator, self.left.unit, self.right.unit)
        if unit is None:
            raise ValueError(f"{self} means nothing")
        return unit


@dataclass(frozen=True)
class Call(_Placed):
    """`function(arguments)`."""

    function: str
    arguments: tuple["Expression", ...]

    @property
    def unit(self) -> Unit:
        if self.function in CONVERTED:
            return CONVERTED[self.function][1]
        return self.arguments[0].unit


Expression = Quantity | Text | Name | Prefixed | Operation | Call

COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")

_BINDING = {
    "or": 1, "and": 2, "not": 3, **dict.fromkeys(COMPARISONS, 4), "+": 5, "-": 5, "*": 6, "/": 6,
}  # fmt: skip
"""How tightly operators bind. Of two that bind alike the left one goes first; comparisons do not
chain."""

_NEGATION = 7


def _text(expression: _Placed, least: int) -> str:
    """The text, in parentheses where it binds less tightly than `least`."""
    match expression:
        case Quantity():
            return expression.text
        case Text():
            return expression.written
        case Name():
            return expression.name
        case Call():
            return f"{expression.function}({', '.join(map(str, expression.arguments))})"
        case Prefixed(operator="-"):
            return f"-{_text(expression.operand, _NEGATION)}"
        case Prefixed():
            binding = _BINDING["not"]
            text = f"not {_text(expression.operand, binding)}"
        case Operation():
            binding = _BINDING[expression.operator]
            chains = expression.operator not in COMPARISONS
            text = _text(expression.left, binding if chains else binding + 1)
            text += f" {expression.operator} {_text(expression.right, binding + 1)}"
        case _:
            raise TypeError(f"{type(expression).__name__} is no expression")
    return f"({text})" if binding < least else text


def names_in(expression: Expression) -> Iterator[str]:
    """The names that an expression uses, from the left."""
    match expression:
        case Name():
            yield expression.name
        case Prefixed():
            yield from names_in(expression.operand)
        case Operation():
            yield from names_in(expression.left)
            yield from names_in(expression.right)
        case Call():
            for argument in expression.arguments:
                yield from names_in(argument)
