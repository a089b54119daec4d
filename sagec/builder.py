"""Requests and decisions into graphs: a handful of wide ops, however many requests there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Ints, NamesAttr, WordsAttr
from sagec.dialects.scalars import int_attr
from sagec.passes import flow
from sagec.runtime.plan import SWAP
from sagec.runtime.request import Request
from sagec.runtime.state import ADMIT, ANY, REJECT, Decision, Running, State, Strings, Waiting


@dataclass(frozen=True)
class IRNode:
    """An op of a graph, as a plain Python program sees it."""

    op: Operation

    @property
    def name(self) -> str:
        """The op's name, e.g. `pd.prefill`."""
        return self.op.name

    @property
    def requests(self) -> tuple[str, ...]:
        """Ids of the requests that the op gives or names."""
        if isinstance(self.op, pd.TableOp):
            return self.op.names
        return flow.table(self.op.results[0]).names if self.op.results else ()

    @property
    def inputs(self) -> list[IRNode]:
        """The nodes whose values it uses, each once."""
        makers = dict.fromkeys(o.owner for o in self.op.operands if isinstance(o.owner, Operation))
        return [IRNode(maker) for maker in makers]

    @property
    def users(self) -> list[IRNode]:
        """The nodes that use its values, each once."""
        users = dict.fromkeys(use.operation for r in self.op.results for use in r.uses)
        return [IRNode(user) for user in users]


@dataclass(frozen=True)
class IRGraph:
    """A serving graph and the module, with its cluster, that it stands in."""

    module: ModuleOp
    op: pd.GraphOp

    @property
    def name(self) -> str:
        """The graph's symbol."""
        return self.op.symbol

    @property
    def nodes(self) -> list[IRNode]:
        """The graph's ops with those of its phases, in order."""
        return [IRNode(op) for op in flow.ops_in(self.op)]

    def __iter__(self) -> Iterator[IRNode]:
        return iter(self.nodes)

    def __str__(self) -> str:
        return str(self.module)


