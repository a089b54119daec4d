"""Columns: the attributes in which a wide op keeps a table, a value a request.

`#pd.column<1, 2, 3>` holds int64, `#pd.names<"a", "b">` strings, `#pd.words<"p0", "d0" : 0, 1, 1>`
few strings often (a code a row, like Arrow's dictionary encoding), `#pd.lists<[0, 64], []>` a list
of int64 a row. More than READABLE_VALUES integers print as one string: "0x" and the bytes of
little-endian int64, in hexadecimal. Making a column costs about a microsecond whatever its length,
so passes make new ones freely and never change one; numpy refuses to write to them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from xdsl.ir import Data
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer

Ints = npt.NDArray[np.int64]

READABLE_VALUES = 1024
"""Columns of more values print as hexadecimal bytes."""

SPACE = r"(?:\s|//[^\n]*+)*+"
"""Regular expression of white space and comments; it never gives back what it has taken."""


class Frozen:
    """A read-only int64 array that can be compared and hashed, as an attribute's payload must."""

    __slots__ = ("array",)

    def __init__(self, array: Ints) -> None:
        array.setflags(write=False)
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        return f"Frozen({self.array.tolist()})"


def frozen(values: npt.ArrayLike) -> Frozen:
    """`values` as a payload; an int64 array is not copied, and not writable any more.

    Raises TypeError for numbers that are not whole, ValueError for tables of more dimensions than
    one, OverflowError for integers of more than 64 bits.
    """
    array = np.asarray(values)
    if array.dtype != np.int64:
        if array.size and array.dtype.kind == "f":
            raise TypeError(f"a column holds integers, not {array.dtype}")
        array = np.asarray(values, np.int64)
    if array.ndim != 1:
        raise ValueError(f"a column has one dimension, not {array.ndim}")
    return Frozen(array)


PayloadT = TypeVar("PayloadT")


class _Payload(Data[PayloadT]):
    """An attribute whose payload is all there is: nothing to verify, which takes half the time."""

    def __init__(self, data: PayloadT) -> None:
        object.__setattr__(self, "data", data)


@irdl_attr_definition
class ColumnAttr(_Payload[Frozen]):
    """An int64 a row: `#pd.column<1, 2, 3>`."""

    name = "pd.column"

    @staticmethod
    def of(values: npt.ArrayLike) -> ColumnAttr:
        """The column of these values: anything that numpy makes an int64 array of."""
        return ColumnAttr(frozen(values))

    @property
    def array(self) -> Ints:
        return self.data.array

    def take(self, rows: Ints) -> ColumnAttr:
        """The column of these rows, in this order."""
        return ColumnAttr(Frozen(self.array[rows]))

    def __len__(self) -> int:
        return len(self.data.array)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Frozen:
        with parser.in_angle_brackets():
            return Frozen(_parse_ints(parser))

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<{_ints_text(self.array)}>")


@irdl_attr_definition
class NamesAttr(_Payload[tuple[str, ...]]):
    """A string a row: `#pd.names<"chat-1", "chat-2">`."""

    name = "pd.names"

    @staticmethod
    def of(names: Iterable[str]) -> NamesAttr:
        return NamesAttr(tuple(names))

    def take(self, rows: Ints) -> NamesAttr:
        """The column of these rows, in this order."""
        names = self.data
        return NamesAttr(tuple([names[row] for row in rows.tolist()]))

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[str, ...]:
        with parser.in_angle_brackets():
            return tuple(_parse_strings(parser))

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<{', '.join(map(quoted, self.data))}>")


