"""Operators and messages: small ones are slow, large ones are bound, collectives are their hops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.roofline import SUSTAINED_BYTES, SUSTAINED_FLOPS, Device, Link

H100 = Device(flops_per_s=9.9e14, bytes_per_s=3.35e12)
NVLINK = Link(bytes_per_s=4.5e11, latency_us=2.0)

amounts = st.floats(0, 1e16)


def test_a_large_operator_takes_as_long_as_its_arithmetic_at_the_sustained_rate() -> None:
    assert H100.operator_us(1e15, 1.0) == pytest.approx(1e6 / 0.99 / SUSTAINED_FLOPS, rel=1e-3)


def test_an_operator_of_much_traffic_takes_as_long_as_that() -> None:
    assert H100.operator_us(1.0, 3.35e12) == pytest.approx(1e6 / SUSTAINED_BYTES, rel=1e-3)


def test_an_empty_operator_takes_the_time_to_begin() -> None:
    assert H100.operator_us(0, 0) == H100.launch_us


@given(amounts, amounts)
def test_more_arithmetic_or_traffic_never_takes_less(flops: float, moved: float) -> None:
    us = H100.operator_us(flops, moved)
    assert H100.operator_us(2 * flops + 1, moved) >= us
    assert H100.operator_us(flops, 2 * moved + 1) >= us


def test_the_larger_an_operator_the_nearer_to_the_sustained_share() -> None:
    shares = [H100.efficiency(10.0**power) for power in range(6, 17)]
    assert shares == sorted(shares)
    assert shares[0] < 0.01
    assert shares[-1] == pytest.approx(SUSTAINED_FLOPS, rel=1e-3)


def test_an_operator_as_long_as_its_launch_reaches_half_of_the_sustained_share() -> None:
    half = H100.launch_us * 1e-6 * H100.flops_per_s * H100.sustained_flops
    assert H100.efficiency(half) == pytest.approx(H100.sustained_flops / 2)


def test_a_message_of_half_bytes_gets_half_of_the_bandwidth() -> None:
    us = NVLINK.send_us(NVLINK.half_bytes)
    assert NVLINK.half_bytes / (us * 1e-6) == pytest.approx(NVLINK.bytes_per_s / 2)


@given(st.integers(1, 64), st.floats(0, 1e9))
def test_a_collective_of_one_rank_is_free_and_more_ranks_never_cost_less(
    ranks: int, num_bytes: float
) -> None:
    assert NVLINK.all_reduce_us(num_bytes, 1) == 0.0
    one, two = (NVLINK.all_reduce_us(num_bytes, count) for count in (ranks, ranks + 1))
    assert two >= one * (1 - 1e-12)


@given(st.integers(1, 64), st.floats(0, 1e9))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks: int, num_bytes: float) -> None:
    parts = NVLINK.reduce_scatter_us(num_bytes, ranks) + NVLINK.all_gather_us(num_bytes, ranks)
    assert NVLINK.all_reduce_us(num_bytes, ranks) == pytest.approx(parts)


def test_two_small_all_reduces_cost_more_than_one_of_both() -> None:
    assert 2 * NVLINK.all_reduce_us(1e4, 4) > NVLINK.all_reduce_us(2e4, 4)
