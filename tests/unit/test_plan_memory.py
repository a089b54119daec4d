"""plan-memory: no tensor is written over while somebody needs it, and little memory is wasted."""

from __future__ import annotations

from collections import defaultdict
from io import StringIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import SSAValue
from xdsl.printer import Printer
from xdsl.rewriter import InsertPoint, Rewriter

from sagec.compiler import Compiler
from sagec.dialects import exec as ex
from sagec.dialects.columns import ColumnAttr
from sagec.dialects.scalars import int_attr
from sagec.passes.errors import PassError
from sagec.passes.execution_graph import ExecutionGraph, owns_memory
from sagec.passes.lifetimes import Space, bytes_of, device_of, views_of
from sagec.passes.plan_memory import (
    PlanMemoryPass,
    check_memory_plan,
    plan_memory,
    planned_offsets,
)
from sagec.universe import sagec_context
from tests.exec_graphs import Lane, Step, steps
from tests.exec_interpreter import assert_same, run

LAX = settings(suppress_health_check=list(HealthCheck), max_examples=40, deadline=None)
ONE_LANE = Step(lanes=(Lane(prefills=((0, 6),), decodes=(3, 4), stages=(("g0",),)),))


def graph_in(module: ModuleOp) -> ex.ExecGraphOp:
    return next(op for op in module.body.block.ops if isinstance(op, ex.ExecGraphOp))


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def planned(step: Step, beside: frozenset[int] = frozenset(), alignment_bytes: int = 4) -> ModuleOp:
    """The module of a step behind the pass; `beside`: ops to put on a stream of their own."""
    module = step.module()
    put_beside(graph_in(module), beside)
    module.verify()
    PlanMemoryPass(alignment_bytes=alignment_bytes).apply(sagec_context(), module)
    module.verify()
    return module


def put_beside(graph: ex.ExecGraphOp, numbers: frozenset[int]) -> None:
    """Put operators on the stream `comm`, with a wait before and behind each of their tensors."""
    for number, op in enumerate(list(graph.operators)):
        if number not in numbers or not op.operands or isinstance(op, ex.SendOp):
            continue
        op.properties["stream"] = StringAttr("comm")
        for at, operand in enumerate(op.operands):
            wait = ex.WaitOp.of([operand], [operand.type], stream="comm")  # type: ignore[list-item]
            Rewriter.insert_op(wait, InsertPoint.before(op))
            op.operands[at] = wait.there
        for result in op.results:
            wait = ex.WaitOp.of([result], [result.type])  # type: ignore[list-item]
            Rewriter.insert_op(wait, InsertPoint.after(op))
            result.replace_all_uses_with(wait.there)
            wait.operands[0] = result


def in_some_order(graph: ex.ExecGraphOp, random: np.random.Generator) -> list[ex.OperatorOp]:
    """The operators as streams beside each other might run them, whatever time each takes."""
    streams: dict[tuple[str, str], list[ex.OperatorOp]] = defaultdict(list)
    for op in graph.operators:
        streams[op.device, op.stream_name].append(op)
    made: set[SSAValue] = set()
    sent: set[int] = set()
    order: list[ex.OperatorOp] = []
    while any(streams.values()):
        ready = [
            queue
            for queue in streams.values()
            if queue
            and made.issuperset(queue[0].operands)
            and (not isinstance(queue[0], ex.RecvOp) or queue[0].number("channel") in sent)
        ]
        op = ready[int(random.integers(len(ready)))].pop(0)
        made.update(op.results)
        if isinstance(op, ex.SendOp):
            sent.add(op.number("channel"))
        order.append(op)
    return order


