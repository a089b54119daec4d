"""Named numbers and strings of an op: `{layers = 4, dtype = "bf16"}`, declared once in a tuple."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, f64, i64
from xdsl.ir import Attribute, Operation
from xdsl.irdl import IRDLOperation, opt_prop_def
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import quoted

Value = int | float | str


@dataclass(frozen=True)
class Scalar:
    """`name = value`; the type of `default` says whether an integer, a float or a string.

    required: the op must say it. least: the smallest number that makes sense.
    """

    name: str
    doc: str
    default: Value
    required: bool = False
    least: float = 0
    choices: tuple[str, ...] = ()


Scalars = tuple[Scalar, ...]

OpT = TypeVar("OpT", bound=IRDLOperation)


def declares(scalars: Scalars) -> Callable[[type[OpT]], type[OpT]]:
    """Give an op class an optional property for each scalar; `verify_scalars` asks for the rest."""

    def declare(op: type[OpT]) -> type[OpT]:
        for scalar in scalars:
            setattr(op, scalar.name, opt_prop_def(Attribute))
        return op

    return declare


def attr_of(value: Value) -> Attribute:
    """The builtin attribute of a Python value."""
    match value:
        case int():
            return IntegerAttr(value, i64)
        case float():
            return FloatAttr(value, f64)
        case str():
            return StringAttr(value)


def value_of(attr: Attribute) -> Value | None:
    """The Python value of a builtin integer, float or string attribute; else None."""
    match attr:
        case IntegerAttr() | FloatAttr():
            return attr.value.data
        case StringAttr():
            return attr.data
        case _:
            return None


def properties_of(values: Mapping[str, Value | None], scalars: Scalars) -> dict[str, Attribute]:
    """Properties for those of `values` that are given; an integer will do for a float.

    Raises TypeError for a name that no scalar has.
    """
    kinds = {scalar.name: type(scalar.default) for scalar in scalars}
    if unknown := values.keys() - kinds.keys():
        raise TypeError(f"unknown {sorted(unknown)[0]!r}; there are: {', '.join(kinds)}")
    return {
        name: attr_of(float(value) if kinds[name] is float else value)
        for name, value in values.items()
        if value is not None
    }


def print_scalars(printer: Printer, op: Operation, scalars: Scalars) -> None:
    """Print ` {name = value, ...}` of those that the op says, in the order of declaration."""
    said = [s.name for s in scalars if s.name in op.properties]
    if said:
        cells = [f"{name} = {_text(op.properties[name])}" for name in said]
        printer.print_string(f" {{{', '.join(cells)}}}")


def _text(attr: Attribute) -> str:
    value = value_of(attr)
    return quoted(value) if isinstance(value, str) else repr(value)


def parse_scalars(parser: Parser, scalars: Scalars) -> dict[str, Attribute]:
    """Parse what `print_scalars` prints, if it is there."""
    by_name = {scalar.name: scalar for scalar in scalars}
    properties: dict[str, Attribute] = {}

    def entry() -> None:
        at = parser.pos
        name = parser.parse_identifier(" or '}'")
        if (scalar := by_name.get(name)) is None:
            parser.raise_error(f"unknown '{name}'; there are: {', '.join(by_name)}", at)
        if name in properties:
            parser.raise_error(f"'{name}' is given twice", at)
        parser.parse_punctuation("=")
        properties[name] = attr_of(_parse_value(parser, scalar))

    parser.parse_optional_comma_separated_list(parser.Delimiter.BRACES, entry)
    return properties


def _parse_value(parser: Parser, scalar: Scalar) -> Value:
    if isinstance(scalar.default, str):
        return parser.parse_str_literal(f" for '{scalar.name}'")
    at = parser.pos
    number = parser.parse_number(context_msg=f" for '{scalar.name}'")
    if isinstance(scalar.default, float):
        return float(number)
    if not isinstance(number, int) or not -(2**63) <= number < 2**63:
        parser.raise_error(f"'{scalar.name}' is an integer of 64 bits, not {number}", at)
    return number


def verify_scalars(op: Operation, scalars: Scalars) -> None:
    """Raise unless what the op says is there, of its type and in its range."""
    for scalar in scalars:
        attr = op.properties.get(scalar.name)
        if attr is None:
            if scalar.required:
                raise VerifyException(f"{op.name}: '{scalar.name}' is missing: {scalar.doc}")
            continue
        value = value_of(attr)
        if type(value) is not type(scalar.default):
            kind = type(scalar.default).__name__
            raise VerifyException(f"{op.name}: '{scalar.name}' must be of type {kind}, not {attr}")
        if not isinstance(value, str) and value is not None and not value >= scalar.least:
            raise VerifyException(
                f"{op.name}: '{scalar.name}' is {value}; the least is {scalar.least:g}"
            )
        if scalar.choices and value not in scalar.choices:
            raise VerifyException(
                f"{op.name}: '{scalar.name}' is {attr}; one of: {', '.join(scalar.choices)}"
            )


def scalar_of(op: Operation, name: str, default: Value) -> Value:
    """What the op says of `name`, or the default."""
    attr = op.properties.get(name)
    value = value_of(attr) if attr is not None else None
    return default if value is None else value
