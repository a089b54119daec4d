"""Requests handed in while others are served: taken in, refused with the numbers, never lost."""

import threading

import pytest

from sagec.runtime.clock import VirtualClock, WallClock
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI, ExecutorError
from sagec.runtime.intake import Intake
from sagec.runtime.loop import Arrived, Finished, Refused, Token
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.status import RequestPhase
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, Served, members, requests, serve, spec


def executor(roles=ONE, kv_blocks=40, watch=(), clock=None, **bounds) -> ExecutorAPI:
    clock = clock or VirtualClock()
    made = {n: Echo(spec(n, kv_blocks, step_us="1000", token_us="10"), clock) for n in roles}
    return ExecutorAPI(made, members(made, roles), clock, watch, **bounds)


def begin(api: ExecutorAPI, asked=()):
    return api.serve(asked, create("fifo"), DirectPlanner(), until_closed=True)


def small(name: str, prompt: int = 5, **fields) -> Request:
    return Request(id=name, prompt=tuple(range(prompt)), max_output_tokens=4, **fields)


def test_requests_that_are_handed_in_are_served_until_the_intake_closes():
    api, served = executor(SPLIT), Served()
    asked = requests(8, every_us=0)
    outputs = begin(api, asked[:1])
    left = asked[1:]
    for output in outputs:
        served.take([output])
        if left and isinstance(output, Token) and output.index % 3 == 0:
            assert api.submit(left.pop()) is None
        elif not left:
            api.close_intake()
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    assert len(served.ends) == 8


def test_a_request_comes_when_it_is_handed_in():
    api = executor()
    outputs = begin(api, [small("a")])
    token = next(outputs)
    assert api.submit(small("b", arrival_us=10**12)) is None
    assert api.status_of_request("b").phase is RequestPhase.WAITING
    api.close_intake()
    ends = {o.request_id: o.report for o in outputs if isinstance(o, Finished)}
    assert ends["b"].arrival_us == token.time_us


def test_a_closed_intake_takes_nobody_in_and_says_so():
    api = executor()
    closed = "the intake is closed: no more requests are taken in"
    assert api.submit(small("a")) == Refused("a", closed)
    outputs = begin(api, [small("a")])
    next(outputs)
    api.close_intake()
    assert api.submit(small("b")) == Refused("b", closed)
    assert {o.request_id for o in outputs} == {"a"}
    assert list(api.serve([small("c")], create("fifo"), DirectPlanner()))
    assert api.submit(small("d")) == Refused("d", closed)


def test_an_id_in_use_is_refused_and_one_that_has_ended_is_not():
    api = executor()
    outputs = begin(api, [small("a")])
    next(outputs)
    assert api.submit(small("a")) == Refused("a", "request 'a' is being served")
    assert api.submit(small("b")) is None
    assert api.submit(small("b")) == Refused("b", "request 'b' is being served")
    ends = [next(o for o in outputs if isinstance(o, Finished)) for _ in range(2)]
    assert api.submit(small("a")) is None
    api.close_intake()
    ends += [o for o in outputs if isinstance(o, Finished)]
    assert [end.request_id for end in ends] == ["a", "b", "a"]
    assert {end.reason for end in ends} == {FinishReason.LENGTH}


def test_beyond_so_many_waiting_requests_the_next_is_refused_with_the_numbers():
    heard = []
    api = executor(kv_blocks=4, watch=[heard.append], max_waiting=2)
    outputs = begin(api, [small("a", 40)])
    next(outputs)
    assert [api.submit(small(name, 40)) for name in "bc"] == [None, None]
    refused = api.submit(small("d", 40))
    assert refused == Refused("d", "2 requests wait already; max_waiting is 2", for_now=True)
    ended = next(o for o in outputs if isinstance(o, Finished))
    assert ended.request_id == "a"
    while api.status_of_request("b").phase is RequestPhase.WAITING:
        next(outputs)
    assert api.submit(small("d", 40)) is None
    api.close_intake()
    assert {o.request_id for o in outputs if isinstance(o, Finished)} == set("bcd")
    assert refused in heard
    assert [said.request.id for said in heard if isinstance(said, Arrived)] == list("abcd")


