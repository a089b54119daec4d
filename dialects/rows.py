"""Tables in text: a row a line, a field where it differs from its default.

    [
      "chat-1": prompt 1024 generate 256 tenant "blue",
      "chat-2": prompt 96
    ]

An op declares its fields once, in a tuple; they parse, print, verify and document themselves. Rows
are scanned a cell at a time with regular expressions, ten times faster than token by token through
xDSL's lexer: a file may hold ten thousand. Above READABLE_ROWS a table prints as the columns'
attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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

from sagec.dialects.columns import SPACE, ColumnAttr, ListsAttr, NamesAttr, WordsAttr, quoted

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
    least: the smallest integer that makes sense; None: any does.
    """

    name: str
    kind: Kind
    doc: str
    default: int = 0
    required: bool = False
    choices: tuple[str, ...] = ()
    header: bool = False
    least: int | None = None


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


def verify_rows(op: Operation, fields: Fields, ids: Sequence[str]) -> None:
    """Raise unless every column of the op has a row for each of `ids`, and values that exist."""
    for field in fields:
        attr = op.properties.get(field.name)
        if attr is None:
            if field.required and ids:
                raise VerifyException(
                    f"{op.name}: column '{field.name}' is missing: {_meaning(field)}"
                )
            continue
        if not isinstance(attr, _ATTR[field.kind]):
            raise VerifyException(
                f"{op.name}: '{field.name}' must be {_ATTR_NAME[field.kind]}, not {brief(attr)}"
            )
        if len(attr) != len(ids):
            raise VerifyException(
                f"{op.name}: column '{field.name}' has {len(attr)} rows where the op has {len(ids)}"
            )
        if ids:
            _verify_values(op, field, attr, ids)


def _verify_values(op: Operation, field: Field, attr: Attribute, ids: Sequence[str]) -> None:
    match attr:
        case ColumnAttr() if field.kind is Kind.INT:
            if field.least is not None and (row := int(attr.array.argmin())) >= 0:
                value = attr.array[row]
                if value < field.least:
                    raise VerifyException(
                        f"{op.name}: {quoted(ids[row])}: {field.name} {value}; "
                        f"{field.least} or more ({_meaning(field)})"
                    )
        case ColumnAttr():
            _verify_codes(op, field, attr, len(field.choices) or 2)
        case WordsAttr():
            _verify_codes(op, field, attr, len(attr.words))
            if field.required and "" in attr.words and "" in (rows := attr.rows()):
                raise VerifyException(
                    f"{op.name}: {quoted(ids[rows.index('')])} lacks '{field.name}': {field.doc}"
                )
        case ListsAttr() if not attr.is_sound():
            raise VerifyException(
                f"{op.name}: column '{field.name}' has offsets that do not ascend"
            )


def _verify_codes(op: Operation, field: Field, attr: ColumnAttr | WordsAttr, count: int) -> None:
    codes = attr.array if isinstance(attr, ColumnAttr) else attr.codes
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= count:
        bad = low if low < 0 else high
        raise VerifyException(
            f"{op.name}: column '{field.name}' holds code {bad}; codes are in [0, {count})"
        )


def has_sound_codes(attr: WordsAttr) -> bool:
    """Whether each code is that of a word."""
    codes = attr.codes
    return not len(codes) or bool(0 <= codes.min() <= codes.max() < len(attr.words))


def _meaning(field: Field) -> str:
    return f"{field.doc}: {' or '.join(field.choices)}" if field.choices else field.doc


def brief(attr: Attribute) -> str:
    """An attribute as a message names it: long columns by their kind alone."""
    return f"a #{attr.name}" if isinstance(attr, tuple(_ATTR.values())) else str(attr)[:60]


def verify_unique(op: Operation, ids: Sequence[str], what: str = "request") -> None:
    """Raise where two rows have one id; `what` says of what these are."""
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise VerifyException(f"{op.name}: {what} {quoted(twice)} is named twice; ids are unique")


# Printing


