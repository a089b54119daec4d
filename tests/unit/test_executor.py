"""ExecutorAPI over engines of this process: plans by hand, plans made offline, status."""

import pytest

from sagec.runtime.clock import VirtualClock, WallClock
from sagec.runtime.engines import EngineError, PlanDone, StepReport
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI, ExecutorError, InstanceStatus
from sagec.runtime.loop import Finished, Instance, Refused, Token
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, PlanError, Rows
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner, table
from tests.echo_cluster import (
    ONE,
    SPLIT,
    WIDE,
    Served,
    echo_executor,
    members,
    requests,
    serve,
    spec,
)


def run_plan(name: str = "p", on: str = "x0", ids=("a",), until: int = 9) -> ExecutionPlan:
    """Prefills three tokens of each request, then decodes."""
    n = len(ids)
    return ExecutionPlan(
        plan_id=name,
        round=0,
        target_instance_id=on,
        mode="hybrid",
        num_steps=16,
        max_step_tokens=64,
        request_ids=tuple(ids),
        rows=table(Rows, [(3, 0, 2, 0)] * n),
        chunks=table(Chunks, [(0, r, 0, 3, 1) for r in range(n)]),
        decodes=table(Decodes, [(r, 1, until) for r in range(n)]),
    )


A = Request(id="a", prompt=(1, 2, 3), max_output_tokens=7)


def executor(clock=None, **engines) -> ExecutorAPI:
    clock = clock or WallClock()
    return ExecutorAPI({name: Echo(spec(name), clock) for name in engines or {"x0": 0}})


def test_a_plan_by_hand_runs_to_its_end():
    api = executor()
    api.submit_plan(run_plan(), [A])
    assert api.status("x0").plan_id == "p"
    events = []
    while api.status("x0").plan_id is not None:
        events += api.poll(0.01)
    assert isinstance(events[-1], PlanDone)
    assert api.status("x0") == InstanceStatus(
        instance="x0", steps=7, kv_blocks_used=events[-2].kv_blocks_used
    )


def test_a_request_of_a_plan_by_hand_can_be_cancelled():
    api = executor()
    api.submit_plan(run_plan(), [A])
    api.poll()
    api.cancel("a")
    while api.status("x0").plan_id is not None:
        api.poll(0.01)
    assert api.status("x0").steps == 1


def test_an_instance_that_is_not_there_is_named():
    with pytest.raises(ExecutorError, match="no instance 'y'; there are: x0"):
        executor().submit_plan(run_plan(on="y"), [A])
    with pytest.raises(ExecutorError, match="no instance 'y'; there are: x0"):
        executor().status("y")
    stranger = Instance(
        id="y", role="both", engine="echo", capability=Echo(spec("y"), WallClock()).capability()
    )
    with pytest.raises(ExecutorError, match="no engine for instance 'y'; there are: x0"):
        ExecutorAPI({"x0": Echo(spec("x0"), WallClock())}, [stranger])


def test_a_plan_that_does_not_hold_together_reaches_no_engine():
    api = executor()
    broken = run_plan(ids=("a", "a"))
    with pytest.raises(PlanError, match="plan p: request_ids names 'a' twice"):
        api.submit_plan(broken, [A])
    assert api.status("x0").plan_id is None


class Mortal(Echo):
    """Dies at its nth step."""

    def __init__(self, name, clock, steps):
        super().__init__(spec(name), clock)
        self.left = steps

    def poll(self, timeout_s=0.0):
        events = super().poll(timeout_s)
        self.left -= sum(isinstance(event, StepReport) for event in events)
        if self.left < 0:
            raise EngineError("the power went out")
        return events


def test_an_engine_that_raises_is_a_failed_instance():
    api = ExecutorAPI({"x0": Mortal("x0", WallClock(), steps=0)})
    api.submit_plan(run_plan(), [A])
    (failed,) = api.poll()
    assert failed.error == "the power went out"
    assert api.status("x0").error == "the power went out"
    assert api.poll() == []
    with pytest.raises(ExecutorError, match="instance 'x0' has failed: the power went out"):
        api.submit_plan(run_plan(), [A])


@pytest.mark.parametrize("steps", range(0, 30, 3))
@pytest.mark.parametrize("name", WIDE)
def test_an_instance_that_dies_at_any_step_loses_no_request_and_changes_no_token(steps, name):
    asked = requests(8)
    served, clock = Served(), VirtualClock()
    engines = {n: Mortal(n, clock, steps if n == name else 10**9) for n in WIDE}
    api = ExecutorAPI(engines, members(engines, WIDE), clock)
    served.take(api.serve(asked, create("fifo"), DirectPlanner()))
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
    assert all(e.kv_blocks_used() == 0 for n, e in engines.items() if n != name)


