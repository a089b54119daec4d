"""fuse-communication, overlap-communication and prefetch-kv: results stay, times do not grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.printer import Printer

from sagec.compiler import Compiler
from sagec.dialects import exec as ex
from sagec.dialects.cluster import DeviceOp, LinkOp
from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.passes.errors import PassError
from sagec.passes.execution_graph import ExecutionGraph
from sagec.passes.fuse_communication import FuseCommunicationPass
from sagec.passes.micro_batches import split_rows
from sagec.passes.overlap_communication import OverlapCommunicationPass
from sagec.passes.plan_memory import PlanMemoryPass
from sagec.passes.prefetch_kv import PrefetchKVPass
from sagec.passes.streams import (
    Stopwatch,
    add_waits,
    drop_waits,
    exec_graphs,
    is_longer,
    shared_groups,
)
from sagec.passes.topology import Model, topology_of
from sagec.runtime.roofline import Device, Link
from tests.exec_graphs import Lane, Step, steps
from tests.exec_interpreter import assert_same

LAX = settings(suppress_health_check=list(HealthCheck), max_examples=15)
THOROUGH = settings(LAX, max_examples=1000)

PAIR = (("g0", "g1"),)


@st.composite
def steps_of_two_lanes(draw: Callable[..., object]) -> Step:
    """Micro-batches that share two ranks, and messages that are mostly latency."""
    step = draw(steps(max_stages=1, tps=(2,)))
    assert isinstance(step, Step)
    lanes = tuple(replace(lane, stages=PAIR) for lane in (*step.lanes, step.lanes[0]))
    return replace(step, lanes=lanes[:2], interleaved=True, link=Link(1e8, 20.0))


STEPS = st.one_of(steps(), steps_of_two_lanes())

PASSES: tuple[ModulePass, ...] = (
    FuseCommunicationPass(),
    FuseCommunicationPass(bytes=512),
    OverlapCommunicationPass(),
    OverlapCommunicationPass(micro_batches=2),
    PrefetchKVPass(),
    PrefetchKVPass(depth=2),
)
SPELLED = [str(one.pipeline_pass_spec()) for one in PASSES]


def graph_of(module: ModuleOp) -> ex.ExecGraphOp:
    (graph,) = exec_graphs(module)
    return graph


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def transformed(step: Step, *passes: ModulePass) -> tuple[ex.ExecGraphOp, ex.ExecGraphOp]:
    """The graph of a step before and after passes, verified."""
    module = step.module()
    before = graph_of(module).clone()
    for one in passes:
        one.apply(Context(), module)
    module.verify()
    return before, graph_of(module)


def no_longer(before: ex.ExecGraphOp, after: ex.ExecGraphOp) -> None:
    """Fail where a step takes longer than before, or would with streams without number."""
    views = ExecutionGraph(before), ExecutionGraph(after)
    assert not is_longer(views[1].makespan_us(), views[0].makespan_us())
    assert not is_longer(views[1].critical_path().us, views[0].critical_path().us)


def is_kept(step: Step, rewrite: ModulePass) -> None:
    """Fail unless a pass keeps results, takes no longer, and changes nothing the second time."""
    module = step.module()
    before = graph_of(module).clone()
    rewrite.apply(Context(), module)
    module.verify()
    graph = graph_of(module)
    assert_same(before, graph)
    no_longer(before, graph)
    text = text_of(module)
    assert graph_of(Compiler().parse(text, "again.mlir").module).symbol == "step"
    rewrite.apply(Context(), module)
    assert text_of(module) == text


@pytest.mark.parametrize("rewrite", PASSES, ids=SPELLED)
@LAX
@given(step=STEPS)
def test_results_stay_and_the_step_takes_no_longer(rewrite: ModulePass, step: Step) -> None:
    is_kept(step, rewrite)


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", PASSES, ids=SPELLED)
@THOROUGH
@given(step=STEPS)
def test_results_stay_and_the_step_takes_no_longer_thoroughly(
    rewrite: ModulePass, step: Step
) -> None:
    is_kept(step, rewrite)


@LAX
@given(step=STEPS)
def test_all_three_after_each_other_keep_results(step: Step) -> None:
    before, after = transformed(
        step, OverlapCommunicationPass(micro_batches=2), FuseCommunicationPass(), PrefetchKVPass()
    )
    assert_same(before, after)
    no_longer(before, after)


@LAX
@given(step=STEPS)
def test_cutting_the_rows_of_any_step_keeps_its_results(step: Step) -> None:
    module = step.module()
    graph = graph_of(module)
    before = graph.clone()
    second = split_rows(graph, topology_of(module))
    module.verify()
    assert_same(before, graph)
    requests = max(len(lane.prefills) + len(lane.decodes) for lane in step.lanes)
    assert bool(second) == (requests > 1)


def test_a_lost_sum_is_noticed() -> None:
    step = Step((Lane(((0, 4),), (3, 5), PAIR),), tp=2)
    graph = step.graph()
    wrong = graph.clone()
    lost = next(op for op in wrong.operators if isinstance(op, ex.AllReduceOp))
    lost.sums[0].replace_all_uses_with(lost.parts[0])
    with pytest.raises(AssertionError):
        assert_same(graph, wrong)


def test_lanes_that_are_added_up_are_not_cut() -> None:
    step = Step((Lane((), (3, 5), PAIR), Lane((), (3, 5), PAIR)), tp=2, interleaved=True)
    module = step.module()
    graph = graph_of(module)
    first, second = [op for op in graph.operators if op.layer_number is None
                     and isinstance(op, ex.NormOp)]  # fmt: skip
    second.operands[1] = first.results[0]
    before = graph.clone()
    split_rows(graph, topology_of(module))
    module.verify()
    assert_same(before, graph)


@LAX
@given(step=STEPS)
def test_a_stopwatch_says_what_the_graph_says(step: Step) -> None:
    for graph in transformed(step, OverlapCommunicationPass()):
        stopwatch, view = Stopwatch(), ExecutionGraph(graph)
        us = stopwatch.makespan_us(graph), stopwatch.critical_path_us(graph)
        assert us == pytest.approx((view.makespan_us(), view.critical_path().us), rel=1e-12)


@LAX
@given(step=STEPS)
def test_waits_come_back_as_they_were(step: Step) -> None:
    _, graph = transformed(step, OverlapCommunicationPass())
    text = str(graph)
    drop_waits(graph)
    add_waits(graph)
    assert str(graph) == text


@LAX
@given(step=steps(tiers=("host", "disk")), depth=st.integers(1, 3))
def test_kv_is_fetched_no_more_layers_ahead_than_it_may(step: Step, depth: int) -> None:
    _, graph = transformed(replace(step, lanes=step.lanes[:1]), PrefetchKVPass(depth))
    next_layer = 0
    for op in reversed(list(graph.operators)):  # upward: what is computed first below each op
        layer = op.layer_number
        if isinstance(op, ex.KVLoadOp | ex.KVMigrateOp):
            assert layer is not None
            assert layer - next_layer <= depth
        elif not isinstance(op, ex.RecvOp | ex.SendOp):
            next_layer = -1 if layer is None else layer


def messages(graph: ex.ExecGraphOp) -> Iterator[ex.OperatorOp]:
    kinds = ex.CollectiveOp | ex.SendOp | ex.RecvOp
    return (op for op in graph.operators if isinstance(op, kinds))


@LAX
@given(step=steps())
def test_all_messages_get_their_stream_or_none(step: Step) -> None:
    _, graph = transformed(step, OverlapCommunicationPass())
    assert len({op.stream_name for op in messages(graph)}) <= 1


def test_fusing_halves_the_messages_of_two_lanes_and_saves_their_latency() -> None:
    lane = Lane((), (3, 5), PAIR)
    step = Step((lane, lane), tp=2, interleaved=True, link=Link(1e9, 50.0))
    before, after = transformed(step, FuseCommunicationPass())
    sums = [[op for op in messages(g) if isinstance(op, ex.AllReduceOp)] for g in (before, after)]
    assert len(sums[0]) == 2 * len(sums[1]) == 8
    us = ExecutionGraph(before).makespan_us(), ExecutionGraph(after).makespan_us()
    assert us[0] - us[1] > 0.9 * (2 * 2 * step.layers) * 50.0


def test_half_of_the_rows_read_the_router_and_the_experts_that_they_go_to() -> None:
    # Each of 2 ranks has 4 of 8 experts, and two experts compute a token.
    step = Step((Lane(((0, 4), (0, 4)), (), PAIR),), tp=2, experts=8, phase="prefill")
    module = step.module()
    graph = graph_of(module)
    whole = next(op for op in graph.operators if isinstance(op, ex.FFNOp))
    split_rows(graph, topology_of(module))
    half = next(op for op in graph.operators if isinstance(op, ex.FFNOp))
    weights = [float(op.scalar("bytes")) - 2 * ex.tensor_of(op.normed).num_bytes
               for op in (whole, half)]  # fmt: skip
    read = [8 + 3 * step.width * 4 * (1 - 0.75**tokens) for tokens in (8, 4)]
    assert weights[1] / weights[0] == pytest.approx(read[1] / read[0], rel=1e-3)


def test_a_message_that_is_mostly_bandwidth_is_not_fused() -> None:
    lane = Lane((), (3, 5), PAIR)
    step = Step((lane, lane), tp=2, interleaved=True, link=Link(1e6, 0.001))
    before, after = transformed(step, FuseCommunicationPass())
    assert str(after) == str(before)


def test_half_of_a_long_prefill_hides_the_messages_of_the_other() -> None:
    lane = Lane(((0, 64), (0, 64)), (), PAIR)
    step = Step((lane,), layers=4, tp=2, phase="prefill", link=Link(2e7, 1.0))
    _, once = transformed(step, OverlapCommunicationPass())
    before, twice = transformed(step, OverlapCommunicationPass(micro_batches=2))
    assert ExecutionGraph(twice).makespan_us() < 0.85 * ExecutionGraph(once).makespan_us()
    assert_same(before, twice)


def test_in_a_pipeline_the_second_stage_begins_when_half_of_the_rows_are_there() -> None:
    lane = Lane(((0, 64), (0, 64)), (), (("g0",), ("g1",)))
    step = Step((lane,), layers=4, phase="prefill", link=Link(1e9, 1.0))
    before, after = transformed(step, OverlapCommunicationPass(micro_batches=2))
    assert ExecutionGraph(after).makespan_us() < 0.85 * ExecutionGraph(before).makespan_us()
    assert_same(before, after)


def test_a_lane_of_one_request_is_not_cut() -> None:
    lane = Lane(((0, 128),), (), PAIR)
    step = Step((lane,), tp=2, phase="prefill", link=Link(2e7, 1.0))
    _, once = transformed(step, OverlapCommunicationPass())
    _, twice = transformed(step, OverlapCommunicationPass(micro_batches=2))
    assert str(once) == str(twice)


def test_kv_from_the_host_hides_behind_the_layer_before() -> None:
    lane = Lane((), (12,) * 8, (("g0",),))
    step = Step((lane,), layers=3, phase="decode", tier="host", host_bytes_per_s=1e9)
    before, after = transformed(step, PrefetchKVPass())
    load_us = sum(op.estimated_us for op in after.operators if isinstance(op, ex.KVLoadOp))
    graphs = ExecutionGraph(before), ExecutionGraph(after)
    assert graphs[0].makespan_us() - graphs[1].makespan_us() > 0.5 * load_us


def test_a_memory_plan_goes_when_the_order_does() -> None:
    lane = Lane(((0, 4),), (3, 5), PAIR)
    step = Step((lane,), tp=2)
    _, planned = transformed(step, PlanMemoryPass())
    assert "peak_bytes" in planned.properties
    _, moved = transformed(step, PlanMemoryPass(), OverlapCommunicationPass())
    assert "peak_bytes" not in moved.properties
    assert not any("offsets" in op.properties for op in moved.operators)


def test_cutting_needs_the_devices_and_says_so() -> None:
    lane = Lane(((0, 4), (0, 4)), (), PAIR)
    step = Step((lane,), tp=2)
    module = ModuleOp([step.graph()])
    with pytest.raises(PassError, match=r"no cluster\.device @g0; there are: none"):
        OverlapCommunicationPass(micro_batches=2).apply(Context(), module)


@st.composite
def replicas_of_experts(draw: Callable[..., object]) -> ModuleOp:
    """Replicas that gather their tokens before the experts, in micro-batches."""
    tp = draw(st.sampled_from([1, 2]))
    contexts = draw(st.lists(st.integers(0, 9), min_size=4, max_size=9))
    batches = draw(st.integers(1, 3))
    assert isinstance(tp, int) and isinstance(contexts, list) and isinstance(batches, int)
    parallel = Parallel(tp=tp, dp=2)
    link = Link(draw(st.sampled_from([1e7, 1e9])), draw(st.sampled_from([0.5, 20.0])))  # type: ignore[arg-type]
    hardware = Hardware.uniform(parallel, Device(1e9, 1e9, 1.0), link)
    builder = ExecutionGraphBuilder(EXPERTS, parallel, hardware, micro_batches=batches)
    devices = parallel.devices
    around = [DeviceOp.named(name, flops_per_s=1e9, bytes_per_s=1e9) for name in devices]
    links = [
        LinkOp.between("g0", name, bytes_per_s=link.bytes_per_s, latency_us=link.latency_us)
        for name in devices[1:]
    ]
    return ModuleOp([*around, *links, builder.build_decode_graph(contexts, name="step").op])


EXPERTS = Model("m", 2, 8, 4, 2, 4, 8, 16, "f32", 64, 4, 2, 0, "")


@pytest.mark.parametrize("rewrite", PASSES, ids=SPELLED)
@LAX
@given(module=replicas_of_experts())
def test_replicas_that_exchange_tokens_stay_in_step(rewrite: ModulePass, module: ModuleOp) -> None:
    graph = graph_of(module)
    before = graph.clone()
    rewrite.apply(Context(), module)
    module.verify()
    assert_same(before, graph)
    no_longer(before, graph)
    groups = shared_groups(before)
    assert groups == shared_groups(graph) != set()
    for group in groups:
        exchanged = [op for op in messages(graph) if getattr(op, "group", None) == group]
        kinds = {d: [op.name for op in exchanged if op.device == d] for d in group}
        assert len({tuple(names) for names in kinds.values() if names}) == 1
        for pair in zip(*([op for op in exchanged if op.device == d] for d in kinds if kinds[d]),
                        strict=True):  # fmt: skip
            assert len({ex.tensor_of(op.operands[0]).shape for op in pair}) == 1
            assert len({op.layer_number for op in pair}) == 1
