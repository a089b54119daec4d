"""The digest of a round's IR, from the columns that the IR would have.

A plan names the IR that it was made of: see `lowering.execution_plan.digest_of`, whose bytes these
are. An op is its name and its columns, in the order of their names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from sagec.runtime.direct.columns import Coded, Ints, Listed

Column = tuple[bytes | memoryview, ...]
"""What a column adds to the bytes of its op."""


def of_numbers(column: Ints) -> Column:
    """An int64 a row."""
    return (column.data,)


def of_names(names: Sequence[str]) -> Column:
    """A string a row."""
    return ("\0".join(names).encode(),)


def of_words(column: Coded) -> Column:
    """A string a row, where few differ."""
    return ("\0".join(column.words).encode(), column.codes.data)


def of_lists(column: Listed) -> Column:
    """A list of int64 a row."""
    return (column.offsets.data, column.values.data)


def of_scalar(value: int) -> Column:
    """A number of the op itself."""
    return (str(value).encode(),)


def of_op(name: str, columns: Mapping[str, Column]) -> bytes:
    """An op with these columns."""
    parts: list[bytes | memoryview] = [name.encode()]
    for column in sorted(columns):
        parts.append(column.encode())
        parts += columns[column]
    return b"\0".join(parts)


def of_ops(ops: list[bytes]) -> str:
    """The digest of all ops: their order says nothing."""
    return hashlib.sha256(b"\0".join(sorted(ops))).hexdigest()[:16]
