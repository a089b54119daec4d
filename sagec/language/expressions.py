"""The expressions of a strategy: from lark's nodes to checked trees."""

from __future__ import annotations

import math
import re
from typing import Any

from sagec.language import checking
from sagec.language.checking import ExpressionError
from sagec.language.text import TextError, unquoted
from sagec.runtime.expressions.tree import Expression, Place, Quantity, Text
from sagec.runtime.expressions.units import LITERALS
from sagec.runtime.expressions.values import names_of

MOST_WORDS = 200
"""Of one expression; a longer one nobody reads."""

_QUANTITY = re.compile(r"([0-9._]+(?:[eE][+-]?[0-9]+)?)\s*(.*)")


def read(node: Any, place: type) -> Expression:
    """The expression of a node, with the values of a place. Raises ExpressionError."""
    words = words_of(node)
    if len(words) > MOST_WORDS:
        at = (words[0].start_pos, words[-1].end_pos)
        message = f"an expression of {len(words)} words"
        raise ExpressionError(at, message, f"{MOST_WORDS} are enough; make it two rules")
    return _read(node, place)


def words_of(node: Any) -> list[Any]:
    """All tokens of a node, in the order of the text."""
    found, left = [], [node]
    while left:
        part = left.pop()
        if hasattr(part, "rule"):
            left += reversed(part.parts)
        else:
            found.append(part)
    return found


def _read(node: Any, place: type) -> Expression:
    if not hasattr(node, "rule"):
        return _word(node, place)
    parts = node.parts
    match node.rule:
        case "group":
            return _read(parts[1], place)
        case "prefixed":
            operand = _read(parts[1], place)
            at = (parts[0].start_pos, operand.at[1])
            return checking.prefixed(str(parts[0]), operand, at)
        case "call":
            arguments = tuple(_read(part, place) for part in parts[2:-1:2])
            at = (parts[0].start_pos, parts[-1].end_pos)
            return checking.called(str(parts[0]), arguments, at)
        case _:
            _check_hyphen(parts, place)
            left = _read(parts[0], place)
            for operator, right in zip(parts[1::2], parts[2::2], strict=True):
                left = checking.joined(str(operator), left, _read(right, place), place)
            return left


def _check_hyphen(parts: list[Any], place: type) -> None:
    """Raise ExpressionError where `kv-free` is meant to be a name."""
    if "-" not in parts or any(hasattr(part, "rule") for part in parts):
        return
    begin, end = parts[0].start_pos, parts[-1].end_pos
    meant = "_".join(str(part) for part in parts if part != "-")
    if end - begin == len(meant) and meant in names_of(place):
        written = "".join(map(str, parts))
        raise ExpressionError((begin, end), f"no value '{written}'", f"it is written: {meant}")


def _word(token: Any, place: type) -> Expression:
    at = (token.start_pos, token.end_pos)
    if token.type == "QUANTITY":
        return _quantity(str(token), at)
    if token.type == "STRING":
        try:
            return Text(unquoted(token), str(token), at=at)
        except TextError as error:
            begin = at[0] + error.offset
            wrong = (begin, begin + error.length)
            raise ExpressionError(wrong, error.message, error.hint) from None
    return checking.name(str(token), place, at)


def _quantity(text: str, at: Place) -> Quantity:
    digits, suffix = _parts(text)
    if suffix not in LITERALS:
        units = ("", "%", "tokens", "blocks", "us", "ms", "s")
        listed = ", ".join(f"{digits}{_gap(unit)}{unit}" for unit in units)
        raise ExpressionError(at, f"{suffix} is no unit", f"what does: {listed}")
    if not math.isfinite(float(digits)):
        raise ExpressionError(at, f"{digits} is no number", "what does: up to 1e308")
    unit, factor = LITERALS[suffix]
    return Quantity(float(digits) * factor, unit, quantity_text(text), at=at)


def quantity_text(text: str) -> str:
    """A written number as it is to be written.

    >>> quantity_text("64tokens"), quantity_text("200  ms"), quantity_text("5 %")
    ('64 tokens', '200ms', '5%')
    """
    digits, suffix = _parts(text)
    return f"{digits}{_gap(suffix)}{suffix}"


def _parts(text: str) -> tuple[str, str]:
    match = _QUANTITY.fullmatch(text)
    assert match is not None
    return match[1], match[2]


def _gap(suffix: str) -> str:
    """Words stand apart from their number, abbreviations do not."""
    return " " if suffix.startswith(("token", "block")) else ""
