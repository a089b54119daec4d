"""The public view of an exec.graph: its operators, what they need of each other, and how long."""

from __future__ import annotations

import enum
import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from sagec.dialects import exec as ex
from sagec.passes.errors import PassError


class OpType(enum.StrEnum):
    """What an operator is: the name of its op behind `exec.`"""

    INPUT = "input"
    EMBEDDING = "embedding"
    NORM = "norm"
    QKV = "qkv"
    PREFILL_ATTENTION = "prefill_attention"
    DECODE_ATTENTION = "decode_attention"
    PROJECTION = "projection"
    FFN = "ffn"
    LM_HEAD = "lm_head"
    SAMPLE = "sample"
    SLICE = "slice"
    CONCAT = "concat"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    SEND = "send"
    RECV = "recv"
    WAIT = "wait"
    KV_LOAD = "kv_load"
    KV_STORE = "kv_store"
    KV_MIGRATE = "kv_migrate"


@dataclass(frozen=True)
class TensorRef:
    """A value of a graph. number: its place among the values, as the text makes them."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def num_bytes(self) -> int:
        """Its size on each rank."""
        return ex.Tensor(self.shape, self.dtype, self.device).num_bytes


@dataclass(frozen=True, eq=False)
class OpNode:
    """An operator. number: its place in the text of the whole graph. layer: None where it belongs
    to none. flops, bytes: of one rank; see dialects/exec.py. op: the op itself."""

    number: int
    type: OpType
    inputs: tuple[TensorRef, ...]
    outputs: tuple[TensorRef, ...]
    device: str
    stream: str
    layer: int | None
    estimated_us: float
    flops: float
    bytes: float
    op: ex.OperatorOp

    @property
    def arithmetic_intensity(self) -> float:
        """Operations a byte; 0 where it moves nothing."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, eq=False)
class Edge:
    """`target` takes what `source` makes: a tensor, which it may get of another rank of its group,
    or a message by a channel."""

    source: OpNode
    target: OpNode
    tensor: TensorRef | None = None
    channel: int | None = None


@dataclass(frozen=True, eq=False)
class CriticalPath:
    """The operators, each after the one before, that take longest together."""

    nodes: tuple[OpNode, ...]
    us: float


def turn_of(op: ex.OperatorOp) -> object | None:
    """What a message takes turns on: those of a group over one stream follow each other in the
    order of the text, on every device of the group. None: no such message."""
    if isinstance(op, ex.CollectiveOp):
        return op.device, op.stream_name, op.group
    return None


