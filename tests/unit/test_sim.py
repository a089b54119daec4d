"""The simulated engine: its times are the cost model's, whoever asks and how often."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import (
    EngineError,
    KVCached,
    KVHandle,
    KVImported,
    PlanDone,
    StepReport,
)
from sagec.runtime.engines.sim import SimEngine, create
from sagec.runtime.kv import block_hashes, policies
from sagec.runtime.loop import Finished
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, Moves, Rows
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create as strategy
from tests.direct_planner import DirectPlanner, table
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, requests
from tests.sim_cluster import COST, sim_executor, sim_spec, simulate

CLUSTERS = {"one": ONE, "split": SPLIT, "wide": WIDE}


def steps_of(served: Served) -> list[StepReport]:
    return [event for event in served.events if isinstance(event, StepReport)]


def ends_of(served: Served) -> dict[str, tuple[FinishReason, int, int]]:
    return {
        name: (e.reason, e.report.output_tokens, e.report.end_us) for name, e in served.ends.items()
    }


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_everybody_gets_as_many_tokens_as_were_asked_for(cluster):
    served = simulate(CLUSTERS[cluster], requests(20))
    assert not served.failures
    assert {reason for reason, _, _ in ends_of(served).values()} == {FinishReason.LENGTH}
    assert {tokens for _, tokens, _ in ends_of(served).values()} == {20}


def test_a_request_alone_takes_what_the_cost_model_says():
    asked = [Request(id="a", prompt=range(32), max_output_tokens=5)]
    served = simulate(ONE, asked)
    prefill_us = round(COST.one_step_us(32, 32 * 33 / 2, 32))
    decode_us = [round(COST.one_step_us(1, 33 + i, 33 + i)) for i in range(4)]
    report = served.ends["a"].report
    assert report.ttft_us == prefill_us
    assert report.end_us - report.arrival_us == prefill_us + sum(decode_us)
    assert report.tpot_us == sum(decode_us) / 4


@pytest.mark.parametrize("horizon", [1, 3, 8, 64])
def test_how_far_plans_look_changes_no_time(horizon):
    asked = [Request(id="a", prompt=range(40), max_output_tokens=50)]
    served = simulate(ONE, asked, DirectPlanner(horizon=horizon))
    assert ends_of(served) == ends_of(simulate(ONE, asked))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_steps_of_an_instance_follow_one_another_and_stay_in_their_budget(cluster):
    served = simulate(CLUSTERS[cluster], requests(30, every_us=100), kv_blocks=30)
    for name in CLUSTERS[cluster]:
        reports = [report for report in steps_of(served) if report.instance == name]
        for before, after in itertools.pairwise(reports):
            assert before.end_us <= after.begin_us
        assert all(report.begin_us < report.end_us for report in reports)
        assert all(report.kv_blocks_used <= 30 for report in reports)
        tokens = [sum(e - b for _, b, e in r.chunks) + len(r.decodes) for r in reports]
        assert max(tokens) <= 64


def test_a_hand_over_takes_the_links_latency_and_its_bytes():
    asked = [Request(id="a", prompt=range(32), max_output_tokens=5)]
    served = simulate(SPLIT, asked, link_bytes_per_s="1e9", link_latency_us="7")
    moved = next(event for event in served.events if isinstance(event, KVImported))
    assert moved.num_bytes == 32 * COST.kv_bytes_per_token
    assert moved.end_us - moved.begin_us == 7 + moved.num_bytes * 1e6 / 1e9


def test_kv_that_finds_no_room_waits_until_another_request_has_left():
    clock = VirtualClock()
    engine = SimEngine(sim_spec("x0", kv_blocks=10), clock)
    here, coming = (Request(id=name, prompt=range(100), max_output_tokens=20) for name in "ab")
    plan = ExecutionPlan(
        plan_id="p",
        round=0,
        target_instance_id="x0",
        mode="hybrid",
        num_steps=60,
        max_step_tokens=128,
        peers=("p0",),
        request_ids=("a", "b"),
        rows=table(Rows, [(100, 0, 8, 0), (100, 0, 8, 0)]),
        chunks=table(Chunks, [(0, 0, 0, 100, 1)]),
        decodes=table(Decodes, [(0, 1, 119), (1, 1, 119)]),
        imports=table(Moves, [(1, 0, 100)]),
    )
    engine.submit(plan, [here])
    engine.receive(handle_of(coming, engine.capability().kv_layout))
    events = engine.poll()
    while (next_us := engine.next_us()) is not None:
        clock.advance_to(next_us)
        events += engine.poll()
    ends = {name: e.end_us for e in events if isinstance(e, StepReport) for name, _ in e.finished}
    assert [e.end_us for e in events if isinstance(e, KVImported)] == [ends["a"]]
    assert ends["b"] > ends["a"]
    assert events[-1] == PlanDone(instance="x0", plan_id="p")


def handle_of(request: Request, layout: str) -> KVHandle:
    """KV of its whole prompt, on its way to x0 with the first token."""
    return KVHandle(
        request=request,
        source="p0",
        target="x0",
        output=(0,),
        computed_tokens=len(request.prompt),
        layout=layout,
        place="",
        num_bytes=0,
        begin_us=0,
    )


def test_many_like_steps_are_one_report():
    served = simulate(
        ONE, [Request(id="a", prompt=range(8), max_output_tokens=100)], DirectPlanner(horizon=64)
    )
    reports = steps_of(served)
    assert sum(report.steps for report in reports) == 100
    assert len(reports) < 10


@settings(max_examples=60, deadline=None)
@given(
    cluster=st.sampled_from(sorted(CLUSTERS)),
    kv_blocks=st.integers(14, 60),
    gaps=st.lists(st.integers(0, 3000), min_size=1, max_size=25),
    cancelled=st.sets(st.integers(0, 24), max_size=4),
    cache=st.sampled_from(["on", "off"]),
)
def test_whatever_comes_when_nothing_is_lost_and_all_is_the_same_again(
    cluster, kv_blocks, gaps, cancelled, cache
):
    asked = []
    for i, gap in enumerate(gaps):
        at = gap + (asked[-1].arrival_us if asked else 0)
        prompt = range(1 + 37 * i % 150)
        asked.append(
            Request(id=f"r{i}", prompt=prompt, max_output_tokens=1 + i * 7 % 40, arrival_us=at)
        )

    def run() -> Served:
        served = Served()
        executor = sim_executor(CLUSTERS[cluster], served, kv_blocks, prefix_cache=cache)
        for output in executor.serve(asked, strategy("fifo"), DirectPlanner()):
            served.take([output])
            if isinstance(output, Finished) and len(served.ends) in cancelled:
                executor.cancel(f"r{len(gaps) - 1}")
        for engine in executor.engines.values():
            engine.check_integrity()
            assert engine.kv_blocks_used() == 0
        return served

    first, second = run(), run()
    assert not first.failures
    assert ends_of(first) == ends_of(second)
    assert set(first.ends) == {request.id for request in asked}
    for request in asked:
        reason, tokens, _ = ends_of(first)[request.id]
        assert tokens == request.max_output_tokens or reason is FinishReason.CANCELLED


@pytest.mark.parametrize("eviction", policies.known())
def test_what_is_cached_is_not_computed_again(eviction):
    asked = [
        Request(id=f"r{i}", prompt=range(64 + i), max_output_tokens=3, arrival_us=i * 10**6)
        for i in range(5)
    ]
    served = simulate(ONE, asked, prefix_cache="on", eviction=eviction)
    computed = sum(end - begin for report in steps_of(served) for _, begin, end in report.chunks)
    assert computed == 64 + 1 + 2 + 3 + 4
    assert [reused for report in steps_of(served) for reused in report.reused] == [
        ("r1", 64),
        ("r2", 64),
        ("r3", 64),
        ("r4", 64),
    ]
    cached = set()
    for event in served.events:
        if isinstance(event, KVCached):
            assert cached.isdisjoint(event.stored)
            assert cached.issuperset(event.evicted)
            cached = (cached | set(event.stored)) - set(event.evicted)
    assert cached == set(block_hashes(range(64), 16))


def test_a_small_cache_gives_way_to_requests():
    asked = [
        Request(id=f"r{i}", prompt=range(i, i + 300), max_output_tokens=9, arrival_us=i * 10**6)
        for i in range(5)
    ]
    served = simulate(ONE, asked, kv_blocks=22, prefix_cache="on")
    assert any(isinstance(event, KVCached) and event.evicted for event in served.events)
    assert {reason for reason, _, _ in ends_of(served).values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"speed": "2"}, "sim has no option 'speed'"),
        ({"overhead_us": "soon"}, "overhead_us='soon': a number, 0 or more"),
        ({"flops_per_s": "0"}, "flops_per_s='0': more than 0"),
        ({"link_bytes_per_s": "0"}, "link_bytes_per_s='0': more than 0"),
        ({"prefix_cache": "maybe"}, "prefix_cache='maybe': on or off"),
        ({"prefix_cache": "on", "eviction": "lry"}, "no eviction policy 'lry'; did you mean 'lru'"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(EngineError, match=said.replace("(", r"\(")):
        create(sim_spec("x0", **options))
