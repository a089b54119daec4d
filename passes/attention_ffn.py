"""Attention and feed-forward in pools of their own: how separate-phases parts a graph's layers.

Feed-forward goes to other devices, and what it takes and makes goes there and back by messages.
Rows go in micro-batches, so that each pool computes one while the other's results travel: the
ping-pong of MegaScale-Infer and Step-3. Whether it pays, the times of operators and links say.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from xdsl.dialects.builtin import SymbolRefAttr
from xdsl.ir import Attribute, OpResult, SSAValue
from xdsl.rewriter import Rewriter

from sagec.dialects import exec as ex
from sagec.dialects.columns import ColumnAttr, Ints
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import attr_of
from sagec.passes.errors import PassError
from sagec.passes.execution_graph import ExecutionGraph
from sagec.passes.list_schedule import Rank, list_schedule
from sagec.passes.messages import link_between
from sagec.passes.scaled_costs import ScaledCosts
from sagec.passes.streams import (
    add_waits,
    arrange,
    drop_waits,
    forget_memory,
    is_longer,
    replace_body,
)
from sagec.passes.topology import Topology


@dataclass(frozen=True)
class Pool:
    """The devices that compute feed-forward, a rank each, and by what name they were asked for."""

    name: str
    devices: tuple[str, ...]

    @classmethod
    def named(cls, name: str, topology: Topology) -> Pool:
        """The devices of an instance, or a device alone. Raises PassError where neither is there,
        or none is named."""
        if name in topology.by_name:
            return cls(name, tuple(device.name for device in topology.by_name[name].devices))
        if name in topology.devices:
            return cls(name, (name,))
        there = ", ".join(map(symbol, (*topology.by_name, *topology.devices))) or "none"
        what = f"ffn={name} is no instance and no device" if name else "ffn= is missing"
        raise PassError(f"scheme=af: {what}; say where feed-forward goes, one of: {there}")


def part_layers(graph: ex.ExecGraphOp, pool: Pool, topology: Topology, count: int) -> None:
    """Move the feed-forward of a graph to a pool, in so many micro-batches of its rows.

    `norm; ffn; norm  -->  norm; send; recv @f0; ffn @f0; send @f0; recv; norm`, a micro-batch each

    Raises PassError where that takes longer than the graph as it is, with the times.
    """
    if _is_parted(graph, pool):
        return
    _check_pool(graph, pool)
    attempt = graph.clone()
    _Parting(attempt, pool, topology, count).rewrite()
    if not is_longer(_makespan_us(graph), _makespan_us(attempt)):
        raise PassError(_why_not(graph, attempt, pool, count), graph)
    replace_body(graph, attempt)


def _is_parted(graph: ex.ExecGraphOp, pool: Pool) -> bool:
    """Whether all feed-forward is in the pool, and no attention."""
    kinds = ex.FFNOp | ex.AttentionOp
    ops = [op for op in graph.operators if isinstance(op, kinds)]
    return all((op.device in pool.devices) == isinstance(op, ex.FFNOp) for op in ops)


def _makespan_us(graph: ex.ExecGraphOp) -> float:
    return ExecutionGraph(graph).makespan_us()


def _check_pool(graph: ex.ExecGraphOp, pool: Pool) -> None:
    ranks = graph.scalar("tp")
    if ranks != len(pool.devices):
        raise PassError(
            f"scheme=af: {symbol(pool.name)} has {len(pool.devices)} devices, and exec.graph "
            f"{symbol(graph.symbol)} has tp {ranks}; each rank sends to its like, so {ranks} it "
            "must be",
            graph,
        )
    groups = [op.group for op in graph.operators if isinstance(op, ex.CollectiveOp)]
    used = {*itertools.chain(*groups), *(op.device for op in graph.operators)}
    if shared := sorted(used.intersection(pool.devices)):
        raise PassError(
            f"scheme=af: {symbol(shared[0])} of {symbol(pool.name)} computes attention of "
            f"exec.graph {symbol(graph.symbol)} already; name a pool of other devices",
            graph,
        )


class _Parting:
    """Rewrites one graph; see `part_layers`.

    parts: of each value of the layers, what it is in each micro-batch; None where that has no rows
    of it, as decode attention in a micro-batch of prompts.
    """

    def __init__(self, graph: ex.ExecGraphOp, pool: Pool, topology: Topology, count: int) -> None:
        self.graph, self.pool, self.topology, self.count = graph, pool, topology, count
        self.costs = ScaledCosts(topology, graph)
        self.parts: dict[SSAValue, list[SSAValue | None]] = {}
        self.joined: dict[SSAValue, SSAValue] = {}
        self.moved: dict[tuple[SSAValue, str], SSAValue] = {}
        self.channels: dict[tuple[int, int], int] = {}
        self.ranks: dict[ex.OperatorOp, Rank] = {}
        self.layer = -1
        self.micro_batch = 0

    def rewrite(self) -> None:
        """Part the graph's rows and layers, and put its ops in an order that keeps pools busy."""
        forget_memory(self.graph)
        drop_waits(self.graph)
        ops = list(self.graph.operators)
        self.sends = {op.number("channel"): op for op in ops if isinstance(op, ex.SendOp)}
        self.next_channel = max(self.sends, default=-1) + 1
        self.cuts = self._cuts(ops)
        replaced = [op for op in ops if self._is_of_layers(op)]
        within = set(replaced)
        for op in ops:
            self._enter(op)
            if op in within:
                self._part(op)
            else:
                self._keep(op)
        last = self.graph.body.block.last_op
        assert last is not None
        for at, operand in enumerate(last.operands):
            last.operands[at] = self._whole(operand)
        for op in reversed(replaced):
            Rewriter.erase_op(op)
        arrange(self.graph, list_schedule(self.ranks))
        add_waits(self.graph)

    def _is_of_layers(self, op: ex.OperatorOp) -> bool:
        """Whether its rows are parted: an op of a layer, other than what brings KV, or a message
        between stages."""
        if isinstance(op, ex.SendOp | ex.RecvOp):
            return True
        brings_kv = isinstance(op, ex.KVLoadOp | ex.KVMigrateOp)
        return op.layer_number is not None and not brings_kv

    def _enter(self, op: ex.OperatorOp) -> None:
        """Note the layer for the order of what is made next; the first and last ops have none."""
        if isinstance(op, ex.InputOp | ex.EmbeddingOp):
            self.layer = -1
        elif op.layer_number is not None:
            self.layer = op.layer_number
        elif not isinstance(op, ex.SendOp | ex.RecvOp):
            self.layer = _LAST

    # Rows.

    def _cuts(self, ops: Sequence[ex.OperatorOp]) -> dict[SSAValue, Ints]:
        """Where to cut the rows of each stream that enters the layers: between requests, as near
        to even as can be."""
        attentions: dict[SSAValue, list[ex.AttentionOp]] = {}
        for op in ops:
            if isinstance(op, ex.AttentionOp):
                attentions.setdefault(self._stream_of(op.operands[0]), []).append(op)
        return {value: self._cut(value, users) for value, users in attentions.items()}

    def _cuts_of(self, value: SSAValue) -> Ints:
        """Those of a stream; rows that no attention takes may be cut anywhere."""
        if value not in self.cuts:
            self.cuts[value] = self._cut(value, ())
        return self.cuts[value]

    def _stream_of(self, value: SSAValue) -> SSAValue:
        """What enters the layers where this value's rows come from."""
        while isinstance(op := value.owner, ex.OperatorOp) and self._is_of_layers(op):
            if isinstance(op, ex.RecvOp):
                op = self.sends[op.number("channel")]
            at = value.index if isinstance(op, ex.AllReduceOp) else 0  # type: ignore[attr-defined]
            value = op.operands[at]
        return value

    def _cut(self, value: SSAValue, attentions: Sequence[ex.AttentionOp]) -> Ints:
        rows = ex.tensor_of(value).shape[0]
        free = np.ones(rows + 1, bool)
        for op in attentions:
            begin = op.number("first")
            ends = begin + np.cumsum(op.new_tokens)
            free[begin + 1 : int(ends[-1])] = False
            free[ends] = True
        choices = np.flatnonzero(free)
        if (most := len(choices) - 1) < self.count:
            requests = f"{most} request{'s' * (most > 1)}"
            raise PassError(
                f"scheme=af: exec.graph {symbol(self.graph.symbol)} computes {requests} together, "
                f"too few for {self.count} micro-batches; at most micro_batches={most}",
                self.graph,
            )
        cuts = [0]
        for part in range(1, self.count):
            left = choices[choices > cuts[-1]][: part - self.count]
            cuts.append(int(left[np.abs(left - rows * part / self.count).argmin()]))
        return np.array([*cuts, rows])

    # Values.

    def _at(self, value: SSAValue, micro_batch: int, device: str) -> SSAValue | None:
        """A micro-batch's rows of a value, on a device."""
        if value not in self.parts:
            ranges = itertools.pairwise(map(int, self._cuts_of(value)))
            self.parts[value] = [self._slice(value, begin, end) for begin, end in ranges]
            self._name(value)
        part = self.parts[value][micro_batch]
        return None if part is None else self._sent(part, device)

    def _slice(self, value: SSAValue, begin: int, end: int) -> SSAValue:
        """Rows [begin, end), which lie where they are."""
        if (begin, end) == (0, ex.tensor_of(value).shape[0]):
            return value
        kind = _with_rows(value, end - begin)
        op = ex.SliceOp.of([value], [kind], first=begin or None, layer=self._layer)
        return self._put(op).results[0]

    def _whole(self, value: SSAValue) -> SSAValue:
        """All rows of a value that may be parted, on the device where it was."""
        if value not in self.parts or not self._is_of_layers(_maker(value)):
            return value
        if value not in self.joined:
            home = ex.tensor_of(value).device
            parts = [self._at(value, part, home) for part in range(self.count)]
            there = [part for part in parts if part is not None]
            self.joined[value] = there[0] if len(there) == 1 else self._concat(there, value)
        return self.joined[value]

    def _concat(self, parts: Sequence[SSAValue], like: SSAValue) -> SSAValue:
        assert isinstance(like.type, ex.TensorType)
        tensor = ex.tensor_of(like)
        moved = 2.0 * tensor.num_bytes
        us = round(self.costs.operator_us(_maker(like), 0.0, moved), 3)
        op = ex.ConcatOp.of(parts, [like.type], time_us=us, bytes=moved)
        self._put(op)
        op.whole.name_hint = like.name_hint
        return op.whole

    def _sent(self, value: SSAValue, device: str) -> SSAValue:
        """A value on a device, by a message if it is on another."""
        here = ex.tensor_of(value)
        if here.device == device:
            return value
        if (value, device) not in self.moved:
            self.moved[value, device] = self._send(value, here, device)
        return self.moved[value, device]

    def _send(self, value: SSAValue, here: ex.Tensor, device: str) -> SSAValue:
        channel = self._new_channel()
        peers: list[dict[str, Attribute]] = [
            {"peer": SymbolRefAttr(d)} for d in (device, here.device)
        ]
        num_bytes, layer = float(here.num_bytes), _maker(value).layer_number
        send = ex.SendOp.of([value], [], more=peers[0], stream=ex.COMM, layer=layer,
                            channel=channel, bytes=num_bytes)  # fmt: skip
        us = link_between(self.topology, here.device, device, send).send_us(num_bytes)
        send.properties["time_us"] = attr_of(round(us, 3))
        self._put(send)
        there = ex.TensorType.of(here.shape, here.dtype, device)
        recv = ex.RecvOp.of([], [there], more=peers[1], stream=ex.COMM, layer=layer,
                            channel=channel, bytes=num_bytes)  # fmt: skip
        self._put(recv)
        recv.received.name_hint = value.name_hint and f"{value.name_hint}.{device}"
        return recv.received

    def _new_channel(self) -> int:
        self.next_channel += 1
        return self.next_channel - 1

    @property
    def _layer(self) -> int | None:
        return self.layer if 0 <= self.layer < _LAST else None

    # Operators.

    def _put(self, op: ex.OperatorOp) -> ex.OperatorOp:
        last = self.graph.body.block.last_op
        assert last is not None
        self.graph.body.block.insert_op_before(op, last)
        return self._ranked(op)

    def _ranked(self, op: ex.OperatorOp) -> ex.OperatorOp:
        self.ranks[op] = (self.layer, self.micro_batch, len(self.ranks))
        return op

    def _keep(self, op: ex.OperatorOp) -> None:
        """An op before, behind or beside the layers: it takes whole values."""
        self.micro_batch = 0
        for at, operand in enumerate(op.operands):
            op.operands[at] = self._whole(operand)
        self._ranked(op)

    def _part(self, op: ex.OperatorOp) -> None:
        """An op of the layers, once a micro-batch."""
        made: list[Sequence[SSAValue | None]] = []
        for part in range(self.count):
            self.micro_batch = part
            made.append(self._parted(op, part))
        for at, result in enumerate(op.results):
            self.parts[result] = [results[at] for results in made]
            self._name(result)

    def _name(self, value: SSAValue) -> None:
        """Call the parts of `%a` `%a.0`, `%a.1`, ..."""
        for number, part in enumerate(self.parts[value]):
            if part is not None and part is not value and value.name_hint:
                part.name_hint = f"{value.name_hint}.{number}"

    def _parted(self, op: ex.OperatorOp, part: int) -> Sequence[SSAValue | None]:
        match op:
            case ex.AttentionOp():
                return self._attention(op, part)
            case ex.RecvOp():
                return self._recv(op, part)
            case ex.SendOp():
                self.channels[op.number("channel"), part] = self._new_channel()
                channel = attr_of(self.channels[op.number("channel"), part])
                return self._clone(op, part, op.device, channel=channel)
            case ex.FFNOp():
                return self._clone(op, part, self.pool.devices[0])
            case ex.AllReduceOp():
                return self._all_reduce(op, part)
            case ex.NormOp() | ex.QKVOp() | ex.ProjectionOp() | ex.KVStoreOp():
                return self._clone(op, part, op.device)
        raise PassError(
            f"scheme=af: {op.name} in layer {op.layer_number} of exec.graph "
            f"{symbol(self.graph.symbol)} mixes rows of several micro-batches; use dp 1, and rows "
            "that are not parted yet",
            op,
        )

    def _clone(
        self, op: ex.OperatorOp, part: int, device: str, **changed: Attribute
    ) -> Sequence[SSAValue | None]:
        """The op on a micro-batch's rows and on a device; nothing where there are none."""
        operands = [self._at(operand, part, device) for operand in op.operands]
        there = [operand for operand in operands if operand is not None]
        if not there:
            return [None] * len(op.results)
        rows = sum(ex.tensor_of(operand).shape[0] for operand in there)
        if not isinstance(op, ex.ProjectionOp):
            rows = ex.tensor_of(there[0]).shape[0]
        kinds = [_with_rows(result, rows, device) for result in op.results]
        return self._created(op, there, kinds, changed)

    def _created(
        self,
        op: ex.OperatorOp,
        operands: Sequence[SSAValue],
        kinds: Sequence[ex.TensorType],
        changed: dict[str, Attribute],
    ) -> Sequence[OpResult]:
        """An op like another, with other tensors, and the costs that it then has."""
        made = type(op).create(
            operands=operands, result_types=kinds, properties=op.properties | changed
        )
        made.properties |= self.costs.of(op, made)
        return self._put(made).results

    def _all_reduce(self, op: ex.AllReduceOp, part: int) -> Sequence[SSAValue | None]:
        """Where its parts are: sums of feed-forward are made in its pool."""
        first = self.parts[op.operands[0]][part]
        assert first is not None
        device = ex.tensor_of(first).device
        moved = device in self.pool.devices
        group = self.pool.devices if moved else op.group
        return self._clone(op, part, device, ranks=ex.ranks_of(group))

    def _recv(self, op: ex.RecvOp, part: int) -> Sequence[SSAValue]:
        channel = op.number("channel")
        sent = self.parts[self.sends[channel].operands[0]][part]
        assert sent is not None
        kind = _with_rows(op.results[0], ex.tensor_of(sent).shape[0])
        number = attr_of(self.channels[channel, part])
        return self._created(op, [], [kind], {"channel": number})

    def _attention(self, op: ex.AttentionOp, part: int) -> Sequence[SSAValue | None]:
        """Those of its requests whose rows are in the micro-batch, with their KV."""
        qkv, kv = op.operands
        begin, end = self.cuts[self._stream_of(qkv)][part : part + 2]
        ends = op.number("first") + np.cumsum(op.new_tokens)
        mine = np.flatnonzero((ends > begin) & (ends <= end))
        if not len(mine):
            return None, None
        context = np.concatenate([[0], np.cumsum(op.context_tokens)])
        rows = int(op.new_tokens[mine].sum())
        first = int(ends[mine[-1]]) - rows - int(begin)
        columns = {name: ColumnAttr.of(op.column(name)[mine]) for name in op.COLUMNS}
        mine_kv = self._slice(kv, int(context[mine[0]]), int(context[mine[-1] + 1]))
        rows_of_qkv = self._at(qkv, part, op.device)
        assert rows_of_qkv is not None
        kinds = [_with_rows(result, rows) for result in op.results]
        changed: dict[str, Attribute] = {**columns, "first": attr_of(first)}
        if mine_kv is not kv:
            mine_kv.name_hint = kv.name_hint and f"{kv.name_hint}.{part}"
        return self._created(op, [rows_of_qkv, mine_kv], kinds, changed)