def test_an_instance_is_made_again_but_not_for_ever():
    clock, made = VirtualClock(), []

    def restart(name):
        made.append(name)
        return Mortal(name, clock, steps=4)

    asked = requests(3, generate=8)
    engines = {"x0": Mortal("x0", clock, steps=2)}
    api = ExecutorAPI(engines, members(engines, ONE), clock, restart=restart)
    served = Served().take(api.serve(asked, create("fifo"), DirectPlanner()))
    assert made == ["x0"] * 3
    expected = serve(ONE, asked).tokens
    for name, tokens in served.tokens.items():
        assert tokens == expected[name][: len(tokens)]
    assert any(end.reason is FinishReason.FAILED for end in served.ends.values())


def test_an_instance_that_cannot_be_made_again_stays_dead():
    clock = VirtualClock()

    def restart(name):
        raise EngineError("no memory left")

    engines = {"x0": Mortal("x0", clock, steps=1)}
    api = ExecutorAPI(engines, members(engines, ONE), clock, restart=restart)
    served = Served().take(api.serve([A], create("fifo"), DirectPlanner()))
    assert served.ends["a"].detail == "no live instance can prefill model ''"
    assert api.status("x0").error == "no memory left"


def test_requests_come_when_they_say():
    served = serve(ONE, requests(3, every_us=50_000))
    assert [end.report.arrival_us for end in served.ends.values()] == [0, 50_000, 100_000]
    assert [end.report.queue_us for end in served.ends.values()] == [0, 0, 0]


def test_serving_nobody_ends_at_once():
    assert serve(ONE, []).ends == {}


def test_two_requests_of_one_id_are_not_confused():
    twice = [A, Request(id="a", prompt=(9, 9))]
    served = Served()
    outputs = list(echo_executor(ONE, served).serve(twice, create("fifo"), DirectPlanner()))
    assert [type(o) for o in outputs if not isinstance(o, Token)] == [Refused, Finished]


# Plans that were made offline.


def recorded(roles, asked) -> tuple[list[ExecutionPlan], Served]:
    """The plans of a run, and the run."""
    served = serve(roles, asked, DirectPlanner(horizon=64), kv_blocks=400)
    return [plan for planned in served.rounds for plan in planned.plans], served


@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
def test_offline_plans_that_cover_everything_run_without_another_round(roles):
    asked = requests(4, every_us=0)
    plans, expected = recorded(roles, asked)
    served = Served()
    api = echo_executor(roles, served, kv_blocks=400)
    served.take(api.execute(plans[: len(roles)], asked))
    assert served.tokens == expected.tokens
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
    assert {step.plan_id for step in served.timeline.steps} == {
        plan.plan_id for plan in plans[: len(roles)]
    }


def test_offline_plans_of_one_instance_run_one_after_the_other():
    b = Request(id="b", prompt=(4, 5, 6), max_output_tokens=7)
    served = Served()
    api = echo_executor(ONE, served)
    served.take(api.execute([run_plan("p"), run_plan("q", ids=("b",))], [A, b]))
    assert {name: len(tokens) for name, tokens in served.tokens.items()} == {"a": 7, "b": 7}
    assert [step.plan_id for step in served.timeline.steps] == ["p"] * 7 + ["q"] * 7


def test_what_offline_plans_leave_is_planned_or_named():
    short = run_plan(until=5)
    served = Served().take(echo_executor(ONE, Served()).execute([short], [A]))
    assert len(served.tokens["a"]) == 3
    assert served.ends["a"].reason is FinishReason.FAILED
    assert served.ends["a"].detail.startswith("offline plans and the planner found no place")

    served = Served().take(
        echo_executor(ONE, Served()).execute([short], [A], DirectPlanner(), create("fifo"))
    )
    assert len(served.tokens["a"]) == 7
    assert served.ends["a"].reason is FinishReason.LENGTH


def test_to_go_on_takes_both_a_planner_and_a_strategy():
    with pytest.raises(PlanError, match="takes both a strategy and a planner"):
        echo_executor(ONE, Served()).execute([], [A], DirectPlanner())


def test_engines_that_will_never_speak_are_an_error_on_a_virtual_clock():
    class Mute(Echo):
        def submit(self, plan, requests=()):
            pass

    engines = {"x0": Mute(spec("x0"), VirtualClock())}
    api = ExecutorAPI(engines, members(engines, ONE), VirtualClock())
    with pytest.raises(ExecutorError, match="no engine will ever say anything"):
        list(api.serve([A], create("fifo"), DirectPlanner()))


def test_closing_closes_every_engine():
    closed = []

    class Noted(Echo):
        def close(self):
            closed.append(self.capability().kv_layout)
            super().close()

    with ExecutorAPI({"x": Noted(spec("x"), WallClock()), "y": Noted(spec("y"), WallClock())}):
        pass
    assert closed == ["echo", "echo"]


def test_steps_on_the_wall_clock_are_waited_for():
    engines = {"x0": Echo(spec("x0", step_us="3000"), WallClock())}
    api = ExecutorAPI(engines, members(engines, ONE))
    served = Served().take(api.serve([A], create("fifo"), DirectPlanner()))
    assert len(served.tokens["a"]) == 7
    report = served.ends["a"].report
    assert report.last_token_us - report.first_token_us >= 6 * 3000
