"""Files into modules, modules through pipelines, and the planner that the loop is given."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from xdsl.utils.exceptions import ParseError

from sagec.builder import IRBuilder
from sagec.compiler import Compiler, IROptimizer, PDSeparator, passes_of
from sagec.diagnostics import Diagnostic
from sagec.dialects import pd
from sagec.passes.errors import PassError
from sagec.passes.topology import topology_of
from sagec.pipelines import DEFAULT, PIPELINES
from sagec.planner import HORIZON, CompilingPlanner, put_on
from sagec.runtime.plan import check
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, Instances, Running, State, Waiting
from tests.serving_graphs import Place, Row, Scene

SCENE = Scene(
    (Place("p0", "prefill"), Place("d0", "decode")),
    waiting=(Row("a", 100, 8), Row("b", 20, 4)),
    chunk=32,
    horizon=5,
    mode="strict",
)
SAGE = """\
model tiny {
  layers 2 hidden 64 heads 4 kv_heads 2 head_dim 16 ffn 128 vocab 256
}
"""


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


def test_a_file_is_read_by_its_name(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "scene.mlir"
    path.write_text(SCENE.text(), "utf-8")
    unit = compiler.read(str(path))
    assert unit.name == str(path)
    assert unit.text == SCENE.text()
    assert unit.program is None
    assert unit.strategy == ""
    assert [(r.id, len(r.prompt), r.max_output_tokens) for r in unit.requests()] == [
        ("a", 100, 8),
        ("b", 20, 4),
    ]


def test_a_graph_may_name_its_strategy(compiler: Compiler) -> None:
    text = SCENE.text().replace("pd.graph @scene {", 'pd.graph @scene {policy = "fifo", ')
    assert compiler.parse(text, "scene.mlir").strategy == "fifo"
    assert compiler.parse("", "empty.mlir").strategy == ""


def test_a_dash_is_standard_input(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(SCENE.text().encode())))
    assert compiler.read("-").name == "<stdin>"


def test_a_file_of_the_language_keeps_its_program(compiler: Compiler) -> None:
    path = Path(__file__).parents[2] / "examples" / "chat.sage"
    unit = compiler.read(str(path))
    assert unit.program is not None
    assert unit.strategy
    assert any(isinstance(op, pd.GraphOp) for op in unit.module.ops)


def test_a_file_that_is_no_text_says_the_line(compiler: Compiler, tmp_path: Path) -> None:
    path = tmp_path / "bad.mlir"
    path.write_bytes(b"cluster.switch @a\ncluster.switch @\xff\n")
    with pytest.raises(Diagnostic, match="the file is not UTF-8 text") as caught:
        compiler.read(str(path))
    assert f"{path}:2: " in str(caught.value)


def test_a_file_that_is_not_there_is_the_systems_error(compiler: Compiler, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compiler.read(str(tmp_path / "none.mlir"))


def test_text_without_meaning_is_a_parse_error(compiler: Compiler) -> None:
    with pytest.raises(ParseError, match=r"no op 'pd\.graf'"):
        compiler.parse("pd.graf @a {}", "bad.mlir")


def test_optimize_and_lower_make_a_plan_for_each_instance(compiler: Compiler) -> None:
    module = compiler.parse(SCENE.text(), "scene.mlir").module
    compiler.optimize(module)
    plans = compiler.lower(module)
    assert [plan.target_instance_id for plan in plans] == ["p0", "d0"]
    for plan in plans:
        check(plan)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_named_pipeline_runs(compiler: Compiler, pipeline: str) -> None:
    if "solve" in PIPELINES[pipeline].text:
        pytest.importorskip("highspy")
    module = compiler.parse(SCENE.text(), "scene.mlir").module
    if "require-exec" in PIPELINES[pipeline].text:
        compiler.optimize(module, "serve,convert-pd-to-exec")
    compiler.optimize(module, pipeline)
    module.verify()
    if "fuse-steps" in PIPELINES[pipeline].text:
        assert compiler.lower(module)


def test_the_callback_sees_every_pass_with_its_neighbours(compiler: Compiler) -> None:
    seen = []
    module = compiler.parse(SCENE.text(), "scene.mlir").module

    def hear(before, _, after) -> None:
        seen.append((before and before.name, after and after.name))

    compiler.optimize(module, "order,apply-decision", hear)
    assert ("order", "apply-decision") in seen


def test_passes_are_parsed_once() -> None:
    assert passes_of(DEFAULT).passes == passes_of(PIPELINES[DEFAULT].text).passes
    assert [p.name for p in passes_of("order,legalize").passes] == ["order", "legalize"]


def test_a_graph_that_is_refused_is_a_pass_error_with_its_place(compiler: Compiler) -> None:
    text = SCENE.text().replace("kv_blocks = 100000", "kv_blocks = 2")
    with pytest.raises(PassError, match=r"^scene.mlir:\d+:\d+: \"a\": ") as caught:
        compiler.optimize(compiler.parse(text, "scene.mlir").module)
    assert caught.value.place.startswith("scene.mlir:")


# The names of the public API


def graph_of(count: int = 2):
    cluster = Compiler().parse(SCENE.cluster(), "cluster.mlir").module
    asked = [Request(id=f"r{n}", prompt=(1,) * 20, max_output_tokens=3) for n in range(count)]
    return IRBuilder(cluster, mode="strict").build(asked)


def test_an_optimizer_runs_its_pipeline_on_a_graph_in_place() -> None:
    graph = graph_of()
    assert IROptimizer().optimize(graph) is graph
    names = [node.name for node in graph]
    assert names.count("pd.steps") == 2
    assert "pd.transfer" in names


def test_an_optimizer_may_run_passes_by_their_spelling() -> None:
    graph = IROptimizer("chunk-prefill{tokens=8}").optimize(graph_of(1))
    (prefill,) = (node.op for node in graph if isinstance(node.op, pd.PrefillOp))
    assert prefill.bounds is not None
    assert prefill.bounds.rows() == [[0, 8, 16, 20]]


def test_a_separator_gives_both_phases() -> None:
    phases = PDSeparator().split(graph_of())
    assert phases.prefill is not None and phases.decode is not None
    assert phases.prefill.phase.data == "prefill"
    assert [op.name for op in phases.prefill.body.block.ops] == ["pd.prefill", "pd.yield"]
    assert [op.name for op in phases.decode.body.block.ops] == ["pd.decode", "pd.yield"]


def test_a_separator_of_a_separated_graph_gives_the_same() -> None:
    graph = graph_of()
    first = PDSeparator().split(graph)
    assert PDSeparator().split(graph) == first


def test_a_graph_of_one_phase_has_no_other() -> None:
    state = State(
        now_us=0,
        round=0,
        waiting=Waiting.of([]),
        running=Running.of(
            ["r"],
            instance=0,
            prompt_tokens=5,
            computed_tokens=6,
            remaining_tokens=3,
            decode_on=0,
        ),
        instances=Instances.of(["d0"], role="both", kv_blocks=9, block_tokens=4),
    )
    graph = IRBuilder().build_round(state, Decision.defer(state.waiting))
    phases = PDSeparator().split(graph)
    assert phases.prefill is None
    assert phases.decode is not None


# The planner


def round_of(waiting: int) -> tuple[State, Decision]:
    asked = Waiting.of([f"r{n}" for n in range(waiting)], prompt_tokens=40, generate_tokens=9)
    state = State(
        now_us=0,
        round=3,
        waiting=asked,
        running=Running.of([]),
        instances=Instances.of(["p0", "d0"], role=["prefill", "decode"], kv_blocks=9),
    )
    return state, Decision.admit(np.arange(waiting), asked)


def test_instances_that_are_put_on_another_engine_are_planned_by_its_rules(
    compiler: Compiler,
) -> None:
    module = compiler.read("examples/chat.sage").module
    before = topology_of(module).instances
    put_on(module, "turbomind")
    after = topology_of(module).instances
    assert {(each.engine, each.max_partial_prefills) for each in before} == {("torch", 0)}
    assert {(each.engine, each.max_partial_prefills) for each in after} == {("turbomind", 1)}
    compiler.optimize(module)
    (prefill, _) = compiler.lower(module)
    last_of_step = np.append(np.diff(prefill.chunks.step) > 0, True)
    partial = prefill.chunks.end < prefill.rows.prompt_tokens[prefill.chunks.row]
    assert not (partial & ~last_of_step).any()


def test_a_planner_serves_as_the_files_graph_says(compiler: Compiler) -> None:
    planner = compiler.planner(compiler.parse(SCENE.text(), "scene.mlir").module)
    assert planner.builder.mode == "strict"
    assert planner.builder.chunk == 32
    assert planner.builder.horizon == 5
    plans = planner.plan(*round_of(2))
    assert {plan.mode for plan in plans} == {"strict"}
    assert all(plan.num_steps <= 5 for plan in plans)
    assert max(plans[0].chunks.end - plans[0].chunks.begin) == 32


def test_a_planner_of_a_cluster_alone_looks_some_steps_ahead(compiler: Compiler) -> None:
    module = compiler.parse(SCENE.cluster(), "cluster.mlir").module
    assert compiler.planner(module).builder.horizon == HORIZON
    assert compiler.planner(module, horizon=3).builder.horizon == 3


def test_a_planner_keeps_no_graph_even_where_it_refuses(compiler: Compiler) -> None:
    module = compiler.parse(SCENE.cluster().replace("100000", "1"), "cluster.mlir").module
    planner = CompilingPlanner(module)
    before = str(planner.builder.module)
    with pytest.raises(PassError, match='"r0"'):
        planner.plan(*round_of(1))
    assert str(planner.builder.module) == before


def test_a_round_without_requests_has_no_plans(compiler: Compiler) -> None:
    module = compiler.parse(SCENE.cluster(), "cluster.mlir").module
    assert CompilingPlanner(module).plan(*round_of(0)) == []


def test_an_instance_that_only_loses_requests_is_told_so(compiler: Compiler) -> None:
    state, decision = round_of(0)
    running = Running.of(
        ["r"], instance=1, prompt_tokens=5, computed_tokens=6, remaining_tokens=3, decode_on=1
    )
    state = dataclasses.replace(state, running=running)
    planner = CompilingPlanner(compiler.parse(SCENE.cluster(), "cluster.mlir").module)
    (plan,) = planner.plan(state, decision.preempt(np.array([0]), "KV"))
    assert (plan.target_instance_id, plan.num_steps) == ("d0", 0)
    assert [plan.request_ids[row] for row in plan.preemptions.row] == ["r"]
