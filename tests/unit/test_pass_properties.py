"""What holds for any graph: the pipeline ends, and its plans keep what the compiler promises."""

from __future__ import annotations

from io import StringIO

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.printer import Printer

from sagec.builder import IRBuilder
from sagec.compiler import Compiler, passes_of
from sagec.passes.chunk_prefill import bounds_of
from sagec.passes.errors import PassError
from sagec.passes.order import OrderPass
from sagec.planner import CompilingPlanner
from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Token
from sagec.runtime.plan import ExecutionPlan, check, decode, encode, from_json, to_json
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from sagec.universe import sagec_context
from tests.serving_graphs import (
    Place,
    Round,
    Scene,
    broken_rules,
    fresh_scenes,
    places,
    rounds,
    scenes,
)

COMPILER = Compiler()
LAX = settings(suppress_health_check=list(HealthCheck), max_examples=100)
FEWER = settings(LAX, max_examples=50)
THOROUGH = settings(LAX, max_examples=3000)


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def parsed(text: str) -> ModuleOp:
    return COMPILER.parse(text, "scene.mlir").module


def planned(scene: Scene) -> tuple[ModuleOp, list[ExecutionPlan]] | None:
    """The module after the pipeline and its plans, or None where it was refused in one line."""
    module = parsed(scene.text())
    try:
        COMPILER.optimize(module, "serve")
    except PassError as error:
        message = str(error)
        assert "\n" not in message and error.message, message
        event(f"refused: {error.message.split(':')[0][:20]}")
        return None
    return module, COMPILER.lower(module)


def undigested(plans: list[ExecutionPlan]) -> list[ExecutionPlan]:
    """The plans without the name of their IR: the same may be said with and without defaults."""
    return [msgspec.structs.replace(plan, ir_digest="") for plan in plans]


def the_rules_hold(scene: Scene) -> None:
    answer = planned(scene)
    if answer is None:
        return
    event("planned")
    for plan in answer[1]:
        check(plan)
        assert decode(encode(plan)) == from_json(to_json(plan)) == plan
    assert not [*broken_rules(scene, answer[1])], scene.text()


@LAX
@given(scenes())
def test_with_room_for_all_plans_keep_every_promise(scene: Scene) -> None:
    the_rules_hold(scene)


@LAX
@given(scenes(tight=True))
def test_without_room_plans_keep_every_promise_or_there_are_none(scene: Scene) -> None:
    the_rules_hold(scene)


@pytest.mark.slow
@THOROUGH
@given(scenes())
def test_with_room_for_all_plans_keep_every_promise_thoroughly(scene: Scene) -> None:
    the_rules_hold(scene)


@pytest.mark.slow
@THOROUGH
@given(scenes(tight=True))
def test_without_room_plans_keep_every_promise_thoroughly(scene: Scene) -> None:
    the_rules_hold(scene)


@LAX
@given(fresh_scenes())
def test_nothing_that_only_waits_is_refused_where_there_is_room(scene: Scene) -> None:
    answer = planned(scene)
    assert answer is not None, scene.text()
    assert not [*broken_rules(scene, answer[1])], scene.text()


@LAX
@given(scenes(tight=True))
def test_running_the_pipeline_twice_changes_nothing(scene: Scene) -> None:
    answer = planned(scene)
    if answer is None:
        return
    module, plans = answer
    text = text_of(module)
    COMPILER.optimize(module, "serve")
    assert text_of(module) == text
    assert COMPILER.lower(module) == plans


@FEWER
@given(scenes(tight=True))
def test_after_every_pass_the_text_is_in_order_and_parses_to_the_same(scene: Scene) -> None:
    module, context = parsed(scene.text()), sagec_context()
    for compiler_pass in passes("serve"):
        try:
            compiler_pass.apply(context, module)
        except PassError:
            return
        text = text_of(module)
        assert text_of(parsed(text)) == text, compiler_pass.name
        if compiler_pass.name != "fuse-steps":
            OrderPass().apply(context, module)
            assert text_of(module) == text, f"{compiler_pass.name} writes what is not in order"


@FEWER
@given(scenes(tight=True))
def test_stopping_after_a_pass_and_going_on_from_its_text_gives_the_same_plans(
    scene: Scene,
) -> None:
    answer = planned(scene)
    if answer is None:
        return
    module, context = parsed(scene.text()), sagec_context()
    for compiler_pass in passes("serve"):
        compiler_pass.apply(context, module)
        module = parsed(text_of(module))
    assert undigested(COMPILER.lower(module)) == undigested(answer[1])


