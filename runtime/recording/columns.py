"""Tables as changed rows: what differs from the round before, and back again, bit for bit.

Columns are found by the fields of the dataclasses in `runtime/state.py`, so that one that is added
there is recorded without a word here.
"""

import dataclasses
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from sagec.runtime.recording.frames import RecordingError
from sagec.runtime.state import Bools, Decision, Instances, Ints, Running, State, Strings, Waiting

Packed = int | list[int] | bytes
"""Integers: one that all are; a few; or the letter of their type, which is the smallest that holds
them, and their little-endian bytes."""

LIST_ROWS = 96
"""Up to so many integers are a list, which is faster to write, and as short."""

FEW_ROWS = 8
"""Of so few it costs more to find out whether all are one than to write them."""

_TYPES: dict[str, np.dtype[Any]] = {
    "b": np.dtype("<i1"),
    "h": np.dtype("<i2"),
    "i": np.dtype("<i4"),
    "q": np.dtype("<i8"),
}
_BOUNDS = [(1 << 7, "b"), (1 << 15, "h"), (1 << 31, "i"), (1 << 63, "q")]


def pack(values: npt.NDArray[Any]) -> Packed:
    """Integers or truth values as compact as is cheap.

    >>> pack(np.full(9, 7)), pack(np.array([1, 2])), pack(np.arange(200))[:3]
    (7, [1, 2], b'h\\x00\\x00')
    """
    count = len(values)
    if count <= FEW_ROWS:
        few: list[int] = values.tolist()
        return few
    values = values.view(np.int8) if values.dtype == np.bool_ else values
    content = values.tobytes()
    if content == content[: values.itemsize] * count:
        return int(values[0])
    if count <= LIST_ROWS:
        listed: list[int] = values.tolist()
        return listed
    least, most = int(values.min()), int(values.max())
    letter = next(letter for bound, letter in _BOUNDS if -bound <= least and most < bound)
    packed: bytes = letter.encode() + values.astype(_TYPES[letter]).tobytes()
    return packed


def unpack(packed: Packed, count: int, dtype: Any = np.int64) -> npt.NDArray[Any]:
    """The integers again. Raises RecordingError where they are not as many, or no integers."""
    if isinstance(packed, int):
        return np.full(count, packed, dtype)
    if isinstance(packed, list):
        values = np.array(packed, dtype)
    elif (letter := chr(packed[0])) in _TYPES and not (len(packed) - 1) % _TYPES[letter].itemsize:
        values = np.frombuffer(packed, _TYPES[letter], offset=1).astype(dtype)
    else:
        raise RecordingError(f"integers of the type {letter!r} in {len(packed) - 1} bytes")
    if len(values) != count:
        raise RecordingError(f"{len(values)} integers for {count} rows")
    return values


# Kinds of columns.

INTS, CODES, FLAGS, TEXT, TABLE, CELLS, VALUE = "i8", "i1", "b1", "text", "table", "cells", "value"

DTYPES: dict[str, Any] = {INTS: np.int64, CODES: np.int8, FLAGS: np.bool_}
_KINDS: list[tuple[Any, str]] = [
    (Ints, INTS),
    (npt.NDArray[np.int8], CODES),
    (Bools, FLAGS),
    (Strings, TEXT),
]


def kinds_of(table: type) -> dict[str, str]:
    """The kind of each field of a dataclass, by its annotation."""
    hints = get_type_hints(table)
    return {field.name: _kind(hints[field.name], table) for field in dataclasses.fields(table)}


def _kind(hint: Any, table: type) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if dataclasses.is_dataclass(hint):
        return TABLE
    kind = next((kind for array, kind in _KINDS if hint == array), VALUE)
    return CELLS if kind == INTS and table is State else kind


TABLES: dict[str, type[Any]] = {
    "state": State,
    "waiting": Waiting,
    "running": Running,
    "instances": Instances,
    "decision": Decision,
}


def all_kinds() -> dict[str, dict[str, str]]:
    """What a header says of columns: table, column, kind."""
    return {name: kinds_of(table) for name, table in TABLES.items()}


# Strings.


