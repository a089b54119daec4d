"""What flows through a graph: for every value, its requests as columns.

Passes ask `table(value)` instead of following operands themselves. A table is made of the ops that
the value comes from and is as immutable as their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
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
    """The requests of a value of the pd dialect.

    Raises PassError where the value comes from no op of the dialects.
    """
    op = value.owner
    match op:
        case pd.RequestsOp():
            return _requests(op)
        case pd.ResidentOp():
            return _resident(op)
        case kv.MatchOp():
            return _matched(op)
        case pd.PrefillOp():
            before = table(op.wave)
            return before if op.on is None else replace(before, place=op.on)
        case pd.TransferOp():
            return _transferred(op)
        case pd.PreemptOp():
            before = table(op.kv)
            gone = set(op.names)
            kept = [row for row, name in enumerate(before.names) if name not in gone]
            return before.take(np.array(kept, np.int64))
        case pd.JoinOp():
            return joined([table(part) for part in op.parts])
        case pd.DecideOp() | pd.DecodeOp():
            return table(op.operands[0])
        case pd.PhaseOp():
            last = op.body.block.last_op
            assert isinstance(value, OpResult) and last is not None
            return table(last.operands[value.index])
        case Block():
            raise PassError("a block argument carries no requests; graphs have none")
        case _:
            raise PassError(f"{op.name} gives no requests", op)


def joined(tables: list[Table]) -> Table:
    """One table of several, in their order."""
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


def _words(op: pd.TableOp, name: str) -> WordsAttr:
    attr = op.properties.get(name)
    return attr if isinstance(attr, WordsAttr) else WordsAttr.same(NOWHERE, len(op.names))


def _requests(op: pd.RequestsOp) -> Table:
    return Table(
        names=op.names,
        prompt=op.column("prompt"),
        computed=op.column("computed"),
        cached=op.column("cached"),
        generate=op.column("generate"),
        deadline=op.column("deadline"),
        chunk=op.column("chunk"),
        resident=np.zeros(len(op.names), np.bool_),
        arriving=np.zeros(len(op.names), np.bool_),
        place=_words(op, "on"),
        decode_place=_words(op, "decode_on"),
        model=_words(op, "model"),
    )


def _resident(op: pd.ResidentOp) -> Table:
    context = op.column("context")
    zeros = np.zeros(len(op.names), np.int64)
    return Table(
        names=op.names,
        prompt=context,
        computed=context,
        cached=zeros,
        generate=op.column("remaining"),
        deadline=op.column("deadline"),
        chunk=zeros,
        resident=np.ones(len(op.names), np.bool_),
        arriving=op.column("arriving").astype(np.bool_),
        place=_words(op, "on"),
        decode_place=_words(op, "on"),
        model=_words(op, "model"),
    )


def _matched(op: kv.MatchOp) -> Table:
    before = table(op.wave)
    cached = before.cached.copy()
    cached[rows_named(before, op)] = op.column("tokens")
    return replace(before, cached=np.minimum(cached, before.prompt - before.computed - 1))


def _transferred(op: pd.TransferOp) -> Table:
    before = table(op.kv)
    target = op.properties["target"]
    assert isinstance(target, WordsAttr)
    return replace(before, place=placed(before.place, rows_named(before, op), target))


def rows_named(requests: Table, op: pd.TableOp) -> Ints:
    """The row in `requests` of each row that `op` names.

    Raises PassError for a name that `requests` does not have.
    """
    if op.names is requests.names:
        return np.arange(len(requests))
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
    for op in module.ops:
        if isinstance(op, pd.GraphOp):
            yield op


def ops_in(graph: pd.GraphOp) -> list[Operation]:
    """The graph's ops with those of its phases, in the order of the text."""
    found: list[Operation] = []
    for op in graph.body.block.ops:
        found.append(op)
        if isinstance(op, pd.PhaseOp):
            found.extend(op.body.block.ops)
    return found
