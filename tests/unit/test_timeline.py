"""The timeline's picture and trace, and the sums of a run."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from sagec.runtime.engines import PlanDone, StepReport
from sagec.runtime.loop import Arrived, Finished
from sagec.runtime.report import Quantiles, RequestReport, Summary
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.timeline import DECODE, MIXED, PREFILL, WIDTH, Timeline, kind
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, requests, serve

SVG = "{http://www.w3.org/2000/svg}"


def step(instance="x0", begin_us=0, end_us=10, **fields) -> StepReport:
    return StepReport(
        instance=instance, plan_id="p", step=0, begin_us=begin_us, end_us=end_us, **fields
    )


@pytest.fixture(scope="module")
def split() -> Served:
    return serve(SPLIT, requests(6, every_us=2500))


def bars(svg: str) -> dict[str, list[ElementTree.Element]]:
    """Rectangles of the picture by class, without the legend's."""
    found: dict[str, list[ElementTree.Element]] = {}
    for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if rect.get("width") != "12":
            found.setdefault(rect.get("class"), []).append(rect)
    return found


def test_a_step_is_prefill_decode_or_both():
    assert kind(step(chunks=(("a", 0, 4),))) == PREFILL
    assert kind(step(decodes=("a",))) == DECODE
    assert kind(step(chunks=(("a", 0, 4),), decodes=("b",))) == MIXED


def test_the_picture_has_a_lane_an_instance_and_a_bar_a_step(split):
    svg = split.timeline.to_svg("six requests")
    found = bars(svg)
    assert len(found["lane"]) == 2
    steps = split.timeline.steps
    assert len(found["prefill"]) == sum(bool(s.chunks) for s in steps)
    assert len(found["decode"]) == sum(bool(s.decodes) for s in steps)
    assert len(found["move"]) == len(split.timeline.moves) == 6
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"six requests", "p0", "d0", "prefill", "decode", "KV hand-over", "0"} <= set(texts)


def test_every_bar_lies_inside_the_picture(split):
    for rects in bars(split.timeline.to_svg()).values():
        for rect in rects:
            begin, width = float(rect.get("x")), float(rect.get("width"))
            assert begin >= 0
            assert width > 0
            assert begin + width <= WIDTH


def test_a_bar_is_labelled_where_its_label_fits():
    timeline = Timeline()
    timeline.hear(step(end_us=900, chunks=(("chat-1", 0, 64),)))
    timeline.hear(step(begin_us=900, end_us=901, chunks=(("chat-2", 0, 64),)))
    labels = [
        text.text
        for text in ElementTree.fromstring(timeline.to_svg()).iter(f"{SVG}text")
        if text.get("class") == "label"
    ]
    assert labels == ["chat-1"]


def test_thousands_of_steps_are_drawn_in_few_bars_that_tell_how_many():
    timeline = Timeline(["x0"])
    for i in range(20_000):
        timeline.hear(step(begin_us=i, end_us=i + 1, decodes=("a",)))
    found = bars(timeline.to_svg())
    assert len(found["decode"]) < 2 * WIDTH
    assert "20000 decode steps" in timeline.to_svg()


def test_many_hand_overs_are_drawn_without_heads():
    served = serve(WIDE, requests(80), DirectPlanner(), kv_blocks=200)
    svg = served.timeline.to_svg()
    assert len(served.timeline.moves) == 80
    assert "marker-end" not in svg
    assert 'stroke-opacity="0.30"' in svg


def test_names_are_escaped_and_long_ones_shortened():
    timeline = Timeline()
    timeline.hear(step("<the & longest>", end_us=1000, chunks=(("<a>", 0, 4),)))
    ElementTree.fromstring(timeline.to_svg("a < b"))
    assert "&lt;the &amp; lo…" in timeline.to_svg()


def test_nothing_makes_an_empty_picture_and_an_empty_trace():
    timeline = Timeline()
    timeline.hear(PlanDone(instance="x0", plan_id="p"))
    assert bars(timeline.to_svg()) == {}
    assert json.loads(timeline.to_trace())["traceEvents"] == []


