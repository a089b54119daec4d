"""Lifetimes of an exec.graph's tensors: which are there at the same time, whatever ops take.

An op surely runs behind another where it takes something of it, receives what it sent, or follows
it on its stream, or behind one that does. Streams make no other promise: that one op is done before
another begins since it should take less time is none. So a tensor is gone for an op only where all
that touch it surely ran before that op.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from xdsl.ir import SSAValue

from sagec.dialects import exec as ex
from sagec.passes.execution_graph import ExecutionGraph, is_column_of_qkv, scratch_bytes

Ops = int
"""A set of a graph's ops: bit n for the one of number n."""


def numbers_of(ops: Ops) -> Iterator[int]:
    """The numbers of a set's ops, ascending.

    >>> list(numbers_of(0b1101))
    [0, 2, 3]
    """
    while ops:
        lowest = ops & -ops
        yield lowest.bit_length() - 1
        ops ^= lowest


Space = SSAValue | ex.OperatorOp
"""What needs memory: a tensor, or an op for itself, while it runs; see `scratch_bytes`."""


def device_of(space: Space) -> str:
    """Where it needs memory."""
    return space.device if isinstance(space, ex.OperatorOp) else ex.tensor_of(space).device


def bytes_of(space: Space) -> int:
    """How much memory it needs."""
    if isinstance(space, ex.OperatorOp):
        return scratch_bytes(space)
    return ex.tensor_of(space).num_bytes


@dataclass(frozen=True)
class View:
    """A result that lies where its operands lie, unchanged: it begins so many bytes behind the
    begin of each of them, the same place for all."""

    result: SSAValue
    shifts: tuple[tuple[SSAValue, int], ...]


def views_of(op: ex.OperatorOp) -> Iterator[View]:
    """The results of an op that need no memory beside its operands'.

    `exec.wait` hands on what it waits for, `exec.slice` rows that lie there, `exec.concat` parts
    that lie one behind the other, and `exec.norm`, where nothing is added, the stream as it was.
    New KV on its way to the cache is within the rows that attention takes.
    """
    match op:
        case ex.WaitOp():
            yield View(op.there, ((op.made, 0),))
        case ex.SliceOp() if _rows_are_whole(op.whole):
            before = (op.number("first"), *ex.tensor_of(op.whole).shape[1:])
            yield View(op.part, ((op.whole, _size_like(op.whole, before)),))
        case ex.ConcatOp() if _rows_are_whole(op.whole):
            sizes = [ex.tensor_of(part).num_bytes for part in op.parts]
            begins = itertools.accumulate(sizes[:-1], initial=0)
            yield View(op.whole, tuple(zip(op.parts, (-begin for begin in begins), strict=True)))
        case ex.NormOp() if op.added is None:
            yield View(op.sum, ((op.hidden, 0),))
        case ex.AttentionOp() if is_column_of_qkv(new_kv := op.results[1]):
            qkv = op.operands[0]
            before = (op.number("first"), *ex.tensor_of(qkv).shape[1:])
            yield View(new_kv, ((qkv, _size_like(qkv, before)),))


def _rows_are_whole(value: SSAValue) -> bool:
    """Whether each row begins at a byte of its own, as those of int4 may not."""
    tensor = ex.tensor_of(value)
    return math.prod(tensor.shape[1:]) * ex.BYTES_OF[tensor.dtype] % 1 == 0


