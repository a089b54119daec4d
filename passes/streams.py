"""What passes on exec.graph share: streams, their waits, and how long a rewritten step takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation, SSAValue

from sagec.dialects import exec as ex
from sagec.passes.execution_graph import ExecutionGraph, turn_of

ROUNDING = 1e-9
"""The share of a time by which another order of summation may change it."""


def exec_graphs(module: ModuleOp) -> Iterator[ex.ExecGraphOp]:
    """The module's execution graphs."""
    return (op for op in module.body.block.ops if isinstance(op, ex.ExecGraphOp))


def brings_kv(op: Operation) -> bool:
    """Whether an op brings KV from another tier or device: not at once, and into memory."""
    if isinstance(op, ex.KVLoadOp):
        migrates = any(isinstance(use.operation, ex.KVMigrateOp) for use in op.kv.uses)
        return migrates or op.scalar("tier") != "device"
    return isinstance(op, ex.KVMigrateOp)


def put_on(op: ex.OperatorOp, stream: str) -> None:
    """Have an op run on another stream; its waits must be written again, see `add_waits`."""
    op.properties["stream"] = StringAttr(stream)


def drop_waits(graph: ex.ExecGraphOp) -> None:
    """Let each op take what another stream made as it is, for a while."""
    for op in list(graph.operators):
        if isinstance(op, ex.WaitOp):
            op.there.replace_all_uses_with(op.made)
            graph.body.block.erase_op(op)


def add_waits(graph: ex.ExecGraphOp) -> None:
    """Have each stream wait for what others made, as late as it can: above the first use.

    `%s = all_reduce %p {stream = "comm"}; norm %h, %s  -->  %q = wait %p {stream = "comm"};
     %s = all_reduce %q {stream = "comm"}; %t = wait %s {stream = "compute"}; norm %h, %t`
    """
    waits: dict[tuple[SSAValue, str], SSAValue] = {}
    for op in list(graph.operators):
        stream = op.stream_name
        for at, operand in enumerate(op.operands):
            maker = operand.owner
            assert isinstance(maker, ex.OperatorOp)
            if isinstance(op, ex.WaitOp) or maker.stream_name == stream:
                continue
            if (operand, stream) not in waits:
                waits[operand, stream] = _wait_above(op, operand)
            op.operands[at] = waits[operand, stream]


def _wait_above(op: ex.OperatorOp, operand: SSAValue) -> SSAValue:
    assert isinstance(operand.type, ex.TensorType)
    wait = ex.WaitOp.of([operand], [operand.type], stream=op.stream_name, layer=op.layer_number)
    assert op.parent is not None
    op.parent.insert_op_before(wait, op)
    return wait.there


def arrange(graph: ex.ExecGraphOp, order: Iterable[Operation]) -> None:
    """Have the graph's operators stand in this order, the yield behind them."""
    block = graph.body.block
    assert block.last_op is not None
    for op in order:
        block.detach_op(op)
        block.insert_op_before(op, block.last_op)


def issued_early(order: Sequence[ex.OperatorOp]) -> list[ex.OperatorOp]:
    """The same order of each stream, with every message as far up as what it takes allows.

    Who runs the text op by op begins a message where it stands; it must stand above the arithmetic
    that it runs beside.
    """
    keys: dict[Operation, tuple[int, int]] = {}
    sends: dict[int, tuple[int, int]] = {}
    last: dict[str, tuple[int, int]] = {}  # of each device, its last message
    for at, op in enumerate(order):
        if op.stream_name != ex.COMM:
            keys[op] = (at, 0)
            continue
        above = [keys[value.owner] for value in op.operands]  # type: ignore[index]
        above += [last[op.device]] if op.device in last else []
        above += [sends[op.number("channel")]] if isinstance(op, ex.RecvOp) else []
        keys[op] = last[op.device] = (max(above, default=(0, 0))[0], at + 1)
        if isinstance(op, ex.SendOp):
            sends[op.number("channel")] = keys[op]
    return sorted(order, key=keys.__getitem__)


def shared_groups(graph: ex.ExecGraphOp) -> set[tuple[str, ...]]:
    """The groups whose messages the graph shows from several of their devices, as replicas that
    exchange tokens: the nth of a kind is one message, so all devices must do as many, in the same
    order."""
    shown: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for op in graph.operators:
        if isinstance(op, ex.CollectiveOp):
            shown[op.group].add(op.device)
    return {group for group, devices in shown.items() if len(devices) > 1}


