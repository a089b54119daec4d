"""ExecutorAPI over engines of this process: plans by hand, plans made offline, status."""

from itertools import pairwise

import pytest

from sagec.runtime.clock import VirtualClock, WallClock
from sagec.runtime.engines import EngineError, PlanDone, StepReport
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI, ExecutorError, InstanceStatus
from sagec.runtime.loop import Finished, Instance, Refused, Restarting, Retried, Token
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, PlanError, Rows
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.status import REMEMBERED_PLANS, StatusBoard
from sagec.runtime.strategies import create
from sagec.runtime.supervisor import MAX_RESTARTS
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
    clock, made, heard = VirtualClock(), [], []

    def restart(name):
        made.append(clock.now_us())
        return Mortal(name, clock, steps=0)

    engines = {"x0": Mortal("x0", clock, steps=0)}
    api = ExecutorAPI(
        engines, members(engines, ONE), clock, [heard.append], restart, max_attempts=100
    )
    served = Served().take(api.serve(requests(3), create("fifo"), DirectPlanner()))
    seconds = [us / 1e6 for us in made]
    pauses = [round(b - a, 3) for a, b in pairwise(seconds)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30]
    assert len(made) == MAX_RESTARTS
    assert [said.at_us for said in heard if isinstance(said, Restarting)] == made
    assert {end.reason for end in served.ends.values()} == {FinishReason.FAILED}
    assert api.status("x0").error == "the power went out"


def test_requests_wait_for_the_only_instance_that_can_serve_them():
    clock = VirtualClock()

    def restart(name):
        return Mortal(name, clock, steps=10**9 if clock.now_us() > 3_000_000 else 1)

    engines = {name: Mortal(name, clock, steps=1 if name == "p0" else 10**9) for name in SPLIT}
    api = ExecutorAPI(engines, members(engines, SPLIT), clock, restart=restart, max_attempts=100)
    asked = requests(8)
    served = Served().take(api.serve(asked, create("fifo"), DirectPlanner()))
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    assert clock.now_us() > 3_000_000
    api.check_integrity()


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


def test_engines_that_go_in_circles_are_an_error_on_a_virtual_clock():
    class Restless(Echo):
        def next_us(self):
            return self._clock.now_us()

        def poll(self, timeout_s=0.0):
            return []

    engines = {"x0": Restless(spec("x0"), VirtualClock())}
    api = ExecutorAPI(engines, members(engines, ONE), VirtualClock())
    with pytest.raises(ExecutorError, match="the virtual clock stands at 0 us"):
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


def test_who_comes_while_an_engine_computes_is_in_the_plan_of_the_next_step():
    class Told:
        """A clock that real engines would have: time passes while they compute."""

        us = 0

        def now_us(self) -> int:
            return self.us

    class Slow(Echo):
        def poll(self, timeout_s=0.0):
            events = super().poll(timeout_s)
            clock.us += 1000 * any(isinstance(event, StepReport) for event in events)
            return events

    clock = Told()
    engines = {"x0": Slow(spec("x0"), clock)}
    heard = []
    api = ExecutorAPI(engines, members(engines, ONE), clock, [heard.append])
    late = Request(id="late", prompt=(1, 2), max_output_tokens=2, arrival_us=500)
    served = Served().take(api.serve([A, late], create("fifo"), DirectPlanner()))
    assert set(served.tokens) == {"a", "late"}
    steps = [said for said in heard if isinstance(said, StepReport)]
    assert [[name for name, _, _ in step.chunks] for step in steps[:2]] == [["a"], ["late"]]


# Status.


def test_the_status_of_a_plan_by_hand_follows_its_steps():
    api = executor()
    api.submit_plan(run_plan(), [A])
    given = api.status_of_plan("p")
    assert (given.instance, given.num_steps, given.steps, given.ended) == ("x0", 16, 0, False)
    while not api.status_of_plan("p").ended:
        api.poll(0.01)
    assert api.status_of_plan("p").steps == 7


def test_a_plan_that_took_over_is_named():
    api = executor()
    api.submit_plan(run_plan("p"), [A])
    api.submit_plan(run_plan("q", until=5))
    assert api.status_of_plan("p").superseded_by == "q"
    assert api.status_of_plan("p").ended
    assert not api.status_of_plan("q").ended


def test_a_plan_whose_instance_died_says_why():
    api = ExecutorAPI({"x0": Mortal("x0", WallClock(), steps=0)})
    api.submit_plan(run_plan(), [A])
    api.poll()
    assert api.status_of_plan("p").error == "the power went out"


def test_a_plan_or_request_that_nobody_knows_is_named():
    api = executor()
    with pytest.raises(ExecutorError, match="no plan 'q' is known; at work: none"):
        api.status_of_plan("q")
    api.submit_plan(run_plan(), [A])
    with pytest.raises(ExecutorError, match="no plan 'q' is known; at work: p"):
        api.cancel_plan("q")
    with pytest.raises(ExecutorError, match="no request 'a' is being served"):
        api.status_of_request("a")


