"""What serving used, as series: means of what stays until it is said anew, and of what overlaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.engines import StepReport
from sagec.runtime.meter import Meter, mean_over, share_over

CHANGES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9)), max_size=12)
SPANS = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 100)).map(lambda ends: tuple(sorted(ends))),
    max_size=8,
)


@given(changes=CHANGES, bins=st.integers(1, 7))
def test_a_mean_is_that_of_the_values_at_every_moment(
    changes: list[tuple[int, int]], bins: int
) -> None:
    changes = sorted(changes, key=lambda change: change[0])
    held = np.zeros(100 * bins)  # at each of the hundredths of the way, in 1 / bins of a µs
    for time, value in changes:
        held[time * bins :] = value
    found = mean_over([t for t, _ in changes], [v for _, v in changes], 0, 100, bins)
    assert found.tolist() == pytest.approx(held.reshape(bins, -1).mean(axis=1).tolist())


@given(spans=SPANS, bins=st.integers(1, 5))
def test_what_is_under_way_adds_up_to_all_the_time_that_it_took(
    spans: list[tuple[int, int]], bins: int
) -> None:
    found = share_over(spans, 0, 100, bins)
    assert found.sum() * 100 / bins == pytest.approx(sum(end - begin for begin, end in spans))


def test_nothing_that_happened_is_a_series_of_zeros() -> None:
    assert mean_over([], [], 5, 5, 3).tolist() == [0, 0, 0]
    assert share_over([], 0, 10, 2).tolist() == [0, 0]


def step(**fields: object) -> StepReport:
    given = {"instance": "i0", "plan_id": "p", "step": 0, "begin_us": 10, "end_us": 30}
    return StepReport(**{**given, **fields})  # type: ignore[arg-type]


def test_a_chunk_attends_to_all_tokens_before_each_of_its_own() -> None:
    meter = Meter(["i0"])
    meter.hear(step(chunks=(("a", 2, 5),), reused=(("a", 2),), kv_blocks_used=7))
    use = meter.instances["i0"]
    assert (use.pairs, use.prompt_tokens, use.reused_tokens) == (3 + 4 + 5, 3, 2)
    assert (use.busy_us, use.steps, use.kv_blocks, use.kv_hit_rate) == (20, 1, [7], 2 / 5)


def test_what_was_sampled_is_counted_whether_the_tokens_are_said_or_only_how_many() -> None:
    meter = Meter(["i0"])
    meter.hear(step(chunks=(("a", 0, 9), ("b", 0, 4)), tokens=(("a", 0, 17),)))
    meter.hear(step(decodes=("a", "b"), steps=3, advanced=(("a", 1, 3), ("b", 0, 2))))
    assert meter.instances["i0"].sampled_tokens == 1 + 3 + 2


@pytest.mark.parametrize("at_once", [True, False])
def test_a_decode_attends_to_all_tokens_before_it_and_to_its_own(at_once: bool) -> None:
    meter = Meter(["i0", "d0"])
    meter.hear(step(chunks=(("a", 0, 10),)))
    for _ in range(1 if at_once else 3):
        meter.hear(step(instance="d0", decodes=("a",), steps=3 if at_once else 1))
    use = meter.instances["d0"]
    assert (use.pairs, use.decode_tokens, use.steps) == (11 + 12 + 13, 3, 3)
