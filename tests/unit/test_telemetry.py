"""Metrics and spans: what they say is what happened."""

import json

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sagec.runtime.engines import Failed, StepReport
from sagec.runtime.loop import Instance, Joined, Retried
from sagec.runtime.request import Request
from sagec.runtime.strategies import create
from sagec.runtime.telemetry import Ledger, Metrics, Spans
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, echo_executor, requests
from tests.sim_cluster import sim_executor

CLUSTERS = {"one": ONE, "split": SPLIT, "wide": WIDE}
MADE = {"echo": echo_executor, "sim": sim_executor}


def measured(roles, asked, make=echo_executor, kv_blocks=40, **options):
    """A run, its metrics and its spans."""
    served = Served()
    executor = make(roles, served, kv_blocks, **options)
    metrics = Metrics(executor.instances)
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    executor.watch(metrics.hear)
    executor.watch(Spans(provider.get_tracer("test"), epoch_ns=0).hear)
    served.take(executor.serve(asked, create("fifo"), DirectPlanner()))
    return served, metrics, exporter.get_finished_spans()


def value(metrics, name, **labels):
    """A sample, summed over instances where none is named."""
    if labels:
        return metrics.registry.get_sample_value(name, labels) or 0
    samples = [s for family in metrics.registry.collect() for s in family.samples]
    return sum(s.value for s in samples if s.name == name)


@pytest.mark.parametrize("engine", MADE)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_figure_is_what_happened(cluster, engine):
    asked = requests(20, every_us=200)
    served, metrics, _ = measured(CLUSTERS[cluster], asked, MADE[engine], kv_blocks=16)
    reports = [event for event in served.events if isinstance(event, StepReport)]
    assert value(metrics, "sagec:requests_total") == 20
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 20
    assert value(metrics, "vllm:generation_tokens_total") == 20 * 20
    assert value(metrics, "vllm:time_to_first_token_seconds_count") == 20
    ttft_s = sum(end.report.ttft_us for end in served.ends.values()) / 1e6
    assert value(metrics, "vllm:time_to_first_token_seconds_sum") == pytest.approx(ttft_s)
    chunks = sum(end - begin for report in reports for _, begin, end in report.chunks)
    assert value(metrics, "vllm:prompt_tokens_total") == chunks
    assert value(metrics, "sagec:steps_total") == sum(report.steps for report in reports)
    assert value(metrics, "sagec:rounds_total") == len(served.rounds)
    preempted = sum(end.report.preemptions for end in served.ends.values())
    assert value(metrics, "vllm:num_preemptions_total") == preempted
    moved = sum(move.num_bytes for move in served.timeline.moves)
    assert value(metrics, "sagec:kv_moved_bytes_total") == moved
    assert value(metrics, "vllm:num_requests_waiting") == 0
    assert value(metrics, "vllm:num_requests_running") == 0


def test_tokens_of_a_request_are_apart_by_as_much_as_they_are():
    _, metrics, _ = measured(ONE, [Request(id="a", prompt=(1, 2), max_output_tokens=5)])
    assert value(metrics, "vllm:inter_token_latency_seconds_count") == 4
    assert value(metrics, "vllm:inter_token_latency_seconds_sum") == pytest.approx(4 * 0.00101)


def test_promises_are_counted_as_kept_and_broken():
    asked = [
        Request(id="a", prompt=(1,) * 30, max_output_tokens=5, ttft_us=10**9, tpot_us=1),
        Request(id="b", prompt=(1,) * 30, max_output_tokens=5, ttft_us=1),
        Request(id="c", prompt=(1,) * 30, max_output_tokens=5),
    ]
    _, metrics, _ = measured(ONE, asked)
    assert value(metrics, "sagec:promises_kept_total", promise="ttft") == 1
    assert value(metrics, "sagec:promises_broken_total", promise="ttft") == 1
    assert value(metrics, "sagec:promises_broken_total", promise="tpot") == 1


