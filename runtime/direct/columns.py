"""Columns as the passes and the direct planner share them: arrays, and words by code."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]


class Coded(Protocol):
    """A string a row: row i is `words[codes[i]]`."""

    @property
    def words(self) -> tuple[str, ...]: ...

    @property
    def codes(self) -> Ints: ...


class Listed(Protocol):
    """A list of integers a row: row i is `values[offsets[i]:offsets[i + 1]]`."""

    @property
    def offsets(self) -> Ints: ...

    @property
    def values(self) -> Ints: ...


class Words(NamedTuple):
    """A `Coded` column that is nothing more."""

    words: tuple[str, ...]
    codes: Ints


class Lists(NamedTuple):
    """A `Listed` column that is nothing more."""

    offsets: Ints
    values: Ints


@functools.lru_cache(256)
def zeros(rows: int) -> Ints:
    """A column of nothing, the same array for every table of so many rows."""
    return same(0, rows)


@functools.lru_cache(64)
def same(value: int, rows: int) -> Ints:
    """A column of one value."""
    column = np.full(rows, value, np.int64)
    column.setflags(write=False)
    return column


@functools.lru_cache(256)
def flags(value: bool, rows: int) -> Bools:
    """A column of the same answer."""
    column = np.full(rows, value, np.bool_)
    column.setflags(write=False)
    return column


def span_of(rows: Ints) -> Ints | slice:
    """The rows as a slice where they follow each other, for slices copy nothing."""
    count = len(rows)
    if not count or rows[-1] - rows[0] != count - 1:
        return rows
    if count > 2 and np.count_nonzero(rows[1:] - rows[:-1] == 1) != count - 1:
        return rows
    return slice(int(rows[0]), int(rows[-1]) + 1)


def chosen(names: tuple[str, ...], span: Ints | slice) -> tuple[str, ...]:
    """The names of these rows."""
    if isinstance(span, slice):
        return names[span]
    if len(span) < 2:
        return tuple([names[row] for row in span.tolist()])
    breaks = (span[1:] - span[:-1] != 1).nonzero()[0]
    if len(breaks) > len(span) // 16:
        return operator.itemgetter(*span.tolist())(names)  # type: ignore[no-any-return]
    begins = span[np.concatenate([[0], breaks + 1])].tolist()
    ends = (span[np.concatenate([breaks, [len(span) - 1]])] + 1).tolist()
    return sum([names[begin:end] for begin, end in zip(begins, ends, strict=True)], ())


def words_in_order(words: Sequence[str], codes: Ints) -> tuple[tuple[str, ...], Ints]:
    """The column `words[codes]`, with the words that it has in the order of the rows.

    A column of no rows has the word "".

    >>> words_in_order(("a", "b", "c"), np.array([2, 0, 2]))[0]
    ('c', 'a')
    """
    if not codes.size:
        return ("",), zeros(0)
    if len(words) == 1 or np.count_nonzero(codes == codes[0]) == len(codes):
        return (words[int(codes[0])],), zeros(len(codes))
    # Of the rows that have a word, the one that is assigned last is the first.
    first = np.full(len(words), len(codes))
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    order = first.argsort()[: np.count_nonzero(first < len(codes))]
    number = np.empty(len(words), np.int64)
    number[order] = np.arange(len(order))
    return tuple([words[code] for code in order.tolist()]), number[codes]


def joined_words(columns: Sequence[Coded]) -> Coded:
    """One column of several, in their order."""
    if len(columns) == 1:
        return columns[0]
    if len({column.words for column in columns}) == 1:
        return Words(columns[0].words, np.concatenate([c.codes for c in columns]))
    words: dict[str, int] = {}
    codes = []
    for column in columns:
        renumbered = [words.setdefault(word, len(words)) for word in column.words]
        here = column.codes
        codes.append(np.array(renumbered, np.int64)[here] if len(here) else here)
    return Words(tuple(words), np.concatenate(codes) if codes else zeros(0))
