"""What holds for any graph: the pipeline ends, and its plans keep what the compiler promises."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import HealthCheck, event, given, settings
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass
from xdsl.printer import Printer

from sagec.compiler import Compiler
from sagec.passes.errors import PassError
from sagec.runtime.plan import ExecutionPlan, check, decode, encode
from tests.serving_graphs import Scene, broken_rules, scenes

COMPILER = Compiler()
LAX = settings(suppress_health_check=list(HealthCheck), max_examples=100)
THOROUGH = settings(LAX, max_examples=3000)


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def planned(scene: Scene) -> tuple[ModuleOp, list[ExecutionPlan]] | None:
    """The module after the pipeline and its plans, or None where it was refused in one line."""
    module = COMPILER.parse(scene.text(), "scene.mlir").module
    try:
        COMPILER.optimize(module, "serve")
    except PassError as error:
        message = str(error)
        assert "\n" not in message and error.message, message
        event(f"refused: {error.message.split(':')[0][:20]}")
        return None
    return module, COMPILER.lower(module)


def the_rules_hold(scene: Scene) -> None:
    answer = planned(scene)
    if answer is None:
        return
    event("planned")
    for plan in answer[1]:
        check(plan)
        assert decode(encode(plan)) == plan
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