class Words:
    """Numbers of strings, in the order in which they came; fresh: those to be written yet."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.fresh: list[str] = []

    def take_fresh(self) -> tuple[str, ...]:
        """The strings that are new since the last call."""
        fresh, self.fresh = tuple(self.fresh), []
        return fresh

    def pack(self, strings: Strings) -> Packed:
        """The number of each string; new ones get theirs."""
        numbers = self.numbers(strings.tolist())
        return numbers if len(numbers) <= FEW_ROWS else pack(np.array(numbers, np.int64))

    def numbers(self, strings: Sequence[str]) -> list[int]:
        """The same as a list."""
        known = self._numbers
        try:
            return [known[string] for string in strings]
        except KeyError:
            for string in strings:
                if string not in known:
                    known[string] = len(known)
                    self.fresh.append(str(string))
            return [known[string] for string in strings]


# Tables.

STEADY = frozenset(
    ("ids", "arrival_us", "priority", "ttft_us", "tpot_us", "model", "tenant", "session", "adapter")
)
"""What a request is called and was promised: it stays while the loop serves the request, whose
`sequence` names it, and is not compared again where rows move."""

_NO_ROWS: Ints = np.zeros(0, np.int64)

Rows = Ints | slice
"""Places of rows in a column, each of which a column is read at faster than by all numbers."""


@dataclasses.dataclass(frozen=True)
class _Moved:
    """Where rows went. old, new: places of the rows that both tables have. removed: of the other
    rows of the old table; added: of the other rows of the new one."""

    old: Rows
    new: Rows
    removed: Ints
    added: Ints


_IN_PLACE = _Moved(slice(0, None), slice(0, None), _NO_ROWS, _NO_ROWS)


class TableWriter:
    """Says what of a table is different from the one before.

    Rows are the same where their `sequence` is, or their place in tables without; a table whose
    sequence does not ascend is written whole.
    """

    def __init__(self, kinds: Mapping[str, str], words: Words) -> None:
        self._words = words
        names = tuple(kinds)
        self._columns_of = operator.attrgetter(*names)
        self._is_text = tuple(kind == TEXT for kind in kinds.values())
        self._key = names.index("sequence") if "sequence" in kinds else None
        self._texts = tuple(n for n, text in enumerate(self._is_text) if text)
        self._all = tuple(range(len(names)))
        self._unsteady = tuple(n for n in self._all if names[n] not in {*STEADY, "sequence"})
        self._before: tuple[npt.NDArray[Any], ...] = ()
        self._ascends = False

    def change(self, table: Any) -> list[Any]:
        """[rows, removed, added, values of the added by column, changes]; see the format's page."""
        columns = self._columns_of(table)
        moved = self._moved(columns)
        if moved is None:
            self._before = columns
            return [len(table), True, True, self._values(columns, slice(0, None)), []]
        changes = self._changes(columns, moved)
        self._before = columns
        if moved is _IN_PLACE:
            return [len(table), None, None, [], changes]
        values = self._values(columns, _places(moved.added)) if moved.added.size else []
        return [len(table), _counted(moved.removed), _counted(moved.added), values, changes]

    def _values(self, columns: Sequence[npt.NDArray[Any]], at: Rows) -> list[Packed]:
        """What stands in these rows, column by column."""
        parts = [column[at] for column in columns]
        if len(parts[0]) > FEW_ROWS:
            packs = {True: self._words.pack, False: pack}
            return [packs[text](p) for text, p in zip(self._is_text, parts, strict=True)]
        values: list[Packed] = [part.tolist() for part in parts]
        for number in self._texts:
            values[number] = self._words.numbers(values[number])  # type: ignore[arg-type]
        return values

    def _moved(self, columns: Sequence[npt.NDArray[Any]]) -> _Moved | None:
        """Where the rows of the table before went; None where nobody can tell."""
        if self._key is None:
            in_place = self._before and len(columns[0]) == len(self._before[0])
            return _IN_PLACE if in_place else None
        new = columns[self._key]
        old = self._before[self._key] if self._before else _NO_ROWS
        if self._before and (old is new or old.tobytes() == new.tobytes()):
            return _IN_PLACE
        self._ascends, old_ascends = new.size > 0 and _ascends(new), self._ascends
        if not (old_ascends and self._ascends):
            return None
        at = new.searchsorted(old)
        found = new.take(at, mode="clip") == old
        kept, new_kept = found.nonzero()[0], at[found]
        others = np.ones(len(new), np.bool_)
        others[new_kept] = False
        return _Moved(_places(kept), _places(new_kept), (~found).nonzero()[0], others.nonzero()[0])

    def _changes(self, columns: Sequence[npt.NDArray[Any]], moved: _Moved) -> list[Any]:
        """[column, rows of the new table, differences or words] of columns that differ."""
        changes: list[Any] = []
        last_rows = _NO_ROWS
        for number in self._all if moved is _IN_PLACE else self._unsteady:
            before, column = self._before[number], columns[number]
            if before is column:
                continue
            was, now = before[moved.old], column[moved.new]
            if was.tobytes() == now.tobytes():
                continue
            if self._is_text[number]:
                rows = np.array([a != b for a, b in zip(was, now, strict=True)]).nonzero()[0]
                values = self._words.pack(now[rows])
            else:
                difference = now ^ was if now.dtype == np.bool_ else now - was
                rows = difference.nonzero()[0]
                values = pack(difference[rows])
            if rows.size:
                same = len(rows) == len(last_rows) and rows.tobytes() == last_rows.tobytes()
                last_rows = rows
                at = rows + moved.new.start if isinstance(moved.new, slice) else moved.new[rows]
                changes.append([number, True if same else pack(at), len(rows), values])
        return changes


