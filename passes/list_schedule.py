"""An order for the ops of several devices and streams in which none waits without need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from sagec.dialects import exec as ex

Rank = tuple[int, int, int]
"""Which of several ops that could begin goes first: what the pass goes by (as the layer, or a place
by the critical path), then the micro-batch, of which 0 is what KV loads go behind, then a number of
its own."""

_Stream = tuple[str, str]


def list_schedule(ranks: Mapping[ex.OperatorOp, Rank]) -> list[ex.OperatorOp]:
    """The ops as they begin if each stream, when it is free, takes the op of least rank of those
    that could begin, by their estimated times.

    Makers come before takers, sends before recvs. ranks are in an order in which that holds too.
    """
    before = _before(ranks)
    missing = {op: len(makers) for op, makers in before.items()}
    after: defaultdict[ex.OperatorOp, list[ex.OperatorOp]] = defaultdict(list)
    for op, makers in before.items():
        for maker in makers:
            after[maker].append(op)
    waiting: defaultdict[_Stream, dict[ex.OperatorOp, float]] = defaultdict(dict)
    for op in ranks:
        if not missing[op]:
            waiting[op.device, op.stream_name][op] = 0.0
    ends: dict[ex.OperatorOp, float] = {}
    free: defaultdict[_Stream, float] = defaultdict(float)
    while len(ends) < len(ranks):
        firsts = (_first(ready, free[on], ranks) for on, ready in waiting.items() if ready)
        begin, _, op = min(firsts)
        stream = (op.device, op.stream_name)
        del waiting[stream][op]
        ends[op] = free[stream] = begin + op.estimated_us
        for taker in after[op]:
            missing[taker] -= 1
            if not missing[taker]:
                there = max(ends[maker] for maker in before[taker])
                waiting[taker.device, taker.stream_name][taker] = there
    return list(ends)


def _first(
    ready: Mapping[ex.OperatorOp, float], free_us: float, ranks: Mapping[ex.OperatorOp, Rank]
) -> tuple[float, Rank, ex.OperatorOp]:
    """When a stream goes on, and with which of the ops that wait for it, each since some time."""
    begin = max(free_us, min(ready.values()))
    op = min((op for op, since in ready.items() if since <= begin), key=ranks.__getitem__)
    return begin, ranks[op], op


def _before(ranks: Mapping[ex.OperatorOp, Rank]) -> dict[ex.OperatorOp, set[ex.OperatorOp]]:
    """Of each op, those that it takes something of.

    What brings KV takes nothing, and would fill the memory with the KV of all layers at once: it
    goes behind the op of the first micro-batch that it stands behind.
    """
    sends = {op.number("channel"): op for op in ranks if isinstance(op, ex.SendOp)}
    before: dict[ex.OperatorOp, set[ex.OperatorOp]] = {}
    previous: ex.OperatorOp | None = None
    for op, (_, micro_batch, _) in ranks.items():
        owners = (operand.owner for operand in op.operands)
        before[op] = {owner for owner in owners if isinstance(owner, ex.OperatorOp)}
        if isinstance(op, ex.RecvOp):
            before[op].add(sends[op.number("channel")])
        elif isinstance(op, ex.KVLoadOp) and previous is not None:
            before[op].add(previous)
        if not micro_batch:
            previous = op
    return before