def _size_like(value: SSAValue, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of this shape and a value's type."""
    tensor = ex.tensor_of(value)
    return ex.Tensor(shape, tensor.dtype, tensor.device).num_bytes


def overwrites_of(op: ex.OperatorOp) -> Iterator[tuple[SSAValue, SSAValue]]:
    """Results, and operands in whose place the op may write them where nothing else needs these.

    Element by element: sums of a collective over its parts, and what a norm makes over what it
    takes, the sum first.
    """
    match op:
        case ex.AllReduceOp():
            yield from zip(op.sums, op.parts, strict=True)
        case ex.NormOp() if op.added is not None:
            for result in (op.sum, op.normed):
                yield result, op.hidden
                yield result, op.added


class Lifetimes:
    """Which ops of a graph surely ran before which, and who touches which tensor."""

    def __init__(self, graph: ex.ExecGraphOp) -> None:
        self.view = ExecutionGraph(graph)
        self.ops = tuple(graph.operators)
        self.number: dict[object, int] = {op: number for number, op in enumerate(self.ops)}
        self._touching: dict[Space, Ops] = {}

    @functools.cached_property
    def before(self) -> tuple[Ops, ...]:
        """Of each op, those that surely ran before it begins."""
        sources: dict[int, list[int]] = {}
        for edge in self.view.edges:
            sources.setdefault(edge.target.number, []).append(edge.source.number)
        last: dict[tuple[str, str], int] = {}
        before: list[Ops] = []
        for number, op in enumerate(self.ops):
            stream = (op.device, op.stream_name)
            earlier = [*sources.get(number, ()), *([last[stream]] if stream in last else [])]
            last[stream] = number
            ops = 0
            for source in earlier:
                ops |= before[source] | 1 << source
            before.append(ops)
        return tuple(before)

    def touching(self, space: Space) -> Ops:
        """The op that makes a tensor and those that take it; what is yielded, one that never ends
        takes."""
        if (ops := self._touching.get(space)) is None:
            ops = 1 << self.maker(space)
            for use in space.uses if isinstance(space, SSAValue) else ():
                ops |= 1 << self.number.get(use.operation, len(self.ops))
            self._touching[space] = ops
        return ops

    def maker(self, space: Space) -> int:
        """The number of the op that makes a tensor, or needs memory for itself."""
        return self.number[space if isinstance(space, ex.OperatorOp) else space.owner]

    def gone(self, touching: Ops, number: int) -> bool:
        """Whether all of these ops surely ran before the op of this number begins."""
        return not touching & ~self.before[number]


@dataclass(frozen=True)
class Member:
    """What lies in a buffer, from where to where, and who touches it."""

    space: Space
    begin: int
    end: int
    touching: Ops


class Buffer:
    """What shares memory: a tensor, its views, and what is written over it in place."""

    def __init__(self, space: Space, made: int, touching: Ops) -> None:
        """made: the number of the op that makes its first tensor, before which it is not needed."""
        self.device = device_of(space)
        self.made = made
        self.num_bytes = bytes_of(space)
        self.members = [Member(space, 0, self.num_bytes, touching)]
        self.touching = touching

    def add(self, value: SSAValue, begin: int, touching: Ops) -> None:
        """Put one more tensor into it, inside of its bounds."""
        self.members.append(Member(value, begin, begin + bytes_of(value), touching))
        self.touching |= touching


class Buffers:
    """The buffers of a graph, as few as views and writing in place make them."""

    def __init__(self, lifetimes: Lifetimes) -> None:
        self.lifetimes = lifetimes
        self.all: list[Buffer] = []
        self.home: dict[SSAValue, tuple[Buffer, int]] = {}
        self._cached: set[SSAValue] = set()
        for op in lifetimes.ops:
            self._views(op)
            self._overwrites(op)
            self._own(op)

    def _views(self, op: ex.OperatorOp) -> None:
        for view in views_of(op):
            homes = {self._shifted(operand, shift) for operand, shift in view.shifts}
            if homes == {None} and len(view.shifts) == 1:
                self._cached.add(view.result)
            elif len(homes) == 1 and (home := homes.pop()):
                self._put(view.result, *home)

    def _shifted(self, operand: SSAValue, shift_bytes: int) -> tuple[Buffer, int] | None:
        """The place so far behind an operand's begin; None in the cache."""
        home = self.home.get(operand)
        return home and (home[0], home[1] + shift_bytes)

    def _overwrites(self, op: ex.OperatorOp) -> None:
        for result, operand in overwrites_of(op):
            if result in self.home or operand not in self.home:
                continue
            if list(op.operands).count(operand) == 1 and self._free(op, operand):
                self._put(result, *self.home[operand])

    def _free(self, op: ex.OperatorOp, operand: SSAValue) -> bool:
        """Whether nothing but `op` needs what lies where its operand lies, when it begins."""
        number = self.lifetimes.number[op]
        buffer, begin = self.home[operand]
        end = begin + ex.tensor_of(operand).num_bytes
        return all(
            self.lifetimes.gone(m.touching & ~((m.space is operand) << number), number)
            for m in buffer.members
            if m.begin < end and begin < m.end
        )

    def _own(self, op: ex.OperatorOp) -> None:
        """A buffer of its own for each result that has no place yet; attention reads KV where it
        lies in the cache."""
        for value in op.results:
            if isinstance(op, ex.KVLoadOp) and op.scalar("tier") == "device":
                self._cached.add(value)
            elif value not in self.home and value not in self._cached:
                self.home[value] = (self._new(value), 0)
        if scratch_bytes(op):
            self._new(op)

    def _new(self, space: Space) -> Buffer:
        made, touching = self.lifetimes.maker(space), self.lifetimes.touching(space)
        self.all.append(Buffer(space, made, touching))
        return self.all[-1]

    def _put(self, value: SSAValue, buffer: Buffer, begin: int) -> None:
        buffer.add(value, begin, self.lifetimes.touching(value))
        self.home[value] = (buffer, begin)

    def of(self, device: str) -> list[Buffer]:
        """Those on a device, in the order in which they are needed."""
        return [buffer for buffer in self.all if buffer.device == device]

    @property
    def devices(self) -> Iterable[str]:
        """The devices that hold any, in the order of the text."""
        return dict.fromkeys(buffer.device for buffer in self.all)
