"""The cost of a step: what roofline and fit say of tokens, pairs, KV, and their sums."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sagec.runtime.cost import (
    MOST_SHARES,
    STEP_OVERHEAD_US,
    Curve,
    Fit,
    StepCost,
    expert_shares,
    experts_read,
    fit_text,
    read_fit,
)
from sagec.runtime.direct.topology import Model
from sagec.runtime.engines import EngineError, InstanceSpec
from sagec.runtime.engines.sim.options import read_options

COST = StepCost(
    flops_per_token=2e9,
    flops_per_pair=1e5,
    weight_bytes=2e9,
    kv_bytes_per_token=1e5,
    flops_per_s=1e14,
    bytes_per_s=1e12,
)

tokens = st.integers(0, 10_000)


def test_a_small_step_takes_as_long_as_reading_the_weights() -> None:
    assert float(COST.step_us(1, 1, 1)) == pytest.approx(STEP_OVERHEAD_US + 2000.1)


def test_a_large_step_takes_as_long_as_its_arithmetic() -> None:
    us = float(COST.step_us(4096, 0, 4096))
    assert us == pytest.approx(STEP_OVERHEAD_US + 4096 * 2e9 / 1e14 * 1e6)


def test_kv_of_the_context_is_read_beside_the_weights() -> None:
    more = COST.step_us(1, 0, 20_000) - COST.step_us(1, 0, 10_000)
    assert float(more) == pytest.approx(10_000 * 1e5 / 1e12 * 1e6)


def test_the_overhead_can_be_what_was_measured() -> None:
    assert float(StepCost(1.0, 0.0, 0.0, 0.0, 1e15, 1e12, overhead_us=7.0).step_us(0, 0, 0)) == 7.0


@given(tokens, tokens, tokens)
def test_plain_numbers_and_arrays_say_the_same(count: int, pairs: int, context: int) -> None:
    one = COST.one_step_us(count, pairs, context)
    assert one == float(COST.step_us(count, pairs, context))
    columns = COST.step_us(np.array([count, 0]), np.array([pairs, 0]), np.array([context, 0]))
    assert columns.shape == (2,)
    assert float(columns[0]) == one


@given(tokens, tokens, tokens)
def test_more_work_never_takes_less_time(count: int, pairs: int, context: int) -> None:
    us = COST.one_step_us(count, pairs, context)
    assert us >= STEP_OVERHEAD_US
    assert COST.one_step_us(count + 1, pairs, context) >= us
    assert COST.one_step_us(count, pairs + 1, context) >= us
    assert COST.one_step_us(count, pairs, context + 1) >= us


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6))
def test_the_chunks_of_a_prompt_add_up_to_the_whole(sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    parts = COST.prefill_us(ends - sizes, ends)
    assert float(parts.sum()) == pytest.approx(float(COST.prefill_us(0, ends[-1])))
    assert (parts > 0).all()


def test_later_tokens_of_a_prompt_cost_more_for_they_attend_to_more() -> None:
    assert COST.prefill_us(1000, 1100) > COST.prefill_us(0, 100)


@given(tokens)
def test_a_decode_adds_the_reading_of_its_kv_or_its_arithmetic(context: int) -> None:
    arithmetic, traffic = (2e9 + context * 1e5) / 1e14, context * 1e5 / 1e12
    assert float(COST.decode_us(context)) == pytest.approx(1e6 * max(arithmetic, traffic))


# The last projection, and experts

HEAD = dataclasses.replace(COST, head_flops_per_token=1e9)
EXPERTS = dataclasses.replace(
    HEAD, weight_bytes=1e8, expert_bytes=8e9, experts=8, experts_per_token=2
)


def test_the_last_projection_computes_the_decodes_and_one_row_of_the_prompts() -> None:
    flops = 4096 * 2e9 + 4096 * 1e5
    for decodes, sampled in ((0, 1), (96, 97), (4096, 4096)):
        us = HEAD.one_step_us(4096, 4096, 0, decodes)
        assert us == STEP_OVERHEAD_US + 1e6 * ((flops + sampled * 1e9) / 1e14)


def test_a_step_reads_the_experts_that_its_tokens_go_to() -> None:
    for count, share in ((0, 0.0), (1, 0.25), (2, 0.4375)):
        read = 1e8 + share * 8e9
        assert EXPERTS.one_step_us(count, 0, 0, count) == STEP_OVERHEAD_US + read / 1e12 * 1e6


@given(st.integers(1, 256), st.integers(1, 16), st.integers(0, 3000))
def test_the_share_of_experts_is_the_closed_form(experts: int, each: int, count: int) -> None:
    each = min(each, experts)
    wanted = 1 - (1 - each / experts) ** count
    assert experts_read(experts, each, count) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@given(st.integers(0, 5000), st.integers(0, 70))
def test_shares_of_experts_grow_to_an_end(experts: int, each: int) -> None:
    shares = expert_shares(experts, each)
    assert all(a < b <= 1 for a, b in itertools.pairwise(shares))
    assert len(shares) <= MOST_SHARES
    if experts and 200 * each >= experts:
        assert math.isclose(shares[-1], 1.0, rel_tol=1e-12)


def test_where_nobody_says_how_many_experts_there_are_all_are_read() -> None:
    cost = dataclasses.replace(COST, weight_bytes=0.0, expert_bytes=5e9)
    assert cost.one_step_us(1, 0, 0, 1) == STEP_OVERHEAD_US + 5000.0


def test_a_model_tells_its_experts_from_what_each_step_reads() -> None:
    dense = Model("m", 2, 64, 4, 2, 16, 128, 1000, "bf16", 512, 0, 0, 0, "")
    moe = dataclasses.replace(dense, experts=8, experts_per_token=2)
    of_dense, of_moe = dense.cost(1e12, 1e11), moe.cost(1e12, 1e11)
    assert (of_dense.weight_bytes, of_dense.expert_bytes) == (dense.weight_bytes, 0)
    assert of_moe.expert_bytes == 2 * 8 * 3 * 64 * 128 * 2
    assert of_moe.weight_bytes + of_moe.expert_bytes == moe.weight_bytes
    assert (of_moe.experts, of_moe.experts_per_token) == (8, 2)
    assert of_dense.head_flops_per_token == of_moe.head_flops_per_token == 2 * 64 * 1000


# A fit

FIT = Fit(
    prefill=Curve(800.0, (0.0, 64.0), (2.0, 12.5)),
    pair_us=0.01,
    decode=Curve(500.0, (0.0, 8.0, 32.0), (0.0, 20.0, 55.0)),
    context_us=0.2,
    shared_us=450.0,
)
FITTED = dataclasses.replace(COST, fit=FIT)


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Tokens, pairs, tokens of KV and decodes of a step."""
    prompts, decodes = draw(tokens), draw(st.integers(0, 300))
    context = draw(tokens) if decodes else 0
    pairs = draw(tokens) if prompts else 0
    return prompts + decodes, pairs + context, context, decodes