def in_step(before: Iterable[Operation], after: Iterable[Operation]) -> bool:
    """Whether the devices of each group do its messages in the same order after ops were put into
    another order; they did before."""
    numbers: dict[Operation, tuple[str, int]] = {}
    counts: defaultdict[tuple[object, ...], int] = defaultdict(int)
    for op in before:
        if isinstance(op, ex.CollectiveOp):
            kind = (op.name, op.group, op.device)
            numbers[op] = (op.name, counts[kind])
            counts[kind] += 1
    done: defaultdict[tuple[str, ...], dict[str, list[object]]] = defaultdict(dict)
    for op in after:
        if isinstance(op, ex.CollectiveOp):
            done[op.group].setdefault(op.device, []).append(numbers[op])
    orders = (list(by_device.values()) for by_device in done.values())
    return all(order == others[0] for others in orders for order in others)


class Stopwatch:
    """Times of a graph and of its rewrites: what is known of an op is read once.

    It says what `ExecutionGraph` says, for passes that ask again and again; of replicas that
    exchange tokens it asks there.
    """

    def __init__(self) -> None:
        self._us: dict[Operation, float] = {}
        self._streams: dict[Operation, object] = {}
        self._turns: dict[Operation, object | None] = {}
        self._channels: dict[Operation, int] = {}
        self._exchanges: bool | None = None  # whether lanes wait for each other's messages

    def makespan_us(self, graph: ex.ExecGraphOp) -> float:
        """How long the step takes, streams beside each other."""
        if self._exchange(graph):
            return ExecutionGraph(graph).makespan_us()
        return self._last_us(graph, self._streams)

    def critical_path_us(self, graph: ex.ExecGraphOp) -> float:
        """What no number of streams makes faster."""
        if self._exchange(graph):
            return ExecutionGraph(graph).critical_path().us
        return self._last_us(graph, self._turns)

    def _exchange(self, graph: ex.ExecGraphOp) -> bool:
        if self._exchanges is None:
            self._exchanges = bool(shared_groups(graph))
        return self._exchanges

    def _last_us(self, graph: ex.ExecGraphOp, turns: Mapping[Operation, object | None]) -> float:
        """When the last op ends, where those of one turn follow each other."""
        free: defaultdict[object, float] = defaultdict(float)
        there: dict[Operation, float] = {}
        sent: dict[int, float] = {}
        for op in graph.operators:
            if op not in self._us:
                self._read(op)
            begins = [there[value.owner] for value in op.operands]  # type: ignore[index]
            if isinstance(op, ex.RecvOp):
                begins.append(sent[self._channels[op]])
            if (turn := turns[op]) is not None:
                begins.append(free[turn])
            there[op] = free[turn] = max(begins, default=0.0) + self._us[op]
            if isinstance(op, ex.SendOp):
                sent[self._channels[op]] = there[op]
        return max(there.values(), default=0.0)

    def _read(self, op: ex.OperatorOp) -> None:
        self._us[op] = op.estimated_us
        self._streams[op] = op.device, op.stream_name
        self._turns[op] = turn_of(op)
        if isinstance(op, ex.SendOp | ex.RecvOp):
            self._channels[op] = op.number("channel")


def is_longer(us: float, than_us: float) -> bool:
    """Whether a time is longer, and not by rounding alone."""
    return us > than_us * (1 + ROUNDING)


def replace_body(graph: ex.ExecGraphOp, rewritten: ex.ExecGraphOp) -> None:
    """Give a graph the ops of a rewritten copy of it, which has none afterwards."""
    made = rewritten.body.detach_block(0)
    graph.body.detach_block(0).erase()
    graph.body.add_block(made)
    forget_memory(graph)


PLAN_TOTALS = ("peak_bytes", "live_bytes", "naive_bytes")
"""What a graph says of its memory plan."""


def forget_memory(graph: ex.ExecGraphOp) -> None:
    """Take away a memory plan, which holds for the order that it was made for."""
    for name in PLAN_TOTALS:
        graph.properties.pop(name, None)
    for op in graph.operators:
        for name in ("offsets", "in_place", "scratch"):
            op.properties.pop(name, None)