class ExecutionGraph:
    """A step's operators, or some of them, and what can be said of them without running them.

    nodes stand in the order of the text, which is the order of each stream.
    """

    def __init__(self, op: ex.ExecGraphOp, nodes: Iterable[OpNode] | None = None) -> None:
        """nodes: those of the graph that it is about; all where nobody says."""
        self.op = op
        chosen = _nodes(op) if nodes is None else nodes
        self.nodes = tuple(sorted(chosen, key=lambda node: node.number))

    @property
    def name(self) -> str:
        """The graph's symbol."""
        return self.op.symbol

    @property
    def phase(self) -> str:
        """prefill, decode or hybrid."""
        return str(self.op.scalar("phase"))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices whose operators it shows, in the order of the text."""
        return tuple(dict.fromkeys(node.device for node in self.nodes))

    @functools.cached_property
    def edges(self) -> tuple[Edge, ...]:
        """What its nodes take of each other: tensors, messages from send to recv, and what ranks
        put into a collective."""
        node_of: dict[object, OpNode] = {node.op: node for node in self.nodes}
        sends = {n.op.number("channel"): n for n in self.nodes if n.type is OpType.SEND}
        found = []
        for node in self.nodes:
            for operand, tensor in zip(node.op.operands, node.inputs, strict=True):
                if (maker := node_of.get(operand.owner)) is not None:
                    found.append(Edge(maker, node, tensor))
            if node.type is OpType.RECV and (channel := node.op.number("channel")) in sends:
                found.append(Edge(sends[channel], node, channel=channel))
        return (*found, *self._exchanges(node_of))

    def _exchanges(self, node_of: Mapping[object, OpNode]) -> Iterator[Edge]:
        """What a collective takes of the other ranks of its group that the graph shows.

        The nth of a kind over a group is one message, on whichever device it stands. Where the text
        makes a rank's tensor only below another rank's collective, it shows no edge.
        """
        counts: defaultdict[tuple[str, OpType, tuple[str, ...]], int] = defaultdict(int)
        met: defaultdict[tuple[OpType, tuple[str, ...], int], list[OpNode]] = defaultdict(list)
        for node in self.nodes:
            if isinstance(node.op, ex.CollectiveOp):
                on = (node.device, node.type, node.op.group)
                met[node.type, node.op.group, counts[on]].append(node)
                counts[on] += 1
        for nodes in met.values():
            for node, other in itertools.permutations(nodes, 2):
                for operand, tensor in zip(other.op.operands, other.inputs, strict=True):
                    maker = node_of.get(operand.owner)
                    if maker is not None and maker.number < node.number:
                        yield Edge(maker, node, tensor)

    @functools.cached_property
    def _before(self) -> dict[OpNode, tuple[OpNode, ...]]:
        """Of each node, those that it takes something of."""
        before: defaultdict[OpNode, list[OpNode]] = defaultdict(list)
        for edge in self.edges:
            before[edge.target].append(edge.source)
        return {node: tuple(dict.fromkeys(before[node])) for node in self.nodes}

    def topological_order(self) -> tuple[OpNode, ...]:
        """Makers before takers, otherwise as in the text. Raises PassError for a cycle."""
        after: defaultdict[OpNode, list[OpNode]] = defaultdict(list)
        missing = {node: len(before) for node, before in self._before.items()}
        for node, before in self._before.items():
            for maker in before:
                after[maker].append(node)
        ready = [(node.number, node) for node in self.nodes if not missing[node]]
        order = []
        while ready:
            _, node = heapq.heappop(ready)
            order.append(node)
            for taker in after[node]:
                missing[taker] -= 1
                if not missing[taker]:
                    heapq.heappush(ready, (taker.number, taker))
        if len(order) < len(self.nodes):
            late = next(node for node in self.nodes if missing[node])
            raise PassError(f"exec.graph @{self.name}: {late.op.name} waits for itself", late.op)
        return tuple(order)

    def critical_path(self) -> CriticalPath:
        """What no number of streams makes faster: the longest way along `edges`, and from message
        to message, for a group of devices sends one at a time; see `turn_of`."""
        until: dict[OpNode, float] = {}
        came_from: dict[OpNode, OpNode | None] = {}
        sent: dict[object, OpNode] = {}
        for node in self.topological_order():
            before, turn = list(self._before[node]), turn_of(node.op)
            before += [sent[turn]] if turn in sent else []
            if turn is not None:
                sent[turn] = node
            last = max(before, key=until.__getitem__, default=None)
            came_from[node] = last
            until[node] = node.estimated_us + (0.0 if last is None else until[last])
        here = max(self.nodes, key=lambda node: until[node], default=None)
        us = 0.0 if here is None else until[here]
        path = []
        while here is not None:
            path.append(here)
            here = came_from[here]
        return CriticalPath(tuple(reversed(path)), us)

    def total_us(self, device: str | None = None, stream: str | None = None) -> float:
        """The time of all operators, or of those of a device, of a stream, or both, one by one."""
        return sum(
            node.estimated_us
            for node in self.nodes
            if device in (None, node.device) and stream in (None, node.stream)
        )

    def total_us_by_stream(self) -> dict[tuple[str, str], float]:
        """How long each stream is busy, by (device, stream)."""
        busy: dict[tuple[str, str], float] = {}
        for node in self.nodes:
            key = (node.device, node.stream)
            busy[key] = busy.get(key, 0.0) + node.estimated_us
        return busy

    def begins_us(self) -> dict[OpNode, float]:
        """When each operator begins: its stream is free, and all that it takes is there.

        The operators of a device's stream run in the order of the text. The graph must verify.
        """
        free: dict[tuple[str, str], float] = {}
        begins: dict[OpNode, float] = {}
        for node in self.nodes:
            there = [begins[maker] + maker.estimated_us for maker in self._before[node]]
            begins[node] = max([free.get((node.device, node.stream), 0.0), *there])
            free[node.device, node.stream] = begins[node] + node.estimated_us
        return begins

    def makespan_us(self) -> float:
        """How long the step takes, streams beside each other; see `begins_us`."""
        begins = self.begins_us()
        return max((begin + node.estimated_us for node, begin in begins.items()), default=0.0)

    def subgraph(
        self, nodes: Iterable[OpNode] | None = None, phase: str | None = None
    ) -> ExecutionGraph:
        """Some of its nodes: those named, those of a phase, or those that are both.

        What only the other phase needs is no part of a phase: its attention, and the ops that bring
        or take its KV. All else computes rows of both at once and belongs to both.
        """
        chosen = self.nodes if nodes is None else tuple(nodes)
        if phase is not None:
            if phase not in (phases := tuple(_ATTENTIONS.values())):
                raise ValueError(f"no phase {phase!r}; one of: {', '.join(phases)}")
            wanted = {phase, None}
            chosen = tuple(node for node in chosen if self._phases.get(node) in wanted)
        return ExecutionGraph(self.op, chosen)

    @functools.cached_property
    def _phases(self) -> dict[OpNode, str]:
        """The phase of each attention, and of the ops that KV connects with it."""
        found = {node: _ATTENTIONS[node.type] for node in self.nodes if node.type in _ATTENTIONS}
        kv_edges = [edge for edge in self.edges if edge.tensor and len(edge.tensor.shape) == 4]
        for edge in reversed(kv_edges):
            if edge.target in found:
                found.setdefault(edge.source, found[edge.target])
        for edge in kv_edges:
            if edge.source in found:
                found.setdefault(edge.target, found[edge.source])
        return found

    def peak_memory_bytes(self, device: str | None = None) -> int:
        """The most activations at a time on a device, or on the one that has most.

        A tensor is there from the op that makes it until the last that takes it, in the order of
        the text; what is yielded, until the end. KV that attention reads in the cache, and what
        `exec.wait` hands on, need no memory of their own. While an op runs, so is what it makes
        for itself alone; see `scratch_bytes`.
        """
        peaks = self._peaks()
        if device is None:
            return max(peaks.values(), default=0)
        return peaks.get(device, 0)

    def _peaks(self) -> dict[str, int]:
        last = self._last_uses()
        now: defaultdict[str, int] = defaultdict(int)
        peaks: dict[str, int] = {}
        leaving: defaultdict[int, list[SSAValue]] = defaultdict(list)
        for node in self.nodes:
            for value in filter(owns_memory, node.op.results):
                now[ex.tensor_of(value).device] += ex.tensor_of(value).num_bytes
                leaving[last[value]].append(value)
            for device in {node.device, *(tensor.device for tensor in node.outputs)}:
                most = now[device] + scratch_bytes(node.op)
                peaks[device] = max(peaks.get(device, 0), most)
            for gone in map(ex.tensor_of, leaving.pop(node.number, ())):
                now[gone.device] -= gone.num_bytes
        return peaks

    def _last_uses(self) -> dict[SSAValue, int]:
        """Of each value, the number of the last op that needs its memory; yield is behind all."""
        number = {node.op: node.number for node in self.nodes}
        end = len(self.op.body.block.ops)
        last: dict[SSAValue, int] = {}
        for node in self.nodes:
            for value in node.op.results:
                root = home_of(value)
                used = [number.get(use.operation, end) for use in value.uses]
                last[root] = max([last.get(root, node.number), *used])
        return last

    @property
    def flops(self) -> float:
        """Arithmetic of all nodes."""
        return sum(node.flops for node in self.nodes)

    @property
    def bytes(self) -> float:
        """Memory traffic and messages of all nodes."""
        return sum(node.bytes for node in self.nodes)

    def arithmetic_intensity(self) -> float:
        """Operations a byte, of all nodes together; 0 where they move nothing."""
        return self.flops / self.bytes if self.bytes else 0.0


_ATTENTIONS = {OpType.PREFILL_ATTENTION: "prefill", OpType.DECODE_ATTENTION: "decode"}


def home_of(value: SSAValue) -> SSAValue:
    """The value whose memory it is: what `exec.wait` hands on lies where it was made, and new KV
    that goes to the device's cache is columns of what attention takes."""
    while isinstance(value.owner, ex.WaitOp) or is_column_of_qkv(value):
        assert isinstance(value.owner, ex.OperatorOp)
        value = value.owner.operands[0]
    return value