def test_of_old_plans_only_the_latest_are_remembered():
    board = StatusBoard(["x0"])
    for number in range(2 * REMEMBERED_PLANS):
        board.give(run_plan(f"p{number}"))
    assert board.plan("p0") is None
    assert board.plan(f"p{2 * REMEMBERED_PLANS - 2}").superseded_by is not None
    assert board.at_work() == [f"p{2 * REMEMBERED_PLANS - 1}"]


def test_the_status_of_a_request_says_where_it_is_and_why_it_waits():
    asked = [*requests(4, every_us=0), Request(id="r9", prompt=tuple(range(300)))]
    api = echo_executor(SPLIT, Served(), kv_blocks=22)
    seen = {}
    for output in api.serve(asked, create("fifo"), DirectPlanner()):
        for request in asked:
            try:
                status = api.status_of_request(request.id)
            except ExecutorError as error:
                assert str(error) == f"no request {request.id!r} is being served"
                continue
            seen.setdefault(status.phase, []).append(status)
            if isinstance(output, Token) and output.request_id == request.id:
                assert status.output_tokens == output.index + 1
    assert {"waiting", "running", "arriving"} <= set(seen)
    assert {status.reason for status in seen["waiting"]} == {"no room before its turn"}
    assert {status.instance for status in seen["waiting"]} == {None}
    assert {status.instance for status in seen["arriving"]} == {"d0"}
    assert {status.instance for status in seen["running"]} == {"p0", "d0"}


# Stopping plans.


def test_a_plan_by_hand_that_is_cancelled_stops_and_its_request_stays():
    api = executor()
    api.submit_plan(run_plan(), [A])
    while api.status("x0").steps < 2:
        api.poll()
    api.cancel_plan("p")
    while api.status("x0").plan_id is not None:
        api.poll()
    assert api.status("x0").steps < 7
    assert api.status_of_plan("p").superseded_by == "p-cancelled"
    api.cancel_plan("p")
    assert api.status("x0").plan_id is None
    api.check_integrity()
    api.submit_plan(run_plan("q"))
    while api.status("x0").plan_id is not None:
        api.poll()
    assert api.status("x0").steps == 7


@pytest.mark.parametrize("roles", [ONE, SPLIT, WIDE], ids=["one", "split", "wide"])
def test_plans_that_are_cancelled_while_serving_are_made_again(roles):
    asked, served, cancelled = requests(6), Served(), set()
    api = echo_executor(roles, served)
    for count, output in enumerate(api.serve(asked, create("fifo"), DirectPlanner())):
        served.take([output])
        plan_id = api.status(list(roles)[count % len(roles)]).plan_id
        if plan_id is not None and count % 5 == 0 and not plan_id.endswith("-cancelled"):
            api.cancel_plan(plan_id)
            cancelled.add(plan_id)
    assert len(cancelled) > 5
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    superseded = {api.status_of_plan(plan_id).superseded_by for plan_id in cancelled}
    assert any(name is not None and name.endswith("-cancelled") for name in superseded)
    api.check_integrity()


# Serving that is left, and what watchers hear.


@pytest.mark.parametrize("outputs", [0, 1, 30, 60])
def test_a_service_that_is_left_early_leaves_nothing_on_its_engines(outputs):
    served = Served()
    api = echo_executor(WIDE, served)
    running = api.serve(requests(8), create("fifo"), DirectPlanner())
    for _ in range(outputs):
        next(running)
    running.close()
    for _ in range(3):
        served.clock.advance_to(served.clock.now_us() + 10**9)
        api.poll()
    assert {engine.kv_blocks_used() for engine in api.engines.values()} == {0}
    again = Served().take(api.serve(requests(8), create("fifo"), DirectPlanner()))
    assert again.tokens == serve(ONE, requests(8), kv_blocks=400).tokens


def test_one_service_at_a_time():
    api = echo_executor(ONE, Served())
    first = api.serve(requests(2), create("fifo"), DirectPlanner())
    next(first)
    with pytest.raises(ExecutorError, match="one `serve` at a time"):
        api.serve(requests(2), create("fifo"), DirectPlanner())
    first.close()
    never_begun = api.serve(requests(2), create("fifo"), DirectPlanner())
    assert len(list(api.serve(requests(2), create("fifo"), DirectPlanner()))) == 42
    with pytest.raises(ExecutorError, match="something else was served since"):
        next(never_begun)


def test_reports_say_where_a_request_ran_and_watchers_hear_of_retries():
    clock, heard = VirtualClock(), []
    engines = {n: Mortal(n, clock, 2 if n == "p0" else 10**9) for n in WIDE}
    api = ExecutorAPI(engines, members(engines, WIDE), clock, [heard.append])
    served = Served().take(api.serve(requests(6), create("fifo"), DirectPlanner()))
    retried = {said.request_id: said for said in heard if isinstance(said, Retried)}
    assert retried
    for name, end in served.ends.items():
        ran_on = end.report.instances
        if name in retried:
            assert retried[name].instance == "p0"
            assert retried[name].error == "instance 'p0': the power went out"
            assert ran_on[0] == "p0"
            assert ran_on[1:] in (("p1", "d0"), ("p1", "d1"))
        else:
            assert len(ran_on) == 2
        assert end.report.attempts == (name in retried)