@irdl_attr_definition
class WordsAttr(_Payload[tuple[tuple[str, ...], Frozen]]):
    """A string a row, where few differ: `#pd.words<"p0", "d0" : 0, 1, 1>` is p0, d0, d0."""

    name = "pd.words"

    @staticmethod
    def of(words: Sequence[str], codes: npt.ArrayLike) -> WordsAttr:
        """The column whose row i is `words[codes[i]]`."""
        return WordsAttr((tuple(words), frozen(codes)))

    @staticmethod
    def from_rows(rows: Iterable[str]) -> WordsAttr:
        """The column of these strings; words are numbered as they first appear."""
        words: dict[str, int] = {}
        codes = [words.setdefault(row, len(words)) for row in rows]
        return WordsAttr.of(tuple(words), codes)

    @staticmethod
    def same(word: str, rows: int) -> WordsAttr:
        """A column of `rows` times the same word."""
        return WordsAttr.of((word,), np.zeros(rows, np.int64))

    @property
    def words(self) -> tuple[str, ...]:
        return self.data[0]

    @property
    def codes(self) -> Ints:
        return self.data[1].array

    def take(self, rows: Ints) -> WordsAttr:
        """The column of these rows, in this order."""
        return WordsAttr((self.data[0], Frozen(self.codes[rows])))

    def rows(self) -> list[str]:
        """The string of every row."""
        words = self.words
        return [words[code] for code in self.codes.tolist()]

    def only(self) -> str | None:
        """The string that all rows have; None where they differ or there are none."""
        codes = self.codes
        if not len(codes) or (len(self.words) > 1 and (codes != codes[0]).any()):
            return None
        return self.words[int(codes[0])]

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[tuple[str, ...], Frozen]:
        with parser.in_angle_brackets():
            words = _parse_strings(parser)
            parser.parse_punctuation(":", " between words and codes")
            at = parser.pos
            codes = _parse_ints(parser)
            if codes.size and not 0 <= codes.min() <= codes.max() < len(words):
                parser.raise_error(
                    f"a code of {codes.min()} to {codes.max()}; there are {len(words)} words, "
                    f"codes are in [0, {len(words)})",
                    at,
                )
            return tuple(words), Frozen(codes)

    def print_parameter(self, printer: Printer) -> None:
        words = ", ".join(map(quoted, self.words))
        between = " : " if words else ": "
        printer.print_string(f"<{words}{between}{_ints_text(self.codes)}>")


@irdl_attr_definition
class ListsAttr(_Payload[tuple[Frozen, Frozen]]):
    """A list of int64 a row: `#pd.lists<[0, 64, 96], []>`; kept as values and their offsets."""

    name = "pd.lists"

    @staticmethod
    def of(lists: Iterable[Sequence[int]]) -> ListsAttr:
        rows = [list(row) for row in lists]
        offsets = np.cumsum([0, *map(len, rows)])
        return ListsAttr.from_offsets(offsets, [value for row in rows for value in row])

    @staticmethod
    def from_offsets(offsets: npt.ArrayLike, values: npt.ArrayLike) -> ListsAttr:
        """Row i is `values[offsets[i]:offsets[i + 1]]`."""
        return ListsAttr((frozen(offsets), frozen(values)))

    @property
    def offsets(self) -> Ints:
        return self.data[0].array

    @property
    def values(self) -> Ints:
        return self.data[1].array

    def take(self, rows: Ints) -> ListsAttr:
        """The column of these rows, in this order."""
        begins = self.offsets[rows]
        lengths = self.offsets[rows + 1] - begins
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        at = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)
        return ListsAttr((Frozen(offsets), Frozen(self.values[at])))

    def rows(self) -> list[list[int]]:
        values, offsets = self.values.tolist(), self.offsets.tolist()
        return [values[begin:end] for begin, end in itertools.pairwise(offsets)]

    def is_sound(self) -> bool:
        """Whether the offsets ascend from 0 to the number of values."""
        return _are_offsets(self.offsets, len(self.values))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[Frozen, Frozen]:
        with parser.in_angle_brackets():
            if (offsets := _parse_optional_hex(parser)) is None:
                return ListsAttr.of(parse_lists(parser)).data
            at = parser.pos
            parser.parse_punctuation(",", " between offsets and values")
            values = _parse_ints(parser)
            if not _are_offsets(offsets, len(values)):
                parser.raise_error(f"offsets ascend from 0 to {len(values)}, the values", at)
            return Frozen(offsets), Frozen(values)

    def print_parameter(self, printer: Printer) -> None:
        if len(self.values) + len(self) > READABLE_VALUES:
            printer.print_string(f"<{_hex_text(self.offsets)}, {_hex_text(self.values)}>")
        else:
            printer.print_string(f"<{', '.join(map(str, self.rows()))}>")


COLUMN_ATTRS = (ColumnAttr, NamesAttr, WordsAttr, ListsAttr)


