"""The serving loop on echo engines, in one process and on a virtual clock."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import (
    Cancelled,
    DecidedBy,
    EngineError,
    Failed,
    KVExported,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import (
    Arrived,
    Cancel,
    CancelRequested,
    Closed,
    Deliver,
    Discard,
    Finished,
    Joined,
    Loop,
    LoopError,
    Planned,
    Refused,
    Submit,
    Token,
    Wait,
)
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import Decision, StateError
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

ASKED = requests()


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[int]]:
    """The tokens of ASKED, on one instance with room for all."""
    served = serve(ONE, ASKED, kv_blocks=400)
    assert all(len(tokens) == 20 for tokens in served.tokens.values())
    return served.tokens


@pytest.mark.parametrize("roles", [ONE, SPLIT, WIDE], ids=["one", "split", "wide"])
@pytest.mark.parametrize("kv_blocks", [12, 40])
@pytest.mark.parametrize("chunk_tokens", [5, 32])
@pytest.mark.parametrize("announce", [False, True], ids=["late", "announced"])
def test_tokens_do_not_depend_on_instances_room_or_chunks(
    roles, kv_blocks, chunk_tokens, announce, undisturbed
):
    planner = DirectPlanner(chunk_tokens=chunk_tokens, announce=announce)
    served = serve(roles, ASKED, planner, kv_blocks=kv_blocks)
    assert not served.failures
    assert served.tokens == undisturbed
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}


@settings(deadline=None, max_examples=40)
@given(
    prompts=st.lists(st.integers(1, 120), min_size=1, max_size=10),
    generate=st.integers(1, 30),
    every_us=st.integers(0, 5000),
    roles=st.sampled_from([ONE, SPLIT, WIDE]),
    kv_blocks=st.integers(10, 30),
    chunk_tokens=st.integers(1, 64),
    horizon=st.integers(1, 20),
)
def test_every_request_ends_with_its_own_tokens(
    prompts, generate, every_us, roles, kv_blocks, chunk_tokens, horizon
):
    asked = [
        Request(
            id=f"r{i}", prompt=tuple(range(n)), max_output_tokens=generate, arrival_us=i * every_us
        )
        for i, n in enumerate(prompts)
    ]
    planner = DirectPlanner(chunk_tokens=chunk_tokens, horizon=horizon)
    served = serve(roles, asked, planner, kv_blocks=kv_blocks)
    assert not served.failures
    for request in asked:
        alone = serve(ONE, [request], kv_blocks=400)
        assert served.tokens[request.id] == alone.tokens[request.id]
        assert served.ends[request.id].reason is FinishReason.LENGTH


def test_a_full_cache_preempts_the_last_that_came_and_its_output_stays(undisturbed):
    served = serve(ONE, ASKED, kv_blocks=12)
    preempted = {name for name, end in served.ends.items() if end.report.preemptions}
    assert preempted
    assert "r0" not in preempted
    assert served.tokens == undisturbed


def test_requests_of_unknown_length_are_planned_again_until_they_stop():
    asked = requests(6, generate=None)
    served = serve(SPLIT, asked, vocab="50", eos="7", kv_blocks=60)
    assert {end.reason for end in served.ends.values()} == {FinishReason.STOP}
    assert max(len(tokens) for tokens in served.tokens.values()) > DirectPlanner().horizon
    assert not any(7 in tokens for tokens in served.tokens.values())


def test_a_request_that_never_stops_ends_where_the_cache_does():
    served = serve(ONE, [Request(id="a", prompt=(1, 2, 3))], kv_blocks=3)
    assert served.ends["a"].reason is FinishReason.LENGTH
    assert len(served.tokens["a"]) == 3 * 16 - 3


def test_there_is_no_round_for_a_mere_step():
    served = serve(ONE, requests(1, generate=64), DirectPlanner(horizon=16), kv_blocks=40)
    steps = [event for event in served.events if isinstance(event, StepReport)]
    assert len(steps) == 64
    assert len(served.rounds) <= 64 / 16 + 2


def test_the_table_is_settled_from_step_reports():
    served = serve(ONE, requests(3, every_us=5000), DirectPlanner(horizon=4))
    for state in served.states:
        running = state.running
        decoding = running.computed_tokens >= running.prompt_tokens
        generated = 20 - running.remaining_tokens
        assert (generated[~decoding] == 0).all()
        held = running.computed_tokens[decoding] - running.prompt_tokens[decoding]
        assert (generated[decoding] == held + 1).all()


def test_metrics_of_a_request_follow_its_tokens():
    served = serve(ONE, requests(2, every_us=100))
    times = [step.end_us for step in served.timeline.steps if step.tokens]
    report = served.ends["r0"].report
    assert report.arrival_us == 0
    assert report.queue_us == 0
    assert report.ttft_us == times[0]
    assert report.output_tokens == 20
    assert report.tpot_us == pytest.approx((report.last_token_us - report.first_token_us) / 19)


def test_an_impossible_request_is_rejected_with_the_numbers():
    asked = [Request(id="long", prompt=tuple(range(900)), max_output_tokens=4), *requests(2)]
    served = serve(SPLIT, asked)
    assert served.ends["long"].reason is FinishReason.REJECTED
    assert served.ends["long"].detail == (
        "900 prompt tokens and 4 to generate fit no instance: the largest holds 640 tokens"
    )
    assert served.ends["r1"].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("request_", "detail"),
    [
        (Request(id="a", prompt=()), "an empty prompt; give one token at least"),
        (Request(id="a", prompt=(1,), max_output_tokens=0), "max_output_tokens 0: 1 or more"),
        (Request(id="a", prompt=(1,), model="llama"), "no model 'llama'; there are: "),
    ],
)
def test_a_request_that_makes_no_sense_is_rejected(request_, detail):
    served = serve(ONE, [request_])
    assert served.ends["a"].reason is FinishReason.REJECTED
    assert served.ends["a"].detail == detail


# One turn at a time: the test plays the engines.


class Driven:
    """A loop whose engines are the test."""

    def __init__(self, roles=ONE, planner=None, strategy=None, **options):
        self.clock = VirtualClock()
        self.engines = {name: Echo(spec(name), self.clock) for name in roles}
        self.loop = Loop(
            members(self.engines, roles),
            strategy or create("fifo"),
            planner or DirectPlanner(),
            self.clock,
            **options,
        )
        self.turns = self.loop.run()
        assert next(self.turns) == [Wait(None)]

    def send(self, *events, kind=None):
        """The actions that follow; only those of a kind, where one is given."""
        try:
            actions = self.turns.send(list(events))
        except StopIteration:
            return None
        return [a for a in actions if kind is None or isinstance(a, kind)]

    def play(self, actions):
        """Let the echo engines do what the loop says until nothing happens; all outputs."""
        outputs = []
        while actions:
            events = []
            for action in actions:
                match action:
                    case Submit():
                        self.engines[action.instance].submit(action.plan, action.requests)
                    case Deliver():
                        self.engines[action.instance].receive(action.handle)
                    case Cancel():
                        self.engines[action.instance].cancel(action.request_id)
                    case Token() | Finished() | Refused():
                        outputs.append(action)
            for engine in self.engines.values():
                events += engine.poll()
            actions = self.send(*events) if events else None
        return outputs


def report(instance="x0", plan_id="", **fields) -> StepReport:
    return StepReport(instance=instance, plan_id=plan_id, step=0, begin_us=0, end_us=1, **fields)


def undecided(**fields) -> StepReport:
    """A step that the engine took by itself, for no plan had come in time."""
    return report(decided_by=DecidedBy.DEADLINE, **fields)


REQUEST = Request(id="a", prompt=(1, 2, 3), max_output_tokens=5)
LONG = Request(id="a", prompt=tuple(range(40)), max_output_tokens=30)


def test_a_new_request_is_planned_at_once_and_sent_along():
    driven = Driven()
    (submit,) = driven.send(Arrived(REQUEST), kind=Submit)
    assert submit.instance == "x0"
    assert submit.plan.request_ids == ("a",)
    assert [request.id for request in submit.requests] == ["a"]


def test_a_token_that_is_there_is_dropped():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    assert len(driven.send(report(tokens=(("a", 0, 7),)), kind=Token)) == 1
    assert driven.send(report(tokens=(("a", 0, 9), ("a", 1, 8))), kind=Token) == [
        Token("a", 1, 8, 1)
    ]
    assert driven.loop.output("a") == (7, 8)


def test_tokens_of_a_step_that_no_plan_named_are_taken_once_and_planned_on_from():
    driven = Driven()
    (first,) = driven.send(Arrived(LONG), kind=Submit)
    assert first.plan.chunks.end.tolist() == [32, 40]
    taken = driven.send(undecided(chunks=(("a", 0, 40),), tokens=(("a", 0, 7),)))
    assert Token("a", 0, 7, 1) in taken
    (second,) = [action for action in taken if isinstance(action, Submit)]
    assert (second.requests, len(second.plan.chunks)) == ((), 0)
    assert second.plan.rows.computed_tokens.tolist() == [40]
    late = report(plan_id=first.plan.plan_id, decodes=("a",), tokens=(("a", 0, 7), ("a", 1, 8)))
    assert driven.send(late, kind=Token) == [Token("a", 1, 8, 1)]
    assert driven.loop.output("a") == (7, 8)


def test_an_engine_that_computes_without_a_plan_gets_one():
    class Once(DirectPlanner):
        def plan(self, state, decision):
            return [] if state.round == 1 else super().plan(state, decision)

    driven = Driven(planner=Once())
    (first,) = driven.send(Arrived(LONG), kind=Submit)
    done = PlanDone(instance="x0", plan_id=first.plan.plan_id)
    assert driven.send(done, kind=Submit) == []
    (second,) = driven.send(undecided(chunks=(("a", 0, 16),)), kind=Submit)
    assert second.plan.chunks.begin.tolist() == [16]
    assert driven.send(report(chunks=(("a", 16, 40),)), kind=Submit) == []


@settings(deadline=None, max_examples=60)
@given(data=st.data(), prompt=st.integers(1, 60), generate=st.integers(1, 20))
def test_an_engine_that_often_decides_by_itself_loses_and_repeats_no_token(data, prompt, generate):
    """Between plans it computes whatever it likes, of prompts and of outputs."""
    driven = Driven()
    asked = Request(id="a", prompt=tuple(range(prompt)), max_output_tokens=generate)
    actions = driven.send(Arrived(asked))
    computed, output, outputs = 0, 0, []
    while output < generate:
        end = min(prompt + output, computed + data.draw(st.integers(1, 40)))
        samples = end == prompt + output
        step = {"tokens": (("a", output, 100 + output),)} if samples else {}
        step["chunks" if computed < prompt else "decodes"] = (
            (("a", computed, end),) if computed < prompt else ("a",)
        )
        computed, output = end, output + samples
        if output == generate:
            step["finished"] = (("a", FinishReason.LENGTH),)
        decided = data.draw(st.booleans())
        actions = driven.send(report(**step) if decided else undecided(**step))
        outputs += [action for action in actions if isinstance(action, Token)]
        for submit in (action for action in actions if isinstance(action, Submit)):
            assert submit.plan.rows.computed_tokens.tolist() == [computed]
    assert [(token.index, token.token) for token in outputs] == [
        (index, 100 + index) for index in range(generate)
    ]
    (finished,) = [action for action in actions if isinstance(action, Finished)]
    assert finished.report.output_tokens == generate


def test_a_gap_in_the_tokens_fails_the_request_and_says_so():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    actions = driven.send(report(tokens=(("a", 0, 7), ("a", 2, 9))))
    (finished,) = [a for a in actions if isinstance(a, Finished)]
    assert finished.reason is FinishReason.FAILED
    assert finished.detail == (
        "instance 'x0' sent token 2 of 'a' after token 0; those between are lost"
    )
    assert Cancel("x0", "a") in actions


def test_what_an_instance_says_of_a_request_that_is_elsewhere_is_dropped():
    driven = Driven(WIDE)
    (submit, *_) = driven.send(Arrived(REQUEST), kind=Submit)
    other = "p1" if submit.instance == "p0" else "p0"
    assert driven.send(report(other, tokens=(("a", 0, 7),)), kind=Token) == []
    assert driven.send(report(submit.instance, tokens=(("a", 0, 7),)), kind=Token) != []
    assert driven.send(report(other, tokens=(("nobody", 0, 7),)), kind=Token) == []


def test_an_id_that_is_being_served_is_refused_and_the_first_goes_on():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    assert driven.send(Arrived(REQUEST), kind=Refused) == [
        Refused("a", "request 'a' is being served")
    ]
    assert driven.send(report(tokens=(("a", 0, 7),)), kind=Token) != []


def test_a_failed_request_is_tried_again_but_not_for_ever():
    driven = Driven(max_attempts=2)
    driven.send(Arrived(REQUEST))
    broken = Failed(instance="x0", request_id="a", error="out of memory")
    for _ in range(2):
        (submit,) = driven.send(broken, kind=Submit)
        assert [request.id for request in submit.requests] == ["a"]
    (finished,) = driven.send(broken, kind=Finished)
    assert (finished.reason, finished.detail) == (FinishReason.FAILED, "out of memory")
    assert finished.report.attempts == 3


def test_after_a_failure_the_output_is_part_of_the_prompt_and_indices_go_on():
    driven = Driven(WIDE)
    (first, *_) = driven.send(Arrived(REQUEST), kind=Submit)
    driven.send(report(first.instance, chunks=(("a", 0, 3),), tokens=(("a", 0, 70),)))
    dead = Failed(instance=first.instance, request_id=None, error="killed")
    (submit, *_) = [s for s in driven.send(dead, kind=Submit) if s.requests]
    assert submit.instance != first.instance
    (sent,) = submit.requests
    assert (sent.prompt, sent.max_output_tokens) == ((1, 2, 3, 70), 4)
    assert driven.send(report(submit.instance, tokens=(("a", 0, 71),)), kind=Token) == [
        Token("a", 1, 71, 1)
    ]


def test_with_the_last_instance_of_a_role_its_requests_fail():
    driven = Driven(SPLIT)
    driven.send(Arrived(REQUEST))
    (finished,) = driven.send(Failed(instance="p0", request_id=None, error="x"), kind=Finished)
    assert finished.detail == "no live instance can prefill model ''"
    (finished,) = driven.send(Arrived(REQUEST), kind=Finished)
    assert finished.reason is FinishReason.FAILED


def test_an_instance_that_joins_again_serves_again():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    dead = Failed(instance="x0", request_id=None, error="killed")
    (submit,) = driven.send(dead, Joined("x0"), kind=Submit)
    assert [request.id for request in submit.requests] == ["a"]


def test_kv_for_an_instance_that_died_is_freed_and_the_request_starts_over():
    driven = Driven(WIDE)
    submits = driven.send(Arrived(REQUEST), kind=Submit)
    source = next(s.instance for s in submits if s.requests)
    for submit in submits:
        driven.engines[submit.instance].submit(submit.plan, submit.requests)
    events = driven.engines[source].poll()
    (exported,) = [event for event in events if isinstance(event, KVExported)]
    target = exported.handle.target
    (deliver,) = driven.send(*events, kind=Deliver)
    assert deliver == Deliver(target, exported.handle)
    actions = driven.send(Failed(instance=target, request_id=None, error="killed"))
    assert Discard(exported.handle) in actions
    assert any(isinstance(a, Submit) and a.requests for a in actions)


def test_a_prefill_for_a_decode_instance_that_died_is_called_back():
    driven = Driven(WIDE)
    submits = driven.send(Arrived(REQUEST), kind=Submit)
    source = next(s.instance for s in submits if s.requests)
    target = next(s.instance for s in submits if s.plan.imports)
    actions = driven.send(Failed(instance=target, request_id=None, error="killed"))
    assert Cancel(source, "a") in actions
    submits = driven.send(Cancelled(instance=source, request_id="a"), kind=Submit)
    assert [s for s in submits if s.requests]
    assert not any(s.instance == target for s in submits)


def test_a_cancelled_request_ends_when_its_instance_says_so():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    actions = driven.send(CancelRequested("a"))
    assert actions == [Cancel("x0", "a"), Wait(None)]
    assert driven.send(CancelRequested("a"), kind=Cancel) == []
    (finished,) = driven.send(Cancelled(instance="x0", request_id="a"), kind=Finished)
    assert finished.reason is FinishReason.CANCELLED


def test_a_waiting_request_is_cancelled_at_once():
    class Nobody(DirectPlanner):
        def plan(self, state, decision):
            return []

    driven = Driven(planner=Nobody())
    driven.send(Arrived(REQUEST))
    (finished,) = driven.send(CancelRequested("a"), kind=Finished)
    assert finished.reason is FinishReason.CANCELLED
    assert driven.send(CancelRequested("nobody")) == [Wait(None)]


def test_a_planner_that_does_nothing_ends_in_named_failures_once_closed():
    class Nobody(DirectPlanner):
        def plan(self, state, decision):
            return []

    driven = Driven(planner=Nobody())
    driven.send(Arrived(REQUEST))
    (finished,) = driven.send(Closed(), kind=Finished)
    assert finished.reason is FinishReason.FAILED
    assert finished.detail == "fifo and the planner found no place, and nothing else runs"


def test_a_planner_that_turns_in_circles_is_stopped():
    class Circle(DirectPlanner):
        def plan(self, state, decision):
            return [
                ExecutionPlan(
                    plan_id=f"{state.round}",
                    round=state.round,
                    target_instance_id="x0",
                    mode="hybrid",
                    num_steps=0,
                    max_step_tokens=1,
                )
            ]

    driven = Driven(planner=Circle())
    outputs = driven.play(driven.send(Arrived(REQUEST), Closed()))
    assert [output.reason for output in outputs] == [FinishReason.FAILED]


@pytest.mark.parametrize("target", ["nowhere", "x0"])
def test_a_plan_for_an_instance_that_is_not_there_is_an_error(target):
    class Lost(DirectPlanner):
        def plan(self, state, decision):
            plan = ExecutionPlan(
                plan_id="p",
                round=0,
                target_instance_id=target,
                mode="hybrid",
                num_steps=0,
                max_step_tokens=1,
            )
            return [plan]

    driven = Driven({"x0": "both", "x1": "both"}, planner=Lost())
    with pytest.raises(LoopError, match=f"plan p: no live instance '{target}'; there are: x1"):
        driven.send(Failed(instance="x0", request_id=None, error="killed"), Arrived(REQUEST))


def test_a_decision_that_does_not_fit_the_state_is_an_error():
    class Confused:
        name = "confused"

        def decide(self, state):
            return Decision.defer(state.waiting).preempt(np.array([3]), "why not")

    with pytest.raises(StateError, match=r"strategy 'confused': preempt_rows\[0\]: 3 is not in"):
        Driven(strategy=Confused()).send(Arrived(REQUEST))


def test_a_strategy_is_asked_again_when_it_wants_to_be():
    class Later:
        name = "later"

        def decide(self, state):
            if state.now_us < 500:
                decision = Decision.defer(state.waiting, "not yet")
                return decision.__class__(**{**vars(decision), "again_us": 500})
            return Decision.admit(state.waiting.rows, state.waiting)

    driven = Driven(strategy=Later())
    assert driven.send(Arrived(REQUEST), Closed(), kind=Wait) == [Wait(500)]
    assert driven.send(kind=Submit) == []
    driven.clock.advance_to(500)
    assert len(driven.send(kind=Submit)) == 1


def test_the_loop_ends_when_it_is_closed_and_all_have_ended():
    driven = Driven()
    driven.send(Arrived(REQUEST), Closed())
    actions = driven.send(report(tokens=(("a", 0, 1),), finished=(("a", FinishReason.STOP),)))
    assert not any(isinstance(action, Wait) for action in actions)
    assert driven.send() is None


def test_a_plan_done_that_was_superseded_starts_no_round():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    assert driven.send(PlanDone(instance="x0", plan_id="older"), kind=Submit) == []


def test_a_plan_that_is_done_starts_a_round_only_where_somebody_could_use_its_instance():
    driven = Driven(SPLIT)
    plans = {s.instance: s.plan for s in driven.send(Arrived(REQUEST), kind=Submit)}
    assert plans.keys() == {"p0", "d0"}
    driven.engines["p0"].submit(plans["p0"], [REQUEST])
    events = [event for _ in range(2) for event in driven.engines["p0"].poll()]
    assert events[-1] == PlanDone(instance="p0", plan_id=plans["p0"].plan_id)
    assert driven.send(*events, kind=Planned) == []  # the request has left for d0, which awaits it
    done = PlanDone(instance="d0", plan_id=plans["d0"].plan_id)
    assert len(driven.send(done, kind=Planned)) == 1


def exported(driven, roles=SPLIT):
    """Play a prefill up to its export: what the source said, and the submits before."""
    submits = driven.send(Arrived(REQUEST), kind=Submit)
    for submit in submits:
        driven.engines[submit.instance].submit(submit.plan, submit.requests)
    source = next(s.instance for s in submits if s.requests)
    events = driven.engines[source].poll()
    (event,) = [event for event in events if isinstance(event, KVExported)]
    return source, event, [e for e in events if e is not event]


def test_kv_that_left_while_its_request_was_cancelled_is_freed():
    driven = Driven(SPLIT)
    source, event, before = exported(driven)
    driven.send(CancelRequested("a"))
    driven.send(*before)
    assert driven.send(event, kind=Discard) == [Discard(event.handle)]
    (finished,) = driven.send(Cancelled(instance=source, request_id="a"), kind=Finished)
    assert finished.reason is FinishReason.CANCELLED


def test_kv_that_left_while_its_request_was_to_be_preempted_is_freed_and_it_waits_again():
    class Hasty:
        """Preempts whoever has run for a round."""

        name = "hasty"

        def decide(self, state):
            decision = Decision.admit(state.waiting.rows, state.waiting)
            return decision.preempt(state.running.rows, "hasty") if state.round == 1 else decision

    driven = Driven(SPLIT, strategy=Hasty())
    _, event, before = exported(driven)
    submits = driven.send(Arrived(msgspec.structs.replace(REQUEST, id="b")), kind=Submit)
    assert any(len(submit.plan.preemptions) for submit in submits)
    driven.send(*before)
    actions = driven.send(event)
    assert Discard(event.handle) in actions
    (again,) = [r for a in actions if isinstance(a, Submit) for r in a.requests]
    assert again.id == "a" and len(again.prompt) == len(REQUEST.prompt) + 1


def test_kv_of_a_request_that_has_ended_is_freed():
    driven = Driven(SPLIT)
    source, event, before = exported(driven)
    driven.send(*before)
    driven.send(report(source, finished=(("a", FinishReason.STOP),)))
    assert driven.send(event, kind=Discard) == [Discard(event.handle)]
    arrived = KVImported(
        instance="d0", request_id="a", source=source, num_bytes=1, begin_us=0, end_us=1
    )
    assert driven.send(arrived) == [Wait(None)]


def test_kv_that_was_sent_to_an_instance_that_died_is_computed_again():
    driven = Driven(WIDE)
    _, event, before = exported(driven)
    (token,) = driven.send(*before, kind=Token)
    dead = Failed(instance=event.handle.target, request_id=None, error="killed")
    actions = driven.send(event, dead)
    assert Discard(event.handle) in actions
    (sent,) = [r for a in actions if isinstance(a, Submit) for r in a.requests]
    assert sent.prompt == (*REQUEST.prompt, token.token)


def test_kv_that_goes_to_an_instance_that_is_dead_already_is_computed_again():
    driven = Driven(WIDE)
    _, event, before = exported(driven)
    driven.send(*before)
    other = "d1" if event.handle.target == "d0" else "d0"
    driven.send(Failed(instance=other, request_id=None, error="killed"))
    elsewhere = msgspec.structs.replace(event.handle, target=other)
    actions = driven.send(KVExported(handle=elsewhere, end_us=0))
    assert Discard(elsewhere) in actions
    (sent,) = [r for a in actions if isinstance(a, Submit) for r in a.requests]
    assert len(sent.prompt) == len(REQUEST.prompt) + 1


def test_a_failure_of_a_request_that_waits_or_has_ended_changes_nothing():
    driven = Driven(WIDE)
    (submit, *_) = driven.send(Arrived(REQUEST), kind=Submit)
    other = "p1" if submit.instance == "p0" else "p0"
    for name in ("a", "nobody"):
        assert driven.send(Failed(instance=other, request_id=name, error="late")) == [Wait(None)]
    assert driven.send(report(submit.instance, tokens=(("a", 0, 7),)), kind=Token) != []


@pytest.mark.parametrize("kept_tokens", [0, 3])
def test_a_request_that_fails_where_it_was_preempted_is_sent_there_anew(kept_tokens):
    """The plan that failed it was made before the loop heard of the preemption."""
    preempted = Preempted(instance="x0", request_id="a", kept_tokens=kept_tokens)
    failed = Failed(instance="x0", request_id="a", error="chunk [8, 14) leaves a gap")
    sent = []
    for events in ([preempted], [preempted, failed]):
        driven = Driven()
        driven.send(Arrived(REQUEST))
        (submit,) = driven.send(*events, kind=Submit)
        assert submit.plan.request_ids == ("a",)
        sent.append(submit.requests)
    assert sent == [(), (REQUEST,)]


def test_a_stranger_to_the_loop_among_a_plans_rows_is_passed_over():
    class Haunted(DirectPlanner):
        def plan(self, state, decision):
            plans = super().plan(state, decision)
            ghost = Request(id="ghost", prompt=(1,))
            return [msgspec.structs.replace(p, request_ids=(ghost.id,)) for p in plans]

    driven = Driven(planner=Haunted())
    (submit,) = driven.send(Arrived(REQUEST), kind=Submit)
    assert submit.requests == ()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_fails_or_is_cancelled_no_token_is_wrong_and_nothing_is_left(data):
    roles = data.draw(
        st.sampled_from([WIDE, {**SPLIT, "x0": "both"}, {"x0": "both", "x1": "both"}])
    )
    asked = requests(data.draw(st.integers(1, 10)), every_us=data.draw(st.integers(0, 3000)))
    lives = {name: data.draw(st.integers(1, 60), label=name) for name in roles}
    cancelled = data.draw(st.sets(st.sampled_from([request.id for request in asked])))
    when = data.draw(st.integers(0, 25))
    served, made = Served(), []
    kv_blocks = data.draw(st.integers(10, 30))

    class Mortal(Echo):
        def poll(self, timeout_s=0.0):
            events = super().poll(timeout_s)
            if not made.count(self.name):
                lives[self.name] -= sum(isinstance(event, StepReport) for event in events)
            if lives[self.name] < 0 and not made.count(self.name):
                raise EngineError("the power went out")
            return events

    def make(name):
        engine = Mortal(spec(name, kv_blocks, step_us="1000", bytes_per_s="9999999"), served.clock)
        engine.name = name
        return engine

    def restart(name):
        made.append(name)
        return make(name)

    engines = {name: make(name) for name in roles}
    api = ExecutorAPI(engines, members(engines, roles), served.clock, [served.hear], restart)
    for count, output in enumerate(api.serve(asked, create("fifo"), DirectPlanner())):
        served.take([output])
        if count == when:
            for name in cancelled:
                api.cancel(name)
    expected = serve(ONE, asked, kv_blocks=400).tokens
    assert set(served.ends) == set(expected)
    for name, end in served.ends.items():
        tokens = served.tokens.get(name, [])
        assert tokens == expected[name][: len(tokens)]
        assert (end.reason is FinishReason.LENGTH) == (len(tokens) == 20)
        assert end.reason is FinishReason.LENGTH or name in cancelled
    assert all(engine.kv_blocks_used() == 0 for engine in api.engines.values())


def test_cancelling_while_serving_frees_everything():
    served = Served()
    executor = echo_executor(SPLIT, served)
    outputs = []
    for output in executor.serve(ASKED, create("fifo"), DirectPlanner()):
        outputs.append(output)
        if isinstance(output, Token) and output.index == output.request_id.count("1") * 3:
            executor.cancel(output.request_id)
    ends = {o.request_id: o.reason for o in outputs if isinstance(o, Finished)}
    assert set(ends) == {request.id for request in ASKED}
    assert set(ends.values()) == {FinishReason.CANCELLED}
    assert all(engine.kv_blocks_used() == 0 for engine in executor.engines.values())


def test_what_an_instance_was_to_be_told_when_it_died_its_successor_does_not_hear():
    driven = Driven(SPLIT)
    _, event, before = exported(driven)
    driven.send(*before)
    actions = driven.send(
        event, Failed(instance="d0", request_id=None, error="killed"), Joined("d0")
    )
    assert [a for a in actions if isinstance(a, Deliver)] == []
    assert Discard(event.handle) in actions
    (sent,) = [r for a in actions if isinstance(a, Submit) for r in a.requests]
    assert sent.resumed_tokens == 1


def test_a_report_counts_the_tokens_that_a_prefix_cache_had():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    driven.send(report(reused=(("a", 2), ("nobody", 7))))
    (finished,) = driven.send(report(finished=(("a", FinishReason.STOP),)), kind=Finished)
    assert finished.report.reused_tokens == 2
