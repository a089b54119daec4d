"""Graphs of steps: their arithmetic by hand, and what holds for any model and layout."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp

from sagec.compiler import Compiler
from sagec.dialects import exec as ex
from sagec.dialects import pd
from sagec.lowering.execution_graph_builder import (
    Chunk,
    ExecutionGraphBuilder,
    Hardware,
    Parallel,
    StepTokens,
    Tier,
    misfit,
)
from sagec.passes.execution_graph import ExecutionGraph, OpNode, OpType, turn_of
from sagec.passes.topology import Model, topology_of
from sagec.runtime import roofline

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

SMALL = Model(
    name="small",
    layers=2,
    hidden=8,
    heads=4,
    kv_heads=2,
    head_dim=3,
    ffn=10,
    vocab=20,
    dtype="bf16",
    max_context=1024,
    experts=0,
    experts_per_token=0,
    tied=0,
    path="",
)
EXPERTS = replace(SMALL, experts=4, experts_per_token=2)
ALONE = Parallel()
DEVICE = roofline.Device(flops_per_s=1e12, bytes_per_s=1e11, launch_us=1.0)
LINK = roofline.Link(bytes_per_s=1e10, latency_us=2.0)
LAX = settings(max_examples=60, deadline=None)


def builder(
    model: Model = SMALL, parallel: Parallel = ALONE, micro_batches: int = 1
) -> ExecutionGraphBuilder:
    hardware = Hardware.uniform(parallel, DEVICE, LINK)
    return ExecutionGraphBuilder(model, parallel, hardware, micro_batches=micro_batches)


def of_kind(graph: ExecutionGraph, kind: OpType, layer: int | None = 0) -> OpNode:
    """The first op of a kind, in a layer."""
    return next(n for n in graph.nodes if n.type is kind and n.layer == layer)


def verified(graph: ExecutionGraph) -> ExecutionGraph:
    graph.op.verify()
    return graph


# By hand: 5 tokens of a chunk [2, 7), and a decode with 9 tokens before it; bf16, 2 bytes each.
HAND = {
    OpType.EMBEDDING: (0, 6 * 4 + 6 * 8 * 2 + 6 * 8 * 2),  # ids, rows of the table, hidden
    OpType.NORM: (6 * 8 * 4, 2 * 6 * 8 * 2 + 8 * 2),  # nothing is added yet: in, out, weight
    OpType.QKV: (2 * 6 * 8 * 24, 2 * (8 * 24 + 6 * 8 + 6 * 24)),
    # token 2 attends to 3 tokens, ..., token 6 to 7: 3 + 4 + 5 + 6 + 7 = 25 pairs of 4 heads of 3
    OpType.PREFILL_ATTENTION: (4 * 4 * 3 * 25, 2 * (5 * 24 + 2 * 12 + 5 * 12 + 5 * 12)),
    OpType.DECODE_ATTENTION: (4 * 4 * 3 * 10, 2 * (1 * 24 + 9 * 12 + 1 * 12 + 1 * 12)),
    OpType.KV_LOAD: (0, 0),
    OpType.KV_STORE: (0, 2 * (5 * 12) * 2),  # read, and written to the cache
    OpType.PROJECTION: (2 * 6 * 12 * 8, 2 * (12 * 8 + 6 * 12 + 6 * 8)),
    OpType.FFN: (6 * 6 * 8 * 10, 2 * (3 * 8 * 10 + 2 * 6 * 8)),
}


@pytest.mark.parametrize("kind", HAND, ids=lambda kind: kind.value)
def test_an_operator_costs_what_a_hand_computes(kind: OpType) -> None:
    graph = verified(builder().build_hybrid_graph([(2, 7)], [9]))
    layer = None if kind is OpType.EMBEDDING else 0
    node = of_kind(graph, kind, layer)
    assert (node.flops, node.bytes) == HAND[kind]
    free = kind is OpType.KV_LOAD
    us = 0.0 if free else DEVICE.operator_us(*map(float, HAND[kind]))
    assert node.estimated_us == pytest.approx(us, abs=1e-3)


def test_logits_cost_the_rows_that_sample() -> None:
    graph = verified(builder().build_hybrid_graph([(2, 7), (0, 3)], [9], samples=[True, False]))
    head, sample = of_kind(graph, OpType.LM_HEAD, None), of_kind(graph, OpType.SAMPLE, None)
    assert head.op.column("rows").tolist() == [4, 8]
    assert (head.flops, head.bytes) == (2 * 2 * 8 * 20, 2 * (8 * 20 + 2 * 8 + 2 * 20))
    assert (sample.flops, sample.bytes) == (2 * 20, 2 * 2 * 20 + 2 * 4)


def test_a_norm_that_adds_reads_and_writes_two_tensors_each() -> None:
    second = [n for n in builder().build_decode_graph([3]).nodes if n.type is OpType.NORM][1]
    assert (second.flops, second.bytes) == (8 * 5, 4 * 8 * 2 + 8 * 2)


def test_experts_are_read_as_far_as_tokens_go_to_them() -> None:
    # Two of four experts a token. The router, [8, 4], sees each of 3 tokens. Each of the 4 experts
    # is missed by all 3 tokens with probability 1/8.
    ffn = of_kind(verified(builder(EXPERTS).build_decode_graph([1, 2, 3])), OpType.FFN)
    assert ffn.flops == 2 * 3 * 8 * 4 + 2 * 3 * (6 * 8 * 10)
    assert ffn.bytes == 2 * (8 * 4 + 4 * (7 / 8) * 3 * 8 * 10 + 2 * 3 * 8)


def test_a_collective_sends_what_a_ring_does() -> None:
    graph = verified(builder(parallel=Parallel(tp=2)).build_decode_graph([1, 2, 3]))
    reduce, gather = of_kind(graph, OpType.ALL_REDUCE), of_kind(graph, OpType.ALL_GATHER, None)
    assert reduce.bytes == 3 * 8 * 2  # half of the tensor, there and back
    assert reduce.estimated_us == pytest.approx(LINK.all_reduce_us(48, 2), abs=1e-3)
    assert gather.bytes == 3 * 20 * 2 / 2
    assert gather.estimated_us == pytest.approx(LINK.all_gather_us(120, 2), abs=1e-3)
    assert gather.op.number("axis") == 1


def test_a_ring_is_as_slow_as_its_slowest_hop_and_an_operator_as_its_slowest_rank() -> None:
    slow = roofline.Device(1e11, 1e10, launch_us=3.0)
    links = {
        frozenset("ab"): LINK,
        frozenset("bc"): roofline.Link(1e9, 1.0),
        frozenset("ac"): roofline.Link(1e10, 7.0),
    }
    hardware = Hardware({"a": DEVICE, "b": slow, "c": DEVICE}, lambda s, t: links[frozenset(s + t)])
    assert hardware.ring("abc") == roofline.Link(1e9, 7.0)
    assert hardware.operator_us("ab", 1e6, 0.0) == slow.operator_us(1e6, 0.0)


# Whatever the model and the layout.


@st.composite
def models(draw: st.DrawFn) -> Model:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    experts = draw(st.sampled_from([0, 0, 4, 8]))
    return replace(
        SMALL,
        layers=draw(st.integers(1, 4)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        ffn=draw(st.sampled_from([8, 12, 10])),
        vocab=draw(st.integers(16, 21)),
        dtype=draw(st.sampled_from(["bf16", "f32", "fp8"])),
        experts=experts,
        experts_per_token=draw(st.integers(1, experts)) if experts else 0,
    )


layouts = st.builds(
    Parallel, tp=st.sampled_from([1, 2, 3, 4]), pp=st.integers(1, 3), dp=st.integers(1, 2)
)
chunks = st.tuples(st.integers(0, 5), st.integers(1, 6)).map(lambda c: (c[0], c[0] + c[1]))
steps = st.tuples(
    st.lists(st.tuples(chunks, st.booleans()), max_size=4), st.lists(st.integers(0, 30), max_size=4)
).filter(lambda step: bool(step[0] or step[1]))
Step = tuple[list[tuple[Chunk, bool]], list[int]]


def tokens_of(step: Step) -> StepTokens:
    prompts, contexts = step
    bounds, samples = tuple(c for c, _ in prompts), tuple(s for _, s in prompts)
    return StepTokens(bounds, samples, tuple(contexts))


@LAX
@given(models(), layouts, steps, st.integers(1, 3))
def test_a_layout_that_fits_gives_a_graph_and_one_that_does_not_a_line(
    model: Model, layout: Parallel, step: Step, micro_batches: int
) -> None:
    if (why := misfit(model, layout)) is not None:
        assert "\n" not in why
        with pytest.raises(ValueError, match="model @small: "):
            builder(model, layout)
        return
    graph = builder(model, layout, micro_batches).build(tokens_of(step), name="g")
    module = ModuleOp([graph.op])
    module.verify()
    assert set(graph.devices) <= set(layout.devices)
    path, makespan = graph.critical_path(), graph.makespan_us()
    assert path.us <= makespan + 1e-6
    assert makespan <= graph.total_us() + 1e-6
    assert graph.topological_order() == graph.nodes
    edges = {(edge.source, edge.target) for edge in graph.edges}
    for node, following in itertools.pairwise(path.nodes):
        in_turn = turn_of(node.op) is not None and turn_of(node.op) == turn_of(following.op)
        assert in_turn or (node, following) in edges
    assert graph.peak_memory_bytes() == max(map(graph.peak_memory_bytes, graph.devices))


@LAX
@given(models(), layouts, steps, st.integers(1, 3))
def test_every_request_is_computed_once(
    model: Model, layout: Parallel, step: Step, micro_batches: int
) -> None:
    assume(misfit(model, layout) is None)
    wanted = tokens_of(step)
    graph = builder(model, layout, micro_batches).build(wanted, name="g")
    columns = [n.op for n in graph.nodes if n.layer == 0]
    prefills = [op for op in columns if isinstance(op, ex.PrefillAttentionOp)]
    found = [b for op in prefills for b in zip(op.column("begin"), op.column("end"), strict=True)]
    assert sorted(found) == sorted(wanted.chunks)
    decodes = [op for op in columns if isinstance(op, ex.DecodeAttentionOp)]
    contexts = [context for op in decodes for context in op.column("context").tolist()]
    padding = len(contexts) - len(wanted.contexts)
    assert sorted(contexts) == sorted([*wanted.contexts, *[0] * padding])
    assert padding == 0 or (model.experts and layout.dp > 1)
    sampled = sum(n.outputs[0].shape[0] for n in graph.nodes if n.type is OpType.SAMPLE)
    assert sampled == len(wanted.sampled_rows)


MATMULS = (OpType.QKV, OpType.PROJECTION, OpType.FFN, OpType.LM_HEAD)
ATTENTIONS = (OpType.PREFILL_ATTENTION, OpType.DECODE_ATTENTION)


@LAX
@given(models(), st.sampled_from([1, 2, 4]), st.integers(1, 3), steps)
def test_the_ranks_together_compute_what_the_closed_form_says(
    model: Model, tp: int, pp: int, step: Step
) -> None:
    layout = Parallel(tp=tp, pp=pp)
    assume(misfit(model, layout) is None and model.kv_heads % tp == model.vocab % tp == 0)
    wanted = tokens_of(step)
    graph = builder(model, layout).build(wanted, name="g")
    flops = tp * sum(n.flops for n in graph.nodes if n.type in (*MATMULS, *ATTENTIONS))
    router = 2.0 * model.layers * model.hidden * model.experts * tp  # each rank has all of it
    whole = [*wanted.chunks, *((context, context + 1) for context in wanted.contexts)]
    pairs = sum(math.comb(end + 1, 2) - math.comb(begin + 1, 2) for begin, end in whole)
    expected = wanted.tokens * (model.flops_per_token + router) + pairs * model.flops_per_pair
    expected += len(wanted.sampled_rows) * model.head_flops_per_token
    assert flops == pytest.approx(expected, rel=1e-6, abs=tp * len(graph.nodes))


def test_weights_are_read_once_a_step() -> None:
    wide = replace(SMALL, hidden=512, ffn=2048, vocab=4096, heads=8, kv_heads=8, head_dim=64)
    graph = builder(wide).build_decode_graph([0])
    embedding = wide.vocab * wide.hidden * 2  # of which a step reads a row a token
    assert graph.bytes == pytest.approx(wide.weight_bytes - embedding, rel=0.02)


def test_micro_batches_keep_stages_busy_beside_each_other() -> None:
    layout = Parallel(pp=2)
    one = builder(SMALL, layout).build_decode_graph([100] * 8)
    two = verified(builder(SMALL, layout, micro_batches=2).build_decode_graph([100] * 8))
    assert one.makespan_us() == pytest.approx(one.total_us())
    assert two.makespan_us() < 0.8 * two.total_us()
    assert len({n.op.number("channel") for n in two.nodes if n.type is OpType.SEND}) == 4


def test_dense_replicas_exchange_nothing() -> None:
    graph = verified(builder(parallel=Parallel(dp=2)).build_hybrid_graph([(0, 5)], [7, 8]))
    lanes = [graph.subgraph(n for n in graph.nodes if n.device == d) for d in ("g0", "g1")]
    assert sum(len(lane.edges) for lane in lanes) == len(graph.edges)
    assert graph.makespan_us() == max(lane.makespan_us() for lane in lanes)
    assert not any(n.type is OpType.ALL_GATHER for n in graph.nodes)


def test_replicas_of_experts_exchange_as_many_tokens_each() -> None:
    graph = verified(builder(EXPERTS, Parallel(dp=2)).build_hybrid_graph([(0, 5)], [7, 8]))
    gathers = [n for n in graph.nodes if n.type is OpType.ALL_GATHER and n.layer == 0]
    assert [n.device for n in gathers] == ["g0", "g1"]
    assert {n.outputs[0].shape for n in gathers} == {(10, 8)}
    (ffn, *_) = [n for n in graph.nodes if n.type is OpType.FFN]
    assert ffn.op.number("experts") == 2
    decodes = [n.op for n in graph.nodes if n.type is OpType.DECODE_ATTENTION and n.layer == 0]
    assert [op.column("context").tolist() for op in decodes] == [[7, 8, 0, 0, 0]]


def test_replicas_of_experts_wait_for_each_other() -> None:
    # One replica attends to much, so the other's experts wait for its tokens.
    graph = verified(builder(EXPERTS, Parallel(dp=2)).build_decode_graph([100_000, 1]))
    gathers = [n for n in graph.nodes if n.type is OpType.ALL_GATHER and n.layer == 0]
    begins = graph.begins_us()
    assert begins[gathers[0]] == begins[gathers[1]]
    attention = [n.estimated_us for n in graph.nodes if n.type is OpType.DECODE_ATTENTION]
    assert max(attention) > 20 * min(attention)
    lanes = [graph.subgraph(n for n in graph.nodes if n.device == d) for d in ("g0", "g1")]
    assert lanes[1].makespan_us() < 0.5 * graph.makespan_us()
    assert len(graph.edges) == sum(len(lane.edges) for lane in lanes) + 2 * 2 * EXPERTS.layers


def test_kv_that_lies_elsewhere_comes_and_goes_by_a_link() -> None:
    hardware = Hardware.uniform(ALONE, DEVICE, LINK)
    far = ExecutionGraphBuilder(SMALL, ALONE, hardware, kv_tier=Tier("host", LINK))
    graph = verified(far.build_decode_graph([1000]))
    load, store = of_kind(graph, OpType.KV_LOAD), of_kind(graph, OpType.KV_STORE)
    assert (load.op.scalar("tier"), store.op.scalar("tier")) == ("host", "host")
    assert (load.bytes, store.bytes) == (1000 * 12 * 2, 12 * 2)
    assert load.estimated_us == pytest.approx(LINK.send_us(load.bytes), abs=1e-3)
    assert store.estimated_us == pytest.approx(LINK.send_us(store.bytes), abs=1e-3)
    assert (
        graph.peak_memory_bytes() > load.bytes > builder().build_decode_graph([1000]).nodes[4].bytes
    )


def test_quantised_kv_is_smaller_and_fp8_weights_compute_in_bf16() -> None:
    hardware = Hardware.uniform(Parallel(), DEVICE, LINK)
    made = ExecutionGraphBuilder(
        replace(SMALL, dtype="fp8"), Parallel(), hardware, kv_dtype="int4"
    ).build_decode_graph([6])
    assert of_kind(made, OpType.KV_LOAD).outputs[0].num_bytes == 6 * 12 // 2
    assert of_kind(made, OpType.QKV).outputs[0].dtype == "bf16"
    assert of_kind(made, OpType.QKV).bytes == 8 * 24 + 2 * (8 + 24)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda b: b.build_prefill_graph([(3, 3)]), r"chunk \[3, 3\) is empty"),
        (lambda b: b.build_prefill_graph([]), "a prefill step of 0 chunks and 0 decodes"),
        (lambda b: b.build_decode_graph([]), "a decode step of 0 chunks and 0 decodes"),
        (lambda b: b.build_decode_graph([-1]), "context -1; 0 or more tokens"),
        (lambda b: b.build_hybrid_graph([(0, 1)], []), "a hybrid step of 1 chunks and 0 decodes"),
        (lambda b: b.build_prefill_graph([(0, 1)], [True, True]), "1 chunks and 2 samples"),
        (lambda b: builder(micro_batches=0), "micro_batches=0; 1 or more"),
        (lambda b: Parallel(tp=0), "tp=0 pp=1 dp=1; each is 1 or more"),
        (lambda b: Parallel(tp=2, devices=("a",)), "is 2 ranks, on 1 devices"),
        (lambda b: builder(SMALL, Parallel(tp=4, dp=1)), "ffn 10 does not split over tp=4; what"),
        (lambda b: builder(replace(EXPERTS, experts_per_token=5)), "5 experts_per_token of 4 exp"),
        (lambda b: builder(replace(EXPERTS, experts_per_token=0)), "0 experts_per_token of 4 exp"),
        (
            lambda b: ExecutionGraphBuilder(SMALL, ALONE, Hardware({}, lambda a, b: LINK)),
            "nothing is known of device @g0",
        ),
        (lambda b: builder(EXPERTS, Parallel(dp=3)), "4 experts do not split over tp=1 x dp=3"),
    ],
)
def test_what_no_step_has_is_refused_in_a_line(build: object, says: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=says):
        build(builder())


def test_kv_heads_that_neither_split_nor_repeat_are_refused() -> None:
    model = replace(SMALL, heads=12, kv_heads=4, ffn=12)
    assert misfit(model, Parallel(tp=6)) == (
        "4 kv_heads neither split over tp=6 nor repeat; what does: tp = 1, 2, 4, 12"
    )


# From scheduled graphs.


@pytest.mark.parametrize("name", ["tour", "hybrid"])
def test_the_steps_of_an_example_become_graphs_of_as_many_tokens(name: str) -> None:
    compiler = Compiler()
    unit = compiler.read(str(EXAMPLES / f"{name}.sage"))
    compiler.optimize(unit.module, "serve,convert-pd-to-exec")
    unit.module.verify()
    text = str(unit.module)
    compiler.optimize(unit.module, "convert-pd-to-exec")
    assert str(unit.module) == text
    made = {op.symbol: op for op in unit.module.body.block.ops if isinstance(op, ex.ExecGraphOp)}
    assert made
    for steps in (op for op in unit.module.walk() if isinstance(op, pd.StepsOp)):
        if steps.step_tokens is None or steps.properties.get("source") is not None:
            continue  # KV that comes from elsewhere may come later than the first step
        for step, tokens in enumerate(steps.step_tokens.array.tolist()):
            graph = made.pop(f"serve_{steps.instance_name}_{step}")
            assert tokens == sum(
                n.outputs[0].shape[0] for n in ExecutionGraph(graph).nodes if n.type is OpType.INPUT
            )


def test_devices_are_reached_by_the_fastest_way() -> None:
    module = (
        Compiler()
        .parse(
            "cluster.device @a\ncluster.device @b\ncluster.device @c\ncluster.switch @s\n"
            "cluster.link @a to @b {bytes_per_s = 1.0e6, latency_us = 1.0}\n"
            "cluster.link @a to @s {bytes_per_s = 1.0e9, latency_us = 2.0}\n"
            "cluster.link @s to @b {bytes_per_s = 2.0e9, latency_us = 3.0}\n",
            "test.mlir",
        )
        .module
    )
    topology = topology_of(module)
    path = topology.device_path("a", "b")
    assert path is not None
    assert (path.places, path.bytes_per_s, path.latency_us) == (("a", "s", "b"), 1e9, 5.0)
    assert topology.device_path("a", "c") is None
    assert topology.device_path("a", "a") is None