class IRBuilder:
    """Builds graphs into a module that declares a cluster.

    mode, horizon, policy: what the graphs say; horizon 0 plans all steps. chunk: most tokens of a
    prompt in a step, 0: no bound. A graph is appended to the module; `drop` takes it out again.
    """

    def __init__(
        self,
        cluster: ModuleOp | None = None,
        *,
        mode: str = "hybrid",
        horizon: int = 0,
        policy: str = "",
        chunk: int = 0,
    ) -> None:
        self.module = cluster if cluster is not None else ModuleOp([])
        self.mode, self.horizon, self.policy, self.chunk = mode, horizon, policy, chunk

    def build(self, requests: Sequence[Request], name: str = "serve") -> IRGraph:
        """The graph that prefills and decodes all these requests.

        >>> graph = IRBuilder().build([Request(id="a", prompt=(1, 2, 3))])
        >>> [node.name for node in graph]
        ['pd.requests', 'pd.prefill', 'pd.decode', 'pd.yield']
        """
        wave = pd.RequestsOp.of(_request_columns(requests))
        prefill = pd.PrefillOp.of(wave.wave, self._chunk())
        decode = pd.DecodeOp.of(prefill.kv)
        return self._graph(name, [wave, prefill, decode], decode.end, {})

    def build_round(self, state: State, decision: Decision) -> IRGraph:
        """The graph of one scheduling round: who waits, what was decided, what already runs."""
        ops: list[Operation] = []
        if decision.turn_steps is not None:
            ops += _turns(state, decision.turn_steps)
        parts = [*_residents(state, decision, ops), *self._prefills(state, decision, ops)]
        end: SSAValue | None = None
        if parts:
            end = parts[0]
            if len(parts) > 1:
                join = pd.JoinOp.of(parts)
                ops.append(join)
                end = join.kv
            decode = pd.DecodeOp.of(end)
            ops.append(decode)
            end = decode.end
        numbers = {
            "now": state.now_us,
            "round": state.round,
            "horizon": decision.horizon_steps or self.horizon,
            "step_prompt_tokens": decision.step_prompt_tokens,
        }
        return self._graph(f"round_{state.round}", ops, end, numbers, decision.mode)

    def drop(self, graph: IRGraph) -> None:
        """Take a graph out of the module, for good."""
        graph.op.detach()  # type: ignore[no-untyped-call]
        graph.op.erase(safe_erase=False)

    def _prefills(self, state: State, decision: Decision, ops: list[Operation]) -> list[SSAValue]:
        """Prefills of the prompts under way, and of what was decided to begin."""
        waves: list[SSAValue] = []
        if (columns := _started_columns(state, decision)) is not None:
            ops.append(started := pd.RequestsOp.of(columns))
            waves.append(started.wave)
        if len(state.waiting):
            ops.append(asked := pd.RequestsOp.of(_waiting_columns(state.waiting)))
            wave: SSAValue = asked.wave
            if (matches := _matches(state, decision)) is not None:
                match = kv.MatchOp.over(wave, flow.match_columns(asked.names, matches))
                ops.append(match)
                wave = match.matched
            ops.append(decide := pd.DecideOp.over(wave, _decided(state, decision, asked)))
            waves.append(decide.verdicts)
        prefills = [pd.PrefillOp.of(wave, self._chunk()) for wave in waves]
        ops.extend(prefills)
        return [prefill.kv for prefill in prefills]

    def _chunk(self) -> dict[str, Attribute]:
        return {"chunk": int_attr(self.chunk)} if self.chunk else {}

    def _graph(
        self,
        name: str,
        ops: list[Operation],
        end: SSAValue | None,
        numbers: dict[str, int],
        mode: str = "",
    ) -> IRGraph:
        properties: dict[str, Attribute] = {"sym_name": StringAttr(name)}
        if self.policy:
            properties["policy"] = StringAttr(self.policy)
        properties["mode"] = StringAttr(mode or self.mode)
        properties |= {key: int_attr(value) for key, value in numbers.items() if value}
        last = pd.YieldOp.create(operands=[end] if end is not None else [])
        graph = pd.GraphOp.create(properties=properties, regions=[Region(Block([*ops, last]))])
        self.module.body.block.add_op(graph)
        return IRGraph(self.module, graph)


# Columns. Those that say nothing but defaults are left out, and words are numbered as they appear,
# so that a graph is the one that its text gives: attribute for attribute, and in its plans' digest.


def _request_columns(requests: Sequence[Request]) -> dict[str, Attribute]:
    columns: dict[str, Attribute] = {
        "ids": NamesAttr.of(request.id for request in requests),
        "prompt": ColumnAttr.of([len(request.prompt) for request in requests]),
    }
    numbers = {
        "generate": ([r.max_output_tokens or pd.UNBOUNDED for r in requests], pd.UNBOUNDED),
        "arrived": ([r.arrival_us for r in requests], 0),
        "priority": ([r.priority for r in requests], 0),
        "ttft": ([r.ttft_us or 0 for r in requests], 0),
        "tpot": ([r.tpot_us or 0 for r in requests], 0),
    }
    for name, (values, default) in numbers.items():
        if any(value != default for value in values):
            columns[name] = ColumnAttr.of(values)
    for name in ("model", "tenant", "session", "adapter"):
        if any(words := [getattr(request, name) for request in requests]):
            columns[name] = WordsAttr.from_rows(words)
    return columns


def _waiting_columns(waiting: Waiting) -> dict[str, Attribute]:
    columns: dict[str, Attribute] = {
        "ids": _names(waiting.ids),
        "prompt": ColumnAttr.of(waiting.prompt_tokens),
    }
    if np.count_nonzero(waiting.generate_tokens != pd.UNBOUNDED):
        columns["generate"] = ColumnAttr.of(waiting.generate_tokens)
    if np.count_nonzero(waiting.arrival_us):
        columns["arrived"] = ColumnAttr.of(waiting.arrival_us)
    return columns | _promises(waiting) | _named(waiting)


