"""What flows through a graph: for every value, its requests as columns.

Passes ask `table(value)` instead of following operands themselves. A table is made of the ops that
the value comes from and is as immutable as their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, OpResult, SSAValue

from sagec.dialects import kv, pd
from sagec.dialects.columns import Ints, WordsAttr
from sagec.passes.errors import PassError

Bools = np.ndarray[tuple[int], np.dtype[np.bool_]]

NOWHERE = ""
"""Place of a row that no instance was chosen for yet."""

_NONE: Bools = np.zeros(0, np.bool_)


@dataclass(frozen=True, eq=False)
class Table:
    """The requests of a value.

    prompt: tokens to compute before the first is sampled; of a resident, its context. computed,
    cached: how many of those have KV on their instance, or in its prefix cache. generate: tokens
    still to sample, or UNBOUNDED. resident: rows that decode already; arriving: those of them
    whose KV is still on its way. place: the instance that
    holds the KV, or will compute it; decode_place: the one that decodes, where it was said.
    """

    names: tuple[str, ...]
    prompt: Ints
    computed: Ints
    cached: Ints
    generate: Ints
    deadline: Ints
    chunk: Ints
    resident: Bools
    arriving: Bools
    place: WordsAttr
    decode_place: WordsAttr
    model: WordsAttr

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Ints) -> Table:
        """The table of these rows, in this order."""
        return Table(
            names=tuple(self.names[row] for row in rows.tolist()),
            prompt=self.prompt[rows],
            computed=self.computed[rows],
            cached=self.cached[rows],
            generate=self.generate[rows],
            deadline=self.deadline[rows],
            chunk=self.chunk[rows],
            resident=self.resident[rows],
            arriving=self.arriving[rows],
            place=self.place.take(rows),
            decode_place=self.decode_place.take(rows),
            model=self.model.take(rows),
        )


def table(value: SSAValue) -> Table:
    """The requests of a value of the pd dialect; made again only when its ops have changed.

    Raises PassError where the value comes from no op of the dialects.
    """
    op = value.owner
    kind = type(op)
    if kind is pd.PhaseOp:
        assert isinstance(op, pd.PhaseOp) and isinstance(value, OpResult)
        last = op.body.block.last_op
        assert last is not None
        return table(last.operands[value.index])
    if (make := _MAKERS.get(kind)) is None:
        if isinstance(op, Block):
            raise PassError("a block argument carries no requests; graphs have none")
        raise PassError(f"{op.name} gives no requests", op)
    assert isinstance(op, Operation)
    before = [table(operand) for operand in op._operands]
    key = (*op.properties.values(), *before)
    # Kept with the op, so that it goes when the op goes.
    known: tuple[tuple[object, ...], Table] | None = op.__dict__.get("_table")
    if known is None or known[0] != key:
        op.__dict__["_table"] = known = (key, make(op, before))
    return known[1]


def joined(tables: list[Table]) -> Table:
    """One table of several, in their order."""
    tables = [t for t in tables if len(t)] or tables[:1]
    if len(tables) == 1:
        return tables[0]
    return Table(
        names=sum((t.names for t in tables), ()),
        prompt=_joined(tables, "prompt"),
        computed=_joined(tables, "computed"),
        cached=_joined(tables, "cached"),
        generate=_joined(tables, "generate"),
        deadline=_joined(tables, "deadline"),
        chunk=_joined(tables, "chunk"),
        resident=np.concatenate([t.resident for t in tables] or [_NONE]),
        arriving=np.concatenate([t.arriving for t in tables] or [_NONE]),
        place=joined_words([t.place for t in tables]),
        decode_place=joined_words([t.decode_place for t in tables]),
        model=joined_words([t.model for t in tables]),
    )


def _joined(tables: list[Table], column: str) -> Ints:
    return np.concatenate([getattr(t, column) for t in tables] or [np.zeros(0, np.int64)])


def joined_words(columns: list[WordsAttr]) -> WordsAttr:
    """One column of several, in their order."""
    if len({column.words for column in columns}) == 1:
        return WordsAttr.of(columns[0].words, np.concatenate([c.codes for c in columns]))
    words: dict[str, int] = {}
    codes = []
    for column in columns:
        renumbered = [words.setdefault(word, len(words)) for word in column.words]
        codes.append(np.array(renumbered, np.int64)[column.codes] if len(column) else column.codes)
    return WordsAttr.of(tuple(words), np.concatenate(codes) if codes else np.zeros(0, np.int64))


def placed(words: WordsAttr, rows: Ints, place: WordsAttr) -> WordsAttr:
    """`words` with the rows `rows` replaced by those of `place`."""
    both = joined_words([words, place])
    codes = both.codes[: len(words)].copy()
    codes[rows] = both.codes[len(words) :]
    return WordsAttr.of(both.words, codes)


def _words(op: Operation, name: str, rows: int) -> WordsAttr:
    attr = op.properties.get(name)
    return attr if isinstance(attr, WordsAttr) else WordsAttr.same(NOWHERE, rows)


def _requests(op: pd.RequestsOp, _: list[Table]) -> Table:
    rows = len(op.names)
    return Table(
        names=op.names,
        prompt=op.column("prompt"),
        computed=op.column("computed"),
        cached=op.column("cached"),
        generate=op.column("generate"),
        deadline=op.column("deadline"),
        chunk=op.column("chunk"),
        resident=np.zeros(rows, np.bool_),
        arriving=np.zeros(rows, np.bool_),
        place=_words(op, "on", rows),
        decode_place=_words(op, "decode_on", rows),
        model=_words(op, "model", rows),
    )


def _resident(op: pd.ResidentOp, _: list[Table]) -> Table:
    rows = len(op.names)
    context, zeros = op.column("context"), np.zeros(rows, np.int64)
    place = _words(op, "on", rows)
    return Table(
        names=op.names,
        prompt=context,
        computed=context,
        cached=zeros,
        generate=op.column("remaining"),
        deadline=op.column("deadline"),
        chunk=zeros,
        resident=np.ones(rows, np.bool_),
        arriving=op.column("arriving").astype(np.bool_),
        place=place,
        decode_place=place,
        model=_words(op, "model", rows),
    )


def _matched(op: kv.MatchOp, before: list[Table]) -> Table:
    requests = before[0]
    cached = requests.cached.copy()
    cached[rows_named(requests, op)] = op.column("tokens")
    most = requests.prompt - requests.computed - 1
    return replace(requests, cached=np.minimum(cached, most))


def _prefilled(op: pd.PrefillOp, before: list[Table]) -> Table:
    return before[0] if op.on is None else replace(before[0], place=op.on)


def _transferred(op: pd.TransferOp, before: list[Table]) -> Table:
    target = op.properties["target"]
    assert isinstance(target, WordsAttr)
    place = placed(before[0].place, rows_named(before[0], op), target)
    return replace(before[0], place=place)


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
    # Most ops name requests that do not decode yet, and those are few.
    fresh = np.flatnonzero(~requests.resident).tolist()
    index = {requests.names[row]: row for row in fresh}
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


def graphs(module: ModuleOp) -> Iterator[pd.GraphOp]:
    """The module's graphs, in the order of the text."""
    for op in module.body.block.ops:
        if type(op) is pd.GraphOp:
            yield op


def ops_in(graph: pd.GraphOp) -> list[Operation]:
    """The graph's ops with those of its phases, in the order of the text."""
    found: list[Operation] = []
    for op in graph.body.block.ops:
        found.append(op)
        if type(op) is pd.PhaseOp:
            found.extend(op.body.block.ops)
    return found


OpT = TypeVar("OpT", bound=Operation)


def ops_of(graph: pd.GraphOp, kind: type[OpT]) -> list[OpT]:
    """The graph's ops of exactly this kind, with those of its phases."""
    return [op for op in ops_in(graph) if type(op) is kind]