class Memory:
    """Device memory in which each byte says whose it is: which tensor's, and which byte of it."""

    def __init__(self, offsets: dict[Space, int]) -> None:
        self.offsets = offsets
        self.cells: dict[str, dict[int, tuple[int, int]]] = defaultdict(dict)
        self.holds: dict[Space, list[tuple[int, int]]] = {}

    def run(self, op: ex.OperatorOp) -> None:
        """Use the op's own memory and read all operands, which must still be there, then write all
        results, for which that memory must not be."""
        self.write(op)
        for operand in op.operands:
            assert self.read(operand) == self.holds.get(operand, []), f"{op.name} reads too late"
        views = {view.result: view for view in views_of(op)}
        for result in op.results:
            if result in views and self.there(views[result].shifts, result):
                self.holds[result] = self.read(result)
            else:
                self.write(result)
        assert self.read(op) == self.holds.get(op, []), f"{op.name} writes over its own"

    def write(self, space: Space) -> None:
        if space in self.offsets:
            self.holds[space] = [(id(space), byte) for byte in range(bytes_of(space))]
            self.cells[device_of(space)].update(enumerate(self.holds[space], self.offsets[space]))

    def read(self, space: Space) -> list[tuple[int, int]]:
        if space not in self.offsets:
            return []
        cells, begin = self.cells[device_of(space)], self.offsets[space]
        return [cells[begin + byte] for byte in range(bytes_of(space))]

    def there(self, shifts: tuple[tuple[SSAValue, int], ...], result: SSAValue) -> bool:
        offsets, begin = self.offsets, self.offsets.get(result)
        return all(value in offsets and offsets[value] + by == begin for value, by in shifts)


def nothing_is_written_over_too_early(step: Step, beside: frozenset[int], seed: int) -> None:
    graph = graph_in(planned(step, beside))
    memory = Memory(planned_offsets(graph))
    order = in_some_order(graph, np.random.default_rng(seed))
    assert len(order) == len(list(graph.operators))
    for op in order:
        memory.run(op)
    for value in graph.body.block.last_op.operands:  # type: ignore[union-attr]
        assert memory.read(value) == memory.holds[value]


@LAX
@given(steps(), st.frozensets(st.integers(0, 80)), st.integers(0, 2**32))
def test_what_an_op_reads_is_still_there_however_long_the_others_take(
    step: Step, beside: frozenset[int], seed: int
) -> None:
    nothing_is_written_over_too_early(step, beside, seed)


@pytest.mark.slow
@settings(LAX, max_examples=500)
@given(steps(), st.frozensets(st.integers(0, 80)), st.integers(0, 2**32))
def test_what_an_op_reads_is_still_there_thoroughly(
    step: Step, beside: frozenset[int], seed: int
) -> None:
    nothing_is_written_over_too_early(step, beside, seed)


@LAX
@given(steps(), st.frozensets(st.integers(0, 80)))
def test_a_plan_needs_no_more_than_a_place_each_and_no_less_than_what_lives(
    step: Step, beside: frozenset[int]
) -> None:
    graph = graph_in(planned(step, beside))
    view = ExecutionGraph(graph)
    plan = plan_memory(graph, 4)
    assert {arena.device for arena in plan.arenas} <= {*step.devices, "far"}
    for arena in plan.arenas:
        assert arena.live_bytes <= arena.peak_bytes <= arena.naive_bytes
        assert arena.ratio >= 1.0
    assert plan.largest.peak_bytes == graph.scalar("peak_bytes")
    if not beside and not step.moved_kv:  # then the text says what lives at a time
        for arena in plan.arenas:
            assert arena.live_bytes <= view.peak_memory_bytes(arena.device)


@settings(LAX, max_examples=15)
@given(steps(), st.frozensets(st.integers(0, 80)))
def test_planning_twice_changes_nothing_and_the_text_keeps_it(
    step: Step, beside: frozenset[int]
) -> None:
    module = planned(step, beside)
    text = text_of(module)
    PlanMemoryPass(alignment_bytes=4).apply(sagec_context(), module)
    assert text_of(module) == text
    again = Compiler().parse(text, "step.mlir").module
    check_memory_plan(graph_in(again))
    assert text_of(again) == text


@settings(LAX, max_examples=20)
@given(steps(), st.frozensets(st.integers(0, 80)))
def test_a_plan_changes_no_result(step: Step, beside: frozenset[int]) -> None:
    assert_same(run(graph_in(step.module())), graph_in(planned(step, beside)))


