"""The mode follows the load, but never to and fro; and it serves as well as the best fixed mode."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.request import Request
from sagec.runtime.state import ANY, Instances, Running, State, Waiting, check
from sagec.runtime.strategies import create
from sagec.runtime.strategies.adaptive import MODES, TILE_TOKENS, Adaptive
from tests.echo_cluster import Served, spec

DWELL_S = Adaptive().dwell_ms / 1e3
ROUND_US = 100_000
PREFILL_NS = 100_000

CALM = 500, 2
"""Prompt tokens a second and decodes: a prefill load of 0.05 of an instance, hardly contended."""

BUSY = 4000, 10
FLOODED = 8000, 10
"""Prompts take 0.4 of the time of two instances, and so most of the time of one."""

DROWNED = 17_000, 10
"""More prompts than one instance can compute."""


def pair(**columns) -> Instances:
    """Two instances that do both."""
    said = {"role": "both", "kv_blocks": 9999, "block_tokens": 16} | columns
    said = {"prefill_ns_per_token": PREFILL_NS, "decode_step_us": 5000} | said
    return Instances.of(["i0", "i1"], **said)


def round_of(now_us: int, load: tuple[int, int], instances: Instances, memory) -> State:
    """A round in which the prompts of the time since the last one came."""
    tokens_per_s, decodes = load
    number = now_us // ROUND_US
    return State(
        now_us=now_us,
        round=number,
        waiting=Waiting.of(
            [f"w{number}"],
            sequence=number,
            arrival_us=now_us,
            prompt_tokens=tokens_per_s * ROUND_US // 1_000_000,
            generate_tokens=8,
        ),
        running=decoding(decodes),
        instances=instances,
        memory=memory,
    )


@functools.cache
def decoding(count: int) -> Running:
    ids = [f"r{i}" for i in range(count)]
    return Running.of(ids, prompt_tokens=16, computed_tokens=20, remaining_tokens=99)


def modes_over(phases, rules: Adaptive, instances: Instances | None = None) -> list[str]:
    """The modes of all rounds; phases: seconds, and the load in that time."""
    instances = instances if instances is not None else pair()
    memory, modes, now_us = {}, [], 0
    for seconds, load in phases:
        for _ in range(round(seconds * 1e6 / ROUND_US)):
            state = round_of(now_us, load, instances, memory)
            decision = rules.decide(state)
            check(decision, state)
            memory = decision.memory
            modes.append(MODES[memory["adaptive"]["mode"]])
            now_us += ROUND_US
    return modes


def changes(modes: list[str]) -> list[tuple[str, str]]:
    return [(old, new) for old, new in itertools.pairwise(modes) if old != new]


@pytest.mark.parametrize("half_s", [6, 10])
def test_each_edge_of_a_slow_square_wave_changes_the_mode_once(half_s):
    wave = [(half_s, CALM), (half_s, BUSY)] * 3
    found = changes(modes_over(wave, Adaptive()))
    there_and_back = [("hybrid", "time-share"), ("time-share", "hybrid")]
    assert found == there_and_back * 3


def test_one_edge_leads_over_two_thresholds_in_one_change():
    modes = modes_over([(5, CALM), (8, FLOODED), (8, CALM)], Adaptive(dedicate=True))
    assert changes(modes) == [
        ("hybrid", "time-share"),
        ("time-share", "strict"),
        ("strict", "time-share"),
    ]


@settings(max_examples=20, deadline=None)
@given(
    # At the first edge, what is smoothed adds its lag to the time that a load lasts.
    half_s=st.floats(ROUND_US / 1e6, DWELL_S - Adaptive().window_ms / 2e3),
    loads=st.sampled_from([(CALM, BUSY), (CALM, FLOODED), (FLOODED, DROWNED)]),
)
def test_a_wave_faster_than_the_dwell_changes_nothing(half_s, loads):
    low, high = loads
    wave = [(half_s, low), (half_s, high)] * 3
    assert changes(modes_over(wave, Adaptive(dedicate=True))) == []


def test_no_mode_is_left_sooner_than_after_the_dwell():
    rng = np.random.default_rng(0)
    loads = [CALM, BUSY, FLOODED, DROWNED]
    wave = [(float(rng.uniform(0.2, 6)), loads[rng.integers(3)]) for _ in range(30)]
    modes = modes_over(wave, Adaptive(dedicate=True))
    lasted = [len(list(same)) for _, same in itertools.groupby(modes)]
    assert len(lasted) > 4
    assert min(lasted[:-1]) * ROUND_US >= DWELL_S * 1e6


def test_it_asks_to_be_asked_when_another_mode_has_been_better_for_long_enough():
    first = Adaptive().decide(round_of(0, CALM, pair(), {}))
    assert first.again_us == DWELL_S * 1e6
    second = Adaptive().decide(round_of(first.again_us, (0, 2), pair(), first.memory))
    assert second.mode == "time-share"
    assert second.again_us is None


def test_the_reason_says_the_mode_and_the_load():
    decision = Adaptive().decide(round_of(0, BUSY, pair(), {}))
    assert decision.reason[0].startswith("its turn, and it fits (hybrid: prefill load 0.0")


def test_the_memory_of_another_strategy_is_none_of_its_business():
    decision = Adaptive().decide(round_of(0, CALM, pair(), {"aegaeon": {"p": {"owner": "x"}}}))
    assert list(decision.memory) == ["adaptive"]


# Instances for one phase.


def flooded(instances: Instances, rules: Adaptive, **columns):
    """The decision of a round after a long flood."""
    memory = {}
    for number in range(round(2 * DWELL_S * 1e6 / ROUND_US)):
        decision = rules.decide(round_of(number * ROUND_US, FLOODED, instances, memory))
        memory = decision.memory
    return decision


def test_a_flood_of_prompts_gets_instances_of_its_own_where_these_hand_over():
    dedicated = flooded(pair(), Adaptive(dedicate=True))
    assert (dedicated.prefill_on[0], dedicated.decode_on[0]) == (0, 1)
    # A graph is strict only where no instance has role both.
    assert dedicated.mode == "hybrid"
    assert dedicated.memory["adaptive"]["mode"] == MODES.index("strict")


def test_what_one_instance_cannot_compute_is_not_left_to_it():
    modes = modes_over([(6, FLOODED), (6, DROWNED)], Adaptive(dedicate=True))
    assert changes(modes) == [("hybrid", "strict"), ("strict", "hybrid")]


@pytest.mark.parametrize(
    "instances",
    [pair(alive=[True, False]), pair(kv_blocks=[9999, 999]), pair(model=["m", "n"])],
    ids=["one lives", "unlike", "of two models"],
)
def test_what_cannot_be_dedicated_is_not(instances):
    waits = flooded(instances, Adaptive(dedicate=True))
    assert waits.memory["adaptive"]["mode"] == MODES.index("hybrid")
    assert (waits.prefill_on == ANY).all()


def test_by_default_nothing_is_dedicated_for_instances_may_have_no_links():
    assert (flooded(pair(), Adaptive()).prefill_on == ANY).all()


def test_a_dedicated_instance_that_dies_gives_the_other_both_phases_again():
    rules = Adaptive(dedicate=True)
    memory = flooded(pair(), rules).memory
    then = rules.decide(round_of(10**8, FLOODED, pair(alive=[False, True]), memory))
    assert then.memory["adaptive"]["mode"] == MODES.index("hybrid")
    assert (then.prefill_on == ANY).all()


def test_instances_of_one_role_each_are_strict_whatever_the_load():
    instances = pair(role=["prefill", "decode"])
    modes = modes_over([(4, CALM), (4, FLOODED)], Adaptive(), instances)
    assert set(modes) == {"strict"}
    assert Adaptive().decide(round_of(0, CALM, instances, {})).mode == "strict"


# Chunk and horizon.


def beside_decodes(tpot_us: int, kv_blocks_used: int = 0, **waiting):
    """The decision where a prompt comes to one instance, on which a request decodes."""
    said = {"prompt_tokens": 400, "generate_tokens": 8} | waiting
    state = State(
        now_us=1_000_000,
        round=0,
        waiting=Waiting.of(["w"], sequence=1, arrival_us=1_000_000, **said),
        running=Running.of(
            ["r"],
            arrival_us=0,
            first_token_us=1_000_000 - 10 * tpot_us,
            output_tokens=11,
            tpot_us=tpot_us,
            prompt_tokens=16,
            computed_tokens=26,
            remaining_tokens=99,
        ),
        instances=pair(alive=[True, False], kv_blocks_used=kv_blocks_used),
    )
    return Adaptive().decide(state)


@given(tpot_us=st.integers(9_000, 60_000))
def test_a_step_of_the_chunk_takes_no_longer_than_a_token_was_promised(tpot_us):
    chunk = beside_decodes(tpot_us).step_prompt_tokens
    assert chunk % TILE_TOKENS == 0
    assert 5000 + chunk * PREFILL_NS / 1000 <= tpot_us
    assert 5000 + (chunk + TILE_TOKENS) * PREFILL_NS / 1000 > tpot_us


def test_nobody_who_was_promised_nothing_bounds_the_chunk():
    assert beside_decodes(0).step_prompt_tokens == 0


def test_a_first_token_that_is_due_soon_gets_larger_chunks():
    unhurried = beside_decodes(9_000, ttft_us=10_000_000).step_prompt_tokens
    hurried = beside_decodes(9_000, ttft_us=200_000).step_prompt_tokens
    assert unhurried < hurried
    # 400 tokens in half of 200 ms, a chunk of which takes 5 ms and 0.1 ms a token.
    steps = np.ceil(400 / hurried)
    assert steps * (5000 + hurried * PREFILL_NS / 1000) <= 100_000
    assert beside_decodes(9_000, ttft_us=30_000).step_prompt_tokens == 0


def test_the_horizon_is_short_while_somebody_waits_for_room():
    assert beside_decodes(0).horizon_steps == Adaptive().long_steps
    assert beside_decodes(0, kv_blocks_used=9990).horizon_steps == Adaptive().short_steps


# Runs.

SHAPE = "layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128, vocab = 256"
TPOT_US, TTFT_US = 8_000, 1_000_000


def cluster(count: int) -> str:
    lines = [f"cluster.model @m {{{SHAPE}}}"]
    for i in range(count):
        lines += [
            f"cluster.device @g{i}",
            f'cluster.instance @i{i} on [@g{i}] engine "echo" role both model @m '
            "{kv_blocks = 2000, max_step_tokens = 512}",
        ]
    return "\n".join([*lines, *(f"cluster.link @g0 to @g{i}" for i in range(1, count))])


def serve(asked, strategy: str, mode: str = "hybrid", count: int = 1, **options) -> Served:
    served = Served()
    engines = {
        f"i{i}": Echo(spec(f"i{i}", 2000, step_us="4000", token_us="40"), served.clock)
        for i in range(count)
    }
    instances = [
        Instance(id=name, role="both", engine="echo", capability=engine.capability(), model="m")
        for name, engine in engines.items()
    ]
    executor = ExecutorAPI(engines, instances, served.clock, watch=[served.hear])
    planner = CompilingPlanner(Compiler().parse(cluster(count), "c.mlir").module, mode=mode)
    return served.take(executor.serve(asked, create(strategy, options), planner))


def arrivals(*phases: tuple[float, float, int, int]) -> list[Request]:
    """Requests at random: seconds, requests a second, mean prompt, output."""
    rng, asked, now_s, end_s = np.random.default_rng(0), [], 0.0, 0.0
    for seconds, per_s, prompt, generate in phases:
        now_s, end_s = end_s, end_s + seconds
        while (now_s := now_s + rng.exponential(1 / per_s)) < end_s:
            asked.append(
                Request(
                    id=f"r{len(asked)}",
                    prompt=tuple(range(int(rng.integers(prompt // 2, prompt * 3 // 2)))),
                    max_output_tokens=generate,
                    arrival_us=int(now_s * 1e6),
                    tpot_us=TPOT_US,
                    ttft_us=TTFT_US,
                )
            )
    return asked


def goodput(served: Served) -> float:
    """The share of requests that got what they were promised."""
    kept = 0
    for report in (end.report for end in served.ends.values()):
        tpot_us = (report.last_token_us - report.first_token_us) / (report.output_tokens - 1)
        kept += report.first_token_us - report.arrival_us <= TTFT_US and tpot_us <= TPOT_US
    return kept / len(served.ends)


def test_it_serves_a_load_that_changes_as_well_as_the_best_fixed_mode():
    asked = arrivals((6, 2, 60, 20), (14, 12, 700, 60))
    fixed = [goodput(serve(asked, "fifo", mode)) for mode in ("time-share", "hybrid")]
    adaptive = serve(asked, "adaptive")
    assert not adaptive.failures
    assert [len(tokens) for tokens in adaptive.tokens.values()] == [
        request.max_output_tokens for request in asked
    ]
    modes = [planned.decision.mode for planned in adaptive.rounds]
    assert changes(modes) == [("hybrid", "time-share"), ("time-share", "hybrid")]
    assert goodput(adaptive) > min(fixed)
    assert goodput(adaptive) >= max(fixed) - 0.03


def test_under_a_flood_prompts_and_decodes_part_and_everybody_is_served():
    asked = arrivals((8, 25, 700, 30))
    served = serve(asked, "adaptive", count=2, dedicate=True)
    assert not served.failures
    assert len(served.ends) == len(asked)
    last = served.rounds[-1].decision.memory["adaptive"]
    assert MODES[last["mode"]] == "strict"
    parted = [planned for planned in served.rounds if (planned.decision.prefill_on != ANY).any()]
    placed = {
        request_id
        for planned in parted
        for request_id in planned.state.waiting.ids[planned.decision.admitted].tolist()
    }
    computed: dict[str, set[str]] = {"i0": set(), "i1": set()}
    for plan in (plan for planned in served.rounds for plan in planned.plans):
        rows = plan.chunks.row.tolist()
        computed[plan.target_instance_id].update(plan.request_ids[row] for row in rows)
    assert len(placed) > 5
    assert placed <= computed["i0"]
    assert placed.isdisjoint(computed["i1"])