def print_table(printer: Printer, op: Operation, fields: Fields) -> None:
    """Print the op's table: ` on @d0 [ rows ]`, or ` {columns}` where it is too long to read."""
    ids = op.properties.get("ids")
    if not isinstance(ids, NamesAttr) or not _is_readable(op, fields, len(ids)):
        printer.print_string(" ")
        names = [name for name in ("ids", *(f.name for f in fields)) if name in op.properties]
        printer.print_attr_dict({name: op.properties[name] for name in names})
        return
    columns = []
    for field in fields:
        attr = op.properties.get(field.name)
        if attr is None:
            continue
        if field.header and isinstance(attr, WordsAttr) and (word := attr.only()):
            printer.print_string(f" {field.name} {symbol(word)}")
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


def _is_readable(op: Operation, fields: Fields, rows: int) -> bool:
    """Whether rows can stand for the columns: few of them, and all as they should be."""
    try:
        verify_rows(op, fields, [""] * rows)
    except VerifyException:
        return False
    return rows <= READABLE_ROWS


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


def parse_symbol(parser: Parser, what: str) -> str:
    """A symbol, without the @; `what` it names, for the error."""
    at = parser.pos
    try:
        found = parser.parse_optional_symbol_name()
    except UnicodeDecodeError:
        parser.raise_error("the name is not UTF-8", at)
    if found is None:
        parser.raise_error(f"expected {what}, @name", at)
    return found.data


# Parsing

_BARE_SYMBOL = re.compile(r"[A-Za-z_][\w$.]*", re.ASCII)
_TOKEN = re.compile(
    SPACE
    + r"""(?: (?P<string>"(?:[^"\\\n]|\\.)*")
      | (?P<symbol>@(?:[A-Za-z_][\w$.]*(?!-)|"(?:[^"\\\n]|\\.)*"))
      | (?P<int>-?\d+(?![\w.])) | (?P<word>[A-Za-z_]\w*) | (?P<mark>[\[\](){}:;,])
      | (?P<junk>"[^\n]*|[^\s\[\](){}:;,]+) )""",
    re.VERBOSE | re.ASCII,
)
# The common forms of a row's beginning, of a cell and of a row's end, each in one match.
_ROW = re.compile(SPACE + r'"([^"\\\n]*)"' + SPACE + "(:?)", re.ASCII)
_CELL = re.compile(
    rf"""{SPACE}([A-Za-z_]\w*)
      (?:{SPACE}(?:(-?\d{{1,18}})(?![\w.]) | "([^"\\\n]*)" | @([A-Za-z_][\w$.]*)(?!-)))?""",
    re.VERBOSE | re.ASCII,
)
_END = re.compile(SPACE + r"([,\]])", re.ASCII)
_SHOWN_CHARACTERS = 40

