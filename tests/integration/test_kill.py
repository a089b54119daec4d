"""Instance processes that are killed, stopped or left: no request is lost and no token changes."""

import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from sagec.runtime import process
from sagec.runtime.comm import shared_memory
from sagec.runtime.engines import (
    Engine,
    EngineError,
    InstanceSpec,
    KVExported,
    KVImported,
    PlanDone,
    StepReport,
)
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import (
    Deliver,
    Instance,
    Joined,
    Planned,
    Restarting,
    Retried,
    Submit,
    Token,
)
from sagec.runtime.process import ProcessEngine
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, requests, serve, spec
from tests.turbomind_here import needs_turbomind
from tests.unit.test_executor import run_plan

TINY = Path(__file__).parents[2] / "examples" / "models" / "tiny"

MOMENTS = (StepReport, KVExported, KVImported, Submit, Deliver)
"""What a process may be killed at: what it said, and what it was told."""


class Cluster:
    """Instance processes that outlive a service, and are made again when they die."""

    def __init__(self, roles: Mapping[str, str], make_spec: Callable[[str], InstanceSpec] = spec):
        self.roles, self.spec = roles, make_spec
        self.engines: dict[str, Engine] = dict(process.start([make_spec(n) for n in roles]))
        self.pids = {engine.pid for engine in self.engines.values()}
        self.instances = [
            Instance(id=n, role=r, engine="", capability=self.engines[n].capability())
            for n, r in roles.items()
        ]

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for engine in self.engines.values():
            engine.close()

    def kill(self, name: str) -> bool:
        """Whether there was a process to kill."""
        if alive := not self.engines[name].error:
            os.kill(self.engines[name].pid, signal.SIGKILL)
        return alive

    def serve(self, asked: Sequence[Request], watch=(), planner=None, **options) -> Served:
        """Serve; then the processes that live have their books in order."""
        api = ExecutorAPI(
            self.engines, self.instances, watch=watch, restart=self._restart, **options
        )
        self.engines = api.engines
        served = Served().take(api.serve(asked, create("fifo"), planner or DirectPlanner()))
        for engine in self.engines.values():
            try:
                engine.check_integrity()
            except EngineError:
                assert engine._process.returncode == -signal.SIGKILL
        return served

    def segments(self) -> list[str]:
        """KV in shared memory that any process of this cluster, dead or alive, has left."""
        return [
            path.name for pid in self.pids for path in shared_memory.FOLDER.glob(f"sagec-*-{pid}-*")
        ]

    def _restart(self, name: str) -> ProcessEngine:
        engine = ProcessEngine(self.spec(name))
        self.pids.add(engine.pid)
        return engine


class KillAt:
    """A watcher that kills an instance when one of MOMENTS comes for the nth time."""

    def __init__(self, cluster: Cluster, name: str, moment: int) -> None:
        self.cluster, self.name, self.moment, self.count = cluster, name, moment, 0

    def __call__(self, said: object) -> None:
        if isinstance(said, MOMENTS):
            self.count += 1
            if self.count == self.moment:
                self.cluster.kill(self.name)


@pytest.mark.parametrize(
    ("roles", "killed"),
    [(ONE, "x0"), (SPLIT, "p0"), (SPLIT, "d0")],
    ids=["both", "prefill", "decode"],
)
def test_a_process_killed_at_every_moment_of_a_run_loses_no_request_and_changes_no_token(
    roles, killed
):
    asked = requests(2, generate=6, every_us=0)
    expected = serve(ONE, asked, kv_blocks=400).tokens
    with Cluster(roles) as cluster:
        for moment in itertools.count(1):
            watch = KillAt(cluster, killed, moment)
            served = cluster.serve(asked, [watch])
            assert served.tokens == expected, moment
            assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}, moment
            if watch.count < moment:
                break
        assert moment > 6
        assert cluster.segments() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_processes_killed_at_random_in_a_long_run_lose_no_request_and_change_no_token(seed):
    draw = random.Random(seed)
    asked = requests(60, generate=40, every_us=2000)
    heard = Counter()

    with Cluster(WIDE) as cluster:

        def watch(said: object) -> None:
            heard[type(said)] += 1
            if isinstance(said, MOMENTS) and draw.random() < 0.02 and heard["kills"] < 12:
                heard["kills"] += cluster.kill(draw.choice(list(WIDE)))

        served = cluster.serve(asked, [watch], max_attempts=100)
    assert heard["kills"] > 3
    assert served.tokens == serve(ONE, asked, kv_blocks=4000).tokens
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}


def tiny(name: str) -> InstanceSpec:
    options = {"dtype": "float32", "threads": "1", "channel": "shared-memory", "native": "off"}
    return InstanceSpec(
        id=name, engine="torch", model=str(TINY), kv_blocks=48, block_tokens=16, options=options
    )


def toy(name: str) -> InstanceSpec:
    options = {"maths": "toy", "channel": "shared-memory"}
    return InstanceSpec(
        id=name, engine="turbomind", model="", kv_blocks=48, block_tokens=16, options=options
    )


SMALL = [pytest.param(tiny, id="torch"), pytest.param(toy, id="turbomind", marks=needs_turbomind)]


