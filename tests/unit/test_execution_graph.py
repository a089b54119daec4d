"""What ExecutionGraph says of graphs small enough to check by hand."""

from __future__ import annotations

import re

import pytest
from xdsl.dialects.builtin import ModuleOp

from sagec.dialects import exec as ex
from sagec.passes.errors import PassError
from sagec.passes.execution_graph import ExecutionGraph, OpNode, OpType, TensorRef
from sagec.source import parse_module, verify_module
from sagec.universe import sagec_context

CONTEXT = sagec_context()


def graph_of(body: str, verify: bool = True) -> ExecutionGraph:
    """The graph `@g` of these ops; the types of tensors may be written `T` and `KV`."""
    body = re.sub(r"\bT\b", "!exec.tensor<[4, 8], bf16, @g0>", body)
    body = re.sub(r"\bKV\b", "!exec.tensor<[4, 2, 1, 2], bf16, @g0>", body)
    text = f'exec.graph @g {{phase = "hybrid", model = "m"}} {{\n{body}\n}}'
    module: ModuleOp = parse_module(text, "test.mlir", CONTEXT)
    if verify:
        verify_module(module, text)
    (graph,) = (op for op in module.body.block.ops if isinstance(op, ex.ExecGraphOp))
    module.body.block.detach_op(graph)
    return ExecutionGraph(graph)


DIAMOND = """
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t {time_us = 1, flops = 10, bytes = 5} -> T
  %y = exec.all_reduce %x {time_us = 6, bytes = 64} over [@g0, @g1] -> T
  %z = exec.ffn %x {width = 4, layer = 2, time_us = 4, flops = 90, bytes = 20} -> T
  %n, %s = exec.norm %y, %z {time_us = 2} -> T, T
  exec.yield %n
"""

STREAMS = """
  %t = exec.input -> !exec.tensor<[4], i32, @g0>
  %x = exec.embedding %t {time_us = 1} -> T
  %w = exec.wait %x {stream = "comm"} -> T
  %y = exec.all_reduce %w {stream = "comm", time_us = 6} over [@g0, @g1] -> T
  %z = exec.ffn %x {width = 4, time_us = 4} -> T
  %b = exec.wait %y -> T
  %n, %s = exec.norm %b, %z {time_us = 2} -> T, T
  exec.yield %n
"""


def kinds(nodes: tuple[OpNode, ...]) -> list[str]:
    return [node.type.value for node in nodes]


def test_every_operator_of_the_dialect_has_a_type() -> None:
    names = {op.name.removeprefix("exec.") for op in ex.Exec.operations}
    assert {kind.value for kind in OpType} == names - {"graph", "yield"}


def test_a_node_says_what_its_op_says() -> None:
    graph = graph_of(DIAMOND)
    ffn = graph.nodes[3]
    assert (graph.name, graph.phase, graph.devices) == ("g", "hybrid", ("g0",))
    assert (ffn.type, ffn.layer, ffn.stream, ffn.device) == (OpType.FFN, 2, "compute", "g0")
    assert (ffn.estimated_us, ffn.flops, ffn.bytes) == (4.0, 90.0, 20.0)
    assert ffn.arithmetic_intensity == 4.5
    assert ffn.inputs == graph.nodes[1].outputs == (TensorRef(1, (4, 8), "bf16", "g0"),)
    assert ffn.outputs[0].num_bytes == 64
    assert graph.nodes[0].layer is None
    assert graph.nodes[0].arithmetic_intensity == 0.0


def test_edges_are_the_tensors_that_nodes_take() -> None:
    found = [(e.source.type, e.target.type) for e in graph_of(DIAMOND).edges]
    assert found == [
        (OpType.INPUT, OpType.EMBEDDING),
        (OpType.EMBEDDING, OpType.ALL_REDUCE),
        (OpType.EMBEDDING, OpType.FFN),
        (OpType.ALL_REDUCE, OpType.NORM),
        (OpType.FFN, OpType.NORM),
    ]


def test_the_critical_path_is_the_longest_way() -> None:
    path = graph_of(DIAMOND).critical_path()
    assert kinds(path.nodes) == ["input", "embedding", "all_reduce", "norm"]
    assert path.us == 9.0


def test_one_stream_runs_its_operators_one_by_one() -> None:
    graph = graph_of(DIAMOND)
    assert graph.makespan_us() == graph.total_us() == 13.0
    assert list(graph.begins_us().values()) == [0.0, 0.0, 1.0, 7.0, 11.0]