def test_beyond_so_many_waiting_tokens_the_next_is_refused_with_the_numbers():
    api = executor(kv_blocks=40, max_waiting_tokens=100)
    outputs = begin(api)
    assert api.submit(small("long", 200)) is None
    refused = api.submit(small("b", 7))
    assert refused.for_now
    assert refused.detail == (
        "prompts of 200 tokens wait already, and this one has 7; max_waiting_tokens is 100"
    )
    next(outputs)
    assert [api.submit(small(name, 50)) for name in "bc"] == [None, None]
    assert api.submit(small("d", 1)).for_now
    api.close_intake()
    assert {o.request_id for o in outputs if isinstance(o, Finished)} == {"long", "b", "c"}


def test_requests_of_a_trace_that_find_too_many_waiting_are_refused_among_the_outputs():
    api = executor(kv_blocks=4, max_waiting=3)
    asked = [small(f"r{n}", 40, arrival_us=n) for n in range(10)]
    served = Served().take(api.serve(asked, create("fifo"), DirectPlanner()))
    refused = {name for name, end in served.ends.items() if isinstance(end, Refused)}
    assert set(served.ends) == {request.id for request in asked}
    assert 0 < len(refused) < 10
    for name in refused:
        assert served.ends[name].detail == "3 requests wait already; max_waiting is 3"


def test_requests_that_were_taken_and_not_heard_of_yet_count_as_waiting():
    intake = Intake(max_waiting=2)
    asked = [small(f"r{n}", arrival_us=n) for n in range(4)]
    intake.open(asked, 0, lambda: (0, 0), takes_more=False)
    assert [said.request.id for said in intake.take(0)] == ["r0"]
    assert [said.request.id for said in intake.take(2, again=True)] == ["r1"]
    assert [refused.request_id for refused in intake.take_refused()] == ["r2"]
    arrived, _ = intake.take(3)
    assert arrived.request.id == "r3"
    intake.shut()


@pytest.mark.parametrize("bound", ["max_waiting", "max_waiting_tokens"])
def test_a_bound_under_which_nobody_is_served_is_refused(bound):
    with pytest.raises(ValueError, match=f"{bound} 0: 1 or more, or None for no bound"):
        executor(**{bound: 0})


def test_a_request_that_is_still_to_come_can_be_cancelled():
    api = executor()
    outputs = api.serve(
        [small("a"), small("b", arrival_us=50_000)], create("fifo"), DirectPlanner()
    )
    next(outputs)
    api.cancel("b")
    ends = {o.request_id: o for o in outputs if isinstance(o, Finished)}
    assert ends["b"].reason is FinishReason.CANCELLED
    assert ends["b"].report.end_us == 50_000


def test_what_is_handed_in_and_cancelled_at_once_ends_as_cancelled():
    api = executor()
    outputs = begin(api)
    assert api.submit(small("a")) is None
    api.cancel("a")
    api.close_intake()
    assert [o.reason for o in outputs] == [FinishReason.CANCELLED]


def test_on_a_virtual_clock_nobody_waits_for_word_from_outside():
    outputs = begin(executor(), [small("a")])
    with pytest.raises(ExecutorError, match="no engine will ever say anything"):
        list(outputs)


def test_other_threads_may_hand_in_cancel_and_close():
    engines = {"x0": Echo(spec("x0", 400), WallClock())}
    api = ExecutorAPI(engines, members(engines, ONE))
    outputs = begin(api)
    asked = requests(40, generate=3, every_us=0)

    def client(mine: list[Request]) -> None:
        for request in mine:
            assert api.submit(request) is None

    clients = [threading.Thread(target=client, args=(asked[n::4],)) for n in range(4)]

    def closer() -> None:
        for thread in clients:
            thread.join()
        api.close_intake()

    for thread in (*clients, last := threading.Thread(target=closer)):
        thread.start()
    served = Served().take(outputs)
    last.join()
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    assert api.submit(small("late")).detail.startswith("the intake is closed")