Value = int | str | list[int]


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
            self.start = self.pos = len(self.text)
            self.error("expected ']' or more, but the text ends")
        self.kind = match.lastgroup
        self.value = match[match.lastgroup or 0]
        self.start, self.pos = match.start(match.lastgroup or 0), match.end()
        return self.value

    def finish(self) -> None:
        """Let the parser go on behind the last token."""
        self.parser._resume_from(self.pos)

    def error(self, message: str) -> NoReturn:
        """Raise an error at the last token."""
        self.error_at(self.start, self.pos, message)

    def error_at(self, begin: int, end: int, message: str) -> NoReturn:
        """Raise an error at the characters [begin, end)."""
        self.parser.raise_error(message, Span(begin, max(end, begin + 1), self.input))

    def expected(self, what: str) -> NoReturn:
        """Raise an error: this is what the last token should have been."""
        if self.kind == "junk" and self.value.startswith('"'):
            self.error("the string does not end on its line")
        if self.kind == "junk" and self.value.startswith("@"):
            self.error(f'expected {what}; names of other characters stand in quotes: @"a-b"')
        shown = self.value[:_SHOWN_CHARACTERS]
        self.error(f"expected {what}, not {shown}{'...' if shown != self.value else ''}")

    def expect(self, mark: str) -> None:
        """Read the token `mark`."""
        if self.next() != mark:
            self.expected(f"'{mark}'")

    def string(self, what: str) -> str:
        """The last token, which must be a string literal."""
        if self.kind != "string":
            self.expected(f"{what} in quotes")
        return self._unquoted(self.value, self.start)

    def symbol(self, what: str) -> str:
        """The last token, which must be a symbol, without the @."""
        if self.kind != "symbol":
            self.expected(what)
        name = self.value[1:]
        return self._unquoted(name, self.start + 1) if name.startswith('"') else name

    def integer(self, what: str) -> int:
        """The last token, which must be an integer of 64 bits."""
        if self.kind != "int":
            self.expected(what)
        value = int(self.value) if len(self.value) < 40 else 2**64
        if not -(2**63) <= value < 2**63:
            self.error(f"{self.value[:_SHOWN_CHARACTERS]} does not fit 64 bits")
        return value

    def integers(self, what: str) -> list[int]:
        """Integers in brackets, of which the last token is the first bracket."""
        if self.value != "[":
            self.expected(f"'[' after '{what}'")
        values: list[int] = []
        if self.next() == "]":
            return values
        while True:
            values.append(self.integer(f"an integer in '{what}'"))
            if self.next() == "]":
                return values
            if self.value != ",":
                self.expected("',' or ']'")
            self.next()

    def field(self, field: Field) -> Value:
        """The value after a field's keyword."""
        if field.kind is Kind.FLAG:
            return 1
        self.next()
        match field.kind:
            case Kind.INT:
                return self.integer(f"an integer after '{field.name}'")
            case Kind.SYMBOL:
                return self.symbol(f"a symbol, @name, after '{field.name}'")
            case Kind.LIST:
                return self.integers(field.name)
            case _:
                return self.string(f"'{field.name}'")

    def _unquoted(self, literal: str, start: int) -> str:
        if "\\" not in literal:
            return literal[1:-1]
        try:
            contents: str = StringLiteral(start, start + len(literal), self.input).string_contents
            return contents
        except UnicodeDecodeError:
            self.error("the string is not UTF-8")


class _Rows(Scanner):
    """The rows of one table: their ids, where those stand, and of each field its values by row."""

    def __init__(self, parser: Parser, fields: Fields) -> None:
        super().__init__(parser)
        self.by_keyword = {f.name: (f, 0) for f in fields if f.kind is not Kind.CHOICE}
        self.by_keyword |= {word: (f, code) for f in fields for code, word in enumerate(f.choices)}
        self.ids: list[str] = []
        self.begins: list[int] = []
        self.cells: dict[str, dict[int, Value]] = {field.name: {} for field in fields}

    def scan(self) -> None:
        """Read all rows and the bracket behind them."""
        self.expect("[")
        if self._peek() == "]":
            self.next()
            return self.finish()
        while True:
            if self._begins_cells():
                while self._cell():
                    pass
            if (end := _END.match(self.text, self.pos)) is None:
                self.next()
                self.expected("a field, ',' or ']'" if self.kind == "word" else "',' or ']'")
            self.pos = end.end()
            if end[1] == "]":
                return self.finish()

    def _peek(self) -> str:
        match = _TOKEN.match(self.text, self.pos)
        return "" if match is None else match[match.lastgroup or 0]

    def _begins_cells(self) -> bool:
        """Read a row's id, and whether a colon and cells follow it."""
        if (match := _ROW.match(self.text, self.pos)) is not None:
            self.ids.append(match[1])
            self.begins.append(match.start(1) - 1)
            self.pos = match.end()
            return bool(match[2])
        self.next()
        self.ids.append(self.string("a request's id"))
        self.begins.append(self.start)
        if self._peek() != ":":
            return False
        self.next()
        return True

    def _cell(self) -> bool:
        """Read `keyword value`; False, and nothing is read, where no keyword stands."""
        if (match := _CELL.match(self.text, self.pos)) is None:
            return False
        word, number, string, name = match.groups()
        field, code = self.by_keyword.get(word) or self._unknown(match)
        values, row = self.cells[field.name], len(self.ids) - 1
        if row in values:
            self.error_at(match.start(1), match.end(1), f"'{field.name}' is given twice")
        kind = field.kind
        if number is not None and kind is Kind.INT:
            values[row] = int(number)
        elif string is not None and kind in (Kind.WORD, Kind.TEXT):
            values[row] = string
        elif name is not None and kind is Kind.SYMBOL:
            values[row] = name
        else:
            self.pos = match.end(1)
            values[row] = code if kind is Kind.CHOICE else self.field(field)
            return True
        self.pos = match.end()
        return True

    def _unknown(self, match: re.Match[str]) -> NoReturn:
        known = ", ".join(sorted(self.by_keyword))
        self.error_at(
            match.start(1), match.end(1), f"no field '{match[1][:40]}'; there are: {known}"
        )

    def column(self, field: Field) -> Attribute:
        """The column of a field; raises at the first row that lacks a required one."""
        given, rows = self.cells[field.name], len(self.ids)
        if len(given) < rows and field.required:
            row = next(row for row in range(rows) if row not in given)
            wanted = " or ".join(field.choices) or f"'{field.name}'"
            at = self.begins[row]
            self.error_at(at, at + 1, f"row {quoted(self.ids[row])} lacks {wanted}: {field.doc}")
        make, blank = _MAKE[field.kind]
        blank = field.default if field.kind is Kind.INT else blank
        if len(given) == rows:
            return make(list(given.values()))
        return make([given.get(row, blank) for row in range(rows)])


