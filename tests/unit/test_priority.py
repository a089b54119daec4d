"""vLLM's rules of priority and preemption."""

import numpy as np
import pytest

from sagec.runtime import strategies
from sagec.runtime.plan import RECOMPUTE
from sagec.runtime.request import Request
from sagec.runtime.state import DEFER, Decision, Instances, Running, State, Waiting
from tests.echo_cluster import ONE, serve

NOBODY = Running.of([])


def decide(waiting: Waiting, running: Running = NOBODY, **columns) -> Decision:
    """Of one instance of 10 blocks of 16 tokens, or of several."""
    columns = {"ids": ["x0"], "role": "both", "kv_blocks": 10, "block_tokens": 16, **columns}
    instances = Instances.of(columns.pop("ids"), **columns)
    state = State(now_us=0, round=0, waiting=waiting, running=running, instances=instances)
    return strategies.create("priority").decide(state)


def test_the_smallest_priority_value_goes_first_and_ties_go_by_arrival() -> None:
    waiting = Waiting.of(
        ["late", "urgent", "early", "last"],
        priority=[0, -1, 0, 5],
        arrival_us=[9, 8, 1, 0],
        prompt_tokens=16,
    )
    decision = decide(waiting)
    assert waiting.ids[decision.admitted].tolist() == ["urgent", "early", "late", "last"]
    assert decision.reason[1] == "priority -1: it fits"


def test_the_victim_is_the_largest_priority_value_then_the_last_to_come() -> None:
    running = Running.of(
        ["important", "old", "new"],
        priority=[0, 2, 2],
        arrival_us=[9, 1, 5],
        prompt_tokens=40,
        computed_tokens=55,
    )
    decision = decide(Waiting.of([]), running, kv_blocks_used=12)
    assert running.ids[decision.preempt_rows].tolist() == ["new"]
    assert decision.preempt_how.tolist() == [RECOMPUTE]
    assert decision.preempt_reason.tolist() == ["KV is full, and its priority 2 comes last"]
    crowded = decide(Waiting.of([]), running, kv_blocks=4, kv_blocks_used=12)
    assert set(running.ids[crowded.preempt_rows]) == {"new", "old"}


@pytest.mark.parametrize("seed", range(20))
def test_victims_leave_one_by_one_until_the_rest_fits(seed: int) -> None:
    random = np.random.default_rng(seed)
    on, blocks = random.integers(0, 2, 12), random.integers(1, 6, 12)
    priority, arrival_us = random.integers(0, 3, 12), random.permutation(12)
    running = Running.of(
        [f"r{i}" for i in range(12)], instance=on, decode_on=on, priority=priority,
        arrival_us=arrival_us, prompt_tokens=1, computed_tokens=16 * blocks - 1,
    )  # fmt: skip
    decision = decide(
        Waiting.of([]), running, ids=["x0", "x1"], kv_blocks_used=np.bincount(on, blocks, 2)
    )
    expected = set()
    for instance in (0, 1):
        there = [row for row in range(12) if on[row] == instance]
        while sum(blocks[row] for row in there) > 10:
            victim = max(there, key=lambda row: (priority[row], arrival_us[row]))
            there.remove(victim)
            expected.add(victim)
    assert set(decision.preempt_rows.tolist()) == expected


def test_nobody_is_admitted_in_a_round_in_which_somebody_must_leave() -> None:
    running = Running.of(["a", "b"], prompt_tokens=70, computed_tokens=80)
    waiting = Waiting.of(["w"], prompt_tokens=1, priority=-9)
    decision = decide(
        waiting, running, ids=["x0", "x1"], kv_blocks_used=[10, 0]
    )  # x1 has room for it
    assert len(decision.preempt_rows) == 1
    assert decision.verdict.tolist() == [DEFER]
    assert decision.reason[0] == "priority -9: waits, for KV is full and 1 running must leave"


def test_nobody_leaves_for_one_that_waits_however_important() -> None:
    running = Running.of(["meek"], priority=9, prompt_tokens=120, computed_tokens=125)
    waiting = Waiting.of(["urgent"], priority=-9, prompt_tokens=60)
    decision = decide(waiting, running, kv_blocks_used=8)
    assert decision.preempt_rows.tolist() == []
    assert decision.reason[0] == ("priority -9: waits for KV of 61 tokens, and at most 16 are free")


def test_nobody_overtakes_one_of_its_model_that_has_no_room_yet() -> None:
    waiting = Waiting.of(
        ["long", "small", "other"],
        priority=[0, 1, 2],
        prompt_tokens=[100, 8, 8],
        model=["m", "m", "n"],
    )
    decision = decide(waiting, ids=["x", "y"], model=["m", "n"], kv_blocks_used=[6, 0])
    assert waiting.ids[decision.admitted].tolist() == ["other"]
    assert decision.reason[:2].tolist() == [
        "priority 0: waits for KV of 101 tokens, and at most 64 are free",
        "priority 1: waits behind 'long', which has no room yet",
    ]


def test_important_requests_of_a_stream_are_done_first() -> None:
    asked = [
        Request(id=f"r{i}", prompt=tuple(range(60)), max_output_tokens=8, priority=i % 2)
        for i in range(12)
    ]
    served = serve(ONE, asked, strategy="priority", kv_blocks=12)
    ends = {id: end.report.end_us for id, end in served.ends.items()}
    assert max(ends[f"r{i}"] for i in range(0, 12, 2)) < min(ends[f"r{i}"] for i in range(1, 12, 2))
