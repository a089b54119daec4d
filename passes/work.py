"""What each instance has to do in a graph, as columns: the table that the later passes share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from sagec.dialects import pd
from sagec.dialects.columns import Ints, ListsAttr, WordsAttr
from sagec.passes import flow
from sagec.passes.chunk_prefill import whole
from sagec.passes.errors import PassError
from sagec.passes.flow import Bools
from sagec.passes.recent import recent
from sagec.passes.separate_phases import decode_tokens
from sagec.passes.topology import Instance, Topology
from sagec.passes.turns import NO_TURNS, Turns, turns_of
from sagec.runtime.direct.work import Work, bounded_by_its_room, in_turn, within_its_room


@dataclass(frozen=True, eq=False)
class _Side:
    """The rows of all prefills of a graph, or of all its decodes; tokens: decoded by each."""

    rows: flow.Table
    on: WordsAttr
    tokens: Ints


@dataclass(frozen=True)
class _Moves:
    """The rows that transfers bring, the instance that each leaves, and how long it takes."""

    names: tuple[str, ...] = ()
    source: WordsAttr = dataclasses.field(default_factory=lambda: flow.nowhere(0))
    us: Ints = dataclasses.field(default_factory=lambda: flow.zeros(0))


def work_of(graph: pd.GraphOp, topology: Topology) -> tuple[Work, ...]:
    """The work of each instance that has some, in the order of the module's instances.

    Made again only when an op that bears on it has changed. Raises PassError where an op names an
    instance that the module does not have, or a row has no place.
    """
    prefills: dict[pd.PrefillOp, flow.Table] = {}
    decodes: dict[pd.DecodeOp, flow.Table] = {}
    transfers: list[pd.TransferOp] = []
    turns: list[pd.TurnsOp] = []
    for op in flow.ops_in(graph):
        kind = type(op)
        if kind is pd.PrefillOp:
            prefills[op] = flow.table(op._operands[0])  # type: ignore[index]
        elif kind is pd.DecodeOp:
            decodes[op] = flow.table(op._operands[0])  # type: ignore[index]
        elif kind is pd.TransferOp:
            transfers.append(op)  # type: ignore[arg-type]
        elif kind is pd.TurnsOp:
            turns.append(op)  # type: ignore[arg-type]
    key: list[object] = [topology, graph.number("horizon"), *prefills.values(), *decodes.values()]
    for op in (*prefills, *decodes, *transfers, *turns):
        key.extend((op, *op.properties.values()))
    return recent(
        graph,
        "_work",
        tuple(key),
        lambda: _in_turn(
            _work(graph.number("horizon"), prefills, decodes, transfers, topology),
            turns_of(turns, topology) if turns else NO_TURNS,
        ),
    )


def _in_turn(works: tuple[Work, ...], turns: Turns) -> tuple[Work, ...]:
    """The same work, of which instances decode no more than their turns allow."""
    if not turns:
        return works
    return tuple(in_turn(work, turns.get(work.instance.name)) for work in works)


def _work(
    horizon: int,
    prefills: dict[pd.PrefillOp, flow.Table],
    decodes: dict[pd.DecodeOp, flow.Table],
    transfers: list[pd.TransferOp],
    topology: Topology,
) -> tuple[Work, ...]:
    before, bounds = _prefills(prefills, topology)
    after = _decodes(decodes, horizon, topology)
    splitter = _Splitter(before, bounds, after, _moves(transfers))
    works = [splitter.work(instance) for instance in topology.instances]
    works = [bounded_by_its_room(work) for work in works if len(work.names)]
    return tuple(map(within_its_room, works) if horizon else works)


def _prefills(ops: dict[pd.PrefillOp, flow.Table], topology: Topology) -> tuple[_Side, ListsAttr]:
    on = flow.joined_words([_place(op, topology) for op in ops])
    rows = flow.joined([*ops.values()])
    bounds = [
        said
        if isinstance(said := op.properties.get("bounds"), ListsAttr)
        else whole(t.computed + t.cached, t.prompt)
        for op, t in ops.items()
    ]
    return _Side(rows, on, flow.zeros(len(rows))), _joined_lists(bounds)


def _decodes(ops: dict[pd.DecodeOp, flow.Table], horizon: int, topology: Topology) -> _Side:
    on = flow.joined_words([_place(op, topology) for op in ops])
    tokens = [decode_tokens(t, op.max_steps or horizon) for op, t in ops.items()]
    tokens = tokens if len(tokens) == 1 else [np.concatenate([*tokens, flow.zeros(0)])]
    rows = flow.joined([*ops.values()])
    # Where the first token is the last, prefill samples it: such a row goes nowhere to decode.
    goes_on = rows.resident | (tokens[0] > 0)
    if np.count_nonzero(goes_on) == len(rows):
        return _Side(rows, on, tokens[0])
    kept = goes_on.nonzero()[0]
    return _Side(rows.take(kept), on.take(kept), tokens[0][kept])


def _place(op: pd.PrefillOp | pd.DecodeOp, topology: Topology) -> WordsAttr:
    """Where the op's rows are. Raises PassError for a row without a place, or in none there is."""
    on = op.properties.get("on")
    if not isinstance(on, WordsAttr):
        raise PassError(f"{op.name} has no place; run select-device first, or say `on`", op)
    for code, name in enumerate(on.words):
        # A column may have words that no row uses.
        if name not in topology.by_name and (on.codes == code).any():
            topology.instance(name, op)
    return on