@example(FITTED, [(0, 0, 0, 0), (1, 0, 0, 0)])  # nothing at all, beside a prompt
@given(st.sampled_from([HEAD, EXPERTS, FITTED]), st.lists(steps(), min_size=1, max_size=5))
def test_a_cost_says_the_same_of_one_step_and_of_many_to_the_bit(
    cost: StepCost, some: list[tuple[int, int, int, int]]
) -> None:
    each = cost.step_us(*np.array(some).T)
    assert each.tolist() == [cost.one_step_us(*step) for step in some]
    assert float(cost.step_us(*some[0])) == cost.one_step_us(*some[0])


@given(steps())
def test_where_there_is_a_fit_more_work_of_a_phase_never_takes_less_time(
    step: tuple[int, int, int, int],
) -> None:
    tokens_, pairs, context, decodes = step
    us = FITTED.one_step_us(*step)
    assert us > 0
    assert FITTED.one_step_us(tokens_, pairs + 1, context, decodes) >= us
    if tokens_ > decodes:
        assert FITTED.one_step_us(tokens_ + 1, pairs, context, decodes) >= us
    if decodes:
        assert FITTED.one_step_us(tokens_ + 1, pairs + 1, context + 1, decodes + 1) >= us
    if tokens_ > decodes > 0:
        alone = FITTED.one_step_us(tokens_ - decodes, pairs - context, 0, 0)
        assert us >= alone


