"""What flows through a graph: for every value, its requests as columns.

Passes ask `table(value)` instead of following operands themselves. A table is made of the ops that
the value comes from and is as immutable as their attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Block, Operation, OpResult, SSAValue

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Ints, NamesAttr, WordsAttr
from sagec.passes.errors import PassError
from sagec.runtime.direct.columns import Bools as Bools
from sagec.runtime.direct.columns import chosen as chosen
from sagec.runtime.direct.columns import flags as flags
from sagec.runtime.direct.columns import joined_words as joined_codes
from sagec.runtime.direct.columns import same, words_in_order
from sagec.runtime.direct.columns import span_of as span_of
from sagec.runtime.direct.columns import zeros as zeros

NOWHERE = ""
"""Place of a row that no instance was chosen for yet."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Leading tokens that single instances have: `tokens` is [rows, instances], named by `on`."""

    on: tuple[str, ...]
    tokens: Ints

    def __getitem__(self, rows: Ints | slice) -> Matches:
        """Those of these rows."""
        return Matches(self.on, self.tokens[rows])

    def of(self, instance: str) -> Ints:
        """What an instance has of each row."""
        if instance not in self.on:
            return zeros(len(self.tokens))
        column: Ints = self.tokens[:, self.on.index(instance)]
        return column


class Table:
    """The requests of a value; a column is made when somebody asks for it, and then kept.

    prompt: tokens to compute before the first is sampled; of a resident, its context. computed,
    cached: how many of those have KV on their instance, or are to be reused; matches: how many
    single instances have, while it is open where the row goes. generate: tokens still to sample,
    or UNBOUNDED. resident: rows that decode already; arriving: those of them whose KV is still on
    its way. place: the instance that holds the KV, or will compute it; decode_place: the one that
    decodes, where it was said.
    """

    prompt: Ints
    computed: Ints
    cached: Ints
    matches: Matches
    generate: Ints
    deadline: Ints
    chunk: Ints
    resident: Bools
    arriving: Bools
    place: WordsAttr
    decode_place: WordsAttr
    model: WordsAttr

    def __init__(self, names: tuple[str, ...], make: Callable[[str], Any], **known: Any) -> None:
        """make: gives the column of a name; known: columns that are there already."""
        self.names = names
        self.make = make
        self.__dict__.update(known)

    def __getattr__(self, name: str) -> Any:
        if name not in _COLUMNS:
            raise AttributeError(f"a table has no column {name!r}")
        column = self.__dict__[name] = self.make(name)
        return column

    def __len__(self) -> int:
        return len(self.names)

    def but(self, **columns: Any) -> Table:
        """The same requests with other columns."""
        return Table(**(self.__dict__ | columns))

    def take(self, rows: Ints) -> Table:
        """The table of these rows, in this order."""
        span = span_of(rows)

        def make(name: str) -> Any:
            column = getattr(self, name)
            if type(column) is WordsAttr:
                return WordsAttr.of(column.words, column.codes[span])
            return zeros(len(rows)) if column is zeros(len(self)) else column[span]

        return Table(chosen(self.names, span), make)


_COLUMNS = frozenset(Table.__annotations__)


@functools.lru_cache(64)
def unmatched(rows: int) -> Matches:
    """Rows of which no single instance has anything."""
    return Matches((), np.zeros((rows, 0), np.int64))


@functools.lru_cache(64)
def nowhere(rows: int) -> WordsAttr:
    """A column of rows that have no place."""
    return WordsAttr.same(NOWHERE, rows)


def table(value: SSAValue) -> Table:
    """The requests of a value of the pd dialect; made again only when its ops have changed.

    Raises PassError where the value comes from no op of the dialects.
    """
    op = value.owner
    if isinstance(op, Block):
        raise PassError("a block argument carries no requests; graphs have none")
    before = [table(operand) for operand in op._operands]
    key = (*_said(op), *before)
    # Kept with the op, so that it goes when the op goes; in line, for a round asks fifty times.
    known: tuple[tuple[object, ...], Table] | None = op.__dict__.get("_table")
    if known is not None and known[0] == key:
        return known[1]
    if isinstance(op, pd.PhaseOp):
        assert isinstance(value, OpResult)
        last = op.body.block.last_op
        assert last is not None
        return table(last.operands[value.index])
    if (make := _MAKERS.get(type(op))) is None:
        raise PassError(f"{op.name} gives no requests", op)
    made = make(op, before)
    op.__dict__["_table"] = (key, made)
    return made


def remember(op: Operation, made: Table) -> None:
    """What `table` would find out of an op that a pass has just made."""
    op.__dict__["_table"] = ((*_said(op), *map(table, op._operands)), made)


def _said(op: Operation) -> Iterable[Attribute | None]:
    """The properties that bear on the op's table; how a prompt is cut does not."""
    properties = op.properties
    return (properties.get("on"),) if type(op) is pd.PrefillOp else properties.values()


