"""fuse-communication: small messages that need not follow each other go as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass

from sagec.dialects import exec as ex
from sagec.dialects.scalars import attr_of
from sagec.passes.errors import PassError
from sagec.passes.messages import Rings, message_bytes, message_us
from sagec.passes.streams import Stopwatch, exec_graphs, forget_memory, is_longer, shared_groups
from sagec.passes.topology import topology_of

_LATENCY_SHARE = 0.1
"""Of a message's time, what must be latency so that it is worth while to save another's."""


@dataclass(frozen=True)
class FuseCommunicationPass(ModulePass):
    """Make adjacent collectives one with several operands: a group waits for its latency once.

    `%b = all_reduce %a; %d = all_reduce %c  -->  %b, %d = all_reduce %a, %c`

    They are of one kind, group, stream and element type, and neither needs the other; of the group,
    the graph shows one device (of replicas that exchange tokens, all must send the same). They are
    adjacent where one can go to the other's place past ops that have nothing to do with it; no
    other op moves. The fused message has at most `bytes`; where nobody says, so many that a tenth
    of its time is latency, by the module's links.

    A fused message is there when its last part is. Where that makes the step longer, by its
    makespan or by its critical path, the two stay apart.
    """

    name = "fuse-communication"
    bytes: int | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.bytes is not None and self.bytes < 1:
            raise PassError(f"{self.name}: bytes={self.bytes}; 1 or more")
        rings = Rings(topology_of(op))
        for graph in exec_graphs(op):
            fuse_messages(graph, rings, self.bytes)


def fuse_messages(graph: ex.ExecGraphOp, rings: Rings, most_bytes: int | None) -> None:
    """Fuse pairs of collectives until no pair is left that pays.

    Raises PassError where no link leads from one device of a group to the next.
    """
    stopwatch = Stopwatch()
    while _fuse_what_pays(graph, rings, most_bytes, stopwatch):
        pass  # a pair that did not pay may do so beside one that did


def _fuse_what_pays(
    graph: ex.ExecGraphOp, rings: Rings, most_bytes: int | None, stopwatch: Stopwatch
) -> bool:
    """Try to fuse each collective with the last one above it that is like it. Whether any was."""
    shared = shared_groups(graph)
    best, fused_any = _times_us(graph, stopwatch), False
    last: dict[object, ex.CollectiveOp] = {}
    for op in [op for op in graph.operators if isinstance(op, ex.CollectiveOp)]:
        likeness = _likeness(op)
        first = last.get(likeness)
        last[likeness] = op
        if first is None or op.group in shared or not _may_fuse(first, op, rings, most_bytes):
            continue
        fusion = _Fusion(first, op, rings)
        times = _times_us(graph, stopwatch)
        if any(map(is_longer, times, best)):
            fusion.undo()
        else:
            fusion.settle()
            forget_memory(graph)
            last[likeness], best, fused_any = fusion.fused, times, True
    return fused_any


def _times_us(graph: ex.ExecGraphOp, stopwatch: Stopwatch) -> tuple[float, float]:
    """What must not grow."""
    return stopwatch.makespan_us(graph), stopwatch.critical_path_us(graph)


def _may_fuse(
    first: ex.CollectiveOp, second: ex.CollectiveOp, rings: Rings, most_bytes: int | None
) -> bool:
    """Whether two collectives are adjacent, and small enough together."""
    if _place(first, second) is None:
        return False
    if most_bytes is None:
        # A hop takes latency + bytes / ranks / bandwidth, and half_bytes as long as a latency.
        most = rings.of(second).half_bytes * len(second.group) * (1 / _LATENCY_SHARE - 1)
    else:
        most = most_bytes
    return message_bytes(first) + message_bytes(second) <= most


def _likeness(op: ex.CollectiveOp) -> object:
    """What two collectives must have in common; the device too, for lanes of two ranks of a group
    show the same message from both."""
    axis = None if isinstance(op, ex.AllReduceOp) else op.number("axis")
    dtype = ex.tensor_of(op.operands[0]).dtype
    return type(op), op.device, op.group, op.stream_name, axis, dtype


def _place(first: ex.CollectiveOp, second: ex.CollectiveOp) -> ex.CollectiveOp | None:
    """Whose place a fusion of both can take; None: something stands between them.

    The first's, where nothing between makes what the second takes; else the second's, where nothing
    between takes what the first makes.
    """
    between = set(_ops_between(first, second))
    if first in _makers(second):
        return None
    if not between & _makers(second):
        return first
    users = {use.operation for result in first.results for use in result.uses}
    return None if between & users else second


def _ops_between(first: Operation, second: Operation) -> Iterator[Operation]:
    op = first.next_op
    while op is not None and op is not second:
        yield op
        op = op.next_op


def _makers(op: Operation) -> set[Operation]:
    return {value.owner for value in op.operands if isinstance(value.owner, Operation)}


class _Fusion:
    """Two collectives that have become one, until it is settled whether they stay so."""

    def __init__(self, first: ex.CollectiveOp, second: ex.CollectiveOp, rings: Rings) -> None:
        place = _place(first, second)
        assert place is not None and place.parent is not None
        self.block = place.parent
        self.parts = (first, second)
        self.fused = _fused(first, second, rings)
        self.behind = [part.next_op for part in self.parts]
        self.block.insert_op_before(self.fused, place)
        self._swap([*first.results, *second.results], self.fused.results)
        for part in self.parts:
            self.block.detach_op(part)

    def settle(self) -> None:
        """Forget the parts."""
        for part in self.parts:
            part.erase()

    def undo(self) -> None:
        """Have the graph as it was."""
        for part, behind in reversed(list(zip(self.parts, self.behind, strict=True))):
            assert behind is not None, "a collective is not the last op of a block"
            self.block.insert_op_before(part, behind)
        first, second = self.parts
        self._swap(self.fused.results, [*first.results, *second.results])
        self.block.erase_op(self.fused)

    @staticmethod
    def _swap(old: Sequence[SSAValue], new: Sequence[SSAValue]) -> None:
        for before, after in zip(old, new, strict=True):
            before.replace_all_uses_with(after)


def _fused(first: ex.CollectiveOp, second: ex.CollectiveOp, rings: Rings) -> ex.CollectiveOp:
    """One collective for two. It takes as long as they do, less what the links say is saved."""
    ring, sizes = rings.of(first), [message_bytes(first), message_bytes(second)]
    apart_us = sum(message_us(first, ring, size) for size in sizes)
    share = message_us(first, ring, sum(sizes)) / apart_us if apart_us else 1.0
    costs = {name: float(first.scalar(name)) + float(second.scalar(name)) for name in _COSTS}
    costs["time_us"] *= share
    properties: dict[str, Attribute] = {
        name: first.properties[name] for name in _SAME if name in first.properties
    }
    properties |= {name: attr_of(round(cost, 3)) for name, cost in costs.items() if cost}
    return type(first).create(
        operands=[*first.operands, *second.operands],
        result_types=[value.type for value in (*first.results, *second.results)],
        properties=properties,
        location=first.location,
    )


_COSTS = ("time_us", "flops", "bytes")
_SAME = ("stream", "layer", "axis", "ranks")
