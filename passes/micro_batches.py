"""The rows of a step cut in two, so that one half computes while the other's messages travel.

A lane is what becomes of one `exec.embedding`. Its rows are those of its requests, one after the
other; the cut lies between two requests, as near to the middle as can be. Ops that treat each row
by itself become two; the others, as `exec.lm_head`, take both halves put together again.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from xdsl.ir import Attribute, Operation, SSAValue

from sagec.dialects import exec as ex
from sagec.dialects.columns import ColumnAttr
from sagec.dialects.scalars import int_attr
from sagec.passes.scaled_costs import ScaledCosts
from sagec.passes.streams import shared_groups
from sagec.passes.topology import Topology

_BY_ROW = (
    ex.NormOp, ex.QKVOp, ex.FFNOp, ex.ProjectionOp, ex.AttentionOp, ex.KVStoreOp, ex.AllReduceOp,
    ex.SendOp, ex.RecvOp,
)  # fmt: skip
"""What treats each row by itself; so do other collectives, where they share out columns."""


def split_rows(graph: ex.ExecGraphOp, topology: Topology) -> Set[Operation]:
    """Cut each lane of a graph without waits in two, where it has two requests. The ops of the
    second halves.

    `%n = norm %h; %q = qkv %n  -->  %h0 = slice %h; %n0 = norm %h0; %h1 = slice %h {first = 8};
     %n1 = norm %h1; %q0 = qkv %n0; %q1 = qkv %n1`

    Raises PassError where a device or link of the graph is not declared.
    """
    rows = _Rows(graph)
    cutter = _Cutter(graph, rows, rows.cuts(), ScaledCosts(topology, graph))
    cutter.run()
    return cutter.second


@dataclass(frozen=True)
class _Span:
    """The rows [begin, end) of a lane. lane: its embedding."""

    lane: Operation
    begin: int
    end: int

    def halves(self, cut: int) -> tuple[_Span, _Span]:
        """Those before the cut, and those behind it; either may be empty."""
        middle = min(max(cut, self.begin), self.end)
        return replace(self, end=middle), replace(self, begin=middle)

    @property
    def count(self) -> int:
        return self.end - self.begin


class _Rows:
    """Which rows of which lane the values of a graph are, where each row is treated by itself."""

    def __init__(self, graph: ex.ExecGraphOp) -> None:
        self.spans: dict[SSAValue, _Span] = {}
        self.attentions: list[ex.AttentionOp] = []
        self._sent: dict[int, _Span] = {}
        self._shared = shared_groups(graph)
        for op in graph.operators:
            if isinstance(op, ex.EmbeddingOp):
                self.spans[op.hidden] = _Span(op, 0, ex.tensor_of(op.hidden).shape[0])
            elif self.is_by_row(op):
                self._follow(op)

    def is_by_row(self, op: ex.OperatorOp) -> bool:
        """Whether an op treats each row by itself; messages that other lanes share stay whole."""
        if isinstance(op, ex.CollectiveOp) and op.group in self._shared:
            return False
        if isinstance(op, ex.AllGatherOp | ex.ReduceScatterOp):
            return op.number("axis") > 0
        return isinstance(op, _BY_ROW)

    def _follow(self, op: ex.OperatorOp) -> None:
        taken = [self.spans.get(operand) for operand in op.operands]
        match op:
            case ex.SendOp() if taken[0] is not None:
                self._sent[op.number("channel")] = taken[0]
            case ex.RecvOp() if (span := self._sent.get(op.number("channel"))) is not None:
                self.spans[op.received] = span
            case ex.AttentionOp() if taken[0] is not None:
                begin = taken[0].begin + op.number("first")
                span = _Span(taken[0].lane, begin, begin + int(op.new_tokens.sum()))
                self.spans |= dict.fromkeys(op.results, span)
                self.attentions.append(op)
            case ex.ProjectionOp() if (joined := _joined(taken)) is not None:
                self.spans[op.added] = joined
            case ex.CollectiveOp():
                pairs = zip(op.results, taken, strict=True)
                self.spans |= {result: span for result, span in pairs if span is not None}
            case ex.NormOp() | ex.QKVOp() | ex.FFNOp() if len({*taken} - {None}) == 1:
                self.spans |= dict.fromkeys(op.results, next(span for span in taken if span))
            case _:
                pass

    def cuts(self) -> dict[Operation, int]:
        """Of each lane that can be cut, the first row of its second half."""
        allowed = {
            span.lane: set(range(span.begin + 1, span.end))
            for value, span in self.spans.items()
            if value.owner is span.lane
        }
        for op in self.attentions:
            span = self.spans[op.results[0]]
            ends = span.begin + np.cumsum(op.new_tokens)
            inside = set(range(span.begin + 1, span.end)) - set(ends.tolist())
            allowed[span.lane] -= inside
        middle = {lane: ex.tensor_of(lane.results[0]).shape[0] / 2 for lane in allowed}
        return {
            lane: min(cuts, key=lambda cut: (abs(cut - middle[lane]), cut))
            for lane, cuts in allowed.items()
            if cuts
        }


def _joined(spans: Sequence[_Span | None]) -> _Span | None:
    """The rows of several values, if they follow each other in one lane."""
    whole = spans[0]
    for span in spans[1:]:
        if whole is None or span is None or (span.lane, span.begin) != (whole.lane, whole.end):
            return None
        whole = replace(whole, end=span.end)
    return whole


class _Cutter:
    """Writes two ops for one, in the order of the text."""

    def __init__(
        self,
        graph: ex.ExecGraphOp,
        rows: _Rows,
        cuts: dict[Operation, int],
        costs: ScaledCosts,
    ) -> None:
        self.graph, self.rows, self.cuts, self.costs = graph, rows, cuts, costs
        self.parts: dict[tuple[SSAValue, int], SSAValue] = {}
        self.wholes: dict[SSAValue, SSAValue] = {}
        self.done: dict[Operation, None] = {}
        self.second: set[Operation] = set()
        channels = [op.number("channel") for op in graph.operators if isinstance(op, ex.SendOp)]
        self.channels = max(channels, default=-1) + 1
        self.second_channel: dict[int, int] = {}

    def run(self) -> None:
        """Cut all ops; then take away what was cut."""
        for op in list(self.graph.body.block.ops):
            if isinstance(op, ex.OperatorOp) and self._is_cut(op):
                self.done[op] = None
                for half in (0, 1):
                    self._write(op, half)
            else:
                for at, operand in enumerate(op.operands):
                    op.operands[at] = self._whole(operand, op)
        for op in reversed(list(self.done)):
            self.graph.body.block.erase_op(op)

    def _is_cut(self, op: ex.OperatorOp) -> bool:
        """Whether an op becomes two: its rows are known, and all that are, are of lanes that are
        cut."""
        spans = [self.rows.spans.get(value) for value in (*op.operands, *op.results)]
        made = spans[len(op.operands) :] or spans
        known = all(span is None or span.lane in self.cuts for span in spans)
        return self.rows.is_by_row(op) and None not in made and known

    def _half(self, value: SSAValue, half: int) -> _Span:
        span = self.rows.spans[value]
        return span.halves(self.cuts[span.lane])[half]

    def _write(self, op: ex.OperatorOp, half: int) -> None:
        """One half of an op, if it has rows there."""
        results = [value for value in op.results if self._half(value, half).count]
        if not results and (op.results or not self._half(op.operands[0], half).count):
            return
        properties: dict[str, Attribute] = {}
        if isinstance(op, ex.AttentionOp):
            operands, properties = self._attended(op, half)
        else:
            operands = self._taken(op, half)
        if isinstance(op, ex.SendOp | ex.RecvOp) and half:
            properties["channel"] = int_attr(self._second_channel(op))
        types = [_with_rows(value, self._half(value, half).count) for value in results]
        made = type(op).create(
            operands=operands,
            result_types=types,
            properties=op.properties | properties,
            attributes=op.attributes,
            location=op.location,
        )
        made.properties |= self.costs.of(op, made)
        self._insert(made, op)
        if half:
            self.second.add(made)
        self.parts |= {
            (value, half): part for value, part in zip(results, made.results, strict=True)
        }

    def _taken(self, op: ex.OperatorOp, half: int) -> list[SSAValue]:
        """What half of an op takes of each operand that has rows there. Where nobody knows the rows
        of an operand, they are those of the op."""
        rows = self.rows.spans[[*op.results, *op.operands][0]]
        for value in op.operands:
            self.rows.spans.setdefault(value, rows)
        return [self._part(v, half, op) for v in op.operands if self._half(v, half).count]

    def _part(self, value: SSAValue, half: int, op: ex.OperatorOp) -> SSAValue:
        """Half of a value."""
        if (value, half) not in self.parts:
            span = self._half(value, half)
            first = span.begin - self.rows.spans[value].begin
            self.parts[value, half] = self._slice(value, first, span.count, op)
        return self.parts[value, half]

    def _slice(self, value: SSAValue, first: int, count: int, op: ex.OperatorOp) -> SSAValue:
        """Some rows, as a view: it takes no time."""
        if count == ex.tensor_of(value).shape[0]:
            return value
        made = ex.SliceOp.of(
            [value], [_with_rows(value, count)], first=first or None, layer=op.layer_number
        )
        self._insert(made, op)
        return made.part

    def _attended(
        self, op: ex.AttentionOp, half: int
    ) -> tuple[list[SSAValue], dict[str, Attribute]]:
        """What half of an attention takes: rows of the queries, and its requests' KV; and what it
        says of them."""
        qkv, kv = op.operands
        span, rows = self._half(op.results[0], half), self._half(qkv, half)
        begins = self.rows.spans[op.results[0]].begin + np.cumsum(op.new_tokens) - op.new_tokens
        chosen = (begins >= span.begin) & (begins < span.end)
        before = int(op.context_tokens[begins < span.begin].sum())
        tokens = int(op.context_tokens[chosen].sum())
        said: dict[str, Attribute] = {
            name: ColumnAttr.of(op.column(name)[chosen]) for name in op.COLUMNS
        }
        said["first"] = int_attr(span.begin - rows.begin)
        return [self._part(qkv, half, op), self._slice(kv, before, tokens, op)], said

    def _whole(self, value: SSAValue, user: Operation) -> SSAValue:
        """A value as it was before the cut."""
        if value.owner not in self.done:
            return value
        if value not in self.wholes:
            parts = [self.parts[value, half] for half in (0, 1) if (value, half) in self.parts]
            self.wholes[value] = parts[0]
            if len(parts) > 1:
                self.wholes[value] = self._concat(parts, value, user)
        return self.wholes[value]

    def _concat(self, parts: list[SSAValue], value: SSAValue, user: Operation) -> SSAValue:
        maker = value.owner
        assert isinstance(maker, ex.OperatorOp) and isinstance(value.type, ex.TensorType)
        moved = 2.0 * value.type.data.num_bytes
        us = round(self.costs.operator_us(maker, 0.0, moved), 3)
        made = ex.ConcatOp.of(
            parts, [value.type], layer=maker.layer_number, time_us=us, bytes=moved
        )
        self._insert(made, user)
        return made.whole

    def _second_channel(self, op: ex.OperatorOp) -> int:
        channel = op.number("channel")
        if channel not in self.second_channel:
            self.second_channel[channel] = self.channels
            self.channels += 1
        return self.second_channel[channel]

    def _insert(self, made: Operation, before: Operation) -> None:
        self.graph.body.block.insert_op_before(made, before)


def _with_rows(value: SSAValue, count: int) -> ex.TensorType:
    """A value's type with another number of rows."""
    tensor = ex.tensor_of(value)
    return ex.TensorType.of((count, *tensor.shape[1:]), tensor.dtype, tensor.device)
