"""The engine over a patched TurboMind obeys plans, and its tokens are those of the reference model.

What runs is TurboMind's own scheduler, in a process of its own; the model is the toy, whose next
token depends on the KV of all tokens before it.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from sagec.runtime import process
from sagec.runtime.engines import Cancelled, Event, InstanceSpec, PlanDone
from sagec.runtime.plan import RECOMPUTE, SWAP
from tests.torch_engines import plan, request
from tests.turbomind_child import Child
from tests.turbomind_here import needs_turbomind

pytestmark = needs_turbomind


def happens(child: Child, scenario: str, **arguments: Any) -> Any:
    return child.call("tests.turbomind_engines", scenario, **arguments)


def exact(child: Child, scenario: str, **arguments: Any) -> Any:
    """What happened, its tokens being those of the reference model."""
    what = happens(child, scenario, **arguments)
    assert what["outputs"] == what["expected"]
    return what


@pytest.mark.parametrize("tp", [1, 2])
def test_each_step_computes_the_chunks_that_the_plan_says(child: Child, tp: int) -> None:
    what = exact(child, "chunked", tp=tp)
    assert what["deviations"] == []
    assert [step for step in what["chunks"] if step] == [
        [["a", 0, 20]],
        [["a", 20, 40], ["b", 0, 30]],
        [["b", 30, 33]],
        [["b", 33, 70]],
    ]


def test_phases_that_share_time_share_no_step(child: Child) -> None:
    assert not any(exact(child, "time_shared")["mixed"])


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_that_was_swapped_out_computes_no_token_twice(child: Child, tp: int) -> None:
    what = exact(child, "preempted", how=SWAP, tp=tp)
    assert what["kept_tokens"] == what["context"] - 1
    assert what["computed"] == 56 - what["context"]


def test_a_row_that_was_dropped_is_computed_again(child: Child) -> None:
    what = exact(child, "preempted", how=RECOMPUTE)
    assert what["kept_tokens"] == 0
    assert what["computed"] == 55


def test_a_request_begins_with_the_kv_of_one_before_it(child: Child) -> None:
    what = exact(child, "prefix_cached")
    assert what["reused"] == {"b": 64}
    assert what["chunks"] == [["b", 64, 67]]
    assert what["stored"], "whoever plans is told which blocks there are"
    assert what["deviations"] == []


def test_what_the_prefix_cache_lacks_is_computed(child: Child) -> None:
    assert exact(child, "promised_too_much")["chunks"] == [["a", 0, 70]]


def test_what_the_prefix_cache_has_beyond_the_plan_is_told(child: Child) -> None:
    what = exact(child, "found_more")
    assert what["reused"] == {"b": 64}
    assert what["chunks"] == [[["b", 64, 70]]]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("prefix_cache", ["off", "on"])
def test_one_instance_computes_prompts_and_another_outputs(
    child: Child, prefix_cache: str, tp: int
) -> None:
    what = exact(child, "handed_over", prefix_cache=prefix_cache, tp=tp)
    assert what["failures"] == {}
    assert what["exported"] == what["imported"] == ["a", "again", "b"]
    assert what["prompts on d0"] == []


def test_kv_that_was_damaged_on_the_way_fails_its_request_and_a_retry_is_exact(
    child: Child,
) -> None:
    what = exact(child, "damaged_on_the_way")
    assert "its checksum is" in what["failures"]["a"]


def test_kv_of_another_layout_is_refused(child: Child) -> None:
    assert "both instances need one model" in happens(child, "of_another_layout")["failures"]["a"]


def test_kv_that_comes_after_its_plan_is_decoded_all_the_same(child: Child) -> None:
    what = exact(child, "late_kv")
    assert what["imported"] == ["late"]
    assert what["chunks"] == [[["here", 0, 30]]]


def test_stop_tokens_end_an_output_and_are_no_part_of_it(child: Child) -> None:
    assert exact(child, "stopped")["finished"] == {"a": "stop", "b": "stop", "c": "stop"}


def test_a_cancelled_request_leaves_at_once_and_the_others_go_on(child: Child) -> None:
    what = happens(child, "cancelled")
    assert what["cancelled"] == ["a", "b", "c", "never came"]
    assert what["outputs"]["d"] == what["expected"]["d"]
    for id, tokens in what["outputs"].items():
        assert tokens == what["expected"][id][: len(tokens)]


def test_without_plans_turbomind_goes_on_by_itself_and_says_so(child: Child) -> None:
    what = exact(child, "without_a_plan")
    assert set(what["decided"]) == {"plan", "deadline"}
    assert what["deviations"] == [[["a", 0, 1]]]


def test_a_plan_that_makes_no_sense_fails_its_requests_alone(child: Child) -> None:
    failures = exact(child, "refused")["failures"]
    assert failures.keys() == {"x", "never", "gap", "long", "hot"}
    assert failures["x"] == "plan 'p1' is for 'elsewhere'; this is 'i0'"
    assert failures["gap"].startswith("plan 'p3' step 0: chunk [9, 20) leaves a gap")
    assert failures["hot"].endswith("the toy knows greedy sampling alone: 0")


def test_a_newer_plan_takes_over_and_who_is_not_in_it_waits(child: Child) -> None:
    assert exact(child, "superseded")["decoded under p2"] == ["a"]


def test_what_turbomind_takes_from_a_row_is_told_and_computed_again(child: Child) -> None:
    what = exact(child, "short_of_room")
    assert what["preempted"] > 0
    assert what["failures"] == {}


def test_a_request_that_is_sent_again_starts_over(child: Child) -> None:
    what = exact(child, "started_over")
    assert what["chunks of the second"] == [[["a", 0, 33]]]


def test_an_instance_that_is_closed_in_the_middle_says_nothing_more(child: Child) -> None:
    assert happens(child, "closed") == []


def test_text_that_is_a_stop_string_ends_the_output(child: Child) -> None:
    what = happens(child, "stop_string")
    assert what["finished"] == {"a": "stop"}
    assert what["outputs"]["a"] == what["expected"]["a"][:11]


def test_a_prompt_that_is_swapped_out_half_way_goes_on_from_there(child: Child) -> None:
    what = exact(child, "swapped_in_its_prompt")
    assert what["kept"] == [40, 57]
    assert what["chunks"] == [[["a", 0, 40]], [["a", 40, 57]], [["a", 57, 90]]]


def test_a_row_that_was_to_leave_and_stays_goes_on_with_its_kv(child: Child) -> None:
    assert exact(child, "called_off")["exported"] == 0


@pytest.mark.parametrize("tp", [1, 2])
def test_a_row_that_decodes_goes_on_elsewhere(child: Child, tp: int) -> None:
    what = exact(child, "moved_while_decoding", tp=tp)
    assert what["imported"] == ["a"]
    assert what["tokens here and there"] == [5, 7]


def test_a_row_whose_kv_is_in_host_memory_goes_on_elsewhere(child: Child) -> None:
    what = exact(child, "moved_from_host_memory")
    assert what["failures"] == {}
    assert what["tokens here and there"] == [6, 6], "the plan lets it sample one before it leaves"


def test_requests_for_which_the_batch_has_no_place_come_as_others_leave(child: Child) -> None:
    assert exact(child, "more_than_the_batch")["failures"] == {}


def test_a_plan_that_the_native_side_refuses_fails_its_requests_alone(child: Child) -> None:
    failures = exact(child, "malformed")["failures"]
    assert failures == {"a": "chunk 1 of plan 1 is in step 0; steps ascend and end before 64"}


def test_a_request_that_is_cancelled_without_a_plan_at_work_is_told_by_its_process() -> None:
    spec = InstanceSpec(
        id="i0",
        engine="turbomind",
        model="",
        kv_blocks=64,
        block_tokens=16,
        options={"maths": "toy", "deadline_us": "60000000"},
    )
    with closing(process.start([spec])["i0"]) as one:
        given = plan("i0", {"a": 20}, chunks=[(0, "a", 0, 20)], decodes={"a": 24})
        one.submit(given, [request("a", tuple(range(20)), 60)])
        assert PlanDone(instance="i0", plan_id="plan") in told_by(one, PlanDone)
        one.cancel("a")
        assert told_by(one, Cancelled)[-1] == Cancelled(instance="i0", request_id="a")
        one.check_integrity()


def told_by(one: process.ProcessEngine, kind: type) -> list[Event]:
    """What it tells until an event of this kind has come."""
    events: list[Event] = []
    while not any(isinstance(event, kind) for event in events):
        events += one.poll(1.0)
        assert one.error == ""
    return events


def test_kv_that_is_gone_or_of_other_tokens_fails_its_request_alone(child: Child) -> None:
    failures = exact(child, "never_arrived")["failures"]
    assert failures["a"].startswith("no segment 'local:p0:")
    assert failures["b"] == "KV from 'p0' is of other tokens than the request has here"


def test_kv_that_finds_no_room_waits_for_some(child: Child) -> None:
    what = exact(child, "no_room_for_kv", prefix_cache="off")
    assert (what["failures"], what["deviations"]) == ({}, [])


def test_kv_that_finds_no_room_but_its_beginning_cached_is_computed_again(child: Child) -> None:
    what = happens(child, "no_room_for_kv", prefix_cache="on")
    assert what["failures"] == {"late": "KV from 'p0' found no room"}
    assert what["outputs"]["here"] == what["expected"]["here"]