def is_column_of_qkv(value: SSAValue) -> bool:
    """Whether it is new KV that is stored, as it was computed, in the device's cache alone, and
    whose rows begin at bytes of their own."""
    op = value.owner
    if not isinstance(op, ex.AttentionOp) or value is not op.results[1]:
        return False
    stores = [use.operation for use in value.uses]
    to_cache = [isinstance(s, ex.KVStoreOp) and s.scalar("tier") == "device" for s in stores]
    dtype = ex.tensor_of(value).dtype
    return all(to_cache) and dtype == ex.tensor_of(op.operands[0]).dtype and dtype != "int4"


def owns_memory(value: SSAValue) -> bool:
    """Whether the value has memory of its own; see `ExecutionGraph.peak_memory_bytes`."""
    maker = value.owner
    in_cache = isinstance(maker, ex.KVLoadOp) and maker.scalar("tier") == "device"
    return not in_cache and home_of(value) is value


def scratch_bytes(op: ex.OperatorOp) -> int:
    """Memory of an op that no value shows, beside its results, as generated torch code needs it.

    An ffn: gate and up, [tokens, width] each, in which their product takes gate's place. Experts
    compute one after the other; at worst all tokens go to one, which takes them and what it makes
    of them together. Attention of prompts: see `_attention_bytes`. Collectives: what other ranks
    send before it is put together along columns, and several tensors as one message.
    """
    match op:
        case ex.FFNOp():
            (rows, hidden), width = ex.tensor_of(op.normed).shape, op.number("width")
            return _size_of(op.normed, rows, 2 * width + (hidden if op.number("experts") else 0))
        case ex.PrefillAttentionOp():
            return _attention_bytes(op)
        case ex.AllGatherOp() if op.number("axis"):
            return sum(ex.tensor_of(whole).num_bytes for whole in op.wholes)
        case ex.AllReduceOp() if len(op.parts) > 1:
            return sum(ex.tensor_of(part).num_bytes for part in op.parts)
    return 0


