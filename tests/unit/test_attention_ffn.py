"""separate-phases{scheme=af}: feed-forward goes elsewhere only where that is faster, and nothing is
computed otherwise than before."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.printer import Printer

from sagec.compiler import Compiler
from sagec.dialects import cluster
from sagec.dialects import exec as ex
from sagec.passes.errors import PassError
from sagec.passes.execution_graph import ExecutionGraph
from sagec.passes.plan_memory import PlanMemoryPass, check_memory_plan
from sagec.passes.separate_phases import SeparatePhasesPass
from sagec.runtime.roofline import Device, Link
from sagec.universe import sagec_context
from tests.exec_graphs import Lane, Step, steps
from tests.exec_interpreter import assert_same, run

LAX = settings(suppress_health_check=list(HealthCheck), max_examples=35, deadline=None)

FAST_LINK = Link(bytes_per_s=1e12, latency_us=0.1)
BALANCED = Step(
    lanes=(Lane(prefills=((0, 4), (2, 6)), decodes=(90,) * 8, stages=(("g0",),)),),
    layers=3, width=64, device=Device(1e9, 1e9, 0.0), link=FAST_LINK,
)  # fmt: skip
"""Attention and feed-forward take about as long, and messages nothing."""


def graph_in(module: ModuleOp) -> ex.ExecGraphOp:
    return next(op for op in module.body.block.ops if isinstance(op, ex.ExecGraphOp))


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def with_pool(step: Step, link: Link) -> ModuleOp:
    """The module of a step, and an instance @f for feed-forward with a device for each rank."""
    module = step.module()
    graph = graph_in(module)
    devices = [f"f{rank}" for rank in range(step.tp)]
    speeds = {"flops_per_s": step.device.flops_per_s, "bytes_per_s": step.device.bytes_per_s}
    ends = {"bytes_per_s": link.bytes_per_s, "latency_us": link.latency_us}
    ops = [cluster.DeviceOp.named(device, **speeds) for device in devices]
    ops += [cluster.LinkOp.between(a, b, **ends) for a in step.devices for b in devices]
    ops += [cluster.InstanceOp.of("f", devices, "sim", "both", "m", tp=step.tp, kv_blocks=1)]
    module.body.block.insert_ops_before(ops, graph)
    module.verify()
    return module


def part(module: ModuleOp, micro_batches: int = 2, ffn: str = "f") -> None:
    af = SeparatePhasesPass(scheme="af", ffn=ffn, micro_batches=micro_batches)
    af.apply(sagec_context(), module)
    module.verify()


links = st.builds(Link, st.sampled_from([1e4, 1e7, 1e10]), st.sampled_from([0.1, 30.0]))
wider_steps = st.builds(
    lambda step, width, launch_us: replace(
        step, width=width, device=Device(1e9, 1e9, launch_us)
    ),
    steps(), st.sampled_from([16, 256]), st.sampled_from([0.0, 1.0]),
)  # fmt: skip


def parted_or_refused(step: Step, link: Link, count: int) -> None:
    module = with_pool(step, link)
    before = graph_in(module).clone()
    text = text_of(module)
    try:
        part(module, count)
    except PassError as error:
        assert "\n" not in error.message
        event(error.message[:30])
        assert text_of(module) == text
        return
    event("parted")
    after = graph_in(module)
    assert ExecutionGraph(after).makespan_us() < ExecutionGraph(before).makespan_us()
    assert_same(run(before), after)
    ffns = [op for op in after.operators if isinstance(op, ex.FFNOp)]
    assert {op.device for op in ffns} == {"f0"}
    assert len(ffns) <= count * sum(isinstance(op, ex.FFNOp) for op in before.operators)
    parted = text_of(module)
    part(module, count)
    assert text_of(module) == parted
    assert text_of(Compiler().parse(parted, "step.mlir").module) == parted


@LAX
@given(wider_steps, links, st.integers(1, 3))
def test_a_graph_is_parted_only_where_that_is_faster_and_computes_the_same(
    step: Step, link: Link, count: int
) -> None:
    parted_or_refused(step, link, count)


@pytest.mark.slow
@settings(LAX, max_examples=300)
@given(wider_steps, links, st.integers(1, 3))
def test_a_graph_is_parted_only_where_that_is_faster_thoroughly(
    step: Step, link: Link, count: int
) -> None:
    parted_or_refused(step, link, count)


def test_sums_of_feed_forward_are_made_in_the_pool() -> None:
    lane = replace(BALANCED.lanes[0], stages=(("g0", "g1"),))
    module = with_pool(replace(BALANCED, lanes=(lane,), tp=2), FAST_LINK)
    before = graph_in(module).clone()
    part(module)
    groups = [op.group for op in graph_in(module).operators if isinstance(op, ex.AllReduceOp)]
    assert groups.count(("f0", "f1")) == groups.count(("g0", "g1")) == 2 * BALANCED.layers
    assert_same(before, graph_in(module))


def test_pipeline_stages_share_a_pool_and_hand_over_in_micro_batches() -> None:
    lane = replace(BALANCED.lanes[0], stages=(("g0",), ("g1",)))
    module = with_pool(replace(BALANCED, lanes=(lane,)), FAST_LINK)
    before = graph_in(module).clone()
    part(module)
    sends = [op for op in graph_in(module).operators if isinstance(op, ex.SendOp)]
    assert [op.other for op in sends].count("g1") > 2
    assert_same(before, graph_in(module))


def test_lanes_that_are_micro_batches_already_go_to_the_pool_as_they_are() -> None:
    lane = Lane(prefills=(), decodes=(90,) * 6, stages=(("g0",),))
    module = with_pool(replace(BALANCED, lanes=(lane, lane)), FAST_LINK)
    before = graph_in(module).clone()
    part(module, micro_batches=1)
    assert not any(isinstance(op, ex.SliceOp) for op in graph_in(module).operators)
    assert_same(before, graph_in(module))


def test_a_micro_batch_reads_the_experts_that_its_tokens_go_to() -> None:
    step = replace(BALANCED, experts=8)
    module = with_pool(step, FAST_LINK)
    whole = next(op for op in graph_in(module).operators if isinstance(op, ex.FFNOp))
    part(module)
    parts = [op for op in graph_in(module).operators if isinstance(op, ex.FFNOp)][:2]
    moved = [float(op.scalar("bytes")) for op in (whole, *parts)]
    assert moved[0] / 2 < moved[1] < moved[0] and moved[0] < moved[1] + moved[2]


def test_replicas_that_exchange_tokens_are_refused() -> None:
    module = with_pool(BALANCED, FAST_LINK)
    graph = graph_in(module)
    ffn = next(op for op in graph.operators if isinstance(op, ex.FFNOp))
    tensor = ex.tensor_of(ffn.normed)
    wide = ex.TensorType.of((2 * tensor.shape[0], tensor.shape[1]), tensor.dtype, "g0")
    gather = ex.AllGatherOp.of(
        [ffn.normed], [wide], more={"ranks": ex.ranks_of(["g0", "g9"])}, layer=0
    )
    graph.body.block.insert_op_before(gather, ffn)
    with pytest.raises(PassError, match=r"exec\.all_gather in layer 0 .* use dp 1"):
        part(module)


def test_a_transfer_of_one_micro_batch_runs_beside_the_others_computing() -> None:
    module = with_pool(BALANCED, Link(3e7, 1.0))
    part(module)
    view = ExecutionGraph(graph_in(module))
    begins = view.begins_us()

    def busy(node_stream: tuple[str, str]) -> list[tuple[float, float]]:
        return [
            (begins[node], begins[node] + node.estimated_us)
            for node in view.nodes
            if (node.device, node.stream) == node_stream and node.estimated_us
        ]

    computing = busy(("g0", "compute")) + busy(("f0", "compute"))
    sending = busy(("g0", "comm")) + busy(("f0", "comm"))
    beside = [s for s in sending if any(a < s[1] and s[0] < b for a, b in computing)]
    assert len(sending) == 12  # 3 layers, 2 micro-batches, there and back
    assert len(beside) >= 9


def test_pools_of_equal_work_take_nearly_half_the_time() -> None:
    module = with_pool(BALANCED, FAST_LINK)
    view = ExecutionGraph(graph_in(module))
    ffn_us = sum(n.estimated_us for n in view.nodes if isinstance(n.op, ex.FFNOp))
    before_us = view.makespan_us()
    assert 0.35 < ffn_us / before_us < 0.65
    part(module)
    after_us = ExecutionGraph(graph_in(module)).makespan_us()
    assert max(ffn_us, before_us - ffn_us) <= after_us < 0.85 * before_us


@pytest.mark.parametrize(
    ("step", "link", "why"),
    [
        (BALANCED, Link(1e5, 1.0), "the link is busy longer than either pool computes"),
        (BALANCED, Link(1e9, 25.0), "the others do not hide a micro-batch's way there and back"),
        (
            replace(BALANCED, width=1024, device=Device(1e12, 1e9, 0.0)),
            FAST_LINK,
            "micro-batches take longer together than all rows at once",
        ),
    ],
)
def test_a_refusal_says_the_times_and_what_they_mean(step: Step, link: Link, why: str) -> None:
    module = with_pool(step, link)
    before_us = ExecutionGraph(graph_in(module)).makespan_us()
    with pytest.raises(PassError) as refused:
        part(module)
    message = refused.value.message
    assert f"takes {before_us:.1f} us as it is" in message
    assert "us of attention" in message and "us of feed-forward" in message
    assert f"dead zone: {why}" in message
    assert "\n" not in message


def test_a_parted_graph_forgets_its_memory_and_can_be_given_new() -> None:
    module = with_pool(BALANCED, FAST_LINK)
    PlanMemoryPass().apply(sagec_context(), module)
    part(module)
    assert "offsets" not in text_of(module) and "peak_bytes" not in text_of(module)
    before = graph_in(module).clone()
    PlanMemoryPass(alignment_bytes=4).apply(sagec_context(), module)
    graph = graph_in(module)
    check_memory_plan(graph)
    assert_same(before, graph)
    slices = [op for op in graph.operators if isinstance(op, ex.SliceOp) and op.offset_bytes]
    embedding = next(op for op in graph.operators if isinstance(op, ex.EmbeddingOp))
    assert all(
        int(op.offset_bytes[0]) >= int(embedding.offset_bytes[0])  # type: ignore[index]
        for op in slices
        if op.whole is embedding.hidden
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": ""}, "scheme=af: ffn= is missing; say where feed-forward goes, one of: @f, "),
        ({"ffn": "x9"}, "ffn=x9 is no instance and no device; say where"),
        ({"ffn": "g0"}, "@g0 of @g0 computes attention of exec.graph @step already"),
        ({"ffn": "f", "micro_batches": 0}, "micro_batches=0; it must be 1 or more"),
        ({"ffn": "f", "micro_batches": 11}, "exec.graph @step computes 10 requests together, "
         "too few for 11 micro-batches; at most micro_batches=10"),
    ],
)  # fmt: skip
def test_what_cannot_be_parted_is_refused(options: dict[str, object], message: str) -> None:
    module = with_pool(BALANCED, FAST_LINK)
    with pytest.raises(PassError) as refused:
        SeparatePhasesPass(scheme="af", **options).apply(sagec_context(), module)  # type: ignore[arg-type]
    assert message in refused.value.message


def test_a_pool_has_a_device_for_each_rank() -> None:
    lane = Lane(prefills=(), decodes=(5, 6), stages=(("g0", "g1"),))
    module = with_pool(replace(BALANCED, lanes=(lane,), tp=2), FAST_LINK)
    with pytest.raises(PassError, match=r"@f0 has 1 devices, and exec\.graph @step has tp 2"):
        part(module, ffn="f0")


def test_ffn_without_scheme_af_is_refused() -> None:
    with pytest.raises(PassError, match="ffn=f is for scheme=af, and this is scheme=pd"):
        SeparatePhasesPass(ffn="f").apply(sagec_context(), BALANCED.module())


def test_a_pool_that_no_link_leads_to_is_refused() -> None:
    module = with_pool(BALANCED, FAST_LINK)
    module.body.block.insert_op_before(cluster.DeviceOp.named("alone"), graph_in(module))
    with pytest.raises(PassError, match="no link leads from @g0 to @alone"):
        part(module, ffn="alone")