def test_streams_run_beside_each_other() -> None:
    graph = graph_of(STREAMS)
    assert graph.total_us_by_stream() == {("g0", "compute"): 7.0, ("g0", "comm"): 6.0}
    assert graph.total_us(stream="comm") == 6.0
    assert graph.total_us(device="g0", stream="compute") == 7.0
    assert graph.total_us(device="g1") == 0.0
    assert graph.makespan_us() == graph.critical_path().us == 9.0


def test_a_recv_begins_behind_its_send() -> None:
    graph = graph_of("""
      %t = exec.input {time_us = 3} -> !exec.tensor<[4], i32, @g0>
      exec.send %t {channel = 5, time_us = 2} to @g1
      %busy = exec.input {time_us = 1} -> !exec.tensor<[4], i32, @g1>
      %u = exec.recv {channel = 5} from @g0 -> !exec.tensor<[4], i32, @g1>
      exec.yield %u
    """)
    (message,) = [edge for edge in graph.edges if edge.channel is not None]
    assert (message.source.type, message.target.type) == (OpType.SEND, OpType.RECV)
    assert message.channel == 5 and message.tensor is None
    assert graph.begins_us()[message.target] == 5.0
    assert graph.critical_path().us == 5.0
    assert graph.devices == ("g0", "g1")


def test_a_collective_takes_the_tensors_of_all_its_ranks() -> None:
    graph = graph_of("""
      %t = exec.input {time_us = 1} -> !exec.tensor<[4], i32, @g0>
      %u = exec.input {time_us = 7} -> !exec.tensor<[4], i32, @g1>
      %v = exec.all_gather %t {time_us = 2} over [@g0, @g1] -> !exec.tensor<[8], i32, @g0>
      %w = exec.all_gather %u {time_us = 2} over [@g0, @g1] -> !exec.tensor<[8], i32, @g1>
      exec.yield %v, %w
    """)
    assert len(graph.edges) == 4
    assert list(graph.begins_us().values()) == [0.0, 0.0, 7.0, 7.0]
    assert graph.critical_path().us == 9.0


def test_a_collective_does_not_wait_for_what_the_text_makes_below_it() -> None:
    graph = graph_of("""
      %t = exec.input {time_us = 1} -> !exec.tensor<[4], i32, @g0>
      %v = exec.all_gather %t {time_us = 2} over [@g0, @g1] -> !exec.tensor<[8], i32, @g0>
      %u = exec.input {time_us = 7} -> !exec.tensor<[4], i32, @g1>
      %w = exec.all_gather %u {time_us = 2} over [@g0, @g1] -> !exec.tensor<[8], i32, @g1>
      exec.yield %v, %w
    """)
    assert list(graph.begins_us().values()) == [0.0, 1.0, 0.0, 7.0]


def test_the_topological_order_keeps_the_text_where_it_may() -> None:
    graph = graph_of(DIAMOND)
    assert graph.topological_order() == graph.nodes
    below = graph_of(
        """
        %x = exec.embedding %t : !exec.tensor<[4], i32, @g0> -> T
        %t = exec.input -> !exec.tensor<[4], i32, @g0>
        exec.yield %x : T
        """,
        verify=False,
    )
    assert kinds(below.topological_order()) == ["input", "embedding"]


def test_a_cycle_is_refused() -> None:
    graph = graph_of(
        """
        %x = exec.ffn %y {width = 4} : T -> T
        %y = exec.ffn %x {width = 4} : T -> T
        exec.yield %y : T
        """,
        verify=False,
    )
    with pytest.raises(PassError, match=r"exec.graph @g: exec.ffn waits for itself"):
        graph.topological_order()


def test_memory_is_held_from_the_maker_to_the_last_user() -> None:
    # At the ffn x, y and z are there, 64 bytes each, and what it makes for itself: 2 * 32 bytes.
    graph = graph_of(DIAMOND)
    assert graph.peak_memory_bytes() == graph.peak_memory_bytes("g0") == 256
    assert graph.peak_memory_bytes("g1") == 0


def test_a_wait_needs_no_memory_and_keeps_what_it_waits_for() -> None:
    # As without streams: x lives through the wait of comm until its last user, the ffn.
    assert graph_of(STREAMS).peak_memory_bytes() == 256