def _promises(asked: Waiting | Running) -> dict[str, Attribute]:
    columns: dict[str, Attribute] = {}
    for name, column in (
        ("priority", asked.priority),
        ("ttft", asked.ttft_us),
        ("tpot", asked.tpot_us),
    ):
        if np.count_nonzero(column):
            columns[name] = ColumnAttr.of(column)
    if "ttft" in columns:
        late = np.where(asked.ttft_us > 0, asked.arrival_us + asked.ttft_us, 0)
        columns["deadline"] = ColumnAttr.of(late)
    return columns


def _named(asked: Waiting | Running) -> dict[str, Attribute]:
    columns: dict[str, Attribute] = {}
    for name in ("model", "tenant", "session", "adapter"):
        column: Strings = getattr(asked, name)
        if np.count_nonzero(column):
            columns[name] = WordsAttr.from_rows(column.tolist())
    return columns


def _names(ids: Strings) -> NamesAttr:
    return NamesAttr(tuple(ids.tolist()))


def _decided(state: State, decision: Decision, asked: pd.RequestsOp) -> dict[str, Attribute]:
    """The rows of a pd.decide: the strategy's verdicts are those of the dialect, in other words."""
    verdict = _VERDICT_CODES[decision.verdict]
    columns: dict[str, Attribute] = {
        "ids": asked.properties["ids"],
        "verdict": ColumnAttr.of(verdict),
        "rank": ColumnAttr.of(_dense_ranks(verdict, decision.rank)),
    }
    if any(reasons := decision.reason.tolist()):
        columns["because"] = WordsAttr.from_rows(reasons)
    for name, chosen in (("prefill_on", decision.prefill_on), ("decode_on", decision.decode_on)):
        if np.count_nonzero(chosen != ANY):
            columns[name] = _places(state, chosen)
    if np.count_nonzero(decision.chunk_tokens):
        columns["chunk"] = ColumnAttr.of(decision.chunk_tokens)
    return columns


def _matches(state: State, decision: Decision) -> flow.Matches | None:
    """What instances have of the admitted already, where it may be of use: an instance that does
    not prefill goes on with a prompt only where no more than the last token is to be computed."""
    if not np.count_nonzero(state.cached_tokens):
        return None
    instances, cached = state.instances, state.cached_tokens
    chosen = decision.prefill_on[:, None]
    goes_on = cached == (state.waiting.prompt_tokens - 1)[:, None]
    useful = instances.prefills | (instances.decodes & goes_on)
    useful &= (chosen == ANY) | (chosen == instances.rows)
    useful &= (decision.verdict == ADMIT)[:, None]
    tokens = np.where(useful, cached, 0)
    if not np.count_nonzero(tokens):
        return None
    return flow.Matches(tuple(instances.ids.tolist()), tokens)


_VERDICT_CODES = np.zeros(3, np.int64)
_VERDICT_CODES[[ADMIT, 1, REJECT]] = pd.ADMIT, pd.DEFER, pd.REJECT


def _dense_ranks(verdict: Ints, rank: Ints) -> Ints:
    """Ranks of the admitted from 0 on without gaps; a strategy may leave some."""
    rows = np.flatnonzero(verdict == pd.ADMIT)
    dense = np.zeros(len(verdict), np.int64)
    dense[rows[np.argsort(rank[rows], kind="stable")]] = np.arange(len(rows))
    return dense


def _places(state: State, chosen: Ints) -> WordsAttr:
    """Names of the chosen instances; ANY is no name."""
    names = (*state.instances.ids.tolist(), "")
    return flow.compact(names, np.where(chosen == ANY, len(names) - 1, chosen))


def _turns(state: State, steps: Ints) -> Iterator[Operation]:
    """A pd.turns of the instances that may not compute as they like, if there are any."""
    bound = np.flatnonzero(steps != ANY)
    if bound.size:
        ids, column = _names(state.instances.ids[bound]), ColumnAttr.of(steps[bound])
        yield pd.TurnsOp.create(properties={"ids": ids, "steps": column})


