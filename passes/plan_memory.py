"""plan-memory: every tensor gets its place in the memory of its device."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from sagec.dialects import exec as ex
from sagec.dialects.columns import ColumnAttr
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import int_attr
from sagec.passes.errors import PassError
from sagec.passes.lifetimes import (
    Buffer,
    Buffers,
    Lifetimes,
    Space,
    bytes_of,
    device_of,
    numbers_of,
    overwrites_of,
    views_of,
)
from sagec.passes.streams import PLAN_TOTALS, exec_graphs, forget_memory
from sagec.passes.topology import Topology, topology_of

Offsets = Mapping[Space, int]
"""Where tensors begin in the memory of their devices, in bytes, and what ops need for themselves;
KV in the cache has no place."""


@dataclass(frozen=True)
class Arena:
    """The activation memory of a device: what its plan needs; what no plan can do without, all that
    is there at some time; and what a place of its own for each tensor would need."""

    device: str
    peak_bytes: int
    live_bytes: int
    naive_bytes: int

    @property
    def ratio(self) -> float:
        """The plan's peak over what no plan can do without: 1.0 is best."""
        return self.peak_bytes / self.live_bytes if self.live_bytes else 1.0


@dataclass(frozen=True, eq=False)
class MemoryPlan:
    """Places for the tensors of a graph, and an arena a device."""

    offsets: Offsets
    arenas: tuple[Arena, ...]

    @property
    def largest(self) -> Arena:
        """The arena that needs most."""
        nothing = Arena("", 0, 0, 0)
        return max(self.arenas, key=lambda arena: arena.peak_bytes, default=nothing)


@dataclass(frozen=True)
class PlanMemoryPass(ModulePass):
    """Give each tensor a place, where nothing lies that is needed at the same time.

    `%s = exec.all_reduce %p ... -> ...  -->
     %s = exec.all_reduce %p {in_place = 1} ... offsets #pd.column<4096> -> ...`

    alignment_bytes: places begin at multiples of it. Views lie where their operands lie; norms and
    all-reduces write over operands that nothing else needs. A plan that is there already stays if
    it is right, aligned and as small. Refuses a graph that does not fit beside weights and KV,
    with the numbers.
    """

    name = "plan-memory"
    alignment_bytes: int = 256

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.alignment_bytes < 1:
            raise PassError(
                f"{self.name}: alignment_bytes={self.alignment_bytes}; it must be 1 or more"
            )
        for graph in exec_graphs(op):
            plan = plan_memory(graph, self.alignment_bytes)
            _check_room(graph, plan, topology_of(op))
            _write(graph, plan)
            check_memory_plan(graph)


def plan_memory(graph: ex.ExecGraphOp, alignment_bytes: int = 256) -> MemoryPlan:
    """A plan for a graph: the best of some greedy ones and of the one that it has already."""
    lifetimes = Lifetimes(graph)
    buffers = Buffers(lifetimes)
    old = planned_offsets(graph)
    if old and any(True for _ in memory_faults(lifetimes, old)):
        old = {}
    offsets: dict[Space, int] = {}
    arenas = []
    for device in buffers.devices:
        mine = buffers.of(device)
        sizes = {buffer: _aligned(buffer.num_bytes, alignment_bytes) for buffer in mine}
        live = _live_bytes(mine, lifetimes)
        found = _offsets(mine, _placed(mine, sizes, lifetimes, live))
        peak = _extent(found)
        kept = {space: old[space] for space in found if space in old}
        aligned = not any(old.get(b.members[0].space, 0) % alignment_bytes for b in mine)
        if len(kept) == len(found) and aligned and _extent(kept) <= peak:
            found, peak = kept, _extent(kept)
        offsets |= found
        naive = sum(_aligned(bytes_of(space), alignment_bytes) for space in found)
        arenas.append(Arena(device, peak, live, naive))
    return MemoryPlan(offsets, tuple(arenas))


def planned_offsets(graph: ex.ExecGraphOp) -> dict[Space, int]:
    """The places that a graph's text gives to its tensors, and to what ops need for themselves."""
    offsets: dict[Space, int] = {}
    for op in graph.operators:
        if op.offset_bytes is not None:
            offsets |= zip(op.results, map(int, op.offset_bytes), strict=True)
            if bytes_of(op):
                offsets[op] = op.number("scratch")
    return offsets


