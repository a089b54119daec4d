"""Named numbers and strings of an op: `{layers = 4, dtype = "bf16"}`, declared once in a tuple."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, f64, i64
from xdsl.ir import Attribute, Operation
from xdsl.irdl import IRDLOperation, opt_prop_def
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import SPACE, parse_string, quoted, shortened

Value = int | float | str

MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class Scalar:
    """`name = value`; the type of `default` says whether an integer, a float or a string.

    required: the op must say it. least, most: the range of numbers that make sense, both ends in
    it. choices: the strings there are.
    """

    name: str
    doc: str
    default: Value
    required: bool = False
    least: float = 0
    choices: tuple[str, ...] = ()
    most: float = math.inf


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
            return int_attr(value)
        case float():
            return FloatAttr(value, f64)
        case str():
            return StringAttr(value)


@functools.lru_cache(4096)
def int_attr(value: int) -> IntegerAttr:
    """The i64 of a number; those that return every round are made once."""
    return IntegerAttr(int(value), i64)


def value_of(attr: Attribute) -> Value | None:
    """The Python value of an attribute that `attr_of` makes: i64, f64 or a string; else None."""
    match attr:
        case IntegerAttr() if attr.type == i64:
            return attr.value.data
        case FloatAttr() if attr.type == f64:
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
        raise TypeError(f"no {sorted(unknown)[0]!r} here; there are: {', '.join(kinds)}")
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
    """The value as `_parse_value` reads it; an attribute that is none as it is."""
    value = value_of(attr)
    if isinstance(value, str):
        return quoted(value)
    # MLIR wants a point in a float: 1e+16 is no number there.
    return str(attr) if value is None else re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))


def opens_scalars(parser: Parser) -> bool:
    """Whether the next brace opens `{name = value}` and not a region."""
    text = str(parser.lexer.input.content)
    return _ENTRY.match(text, parser.pos) is not None


_ENTRY = re.compile(rf"\{{{SPACE}[A-Za-z_]\w*{SPACE}=", re.ASCII)


def parse_scalars(parser: Parser, scalars: Scalars) -> dict[str, Attribute]:
    """Parse what `print_scalars` prints, if it is there."""
    by_name = {scalar.name: scalar for scalar in scalars}
    properties: dict[str, Attribute] = {}

    def entry() -> None:
        at = parser.pos
        name = parser.parse_identifier(" or '}'")
        if (scalar := by_name.get(name)) is None:
            parser.raise_error(f"no '{name}' here; there are: {', '.join(by_name)}", at)
        if name in properties:
            parser.raise_error(f"'{name}' is given twice", at)
        parser.parse_punctuation("=")
        properties[name] = attr_of(_parse_value(parser, scalar))

    parser.parse_optional_comma_separated_list(parser.Delimiter.BRACES, entry)
    return properties


def _parse_value(parser: Parser, scalar: Scalar) -> Value:
    at = parser.pos
    if isinstance(scalar.default, str):
        return parse_string(parser, f"'{scalar.name}'")
    if (number := parser.parse_optional_number()) is None:
        parser.raise_error(f"expected a number for '{scalar.name}'", at)
    if isinstance(scalar.default, float):
        if abs(number) > MAX_FLOAT:
            parser.raise_error(f"'{scalar.name}' must fit a float of 64 bits", at)
        return float(number)
    if not isinstance(number, int):
        parser.raise_error(f"'{scalar.name}' is an integer, not {number}", at)
    if not -(2**63) <= number < 2**63:
        parser.raise_error(f"'{scalar.name}': {shortened(number)} does not fit 64 bits", at)
    return number


def verify_scalars(op: Operation, scalars: Scalars) -> None:
    """Raise unless what the op says is there, of its type and in its range."""
    for scalar in scalars:
        attr = op.properties.get(scalar.name)
        if attr is None:
            if scalar.required:
                raise VerifyException(f"{op.name}: '{scalar.name}' is missing: {scalar.doc}")
            continue
        _verify_value(op, scalar, attr)


_TYPE_NAMES: dict[type[Value], str] = {int: "an i64", float: "an f64", str: "a string"}


def _verify_value(op: Operation, scalar: Scalar, attr: Attribute) -> None:
    value, place = value_of(attr), f"{op.name}: '{scalar.name}'"
    if type(value) is not type(scalar.default):
        raise VerifyException(f"{place} must be {_TYPE_NAMES[type(scalar.default)]}, not {attr}")
    if isinstance(value, int | float) and not scalar.least <= value <= min(scalar.most, MAX_FLOAT):
        raise VerifyException(f"{place} is {value}; {_range_text(scalar)}")
    if scalar.choices and value not in scalar.choices:
        raise VerifyException(f"{place} is {attr}; one of: {', '.join(scalar.choices)}")


def _range_text(scalar: Scalar) -> str:
    if scalar.most < math.inf:
        return f"from {scalar.least:g} to {scalar.most:g}"
    return f"{scalar.least:g} or more"


def scalar_of(op: Operation, name: str, default: Value) -> Value:
    """What the op says of `name`, or the default."""
    attr = op.properties.get(name)
    value = value_of(attr) if attr is not None else None
    return default if value is None else value
