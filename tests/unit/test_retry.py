"""Where a request goes after an instance failed it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.engines import Failed
from sagec.runtime.loop import Arrived, Joined, Restarting, Retried, Submit
from sagec.runtime.request import Request
from sagec.runtime.retry import elsewhere
from sagec.runtime.state import ANY, DEFER, Decision, Instances, Running, State, Waiting, check
from tests.echo_cluster import WIDE
from tests.unit.test_loop import REQUEST, Driven

ROLES = ("prefill", "prefill", "decode", "decode", "both", "both")


def state(prompts, alive=True, used=0) -> State:
    return State(
        now_us=0,
        round=0,
        waiting=Waiting.of(
            [f"r{n}" for n in range(len(prompts))], prompt_tokens=prompts, generate_tokens=10
        ),
        running=Running.of([]),
        instances=Instances.of(
            [f"i{n}" for n in range(len(ROLES))],
            role=list(ROLES),
            kv_blocks=100,
            block_tokens=16,
            kv_blocks_used=used,
            max_context_tokens=1600,
            alive=alive,
        ),
    )


def admitted(seen: State) -> Decision:
    return Decision.admit(seen.waiting.rows, seen.waiting, "its turn")


@pytest.mark.parametrize(
    ("failed", "on"),
    [(0, (1, ANY)), (1, (0, ANY)), (2, (ANY, 3)), (3, (ANY, 2)), (4, (5, 5)), (5, (4, 4))],
)
def test_another_of_the_role_takes_it(failed, on):
    seen = state([50, 50])
    decision = elsewhere(admitted(seen), seen, {1: failed})
    check(decision, seen)
    assert (decision.prefill_on[1], decision.decode_on[1]) == on
    assert decision.reason[1] == f"its turn; not on 'i{failed}', which failed it"
    assert (decision.prefill_on[0], decision.decode_on[0]) == (ANY, ANY)
    assert decision.reason[0] == "its turn"


def test_where_there_is_no_other_the_decision_stands():
    alone = state([50], alive=(True, False, True, True, True, True))
    assert elsewhere(admitted(alone), alone, {0: 0}).prefill_on[0] == ANY
    long = state([1595])
    assert elsewhere(admitted(long), long, {0: 2}).decode_on[0] == ANY
    assert elsewhere(admitted(long), long, {0: 0}).prefill_on[0] == 1


def test_a_place_that_the_strategy_chose_itself_stands_unless_it_failed_there():
    seen = state([50])
    decision = admitted(seen)
    decision.prefill_on[0] = 4
    assert elsewhere(decision, seen, {0: 0}).prefill_on[0] == 4
    decision.prefill_on[0] = 0
    assert elsewhere(decision, seen, {0: 0}).prefill_on[0] == 1


def test_many_that_failed_at_once_do_not_all_go_to_one_place():
    roles = ("both",) * 3
    seen = state([160] * 8)
    free = Instances.of(
        ["a", "b", "c"], role=list(roles), kv_blocks=100, block_tokens=16, max_context_tokens=1600
    )
    seen = State(now_us=0, round=0, waiting=seen.waiting, running=seen.running, instances=free)
    decision = elsewhere(admitted(seen), seen, dict.fromkeys(range(8), 0))
    assert np.bincount(decision.prefill_on, minlength=3).tolist() == [0, 4, 4]


def test_rows_that_nobody_alive_can_prefill_or_decode_wait():
    seen = state([50], alive=(True, True, False, False, False, False))
    decision = elsewhere(admitted(seen), seen, {})
    assert decision.verdict.tolist() == [DEFER]
    assert decision.reason[0] == "its instances failed and are being made again"


def test_a_dead_instance_has_no_turn():
    seen = state([50], alive=(True, False, True, True, True, True))
    turns = np.array([3, 0, ANY, 1, 1, 1])
    decision = dataclasses.replace(admitted(seen), turn_steps=turns)
    assert elsewhere(decision, seen, {}).turn_steps.tolist() == [3, ANY, ANY, 1, 1, 1]


@given(
    prompts=st.lists(st.integers(1, 1500), max_size=8),
    alive=st.tuples(*[st.booleans()] * len(ROLES)),
    used=st.tuples(*[st.integers(0, 100)] * len(ROLES)),
    data=st.data(),
)
def test_whatever_failed_the_decision_fits_the_state(prompts, alive, used, data):
    seen = state(prompts, alive, used)
    places = st.sampled_from(range(len(ROLES)))
    failed_on = data.draw(st.dictionaries(st.sampled_from(range(len(prompts) or 1)), places))
    before = admitted(seen)
    after = elsewhere(before, seen, {r: f for r, f in failed_on.items() if r < len(prompts)})
    check(after, seen)
    for row in after.admitted.tolist():
        for chosen in (after.prefill_on[row], after.decode_on[row]):
            assert chosen == ANY or (alive[chosen] and chosen != failed_on[row])
    assert (before.prefill_on == ANY).all()


def test_a_request_that_its_instance_gave_up_goes_to_the_other():
    driven = Driven(WIDE)
    submits = driven.send(Arrived(REQUEST), kind=Submit)
    first = next(s.instance for s in submits if s.requests)
    actions = driven.send(Failed(instance=first, request_id="a", error="out of luck"))
    assert Retried("a", first, "out of luck", 1) in actions
    (second,) = [a.instance for a in actions if isinstance(a, Submit) and a.requests]
    assert {first, second} == {"p0", "p1"}


def test_a_request_waits_for_the_last_instance_while_that_is_made_again():
    driven = Driven()
    driven.send(Arrived(REQUEST))
    dead = Failed(instance="x0", request_id=None, error="killed")
    actions = driven.send(dead, Restarting("x0", 500))
    assert [type(action) for action in actions][:-1] == [Retried]
    assert driven.send(Arrived(Request(id="b", prompt=(1,))), kind=Submit) == []
    (submit,) = driven.send(Joined("x0"), kind=Submit)
    assert [request.id for request in submit.requests] == ["a", "b"]
