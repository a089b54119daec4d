"""Tables in text: a row a line, a field where it differs from its default.

    [
      "chat-1": prompt 1024 generate 256 tenant "blue",
      "chat-2": prompt 96
    ]

An op declares its fields once, in a tuple; they parse, print, verify and document themselves. Rows
are scanned with one regular expression, five times faster than token by token through xDSL's
lexer: a file may hold ten thousand. Above READABLE_ROWS a table prints as the columns' attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn, TypeVar

import numpy as np
from xdsl.ir import Attribute, Operation
from xdsl.irdl import IRDLOperation, opt_prop_def
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException
from xdsl.utils.lexer import Span
from xdsl.utils.mlir_lexer import StringLiteral

from sagec.dialects.columns import ColumnAttr, ListsAttr, NamesAttr, WordsAttr, quoted

READABLE_ROWS = 1024


class Kind(Enum):
    """How a field's value is written, and the attribute that keeps its column."""

    INT = "an integer"
    FLAG = "nothing: the keyword alone says yes"
    CHOICE = "one of some keywords"
    WORD = "a string in quotes; few differ"
    TEXT = "a string in quotes"
    SYMBOL = "a symbol, @name"
    LIST = "integers in brackets"


_ATTR: dict[Kind, type[ColumnAttr | NamesAttr | WordsAttr | ListsAttr]] = {
    Kind.INT: ColumnAttr,
    Kind.FLAG: ColumnAttr,
    Kind.CHOICE: ColumnAttr,
    Kind.WORD: WordsAttr,
    Kind.TEXT: NamesAttr,
    Kind.SYMBOL: WordsAttr,
    Kind.LIST: ListsAttr,
}


_ATTR_NAME = {kind: f"a #{attr.name}" for kind, attr in _ATTR.items()}


@dataclass(frozen=True)
class Field:
    """A column of an op's table: `keyword value` in a row, the property of the same name.

    default: what a row has that does not say; a column of nothing else may be left out.
    choices: the keywords of a CHOICE, whose codes count from 0. A CHOICE prints without `name`.
    header: where all rows have the same symbol, it stands once, before the rows.
    """

    name: str
    kind: Kind
    doc: str
    default: int = 0
    required: bool = False
    choices: tuple[str, ...] = ()
    header: bool = False


Fields = tuple[Field, ...]
OpT = TypeVar("OpT", bound=IRDLOperation)
Properties = dict[str, Attribute]


def declares_rows(fields: Fields) -> Callable[[type[OpT]], type[OpT]]:
    """Give an op class the property `ids` and one for each field; `verify_rows` checks them."""

    def declare(op: type[OpT]) -> type[OpT]:
        for name in ("ids", *(field.name for field in fields)):
            setattr(op, name, opt_prop_def(Attribute))
        return op

    return declare


