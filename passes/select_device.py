"""select-device: requests without a place get the instances where they prefill and decode."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import Ints, WordsAttr, quoted
from sagec.dialects.rows import symbol
from sagec.passes import flow, solver
from sagec.passes.errors import PassError
from sagec.passes.flow import NOWHERE, Bools
from sagec.passes.separate_phases import decode_tokens
from sagec.passes.topology import Instance, Model, Topology, topology_of
from sagec.passes.turns import turns_of
from sagec.runtime.direct import placement
from sagec.runtime.direct.placement import Assignment, Problem, Sites


@dataclass(frozen=True)
class SelectDevicePass(ModulePass):
    """Choose an instance for each row by predicted time, load, transfer and KV room.

    `pd.prefill %w; pd.decode %kv  -->  pd.prefill %w on @p0; pd.decode %kv on [@d1, @d0]`

    What has a place keeps it, and residents stay. method=greedy takes the rows in rank order;
    improve=true betters its answer by moves and swaps. method=solve asks HiGHS, within
    time_limit_s and gap, and notes on the graph what it reached. Both minimise the makespan, see
    `placement`. An instance whose turn has no steps (`pd.turns`) gets only rows that say so, or
    have no other. Refuses rows that fit nowhere, ask for a model that nothing runs, or would have
    to decode where no path leads.
    """

    name = "select-device"
    method: Literal["greedy", "solve"] = "greedy"
    time_limit_s: int | float = 10.0
    gap: int | float = 0.01
    improve: bool = False

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.time_limit_s <= 0 or self.gap < 0:
            raise PassError(
                f"select-device: time_limit_s {self.time_limit_s}, gap {self.gap}; "
                "the limit is above 0, the gap 0 or more"
            )
        for graph in flow.graphs(op):
            place(graph, topology_of(op), self._answer)

    def _answer(self, problem: Problem) -> Assignment:
        if self.method == "solve":
            return solver.solve(problem, self.time_limit_s, self.gap)
        answer = placement.greedy(problem)
        return placement.improve(problem, answer) if self.improve else answer


def place(graph: pd.GraphOp, topology: Topology, answer: Callable[[Problem], Assignment]) -> None:
    """Set `on` of the graph's prefills and decodes that lack it.

    Raises PassError where a row can be placed nowhere.
    """
    ops = flow.ops_in(graph)
    prefills = [op for op in ops if isinstance(op, pd.PrefillOp)]
    decodes = [op for op in ops if isinstance(op, pd.DecodeOp)]
    if all(map(_is_placed, prefills)) and all(map(_is_placed, decodes)):
        return
    rows = _Rows(prefills, decodes)
    candidates = _Candidates(graph, rows, topology)
    if (pair := candidates.only_pair()) is not None:
        where = (WordsAttr.same(pair[0], len(rows)), WordsAttr.same(pair[1], len(rows)))
    elif len(rows):
        problem = candidates.problem()
        found = answer(problem)
        where = candidates.words(problem.sites, found)
        if found.gap is not None:
            graph.attributes["placement"] = StringAttr(_note(found, placement.greedy(problem)))
    else:
        where = (rows.on, rows.decode_on)
    rows.write(*where)


def _note(found: Assignment, greedy: Assignment) -> str:
    return (
        f"solve: makespan {found.makespan_us:.0f} us, gap {found.gap:.1%} ({found.status}), "
        f"greedy {greedy.makespan_us:.0f} us"
    )


def _is_placed(op: pd.PrefillOp | pd.DecodeOp) -> bool:
    if op.on is None:
        return False
    return NOWHERE not in op.on.words or NOWHERE not in op.on.rows()


# What there is to place

_NO_ROWS: Ints = np.zeros(0, np.int64)


@dataclass(frozen=True)
class _Part:
    """Rows that a decode takes from one op.

    place: of each, NOWHERE where it is open. fresh: those that a prefill of this graph made, and
    whose rows, among all that are prefilled, are `of`. None: all of them, none is resident.
    """

    value: SSAValue
    place: WordsAttr | None
    fresh: Ints
    of: Ints


class _Rows:
    """The rows that a graph prefills, and the decodes that take them.

    on, decode_on: where a row must be, NOWHERE where that is open. decoded: whether a decode
    takes it. parts: what each decode takes, in its order.
    """

    def __init__(self, prefills: Sequence[pd.PrefillOp], decodes: Sequence[pd.DecodeOp]) -> None:
        self.prefills = prefills
        tables = [flow.table(op.wave) for op in prefills]
        self.table = flow.joined(tables)
        begins = itertools.accumulate(map(len, tables), initial=0)
        self.begins = dict(zip(prefills, begins, strict=False))
        places = [_pinned(t.place, op.on) for t, op in zip(tables, prefills, strict=True)]
        self.on = places[0] if len(places) == 1 else flow.joined_words(places)
        self.decode_on = self.table.decode_place
        self.parts = {op: [*self._parts(op.kv)] for op in decodes}
        self.decoded = np.zeros(len(self.table), np.bool_)
        for op, parts in self.parts.items():
            self._pin(op, parts)

    def __len__(self) -> int:
        return len(self.table)

    def _parts(self, value: SSAValue) -> Iterator[_Part]:
        """The parts of a value, found where its rows were made or moved."""
        op = value.owner
        match op:
            case pd.JoinOp():
                for part in op.parts:
                    yield from self._parts(part)
            case pd.PhaseOp() if (last := op.body.block.last_op) is not None:
                yield from self._parts(last.operands[op.results.index(value)])
            case pd.DecodeOp() | pd.DecideOp():
                yield from self._parts(op.operands[0])
            case pd.PrefillOp():
                rows, begin = np.arange(pd.rows_of(value)), self.begins[op]
                yield _Part(value, None, rows, rows + begin if begin else rows)
            case pd.ResidentOp() if isinstance(place := op.properties.get("on"), WordsAttr):
                yield _Part(value, place, _NO_ROWS, _NO_ROWS)
            case _:
                yield self._part(value)

    def _part(self, value: SSAValue) -> _Part:
        """The part of rows that were moved, or of residents that are left."""
        table = flow.table(value)
        fresh = np.flatnonzero(~table.resident)
        if not fresh.size:
            return _Part(value, table.place, fresh, fresh)
        index = {name: row for row, name in enumerate(self.table.names)}
        of = np.array([index[table.names[row]] for row in fresh.tolist()], np.int64)
        before = self.on.take(of).rows()
        now = table.place.take(fresh).rows()
        moved = [
            there if there != here else NOWHERE for here, there in zip(before, now, strict=True)
        ]
        place = flow.placed(table.place, fresh, WordsAttr.from_rows(moved))
        return _Part(value, place, fresh, of)

    def _pin(self, op: pd.DecodeOp, parts: list[_Part]) -> None:
        """Take what the decode, or a transfer before it, says of the place of fresh rows."""
        begin, on = 0, op.on
        for part in parts:
            end = begin + pd.rows_of(part.value)
            if part.fresh.size:
                self.decoded[part.of] = True
                if part.place is not None:
                    self._take_places(part.of, part.place.take(part.fresh))
                if on is not None:
                    self._take_places(part.of, on.take(begin + part.fresh))
            begin = end

    def _take_places(self, of: Ints, said: WordsAttr) -> None:
        pinned = _pinned(self.decode_on.take(of), said)
        self.decode_on = flow.placed(self.decode_on, of, pinned)

    def write(self, on: WordsAttr, decode_on: WordsAttr) -> None:
        """Set `on` of each op that lacks it, from the places of all rows."""
        for op, begin in self.begins.items():
            if not _is_placed(op):
                op.properties["on"] = _compact(on, np.arange(begin, begin + pd.rows_of(op.wave)))
        for decode, parts in self.parts.items():
            if not _is_placed(decode):
                words = flow.joined_words([_placed_part(part, decode_on) for part in parts])
                decode.properties["on"] = words if decode.on is None else _pinned(words, decode.on)


def _placed_part(part: _Part, decode_on: WordsAttr) -> WordsAttr:
    if part.place is None:
        return _compact(decode_on, part.of)
    if not part.fresh.size:
        return part.place
    return flow.placed(part.place, part.fresh, decode_on.take(part.of))


def _compact(column: WordsAttr, rows: Ints) -> WordsAttr:
    """The column of these rows, with no word that none of them has."""
    if len(column.words) == 1:
        return column if len(rows) == len(column) else column.take(rows)
    codes = column.codes[rows]
    used = np.bincount(codes, minlength=len(column.words)) > 0
    words = [column.words[word] for word in np.flatnonzero(used).tolist()]
    return WordsAttr.of(words, (used.cumsum() - 1)[codes])


def _pinned(open_words: WordsAttr, said: WordsAttr | None) -> WordsAttr:
    """`open_words`, and where `said` has a place, that."""
    if said is None or said.words == (NOWHERE,):
        return open_words
    rows = np.flatnonzero(np.array([bool(word) for word in said.words])[said.codes])
    return flow.placed(open_words, rows, said.take(rows))


# Who may have it


class _Candidates:
    """The instances that may prefill and decode the rows of a graph.

    Raises PassError where the graph asks for what no cluster could give: an instance or a model
    that is not there, a row that names no model where there are several, both phases on one
    instance of a strict graph.
    """

    def __init__(self, graph: pd.GraphOp, rows: _Rows, topology: Topology) -> None:
        self.graph, self.rows, self.topology = graph, rows, topology
        turns = turns_of(flow.ops_of(graph, pd.TurnsOp), topology)
        self.paused = [name for name, steps in turns.items() if not steps]
        self.at = rows.prefills[0] if rows.prefills else graph
        self.need = np.where(rows.table.generate >= pd.UNBOUNDED, 0, rows.table.generate)
        self.need = rows.table.prompt + self.need
        self.models = [self._model(code) for code in range(len(rows.table.model.words))]
        self.returning = self._returning()
        if graph.text("mode", "hybrid") == "strict":
            self._refuse_shared()
        for op, parts in rows.parts.items():
            for place in (part.place for part in parts):
                if place is not None:
                    self._check_words(place, op)

    def only_pair(self) -> tuple[str, str] | None:
        """The instances of all rows where there is no choice, which is cheap to see."""
        rows, instances = self.rows, self.topology.instances
        nothing_said = rows.on.words == rows.decode_on.words == (NOWHERE,)
        if not nothing_said or self.returning or len(self.models) != 1 or not len(rows):
            return None
        prefills = [i for i in instances if i.runs("prefill") and i.model is self.models[0]]
        decodes = [i for i in instances if i.runs("decode") and i.model is self.models[0]]
        if not len(prefills) == len(decodes) == 1:
            return None
        here, there = prefills[0], decodes[0]
        fits = _capacity(there) >= self.need.max() and _capacity(here) >= rows.table.prompt.max()
        if not fits or not rows.decoded.all() or self.topology.path(here, there) is None:
            return None
        return here.name, there.name

    def problem(self) -> Problem:
        """The rows and where they may be.

        Raises PassError for the first that can be nowhere.
        """
        returning = tuple(self.returning)
        sites = placement.sites_of(self.topology, returning=returning)
        if self.paused:
            problem = self._problem(sites, self.paused)
            if problem.stuck_row() is None:
                return problem
        problem = self._problem(sites)
        if problem.stuck_row() is None:
            return problem
        problem = self._problem(placement.sites_of(self.topology, False, returning))
        if (stuck := problem.stuck_row()) is None:
            return problem
        raise self._refusal(stuck)

    def words(self, sites: Sites, found: Assignment) -> tuple[WordsAttr, WordsAttr]:
        """The names of the instances that an answer chose."""
        names = [*(instance.name for instance in self.topology.instances), NOWHERE]
        here = np.array(sites.prefill_at, np.int64)[found.prefill]
        there = np.array(sites.decode_at, np.int64)[found.decode]
        return WordsAttr.of(names, here), WordsAttr.of(names, there)

    def _problem(self, sites: Sites, avoid: Collection[str] = ()) -> Problem:
        table, decoded = self.rows.table, self.rows.decoded
        decodes = np.where(decoded, decode_tokens(table, 0), 0)
        begin, matches = table.computed + table.cached, table.matches
        if matches.on:
            names = [self.topology.instances[index].name for index in sites.prefill_at]
            there = np.array([matches.of(name) for name in names]).reshape(len(names), len(table))
            begin = np.maximum(begin, table.computed + there)
        loads = self._loads(sites)
        problem = placement.problem_of(sites, begin, table.prompt, decodes, *loads)
        may_prefill = self._mask(sites, sites.prefill_at, "prefill", self.rows.on, table.prompt)
        may_decode = self._mask(
            sites, sites.decode_at[:-1], "decode", self.rows.decode_on, self.need
        )
        if avoid:
            may_prefill = self._elsewhere(may_prefill, sites.prefill_at, avoid)
            may_decode = self._elsewhere(may_decode, sites.decode_at[:-1], avoid)
        return problem.where(may_prefill, may_decode, decoded)

    def _loads(self, sites: Sites) -> tuple[placement.Floats, placement.Floats]:
        """What the instances have to do for residents."""
        at, context, decodes = [], [], []
        index = {instance.name: instance.index for instance in self.topology.instances}
        for parts in self.rows.parts.values():
            for value, place in ((part.value, part.place) for part in parts):
                if place is None:
                    continue
                table = flow.table(value)
                numbers = np.array([index.get(word, 0) for word in place.words], np.int64)
                at.append(numbers[place.codes])
                context.append(table.prompt)
                decodes.append(np.where(table.resident, decode_tokens(table, 0), 0))
        if not at:
            zeros = np.zeros(sites.num_instances + 1)
            return zeros, zeros
        joined = (np.concatenate(columns) for columns in (at, context, decodes))
        return placement.loads_of(sites, *joined)

    def _mask(
        self, sites: Sites, at: Sequence[int], phase: str, on: WordsAttr, tokens: Ints
    ) -> Bools:
        """[rows, sites]: by model, by what was said, and by room for the row alone."""
        self._check_words(on, self.at, phase)
        instances = [self.topology.instances[index] for index in at]
        may = tokens[:, None] <= sites.capacity_tokens[list(at)]
        if len(self.topology.models) > 1:
            runs = [[instance.model is model for instance in instances] for model in self.models]
            may &= np.array(runs, np.bool_)[self.rows.table.model.codes]
        if on.words != (NOWHERE,):
            said = [
                [word in (NOWHERE, instance.name) for instance in instances] for word in on.words
            ]
            may &= np.array(said, np.bool_)[on.codes]
        if phase == "prefill":
            for index, whole in self.returning.items():
                may[:, at.index(index)] &= whole
        return may

    def _elsewhere(self, may: Bools, at: Sequence[int], avoid: Collection[str]) -> Bools:
        """[rows, sites]: without the sites to avoid, for each row that has others."""
        apart = [self.topology.instances[index].name not in avoid for index in at]
        others = may & np.array(apart, np.bool_)  # also of no sites at all
        return np.where(others.any(axis=1, keepdims=True), others, may)

    def _returning(self) -> dict[int, Bools]:
        """Instances that do not prefill, by number, and which rows go on there all the same: those
        of whose prompt the instance has all but the last token, for that one is like a decode; and
        those that have begun there, for an engine may have found less than it was thought to have.
        """
        table, on, found = self.rows.table, self.rows.on, {}
        for name in dict.fromkeys((*table.matches.on, *filter(None, on.words))):
            instance = self.topology.instance(name, self.at)
            if instance.runs("prefill"):
                continue
            said = on.codes == (on.words.index(name) if name in on.words else len(on.words))
            there = np.maximum(np.where(said, table.cached, 0), table.matches.of(name))
            whole = (there > 0) & (there == table.prompt - table.computed - 1)
            whole |= said & (table.computed > 0)
            if whole.any():
                found[instance.index] = whole
        return found

    # What is refused

    def _model(self, code: int) -> Model | None:
        """The model that the rows of this code ask for."""
        word = self.rows.table.model.words[code]
        there = {i.model.name: i.model for i in self.topology.instances}
        names = ", ".join(map(symbol, there)) or "none; declare a cluster.instance"
        if word in there:
            return there[word]
        if word == NOWHERE and len(there) == 1:
            return next(iter(there.values()))
        asking = np.flatnonzero(self.rows.table.model.codes == code)
        if not asking.size:
            return None
        name = quoted(self.rows.table.names[asking[0]])
        if word != NOWHERE:
            raise PassError(
                f"{name}: no instance runs model {symbol(word)}; there are: {names}", self.at
            )
        if not there:
            raise PassError(f"{name}: no instance runs its model; there are: {names}", self.at)
        raise PassError(f"{name} names no model; name one of those that run: {names}", self.at)

    def _refuse_shared(self) -> None:
        for instance in self.topology.instances:
            if instance.role == "both" and any(model is instance.model for model in self.models):
                raise PassError(
                    f"instance {symbol(instance.name)} has role both, and graph "
                    f"{symbol(self.graph.symbol)} is strict: one phase an instance; give it role "
                    'prefill or decode, or the graph mode = "time-share" or "hybrid"',
                    instance.op,
                )

    def _check_words(self, words: WordsAttr, op: Operation, phase: str = "") -> None:
        """Raise where a row is on an instance that is not there, or lacks the phase's role."""
        for code, word in enumerate(words.words):
            if word == NOWHERE or not (words.codes == code).any():
                continue
            instance = self.topology.instance(word, op)
            wrong = words.codes == code
            if phase == "prefill" and instance.index in self.returning:
                wrong &= ~self.returning[instance.index]
            if phase and not instance.runs(phase) and wrong.any():
                row = np.flatnonzero(wrong)[0]
                able = ", ".join(symbol(i.name) for i in self.topology.instances if i.runs(phase))
                raise PassError(
                    f"{quoted(self.rows.table.names[row])} is to {phase} on {symbol(word)}, whose "
                    f"role is {instance.role}; instances that {phase}: {able or 'none'}",
                    op,
                )

    def _refusal(self, row: int) -> PassError:
        """Why a row can be nowhere."""
        table, name = self.rows.table, quoted(self.rows.table.names[row])
        model = self.models[table.model.codes[row]]
        assert model is not None
        ends = []
        for phase, on, need, what in (
            ("prefill", self.rows.on, table.prompt[row], "its prompt"),
            ("decode", self.rows.decode_on, self.need[row], "with its output it"),
        ):
            if phase == "decode" and not self.rows.decoded[row]:
                continue
            said = on.words[on.codes[row]]
            able = [i for i in self.topology.instances if i.runs(phase) and i.model is model]
            may = [i for i in able if said in (NOWHERE, i.name)]
            if not may:
                return PassError(
                    _no_instance(name, phase, said, model, self.topology, able), self.at
                )
            if not (fits := [i for i in may if need <= _capacity(i)]):
                return PassError(_too_large(name, what, int(need), may), self.at)
            ends.append(", ".join(symbol(instance.name) for instance in fits))
        return PassError(
            f"{name}: no path for its KV from {ends[0]} to {ends[-1]}; declare a cluster.link "
            "between their devices, or place it on an instance with role both",
            self.at,
        )


def _capacity(instance: Instance) -> int:
    return instance.kv_blocks * instance.block_tokens


def _no_instance(
    name: str, phase: str, said: str, model: Model, topology: Topology, able: list[Instance]
) -> str:
    there = ", ".join(symbol(instance.name) for instance in able)
    if not able:
        return (
            f"{name}: no instance of model {symbol(model.name)} has role {phase} or both; "
            "change a role, or declare a cluster.instance"
        )
    runs = topology.by_name[said].model.name
    return (
        f"{name} asks for model {symbol(model.name)} and is to {phase} on {symbol(said)}, which "
        f"runs {symbol(runs)}; instances that {phase} {symbol(model.name)}: {there}"
    )


def _too_large(name: str, what: str, tokens: int, may: list[Instance]) -> str:
    largest = max(may, key=_capacity)
    blocks = -(-tokens // largest.block_tokens)
    return (
        f"{name}: {what} needs {blocks} KV blocks of {largest.block_tokens} tokens "
        f"({tokens} tokens), and {symbol(largest.name)}, the largest that may hold it, has "
        f"{largest.kv_blocks}; give it more kv_blocks, or the request less to generate"
    )
