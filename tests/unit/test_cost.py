"""The roofline of a step: what it says of tokens, pairs, KV, and their sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.cost import STEP_OVERHEAD_US, StepCost

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
    assert one == pytest.approx(float(COST.step_us(count, pairs, context)))
    columns = COST.step_us(np.array([count, 0]), np.array([pairs, 0]), np.array([context, 0]))
    assert columns.shape == (2,)
    assert float(columns[0]) == pytest.approx(one)


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
