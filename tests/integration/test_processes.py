"""Instances in processes of their own: the same tokens, whatever happens to the processes."""

import os
import random
import signal

import msgspec
import pytest

from sagec.runtime import process
from sagec.runtime.engines import EngineError, Failed, InstanceSpec, PlanDone, StepReport
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Token
from sagec.runtime.process import ProcessEngine
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, requests, serve, spec
from tests.unit.test_executor import run_plan

ASKED = requests(16, every_us=0)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[int]]:
    return serve(ONE, ASKED, kv_blocks=400).tokens


def serve_in_processes(roles, asked, killed=None, at_step=None, planner=None, **options) -> Served:
    """Serve on echo processes; the instance `killed` gets SIGKILL after so many steps of all."""
    served = Served()
    engines = process.start([spec(name, **options) for name in roles])
    instances = [
        Instance(id=name, role=role, engine="echo", capability=engines[name].capability())
        for name, role in roles.items()
    ]

    def watch(event) -> None:
        served.events.append(event)
        steps = sum(isinstance(event, StepReport) for event in served.events)
        if isinstance(event, StepReport) and steps == at_step:
            os.kill(engines[killed].pid, signal.SIGKILL)

    with ExecutorAPI(engines, instances, watch=[watch]) as api:
        served.take(api.serve(asked, create("fifo"), planner or DirectPlanner()))
    assert all(engine._process.returncode is not None for engine in api.engines.values())
    return served


@pytest.mark.parametrize("roles", [ONE, SPLIT, WIDE], ids=["one", "split", "wide"])
def test_processes_give_the_tokens_that_one_process_gives(roles, undisturbed):
    served = serve_in_processes(roles, ASKED)
    assert served.failures == []
    assert served.tokens == undisturbed


@pytest.mark.parametrize("killed", WIDE)
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_process_loses_no_request_and_changes_no_token(killed, seed, undisturbed):
    at_step = random.Random(f"{killed}{seed}").randrange(1, 60)
    served = serve_in_processes(WIDE, ASKED, killed, at_step)
    assert served.tokens == undisturbed
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
    for failed in served.failures:
        assert failed.instance == killed
        assert failed.error.endswith(f"of instance '{killed}' was killed by SIGKILL")


def test_without_another_instance_the_requests_fail_with_the_reason():
    served = serve_in_processes(ONE, ASKED, "x0", at_step=3)
    assert {end.reason for end in served.ends.values()} == {FinishReason.FAILED}
    assert {end.detail for end in served.ends.values()} == {"no live instance can prefill model ''"}


def test_an_engine_that_cannot_be_made_says_so_in_the_parent():
    with pytest.raises(EngineError) as caught:
        process.start([spec("x0"), spec("x1", step_us="fast")])
    assert str(caught.value) == "instance 'x1': step_us='fast': a whole number, 0 or more"


def test_an_engine_that_does_not_exist_says_so_in_the_parent():
    wrong = InstanceSpec(id="x0", engine="ekko", model="", kv_blocks=1, block_tokens=1)
    with pytest.raises(EngineError, match="no engine 'ekko' here; there are: echo, "):
        process.start([wrong])


def test_a_child_that_is_killed_before_it_is_up_is_named():
    engine = ProcessEngine(spec("x0"))
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="of instance 'x0' was killed by SIGKILL"):
        engine.capability()
    (failed,) = engine.poll()
    assert failed.request_id is None
    assert engine.poll() == []
    engine.close()


def test_a_child_that_is_not_up_yet_ends_at_once_when_it_is_closed():
    engine = ProcessEngine(spec("x0"))
    engine.close()
    assert engine._process.returncode == -signal.SIGKILL


def test_a_dead_child_takes_commands_without_an_error():
    engine = ProcessEngine(spec("x0"))
    engine.capability()
    os.kill(engine.pid, signal.SIGKILL)
    while not (events := engine.poll(1.0)):
        engine.cancel("a")
    assert [type(event) for event in events] == [Failed]
    engine.submit(run_plan(), [Request(id="a", prompt=(1, 2, 3))])
    assert engine.poll() == []
    engine.close()


def test_a_child_ends_when_its_parent_disappears():
    engine = ProcessEngine(spec("x0"))
    engine.capability()
    engine._socket.close()
    assert engine._process.wait() == 0


def test_closing_twice_is_no_error_and_leaves_no_process():
    engine = ProcessEngine(spec("x0"))
    engine.capability()
    engine.close()
    engine.close()
    assert engine._process.returncode == 0


def test_large_plans_pass_while_the_child_is_busy():
    """More than a socket holds goes both ways at once, and neither side waits for the other."""
    prompt = tuple(range(60_000))
    asked = [Request(id=f"r{i}", prompt=prompt, max_output_tokens=3) for i in range(6)]
    assert sum(len(msgspec.msgpack.encode(request)) for request in asked) > 1_000_000
    planner = DirectPlanner(chunk_tokens=30_000, step_tokens=60_000)
    served = serve_in_processes(SPLIT, asked, planner=planner, kv_blocks=60_000)
    assert {len(tokens) for tokens in served.tokens.values()} == {3}


def test_cancelling_reaches_another_process():
    engines = process.start([spec(name) for name in SPLIT])
    instances = [
        Instance(id=name, role=role, engine="echo", capability=engines[name].capability())
        for name, role in SPLIT.items()
    ]
    ends = {}
    with ExecutorAPI(engines, instances) as api:
        for output in api.serve(requests(6, generate=300), create("fifo"), DirectPlanner()):
            if isinstance(output, Token) and output.index == 4:
                api.cancel(output.request_id)
            elif isinstance(output, Finished):
                ends[output.request_id] = output.reason
    assert set(ends) == {f"r{i}" for i in range(6)}
    assert FinishReason.CANCELLED in ends.values()


def test_a_plan_by_hand_runs_in_a_process():
    engines = process.start([spec("x0")])
    with ExecutorAPI(engines) as api:
        api.submit_plan(run_plan(), [Request(id="a", prompt=(1, 2, 3), max_output_tokens=7)])
        events = []
        while not any(isinstance(event, PlanDone) for event in events):
            events += api.poll(1.0)
    assert sum(isinstance(event, StepReport) for event in events) == 7