def joined(tables: list[Table]) -> Table:
    """One table of several, in their order."""
    tables = [t for t in tables if len(t)] or tables[:1]
    if len(tables) == 1:
        return tables[0]
    if not tables:
        return _EMPTY

    def make(name: str) -> Any:
        columns = [getattr(t, name) for t in tables]
        if name == "matches":
            return _joined_matches(columns)
        if columns and type(columns[0]) is WordsAttr:
            return joined_words(columns)
        if all(column is zeros(len(column)) for column in columns):
            return zeros(sum(map(len, columns)))
        return np.concatenate(columns)

    return Table(sum((t.names for t in tables), ()), make)


_EMPTY = Table((), lambda name: _NO_COLUMNS.get(name, zeros(0)))
_NO_COLUMNS: dict[str, Any] = {
    **dict.fromkeys(("resident", "arriving"), flags(False, 0)),
    **dict.fromkeys(("place", "decode_place", "model"), WordsAttr.of((), zeros(0))),
    "matches": unmatched(0),
}


def match_columns(names: tuple[str, ...], matches: Matches) -> dict[str, Attribute]:
    """The columns of a kv.match that says this of the rows of these names."""
    rows, places = matches.tokens.nonzero()
    return {
        "ids": NamesAttr(chosen(names, rows)),
        "tokens": ColumnAttr.of(matches.tokens[rows, places]),
        "on": compact(matches.on, places),
    }


def _joined_matches(columns: list[Matches]) -> Matches:
    on = tuple(dict.fromkeys(word for column in columns for word in column.on))
    if not on:
        return unmatched(sum(len(column.tokens) for column in columns))
    parts = [np.stack([column.of(word) for word in on], axis=1) for column in columns]
    return Matches(on, np.concatenate(parts))


def joined_words(columns: list[WordsAttr]) -> WordsAttr:
    """One column of several, in their order."""
    if len(columns) == 1:
        return columns[0]
    one = joined_codes(columns)
    return WordsAttr.of(one.words, one.codes)


def compact(words: Sequence[str], codes: Ints) -> WordsAttr:
    """The column of `words[codes]`, with the words that it has in the order of the rows.

    So a parser numbers them too: a column and its text are the same attribute.

    >>> compact(("a", "b", "c"), np.array([2, 0, 2])).data[0]
    ('c', 'a')
    """
    if not codes.size:
        return nowhere(0)
    return WordsAttr.of(*words_in_order(words, codes))


def placed(words: WordsAttr, rows: Ints, place: WordsAttr) -> WordsAttr:
    """`words` with the rows `rows` replaced by those of `place`."""
    number = {word: code for code, word in enumerate(words.words)}
    every = list(words.words)
    for word in place.words:
        if number.setdefault(word, len(every)) == len(every):
            every.append(word)
    codes = words.codes.copy()
    if rows.size:
        codes[rows] = np.array([number[word] for word in place.words], np.int64)[place.codes]
    return WordsAttr.of(every, codes)


def _source(
    names: tuple[str, ...],
    properties: dict[str, Attribute],
    columns: dict[str, tuple[str, Callable[[int], Any]]],
) -> Table:
    """The table of an op that brings requests.

    columns: of each column of the table, the property that is it, and what makes it where the op
    has none.
    """
    known: dict[str, Any] = {}
    for name, (said, default) in columns.items():
        attr = properties.get(said)
        if attr is None:
            known[name] = default(len(names))
        else:
            known[name] = attr.array if type(attr) is ColumnAttr else attr
    return Table(names, known.__getitem__, **known)


_none = functools.partial(flags, False)
_unbounded = functools.partial(same, pd.UNBOUNDED)

_REQUEST_COLUMNS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "prompt": ("prompt", zeros),
    "computed": ("computed", zeros),
    "cached": ("cached", zeros),
    "matches": ("", unmatched),
    "generate": ("generate", _unbounded),
    "deadline": ("deadline", zeros),
    "chunk": ("chunk", zeros),
    "resident": ("", _none),
    "arriving": ("", _none),
    "place": ("on", nowhere),
    "decode_place": ("decode_on", nowhere),
    "model": ("model", nowhere),
}
_RESIDENT_COLUMNS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "prompt": ("context", zeros),
    "computed": ("context", zeros),
    "cached": ("", zeros),
    "matches": ("", unmatched),
    "generate": ("remaining", _unbounded),
    "deadline": ("deadline", zeros),
    "chunk": ("", zeros),
    "resident": ("", functools.partial(flags, True)),
    "place": ("on", nowhere),
    "decode_place": ("on", nowhere),
    "model": ("model", nowhere),
}


def _requests(op: pd.RequestsOp, _: list[Table]) -> Table:
    return _source(op.names, op.properties, _REQUEST_COLUMNS)


def _resident(op: pd.ResidentOp, _: list[Table]) -> Table:
    table = _source(op.names, op.properties, _RESIDENT_COLUMNS)
    coming = op.properties.get("arriving")
    if isinstance(coming, ColumnAttr):
        table.arriving = coming.array.astype(np.bool_)
    else:
        table.arriving = _none(len(table))
    return table


