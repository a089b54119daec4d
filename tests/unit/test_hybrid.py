"""Critical and batch requests on the same instances, and tenants that take turns."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime import strategies
from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import DEFER, Decision, Instances, Running, State, Waiting
from sagec.runtime.strategies._turns import Turns
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, Served, echo_executor


def state(waiting: Waiting, running: Running | None = None, **given) -> State:
    """Of one instance of 20 blocks of 16 tokens, or of several."""
    rest = {key: given.pop(key) for key in ("now_us", "memory") if key in given}
    columns = {"ids": ["x0"], "role": "both", "kv_blocks": 20, "block_tokens": 16, **given}
    return State(
        **{"now_us": 0, "round": 0, **rest},
        waiting=waiting,
        running=running or Running.of([]),
        instances=Instances.of(columns.pop("ids"), **columns),
    )


def asked(ids: str, **columns) -> Waiting:
    names = ids.split()
    defaults = {"prompt_tokens": 15, "generate_tokens": 8, "sequence": range(len(names))}
    return Waiting.of(names, **{**defaults, **columns})


def decide(seen: State, **options) -> Decision:
    return strategies.create("hybrid", options).decide(seen)


def order(seen: State, **options) -> list[str]:
    return seen.waiting.ids[decide(seen, **options).admitted].tolist()


def served_by(strategy: strategies.Strategy, asked: list[Request], kv_blocks: int) -> Served:
    served = Served()
    executor = echo_executor(ONE, served, kv_blocks)
    return served.take(executor.serve(asked, strategy, DirectPlanner()))


# Classes


def test_critical_requests_go_first_by_deadline_and_batch_follows() -> None:
    waiting = asked("b late soon pace", ttft_us=[0, 900, 100, 0], tpot_us=[0, 0, 0, 5])
    seen = state(waiting)
    assert order(seen) == ["soon", "late", "pace", "b"]
    assert decide(seen).reason[[0, 1]].tolist() == ["batch: it fits", "latency-critical: it fits"]


def test_batch_fills_only_the_room_that_critical_requests_leave() -> None:
    waiting = asked("b1 b2 c", prompt_tokens=[100, 100, 100], ttft_us=[0, 0, 9])
    decision = decide(state(waiting))
    assert waiting.ids[decision.admitted].tolist() == ["c", "b1"]
    assert decision.reason[1] == "batch: waits for KV of 101 tokens, which those before it take"


def test_batch_that_waits_for_too_long_goes_first_in_its_turn() -> None:
    waiting = asked("b c", ttft_us=[0, 9])
    assert order(state(waiting, now_us=40), patience_us=50) == ["c", "b"]
    assert order(state(waiting, now_us=60), patience_us=50) == ["b", "c"]


# Tenants


def test_tenants_take_turns_within_a_class() -> None:
    waiting = asked("a1 a2 a3 b1 b2 c1", tenant=list("aaabbc"), prompt_tokens=10)
    assert order(state(waiting), quantum_tokens=10) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert order(state(waiting), quantum_tokens=20) == ["a1", "a2", "b1", "b2", "c1", "a3"]
    assert decide(state(waiting)).reason[3] == "batch of 'b': it fits"


def test_a_tenant_with_long_prompts_gets_as_many_tokens_not_requests() -> None:
    waiting = asked(
        "a1 a2 b1 b2 b3 b4 b5", tenant=list("aabbbbb"), prompt_tokens=[40, 40, *[10] * 5]
    )
    assert order(state(waiting), quantum_tokens=20) == [
        "b1", "b2", "a1", "b3", "b4", "b5", "a2",
    ]  # fmt: skip


def reference(queues: dict[str, list[int]], quantum: int) -> list[str]:
    """Deficit round robin as its paper tells it, packet by packet."""
    active = collections.deque(queues)
    deficit = dict.fromkeys(queues, 0)
    left = {name: list(sizes) for name, sizes in queues.items()}
    served = []
    while active:
        name = active.popleft()
        deficit[name] += quantum
        while left[name] and left[name][0] <= deficit[name]:
            deficit[name] -= left[name].pop(0)
            served.append(name)
        if left[name]:
            active.append(name)
    return served


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(
    st.dictionaries(st.sampled_from("abcd"), sizes, min_size=1),
    st.integers(1, 50),
    st.lists(st.integers(0, 7), max_size=12),
)
def test_turns_are_those_of_deficit_round_robin_wherever_rounds_end(queues, quantum, rounds):
    """What is served in rounds, with a memory between them, is what is served in one go."""
    left = [(name, size) for name, each in queues.items() for size in each]
    served, memory = [], {}
    for count in [*rounds, len(left)]:
        if not left:
            break
        tenants = np.array([name for name, _ in left], object)
        tokens = np.array([size for _, size in left], np.int64)
        turns = Turns.over(tenants, tokens, memory, quantum)
        now = turns.order[:count].tolist()
        served += [left[row][0] for row in now]
        memory = json.loads(json.dumps(turns.remembered(len(now))))
        left = [row for at, row in enumerate(left) if at not in now]
    assert served == reference(queues, quantum)


def test_an_idle_tenant_loses_its_deficit_and_comes_back_last() -> None:
    memory = {"turns": [["a", 30], ["b", 5]], "amid": False}
    tenants = np.array(["b", "c"], object)
    turns = Turns.over(tenants, np.array([50, 50]), memory, 20)
    after = turns.remembered(0)
    assert after == {"turns": [["b", 5], ["c", 0]], "amid": False}
    back = Turns.over(np.array(["a", "b", "c"], object), np.array([50, 50, 50]), after, 20)
    assert back.names == ["b", "c", "a"]
    assert back.deficits.tolist() == [5, 0, 0]


def test_deficits_are_kept_in_the_memory_of_those_that_wait_only() -> None:
    waiting = asked("a1 a2 b1", tenant=list("aab"), prompt_tokens=[150, 150, 10])
    decision = decide(state(waiting), quantum_tokens=200)
    assert waiting.ids[decision.admitted].tolist() == ["a1", "b1"]
    assert decision.memory == {"queues": {"batch ": {"turns": [["a", 50]], "amid": False}}}
    assert decide(state(asked("a1", tenant="a"))).memory == {}


def test_one_that_lost_its_place_has_paid_for_it() -> None:
    waiting = asked("a1 b1", tenant=list("ab"), prompt_tokens=[30, 30], preemptions=[0, 1])
    assert order(state(waiting), quantum_tokens=10) == ["b1", "a1"]


def test_a_tenant_with_many_requests_does_not_hold_up_one_with_few() -> None:
    def done_us(strategy: str) -> int:
        asked = [
            Request(id=f"{tenant}{i}", prompt=tuple(range(60)), max_output_tokens=20, tenant=tenant)
            for tenant, count in (("many", 40), ("few", 4))
            for i in range(count)
        ]
        options = {"quantum_tokens": 120} if strategy == "hybrid" else {}
        served = served_by(strategies.create(strategy, options), asked, kv_blocks=20)
        assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
        return max(served.ends[f"few{i}"].report.end_us for i in range(4))

    assert done_us("hybrid") < done_us("fifo") / 3


# Giving way


def batch_running(count: int, tokens: int, **columns) -> Running:
    names = [f"b{i}" for i in range(count)]
    defaults = {"admitted_us": range(count), "sequence": range(count), "decode_on": 0}
    return Running.of(
        names,
        **{**defaults, "prompt_tokens": tokens, "computed_tokens": tokens, **columns},
    )


def test_the_last_batch_requests_give_way_to_a_critical_one_without_room() -> None:
    running = batch_running(4, 60, admitted_us=[3, 9, 1, 2])  # 4 blocks each, and one to grow
    waiting = asked("c b", prompt_tokens=90, ttft_us=[9, 0])
    decision = decide(state(waiting, running, kv_blocks_used=16))
    assert running.ids[decision.preempt_rows].tolist() == ["b1", "b0"]
    assert decision.preempt_how.tolist() == [RECOMPUTE] * 2
    assert decision.preempt_reason[0] == "batch gives way to a latency-critical request"
    assert decision.verdict.tolist() == [DEFER, DEFER]
    assert decide(state(waiting, running, kv_blocks_used=16), swap=True).preempt_how[0] == SWAP
    kept = decide(state(waiting, running, kv_blocks_used=16), give_way=False)
    assert kept.preempt_rows.tolist() == []


@pytest.mark.parametrize(
    "columns",
    [{"ttft_us": 5}, {"preemptions": 2}, {"arriving": True}, {"tpot_us": 5}],
    ids=["promised", "left twice", "on its way", "paced"],
)
def test_nobody_gives_way_who_must_not(columns) -> None:
    running = batch_running(4, 60, **columns)
    waiting = asked("c", prompt_tokens=90, ttft_us=9)
    assert decide(state(waiting, running, kv_blocks_used=16)).preempt_rows.tolist() == []


def test_nobody_gives_way_where_that_would_not_be_enough_or_to_batch() -> None:
    running = batch_running(2, 60, ttft_us=[0, 9])
    for waiting in (
        asked("c", prompt_tokens=260, ttft_us=9),
        asked("b", prompt_tokens=200),
    ):
        decision = decide(state(waiting, running, kv_blocks_used=8))
        assert decision.preempt_rows.tolist() == []
        assert decision.verdict.tolist() == [DEFER]


def test_where_phases_are_apart_room_is_made_in_both() -> None:
    """p0 is filled by a prompt under way, d0 by what decodes there."""
    running = batch_running(3, 120, instance=[0, 1, 1], decode_on=1, computed_tokens=[20, 125, 125])
    waiting = asked("c", prompt_tokens=120, ttft_us=9)
    seen = state(
        waiting, running, ids=["p0", "d0"], role=["prefill", "decode"],
        kv_blocks=[10, 30], kv_blocks_used=[8, 24],
    )  # fmt: skip
    assert decide(seen).preempt_rows.tolist() == [0]  # which frees its place on d0 too
    full = state(
        waiting, running, ids=["p0", "d0"], role=["prefill", "decode"],
        kv_blocks=[20, 30], kv_blocks_used=[8, 24],
    )  # fmt: skip
    assert decide(full).preempt_rows.tolist() == [2]


def test_on_overflow_late_batch_leaves_before_critical_requests() -> None:
    running = batch_running(
        3, 60, ttft_us=[9, 0, 0], arrival_us=[9, 1, 2], computed_tokens=[110] * 3
    )
    decision = decide(state(asked("w"), running, kv_blocks=14, kv_blocks_used=21))
    assert running.ids[decision.preempt_rows].tolist() == ["b2"]
    assert decision.verdict.tolist() == [DEFER]


def test_a_critical_request_does_not_wait_for_batch_to_end() -> None:
    batch = [Request(id=f"b{i}", prompt=tuple(range(60)), max_output_tokens=35) for i in range(4)]
    urgent = Request(
        id="c", prompt=tuple(range(90)), max_output_tokens=4, ttft_us=50_000, arrival_us=15_000
    )
    waited = {}
    for strategy in ("fifo", "hybrid"):
        served = served_by(strategies.create(strategy), [*batch, urgent], kv_blocks=26)
        assert all(end.reason == FinishReason.LENGTH for end in served.ends.values())
        waited[strategy] = served.ends["c"].report.first_token_us
    assert waited["hybrid"] < waited["fifo"] / 2


# Steps


def test_batch_does_not_give_way_to_one_that_only_waits_its_turn() -> None:
    running = Running.of(["r", "b"], prompt_tokens=[400, 9], computed_tokens=[100, 9])
    waiting = asked("c", ttft_us=900_000, prompt_tokens=100)
    speeds = {"prefill_ns_per_token": 1_000_000, "decode_step_us": 2_000, "kv_blocks": 99}
    decision = decide(state(waiting, running, **speeds), backlog_us=200_000)
    assert not len(decision.admitted)
    assert not len(decision.preempt_rows)


def test_prompts_take_no_more_of_a_step_than_critical_tokens_leave_time_for() -> None:
    running = Running.of(
        ["r"], tpot_us=20_000, ttft_us=100_000, output_tokens=1, prompt_tokens=5, computed_tokens=5
    )
    waiting = asked("b", prompt_tokens=200)
    speeds = {"prefill_ns_per_token": 1_000_000, "decode_step_us": 2_000, "kv_blocks": 99}
    assert decide(state(waiting, running, **speeds)).step_prompt_tokens == 18
    assert decide(state(waiting, **speeds)).step_prompt_tokens == 0
    late = state(waiting, running, now_us=900_000, **speeds)
    assert decide(late, least_chunk_tokens=5).step_prompt_tokens == 16
    assert decide(late, least_chunk_tokens=19).step_prompt_tokens == 19


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("patience-share", 0.0, "more than 0 and less than 1"),
        ("most-preemptions", -1, "0 or more"),
        ("quantum-tokens", 0, "1 or more"),
    ],
)
def test_an_option_that_makes_no_sense_is_named_with_what_would(option, value, right) -> None:
    with pytest.raises(strategies.StrategyError) as caught:
        strategies.create("hybrid", {option: value})
    assert str(caught.value) == f"strategy hybrid: option {option}: {value}; {right}"
