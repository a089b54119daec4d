"""What instances cannot exceed: no simulation does, and no step takes less than it is taken to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sagec import language
from sagec.capacity import Target, Work, bound, sides_of
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.planner import planner_of
from sagec.runtime.cost import Curve, Fit, StepCost
from sagec.runtime.request import Request
from sagec.runtime.strategies import create
from sagec.simulation import simulate

LATE = Target(ttft_us=10**9, tpot_us=10**9, attained=1.0)

MODEL = (
    "model m { layers 16 hidden 2048 heads 16 kv_heads 8 ffn 8192 vocab 32000 max_context 8192 }"
)
DEVICES = """
  devices slow0..slow1 kind a10
  devices fast0..fast1 kind h100
  switch nv
  link slow0..slow1 to nv bandwidth 20GB/s latency 2us
  link fast0..fast1 to nv bandwidth 20GB/s latency 2us
"""
LAYOUTS = (
    ("hybrid", "instance i on fast0{}"),
    ("hybrid", "instances i, j on slow0, fast0{}"),
    ("time-share", "instance i on fast0..fast1 tp 2{}"),
    ("strict", "instance p role prefill on fast0{0} instance d role decode on slow0{0}"),
    ("strict", "instances p, q role prefill on slow0, fast0{0} instance d role decode on fast1{0}"),
)


@dataclass(frozen=True)
class Scene:
    """A cluster, as text, and requests for it."""

    mode: str
    instances: str
    requests: tuple[Request, ...]
    target: Target

    def module(self):
        return language.lower(
            language.parse(
                f"{MODEL} cluster box {{ {DEVICES} {self.instances} }}\n"
                f'serve on box mode {self.mode} chunk 512 {{ request "any" tokens 1 generate 1 }}',
                "box.sage",
            )
        )


@st.composite
def scenes(draw) -> Scene:
    mode, instances = draw(st.sampled_from(LAYOUTS))
    cache = draw(st.sampled_from(["on", "off"]))
    settings_of = (
        f" engine sim block 32 budget 1024 max_batch {draw(st.sampled_from([2, 8, 64]))}"
        f' kv_blocks {draw(st.sampled_from([300, 3000]))} options "prefix_cache={cache}"\n'
    )
    common = draw(st.sampled_from([0, 320, 1500]))
    kinds = draw(
        st.lists(
            st.tuples(st.sampled_from([20, 200, 1900, 5000]), st.sampled_from([1, 2, 30, 200])),
            min_size=1,
            max_size=3,
        )
    )
    apart_us = draw(st.sampled_from([0, 5_000]))
    requests = tuple(
        Request(
            id=f"r{i}",
            prompt=(*range(common), *range(10_000 * (i + 1), 10_000 * (i + 1) + length)),
            max_output_tokens=output,
            arrival_us=i * apart_us,
        )
        for i, (length, output) in enumerate(kinds * draw(st.sampled_from([1, 4, 20])))
    )
    target = Target(
        ttft_us=draw(st.sampled_from([20_000, 200_000, 10**9])),
        tpot_us=draw(st.sampled_from([3_000, 12_000, 10**9])),
        attained=draw(st.sampled_from([0.25, 0.5, 0.9, 1.0])),
    )
    return Scene(mode, instances.format(settings_of), requests, target)


def promised(requests, target: Target) -> list[Request]:
    return [replace(one, ttft_us=target.ttft_us, tpot_us=target.tpot_us) for one in requests]


@settings(max_examples=30, deadline=None)
@given(scene=scenes())
def test_no_simulation_serves_more_requests_a_second_than_the_bound(scene: Scene) -> None:
    """With prefix caches or without, on unlike devices, whatever share is to be served well."""
    placed = topology_of(scene.module()).instances
    caches = "prefix_cache=on" in placed[0].options
    found = bound(placed, Work.of(scene.requests, 32 if caches else None), scene.target)
    module = scene.module()
    requests = promised(scene.requests, scene.target)
    simulated = simulate(module, requests, create("fifo"), planner_of(module))
    if simulated.served_well >= scene.target.attained * len(requests):
        # steps take whole microseconds
        assert len(requests) / simulated.duration_s <= found.per_s * 1.01


def test_requests_that_share_a_prefix_are_bounded_by_what_is_left_of_them() -> None:
    """The bound of instances without caches is below what those with caches reach."""
    engine = ' engine sim block 32 budget 2048 options "prefix_cache=on"'
    requests = tuple(
        Request(id=f"r{i}", prompt=(*range(4000), *[10**6 + i] * 40), max_output_tokens=1)
        for i in range(30)
    )
    scene = Scene("hybrid", f"instance i on fast0{engine}", requests, LATE)
    module = scene.module()
    simulated = simulate(module, promised(requests, LATE), create("fifo"), planner_of(module))
    reached = len(requests) / simulated.duration_s
    placed = topology_of(scene.module()).instances
    assert simulated.served_well == len(requests)
    assert bound(placed, Work.of(requests), LATE).per_s < reached
    assert reached <= bound(placed, Work.of(requests, 32), LATE).per_s


@st.composite
def curves(draw) -> Curve:
    knots = sorted(draw(st.sets(st.integers(1, 400), max_size=4)))
    slopes = draw(st.lists(st.floats(0, 50), min_size=len(knots) + 1, max_size=len(knots) + 1))
    return Curve(draw(st.floats(1, 5000)), (0.0, *map(float, knots)), tuple(slopes))


@st.composite
def costs(draw) -> StepCost:
    number = st.floats(0, 1e9)
    roofline = StepCost(
        flops_per_token=draw(number),
        flops_per_pair=draw(st.floats(0, 1e5)),
        weight_bytes=draw(number),
        kv_bytes_per_token=draw(st.floats(0, 1e5)),
        flops_per_s=1e14,
        bytes_per_s=1e12,
        head_flops_per_token=draw(number),
        expert_bytes=draw(st.sampled_from([0.0, 1e9])),
        experts=8,
        experts_per_token=2,
    )
    if draw(st.booleans()):
        return roofline
    prefill, decode = draw(curves()), draw(curves())
    shared_us = draw(st.floats(0, 1)) * min(prefill.begin_us, decode.begin_us)
    pair_us, context_us = draw(st.floats(0, 1)), draw(st.floats(0, 1))
    return StepCost(
        **{**vars(roofline), "fit": Fit(prefill, pair_us, decode, context_us, shared_us)}
    )


@settings(max_examples=200)
@given(
    cost=costs(),
    tokens=st.integers(0, 500),
    begin=st.integers(0, 1000),
    decodes=st.integers(0, 64),
    context=st.integers(1, 500),
)
def test_a_step_takes_no_less_than_either_side_says(
    cost: StepCost, tokens: int, begin: int, decodes: int, context: int
) -> None:
    if not tokens + decodes:
        return
    pairs, held = tokens * begin + tokens * (tokens + 1) / 2, decodes * context
    step_us = float(cost.step_us(tokens + decodes, pairs + held, held, decodes))
    for side in sides_of(cost, 64, 512):
        decode_us = side.base_us[decodes - 1] + held * side.context_us if decodes else 0.0
        assert tokens * side.token_us + pairs * side.pair_us + decode_us <= step_us * (1 + 1e-9)


def placed_of(instances: str) -> tuple[Placed, ...]:
    return topology_of(Scene("hybrid", instances, (), LATE).module()).instances


def work_of(*asked: tuple[int, int]) -> Work:
    """asked: tokens of the prompt and of the output of each request."""
    return Work.of(
        [
            Request(id=f"r{i}", prompt=(1,) * prompt, max_output_tokens=output)
            for i, (prompt, output) in enumerate(asked)
        ]
    )


def test_a_slow_instance_beside_a_fast_one_does_not_rule_a_layout_out() -> None:
    slow, fast = placed_of("instances a, b on slow0, fast0 engine sim block 32")
    alone_us = [float(one.cost.prefill_us(0, 3000)) for one in (slow, fast)]
    assert alone_us[0] > alone_us[1]
    target = Target(ttft_us=int(sum(alone_us) / 2), tpot_us=10**9)
    asked = work_of(*[(3000, 9)] * 4)
    both = bound([slow, fast], asked, target).per_s
    assert both > bound([fast], asked, target).per_s > 0
    none, why = bound([slow], asked, target)
    assert none == 0.0
    assert why.startswith("a prompt of 3000 tokens, longer than 90% are, takes")


def test_a_long_prompt_beyond_the_share_that_is_asked_for_rules_nothing_out() -> None:
    (one,) = placed_of("instance a on fast0 engine sim block 32")
    target = Target(1 + int(one.cost.prefill_us(0, 200)), tpot_us=10**9, attained=0.5)
    assert bound([one], work_of((100, 9), (7000, 9)), target).per_s > 0
    assert bound([one], work_of((7000, 9), (7000, 9)), target).per_s == 0.0


def test_a_promise_that_no_decode_keeps_is_told() -> None:
    (one,) = placed_of("instance a on fast0 engine sim block 32")
    none, why = bound([one], work_of((100, 9)), Target(ttft_us=10**9, tpot_us=1))
    assert none == 0.0
    assert why.startswith("one decode alone takes")
    first_tokens_only = bound([one], work_of((100, 1)), Target(ttft_us=10**9, tpot_us=1))
    assert first_tokens_only.per_s == pytest.approx(1e6 / 0.9 / float(one.cost.prefill_us(0, 100)))


def test_the_narrow_phase_is_named() -> None:
    placed = placed_of(
        "instances p, q role prefill on slow0..slow1 engine sim block 32\n"
        "instance d role decode on fast0 engine sim block 32"
    )
    _, why = bound(placed, work_of((3000, 2)), LATE)
    assert why.startswith("2 prefill instances can compute prompts for")
    _, why = bound(placed, work_of((20, 900)), LATE)
    assert why.startswith("1 decode instance can decode for")


def test_only_the_cheapest_requests_count_where_a_share_is_enough() -> None:
    (one,) = placed_of("instance a on fast0 engine sim block 32")
    asked = work_of((5000, 1), *[(10, 1)] * 9)
    most = bound([one], asked, Target(10**9, 10**9, attained=0.9)).per_s
    assert most == pytest.approx(10e6 / 9 / float(one.cost.prefill_us(0, 10)))
    all_of_them = bound([one], asked, LATE).per_s
    assert all_of_them < most / 10


def test_pieces_of_prompts_are_told_apart_by_who_has_them() -> None:
    common = tuple(range(64))
    asked = [
        Request(id="a", prompt=(*common, *[7] * 40), max_output_tokens=1),
        Request(id="b", prompt=(*common, *[8] * 10), max_output_tokens=1),
        Request(id="c", prompt=(*common[:32], *[9] * 40), max_output_tokens=1),
    ]
    work = Work.of(asked, 32)
    pieces = np.column_stack([work.owner, work.begin, work.end, work.users]).astype(int)
    assert pieces.tolist() == [
        *[[0, 0, 32, 3], [0, 32, 64, 2], [0, 64, 104, 1]],
        *[[1, 0, 32, 3], [1, 32, 64, 2], [1, 64, 74, 1]],
        *[[2, 0, 32, 3], [2, 32, 72, 1]],
    ]
    assert work.own_begin.tolist() == [64, 64, 32]
    assert work.shared_out_us(1.0, 0.0).sum() == pytest.approx(64 + 40 + 10 + 40)


def test_seven_of_ten_are_enough_where_seven_tenths_are_asked_for() -> None:
    """0.7 * 10 is a little more than 7 in a computer's numbers."""
    (one,) = placed_of("instance a on fast0 engine sim block 32")
    asked = work_of(*[(10, 1)] * 7, *[(7000, 1)] * 3)
    target = Target(1 + int(one.cost.prefill_us(0, 10)), tpot_us=10**9, attained=0.7)
    assert bound([one], asked, target).per_s > 0
