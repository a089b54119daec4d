"""prefetch-kv: KV that lies far away comes while the layer before computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass

from sagec.dialects import exec as ex
from sagec.passes.errors import PassError
from sagec.passes.streams import (
    Stopwatch,
    add_waits,
    brings_kv,
    drop_waits,
    exec_graphs,
    is_longer,
    put_on,
    replace_body,
)


@dataclass(frozen=True)
class PrefetchKVPass(ModulePass):
    """Load and migrate KV on the stream `copy`, as soon as the layer before begins.

    `norm %h {layer = 0}; ...; norm %g {layer = 1}; %kv = kv_load {layer = 1, tier = "host"};
     attention %q, %kv  -->  %kv = kv_load {layer = 1, stream = "copy"}; norm %h {layer = 0}; ...;
     norm %g {layer = 1}; %there = wait %kv; attention %q, %there`

    depth: how many layers ahead, at most; so many layers' KV lies in memory beside the one in use.
    KV that is on the device, and what is on the stream already, stays as it is. So does a graph
    that would take longer (its makespan, by the estimates).
    """

    name = "prefetch-kv"
    depth: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.depth < 1:
            raise PassError(f"{self.name}: depth={self.depth}; 1 or more layers")
        for graph in exec_graphs(op):
            before_us = Stopwatch().makespan_us(graph)
            attempt = graph.clone()
            if not prefetch(attempt, self.depth):
                continue
            if not is_longer(Stopwatch().makespan_us(attempt), before_us):
                replace_body(graph, attempt)


def prefetch(graph: ex.ExecGraphOp, depth: int) -> bool:
    """Move what can be fetched ahead to its stream and place. Whether there was any."""
    drop_waits(graph)
    far = [op for op in graph.operators if brings_kv(op) and op.stream_name != ex.COPY]
    for op in far:
        put_on(op, ex.COPY)
    numbers = {op: number for number, op in enumerate(graph.operators)}
    sends = {op.number("channel"): op for op in graph.operators if isinstance(op, ex.SendOp)}
    for op in far:
        ahead = [o for o in _made_of(op, depth, sends) if numbers[o] < numbers[op]]
        if ahead:
            _hoist(op, min(ahead, key=numbers.__getitem__))
    add_waits(graph)
    return bool(far)


def _made_of(
    op: ex.OperatorOp, depth: int, sends: Mapping[int, ex.OperatorOp]
) -> set[ex.OperatorOp]:
    """The ops that may compute while `op` brings KV: what its layer's attention is made of, no more
    than `depth` layers back. So they are of its own lane, not of another one."""
    users = _attentions(op)
    layers = [layer for user in users if (layer := user.layer_number) is not None]
    first = min(layers, default=0) - depth
    found: set[ex.OperatorOp] = set()
    while users:
        user = users.pop()
        makers = [value.owner for value in user.operands]
        if isinstance(user, ex.RecvOp):
            makers.append(sends[user.number("channel")])
        for maker in makers:
            assert isinstance(maker, ex.OperatorOp)
            layer = -1 if maker.layer_number is None else maker.layer_number
            if maker not in found and layer >= first and not isinstance(maker, _BRINGS):
                found.add(maker)
                users.append(maker)
    return found


_BRINGS = (ex.KVLoadOp, ex.KVMigrateOp)


def _attentions(op: ex.OperatorOp) -> list[ex.OperatorOp]:
    """The ops that take the KV which `op` brings, wherever it goes before."""
    found, ways = [], [op]
    while ways:
        for result in ways.pop().results:
            for user in (use.operation for use in result.uses):
                if isinstance(user, ex.KVMigrateOp | ex.SliceOp):
                    ways.append(user)
                elif isinstance(user, ex.OperatorOp):
                    found.append(user)
    return found


def _hoist(op: ex.OperatorOp, anchor: ex.OperatorOp) -> None:
    """Put an op above another one, if what it takes is there."""
    block = anchor.parent
    assert block is not None
    if all(_is_above(value.owner, anchor) for value in op.operands):
        block.detach_op(op)
        block.insert_op_before(op, anchor)


def _is_above(maker: Operation | Block, op: Operation) -> bool:
    return isinstance(maker, Operation) and maker.is_before_in_block(op)