def test_a_fit_counts_alone_whatever_the_device_could_do() -> None:
    faster = dataclasses.replace(FITTED, flops_per_s=1e20, bytes_per_s=1e20)
    assert faster.one_step_us(300, 9000, 5000, 40) == FITTED.one_step_us(300, 9000, 5000, 40)


def test_a_step_of_both_phases_takes_both_less_what_they_share() -> None:
    both = FITTED.one_step_us(100 + 10, 5050 + 900, 900, 10)
    prefill = FITTED.one_step_us(100, 5050, 0, 0)
    decode = FITTED.one_step_us(10, 900, 900, 10)
    assert both == pytest.approx(prefill + decode - 450.0)


def test_tokens_of_both_phases_pass_through_the_weights_together() -> None:
    """Where the prompts' curve has become steeper, decodes beside a chunk cost that, too."""
    beside_few = FITTED.one_step_us(20 + 10, 210, 0, 10) - FITTED.one_step_us(20, 210, 0, 0)
    beside_many = FITTED.one_step_us(100 + 60, 5050, 0, 60) - FITTED.one_step_us(100, 5050, 0, 0)
    decode = FIT.decode.one
    assert beside_few == pytest.approx(decode(10) - 450.0)
    assert beside_many == pytest.approx(decode(60) + 60 * 12.5 - (800.0 + 60 * 2.0))


def test_steps_of_both_phases_and_of_one_can_be_asked_together_with_single_numbers() -> None:
    columns = FITTED.step_us(np.array([1, 5, 300]), 900, 900, np.array([1, 5, 4]))
    assert columns.tolist() == [
        FITTED.one_step_us(count, 900, 900, decodes)
        for count, decodes in ((1, 1), (5, 5), (300, 4))
    ]


def test_what_a_request_adds_is_the_same_however_its_prompt_is_cut() -> None:
    parts = FITTED.prefill_us(np.array([0, 10, 70]), np.array([10, 70, 500]))
    assert float(parts.sum()) == pytest.approx(float(FITTED.prefill_us(0, 500)))
    assert float(FITTED.decode_us(1000)) == pytest.approx(20.0 * 24 / 32 + 200.0)


def test_costs_with_equal_fits_are_equal_and_hash_alike() -> None:
    other = dataclasses.replace(COST, fit=read_fit(fit_text(FIT)))
    assert other == FITTED
    assert len({other, FITTED, COST}) == 2


def test_a_curve_goes_on_beyond_its_last_knot() -> None:
    assert FIT.prefill.one(64) == 928.0
    assert FIT.prefill.one(128) == 928.0 + 64 * 12.5
    assert Curve(3.0, (0.0,), (2.0,)).mean_slope == 2.0


@pytest.mark.parametrize(
    ("begin_us", "knots", "slopes"),
    [
        (1.0, (), ()),
        (1.0, (1.0,), (1.0,)),
        (1.0, (0.0, 2.0, 2.0), (1.0, 1.0, 1.0)),
        (1.0, (0.0,), (1.0, 2.0)),
        (-1.0, (0.0,), (1.0,)),
        (1.0, (0.0,), (-1.0,)),
        (1.0, (0.0,), (float("nan"),)),
    ],
)
def test_a_curve_that_falls_or_has_no_pieces_is_refused(
    begin_us: float, knots: tuple[float, ...], slopes: tuple[float, ...]
) -> None:
    with pytest.raises(ValueError, match="a curve"):
        Curve(begin_us, knots, slopes)


@pytest.mark.parametrize("text", ["", "3", "{}", '{"prefill": {"knots": 3, "slopes": []}}', "[1]"])
def test_a_text_that_is_no_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_fit(text)


def test_an_engine_is_told_a_cost_in_texts_and_understands_the_same() -> None:
    for cost in (COST, FITTED, EXPERTS):
        spec = InstanceSpec(
            id="s", engine="sim", model="", kv_blocks=8, block_tokens=4, options=cost.to_options()
        )
        assert read_options(spec).cost == cost


def test_the_simulator_refuses_a_fit_that_is_none_in_one_line() -> None:
    spec = InstanceSpec(
        id="s", engine="sim", model="", kv_blocks=8, block_tokens=4, options={"fit": "soon"}
    )
    with pytest.raises(EngineError, match=r"^instance 's': fit: .*a cluster.device with a profile"):
        read_options(spec)