@LAX
@given(steps(), st.data())
def test_a_tensor_moved_onto_another_that_is_needed_is_found(
    step: Step, data: st.DataObject
) -> None:
    graph = graph_in(planned(step, alignment_bytes=1))
    op = data.draw(st.sampled_from([op for op in graph.operators if op.offset_bytes is not None]))
    offsets = planned_offsets(graph)
    device = ex.tensor_of(op.results[0]).device
    near = [v for v in op.operands if v in offsets and ex.tensor_of(v).num_bytes]
    if not near or ex.tensor_of(near[0]).device != device or isinstance(op, _SHARING):
        return
    moved = [offsets[near[0]]] * len(op.results)
    op.properties["offsets"] = ColumnAttr.of(moved)
    if any(ex.tensor_of(result).num_bytes for result in op.results):
        with pytest.raises(PassError, match="share bytes"):
            check_memory_plan(graph)


_SHARING = ex.NormOp | ex.AllReduceOp | ex.WaitOp | ex.SliceOp | ex.ConcatOp


def test_the_residual_stream_stays_in_one_place_through_all_layers() -> None:
    graph = graph_in(planned(ONE_LANE))
    offsets = planned_offsets(graph)
    sums = [op.sum for op in graph.operators if isinstance(op, ex.NormOp)]
    assert len(sums) == 5
    assert len({offsets[value] for value in sums}) == 1


def test_all_reduces_are_in_place() -> None:
    step = Step(lanes=(Lane(prefills=(), decodes=(3, 4), stages=(("g0", "g1"),)),), tp=2)
    graph = graph_in(planned(step))
    reduces = [op for op in graph.operators if isinstance(op, ex.AllReduceOp)]
    assert reduces and all(op.scalar("in_place") == 1 for op in reduces)
    check_memory_plan(graph)


def test_a_plan_that_is_not_aligned_as_asked_is_made_anew() -> None:
    module = planned(ONE_LANE, alignment_bytes=4)
    PlanMemoryPass(alignment_bytes=4096).apply(sagec_context(), module)
    places = {place for space, place in planned_offsets(graph_in(module)).items()
              if isinstance(space, ex.OperatorOp) or owns_memory(space)}  # fmt: skip
    assert len(places) > 1 and not any(place % 4096 for place in places)


def test_a_smaller_plan_replaces_one_that_is_there() -> None:
    module = planned(ONE_LANE, alignment_bytes=4096)
    PlanMemoryPass(alignment_bytes=4).apply(sagec_context(), module)
    assert text_of(module) == text_of(planned(ONE_LANE, alignment_bytes=4))


def test_a_plan_with_a_fault_is_made_anew() -> None:
    module = planned(ONE_LANE)
    text = text_of(module)
    for op in graph_in(module).operators:
        if op.offset_bytes is not None:
            op.properties["offsets"] = ColumnAttr.of([0] * len(op.results))
    PlanMemoryPass(alignment_bytes=4).apply(sagec_context(), module)
    assert text_of(module) == text


def test_a_graph_that_says_too_little_memory_is_refused() -> None:
    graph = graph_in(planned(ONE_LANE))
    graph.properties["peak_bytes"] = int_attr(7)
    with pytest.raises(PassError, match=r"peak_bytes = 7, and a tensor ends at \d+"):
        check_memory_plan(graph)


def test_a_tensor_without_a_place_is_refused() -> None:
    graph = graph_in(planned(ONE_LANE))
    next(op for op in graph.operators if isinstance(op, ex.QKVOp)).properties.pop("offsets")
    with pytest.raises(PassError, match=r"exec\.qkv has no place"):
        check_memory_plan(graph)


def test_a_place_must_be_aligned_to_something() -> None:
    with pytest.raises(PassError, match="alignment_bytes=0; it must be 1 or more"):
        PlanMemoryPass(alignment_bytes=0).apply(sagec_context(), ONE_LANE.module())
