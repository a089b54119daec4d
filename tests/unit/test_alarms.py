"""Alarms: whoever has something to say is asked, and nobody else."""

from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.alarms import Alarms

NAMES = ("a", "b", "c")


def test_everybody_is_asked_once_and_then_when_the_time_has_come():
    alarms = Alarms(NAMES)
    assert alarms.due(0) == ["a", "b", "c"]
    for name, at_us in (("a", 30), ("b", 10), ("c", None)):
        alarms.set(name, at_us)
    assert not alarms.is_anyone_awake
    assert (alarms.due(9), alarms.next_us()) == ([], 10)
    assert alarms.due(10) == ["b"]
    alarms.set("b", None)
    assert alarms.due(30) == ["a"]


def test_who_was_told_something_is_asked_at_once_and_in_the_order_of_the_instances():
    alarms = Alarms(NAMES)
    for name in NAMES:
        alarms.set(name, 50)
    alarms.wake("c")
    alarms.wake("a")
    assert alarms.is_anyone_awake
    assert alarms.due(0) == ["a", "c"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.none() | st.integers(0, 20)), max_size=30))
def test_only_what_was_set_last_counts(settings):
    alarms, last = Alarms(NAMES), dict.fromkeys(NAMES)
    for name in NAMES:
        alarms.set(name, None)
    for name, at_us in settings:
        alarms.set(name, at_us)
        last[name] = at_us
    times = [at_us for at_us in last.values() if at_us is not None]
    assert alarms.next_us() == min(times, default=None)
    for now_us in (5, 12, 20):
        due = alarms.due(now_us)
        assert due == [n for n in NAMES if last[n] is not None and last[n] <= now_us]
        for name in due:
            alarms.set(name, None)
            last[name] = None