_LAST = 1 << 62
"""Behind all layers."""


def _maker(value: SSAValue) -> ex.OperatorOp:
    assert isinstance(value.owner, ex.OperatorOp)
    return value.owner


def _with_rows(value: SSAValue, rows: int, device: str | None = None) -> ex.TensorType:
    """A tensor type like a value's, with so many rows."""
    tensor = ex.tensor_of(value)
    return ex.TensorType.of((rows, *tensor.shape[1:]), tensor.dtype, device or tensor.device)


# What it would have taken.


def _why_not(graph: ex.ExecGraphOp, attempt: ex.ExecGraphOp, pool: Pool, count: int) -> str:
    """That it does not pay, with the times of a layer, and what they say."""
    layer = next(op.layer_number for op in graph.operators if isinstance(op, ex.FFNOp))
    ops = [op for op in attempt.operators if op.layer_number == layer]
    attention = ffn = there = back = 0.0
    for op in ops:
        away = op.device in pool.devices
        if not isinstance(op, ex.SendOp):
            ffn, attention = ffn + op.estimated_us * away, attention + op.estimated_us * (not away)
        elif op.other in pool.devices:
            there += op.estimated_us
        elif away:
            back += op.estimated_us
    longest = max(attention, ffn)
    if max(there, back) >= longest:
        why = "the link is busy longer than either pool computes"
    elif (attention + ffn + there + back) / count > longest:
        why = "the others do not hide a micro-batch's way there and back"
    else:
        why = "micro-batches take longer together than all rows at once"
    return (
        f"scheme=af does not pay: exec.graph {symbol(graph.symbol)} takes "
        f"{_makespan_us(graph):.1f} us as it is and {_makespan_us(attempt):.1f} us with "
        f"feed-forward on {symbol(pool.name)} in {count} micro-batches; layer {layer} "
        f"then takes {attention:.1f} us of attention, {ffn:.1f} us of feed-forward, and "
        f"messages of {there:.1f} us there and {back:.1f} us back; dead zone: {why}"
    )