def _places(rows: Ints) -> Rows:
    """The same rows, as a slice where they follow one another."""
    if rows.size and rows[-1] - rows[0] == rows.size - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _ascends(column: Ints) -> bool:
    return not np.count_nonzero(column[1:] <= column[:-1])


def _counted(rows: Ints) -> Any:
    """[count, packed] of row numbers, or None for no rows."""
    return [len(rows), pack(rows)] if rows.size else None


class TableReader:
    """Makes tables again from what `TableWriter.change` said."""

    def __init__(self, table: type[Any], kinds: Mapping[str, str]) -> None:
        """kinds: the columns of the file, in its order; the table's own others get defaults."""
        self._table, self._kinds = table, kinds
        self._wanted = kinds_of(table).keys() & kinds.keys()
        self._missing = kinds_of(table).keys() - kinds.keys()
        self._columns: dict[str, npt.NDArray[Any]] = {}

    def table(self, change: Sequence[Any], words: Sequence[str]) -> Any:
        """The table after the change. Raises RecordingError where it does not fit."""
        length, removed, added, values, changes = change
        if removed is True:
            columns = {
                name: _column(packed, length, kind, words)
                for (name, kind), packed in zip(
                    self._kinds.items(), values or [0] * len(self._kinds), strict=True
                )
            }
        elif removed is None and added is None:
            columns = dict(self._columns)
        else:
            columns = self._moved(length, removed, added, values, words)
        names = tuple(self._kinds)
        rows = _NO_ROWS
        for number, packed_rows, count, packed in changes:
            name = names[number]
            rows = rows if packed_rows is True else unpack(packed_rows, count)
            columns[name] = _changed(columns[name], rows, packed, self._kinds[name], words)
        for column in columns.values():
            column.flags.writeable = False
        self._columns = columns
        known = {name: columns[name] for name in self._wanted}
        if self._missing:
            defaults = self._table.of([""] * length)
            known |= {name: getattr(defaults, name) for name in self._missing}
        return self._table(**known)

    def _moved(
        self, length: int, removed: Any, added: Any, values: Sequence[Packed], words: Sequence[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """The columns after rows left and others came."""
        gone = _NO_ROWS if removed is None else unpack(removed[1], removed[0])
        new = _NO_ROWS if added is None else unpack(added[1], added[0])
        stays = np.ones(length, np.bool_)
        stays[new] = False
        columns = {}
        for number, (name, kind) in enumerate(self._kinds.items()):
            column = np.empty(length, DTYPES.get(kind, np.object_))
            column[stays] = np.delete(self._columns[name], gone)
            if new.size:
                column[new] = _column(values[number], len(new), kind, words)
            columns[name] = column
        return columns


def _column(packed: Packed, count: int, kind: str, words: Sequence[str]) -> npt.NDArray[Any]:
    if kind == TEXT:
        return text_column(packed, count, words)
    return unpack(packed, count, DTYPES[kind])


def text_column(packed: Packed, count: int, words: Sequence[str]) -> Strings:
    """The strings that these numbers of words stand for."""
    column = np.empty(count, np.object_)
    column[:] = [words[number] for number in unpack(packed, count).tolist()]
    return column


def _changed(
    column: npt.NDArray[Any], rows: Ints, packed: Packed, kind: str, words: Sequence[str]
) -> npt.NDArray[Any]:
    column = column.copy()
    if kind == TEXT:
        column[rows] = _column(packed, len(rows), kind, words)
    elif kind == FLAGS:
        column[rows] ^= unpack(packed, len(rows)) != 0
    else:
        column[rows] += unpack(packed, len(rows), DTYPES[kind])
    return column