_MAKE: dict[Kind, tuple[Callable[..., Attribute], Value]] = {
    Kind.INT: (ColumnAttr.of, 0),
    Kind.FLAG: (ColumnAttr.of, 0),
    Kind.CHOICE: (ColumnAttr.of, 0),
    Kind.WORD: (WordsAttr.from_rows, ""),
    Kind.TEXT: (NamesAttr.of, ""),
    Kind.SYMBOL: (WordsAttr.from_rows, ""),
    Kind.LIST: (ListsAttr.of, []),
}


def parse_table(parser: Parser, fields: Fields) -> Properties:
    """Parse what `print_table` prints; the op's properties."""
    if parser.lexer.input.content[parser.pos : parser.pos + 1] == "{":
        return _parse_columns(parser, fields)
    header: dict[str, str] = {}
    for field in fields:
        if field.header and parser.parse_optional_keyword(field.name):
            header[field.name] = parse_symbol(parser, "an instance")
    if parser.lexer.input.content[parser.pos : parser.pos + 1] != "[":
        first = next((f"'{f.name} @...' or " for f in fields if f.header and not header), "")
        parser.raise_error(f"expected {first}'[' before the rows")
    rows = _Rows(parser, fields)
    rows.scan()
    properties: Properties = {"ids": NamesAttr.of(rows.ids)}
    for field in fields:
        if field.name in header:
            if given := rows.cells[field.name]:
                at = rows.begins[min(given)]
                rows.error_at(at, at + 1, f"'{field.name}' stands before the rows already")
            properties[field.name] = WordsAttr.same(header[field.name], len(rows.ids))
        elif rows.cells[field.name] or (field.required and rows.ids):
            properties[field.name] = rows.column(field)
    return properties


def _parse_columns(parser: Parser, fields: Fields) -> Properties:
    """`{ids = #pd.names<...>, prompt = #pd.column<...>}`"""
    at = parser.pos
    columns = parser.parse_optional_dictionary_attr_dict()
    known = ["ids", *(field.name for field in fields)]
    if unknown := [name for name in columns if name not in known]:
        parser.raise_error(f"no column '{unknown[0][:40]}'; there are: {', '.join(known)}", at)
    if not isinstance(columns.get("ids"), NamesAttr):
        parser.raise_error("the columns need ids, a #pd.names<...> with a name a row", at)
    return columns
