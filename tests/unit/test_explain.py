"""Why a request took long, from a recording."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sagec.explain import report_row, slowest, story_of, unfinished
from sagec.runtime import engines, loop
from sagec.runtime.clock import VirtualClock
from sagec.runtime.recording import Header, Recorder, Recording, RecordingError
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import REJECT, Decision, Instances, Running, State, Waiting
from tests.echo_cluster import Served, requests
from tests.recordings import recorded


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recording, Served]:
    """A run in which requests wait, and one is preempted; r0 was promised too much."""
    path = tmp_path_factory.mktemp("recording") / "run.rec"
    asked = requests(30)
    asked[0] = msgspec.structs.replace(asked[0], ttft_us=1000, tpot_us=10_000)
    came = recorded(path, asked)[0]
    return Recording(path), came


def story(served: tuple[Recording, Served], name: str) -> str:
    return "\n".join(story_of(served[0], name).sentences)


def test_every_request_has_a_story_that_begins_and_ends(served: tuple[Recording, Served]) -> None:
    for name, end in served[1].ends.items():
        told = story_of(served[0], name)
        kinds = [span.kind for span in told.spans]
        assert kinds[0] == "arrival"
        assert {"place", "prefill", "hand-over", "decode", "end"} <= set(kinds)
        assert all(span.begin_us <= span.end_us for span in told.spans)
        assert told.report == end.report
        ending = next(span.text for span in told.spans if span.kind == "end")
        assert ending.endswith(f"with {end.report.output_tokens} tokens: length.")


def test_a_story_says_when_it_came_and_what_was_promised(served: tuple[Recording, Served]) -> None:
    assert story(served, "r0").startswith(
        "r0 came 0 ms after the recording began, with a prompt of 7 tokens, to generate at most "
        "20 tokens; promised: TTFT 1 ms, TPOT 10 ms.\n"
        "Round 0 gave it to p0, to decode on d0: its turn, and it fits.\n"
        "p0 computed 7 tokens of its prompt in 1 step that took 1.07 ms.\n"
    )


def test_a_promise_is_met_or_missed_by_so_much(served: tuple[Recording, Served]) -> None:
    report = served[1].ends["r0"].report
    assert report.ttft_us == 1070
    assert "TTFT 1.07 ms: the promised 1 ms missed by 0.07 ms; most of it, 1.07 ms, was " in story(
        served, "r0"
    )
    assert re.search(r"TPOT \S+ ms: the promised 10 ms met by \S+ ms\.$", story(served, "r0"))


def test_rounds_with_the_same_reason_are_one_wait(served: tuple[Recording, Served]) -> None:
    waited = [s for s in story_of(served[0], "r28").spans if s.kind == "wait"]
    assert len(waited) == 1
    assert re.fullmatch(
        r"It waited \S+ ms \(rounds \d+ to \d+\): no room before its turn\. "
        r"r\d+, r\d+, r\d+, r\d+ and \d+ more were running; "
        r"r\d+, r\d+, r\d+, r\d+ and \d+ more went before it\.",
        waited[0].text,
    )
    report = served[1].ends["r28"].report
    assert waited[0].end_us - waited[0].begin_us == report.queue_us


def test_a_preemption_is_told_with_its_round_and_reason(served: tuple[Recording, Served]) -> None:
    preempted = [n for n, end in served[1].ends.items() if end.report.preemptions]
    assert preempted
    for name in preempted:
        text = story(served, name)
        assert re.search(
            r"Round \d+ preempted it on d0: the compiler found no KV blocks for all\.\n"
            r"It waited \S+ ms \(rounds? .*\): no room before its turn",
            text,
        )
        assert "it had lost its place" in text


def test_what_the_first_token_waited_for_adds_up(served: tuple[Recording, Served]) -> None:
    for name, end in served[1].ends.items():
        told = story_of(served[0], name)
        assert sum(told.parts_us.values()) == end.report.ttft_us


def test_the_longest_gap_says_what_ran_meanwhile(served: tuple[Recording, Served]) -> None:
    gaps = [story_of(served[0], n).spans for n in served[1].ends]
    texts = [span.text for spans in gaps for span in spans if span.kind == "gap"]
    assert len(texts) == len(served[1].ends)
    assert all(
        re.match(
            r"The longest wait for a token was \S+ ms, before token \d+: [pd]0 ran \d+ steps? "
            r"\(\S+ ms\)( with (up to [1-9]\d* decodes?|[1-9]\d* tokens? of prefill for r)|[;.])",
            text,
        )
        for text in texts
    )


def test_a_story_for_programs_counts_from_the_beginning(served: tuple[Recording, Served]) -> None:
    told = story_of(served[0], "r3").as_json()
    assert (told["request"], told["arrival_us"]) == ("r3", 2100)
    assert told["report"]["ttft_us"] == sum(told["ttft_parts_us"].values())
    assert [span["kind"] for span in told["spans"]][:1] == ["arrival"]


def test_the_slowest_come_first(served: tuple[Recording, Served]) -> None:
    found = slowest(served[0], 5)
    took = [report.end_us - report.arrival_us for report in found]
    assert took == sorted(took, reverse=True)
    every = [end.report for end in served[1].ends.values()]
    assert took[0] == max(report.end_us - report.arrival_us for report in every)
    assert report_row(found[0])["total_us"] == took[0]


def test_an_unknown_request_is_named_with_one_like_it(served: tuple[Recording, Served]) -> None:
    with pytest.raises(RecordingError, match=r"no request 'r28x'; did you mean 'r28'\?"):
        story_of(served[0], "r28x")


# Ends that the run above does not have, by hand.


def report(name: str, reason: FinishReason) -> RequestReport:
    return RequestReport(
        request_id=name, reason=reason, prompt_tokens=2, output_tokens=0, arrival_us=0, end_us=500
    )


def told_of(
    path: Path, *said: object, timeout_us: int | None = None, header: Header | None = None
) -> list[str]:
    """The story of request a, of whose recording this was heard after its coming."""
    with Recorder(path, header or Header(strategy="fifo"), VirtualClock()) as recorder:
        recorder.hear(loop.Arrived(Request(id="a", prompt=(1, 2), timeout_us=timeout_us)))
        for one in said:
            recorder.hear(one)
    return story_of(Recording(path), "a").sentences


def test_a_request_that_never_ended_is_told_up_to_the_end_of_the_file(tmp_path: Path) -> None:
    told = told_of(tmp_path / "x.rec")
    assert told[0].endswith("with a prompt of 2 tokens, to generate until it stops.")
    assert told[1:] == ["The recording ends before the request does."]


def test_a_rejected_request_says_why(tmp_path: Path) -> None:
    end = loop.Finished("a", FinishReason.REJECTED, "too long", report("a", FinishReason.REJECTED))
    told = told_of(tmp_path / "x.rec", end)
    assert told[-1] == "It was rejected 0.5 ms after it came: too long."


def test_a_story_is_of_the_request_that_was_taken_in(tmp_path: Path) -> None:
    again = loop.Arrived(Request(id="a", prompt=(1,)))
    told = told_of(tmp_path / "x.rec", again, loop.Refused("a", "request 'a' is being served"))
    assert "with a prompt of 2 tokens" in told[0]


def test_a_lost_instance_is_part_of_the_story(tmp_path: Path) -> None:
    told = told_of(
        tmp_path / "x.rec",
        loop.Retried("a", "d0", "the process died", 1),
        engines.Failed(instance="d0", request_id="a", error="out of blocks"),
    )
    assert "d0 lost its KV (the process died); it started over." in told
    assert "It failed on d0: out of blocks." in told


def test_a_cancelled_request_says_when_its_client_left(tmp_path: Path) -> None:
    end = loop.Finished("a", FinishReason.CANCELLED, "", report("a", FinishReason.CANCELLED))
    told = told_of(tmp_path / "x.rec", loop.CancelRequested("a"), end)
    assert told[-2:] == [
        "Its client cancelled it.",
        "It ended 0.5 ms after it came, with 0 tokens: cancelled.",
    ]


def test_requests_that_had_not_ended_are_known(tmp_path: Path) -> None:
    with Recorder(tmp_path / "x.rec", Header(strategy="fifo"), VirtualClock()) as recorder:
        for name in ("a", "b", "b"):
            recorder.hear(loop.Arrived(Request(id=name, prompt=(1,))))
        recorder.hear(loop.Refused("b", "request 'b' is being served"))
        record = report("a", FinishReason.STOP)
        recorder.hear(loop.Finished("a", FinishReason.STOP, "", record))
    assert unfinished(Recording(tmp_path / "x.rec")) == ["b"]


def step(begin_us: int, **said: object) -> engines.StepReport:
    return engines.StepReport(
        instance="d0", plan_id="p", step=0, begin_us=begin_us, end_us=begin_us + 1000, **said
    )


def test_tokens_of_which_only_the_number_is_known_have_times(tmp_path: Path) -> None:
    told = told_of(
        tmp_path / "x.rec",
        step(0, chunks=(("a", 0, 2),), advanced=(("a", 0, 1),)),
        step(2000, advanced=(("a", 1, 4),), steps=4),
    )
    assert "d0 decoded 4 more tokens in 2 ms, 0.5 ms each." in told


def test_what_is_computed_again_is_no_prompt(tmp_path: Path) -> None:
    told = told_of(
        tmp_path / "x.rec",
        step(0, chunks=(("a", 0, 2),)),
        loop.Retried("a", "d0", "instance 'd0': killed", 1),
        step(5000, chunks=(("a", 0, 2), ("a", 2, 9)), reused=(("a", 1),)),
    )
    assert "d0 computed 2 tokens of its prompt in 1 step that took 1 ms." in told
    assert "d0 lost its KV (killed); it started over." in told
    assert told[-2] == (
        "d0 computed 2 tokens of its prompt and 7 tokens of its output again in 1 step that took "
        "1 ms; 1 more came from the prefix cache."
    )


def state(waiting: Waiting, number: int) -> State:
    return State(
        now_us=1000 * number,
        round=number,
        waiting=waiting,
        running=Running.of([]),
        instances=Instances.of(["d0"]),
    )


def test_who_was_admitted_and_left_out_of_the_plans_did_not_go_before(tmp_path: Path) -> None:
    waiting = Waiting.of(["a", "b"], sequence=[1, 2])
    both = Decision.admit(np.array([1, 0]), waiting, "its turn")
    early, later = state(waiting, 0), state(waiting, 1)
    told = told_of(
        tmp_path / "x.rec",
        loop.Arrived(Request(id="b", prompt=(1,))),
        loop.Planned(early, both, (), 1.0, 1.0),
        loop.Planned(later, Decision.defer(waiting, "no room"), (), 1.0, 1.0),
    )
    assert "it was admitted, but the plans of the round had no room for it." in told[1]
    assert "went before it" not in "".join(told)


def test_a_rejection_of_a_round_comes_with_its_reason(tmp_path: Path) -> None:
    waiting = Waiting.of(["a"])
    rejected = dataclasses.replace(
        Decision.defer(waiting, "too late"), verdict=np.array([REJECT], np.int8)
    )
    told = told_of(tmp_path / "x.rec", loop.Planned(state(waiting, 0), rejected, (), 1.0, 1.0))
    assert told[1] == "Round 0 rejected it: too late."


def test_a_client_that_waits_so_long_is_part_of_the_story(tmp_path: Path) -> None:
    end = loop.Finished("a", FinishReason.TIMEOUT, "", report("a", FinishReason.TIMEOUT))
    told = told_of(tmp_path / "x.rec", end, timeout_us=500)
    assert told[0].endswith("; its client waits 0.5 ms.")
    assert told[-1] == "It ended 0.5 ms after it came, with 0 tokens: timeout."


def test_an_idle_instance_of_a_pool_says_who_had_the_turn(tmp_path: Path) -> None:
    capability = engines.Capability(
        kv_blocks=4, block_tokens=4, kv_layout="x", max_context_tokens=9, kv_bytes_per_token=1
    )
    pooled = tuple(
        loop.Instance(id=name, role="both", engine="echo", capability=capability, pool=pool)
        for name, pool in (("d0", "gpu"), ("d1", "gpu"), ("d2", "another"))
    )
    others = [msgspec.structs.replace(step(2000), instance=name) for name in ("d1", "d2")]
    told = told_of(
        tmp_path / "x.rec",
        step(0, chunks=(("a", 0, 2),)),
        loop.Token("a", 0, 7, 1000),
        *others,
        step(5000, decodes=("a",)),
        loop.Token("a", 1, 7, 6000),
        header=Header(strategy="aegaeon", instances=pooled),
    )
    assert "and computed nothing for 4 ms, while d1 had the turn." in told[-2]


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [
        ("no room", "no room", "no room"),
        ("slack 90 ms", "slack 40 ms", "slack 90 (at last 40) ms"),
        ("1.5 of 2", "1.5 of 3", "1.5 of 2 (at last 3)"),
    ],
)
def test_reasons_that_differ_in_numbers_are_told_as_one(
    first: str, last: str, told: str, tmp_path: Path
) -> None:
    waiting = Waiting.of(["a"])
    said = [
        loop.Planned(state(waiting, number), Decision.defer(waiting, reason), (), 1.0, 1.0)
        for number, reason in enumerate((first, last))
    ]
    assert told_of(tmp_path / "x.rec", *said)[1] == f"It waited 1 ms (rounds 0 to 1): {told}."
