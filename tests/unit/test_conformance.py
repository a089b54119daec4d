"""What steps computed against what plans told them to: counted, shown, recorded and told."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.cli import main
from sagec.cli.figures import sentence, total
from sagec.explain import story_of
from sagec.runtime import loop
from sagec.runtime.clock import VirtualClock
from sagec.runtime.conformance import NO_STEPS, Conformance, Outcome, outcome_of
from sagec.runtime.engines import Capability, DecidedBy, StepReport
from sagec.runtime.recording import Header, Recorder, Recording
from sagec.runtime.recording.entries import Entry, Step
from sagec.runtime.recording.rounds import ENCODER
from sagec.runtime.report import Summary
from sagec.runtime.request import Request
from sagec.step_times import step_times
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, requests, serve
from tests.sim_cluster import simulate

SHORT = ("a", 96, 64)


def step(index: int = 12, **said: object) -> StepReport:
    begin_us = 1000 * index
    return StepReport(
        instance="i0",
        plan_id="round-3-i0" if said.get("decided_by") is not DecidedBy.DEADLINE else "",
        step=index,
        begin_us=begin_us,
        end_us=begin_us + 500,
        **said,
    )


STEPS = (
    step(1),
    step(12, deviations=(SHORT, ("b", 1, 0))),
    step(13, decided_by=DecidedBy.ANSWER, steps=4),
    step(14, decided_by=DecidedBy.ANSWER, deviations=(("a", 0, 5),)),
    step(15, decided_by=DecidedBy.DEADLINE, deviations=(("b", 0, 32),)),
    step(16, decided_by=DecidedBy.STOCK),
)


def test_a_step_obeyed_deviated_was_late_or_nobody_decided_it() -> None:
    assert [outcome_of(one) for one in STEPS] == [
        Outcome.OBEYED,
        Outcome.DEVIATED,
        Outcome.OBEYED,
        Outcome.DEVIATED,
        Outcome.AT_DEADLINE,
        Outcome.STOCK,
    ]


def test_like_steps_in_one_report_count_each() -> None:
    found = Conformance.of(STEPS)
    assert found == Conformance(obeyed=5, deviated=2, at_deadline=1, stock=1)
    assert str(found) == (
        "5 of 8 steps as planned, 2 otherwise, 1 without a decision in time, "
        "1 step as the engine itself decided"
    )
    assert str(Conformance(obeyed=1)) == "1 of 1 step as planned"
    assert str(NO_STEPS) == "no steps"


def test_the_table_after_a_run_says_it_and_its_json_too() -> None:
    summary = Summary.of([], steps=9, conformance=Conformance.of(STEPS))
    assert "conformance: 5 of 8 steps as planned, 2 otherwise" in sentence(summary)
    assert total(summary)["conformance"] == {
        "obeyed": 5, "deviated": 2, "at_deadline": 1, "stock": 1
    }  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(
    roles=st.sampled_from([ONE, SPLIT]),
    kv_blocks=st.integers(14, 40),
    chunk_tokens=st.integers(1, 64),
    horizon=st.integers(1, 20),
    engine=st.sampled_from([serve, simulate]),
)
def test_an_engine_that_computes_plans_never_deviates(
    roles: dict[str, str], kv_blocks: int, chunk_tokens: int, horizon: int, engine
) -> None:
    planner = DirectPlanner(chunk_tokens=chunk_tokens, horizon=horizon)
    served = engine(roles, requests(6), planner, kv_blocks=kv_blocks)
    steps = [event for event in served.events if isinstance(event, StepReport)]
    found = Conformance.of(steps)
    assert found == Conformance(obeyed=found.decided)
    assert found.decided >= len(steps) > 0


def test_metrics_count_it_by_instance() -> None:
    pytest.importorskip("prometheus_client")
    from sagec.cli.dashboard import Page, view
    from sagec.runtime.telemetry import Metrics

    capability = Capability(
        kv_blocks=8, block_tokens=16, kv_layout="x", kv_bytes_per_token=1, max_context_tokens=128
    )
    instance = loop.Instance(id="i0", role="both", engine="turbomind", capability=capability)
    metrics = Metrics([instance])
    for one in STEPS:
        metrics.hear(one)
    page = Page.of(metrics.text(), 0.0)
    for name, count in (("obeyed", 5), ("deviated", 2), ("at_deadline", 1)):
        assert page.value(f"sagec:steps_{name}_total", engine="i0") == count
    *_, instances = view(page, None).renderables
    cells = {column.header: list(column.cells) for column in instances.columns}
    assert cells["as planned"] == ["62%"]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A recording of STEPS, which compute requests a and b."""
    path = tmp_path / "x.rec"
    with Recorder(path, Header(strategy="fifo"), VirtualClock()) as recorder:
        for name in ("a", "b"):
            recorder.hear(loop.Arrived(Request(id=name, prompt=(1,) * 200)))
        for one in STEPS:
            recorder.hear(one)
    return path


def test_a_recording_keeps_it(recorded: Path) -> None:
    kept = [entry for entry in Recording(recorded).entries() if isinstance(entry, Step)]
    assert [one.deviations for one in kept] == [
        (), ((0, 96, 64), (1, 1, 0)), (), ((0, 0, 5),), ((1, 0, 32),), ()
    ]  # fmt: skip
    assert Conformance.of(kept) == Conformance.of(STEPS)


def test_a_step_that_was_recorded_before_there_was_such_a_thing_is_read() -> None:
    new = Step("i0", "p", 3, 10, 20, 5, 1, ((0, 0, 4),), (), 1, ())
    fields = msgspec.msgpack.decode(ENCODER.encode([new]))[0]
    old = msgspec.msgpack.encode([fields[: fields.index("plan") - 1]])
    assert msgspec.msgpack.decode(old, type=list[Entry]) == [new]


def test_replayed_steps_say_what_was_planned_and_what_was_computed(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(recorded), "--steps"]) == 0
    said = capsys.readouterr().out
    assert "62%" in said
    assert (
        "step 12 of round-3-i0 on i0: planned 96 tokens of a, computed 64\n"
        "step 12 of round-3-i0 on i0: planned 1 token of b, computed 0\n"
        "step 14 of round-3-i0 on i0: planned 0 tokens of a, computed 5\n"
        "a step of i0: no decision came in time, it took its own\n"
        "a step of i0: planned 0 tokens of b, computed 32\n"
    ) in said
    assert main(["replay", str(recorded), "--steps", "--limit", "1"]) == 0
    assert "and 4 more deviations" in capsys.readouterr().out
    assert main(["replay", str(recorded), "--steps", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["conformance"]["deviated"] == 2
    assert len(row["deviations"]) == 5
    assert step_times(Recording(recorded))[0].conformance == Conformance.of(STEPS)


def test_a_request_is_told_where_its_instance_did_otherwise(recorded: Path) -> None:
    (told,) = [s.text for s in story_of(Recording(recorded), "a").spans if s.kind == "deviation"]
    assert told == (
        "i0 was to compute 96 tokens of it in step 12 of round-3-i0, and computed 64; "
        "so it was in 1 step more."
    )
    assert story_of(Recording(recorded), "b").as_json()["spans"][-2]["kind"] == "deviation"


def test_a_request_is_told_what_was_computed_without_a_decision(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    with Recorder(path, Header(strategy="fifo"), VirtualClock()) as recorder:
        recorder.hear(loop.Arrived(Request(id="b", prompt=(1,) * 200)))
        recorder.hear(STEPS[4])
    assert (
        "No decision came to i0 in time, and it computed 32 tokens of it by itself."
        in story_of(Recording(path), "b").sentences
    )
