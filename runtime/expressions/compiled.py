"""Keys and conditions put together once, to be computed every round."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sagec.runtime.expressions.closures import closure_of
from sagec.runtime.expressions.rules import Key
from sagec.runtime.expressions.tree import Expression
from sagec.runtime.expressions.values import Column
from sagec.runtime.expressions.wording import Wording
from sagec.runtime.state import Bools, Ints


class Ranking:
    """Ranks rows by keys."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self._computed = [(closure_of(key.expression), key.largest) for key in keys]

    def columns(self, values: Any, length: int) -> list[Column]:
        """A column a key, whose smallest value comes first."""
        return [
            _descending(column) if largest else column
            for column, largest in (
                (_as_column(closure(values), length), largest)
                for closure, largest in self._computed
            )
        ]

    def order(self, values: Any, length: int) -> Ints:
        """Row numbers, the first first; equals stay as they were."""
        columns = self.columns(values, length)
        if len(columns) == 1:
            return np.argsort(columns[0], kind="stable")
        return np.lexsort(columns[::-1])


class Condition:
    """Holds for some rows."""

    def __init__(self, expression: Expression) -> None:
        self._expression = expression
        self._closure = closure_of(expression)

    def holds(self, values: Any, length: int) -> Bools:
        """A row each."""
        return _as_column(self._closure(values), length).astype(bool)

    def told(self, values: Any, rows: Sequence[int], holds: bool) -> list[str]:
        """Why it holds for each of these rows, or does not: "kv_free 3% is not > 5%"."""
        wording = Wording(values)
        return [wording.told(self._expression, row, holds) for row in rows]


def _as_column(values: Any, length: int) -> Column:
    column = np.asarray(values)
    return column if column.ndim else np.broadcast_to(column, length)


def _descending(column: Column) -> Column:
    return ~column if column.dtype == np.bool_ else -column