def serve_small(
    make_spec: Callable[[str], InstanceSpec], moments: Mapping[str, int], seed: int = 0
) -> None:
    """A run on a small model in which each of these instances is killed at its moment."""
    pytest.importorskip("torch")
    draw = random.Random(seed)
    asked = [
        Request(
            id=f"r{n}",
            prompt=tuple(draw.randrange(3, 900) for _ in range(9 + 17 * n)),
            max_output_tokens=12,
        )
        for n in range(4)
    ]
    one_unfinished_at_a_time = DirectPlanner(chunk_tokens=32, step_tokens=32)  # as TurboMind has it
    with Cluster(SPLIT, make_spec) as cluster:
        undisturbed = cluster.serve(asked, planner=one_unfinished_at_a_time)
        watch = [KillAt(cluster, name, moment) for name, moment in moments.items()]
        disturbed = cluster.serve(asked, watch, planner=one_unfinished_at_a_time)
        assert all(killer.count >= killer.moment for killer in watch)
        assert disturbed.tokens == undisturbed.tokens
        assert cluster.segments() == []
    assert {end.reason for end in disturbed.ends.values()} <= {
        FinishReason.LENGTH,
        FinishReason.STOP,
    }


@pytest.mark.parametrize("make_spec", SMALL)
@pytest.mark.parametrize("moments", [{"p0": 7, "d0": 7}], ids=str)
def test_a_killed_process_changes_no_token_and_leaves_no_kv_in_shared_memory(make_spec, moments):
    serve_small(make_spec, moments)


@pytest.mark.slow
@pytest.mark.parametrize("make_spec", SMALL)
@pytest.mark.parametrize("seed", range(4))
def test_processes_of_a_model_killed_at_random_change_no_token(make_spec, seed):
    draw = random.Random(f"torch {seed}")
    serve_small(make_spec, {"p0": draw.randrange(1, 12), "d0": draw.randrange(1, 30)}, seed)


def test_kv_that_a_killed_process_told_nobody_of_is_freed_and_what_is_on_its_way_is_not():
    asked = requests(3, generate=6, every_us=0)
    with Cluster(SPLIT) as cluster:
        pid = cluster.engines["p0"].pid
        left = shared_memory.FOLDER / f"sagec-p0-{pid}-0123456789abcdef"
        left.write_bytes(b"KV")
        cluster.serve(asked, [KillAt(cluster, "p0", 1)])
        assert cluster.segments() == []
    keep = shared_memory.FOLDER / f"sagec-p0-{pid}-fedcba9876543210"
    for path in (left, keep):
        path.write_bytes(b"KV")
    shared_memory.free_left_by(pid, {keep.name})
    assert cluster.segments() == [keep.name]
    keep.unlink()


# Processes that hang.


def test_a_process_that_hangs_is_killed_and_its_requests_go_on_elsewhere():
    asked = requests(6, generate=8, every_us=0)
    heard = []
    with Cluster(WIDE) as cluster:

        def watch(said: object) -> None:
            first = not any(isinstance(earlier, Submit) for earlier in heard)
            if first and isinstance(said, Submit):
                os.kill(cluster.engines["d0"].pid, signal.SIGSTOP)
            heard.append(said)

        served = cluster.serve(asked, [watch], stall_s=0.6, max_attempts=100)
    assert served.tokens == serve(ONE, asked, kv_blocks=400).tokens
    errors = [said.error for said in heard if isinstance(said, Retried)]
    assert errors
    assert all("it had a plan and said nothing for" in error for error in errors)


def test_a_process_that_waits_for_kv_is_not_taken_for_one_that_hangs():
    """Its plan only imports; the heartbeat tells it from a process that computes for ever."""
    engine = ProcessEngine(spec("d0"))
    with ExecutorAPI({"d0": engine}) as api:
        api.submit_plan(awaiting_plan())
        beats = 0
        while beats < 3:
            before_s = engine.silent_s
            assert api.poll(1.0) == []
            beats += engine.silent_s < before_s
        assert api.status("d0").plan_id == "p"
        assert not api.status("d0").error


def awaiting_plan():
    import msgspec

    from sagec.runtime.plan import Chunks, Decodes, Moves
    from tests.direct_planner import table

    return msgspec.structs.replace(
        run_plan(on="d0"),
        peers=("p0",),
        chunks=Chunks(),
        imports=table(Moves, [(0, 0, 3)]),
        decodes=table(Decodes, [(0, 0, 9)]),
    )


def test_an_instance_that_is_made_again_takes_no_plan_before_it_is_up():
    asked = requests(3, generate=6, every_us=0)
    told = []
    with Cluster(ONE) as cluster:

        def watch(said: object) -> None:
            if isinstance(said, Restarting | Joined | Planned):
                told.append(type(said))
                assert not isinstance(said, Joined) or cluster.engines["x0"].is_up

        cluster.serve(asked, [KillAt(cluster, "x0", 1), watch])
    assert told.index(Restarting) + 1 == told.index(Joined)


# Consumers that stop asking.


def test_a_consumer_that_stops_asking_stops_the_service_within_a_horizon():
    planner = DirectPlanner(horizon=8)
    plans, steps = [], Counter()

    def watch(said: object) -> None:
        if isinstance(said, Submit):
            plans.append(said.plan)
        elif isinstance(said, StepReport):
            steps[said.plan_id] += 1

    engine = ProcessEngine(spec("x0", kv_blocks=400))
    with ExecutorAPI({"x0": engine}, watch=[watch]) as api:
        outputs = api.serve(requests(4, generate=200, every_us=0), create("fifo"), planner)
        assert isinstance(next(outputs), Token)
        last = plans[-1]
        ended = False
        while not ended:  # nobody asks for outputs; what the instance says is only looked at
            events = api.poll(1.0)
            ended = any(isinstance(e, PlanDone) and e.plan_id == last.plan_id for e in events)
        assert plans[-1] is last
        assert steps[last.plan_id] <= last.num_steps
        assert api.poll(0.0) == []
        assert engine.silent_s == 0.0


def test_the_books_of_a_process_are_checked_in_it():
    engine = ProcessEngine(spec("x0"))
    engine.capability()
    engine.check_integrity()
    engine.kill("a test")
    with pytest.raises(EngineError, match=r"was killed by SIGKILL: a test"):
        engine.check_integrity()
    engine.close()
