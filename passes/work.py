"""What each instance has to do in a graph, as columns: the table that the later passes share."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass

import numpy as np
from xdsl.ir import Operation

from sagec.dialects import kv, pd
from sagec.dialects.columns import Ints, ListsAttr, WordsAttr
from sagec.passes import flow
from sagec.passes.chunk_prefill import bounds_of
from sagec.passes.errors import PassError
from sagec.passes.flow import Bools
from sagec.passes.separate_phases import decode_tokens
from sagec.passes.topology import Instance, Topology


@dataclass(frozen=True)
class Work:
    """The requests of one instance: those it prefills, in rank order, then those it only decodes.

    prompt: tokens to compute before the first is sampled; of a resident, its context. held: how
    many of them have KV here, or in its prefix cache (cached), before step 0. decodes: tokens to
    decode here within the horizon; 0 where the row decodes elsewhere. whole: all the KV that it
    may ever have here. bounds: the chunks of each prefilled row. source, target: the instance its
    KV comes from, or goes to after its prefill. transfer_us: how long that takes. awaited: rows
    whose KV is not here yet and is not computed here.
    """

    instance: Instance
    names: tuple[str, ...]
    num_prefills: int
    prompt: Ints
    held: Ints
    cached: Ints
    decodes: Ints
    whole: Ints
    deadline: Ints
    bounds: ListsAttr
    source: WordsAttr
    target: WordsAttr
    transfer_us: Ints
    awaited: Bools

    @functools.cached_property
    def blocks(self) -> Ints:
        """Blocks that each row needs within the horizon."""
        return -(-(self.prompt + self.decodes) // self.instance.block_tokens)


@dataclass(frozen=True)
class _Side:
    """The rows of all prefills of a graph, or of all its decodes; tokens: decoded by each."""

    rows: flow.Table
    on: WordsAttr
    tokens: Ints


_made: weakref.WeakKeyDictionary[Operation, tuple[int, tuple[Work, ...]]] = (
    weakref.WeakKeyDictionary()
)


def work_of(graph: pd.GraphOp, topology: Topology) -> tuple[Work, ...]:
    """The work of each instance that has some, in the order of the module's instances.

    Made again only when an op of the graph that bears on it has changed. Raises PassError where
    an op names an instance that the module does not have, or a row has no place.
    """
    ops = flow.ops_in(graph)
    key = hash((id(topology), *map(id, graph.properties.values()), *map(_stamp, ops)))
    known = _made.get(graph)
    if known is None or known[0] != key:
        _made[graph] = known = (key, _work(graph, ops, topology))
    return known[1]


def _stamp(op: Operation) -> int:
    """Changes when the op is another, or has other operands or properties."""
    if isinstance(op, pd.StepsOp | pd.LeaveOp | kv.ReserveOp):
        return 0
    return hash((id(op), *map(id, op.operands), *map(id, op.properties.values())))


def _work(graph: pd.GraphOp, ops: list[Operation], topology: Topology) -> tuple[Work, ...]:
    prefills, bounds = _prefills([op for op in ops if isinstance(op, pd.PrefillOp)])
    decodes = _decodes([op for op in ops if isinstance(op, pd.DecodeOp)], graph.number("horizon"))
    _check_names([op for op in ops if isinstance(op, pd.PrefillOp | pd.DecodeOp)], topology)
    splitter = _Splitter(prefills, bounds, decodes, _transfers(ops))
    works = [splitter.work(instance) for instance in topology.instances]
    return tuple(work for work in works if len(work.names))


def _prefills(ops: list[pd.PrefillOp]) -> tuple[_Side, ListsAttr]:
    tables = [flow.table(op.wave) for op in ops]
    on = flow.joined_words([_place(op, op.on) for op in ops])
    rows = flow.joined(tables)
    bounds = [
        op.bounds or bounds_of(t.computed + t.cached, t.prompt, np.zeros(len(t), np.int64))
        for op, t in zip(ops, tables, strict=True)
    ]
    return _Side(rows, on, np.zeros(len(rows), np.int64)), _joined_lists(bounds)


def _decodes(ops: list[pd.DecodeOp], horizon: int) -> _Side:
    tables = [flow.table(op.kv) for op in ops]
    on = flow.joined_words([_place(op, op.on) for op in ops])
    tokens = [decode_tokens(t, op.max_steps or horizon) for op, t in zip(ops, tables, strict=True)]
    return _Side(flow.joined(tables), on, np.concatenate([*tokens, np.zeros(0, np.int64)]))


def _place(op: Operation, on: WordsAttr | None) -> WordsAttr:
    if on is None:
        raise PassError(f"{op.name} has no place; run select-device first, or say `on`", op)
    return on


def _check_names(ops: list[pd.PrefillOp | pd.DecodeOp], topology: Topology) -> None:
    for op in ops:
        for name in op.on.words if op.on is not None else ():
            topology.instance(name, op)


def _joined_lists(lists: list[ListsAttr]) -> ListsAttr:
    if len(lists) == 1:
        return lists[0]
    values = np.concatenate([np.zeros(0, np.int64), *(part.values for part in lists)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.offsets) for part in lists)])
    return ListsAttr.from_offsets(np.concatenate([[0], np.cumsum(lengths)]), values)


def _transfers(ops: list[Operation]) -> dict[str, tuple[str, int]]:
    """Of each row that moves, the instance it leaves and the microseconds it takes."""
    moves: dict[str, tuple[str, int]] = {}
    for op in ops:
        if isinstance(op, pd.TransferOp):
            us = op.column("us").tolist()
            moves |= zip(op.names, zip(op.words("source"), us, strict=True), strict=True)
    return moves


class _Splitter:
    """Parts the rows of a graph by instance."""

    def __init__(
        self,
        prefills: _Side,
        bounds: ListsAttr,
        decodes: _Side,
        transfers: dict[str, tuple[str, int]],
    ) -> None:
        self.prefills, self.bounds, self.decodes = prefills, bounds, decodes
        self.transfers = transfers
        fresh = np.flatnonzero(~decodes.rows.resident).tolist()
        row_of = {decodes.rows.names[row]: row for row in fresh}
        missing = len(decodes.rows)
        self.decode_row = np.array(
            [row_of.get(name, missing) for name in prefills.rows.names], np.int64
        )
        self.tokens = np.append(decodes.tokens, 0)

    def work(self, instance: Instance) -> Work:
        """The work of one instance."""
        pre = _rows_on(self.prefills.on, instance.name)
        here = _rows_on(self.decodes.on, instance.name)
        decode_row = self.decode_row[pre]
        only = here[~np.isin(here, decode_row)] if pre.size else here
        local = np.isin(decode_row, here)
        decodes = np.concatenate([np.where(local, self.tokens[decode_row], 0), self.tokens[only]])
        return self._joined(instance, pre, only, decodes, self._targets(decode_row, local))

    def _targets(self, decode_row: Ints, local: Bools) -> list[str]:
        words, codes = self.decodes.on.words, self.decodes.on.codes
        rows = zip(decode_row.tolist(), local.tolist(), strict=True)
        return ["" if stays or row >= len(codes) else words[codes[row]] for row, stays in rows]

    def _joined(
        self, instance: Instance, pre: Ints, only: Ints, decodes: Ints, targets: list[str]
    ) -> Work:
        prefills, others = _take(self.prefills.rows, pre), _take(self.decodes.rows, only)
        rows = flow.joined([prefills, others]) if len(prefills) else others
        came = np.flatnonzero(~others.resident | (others.arriving)) if len(others) else only
        moved = [self.transfers.get(others.names[row], ("", 0)) for row in came.tolist()]
        source = np.zeros(len(rows), np.int64)
        us = np.zeros(len(rows), np.int64)
        at = came + len(prefills)
        words = WordsAttr.from_rows([name for name, _ in moved])
        source[at] = words.codes + 1
        us[at] = [time for _, time in moved]
        awaited = np.zeros(len(rows), np.bool_)
        awaited[at] = True
        generate = np.where(rows.generate >= pd.UNBOUNDED, decodes, rows.generate)
        return Work(
            instance=instance,
            names=rows.names,
            num_prefills=len(pre),
            prompt=rows.prompt,
            held=rows.computed + rows.cached,
            cached=rows.cached,
            decodes=decodes,
            whole=rows.prompt + np.where(decodes > 0, generate, 0),
            deadline=rows.deadline,
            bounds=self.bounds if len(pre) == len(self.bounds) else self.bounds.take(pre),
            source=WordsAttr.of(("", *words.words), source),
            target=WordsAttr.from_rows(targets + [""] * len(only)),
            transfer_us=us,
            awaited=awaited,
        )


def _rows_on(on: WordsAttr, name: str) -> Ints:
    if on.words == (name,):
        return np.arange(len(on))
    return np.flatnonzero(on.codes == on.words.index(name)) if name in on.words else _NO_ROWS


_NO_ROWS: Ints = np.zeros(0, np.int64)


def _take(rows: flow.Table, chosen: Ints) -> flow.Table:
    return rows if len(chosen) == len(rows) else rows.take(chosen)
