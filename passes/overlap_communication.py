"""overlap-communication: messages run on a stream of their own, beside what does not need them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass

from sagec.dialects import exec as ex
from sagec.passes.errors import PassError
from sagec.passes.list_schedule import Rank, list_schedule
from sagec.passes.micro_batches import split_rows
from sagec.passes.streams import (
    Stopwatch,
    add_waits,
    arrange,
    drop_waits,
    exec_graphs,
    in_step,
    is_longer,
    issued_early,
    put_on,
    replace_body,
)
from sagec.passes.topology import Topology, topology_of

_MESSAGES = (ex.CollectiveOp, ex.SendOp, ex.RecvOp)


@dataclass(frozen=True)
class OverlapCommunicationPass(ModulePass):
    """Put collectives, sends and recvs on the stream `comm`, and have each stream wait as late as
    it can.

    `%s = all_reduce %p; kv_store %k; norm %h, %s  -->  %q = wait %p {stream = "comm"};
     %s = all_reduce %q {stream = "comm"}; kv_store %k; %t = wait %s; norm %h, %t`

    Lanes that share a device take turns, one computing while the other's messages are on their way.
    Of several orders the fastest is taken: that of the text; first what has most behind it; lane
    after lane. KV from afar stays behind what it stood behind, for it needs memory.

    micro_batches=2: also cut the rows of each lane in two, between requests, where the estimates
    say that this is faster still: each half reads the weights once more, and hides the other's
    messages.

    A graph whose messages are on `comm` already is left alone, and so is one that would take longer
    (its makespan or its critical path, by the estimates).
    """

    name = "overlap-communication"
    micro_batches: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.micro_batches not in (1, 2):
            raise PassError(f"{self.name}: micro_batches={self.micro_batches}; 1 or 2")
        topology = topology_of(op)
        for graph in exec_graphs(op):
            overlap(graph, topology, self.micro_batches)


def overlap(graph: ex.ExecGraphOp, topology: Topology, micro_batches: int = 1) -> None:
    """Put a graph's messages on their own stream, in the fastest of the ways that are tried.

    Raises PassError where rows are to be cut and a device or link of the graph is not declared.
    """
    ops = graph.operators
    if all(op.stream_name == ex.COMM for op in ops if isinstance(op, _MESSAGES)):
        return
    best: ex.ExecGraphOp | None = None
    best_us, path_us = Stopwatch().makespan_us(graph), Stopwatch().critical_path_us(graph)
    for attempt in _attempts(graph, topology, micro_batches):
        us = Stopwatch().makespan_us(attempt)
        if is_longer(Stopwatch().critical_path_us(attempt), path_us):
            continue
        if is_longer(best_us, us) or (best is None and not is_longer(us, best_us)):
            best, best_us = attempt, us
    if best is not None:
        replace_body(graph, best)


def _attempts(
    graph: ex.ExecGraphOp, topology: Topology, micro_batches: int
) -> Iterator[ex.ExecGraphOp]:
    """The graph in other orders, simple ones first: of the text, by what is behind an op, and lane
    after lane; the last two of halves too."""
    for is_split in (False, True)[:micro_batches]:
        moved = graph.clone()
        drop_waits(moved)
        second = split_rows(moved, topology) if is_split else frozenset[Operation]()
        _move_messages(moved)
        text = list(moved.operators)
        orders = [] if is_split else [text]
        orders += [list_schedule(ranks(text, second)) for ranks in (_by_work_behind, _by_lane)]
        for order in (order for order in orders if in_step(text, order)):
            arrange(moved, issued_early(order))
            attempt = moved.clone()
            add_waits(attempt)
            yield attempt


def _move_messages(graph: ex.ExecGraphOp) -> None:
    for op in graph.operators:
        if isinstance(op, _MESSAGES):
            put_on(op, ex.COMM)


def _by_work_behind(
    ops: Sequence[ex.OperatorOp], second: Set[Operation]
) -> dict[ex.OperatorOp, Rank]:
    """First what has the longest way to the end: the critical path. Lanes go abreast.

    What nobody waits for, as storing KV, ranks as the next layer does: it fills gaps until then,
    and what it holds in memory is free again.
    """
    behind_us: dict[Operation, float] = {}
    of_layer: defaultdict[tuple[str, int | None], float] = defaultdict(float)
    recvs = {op.number("channel"): op for op in ops if isinstance(op, ex.RecvOp)}
    for op in reversed(ops):
        layer = op.layer_number
        takers = [use.operation for result in op.results for use in result.uses]
        if isinstance(op, ex.SendOp):
            takers.append(recvs[op.number("channel")])
        us = op.estimated_us + max((behind_us.get(taker, 0.0) for taker in takers), default=0.0)
        if takers:
            of_layer[op.device, layer] = max(of_layer[op.device, layer], us)
        elif layer is not None:
            us += of_layer[op.device, layer + 1]
        behind_us[op] = us
    by_way = sorted(ops, key=lambda op: -behind_us[op])
    places = {op: place for place, op in enumerate(by_way)}
    return {op: (places[op], int(op in second), at) for at, op in enumerate(ops)}


def _by_lane(ops: Sequence[ex.OperatorOp], second: Set[Operation]) -> dict[ex.OperatorOp, Rank]:
    """First what stands first, and all of the second halves behind: one lane goes ahead, so that in
    a pipeline the next stage begins the sooner."""
    halves = ((op, int(op in second)) for op in ops)
    return {op: (half, half, at) for at, (op, half) in enumerate(halves)}
