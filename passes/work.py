"""What each instance has to do in a graph, as columns: the table that the later passes share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from xdsl.ir import Operation

from sagec.dialects import pd
from sagec.dialects.columns import Ints, ListsAttr, WordsAttr
from sagec.passes import flow
from sagec.passes.chunk_prefill import bounds_of
from sagec.passes.errors import PassError
from sagec.passes.flow import Bools
from sagec.passes.recent import Recent
from sagec.passes.separate_phases import decode_tokens
from sagec.passes.topology import Instance, Topology


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True, eq=False)
class _Side:
    """The rows of all prefills of a graph, or of all its decodes; tokens: decoded by each."""

    rows: flow.Table
    on: WordsAttr
    tokens: Ints


_recent: Recent[tuple[Work, ...]] = Recent()


def work_of(graph: pd.GraphOp, topology: Topology) -> tuple[Work, ...]:
    """The work of each instance that has some, in the order of the module's instances.

    Made again only when an op that bears on it has changed. Raises PassError where an op names an
    instance that the module does not have, or a row has no place.
    """
    ops = [op for op in flow.ops_in(graph) if type(op) in _BEARING]
    key = (topology, graph.number("horizon"), *[part for op in ops for part in _parts(op)])
    return _recent.answer(graph, key, lambda: _work(graph, ops, topology))


_BEARING = {pd.PrefillOp, pd.DecodeOp, pd.TransferOp}


def _parts(op: Operation) -> tuple[object, ...]:
    return (op.name, flow.table(op.operands[0]), *op.properties.values())


def _work(graph: pd.GraphOp, ops: list[Operation], topology: Topology) -> tuple[Work, ...]:
    prefills, bounds = _prefills([op for op in ops if type(op) is pd.PrefillOp])
    decodes = _decodes([op for op in ops if type(op) is pd.DecodeOp], graph.number("horizon"))
    _check_names([op for op in ops if type(op) is not pd.TransferOp], topology)
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
        if op.on is None:
            continue
        for code, name in enumerate(op.on.words):
            # A column may have words that no row uses.
            if name not in topology.by_name and (op.on.codes == code).any():
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
        if type(op) is pd.TransferOp:
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
        here = np.append(_is_on(self.decodes.on, instance.name), False)
        decode_row = self.decode_row[pre]
        local = here[decode_row]
        here[decode_row] = False
        only = np.flatnonzero(here)
        tokens = np.where(local, self.tokens[decode_row], 0)
        decodes = np.concatenate([tokens, self.tokens[only]]) if len(only) else tokens
        return self._joined(instance, pre, only, decodes, self._targets(decode_row, local, only))

    def _targets(self, decode_row: Ints, local: Bools, only: Ints) -> WordsAttr:
        """Where the KV of each prefilled row goes; nowhere for the others."""
        nowhere = len(self.decodes.on.words)
        codes = np.append(self.decodes.on.codes, nowhere)[decode_row]
        codes[local] = nowhere
        others = np.full(len(only), nowhere)
        return WordsAttr.of((*self.decodes.on.words, ""), np.concatenate([codes, others]))

    def _joined(
        self, instance: Instance, pre: Ints, only: Ints, decodes: Ints, target: WordsAttr
    ) -> Work:
        prefills, others = _take(self.prefills.rows, pre), _take(self.decodes.rows, only)
        rows = flow.joined([prefills, others])
        awaited = np.zeros(len(rows), np.bool_)
        awaited[len(prefills) :] = ~others.resident | others.arriving
        source, us = self._arrivals(rows, np.flatnonzero(awaited))
        whole = rows.prompt + np.where(
            decodes > 0, np.where(rows.generate >= pd.UNBOUNDED, decodes, rows.generate), 0
        )
        return Work(
            instance=instance,
            names=rows.names,
            num_prefills=len(pre),
            prompt=rows.prompt,
            held=rows.computed + rows.cached,
            cached=rows.cached,
            decodes=decodes,
            whole=whole,
            deadline=rows.deadline,
            bounds=self.bounds if len(pre) == len(self.bounds) else self.bounds.take(pre),
            source=source,
            target=target,
            transfer_us=us,
            awaited=awaited,
        )

    def _arrivals(self, rows: flow.Table, awaited: Ints) -> tuple[WordsAttr, Ints]:
        """Where the KV of each row comes from, and how long that takes; what is on its way comes
        from here."""
        us = np.zeros(len(rows), np.int64)
        codes = np.zeros(len(rows), np.int64)
        if not awaited.size:
            return WordsAttr.of(("",), codes), us
        here = [rows.place.words[code] for code in rows.place.codes[awaited].tolist()]
        moves = [
            self.transfers.get(rows.names[row], (place, 0))
            for row, place in zip(awaited.tolist(), here, strict=True)
        ]
        words = WordsAttr.from_rows([name for name, _ in moves])
        codes[awaited] = words.codes + 1
        us[awaited] = [time for _, time in moves]
        return WordsAttr.of(("", *words.words), codes), us


def _is_on(on: WordsAttr, name: str) -> Bools:
    if on.words == (name,):
        return np.ones(len(on), np.bool_)
    return on.codes == (on.words.index(name) if name in on.words else len(on.words))


def _rows_on(on: WordsAttr, name: str) -> Ints:
    return np.flatnonzero(_is_on(on, name))


def _take(rows: flow.Table, chosen: Ints) -> flow.Table:
    return rows if len(chosen) == len(rows) else rows.take(chosen)