def quoted(string: str) -> str:
    """`string` as a literal of MLIR: anything but printable ASCII as a backslash and its byte."""
    if string.isascii() and string.isprintable() and '"' not in string and "\\" not in string:
        return f'"{string}"'
    return '"' + "".join(_escaped(byte) for byte in string.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte == ord("\\"):
        return "\\\\"
    return chr(byte) if 0x20 <= byte <= 0x7E and byte != ord('"') else f"\\{byte:02X}"


def _ints_text(array: Ints) -> str:
    return _hex_text(array) if len(array) > READABLE_VALUES else ", ".join(map(str, array.tolist()))


def _hex_text(array: Ints) -> str:
    return f'"0x{array.astype("<i8").tobytes().hex().upper()}"'


def _are_offsets(offsets: Ints, end: int) -> bool:
    """Whether they cut a column of `end` values into rows."""
    ascends = len(offsets) > 0 and bool((np.diff(offsets) >= 0).all())
    return ascends and offsets[0] == 0 and offsets[-1] == end


def parse_optional_string(parser: AttrParser) -> str | None:
    """A string literal; xDSL calls those with escaped bytes above 127 bytes literals."""
    if (text := parser.parse_optional_str_literal()) is not None:
        return text
    at = parser.pos
    if (content := parser.parse_optional_bytes_literal()) is None:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        parser.raise_error("the string is not UTF-8", at)


def parse_string(parser: AttrParser, what: str = "a string") -> str:
    """A string literal with any UTF-8 in it; `what` it is, for the error."""
    at = parser.pos
    if (text := parse_optional_string(parser)) is None:
        parser.raise_error(f"expected {what} in quotes", at)
    return text


_PLAIN_STRING = re.compile(rf'{SPACE}"([^"\\\n\v\f]*)"{SPACE},', re.ASCII)


def _parse_strings(parser: AttrParser) -> list[str]:
    """Strings with commas between them, or none."""
    strings: list[str] = []
    while True:
        strings += _plain_strings(parser)
        at = parser.pos
        if (string := parse_optional_string(parser)) is None:
            if strings:
                parser.raise_error("expected a string in quotes", at)
            return strings
        strings.append(string)
        if parser.parse_optional_punctuation(",") is None:
            return strings


def _plain_strings(parser: AttrParser) -> list[str]:
    """Strings without escapes, with a comma behind each; 20 times faster than xDSL's lexer."""
    strings, at, content = [], parser.pos, str(parser.lexer.input.content)
    while (plain := _PLAIN_STRING.match(content, at)) is not None:
        strings.append(plain[1])
        at = plain.end()
    if strings:
        parser._resume_from(at)
    return strings


def parse_lists(parser: AttrParser) -> list[list[int]]:
    """`[0, 64], []`, or nothing."""

    def row() -> list[int]:
        return parser.parse_comma_separated_list(
            parser.Delimiter.SQUARE, lambda: parse_int64(parser), " in a list"
        )

    def optional_row() -> list[int] | None:
        return parser.parse_optional_comma_separated_list(
            parser.Delimiter.SQUARE, lambda: parse_int64(parser), " in a list"
        )

    return parser.parse_optional_undelimited_comma_separated_list(optional_row, row) or []


def _parse_ints(parser: AttrParser) -> Ints:
    if (array := _parse_optional_hex(parser)) is not None:
        return array
    values = parser.parse_optional_undelimited_comma_separated_list(
        lambda: _parse_optional_int64(parser), lambda: parse_int64(parser)
    )
    return np.array(values or [], np.int64)


def _parse_optional_hex(parser: AttrParser) -> Ints | None:
    at = parser.pos
    if (text := parser.parse_optional_str_literal()) is None:
        return None
    try:
        if not text.startswith("0x"):
            raise ValueError
        return np.frombuffer(bytes.fromhex(text[2:]), "<i8").astype(np.int64, copy=False)
    except ValueError:
        parser.raise_error('expected "0x" and the bytes of int64 values in hexadecimal', at)


def _parse_optional_int64(parser: AttrParser) -> int | None:
    at = parser.pos
    value = parser.parse_optional_integer(allow_boolean=False)
    if value is not None and not -(2**63) <= value < 2**63:
        parser.raise_error(f"{shortened(value)} does not fit 64 bits", at)
    return value


def parse_int64(parser: AttrParser) -> int:
    """An integer of 64 bits."""
    at = parser.pos
    if (value := _parse_optional_int64(parser)) is None:
        parser.raise_error("expected an integer", at)
    return value


def shortened(value: int) -> str:
    """A number as a message shows it; hundreds of digits help nobody."""
    return str(value) if abs(value) < 10**40 else f"a number of {value.bit_length()} bits"