def passes(pipeline: str) -> tuple[ModulePass, ...]:
    return tuple(passes_of(pipeline).passes)


# Chunks


@LAX
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500), st.integers(0, 70))))
def test_chunks_rejoin_to_the_whole(rows: list[tuple[int, int, int]]) -> None:
    begin = np.array([row[0] for row in rows], np.int64)
    end = begin + np.array([row[1] for row in rows], np.int64)
    most = np.array([row[2] for row in rows], np.int64)
    bounds = bounds_of(begin, end, most).rows()
    assert len(bounds) == len(rows)
    for found, (first, length, bound) in zip(bounds, rows, strict=True):
        sizes = np.diff(found)
        assert found[0] == first and found[-1] == first + length
        assert (sizes > 0).all()
        assert not bound or ((sizes <= bound).all() and (sizes[:-1] == bound).all())


# Engines


def executor_of(where: tuple[Place, ...]) -> ExecutorAPI:
    """Echo engines of these sizes; they fail what is over a budget or beyond their blocks."""
    clock = VirtualClock()
    options = {"step_us": "1000", "token_us": "10", "bytes_per_s": "1000000"}
    engines = {
        place.name: Echo(
            InstanceSpec(
                id=place.name,
                engine="echo",
                model="",
                kv_blocks=place.kv_blocks,
                block_tokens=place.block_tokens,
                options=options,
            ),
            clock,
        )
        for place in where
    }
    instances = [
        Instance(
            id=place.name,
            role=place.role,
            engine="echo",
            capability=engines[place.name].capability(),
        )
        for place in where
    ]
    return ExecutorAPI(engines, instances, clock)


def served(scene: Scene, otherwise: bool) -> dict[str, int]:
    """Tokens of each request, when engines run the plans; no request and no engine may fail."""
    answer = planned(scene)
    if answer is None:
        return {row.id: row.generate or 0 for row in scene.waiting}
    asked = [
        Request(id=row.id, prompt=tuple(range(row.prompt)), max_output_tokens=row.generate)
        for row in scene.waiting
    ]
    tokens = dict.fromkeys((row.id for row in scene.waiting), 0)
    executor = executor_of(scene.places)
    rest = (CompilingPlanner(parsed(scene.cluster())), create("fifo")) if otherwise else ()
    for output in executor.execute(answer[1], asked, *rest):
        if isinstance(output, Token):
            assert output.index == tokens[output.request_id]
            tokens[output.request_id] += 1
        elif isinstance(output, Finished):
            assert output.reason is FinishReason.LENGTH, (output.detail, scene.text())
    for engine in executor.engines.values():
        assert isinstance(engine, Echo)
        assert engine.kv_blocks_used() == 0
    return tokens


@LAX
@given(fresh_scenes(tight=True, apart=False) | fresh_scenes(apart=False))
def test_plans_alone_generate_every_token_that_was_asked_for(scene: Scene) -> None:
    assert served(scene, otherwise=False) == {row.id: row.generate for row in scene.waiting}


@FEWER
@given(fresh_scenes(tight=True) | fresh_scenes())
def test_where_kv_comes_later_than_predicted_another_round_generates_the_rest(
    scene: Scene,
) -> None:
    assert served(scene, otherwise=True) == {row.id: row.generate for row in scene.waiting}


# Rounds


def plans_or_message(planner: CompilingPlanner, asked: Round) -> list[ExecutionPlan] | str:
    try:
        return planner.plan(asked.state, asked.decision)
    except PassError as error:
        return error.message


@LAX
@given(rounds())
def test_a_round_is_planned_as_the_text_of_its_graph_would_be(asked: Round) -> None:
    found = plans_or_message(CompilingPlanner(parsed(asked.cluster())), asked)
    builder = IRBuilder(parsed(asked.cluster()), mode="hybrid", horizon=16)
    module = parsed(str(builder.build_round(asked.state, asked.decision)))
    try:
        COMPILER.optimize(module, "round")
        assert not isinstance(found, str), found
        assert undigested(COMPILER.lower(module)) == undigested(found)
    except PassError as error:
        assert error.message == found


@FEWER
@given(st.data())
def test_a_planner_remembers_nothing_of_the_rounds_before(data: st.DataObject) -> None:
    where = data.draw(places(tight=data.draw(st.booleans())))
    asked = data.draw(st.lists(rounds(where), min_size=2, max_size=4))
    planner = CompilingPlanner(parsed(asked[0].cluster()))
    for one in asked:
        alone = CompilingPlanner(parsed(one.cluster()))
        assert plans_or_message(planner, one) == plans_or_message(alone, one)