def test_a_failed_instance_is_down_until_it_is_there_again():
    executor = echo_executor(ONE, Served())
    metrics = Metrics(executor.instances)
    metrics.hear(Failed(instance="x0", request_id=None, error="gone"))
    assert value(metrics, "sagec:instance_up", engine="x0") == 0
    assert value(metrics, "sagec:instance_failures_total", engine="x0") == 1
    metrics.hear(Joined("x0"))
    assert value(metrics, "sagec:instance_up", engine="x0") == 1


def test_a_recording_that_loses_rounds_is_seen(tmp_path):
    class Lossy:
        lost_rounds, written_bytes = 3, 1000

    executor = echo_executor(ONE, Served())
    metrics = Metrics(executor.instances)
    metrics.follow(recording := Lossy())
    assert value(metrics, "sagec:recording_lost_rounds") == 3
    recording.lost_rounds = 4
    assert value(metrics, "sagec:recording_lost_rounds") == 4
    assert value(metrics, "sagec:recording_bytes") == 1000


def test_what_is_started_over_is_counted_at_once():
    executor = echo_executor(ONE, Served())
    metrics = Metrics(executor.instances)
    metrics.hear(Retried("a", "x0", "gone", 1))
    assert value(metrics, "sagec:request_retries_total") == 1


def test_the_ledger_knows_where_everybody_is_whatever_happens():
    served, ledger = Served(), Ledger()
    executor = echo_executor(WIDE, served, 14)
    executor.watch(ledger.hear)
    for output in executor.serve(requests(20, every_us=50), create("fifo"), DirectPlanner()):
        served.take([output])
        assert ledger.num_waiting >= 0
        assert all(count >= 0 for count in ledger.running.values())
        assert len(ledger.known) == ledger.num_waiting + ledger.num_running
    assert not ledger.known
    assert ledger.num_running == 0


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_requests_span_holds_its_phases_one_after_another(cluster):
    served, _, spans = measured(CLUSTERS[cluster], requests(8))
    whole = {span.attributes["gen_ai.request.id"]: span for span in spans if span.name == "request"}
    assert set(whole) == {f"r{i}" for i in range(8)}
    for name, span in whole.items():
        report = served.ends[name].report
        assert span.start_time == report.arrival_us * 1000
        assert span.end_time == report.end_us * 1000
        assert span.attributes["gen_ai.usage.output_tokens"] == 20
        phases = [s for s in spans if s.parent and s.parent.span_id == span.context.span_id]
        names = [phase.name for phase in phases]
        moved = ["kv-transfer"] if len(CLUSTERS[cluster]) > 1 else []
        assert names == ["queue", "prefill", *moved, "decode"]
        assert all(span.start_time <= p.start_time <= p.end_time <= span.end_time for p in phases)
        assert len(span.attributes["sagec.instances"]) == 1 + len(moved)
    rounds = [span for span in spans if span.name == "round"]
    assert len(rounds) == len(served.rounds)


def test_a_request_that_fails_is_a_span_that_says_so():
    _, metrics, spans = measured(ONE, [Request(id="a", prompt=(1,) * 5000, max_output_tokens=5)])
    span = next(span for span in spans if span.name == "request")
    assert not span.status.is_ok
    assert "rejected: 5000 prompt tokens" in span.status.description
    assert value(metrics, "sagec:request_failures_total", reason="rejected") == 1
    assert json.loads(span.to_json())["name"] == "request"


def test_the_text_is_what_prometheus_reads():
    from prometheus_client.parser import text_string_to_metric_families

    _, metrics, _ = measured(ONE, requests(3))
    families = {family.name for family in text_string_to_metric_families(metrics.text())}
    assert {"vllm:kv_cache_usage_perc", "sagec:round_plan_seconds"} <= families


def test_an_instance_counts_from_the_beginning():
    executor = echo_executor(SPLIT, Served())
    metrics = Metrics([i for i in executor.instances if isinstance(i, Instance)])
    assert value(metrics, "vllm:num_requests_running", engine="p0") == 0
    assert 'sagec:instance_up{engine="d0"} 1.0' in metrics.text()
