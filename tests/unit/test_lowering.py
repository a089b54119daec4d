"""From scheduled graphs to plans: JSON after the published schema, digests, and targets."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from sagec.compiler import Compiler
from sagec.dialects import pd
from sagec.dialects.columns import ColumnAttr
from sagec.lowering import targets
from sagec.lowering.execution_plan import PlanTarget, digest_of, plans_of
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.runtime.plan import PlanError, check, from_json, json_schema
from sagec.runtime.plan_text import to_text
from sagec.universe import sagec_context
from tests.serving_graphs import Place, Row, Scene, scenes

ROOT = Path(__file__).parents[2]
COMPILER = Compiler()
SCENE = Scene(
    (Place("p0", "prefill"), Place("d0", "decode")),
    waiting=(Row("a", 100, 8), Row("b", 20, 4)),
    residents=(Row("r", 30, 6, on="d0"),),
)


def optimized(scene: Scene = SCENE):
    module = COMPILER.parse(scene.text(), "scene.mlir").module
    COMPILER.optimize(module)
    return module


def emitted(module, **options: str) -> str:
    stream = StringIO()
    PlanTarget(**options).emit(sagec_context(), module, stream)
    return stream.getvalue()


def test_the_published_schema_is_that_of_the_plan() -> None:
    published = ROOT / "docs" / "plan.schema.json"
    now = json.loads(json.dumps(json_schema()))
    assert json.loads(published.read_text("utf-8")) == now, "stale; run python docs/generate.py"


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(scenes(tight=True))
def test_json_of_any_plan_keeps_the_published_schema_and_reads_back(scene: Scene) -> None:
    try:
        module = optimized(scene)
    except PassError:
        return
    documents = json.loads(emitted(module))
    schema = json.loads((ROOT / "docs" / "plan.schema.json").read_text("utf-8"))
    jsonschema.validate(documents, {"type": "array", "items": schema, "$defs": schema["$defs"]})
    assert [from_json(json.dumps(document)) for document in documents] == plans_of(module)


def test_json_and_text_are_of_the_same_plans() -> None:
    module = optimized()
    plans = plans_of(module)
    assert [plan.target_instance_id for plan in plans] == ["p0", "d0"]
    assert [json.loads(emitted(module))[0]["plan_id"]] == [plans[0].plan_id]
    assert emitted(module, form="text") == "\n".join(map(to_text, plans))


def test_a_module_without_graphs_has_no_plans() -> None:
    module = COMPILER.parse(SCENE.cluster(), "cluster.mlir").module
    assert emitted(module) == "[]\n"
    assert emitted(module, form="text") == ""


def test_every_plan_of_a_graph_has_its_digest_and_another_graph_another() -> None:
    digests = {plan.ir_digest for plan in plans_of(optimized())}
    assert len(digests) == 1 and len(digests.pop()) == 16
    longer = Scene(SCENE.places, (Row("a", 101, 8), SCENE.waiting[1]), (), SCENE.residents)
    assert plans_of(optimized(longer))[0].ir_digest != plans_of(optimized())[0].ir_digest


def test_the_digest_is_of_what_was_asked_and_not_of_what_passes_made() -> None:
    module = optimized()
    graph = next(flow.graphs(module))
    before = digest_of(flow.ops_in(graph))
    for op in list(graph.body.block.ops):
        if isinstance(op, pd.StepsOp):
            op.detach()
            op.erase()
    assert digest_of(flow.ops_in(graph)) == before


def test_the_same_text_has_the_same_digest_every_time() -> None:
    assert plans_of(optimized())[0].ir_digest == plans_of(optimized())[0].ir_digest


def test_a_graph_that_nobody_scheduled_has_no_plans_and_says_so() -> None:
    module = COMPILER.parse(SCENE.text(), "scene.mlir").module
    with pytest.raises(PassError, match=r"pd.graph @scene has no pd.steps; run fuse-steps first"):
        plans_of(module)


def test_acceleration_fields_are_those_of_the_instance() -> None:
    text = SCENE.text().replace(
        "kv_blocks = 100000", 'kv_blocks = 100000, kv_dtype = "fp8", quantization = "awq", '
        "draft_tokens = 3",
    )  # fmt: skip
    module = COMPILER.parse(text, "scene.mlir").module
    COMPILER.optimize(module)
    for plan in plans_of(module):
        acceleration = plan.acceleration
        assert acceleration.kv_dtype == "fp8"
        assert acceleration.quantization == "awq"
        assert acceleration.draft_tokens == 3


def test_what_a_plan_takes_from_a_hand_written_schedule_is_checked_by_the_plan() -> None:
    module = optimized()
    steps = next(op for op in flow.ops_in(next(flow.graphs(module))) if isinstance(op, pd.StepsOp))
    wrong = np.full(len(steps.chunk_step), 99)
    steps.properties["chunk_step"] = ColumnAttr.of(wrong)
    with pytest.raises(PlanError, match=r"chunks.step\[0\]: 99 is not in \[0, "):
        check(plans_of(module)[0])


@pytest.mark.parametrize("engine", targets.known())
def test_every_target_says_what_its_engine_can_do(engine: str) -> None:
    ability = targets.ability_of(engine)
    assert ability is not None
    assert ability.engine == engine
    assert ability.summary
    assert ability.max_tp >= 1 and ability.max_pp >= 1 and ability.samples >= 1
    assert "none" in ability.quantizations


@pytest.mark.parametrize("engine", targets.known())
def test_every_target_takes_what_the_pipeline_makes_for_it(engine: str) -> None:
    ability = targets.ability_of(engine)
    assert ability is not None
    sizes = {"block_tokens": 64, "max_partial_prefills": ability.partial_prefills}
    scene = Scene(
        (Place("i0", "both", engine=engine, **sizes),),
        waiting=tuple(Row(f"r{n}", 30 + 40 * n, 5) for n in range(5)),
        residents=(Row("old", 30, 40, on="i0"),),
    )
    (plan,) = plans_of(optimized(scene))
    check(plan)
    assert set(plan.request_ids) == {"old", *(f"r{n}" for n in range(5))}


def test_an_engine_without_a_target_has_no_ability() -> None:
    assert targets.ability_of("tensorrt") is None
