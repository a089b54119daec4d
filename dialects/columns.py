"""Columns: the attributes in which a wide op keeps a table, a value a request.

`#pd.column<1, 2, 3>` holds int64, `#pd.names<"a", "b">` strings, `#pd.words<"p0", "d0" : 0, 1, 1>`
few strings often (a code a row, like Arrow's dictionary encoding), `#pd.lists<[0, 64], []>` a list
of int64 a row. Long columns print as hexadecimal bytes. Making one costs about a microsecond
whatever its length, so passes make new columns freely and never change one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from xdsl.ir import Data
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer

Ints = npt.NDArray[np.int64]

READABLE_VALUES = 1024
"""Columns of more values print as hexadecimal bytes."""


class Frozen:
    """A read-only int64 array that can be compared and hashed, as an attribute's payload must."""

    __slots__ = ("array",)

    def __init__(self, array: Ints) -> None:
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __repr__(self) -> str:
        return f"Frozen({self.array.tolist()})"


def frozen(values: npt.ArrayLike) -> Frozen:
    """`values` as a payload; an int64 array is not copied and must not be written any more."""
    return Frozen(np.asarray(values, np.int64))


@irdl_attr_definition
class ColumnAttr(Data[Frozen]):
    """An int64 a row: `#pd.column<1, 2, 3>`."""

    name = "pd.column"

    @staticmethod
    def of(values: npt.ArrayLike) -> ColumnAttr:
        """The column of these values: anything that numpy makes an int64 array of."""
        return ColumnAttr(frozen(values))

    @property
    def array(self) -> Ints:
        return self.data.array

    def __len__(self) -> int:
        return len(self.data.array)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Frozen:
        with parser.in_angle_brackets():
            return Frozen(_parse_ints(parser))

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<{_ints_text(self.array)}>")


@irdl_attr_definition
class NamesAttr(Data[tuple[str, ...]]):
    """A string a row: `#pd.names<"chat-1", "chat-2">`."""

    name = "pd.names"

    @staticmethod
    def of(names: Iterable[str]) -> NamesAttr:
        return NamesAttr(tuple(names))

    def __len__(self) -> int:
        return len(self.data)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[str, ...]:
        names = parser.parse_comma_separated_list(
            parser.Delimiter.ANGLE, lambda: _parse_string(parser), " in names"
        )
        return tuple(names)

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<{', '.join(map(quoted, self.data))}>")


@irdl_attr_definition
class WordsAttr(Data[tuple[tuple[str, ...], Frozen]]):
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

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[tuple[str, ...], Frozen]:
        with parser.in_angle_brackets():
            words: list[str] = []
            while (word := _parse_optional_string(parser)) is not None:
                words.append(word)
                if parser.parse_optional_punctuation(",") is None:
                    break
            parser.parse_punctuation(":", " between words and codes")
            at = parser.pos
            codes = _parse_ints(parser)
            if codes.size and not 0 <= codes.min() <= codes.max() < len(words):
                parser.raise_error(f"codes must be in [0, {len(words)}), the number of words", at)
            return tuple(words), Frozen(codes)

    def print_parameter(self, printer: Printer) -> None:
        words = ", ".join(map(quoted, self.words))
        printer.print_string(f"<{words} : {_ints_text(self.codes)}>".replace("< :", "<:"))


@irdl_attr_definition
class ListsAttr(Data[tuple[Frozen, Frozen]]):
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

    def rows(self) -> list[list[int]]:
        values, offsets = self.values.tolist(), self.offsets.tolist()
        return [values[begin:end] for begin, end in itertools.pairwise(offsets)]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> tuple[Frozen, Frozen]:
        def row() -> list[int]:
            return parser.parse_comma_separated_list(
                parser.Delimiter.SQUARE, lambda: _parse_int64(parser), " in a list"
            )

        return ListsAttr.of(
            parser.parse_comma_separated_list(parser.Delimiter.ANGLE, row, " in lists")
        ).data

    def print_parameter(self, printer: Printer) -> None:
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
    if len(array) > READABLE_VALUES:
        return f'"0x{array.astype("<i8").tobytes().hex().upper()}"'
    return ", ".join(map(str, array.tolist()))


def _parse_optional_string(parser: AttrParser) -> str | None:
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


def _parse_string(parser: AttrParser) -> str:
    at = parser.pos
    if (text := _parse_optional_string(parser)) is None:
        parser.raise_error("expected a string in quotes", at)
    return text


def _parse_ints(parser: AttrParser) -> Ints:
    at = parser.pos
    if (text := parser.parse_optional_str_literal()) is not None:
        try:
            if not text.startswith("0x"):
                raise ValueError
            return np.frombuffer(bytes.fromhex(text[2:]), "<i8").astype(np.int64, copy=False)
        except ValueError:
            parser.raise_error('expected "0x" and the bytes of int64 values in hexadecimal', at)
    values: list[int] = []
    while (value := _parse_optional_int64(parser)) is not None:
        values.append(value)
        if parser.parse_optional_punctuation(",") is None:
            break
    return np.array(values, np.int64)


def _parse_optional_int64(parser: AttrParser) -> int | None:
    at = parser.pos
    value = parser.parse_optional_integer(allow_boolean=False)
    if value is not None and not -(2**63) <= value < 2**63:
        parser.raise_error(f"{value} does not fit 64 bits", at)
    return value


def _parse_int64(parser: AttrParser) -> int:
    at = parser.pos
    if (value := _parse_optional_int64(parser)) is None:
        parser.raise_error("expected an integer", at)
    return value