def test_the_trace_has_a_process_an_instance_and_a_thread_a_phase(split):
    events = json.loads(split.timeline.to_trace())["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert names == {"p0": 1, "d0": 2}
    threads = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {"prefill", "decode", "kv"}


def test_every_hand_over_of_the_trace_flows_from_slice_to_slice(split):
    events = json.loads(split.timeline.to_trace())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    flows = [e for e in events if e["ph"] in "sf"]
    assert len(flows) == 12
    for end in flows:
        assert any(
            (s["pid"], s["tid"]) == (end["pid"], end["tid"])
            and s["ts"] <= end["ts"] <= s["ts"] + s["dur"]
            for s in slices
        )
    assert {e["id"] for e in flows} == set(range(6))


def test_a_mixed_step_is_a_slice_in_both_threads():
    served = serve(ONE, requests(4, every_us=100), DirectPlanner(chunk_tokens=8))
    mixed = [s for s in served.timeline.steps if kind(s) == MIXED]
    slices = [e for e in json.loads(served.timeline.to_trace())["traceEvents"] if e["ph"] == "X"]
    assert mixed
    assert len([e for e in slices if e["cat"] == MIXED]) == 2 * len(mixed)


# Reports.


def ended(name="a", **fields) -> RequestReport:
    given = {
        "reason": FinishReason.LENGTH,
        "prompt_tokens": 4,
        "output_tokens": 5,
        "arrival_us": 100,
        "end_us": 1100,
        "admitted_us": 150,
        "first_token_us": 300,
        "last_token_us": 700,
    }
    return RequestReport(request_id=name, **{**given, **fields})


def test_a_request_report_counts_from_its_arrival():
    report = ended()
    assert (report.queue_us, report.ttft_us, report.tpot_us) == (50, 200, 100.0)


def test_what_never_happened_is_none():
    report = ended(admitted_us=None, first_token_us=None, last_token_us=None, output_tokens=0)
    assert (report.queue_us, report.ttft_us, report.tpot_us) == (None, None, None)
    assert ended(output_tokens=1).tpot_us is None


def test_a_summary_sums_what_it_is_given():
    summary = Summary.of(
        [ended("a"), ended("b", first_token_us=500, end_us=2_000_100)],
        steps=7,
        num_moves=2,
        kv_moved_bytes=512,
        rounds=3,
    )
    assert summary.duration_us == 2_000_000
    assert summary.output_tokens_per_s == 5.0
    assert summary.ttft == Quantiles(count=2, p50_us=300.0, p99_us=398.0)
    assert (summary.steps, summary.rounds, summary.kv_moved_bytes) == (7, 3, 512)


def test_the_summary_of_nothing_has_no_figures():
    summary = Summary.of([])
    assert (summary.ttft, summary.tpot, summary.output_tokens_per_s) == (None, None, 0.0)


def test_the_moves_of_a_run_add_up(split):
    assert split.timeline.kv_moved_bytes == sum(len(r.prompt) * 64 for r in requests(6))


def test_each_request_has_a_row_of_its_times_in_the_order_of_its_coming(split):
    svg = ElementTree.fromstring(split.timeline.to_svg())
    names = [text.text for text in svg.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    reports = split.timeline.reports
    assert [name for name in names if name in split.ends] == [f"r{n}" for n in range(len(reports))]
    rows = [rect for rect in svg.iter(f"{SVG}rect") if rect.get("class").endswith(" row")]
    decodes = [rect for rect in rows if rect.get("class") == "decode row"]
    assert len(decodes) == len(reports) > 1
    assert all(float(r.get("x")) + float(r.get("width")) <= WIDTH for r in rows)


def test_a_promised_first_token_has_a_mark():
    timeline = Timeline()
    timeline.hear(Arrived(Request(id="a", prompt=(1,), arrival_us=0, ttft_us=500)))
    timeline.hear(Arrived(Request(id="b", prompt=(1,), arrival_us=0)))
    for name in "ab":
        record = RequestReport(
            request_id=name, reason=FinishReason.STOP, prompt_tokens=1, output_tokens=1,
            arrival_us=0, end_us=900, admitted_us=100, first_token_us=400,
        )  # fmt: skip
        timeline.hear(Finished(name, FinishReason.STOP, "", record))
    svg = timeline.to_svg()
    assert svg.count("first token promised") == 1
    assert "TTFT promised" in svg
    assert "a: waits 0.1 ms" in svg


def test_of_many_requests_none_has_a_row():
    timeline = Timeline()
    for number in range(100):
        record = RequestReport(
            request_id=f"r{number}", reason=FinishReason.STOP, prompt_tokens=1, output_tokens=1,
            arrival_us=0, end_us=900,
        )  # fmt: skip
        timeline.hear(Finished(record.request_id, FinishReason.STOP, "", record))
    assert "r7" not in timeline.to_svg()
