"""Rows of a table as columns that never change, made anew at the cost of what changed."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

ColumnsT = TypeVar("ColumnsT")
Rows = npt.NDArray[np.int64]


class Roster(Generic[ColumnsT]):
    """Some rows of a table, in the order of their sequence numbers, as columns of a kind.

    A view that was given away stays as it is. The next one shares the columns in which nothing has
    changed, and where rows came, left or changed, the others are copied and only those rows read
    again: ten thousand rows that stay as they are cost a copy of memory, and nothing a row.
    """

    def __init__(
        self,
        kind: Callable[..., ColumnsT],
        values: Callable[[Rows, Sequence[str]], dict[str, Any]],
        names: Sequence[str],
        changing: Sequence[str],
    ) -> None:
        """kind: of the views, with the columns `names`, `sequence` among them. values: these
        columns of some rows of the table, now. changing: columns that can change while a row stays.
        """
        self._kind, self._values = kind, values
        self._names, self._changing = tuple(names), tuple(changing)
        self._entered: dict[int, int] = {}
        self._left: list[int] = []
        self._columns: dict[str, Any] = values(np.zeros(0, np.int64), self._names)
        self.rows: Rows = np.zeros(0, np.int64)
        self._view: ColumnsT | None = None

    def __len__(self) -> int:
        return len(self.rows) + len(self._entered) - len(self._left)

    def enter(self, sequence: int, row: int) -> None:
        """The row of the table is one of this roster now."""
        self._entered[sequence] = row

    def leave(self, sequence: int) -> None:
        """The row that entered under this number is one no more."""
        if self._entered.pop(sequence, None) is None:
            self._left.append(sequence)

    def view(self, changed: Rows, sequences: Rows) -> ColumnsT:
        """The columns now; the same object as before where nothing has changed.

        changed: rows of the table that changed since the last view, and their sequence numbers;
        those that are not of this roster do not matter.
        """
        if self._entered or self._left or len(changed):
            self._view = None
        if self._view is None:
            if self._entered or self._left:
                self._move()
            if len(changed):
                self._update(changed, sequences)
            for column in self._columns.values():
                column.flags.writeable = False
            self._view = self._kind(**self._columns)
        return self._view

    def _move(self) -> None:
        """Take out the rows that left, put in those that came."""
        columns = {**self._columns, "": self.rows}
        gone = np.searchsorted(columns["sequence"], sorted(self._left)).tolist()
        ends = zip([0, *(place + 1 for place in gone)], [*gone, len(self.rows)], strict=True)
        kept = [slice(begin, end) for begin, end in ends if begin < end]
        last = columns["sequence"][kept[-1].stop - 1] if kept else 0
        new: dict[str, Any] = {}
        if in_order := sorted(self._entered):
            rows = np.array([self._entered[sequence] for sequence in in_order], np.int64)
            new = {**self._values(rows, self._names), "": rows}
        for name, column in columns.items():
            parts = [column[part] for part in kept] + ([new[name]] if new else [])
            columns[name] = np.concatenate(parts) if parts else column[:0].copy()
        if in_order and in_order[0] < last:
            order = columns["sequence"].argsort()
            columns = {name: column.take(order) for name, column in columns.items()}
        self.rows = columns.pop("")
        self._columns = columns
        self._entered.clear()
        self._left.clear()

    def _update(self, rows: Rows, sequences: Rows) -> None:
        """Read the changed rows again; a column in which they are as before stays the same."""
        known = self._columns["sequence"]
        if not len(known):
            return
        places = np.minimum(np.searchsorted(known, sequences), len(known) - 1)
        here = known[places] == sequences
        places, rows = places[here], rows[here]
        for name, new in self._values(rows, self._changing).items():
            column = self._columns[name]
            if np.count_nonzero(column[places] != new):
                column = column.copy()
                column[places] = new
                self._columns[name] = column