def _joined_lists(lists: list[ListsAttr]) -> ListsAttr:
    if len(lists) == 1:
        return lists[0]
    values = np.concatenate([flow.zeros(0), *(part.values for part in lists)])
    lengths = np.concatenate([flow.zeros(0), *(np.diff(part.offsets) for part in lists)])
    return ListsAttr.from_offsets(np.concatenate([[0], np.cumsum(lengths)]), values)


def _moves(ops: list[pd.TransferOp]) -> _Moves:
    """What all transfers move; of a row that moves twice, the last leg."""
    if len(ops) == 1:
        source = ops[0].properties["source"]
        assert isinstance(source, WordsAttr)
        return _Moves(ops[0].names, source, ops[0].column("us"))
    moves: dict[str, tuple[str, int]] = {}
    for op in ops:
        us = op.column("us").tolist()
        moves |= zip(op.names, zip(op.words("source"), us, strict=True), strict=True)
    return _Moves(
        tuple(moves),
        WordsAttr.from_rows([source for source, _ in moves.values()]),
        np.array([us for _, us in moves.values()], np.int64),
    )


class _Splitter:
    """Parts the rows of a graph by instance."""

    def __init__(self, prefills: _Side, bounds: ListsAttr, decodes: _Side, moves: _Moves) -> None:
        self.prefills, self.bounds, self.decodes, self.moves = prefills, bounds, decodes, moves
        self.decode_row = _rows_named(prefills.rows.names, decodes.rows)
        self.tokens = np.concatenate([decodes.tokens, _ZERO])

    def work(self, instance: Instance) -> Work:
        """The work of one instance."""
        pre = _rows_on(self.prefills.on, instance.name)
        here = _is_on(self.decodes.on, instance.name)
        if not pre.size:
            only = here.nonzero()[0]
            decodes = self.decodes.tokens[only]
            return self._joined(instance, pre, only, decodes, flow.nowhere(len(only)))
        decode_row = self.decode_row if len(pre) == len(self.decode_row) else self.decode_row[pre]
        here = np.concatenate([here, _FALSE])
        local = here[decode_row]
        here[decode_row] = False
        only = here.nonzero()[0]
        decodes = np.where(local, self.tokens[decode_row], 0)
        if only.size:
            decodes = np.concatenate([decodes, self.tokens[only]])
        return self._joined(instance, pre, only, decodes, self._targets(decode_row, local, only))

    def _targets(self, decode_row: Ints, local: Bools, only: Ints) -> WordsAttr:
        """Where the KV of each prefilled row goes; nowhere for the others."""
        if np.count_nonzero(local) == len(local):
            return flow.nowhere(len(local) + len(only))
        words = self.decodes.on.words
        codes = np.full(len(local) + len(only), len(words))
        there = np.concatenate([self.decodes.on.codes, codes[:1]])[decode_row]
        codes[: len(local)] = np.where(local, len(words), there)
        return flow.compact((*words, flow.NOWHERE), codes)

    def _joined(
        self, instance: Instance, pre: Ints, only: Ints, decodes: Ints, target: WordsAttr
    ) -> Work:
        if not only.size:
            rows = _take(self.prefills.rows, pre)
            awaited = flow.flags(False, len(pre))
        else:
            others = _take(self.decodes.rows, only)
            rows = flow.joined([_take(self.prefills.rows, pre), others]) if pre.size else others
            awaited = np.zeros(len(rows), np.bool_)
            awaited[len(pre) :] = ~others.resident | others.arriving
        source, us = self._arrivals(rows, awaited.nonzero()[0])
        cached = rows.cached
        if only.size and np.count_nonzero(cached):
            cached = np.where(np.arange(len(rows)) < len(pre), cached, 0)
        return Work(
            instance=instance,
            names=rows.names,
            num_prefills=len(pre),
            prompt=rows.prompt,
            held=rows.computed if cached is flow.zeros(len(rows)) else rows.computed + cached,
            cached=cached,
            decodes=decodes,
            generate=rows.generate,
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
        if not awaited.size:
            return flow.nowhere(len(rows)), flow.zeros(len(rows))
        names = flow.chosen(rows.names, awaited)
        if names == self.moves.names:
            words, times = self.moves.source, self.moves.us
        else:
            words, times = self._some_arrivals(names, rows.place.take(awaited).rows())
        codes, us = np.zeros((2, len(rows)), np.int64)
        codes[awaited], us[awaited] = words.codes + 1, times
        return WordsAttr.of(("", *words.words), codes), us

    def _some_arrivals(self, names: tuple[str, ...], here: list[str]) -> tuple[WordsAttr, Ints]:
        """Source and time of each; of what does not move, where it is."""
        moved = zip(self.moves.source.rows(), self.moves.us.tolist(), strict=True)
        moves = dict(zip(self.moves.names, moved, strict=True))
        found = [moves.get(name, (place, 0)) for name, place in zip(names, here, strict=True)]
        words = WordsAttr.from_rows([source for source, _ in found])
        return words, np.array([us for _, us in found], np.int64)


_ZERO, _FALSE = np.zeros(1, np.int64), np.zeros(1, np.bool_)


def _rows_named(names: tuple[str, ...], rows: flow.Table) -> Ints:
    """The row of each of `names` among those of `rows` that do not decode yet; its length for
    those that are not there."""
    fresh = (~rows.resident).nonzero()[0]
    there = rows.names
    if len(fresh) == len(names) and flow.chosen(there, fresh) == names:
        return fresh
    row_of = {there[row]: row for row in fresh.tolist()}
    return np.array([row_of.get(name, len(there)) for name in names], np.int64)


def _is_on(on: WordsAttr, name: str) -> Bools:
    if on.words == (name,):
        return np.ones(len(on), np.bool_)
    here: Bools = on.codes == (on.words.index(name) if name in on.words else len(on.words))
    return here


def _rows_on(on: WordsAttr, name: str) -> Ints:
    return _is_on(on, name).nonzero()[0]


def _take(rows: flow.Table, chosen: Ints) -> flow.Table:
    return rows if len(chosen) == len(rows) else rows.take(chosen)
