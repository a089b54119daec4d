"""Clocks: the wall's, and one that jumps."""

import time

from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.clock import VirtualClock, WallClock


def test_the_wall_clock_is_the_monotonic_one_in_microseconds():
    before, now, after = time.monotonic_ns(), WallClock().now_us(), time.monotonic_ns()
    assert before // 1000 <= now <= after // 1000


def test_a_virtual_clock_stands_still_until_it_is_told():
    clock = VirtualClock(5)
    assert clock.now_us() == clock.now_us() == 5


@given(st.lists(st.integers(0, 1000)))
def test_a_virtual_clock_never_goes_back(moments):
    clock = VirtualClock()
    for count, moment in enumerate(moments, start=1):
        clock.advance_to(moment)
        assert clock.now_us() == max(moments[:count])