def _matched(op: kv.MatchOp, before: list[Table]) -> Table:
    requests, on = before[0], op.properties.get("on")
    rows, tokens = rows_named(requests, op), op.column("tokens")
    most = requests.prompt - requests.computed - 1
    if isinstance(on, WordsAttr):
        somewhere = np.array([bool(word) for word in on.words], np.bool_)[on.codes]
        named, anywhere = np.flatnonzero(somewhere), np.flatnonzero(~somewhere)
        here = rows[named], on.take(named), np.minimum(tokens, most[rows])[named]
        requests = requests.but(matches=_with_matches(requests.matches, *here))
        rows, tokens = rows[anywhere], tokens[anywhere]
    cached = requests.cached.copy()
    cached[rows] = tokens
    return requests.but(cached=np.minimum(cached, most))


def _with_matches(matches: Matches, rows: Ints, on: WordsAttr, tokens: Ints) -> Matches:
    """The matches, and what instances have of these rows."""
    words = tuple(dict.fromkeys((*matches.on, *filter(None, on.words))))
    table = np.zeros((len(matches.tokens), len(words)), np.int64)
    table[:, : len(matches.on)] = matches.tokens
    column_of = {word: column for column, word in enumerate(words)}
    columns = np.array([column_of.get(word, 0) for word in on.words], np.int64)
    table[rows, columns[on.codes]] = tokens
    return Matches(words, table)


def _prefilled(op: pd.PrefillOp, before: list[Table]) -> Table:
    on = op.properties.get("on")
    return before[0] if on is None else before[0].but(place=on)


def _transferred(op: pd.TransferOp, before: list[Table]) -> Table:
    target = op.properties["target"]
    assert isinstance(target, WordsAttr)
    rows = rows_named(before[0], op)
    return before[0].but(place=placed(before[0].place, rows, target))


def _without_preempted(op: pd.PreemptOp, before: list[Table]) -> Table:
    gone = set(op.names)
    kept = [row for row, name in enumerate(before[0].names) if name not in gone]
    return before[0].take(np.array(kept, np.int64))


_MAKERS: dict[type, Callable[[Any, list[Table]], Table]] = {
    pd.RequestsOp: _requests,
    pd.ResidentOp: _resident,
    kv.MatchOp: _matched,
    pd.PrefillOp: _prefilled,
    pd.TransferOp: _transferred,
    pd.PreemptOp: _without_preempted,
    pd.JoinOp: lambda _, before: joined(before),
    pd.DecideOp: lambda _, before: before[0],
    pd.DecodeOp: lambda _, before: before[0],
}


def rows_named(requests: Table, op: pd.TableOp) -> Ints:
    """The row in `requests` of each row that `op` names.

    Raises PassError for a name that `requests` does not have.
    """
    if op.names is requests.names:
        return np.arange(len(requests))
    # Most ops name the requests that do not decode yet, and those are few.
    fresh = (~requests.resident).nonzero()[0]
    if len(fresh) == len(op.names) and chosen(requests.names, fresh) == op.names:
        return fresh
    index = {requests.names[row]: row for row in fresh.tolist()}
    if not all(name in index for name in op.names):
        index = {name: row for row, name in enumerate(requests.names)}
    rows = [index.get(name) for name in op.names]
    if None in rows:
        missing = op.names[rows.index(None)]
        raise PassError(
            f'{op.name}: no request "{missing}" in {op.operands[0].type}; '
            f"there are: {', '.join(requests.names[:5]) or 'none'}"
            + (", ..." if len(requests) > 5 else ""),
            op,
        )
    return np.array(rows, np.int64)


def ops_of_block(block: Block) -> list[Operation]:
    """The block's ops in order; in a quarter of the time that `block.ops` takes."""
    found: list[Operation] = []
    op = block._first_op
    while op is not None:
        found.append(op)
        op = op._next_op
    return found


def graphs(module: ModuleOp) -> Iterator[pd.GraphOp]:
    """The module's graphs, in the order of the text."""
    yield from [op for op in ops_of_block(module.body.block) if type(op) is pd.GraphOp]


def ops_in(graph: pd.GraphOp) -> list[Operation]:
    """The graph's ops with those of its phases, in the order of the text."""
    ops = ops_of_block(graph.body.block)
    if pd.PhaseOp not in map(type, ops):
        return ops
    found: list[Operation] = []
    for op in ops:
        found.append(op)
        if type(op) is pd.PhaseOp:
            found.extend(ops_of_block(op.body.block))
    return found


OpT = TypeVar("OpT", bound=Operation)


def ops_of(graph: pd.GraphOp, kind: type[OpT]) -> list[OpT]:
    """The graph's ops of exactly this kind, with those of its phases."""
    return [op for op in ops_in(graph) if type(op) is kind]