def test_what_is_yielded_is_there_until_the_end() -> None:
    graph = graph_of("""
      %t = exec.input -> !exec.tensor<[4], i32, @g0>
      %x = exec.embedding %t -> T
      %y = exec.embedding %t -> T
      %z = exec.ffn %y {width = 4} -> T
      exec.yield %x
    """)
    assert graph.peak_memory_bytes() == 3 * 64 + 2 * 32


def test_experts_hold_at_worst_what_all_tokens_make_in_one() -> None:
    dense = "%x = exec.recv {channel = 0} from @g1 -> T\n%z = exec.ffn %x {width = 4} -> T"
    experts = dense.replace("width = 4", "width = 4, experts = 3, experts_per_token = 2")
    found = [graph_of(f"{text}\nexec.yield", verify=False) for text in (dense, experts)]
    assert [graph.peak_memory_bytes() for graph in found] == [128 + 64, 128 + 64 + 64]


def test_kv_that_moves_is_held_where_it_goes() -> None:
    graph = graph_of("""
      %a = exec.kv_load -> KV
      %b = exec.kv_migrate %a -> !exec.tensor<[4, 2, 1, 2], bf16, @g1>
      exec.yield %b
    """)
    assert (graph.peak_memory_bytes("g0"), graph.peak_memory_bytes("g1")) == (0, 32)


def test_kv_in_the_cache_needs_no_memory_and_kv_from_the_host_does() -> None:
    assert graph_of("%a = exec.kv_load -> KV\nexec.yield").peak_memory_bytes() == 0
    assert graph_of('%a = exec.kv_load {tier = "host"} -> KV\nexec.yield').peak_memory_bytes() == 32


ATTENTION = """
  %t = exec.input -> !exec.tensor<[8], i32, @g0>
  %q = exec.embedding %t -> !exec.tensor<[8, 6], bf16, @g0>
  %a = exec.kv_load {stream = "copy", tier = "host", layer = 0} -> KV
  %b = exec.wait %a -> KV
  %p, %new = exec.prefill_attention %q, %b {heads = 1, kv_heads = 1, head_dim = 2, time_us = 3}
    begin #pd.column<4> end #pd.column<8> -> !exec.tensor<[4, 2], bf16, @g0>, KV
  exec.kv_store %new
  %c = exec.kv_load -> KV
  %d, %last = exec.decode_attention %q, %c
    {heads = 1, kv_heads = 1, head_dim = 2, first = 4, time_us = 5}
    context #pd.column<1, 1, 1, 1> -> !exec.tensor<[4, 2], bf16, @g0>, KV
  exec.kv_store %last
  %o = exec.projection %p, %d -> !exec.tensor<[8, 6], bf16, @g0>
  exec.yield %o
"""


def test_a_phase_is_all_but_the_attention_of_the_other() -> None:
    graph = graph_of(ATTENTION)
    prefill, decode = graph.subgraph(phase="prefill"), graph.subgraph(phase="decode")
    assert kinds(prefill.nodes) == [
        "input", "embedding", "kv_load", "wait", "prefill_attention", "kv_store", "projection",
    ]  # fmt: skip
    assert kinds(decode.nodes) == [
        "input", "embedding", "kv_load", "decode_attention", "kv_store", "projection",
    ]  # fmt: skip
    assert {*prefill.nodes} | {*decode.nodes} == {*graph.nodes}
    with pytest.raises(ValueError, match="no phase 'hybrid'; one of: prefill, decode"):
        graph.subgraph(phase="hybrid")


def test_a_subgraph_knows_only_its_nodes() -> None:
    graph = graph_of(DIAMOND)
    part = graph.subgraph(node for node in graph.nodes if node.type is not OpType.ALL_REDUCE)
    assert kinds(part.nodes) == ["input", "embedding", "ffn", "norm"]
    assert len(part.edges) == 3
    assert part.critical_path().us == part.makespan_us() == 7.0
    assert (part.flops, part.bytes, part.arithmetic_intensity()) == (100.0, 25.0, 4.0)


def test_of_nothing_there_is_nothing_to_say() -> None:
    empty = graph_of("exec.yield")
    assert empty.nodes == empty.edges == empty.topological_order() == empty.critical_path().nodes
    assert empty.makespan_us() == empty.critical_path().us == empty.arithmetic_intensity() == 0.0
    assert empty.peak_memory_bytes() == 0