def _aligned(num_bytes: int, alignment_bytes: int) -> int:
    return -(-num_bytes // alignment_bytes) * alignment_bytes


def _end(space: Space, begin: int) -> int:
    return begin + bytes_of(space)


def _extent(offsets: Offsets) -> int:
    """The bytes from the begin of the memory to the end of the last tensor."""
    return max(itertools.starmap(_end, offsets.items()), default=0)


def _offsets(buffers: Sequence[Buffer], begins: Mapping[Buffer, int]) -> dict[Space, int]:
    return {m.space: begins[buffer] + m.begin for buffer in buffers for m in buffer.members}


def _placed(
    buffers: Sequence[Buffer], sizes: Mapping[Buffer, int], lifetimes: Lifetimes, least_bytes: int
) -> dict[Buffer, int]:
    """Where each buffer begins: largest first, or what is largest and longest there, or in the
    order of time, whichever ends lowest; least_bytes: what no plan can do without."""
    beside: dict[Buffer, list[Buffer]] = {buffer: [] for buffer in buffers}
    for early, late in itertools.combinations(buffers, 2):
        if not lifetimes.gone(early.touching, late.made):
            beside[early].append(late)
            beside[late].append(early)
    by_size = sorted(buffers, key=lambda buffer: (-sizes[buffer], buffer.made))
    by_area = sorted(buffers, key=lambda b: b.num_bytes * (b.made - b.touching.bit_length()))
    best, best_peak = dict.fromkeys(buffers, 0), math.inf
    for order in (by_size, by_area, buffers):
        for begins in _plans(order, sizes, beside):
            if (peak := max(map(_reach, begins.items()))) < best_peak:
                best, best_peak = begins, peak
            if best_peak <= least_bytes:
                return best
    return best


def _plans(
    order: Sequence[Buffer],
    sizes: Mapping[Buffer, int],
    beside: Mapping[Buffer, Sequence[Buffer]],
) -> Iterator[dict[Buffer, int]]:
    """The plan of an order, then of the order with the buffer first that ended last, and so on."""
    order = list(order)
    for _ in range(_ROUNDS):
        begins = _best_fit(order, sizes, beside)
        yield begins
        last = max(begins.items(), key=_reach)[0]
        order.remove(last)
        order.insert(0, last)


_ROUNDS = 8
"""Plans of an order; where one is a little too large, it nearly always takes fewer to mend it."""


def _reach(placed: tuple[Buffer, int]) -> int:
    buffer, begin = placed
    return begin + buffer.num_bytes


def _best_fit(
    order: Sequence[Buffer],
    sizes: Mapping[Buffer, int],
    beside: Mapping[Buffer, Sequence[Buffer]],
) -> dict[Buffer, int]:
    """Each buffer in the smallest gap that it fits, between those that are there beside it."""
    begins: dict[Buffer, int] = {}
    for buffer in order:
        taken = sorted((begins[b], begins[b] + sizes[b]) for b in beside[buffer] if b in begins)
        gaps, free_from = [], 0
        for begin, end in taken:
            if begin - free_from >= sizes[buffer]:
                gaps.append((begin - free_from, free_from))
            free_from = max(free_from, end)
        begins[buffer] = min(gaps)[1] if gaps else free_from
    return begins


def _live_bytes(buffers: Sequence[Buffer], lifetimes: Lifetimes) -> int:
    """The most bytes of buffers that are there at a time: in the text's order, or by the ops'
    estimated times."""
    begins_us = lifetimes.view.begins_us()
    begins = [begins_us[node] for node in lifetimes.view.nodes]
    ends = [begins_us[node] + node.estimated_us for node in lifetimes.view.nodes]
    ends.append(float("inf"))  # of what the step yields
    by_text = [(b.made, b.touching.bit_length(), b.num_bytes) for b in buffers]
    by_time = [
        (begins[b.made], max(ends[op] for op in numbers_of(b.touching)), b.num_bytes)
        for b in buffers
    ]
    return max(_most(by_text), _most(by_time))


def _most(lives: Sequence[tuple[float, float, int]]) -> int:
    """The greatest sum of sizes at a time, of (begin, end, size); ends are not of a life."""
    changes: defaultdict[float, int] = defaultdict(int)
    for begin, end, size in lives:
        changes[begin] += size
        changes[end] -= size
    return max(itertools.accumulate(changes[at] for at in sorted(changes)), default=0)


# Reading a plan.


def check_memory_plan(graph: ex.ExecGraphOp) -> None:
    """Raise PassError where tensors share memory that are needed at the same time, one has no
    place, or the graph says that it needs less than they take."""
    offsets = planned_offsets(graph)
    for fault in memory_faults(Lifetimes(graph), offsets):
        raise PassError(f"exec.graph {symbol(graph.symbol)}: {fault}", graph)
    peak, said = _extent(offsets), graph.scalar("peak_bytes")
    if isinstance(said, int) and said < peak:
        raise PassError(
            f"exec.graph {symbol(graph.symbol)}: peak_bytes = {said}, and a tensor ends at {peak}",
            graph,
        )


def memory_faults(lifetimes: Lifetimes, offsets: Offsets) -> Iterator[str]:
    """What is wrong with places for the tensors of a graph."""
    for buffer in Buffers(lifetimes).all:
        for member in buffer.members:
            if member.space not in offsets:
                yield f"{_named(member.space)} has no place"
    by_device: defaultdict[str, list[tuple[int, Space]]] = defaultdict(list)
    for space, begin in offsets.items():
        by_device[device_of(space)].append((begin, space))
    sources = _sources(lifetimes, offsets)
    for placed in by_device.values():
        placed.sort(key=lambda place: place[0])
        begins = [begin for begin, _ in placed]
        for at, (begin, space) in enumerate(placed):
            behind = bisect.bisect_left(begins, _end(space, begin))
            for _, other in placed[at + 1 : behind]:
                if not _agree(space, other, lifetimes, offsets, sources):
                    yield (
                        f"{_named(space)} and {_named(other)} share bytes from {offsets[other]} on "
                        f"{symbol(device_of(other))}, and both are needed at a time"
                    )


def _agree(
    space: Space,
    other: Space,
    lifetimes: Lifetimes,
    offsets: Offsets,
    sources: Mapping[Space, frozenset[Space]],
) -> bool:
    """Whether two may share bytes: they hold the same, one is gone before the other is made, or is
    written over in place by the op that needs it last."""
    early, late = space, other
    if lifetimes.maker(early) > lifetimes.maker(late):
        early, late = late, early
    touching, made = lifetimes.touching(early), lifetimes.maker(late)
    if lifetimes.gone(touching, made) or sources[space] & sources[other]:
        return True
    if not bytes_of(space) or not bytes_of(other):
        return True
    op = lifetimes.ops[made]
    return (
        (late, early) in set(overwrites_of(op))
        and sum(operand is early for operand in op.operands) == 1
        and offsets[late] == offsets[early]
        and lifetimes.gone(touching & ~(1 << made), made)
    )


def _sources(lifetimes: Lifetimes, offsets: Offsets) -> dict[Space, frozenset[Space]]:
    """Of each tensor, those that were not where others lie already: a view's are its operands'."""
    sources = {space: frozenset((space,)) for space in offsets}
    for op in lifetimes.ops:
        for view in views_of(op):
            shifts = dict(view.shifts)
            begin = offsets.get(view.result)
            if all(v in offsets and offsets[v] + by == begin for v, by in shifts.items()):
                sources[view.result] = frozenset().union(*(sources[v] for v in shifts))
    return sources


def _named(space: Space) -> str:
    if isinstance(space, ex.OperatorOp):
        return f"what {space.name} needs for itself"
    name = f" %{space.name_hint}" if space.name_hint else ""
    assert isinstance(space.owner, ex.OperatorOp)
    return f"{space.owner.name}{name}"


# Writing it.


def _write(graph: ex.ExecGraphOp, plan: MemoryPlan) -> None:
    """Say of each op where its results lie, and of the graph what it needs."""
    forget_memory(graph)
    for op in graph.operators:
        if op in plan.offsets:
            op.properties["scratch"] = int_attr(plan.offsets[op])
        if op.results and all(result in plan.offsets for result in op.results):
            op.properties["offsets"] = ColumnAttr.of([plan.offsets[r] for r in op.results])
            if _in_place(op, plan.offsets):
                op.properties["in_place"] = int_attr(1)
    for name in PLAN_TOTALS:
        graph.properties[name] = int_attr(getattr(plan.largest, name))


def _in_place(op: ex.OperatorOp, offsets: Offsets) -> bool:
    """Whether it writes over an operand."""
    return any(
        offsets[result] == offsets.get(operand) and bytes_of(result) > 0
        for result, operand in overwrites_of(op)
    )


def _check_room(graph: ex.ExecGraphOp, plan: MemoryPlan, topology: Topology) -> None:
    """Raise PassError where an arena does not fit its device beside weights and KV."""
    for arena in plan.arenas:
        if (device := topology.devices.get(arena.device)) is None:
            continue
        weights = kv = 0.0
        for instance in topology.instances:
            if device in instance.devices:
                ranks = len(instance.devices)
                weights += instance.model.weight_bytes / ranks
                tokens = instance.kv_blocks * instance.block_tokens
                kv_shares = instance.pp * min(instance.tp, instance.model.kv_heads)
                kv += tokens * instance.kv_bytes_per_token / kv_shares
        lacking = arena.peak_bytes + weights + kv - device.memory_bytes
        if lacking > 0:
            raise PassError(
                f"exec.graph {symbol(graph.symbol)}: {_mib(arena.peak_bytes)} of activations "
                f"beside {_mib(weights)} of weights and {_mib(kv)} of KV do not fit "
                f"{symbol(device.name)}'s {_mib(device.memory_bytes)}: {_mib(lacking)} too many; "
                "what would: fewer kv_blocks, or fewer tokens in the step",
                graph,
            )


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.4g} MiB"