_TILE_KEYS, _TILE_ROWS = 512, ((768, 256), (192, 64), (0, 32))
"""Of torch's fused attention on a CPU: the keys of a tile, and its queries where there are so many
at least."""


def _attention_bytes(op: ex.PrefillAttentionOp) -> int:
    """The most that a chunk needs: what it attends, and 4 bytes a head of how sharply; the scores
    and sums of a tile, in 4 bytes each; where it does not begin its prompt, a copy of all KV before
    its end, and a mask of its scores."""
    heads, kv_heads, dim = map(op.number, ("heads", "kv_heads", "head_dim"))
    most = 0
    for begin, end in zip(op.column("begin").tolist(), op.column("end").tolist(), strict=True):
        rows = end - begin
        tile = min(end, _TILE_KEYS) + 2 + dim
        needed = _size_of(op.attended, rows, heads * dim) + 4 * rows * heads
        needed += 4 * tile * next(tall for least, tall in _TILE_ROWS if rows >= least)
        if begin:
            needed += _size_of(op.new_kv, end, 2 * kv_heads * dim) + _size_of(op.qkv, rows, end)
        most = max(most, needed)
    return most


def _size_of(like: SSAValue, *shape: int) -> int:
    """The bytes of a tensor of this shape and a value's type."""
    tensor = ex.tensor_of(like)
    return ex.Tensor(shape, tensor.dtype, tensor.device).num_bytes


def _nodes(graph: ex.ExecGraphOp) -> Sequence[OpNode]:
    refs: dict[SSAValue, TensorRef] = {}
    for value in (value for op in graph.operators for value in op.results):
        tensor = ex.tensor_of(value)
        refs[value] = TensorRef(len(refs), tensor.shape, tensor.dtype, tensor.device)
    return [_node(number, op, refs) for number, op in enumerate(graph.operators)]


def _node(number: int, op: ex.OperatorOp, refs: dict[SSAValue, TensorRef]) -> OpNode:
    return OpNode(
        number=number,
        type=OpType(op.name.removeprefix("exec.")),
        inputs=tuple(refs[value] for value in op.operands),
        outputs=tuple(refs[value] for value in op.results),
        device=op.device,
        stream=op.stream_name,
        layer=op.layer_number,
        estimated_us=op.estimated_us,
        flops=float(op.scalar("flops")),
        bytes=float(op.scalar("bytes")),
        op=op,
    )
