"""Requests and decisions into graphs, and graphs as plain Python sees them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from sagec.builder import IRBuilder, IRGraph, IRNode
from sagec.compiler import Compiler
from sagec.dialects import pd
from sagec.passes import flow
from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.request import Request
from sagec.runtime.state import ANY, Decision, Instances, Running, State, Waiting
from tests.serving_graphs import Place, Round, Scene, rounds

COMPILER = Compiler()
PAIR = Scene((Place("p0", "prefill"), Place("d0", "decode")))
INSTANCES = Instances.of(["p0", "d0"], role=["prefill", "decode"], kv_blocks=64, block_tokens=16)


def builder(**options) -> IRBuilder:
    return IRBuilder(COMPILER.parse(PAIR.cluster(), "cluster.mlir").module, **options)


def state(waiting: Waiting | None = None, running: Running | None = None) -> State:
    return State(
        now_us=500,
        round=7,
        waiting=waiting or Waiting.of([]),
        running=running or Running.of([]),
        instances=INSTANCES,
    )


def ops_of(graph: IRGraph, kind: type) -> list:
    return [node.op for node in graph if isinstance(node.op, kind)]


def test_requests_become_a_wave_a_prefill_and_a_decode() -> None:
    asked = [
        Request(id="a", prompt=(1, 2, 3), max_output_tokens=5, arrival_us=9, ttft_us=70),
        Request(id="b", prompt=(1,), priority=2, tenant="blue", adapter="french"),
    ]
    graph = builder().build(asked, "file")
    assert graph.name == "file"
    assert [node.name for node in graph] == ["pd.requests", "pd.prefill", "pd.decode", "pd.yield"]
    (wave,) = ops_of(graph, pd.RequestsOp)
    assert wave.names == ("a", "b")
    assert wave.column("prompt").tolist() == [3, 1]
    assert wave.column("generate").tolist() == [5, pd.UNBOUNDED]
    assert wave.column("arrived").tolist() == [9, 0]
    assert wave.column("ttft").tolist() == [70, 0]
    assert wave.column("priority").tolist() == [0, 2]
    assert wave.words("tenant") == ["", "blue"]
    assert wave.words("adapter") == ["", "french"]
    assert "tpot" not in wave.properties, "what says nothing is left out"
    graph.module.verify()


def test_no_requests_are_a_graph_too() -> None:
    graph = builder().build([])
    graph.module.verify()
    assert graph.nodes[0].requests == ()


def test_the_graph_says_mode_horizon_policy_and_chunk() -> None:
    made = builder(mode="strict", horizon=4, policy="fifo", chunk=64)
    graph = made.build_round(state(Waiting.of(["a"], prompt_tokens=9, generate_tokens=2)), admit(1))
    assert graph.op.text("mode", "") == "strict"
    assert graph.op.text("policy", "") == "fifo"
    assert graph.op.number("horizon") == 4
    assert graph.op.number("now") == 500
    assert graph.op.number("round") == 7
    (prefill,) = ops_of(graph, pd.PrefillOp)
    assert prefill.chunk_tokens == 64


def admit(count: int) -> Decision:
    return Decision.admit(np.arange(count), Waiting.of([str(n) for n in range(count)]))


def test_a_decision_may_say_another_mode_and_horizon() -> None:
    import dataclasses

    decision = dataclasses.replace(admit(0), mode="time-share", horizon_steps=2)
    graph = builder(mode="strict", horizon=16).build_round(state(), decision)
    assert graph.op.text("mode", "") == "time-share"
    assert graph.op.number("horizon") == 2


def test_a_decision_becomes_verdicts_with_dense_ranks_reasons_and_places() -> None:
    import dataclasses

    waiting = Waiting.of(["a", "b", "c", "d"], prompt_tokens=9, generate_tokens=2)
    decision = Decision.admit(np.array([2, 0]), waiting, "slack", "no KV").reject(
        np.array([3]), "too late"
    )
    decision = dataclasses.replace(
        decision,
        rank=decision.rank * 10,
        prefill_on=np.array([0, ANY, ANY, ANY]),
        decode_on=np.array([ANY, ANY, 1, ANY]),
        chunk_tokens=np.array([0, 0, 32, 0]),
    )
    (decide,) = ops_of(builder().build_round(state(waiting), decision), pd.DecideOp)
    assert decide.column("verdict").tolist() == [pd.ADMIT, pd.DEFER, pd.ADMIT, pd.REJECT]
    assert decide.column("rank").tolist() == [1, 0, 0, 0]
    assert decide.words("because") == ["slack", "no KV", "slack", "too late"]
    assert decide.words("prefill_on") == ["p0", "", "", ""]
    assert decide.words("decode_on") == ["", "", "d0", ""]
    assert decide.column("chunk").tolist() == [0, 0, 32, 0]


def test_deadlines_are_arrival_and_what_was_promised() -> None:
    waiting = Waiting.of(
        ["a", "b"], prompt_tokens=9, generate_tokens=2, arrival_us=[30, 40], ttft_us=[100, 0]
    )
    (wave,) = ops_of(builder().build_round(state(waiting), admit(2)), pd.RequestsOp)
    assert wave.column("deadline").tolist() == [130, 0]


RUNNING = Running.of(
    ["started", "decodes", "arriving", "victim"],
    instance=[0, 1, 1, 1],
    prompt_tokens=[100, 50, 60, 70],
    computed_tokens=[40, 58, 0, 75],
    remaining_tokens=[8, 4, 9, 3],
    arriving=[False, False, True, False],
    decode_on=[1, 1, 1, 1],
)


def test_what_runs_is_a_resident_or_a_prompt_under_way() -> None:
    graph = builder().build_round(state(running=RUNNING), admit(0))
    (resident,), (wave,) = ops_of(graph, pd.ResidentOp), ops_of(graph, pd.RequestsOp)
    assert resident.names == ("decodes", "arriving", "victim")
    assert resident.column("context").tolist() == [58, 60, 75]
    assert resident.column("remaining").tolist() == [4, 9, 3]
    assert resident.column("arriving").tolist() == [0, 1, 0]
    assert resident.words("on") == ["d0", "d0", "d0"]
    assert wave.names == ("started",)
    assert wave.column("computed").tolist() == [40]
    assert (wave.words("on"), wave.words("decode_on")) == (["p0"], ["d0"])


def test_a_prompt_whose_output_ends_with_it_need_not_decode_where_it_is() -> None:
    running = Running.of(
        ["last"], instance=[0], prompt_tokens=[9], remaining_tokens=[1], decode_on=[0]
    )
    graph = builder().build_round(state(running=running), admit(0))
    (wave,) = ops_of(graph, pd.RequestsOp)
    assert (wave.words("on"), wave.words("decode_on")) == (["p0"], [""])


@pytest.mark.parametrize(("how", "verdict"), [(RECOMPUTE, pd.PREEMPT), (SWAP, pd.SWAP)])
def test_who_is_preempted_leaves_its_instance_and_decodes_no_more(how: int, verdict: int) -> None:
    decision = admit(0).preempt(np.array([3]), "KV", how)
    graph = builder().build_round(state(running=RUNNING), decision)
    (preempt,) = ops_of(graph, pd.PreemptOp)
    assert preempt.names == ("victim",)
    assert preempt.column("verdict").tolist() == [verdict]
    assert preempt.words("because") == ["KV"]
    (decode,) = ops_of(graph, pd.DecodeOp)
    assert "victim" not in flow.table(decode.kv).names


def test_a_dropped_graph_leaves_the_cluster_as_it_was() -> None:
    made = builder()
    before = str(made.module)
    graph = made.build_round(state(running=RUNNING), admit(0))
    assert str(graph) != before
    made.drop(graph)
    assert str(made.module) == before


def test_nodes_know_their_neighbours_and_requests() -> None:
    graph = builder().build([Request(id="a", prompt=(1,)), Request(id="b", prompt=(1,))])
    wave, prefill, decode, end = graph.nodes
    assert wave.inputs == []
    assert wave.users == [prefill]
    assert prefill.inputs == [wave]
    assert decode.users == [end]
    assert {node.requests for node in (wave, prefill, decode)} == {("a", "b")}
    assert end.requests == ()
    assert IRNode(wave.op) == wave


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(rounds())
def test_every_round_verifies_and_names_each_request_once(asked: Round) -> None:
    module = COMPILER.parse(asked.cluster(), "cluster.mlir").module
    graph = IRBuilder(module).build_round(asked.state, asked.decision)
    graph.module.verify()
    brought = [
        n for op in ops_of(graph, pd.TableOp) for n in op.names if op.results and not op.operands
    ]
    known = [*asked.state.waiting.ids.tolist(), *asked.state.running.ids.tolist()]
    assert sorted(brought) == sorted(set(brought))
    assert set(brought) <= set(known)
    left = set(known) - set(brought)
    running = asked.state.running.ids[asked.decision.preempt_rows].tolist()
    assert left <= set(running)