# Running requests


def _residents(state: State, decision: Decision, ops: list[Operation]) -> list[SSAValue]:
    """What decodes already, and what must leave."""
    running = state.running
    if not len(running):
        return []
    done = running.arriving | (running.computed_tokens >= running.prompt_tokens)
    done[decision.preempt_rows] = False
    parts = _resident_part(
        state, None if np.count_nonzero(done) == len(done) else done.nonzero()[0], ops
    )
    if decision.preempt_rows.size:
        gone = pd.ResidentOp.of(_resident_columns(state, decision.preempt_rows))
        ops.append(gone)
        ops.append(pd.PreemptOp.over(gone.kv, _preempted(decision, gone)))
    return parts


def _resident_part(state: State, rows: Ints | None, ops: list[Operation]) -> list[SSAValue]:
    if rows is not None and not rows.size:
        return []
    ops.append(resident := pd.ResidentOp.of(_resident_columns(state, rows)))
    return [resident.results[0]]


def _resident_columns(state: State, rows: Ints | None) -> dict[str, Attribute]:
    """The columns of these rows of `state.running`, or of all of them."""
    running = state.running

    def taken(column: Any) -> Any:
        return column if rows is None else column[rows]

    arriving, remaining = taken(running.arriving), taken(running.remaining_tokens)
    context = np.maximum(taken(running.computed_tokens), 1)
    if np.count_nonzero(arriving):
        context = np.where(arriving, taken(running.prompt_tokens), context)
    columns: dict[str, Attribute] = {
        "ids": _names(taken(running.ids)),
        "on": flow.compact(state.instances.ids.tolist(), taken(running.instance)),
        "context": ColumnAttr.of(context),
    }
    if np.count_nonzero(remaining != pd.UNBOUNDED):
        columns["remaining"] = ColumnAttr.of(remaining)
    if np.count_nonzero(arriving):
        columns["arriving"] = ColumnAttr.of(arriving)
    return columns


def _preempted(decision: Decision, gone: pd.ResidentOp) -> dict[str, Attribute]:
    how = np.where(decision.preempt_how == SWAP, pd.SWAP, pd.PREEMPT)
    columns: dict[str, Attribute] = {
        "ids": gone.properties["ids"],
        "verdict": ColumnAttr.of(how),
        "on": gone.properties["on"],
    }
    if any(reasons := decision.preempt_reason.tolist()):
        columns["because"] = WordsAttr.from_rows(reasons)
    return columns


def _decode_places(state: State, chosen: Ints) -> WordsAttr:
    """Where rows decode: nowhere said for one whose output ends with its prompt, and which so
    stays where only prompts are computed."""
    decodes = state.instances.role != "prefill"
    return _places(state, np.where(decodes[chosen], chosen, ANY))


def _started_columns(state: State, decision: Decision) -> dict[str, Attribute] | None:
    """Prompts under way: they go on where they are, before anything new."""
    running = state.running
    started = ~running.arriving & (running.computed_tokens < running.prompt_tokens)
    started[decision.preempt_rows] = False
    if not np.count_nonzero(started):
        return None
    rows = np.flatnonzero(started)
    columns: dict[str, Attribute] = {
        "ids": _names(running.ids[rows]),
        "prompt": ColumnAttr.of(running.prompt_tokens[rows]),
        "on": _places(state, running.instance[rows]),
        "decode_on": _decode_places(state, running.decode_on[rows]),
    }
    generate = np.maximum(running.remaining_tokens[rows], 1)
    if (generate != pd.UNBOUNDED).any():
        columns["generate"] = ColumnAttr.of(generate)
    if (computed := running.computed_tokens[rows]).any():
        columns["computed"] = ColumnAttr.of(computed)
    if (cached := running.cached_tokens[rows]).any():
        columns["cached"] = ColumnAttr.of(cached)
    if (models := running.model[rows]).any():
        columns["model"] = WordsAttr.from_rows(models.tolist())
    return columns
