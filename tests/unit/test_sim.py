"""The simulated engine: its times are the cost model's, whoever asks and how often."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.passes.topology import topology_of
from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import (
    EngineError,
    Event,
    KVCached,
    KVHandle,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.engines.sim import SimEngine, create
from sagec.runtime.engines.sim.cluster import SimCluster
from sagec.runtime.engines.sim.network import Key, Network, NetworkError, Route
from sagec.runtime.engines.sim.outages import Outage, OutageError
from sagec.runtime.kv import block_hashes, policies
from sagec.runtime.loop import Finished
from sagec.runtime.plan import (
    SWAP,
    Chunks,
    Decodes,
    ExecutionPlan,
    Moves,
    Preemptions,
    Rows,
)
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create as strategy
from tests.direct_planner import DirectPlanner, table
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, requests
from tests.sim_cluster import COST, cluster_run, sim_executor, sim_spec, simulate

ROOT = Path(__file__).parent.parent.parent

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
        tokens = [sum(e - b for _, b, e in r.chunks) / r.steps + len(r.decodes) for r in reports]
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
    events = run_out(engine, clock)
    ends = {name: e.end_us for e in events if isinstance(e, StepReport) for name, _ in e.finished}
    assert [e.end_us for e in events if isinstance(e, KVImported)] == [ends["a"]]
    assert ends["b"] > ends["a"]
    assert events[-1] == PlanDone(instance="x0", plan_id="p")


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_what_a_plan_computes_begins_later_by_what_planning_takes(cluster):
    served = simulate(CLUSTERS[cluster], requests(20), round_us="700")
    assert {reason for reason, _, _ in ends_of(served).values()} == {FinishReason.LENGTH}
    begun = {(r.instance, r.plan_id) for r in steps_of(served)}
    assert len(begun) > 3
    for name in CLUSTERS[cluster]:
        plan_id, free_us = "", 0
        for step in (step for step in steps_of(served) if step.instance == name):
            planned_us = 0 if step.plan_id == plan_id else 700
            assert step.begin_us - free_us >= planned_us
            plan_id, free_us = step.plan_id, step.end_us
    alone = [Request(id="a", prompt=range(32), max_output_tokens=5)]
    assert simulate(ONE, alone, round_us="700").ends["a"].report.ttft_us == 700 + round(
        COST.one_step_us(32, 32 * 33 / 2, 0)
    )


def test_kv_that_comes_while_a_plan_is_made_joins_at_its_second_step():
    clock = VirtualClock()
    engine = SimEngine(sim_spec("x0", round_us="500", link_latency_us="200"), clock)
    here, coming = (Request(id=name, prompt=range(20), max_output_tokens=9) for name in "ab")
    plan = ExecutionPlan(
        plan_id="p",
        round=0,
        target_instance_id="x0",
        mode="hybrid",
        num_steps=20,
        max_step_tokens=64,
        peers=("p0",),
        request_ids=("a", "b"),
        rows=table(Rows, [(20, 0, 2, 0), (20, 0, 2, 0)]),
        chunks=table(Chunks, [(0, 0, 0, 20, 1)]),
        decodes=table(Decodes, [(0, 1, 28), (1, 0, 28)]),
        imports=table(Moves, [(1, 0, 20)]),
    )
    engine.submit(plan, [here])
    engine.receive(handle_of(coming, engine.capability().kv_layout))
    steps = [e for e in run_out(engine, clock) if isinstance(e, StepReport)]
    assert steps[0].begin_us == 500
    assert [step.decodes for step in steps[:2]] == [(), ("a", "b")]


def test_kv_that_goes_to_host_memory_and_comes_back_takes_the_links_time_before_the_next_step():
    clock = VirtualClock()
    engine = SimEngine(sim_spec("x0", link_bytes_per_s="1e9", link_latency_us="40"), clock)
    asked = [Request(id=name, prompt=range(20), max_output_tokens=9) for name in "ab"]
    alone = {
        "round": 0,
        "target_instance_id": "x0",
        "mode": "hybrid",
        "max_step_tokens": 64,
        "request_ids": ("a", "b"),
        "rows": table(Rows, [(20, 0, 2, 0), (20, 0, 2, 0)]),
    }
    prompts = table(Chunks, [(0, 0, 0, 20, 1), (0, 1, 0, 20, 1)])
    engine.submit(ExecutionPlan(plan_id="1", num_steps=1, chunks=prompts, **alone), asked)
    run_out(engine, clock)
    out_us = clock.now_us()
    without_b = {"decodes": table(Decodes, [(0, 0, 22)])}
    swapped = table(Preemptions, [(1, SWAP)])
    engine.submit(
        ExecutionPlan(plan_id="2", num_steps=2, preemptions=swapped, **without_b, **alone)
    )
    events = run_out(engine, clock)
    assert [e.kept_tokens for e in events if isinstance(e, Preempted)] == [20]
    copy_us = 40 + round(20 * COST.kv_bytes_per_token / 1e3)
    assert next(e for e in events if isinstance(e, StepReport)).begin_us == out_us + copy_us
    back_us = clock.now_us()
    again = {"decodes": table(Decodes, [(1, 0, 28)])}
    engine.submit(ExecutionPlan(plan_id="3", num_steps=8, **again, **alone))
    steps = [e for e in run_out(engine, clock) if isinstance(e, StepReport)]
    assert (steps[0].begin_us, steps[0].decodes) == (back_us + copy_us, ("b",))
    assert sum(step.end_us - step.begin_us for step in steps) == clock.now_us() - back_us - copy_us


def run_out(engine: SimEngine, clock: VirtualClock) -> list[Event]:
    """All that an engine says until it has nothing more to do."""
    events = engine.poll()
    while (next_us := engine.next_us()) is not None:
        clock.advance_to(next_us)
        events += engine.poll()
    return events


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
    round_us=st.sampled_from(["0", "900"]),
)
def test_whatever_comes_when_nothing_is_lost_and_all_is_the_same_again(
    cluster, kv_blocks, gaps, cancelled, cache, round_us
):
    asked = []
    for i, gap in enumerate(gaps):
        at = gap + (asked[-1].arrival_us if asked else 0)
        prompt = range(1 + 37 * i % 150)
        asked.append(
            Request(id=f"r{i}", prompt=prompt, max_output_tokens=1 + i * 7 % 40, arrival_us=at)
        )

    options = {"prefix_cache": cache, "round_us": round_us}

    def run() -> Served:
        served = Served()
        executor = sim_executor(CLUSTERS[cluster], served, kv_blocks, **options)
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
        ({"round_us": "-1"}, "round_us='-1': a number, 0 or more"),
        ({"prefix_cache": "maybe"}, "prefix_cache='maybe': on or off"),
        ({"prefix_cache": "on", "eviction": "lry"}, "no eviction policy 'lry'; did you mean 'lru'"),
    ],
)
def test_a_wrong_option_is_named(options, said):
    with pytest.raises(EngineError, match=said.replace("(", r"\(")):
        create(sim_spec("x0", **options))


def test_the_chunks_of_a_lone_prompt_are_one_report_and_end_when_they_would_alone():
    asked = [Request(id="a", prompt=range(500), max_output_tokens=3)]
    served = simulate(SPLIT, asked, DirectPlanner(chunk_tokens=50))
    prompts = [report for report in steps_of(served) if report.chunks]
    assert [report.steps for report in prompts] == [9, 1]
    assert [report.chunks for report in prompts] == [(("a", 0, 450),), (("a", 450, 500),)]
    chunks = [(begin, begin + 50) for begin in range(0, 500, 50)]
    pairs = [(e * (e + 1) - b * (b + 1)) / 2 for b, e in chunks]
    assert prompts[1].end_us == sum(round(COST.one_step_us(50, p, 0, 0)) for p in pairs)


def test_a_prompt_that_is_cancelled_amid_its_chunks_is_computed_to_the_end_of_the_step_at_work():
    clock = VirtualClock()
    engine = SimEngine(sim_spec("x0"), clock)
    request = Request(id="a", prompt=range(400), max_output_tokens=2)
    chunks = [(i, 0, 50 * i, 50 * i + 50, int(i == 7)) for i in range(8)]
    plan = ExecutionPlan(
        plan_id="p",
        round=0,
        target_instance_id="x0",
        mode="hybrid",
        num_steps=8,
        max_step_tokens=64,
        request_ids=("a",),
        rows=table(Rows, [(400, 0, 26, 0)]),
        chunks=table(Chunks, chunks),
    )
    engine.submit(plan, [request])
    assert engine.poll() == []
    first_us = round(COST.one_step_us(50, 50 * 51 / 2, 0, 0))
    clock.advance_to(first_us + 1)
    engine.cancel("a")
    assert [event.chunks for event in engine.poll()] == [(("a", 0, 50),)]
    clock.advance_to(engine.next_us())
    step, gone, done = engine.poll()
    assert step.chunks == (("a", 50, 100),)
    assert (gone.request_id, done.plan_id) == ("a", "p")
    assert engine.kv_blocks_used() == 0


def test_requests_that_come_while_all_compute_are_let_in_together_when_a_step_ends():
    late = [Request(id=f"r{i}", prompt=range(9), arrival_us=10 + i) for i in range(3)]
    asked = [Request(id="a", prompt=range(60), max_output_tokens=30), *late]
    served = simulate(ONE, [msgspec.structs.replace(r, max_output_tokens=30) for r in asked])
    first_us = steps_of(served)[0].end_us
    rounds = [planned for planned in served.rounds if len(planned.state.waiting)]
    assert [planned.state.now_us for planned in rounds] == [0, first_us]
    assert rounds[1].state.waiting.ids.tolist() == ["r0", "r1", "r2"]
    begun = next(step for step in steps_of(served) if any("r0" in chunk for chunk in step.chunks))
    assert begun.begin_us == first_us


def test_a_round_sees_the_steps_that_have_ended_in_the_midst_of_a_stretch():
    asked = [
        Request(id="a", prompt=range(8), max_output_tokens=100),
        Request(id="b", prompt=range(8), max_output_tokens=2, arrival_us=50_000),
    ]
    served = simulate(ONE, asked, DirectPlanner(horizon=200))
    second = next(p.state for p in served.rounds if "b" in p.state.waiting.ids)
    told = [step for step in steps_of(served) if step.end_us <= second.now_us]
    assert told[-1].end_us == second.now_us >= 50_000
    assert second.running.output_tokens.tolist() == [sum(step.steps for step in told)]


# Links that are shared


def shared(**links: float) -> dict[tuple[str, str], Route]:
    """Routes from p0 and p1 to d0 and d1 over an own link of each source and one of each target."""
    pairs = itertools.product(("p0", "p1"), ("d0", "d1"))
    return {(p, d): Route(tuple(n for n in (p, d) if n in links), 7.0) for p, d in pairs}


def begun(network: Network, *transfers: tuple[str, str, int, float]) -> list[Key]:
    """Transfers from p to d at a time, of so many bytes."""
    keys = [(p, f"{p}-{d}-{i}", us) for i, (p, d, us, _) in enumerate(transfers)]
    for key, (_, target, _, num_bytes) in zip(keys, transfers, strict=True):
        network.begin(key, target, num_bytes, bytes_per_s=1e12, latency_us=0.0)
    return keys


def test_two_hand_overs_over_one_link_take_twice_as_long_each():
    network = Network({"d0": 1e9}, shared(d0=1e9))
    keys = begun(network, ("p0", "d0", 0, 1e6), ("p1", "d0", 0, 1e6))
    network.settle(10**6)
    assert [network.arrival_us(key) for key in keys] == [2007, 2007]
    assert network.busy_us() == {"d0": 2000.0}
    assert network.moved_bytes() == {"d0": 2e6}


def test_who_comes_later_slows_the_first_from_then_on_and_goes_alone_at_the_end():
    network = Network({"d0": 1e9}, shared(d0=1e9))
    first, second = begun(network, ("p0", "d0", 0, 1e6), ("p1", "d0", 500, 1e6))
    assert network.arrival_us(first) == 500 + 2 * 500 + 7
    assert network.next_us() == 1500
    network.settle(1500)
    assert network.arrival_us(second) == 1500 + 500 + 7
    network.settle(2000)
    assert network.next_us() is None


def test_a_hand_over_held_back_elsewhere_leaves_its_part_to_the_others():
    links = {"p0": 1e8, "p1": 1e9, "d0": 1e9}
    network = Network(links, shared(**links))
    slow, fast = begun(network, ("p0", "d0", 0, 1e6), ("p1", "d0", 0, 9e5))
    network.settle(10**6)
    assert [network.arrival_us(key) for key in (slow, fast)] == [10_007, 1007]


def test_hand_overs_over_links_apart_do_not_see_each_other():
    links = {"p0": 1e9, "p1": 1e9, "d0": 1e9, "d1": 1e9}
    network = Network(links, shared(**links))
    keys = begun(network, ("p0", "d0", 0, 1e6), ("p1", "d1", 0, 1e6))
    assert [network.arrival_us(key) for key in keys] == [1007, 1007]


def test_what_was_lost_never_arrives_and_leaves_its_part():
    network = Network({"d0": 1e9}, shared(d0=1e9))
    lost, kept = begun(network, ("p0", "d0", 0, 1e6), ("p1", "d0", 0, 1e6))
    network.lose("p0", 1000, "p0 failed")
    assert network.arrival_us(lost) is None
    assert network.why_lost(lost) == "p0 failed"
    assert network.arrival_us(kept) == 1000 + 500 + 7


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(
        st.tuples(
            st.sampled_from(["p0", "p1"]),
            st.sampled_from(["d0", "d1"]),
            st.integers(0, 2000),
            st.integers(0, 10**6),
        ),
        max_size=12,
    ),
    asked_at=st.lists(st.integers(0, 5000), max_size=8),
)
def test_no_link_carries_more_than_it_can_and_asking_changes_nothing(moves, asked_at):
    links = {"p0": 1e9, "p1": 5e8, "d0": 7e8, "d1": 1e9}
    moves = sorted(moves, key=lambda move: move[2])
    busy, quiet = Network(links, shared(**links)), Network(links, shared(**links))
    keys = begun(quiet, *moves)
    for i, move in enumerate(moves):
        for us in sorted(us for us in asked_at if (i and moves[i - 1][2]) <= us < move[2]):
            busy.settle(us)
            assert busy.next_us() is None or busy.next_us() > us
        p, d, us, num_bytes = move
        busy.begin((p, f"{p}-{d}-{i}", us), d, num_bytes, 1e12, 0.0)
    for network in (busy, quiet):
        network.settle(10**8)
        assert network.next_us() is None
    assert [busy.arrival_us(k) for k in keys] == [quiet.arrival_us(k) for k in keys]
    for name, moved in quiet.moved_bytes().items():
        assert moved <= links[name] * quiet.busy_us()[name] / 1e6 + 1e-3
    alone_us = [us + 1e6 * n / min(links[p], links[d]) for p, d, us, n in moves]
    assert all(quiet.arrival_us(k) >= us for k, us in zip(keys, alone_us, strict=True))


@pytest.mark.parametrize(
    ("links", "routes", "said"),
    [
        ({"a": 0.0}, {}, "link 'a': 0.0 bytes a second; more than 0"),
        ({"a": 1.0}, {("p", "d"): Route(("b",))}, "from 'p' to 'd': no link 'b'; there are: a"),
    ],
)
def test_a_network_that_cannot_be_is_refused(links, routes, said):
    with pytest.raises(NetworkError, match=said):
        Network(links, routes)


CONTENDED = """
model m { layers 4 hidden 256 heads 8 kv_heads 2 head_dim 32 ffn 688 vocab 1024 }
cluster c {
  devices g0..g3 kind h100
  switch s
  links g0..g3 to s bandwidth 50GB/s latency 3us
  instances p0..p1 role prefill on g0..g1 engine sim model m
  instances d0..d1 role decode on g2..g3 engine sim model m
}
serve on c mode strict { request "any" tokens 1 generate 1 }
"""


def test_a_network_is_read_off_a_cluster():
    topology = topology_of(Compiler().parse(CONTENDED, "c.sage").module)
    network = Network.of(topology)
    assert set(network.routes) == {(p, d) for p in ("p0", "p1") for d in ("d0", "d1")}
    route = network.routes["p1", "d0"]
    assert route == Route(("g1 to s, link 1", "s to g2, link 2"), 6.0)
    assert {network.links[name] for name in route.links} == {5e10}
    begun(network, ("p0", "d0", 0, 1e6), ("p1", "d0", 0, 1e6))
    network.settle(10**6)
    assert network.busy_us()["s to g2, link 2"] == 40.0


def test_two_instances_that_hand_over_at_once_slow_each_other():
    asked = [Request(id=f"r{i}", prompt=range(32), max_output_tokens=5) for i in range(2)]
    routes = shared(d0=1e9, d1=1e9)
    moved = []
    for network in (Network({"d0": 1e9, "d1": 1e9}, routes), Network()):
        served = cluster_run(WIDE, asked, network, link_bytes_per_s="1e9", link_latency_us="7")
        moves = [event for event in served.events if isinstance(event, KVImported)]
        assert len({move.begin_us for move in moves}) == 1
        moved.append([move.end_us - move.begin_us for move in moves])
    num_us = 32 * COST.kv_bytes_per_token / 1e3
    one_target = len({move.instance for move in moves}) == 1
    assert moved == [[num_us * (1 + one_target) + 7] * 2, [num_us + 7] * 2]


# Instances that fail


def test_an_instance_that_fails_and_comes_back_loses_its_kv_and_nothing_that_was_accepted():
    asked = requests(20)
    calm = cluster_run(ONE, asked)
    outage = Outage(instance="x0", fail_at_us=20_000, back_at_us=60_000)
    served = cluster_run(ONE, asked, outages=[outage])
    assert [failed.error for failed in served.failures] == [
        "it failed at 20000 us, as its schedule says"
    ]
    assert {reason for reason, _, _ in ends_of(served).values()} == {FinishReason.LENGTH}
    assert {tokens for _, tokens, _ in ends_of(served).values()} == {20}
    reports = [end.report for end in served.ends.values()]
    assert any(report.attempts == 1 for report in reports)
    away = [step for step in steps_of(served) if 20_000 < step.end_us <= 60_000]
    assert not away
    assert max(r.end_us for r in reports) > max(e.report.end_us for e in calm.ends.values())


def test_kv_on_its_way_from_an_instance_that_fails_is_lost_and_computed_again():
    asked = [Request(id="a", prompt=range(32), max_output_tokens=5)]
    options = {"link_bytes_per_s": "1e8"}
    calm = cluster_run(WIDE, asked, **options)
    move = next(event for event in calm.events if isinstance(event, KVImported))
    middle_us = (move.begin_us + move.end_us) // 2
    for name in (move.source, move.instance):
        outage = Outage(instance=name, fail_at_us=middle_us, back_at_us=None)
        served = cluster_run(WIDE, asked, outages=[outage], **options)
        report = served.ends["a"].report
        assert (report.output_tokens, report.attempts) == (5, 1)
        assert name not in report.instances[-2:]


def test_an_instance_that_never_comes_back_leaves_the_others_to_serve():
    asked = requests(20)
    outages = [Outage(instance=name, fail_at_us=9_000) for name in ("p1", "d0")]
    served = cluster_run(WIDE, asked, outages=outages)
    assert {reason for reason, _, _ in ends_of(served).values()} == {FinishReason.LENGTH}
    late = [step for step in steps_of(served) if step.begin_us >= 9_000]
    assert {step.instance for step in late} == {"p0", "d1"}


@pytest.mark.parametrize(
    ("outages", "said"),
    [
        ([Outage(instance="x9", fail_at_us=1)], "no instance 'x9' to fail; there are: x0"),
        ([Outage(instance="x0", fail_at_us=-1)], "times are 0 or more"),
        (
            [Outage(instance="x0", fail_at_us=5, back_at_us=5)],
            "fails at 5 us, until 5 us: it must be back later than it fails",
        ),
        (
            [Outage(instance="x0", fail_at_us=5), Outage(instance="x0", fail_at_us=9)],
            "fails at 9 us, for good: it is away then already",
        ),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(outages, said):
    with pytest.raises(OutageError, match=said):
        SimCluster([sim_spec("x0")], VirtualClock(), outages=outages)


# The same again


def test_a_recording_of_a_simulated_run_is_the_same_to_the_byte_in_any_process(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {RECORD}"
    files = []
    for seed in ("0", "1", "4321"):
        files.append(tmp_path / f"{seed}.rec")
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program, str(files[-1])]
        subprocess.run(command, check=True, env=environment, timeout=120)
    recordings = [file.read_bytes() for file in files]
    assert len(recordings[0]) > 10_000
    assert recordings[1:] == recordings[:1] * 2


RECORD = "from tests.sim_cluster import record; record(sys.argv[1])"
