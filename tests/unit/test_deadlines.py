"""Requests whose client waits only so long, and clocks that jump back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.clock import SteadyClock, VirtualClock, WallClock
from sagec.runtime.engines import Cancelled
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Arrived, Cancel, CancelRequested, Finished, Submit, Token, Wait
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
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
from tests.unit.test_loop import Driven, report


def asked(name: str, timeout_us: int | None, generate: int = 20, **fields) -> Request:
    return Request(
        id=name, prompt=(1, 2, 3), max_output_tokens=generate, timeout_us=timeout_us, **fields
    )


class Nobody(DirectPlanner):
    def plan(self, state, decision):
        return []


def first_output(api: ExecutorAPI, request: Request) -> Finished:
    """Of a service that plans nothing and waits for more requests."""
    outputs = api.serve([request], create("fifo"), Nobody(), until_closed=True)
    output = next(outputs)
    api.close_intake()
    assert list(outputs) == []
    return output


def test_a_running_request_ends_when_its_time_has_come_and_keeps_its_output():
    served = serve(ONE, [asked("a", 9_500), asked("b", None)])
    end = served.ends["a"]
    assert end.reason is FinishReason.TIMEOUT
    assert 1 <= len(served.tokens["a"]) < 20
    assert end.report.output_tokens == len(served.tokens["a"])
    assert (
        end.detail == f"not done 0.0095 s after it came; {len(served.tokens['a'])} tokens of output"
    )
    assert len(served.tokens["b"]) == 20


def test_a_waiting_request_ends_to_the_microsecond_though_nothing_else_happens():
    api = echo_executor(ONE, Served())
    end = first_output(api, asked("a", 700, arrival_us=50))
    assert (end.reason, end.report.end_us) == (FinishReason.TIMEOUT, 750)
    assert end.report.admitted_us is None


def test_the_loop_says_when_it_wants_to_be_woken_for_the_next_timeout():
    driven = Driven(planner=Nobody())
    assert driven.send(Arrived(asked("late", 900)), kind=Wait) == [Wait(900)]
    assert driven.send(Arrived(asked("soon", 300)), kind=Wait) == [Wait(300)]
    assert driven.send(CancelRequested("soon"), kind=Wait) == [Wait(900)]
    driven.clock.advance_to(900)
    (finished,) = driven.send(kind=Finished)
    assert (finished.request_id, finished.reason) == ("late", FinishReason.TIMEOUT)


def test_what_timed_out_on_an_instance_ends_when_that_has_let_go_of_it():
    driven = Driven()
    driven.send(Arrived(asked("a", 500)))
    driven.clock.advance_to(600)
    assert driven.send() == [Cancel("x0", "a"), Wait(None)]
    assert driven.send(report(tokens=(("a", 0, 7),)), kind=Token) == [Token("a", 0, 7, 1)]
    assert driven.send(CancelRequested("a")) == [Wait(None)]
    (finished,) = driven.send(Cancelled(instance="x0", request_id="a"), kind=Finished)
    assert finished.reason is FinishReason.TIMEOUT
    assert finished.report.output_tokens == 1


def test_a_request_whose_time_was_up_before_it_came_computes_nothing():
    served = serve(ONE, [asked("a", 1)])
    assert served.ends["a"].reason is FinishReason.TIMEOUT
    driven = Driven()
    driven.clock.advance_to(10_000)
    actions = driven.send(Arrived(asked("a", 5, arrival_us=20)))
    assert [type(action) for action in actions] == [Finished, Wait]


def test_a_timeout_of_nothing_is_rejected():
    served = serve(ONE, [asked("a", 0)])
    assert served.ends["a"].reason is FinishReason.REJECTED
    assert served.ends["a"].detail == "timeout_us 0: 1 or more"


def test_an_id_that_has_ended_may_come_again_with_a_timeout_of_its_own():
    driven = Driven()
    driven.send(Arrived(asked("a", 500)))
    driven.send(report(finished=(("a", FinishReason.STOP),)))
    assert driven.send(Arrived(asked("a", 5_000)), kind=Wait) == [Wait(5_000)]
    driven.clock.advance_to(600)
    assert driven.send(kind=Cancel) == []


def test_timeouts_of_requests_that_ended_do_not_pile_up():
    driven = Driven()
    for number in range(1000):
        driven.send(Arrived(asked(f"r{number}", 10**9)))
        driven.send(report(finished=((f"r{number}", FinishReason.STOP),)))
    assert len(driven.loop._timeouts) < 100


@settings(deadline=None, max_examples=40)
@given(
    timeouts=st.lists(st.one_of(st.none(), st.integers(1, 60_000)), min_size=1, max_size=12),
    roles=st.sampled_from([ONE, SPLIT, WIDE]),
    kv_blocks=st.integers(10, 30),
)
def test_whenever_requests_time_out_no_token_is_wrong_and_nothing_is_left(
    timeouts, roles, kv_blocks
):
    plain = requests(len(timeouts))
    hurried = [
        Request(
            id=r.id,
            prompt=r.prompt,
            max_output_tokens=r.max_output_tokens,
            arrival_us=r.arrival_us,
            timeout_us=timeout_us,
        )
        for r, timeout_us in zip(plain, timeouts, strict=True)
    ]
    expected = serve(ONE, plain, kv_blocks=400).tokens
    served = serve(roles, hurried, kv_blocks=kv_blocks)
    for request in hurried:
        end, tokens = served.ends[request.id], served.tokens.get(request.id, [])
        assert tokens == expected[request.id][: len(tokens)]
        assert end.reason in (FinishReason.LENGTH, FinishReason.TIMEOUT)
        if end.reason is FinishReason.TIMEOUT:
            assert end.report.end_us >= request.arrival_us + request.timeout_us
        else:
            assert len(tokens) == 20


# Clocks that jump.


class JumpingClock:
    """Goes on by 100 us a look, and back by an hour at every nth."""

    def __init__(self, every: int) -> None:
        self.looks, self.every, self.us = 0, every, 10**12

    def now_us(self) -> int:
        self.looks += 1
        self.us += -3_600_000_000 if self.looks % self.every == 0 else 100
        return self.us


@pytest.mark.parametrize("every", [3, 7, 50])
@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
def test_a_clock_that_jumps_back_makes_no_time_negative_and_loses_nothing(roles, every):
    clock = JumpingClock(every)
    engines = {name: Echo(spec(name), WallClock()) for name in roles}
    api = ExecutorAPI(engines, members(engines, roles), clock)
    some = [asked(f"r{n}", 10**9, arrival_us=n * 50) for n in range(6)]
    served = Served().take(api.serve(some, create("fifo"), DirectPlanner()))
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
    for end in served.ends.values():
        told = end.report
        assert told.queue_us >= 0
        assert told.ttft_us >= told.queue_us
        assert told.tpot_us >= 0
        assert told.end_us >= told.last_token_us


def test_a_timeout_comes_though_the_clock_jumped_back():
    clock = JumpingClock(5)
    engines = {"x0": Echo(spec("x0"), WallClock())}
    api = ExecutorAPI(engines, members(engines, ONE), clock)
    assert first_output(api, asked("a", 3_000)).reason is FinishReason.TIMEOUT


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_steady_clock_never_goes_back_and_loses_no_time(readings):
    class Read:
        def __init__(self):
            self.left = [0, *readings]

        def now_us(self):
            return self.left.pop(0)

    clock = SteadyClock(Read())
    times = [clock.now_us() for _ in readings]
    assert times == sorted(times)
    forward = sum(max(0, b - a) for a, b in zip([0, *readings], readings, strict=False))
    assert times[-1] == forward


def test_an_instance_whose_clock_is_behind_gives_no_negative_latency():
    driven = Driven()
    driven.clock.advance_to(5_000)
    (submit,) = driven.send(Arrived(asked("a", None, arrival_us=4_000)), kind=Submit)
    tokens = driven.send(report(submit.instance, tokens=(("a", 0, 7),)), kind=Token)
    assert tokens == [Token("a", 0, 7, 5_000)]
    assert driven.loop.state().running.first_token_us.tolist() == [5_000]
    (finished,) = driven.send(report(finished=(("a", FinishReason.STOP),)), kind=Finished)
    assert finished.report.ttft_us == 1_000


def test_virtual_time_is_steady_already():
    clock = VirtualClock(5)
    steady = SteadyClock(clock)
    clock.advance_to(9)
    assert steady.now_us() == 9