def column_or(
    op: Operation, name: str, default: int, rows: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The int64 column of a property, or `rows` times the default where the op has none."""
    attr = op.properties.get(name)
    if isinstance(attr, ColumnAttr):
        return attr.data.array
    return np.full(rows, default, np.int64)


def verify_rows(op: Operation, fields: Fields, rows: int) -> None:
    """Raise unless every column of the op has `rows` rows and every choice exists."""
    for field in fields:
        attr = op.properties.get(field.name)
        if attr is None:
            if field.required and rows:
                raise VerifyException(f"{op.name}: column '{field.name}' is missing")
            continue
        if not isinstance(attr, _ATTR[field.kind]):
            raise VerifyException(
                f"{op.name}: '{field.name}' must be {_ATTR_NAME[field.kind]}, not {attr}"
            )
        if len(attr) != rows:
            raise VerifyException(
                f"{op.name}: column '{field.name}' has {len(attr)} rows where the op has {rows}"
            )
        if field.kind in (Kind.CHOICE, Kind.FLAG) and rows:
            _verify_codes(op, field, attr)


def _verify_codes(op: Operation, field: Field, attr: Attribute) -> None:
    assert isinstance(attr, ColumnAttr)
    count = len(field.choices) or 2
    low, high = int(attr.array.min()), int(attr.array.max())
    if low < 0 or high >= count:
        bad = low if low < 0 else high
        raise VerifyException(
            f"{op.name}: column '{field.name}' holds {bad}; codes are [0, {count})"
        )


def verify_unique(op: Operation, ids: Sequence[str]) -> None:
    """Raise where a request is named twice."""
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise VerifyException(f"{op.name}: request {quoted(twice)} is named twice; ids are unique")


# Printing


def print_table(printer: Printer, op: Operation, fields: Fields) -> None:
    """Print the op's table: ` on @d0 [ rows ]`, or ` {columns}` where it is too long to read."""
    ids = op.properties["ids"]
    assert isinstance(ids, NamesAttr)
    if len(ids) > READABLE_ROWS:
        printer.print_string(" ")
        names = ["ids", *(f.name for f in fields if f.name in op.properties)]
        printer.print_attr_dict({name: op.properties[name] for name in names})
        return
    columns = []
    for field in fields:
        attr = op.properties.get(field.name)
        if attr is None:
            continue
        if field.header and isinstance(attr, WordsAttr) and len(attr.words) == 1 and len(ids):
            printer.print_string(f" {field.name} {symbol(attr.words[0])}")
        else:
            columns.append(_cells(field, attr))
    rows = zip(*columns, strict=True) if columns else [()] * len(ids)
    printer.print_string(" [")
    with printer.indented():
        for index, (name, cells) in enumerate(zip(ids.data, rows, strict=True)):
            printer.print_string(",\n" if index else "\n")
            printer.print_string(f"{quoted(name)}:{''.join(cells)}" if any(cells) else quoted(name))
    if len(ids):
        printer.print_string("\n")
    printer.print_string("]")


def _cells(field: Field, attr: Attribute) -> list[str]:
    """The text of each row's field, with a space before it, or nothing for the default."""
    match attr:
        case ColumnAttr() if field.kind is Kind.INT:
            show = None if field.required else field.default
            return ["" if v == show else f" {field.name} {v}" for v in attr.array.tolist()]
        case ColumnAttr() if field.kind is Kind.FLAG:
            return [f" {field.name}" if v else "" for v in attr.array.tolist()]
        case ColumnAttr():
            return [f" {field.choices[v]}" for v in attr.array.tolist()]
        case WordsAttr():
            text = symbol if field.kind is Kind.SYMBOL else quoted
            cells = [f" {field.name} {text(word)}" if word else "" for word in attr.words]
            return [cells[code] for code in attr.codes.tolist()]
        case NamesAttr():
            return [f" {field.name} {quoted(name)}" if name else "" for name in attr.data]
        case ListsAttr():
            return [f" {field.name} {values}" if values else "" for values in attr.rows()]
        case _:
            raise TypeError(f"no text for {attr}")


def symbol(name: str) -> str:
    """`name` as a symbol: `@d0`, or `@"name with spaces"`."""
    return f"@{name}" if _BARE_SYMBOL.fullmatch(name) else f"@{quoted(name)}"


# Parsing

_BARE_SYMBOL = re.compile(r"[A-Za-z_][\w$.-]*")
_SPACE = r"(?:\s|//[^\n]*)*"
_TOKEN = re.compile(
    _SPACE
    + r"""(?: (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<symbol>@(?:[A-Za-z_][\w$.-]*|"(?:[^"\\\n]|\\.)*"))
      | (?P<int>-?\d+\b) | (?P<word>[A-Za-z_][\w-]*) | (?P<mark>[\[\](){}:;,]) )""",
    re.VERBOSE,
)


class Scanner:
    """Reads the tokens of a table straight from the parser's text."""

    def __init__(self, parser: Parser) -> None:
        self.parser = parser
        self.input = parser.lexer.input
        text = self.input.content
        assert isinstance(text, str)
        self.text = text
        self.pos = parser.pos
        self.start = self.pos
        self.kind: str | None = None
        self.value = ""

    def next(self) -> str:
        """Read a token; `kind` and `value` hold it. Returns its text."""
        match = _TOKEN.match(self.text, self.pos)
        if match is None:
            end = re.compile(_SPACE).match(self.text, self.pos)
            self.start = self.pos = end.end() if end else self.pos
            self.error("expected a row or ']'")
        self.kind = match.lastgroup
        self.value = match[match.lastgroup or 0]
        self.start, self.pos = match.start(match.lastgroup or 0), match.end()
        return self.value

    def error(self, message: str) -> NoReturn:
        self.parser.raise_error(
            message, Span(self.start, max(self.pos, self.start + 1), self.input)
        )

    def string(self, what: str) -> str:
        if self.kind != "string":
            self.error(f"expected {what} in quotes, not {self.value}")
        return self._unquoted(self.value, self.start)

    def _unquoted(self, literal: str, start: int) -> str:
        if "\\" not in literal:
            return literal[1:-1]
        try:
            contents: str = StringLiteral(start, start + len(literal), self.input).string_contents
            return contents
        except UnicodeDecodeError:
            self.error("the string is not UTF-8")

    def field(self, field: Field) -> int | str | list[int]:
        """The value after a field's keyword."""
        if field.kind is Kind.FLAG:
            return 1
        self.next()
        if field.kind is Kind.INT:
            return self._int(field.name)
        if field.kind is Kind.SYMBOL:
            if self.kind != "symbol":
                self.error(f"expected a symbol after '{field.name}', not {self.value}")
            name = self.value[1:]
            return self._unquoted(name, self.start + 1) if name.startswith('"') else name
        if field.kind is Kind.LIST:
            return self._list(field.name)
        return self.string(f"'{field.name}'")

    def _int(self, what: str) -> int:
        if self.kind != "int":
            self.error(f"expected an integer after '{what}', not {self.value}")
        value = int(self.value) if len(self.value) < 20 else 2**63
        if not -(2**63) <= value < 2**63:
            self.error(f"{self.value} does not fit 64 bits")
        return value

    def _list(self, what: str) -> list[int]:
        if self.value != "[":
            self.error(f"expected '[' after '{what}', not {self.value}")
        values: list[int] = []
        while self.next() != "]":
            if self.value == "," and values:
                self.next()
            values.append(self._int(what))
        return values

    def chunks(self, rows: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
        """`{0: "a" [0, 64), "b" [0, 32); 1: ...}` as (step, row, begin, end)."""
        chunks: list[tuple[int, int, int, int]] = []
        self.expect("{")
        self.next()
        while self.value != "}":
            step = self._int("step")
            self.expect(":")
            while True:
                self.next()
                if (row := rows.get(self.string("a request's id"))) is None:
                    self.error(f"no row {self.value} in the table above")
                self.expect("[")
                self.next()
                begin = self._int("[")
                self.expect(",")
                self.next()
                chunks.append((step, row, begin, self._int(",")))
                self.expect(")")
                if self.next() != ",":
                    break
            if self.value != ";":
                self.error(f"expected ',' or ';' after a chunk, not {self.value}")
            self.next()
        self.parser._resume_from(self.pos)
        return chunks

    def expect(self, mark: str) -> None:
        """Read the token `mark`."""
        if self.next() != mark:
            self.error(f"expected '{mark}', not {self.value}")


def parse_table(parser: Parser, fields: Fields) -> Properties:
    """Parse what `print_table` prints; the op's properties."""
    if entries := parser.parse_optional_dictionary_attr_dict():
        return entries
    header: dict[str, str] = {}
    for field in fields:
        if field.header and parser.parse_optional_keyword(field.name):
            header[field.name] = parser.parse_symbol_name().data
    at = parser.pos
    if parser.lexer.input.content[at : at + 1] != "[":
        parser.raise_error("expected '[' before the rows")
    ids, cells = _scan_rows(parser, fields)
    properties: Properties = {"ids": NamesAttr.of(ids)}
    for field in fields:
        if field.name in header:
            properties[field.name] = WordsAttr.same(header[field.name], len(ids))
        elif (given := cells.get(field.name)) or (field.required and ids):
            if field.required and len(given or ()) != len(ids):
                missing = next(i for i in range(len(ids)) if i not in (given or {}))
                parser.raise_error(
                    f"row {quoted(ids[missing])} lacks {_wanted(field)}",
                    Span(at, at + 1, parser.lexer.input),
                )
            properties[field.name] = _column(field, given or {}, len(ids))
    return properties


def _wanted(field: Field) -> str:
    return " or ".join(field.choices) if field.choices else f"'{field.name}'"


def _scan_rows(
    parser: Parser, fields: Fields
) -> tuple[list[str], dict[str, dict[int, int | str | list[int]]]]:
    """The ids of the rows, and of each field its values by row."""
    scanner = Scanner(parser)
    by_keyword = {field.name: (field, 0) for field in fields if field.kind is not Kind.CHOICE}
    by_keyword |= {word: (f, code) for f in fields for code, word in enumerate(f.choices)}
    ids: list[str] = []
    cells: dict[str, dict[int, int | str | list[int]]] = {field.name: {} for field in fields}
    scanner.next()
    scanner.next()
    while scanner.value != "]" or scanner.kind != "mark":
        row = len(ids)
        ids.append(scanner.string("a request's id"))
        if scanner.next() == ":" and scanner.kind == "mark":
            scanner.next()
            while scanner.kind == "word":
                field, code = by_keyword.get(scanner.value) or _unknown(scanner, by_keyword)
                if row in cells[field.name]:
                    scanner.error(f"'{field.name}' is given twice")
                value = code if field.choices else scanner.field(field)
                cells[field.name][row] = value
                scanner.next()
        if scanner.value == ",":
            scanner.next()
        elif scanner.value != "]":
            scanner.error(f"expected a field, ',' or ']', not {scanner.value}")
    parser._resume_from(scanner.pos)
    return ids, cells


def _unknown(scanner: Scanner, known: Mapping[str, object]) -> NoReturn:
    scanner.error(f"unknown field '{scanner.value}'; there are: {', '.join(sorted(known))}")


def _column(field: Field, given: dict[int, int | str | list[int]], rows: int) -> Attribute:
    blank: int | str | list[int] = field.default
    if field.kind in (Kind.WORD, Kind.TEXT, Kind.SYMBOL):
        blank = ""
    elif field.kind is Kind.LIST:
        blank = []
    values = [given.get(row, blank) for row in range(rows)]
    make: dict[Kind, Callable[..., Attribute]] = {
        Kind.WORD: WordsAttr.from_rows,
        Kind.SYMBOL: WordsAttr.from_rows,
        Kind.TEXT: NamesAttr.of,
        Kind.LIST: ListsAttr.of,
    }
    return make.get(field.kind, ColumnAttr.of)(values)
