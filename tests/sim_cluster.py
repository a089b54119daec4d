"""Clusters of simulated instances on a virtual clock, and what serving on them gave."""

from sagec.runtime.clock import VirtualClock
from sagec.runtime.cost import StepCost
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim import SimEngine
from sagec.runtime.engines.sim.cluster import SimCluster
from sagec.runtime.engines.sim.network import Network, Route
from sagec.runtime.engines.sim.outages import Outage
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.recording import Recorder
from sagec.runtime.recording.entries import Header
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import WIDE, Served, requests

COST = StepCost(
    flops_per_token=2e9,
    flops_per_pair=1e5,
    weight_bytes=2e9,
    kv_bytes_per_token=1e5,
    flops_per_s=1e13,
    bytes_per_s=1e12,
    overhead_us=50.0,
)


def sim_spec(name: str, kv_blocks: int = 40, block_tokens: int = 16, **options) -> InstanceSpec:
    return InstanceSpec(
        id=name,
        engine="sim",
        model="",
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        options={**COST.to_options(), **options},
    )


def sim_executor(roles, served: Served, kv_blocks: int = 40, **options) -> ExecutorAPI:
    engines = {
        name: SimEngine(sim_spec(name, kv_blocks, **options), served.clock) for name in roles
    }
    members = [
        Instance(id=n, role=role, engine="sim", capability=engines[n].capability(), cost=COST)
        for n, role in roles.items()
    ]
    return ExecutorAPI(engines, members, served.clock, watch=[served.hear, served.timeline.hear])


def simulate(roles, asked, planner=None, strategy="fifo", kv_blocks: int = 40, **options) -> Served:
    """Serve under a virtual clock; afterwards no instance holds anything."""
    served = Served()
    executor = sim_executor(roles, served, kv_blocks, **options)
    served.take(executor.serve(asked, create(strategy), planner or DirectPlanner()))
    for engine in executor.engines.values():
        engine.check_integrity()
        assert engine.kv_blocks_used() == 0
    return served


def cluster_run(
    roles, asked, network=None, outages=(), strategy="fifo", watch=(), **options
) -> Served:
    """Serve on instances that share links and fail on a schedule; nobody is left holding blocks."""
    served = Served()
    specs = [sim_spec(name, **options) for name in roles]
    cluster = SimCluster(specs, served.clock, network, outages)
    members = [
        Instance(
            id=name,
            role=role,
            engine="sim",
            capability=cluster.engines[name].capability(),
            cost=COST,
        )
        for name, role in roles.items()
    ]
    watch = [served.hear, served.timeline.hear, *watch]
    executor = ExecutorAPI(
        cluster.engines, members, served.clock, watch=watch, restart=cluster.restart
    )
    served.take(executor.serve(asked, create(strategy), DirectPlanner()))
    executor.check_integrity()
    return served


def record(path: str) -> None:
    """Record a run with shared links, failures and prefix caches to a file."""
    links = {"d0": 1e9, "d1": 1e9}
    routes = {(p, d): Route((d,), 3.0) for p in ("p0", "p1") for d in links}
    outages = [
        Outage(instance="p1", fail_at_us=9_000, back_at_us=30_000),
        Outage(instance="d0", fail_at_us=15_000, back_at_us=20_000),
    ]
    clock = VirtualClock()
    header = Header(strategy="slo-aware")
    with Recorder(path, header, clock, name="same") as recorder:
        cluster_run(
            WIDE,
            requests(30),
            Network(links, routes),
            outages,
            "slo-aware",
            [recorder.hear],
            prefix_cache="on",
        )
