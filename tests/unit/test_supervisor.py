"""When instances are made again, and which count as hung."""

import pytest

from sagec.runtime.clock import WallClock
from sagec.runtime.engines import EngineError, Failed
from sagec.runtime.engines.echo import Echo
from sagec.runtime.loop import Joined, Restarting
from sagec.runtime.supervisor import MAX_RESTARTS, STEADY_US, Supervisor
from tests.echo_cluster import spec


class Child(Echo):
    """An echo engine that behaves like a process: slow to come up, silent, killed."""

    def __init__(self, silent_s: float = 0.0, is_up: bool = True) -> None:
        super().__init__(spec("x0"), WallClock())
        self.silent_s, self.is_up, self.killed = silent_s, is_up, ""

    def kill(self, because: str) -> None:
        self.killed = because


def test_the_first_restart_is_at_once_and_the_next_after_a_pause():
    engines = {"x0": Child()}
    supervisor = Supervisor(engines, lambda name: Child(), None)
    assert supervisor.bury("x0", 100) == Restarting("x0", 100)
    assert supervisor.revive(100) == [Joined("x0")]
    assert supervisor.bury("x0", 200) == Restarting("x0", 500_200)
    assert supervisor.next_us == 500_200
    assert supervisor.revive(500_199) == []
    assert supervisor.revive(500_200) == [Joined("x0")]
    assert supervisor.next_us is None


def test_an_instance_that_lived_long_is_made_again_at_once():
    supervisor = Supervisor({"x0": Child()}, lambda name: Child(), None)
    now_us = 0
    for _ in range(2 * MAX_RESTARTS):
        assert supervisor.bury("x0", now_us) == Restarting("x0", now_us)
        assert supervisor.revive(now_us) == [Joined("x0")]
        now_us += STEADY_US + 1


def test_an_instance_that_dies_again_and_again_is_left_alone():
    supervisor = Supervisor({"x0": Child()}, lambda name: Child(), None)
    now_us = 0
    for _ in range(MAX_RESTARTS):
        now_us = supervisor.bury("x0", now_us).at_us
        supervisor.revive(now_us)
    assert supervisor.bury("x0", now_us) is None


def test_an_instance_joins_when_it_is_up_and_its_death_before_that_counts():
    engines = {"x0": Child()}
    supervisor = Supervisor(engines, lambda name: Child(is_up=False), None)
    supervisor.bury("x0", 0)
    assert supervisor.revive(0) == []
    assert supervisor.coming() == ["x0"]
    assert supervisor.bury("x0", STEADY_US * 9) == Restarting("x0", STEADY_US * 9 + 500_000)
    assert supervisor.coming() == []
    assert supervisor.revive(STEADY_US * 10) == []
    engines["x0"].is_up = True
    assert supervisor.revive(STEADY_US * 10) == [Joined("x0")]


def test_one_that_is_buried_twice_is_made_again_once():
    supervisor = Supervisor({"x0": Child()}, lambda name: Child(), None)
    supervisor.bury("x0", 0)
    supervisor.revive(0)
    assert supervisor.bury("x0", 10) == supervisor.bury("x0", 20) == Restarting("x0", 500_010)


def test_what_cannot_be_made_fails_with_the_reason():
    def make(name):
        raise EngineError("no memory left")

    supervisor = Supervisor({"x0": Child()}, make, None)
    supervisor.bury("x0", 0)
    assert supervisor.revive(0) == [Failed(instance="x0", request_id=None, error="no memory left")]


def test_without_a_maker_nobody_is_made_again():
    assert Supervisor({"x0": Child()}, None, None).bury("x0", 0) is None


@pytest.mark.parametrize(
    ("silent_s", "stall_s", "step_s", "hangs"),
    [
        (299, 300, 0, False),
        (301, 300, 0, True),
        (301, 300, 29, True),
        (301, 300, 31, False),
        (309, 300, 31, False),
        (311, 300, 31, True),
        (10**9, None, 0, False),
    ],
)
def test_a_process_hangs_that_is_silent_for_long_and_for_many_of_its_steps(
    silent_s, stall_s, step_s, hangs
):
    child, local = Child(silent_s), Echo(spec("x1"), WallClock())
    supervisor = Supervisor({"x0": child, "x1": local}, None, stall_s)
    supervisor.end_hung(0, lambda name: step_s * 1e6)
    expected = f"it had a plan and said nothing for {silent_s:.1f} s" if hangs else ""
    assert child.killed == expected
