"""Clusters of simulated instances on a virtual clock, and what serving on them gave."""

from sagec.runtime.cost import StepCost
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim import SimEngine
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.strategies import create
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import Served

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
    costs = {field: repr(getattr(COST, field)) for field in COST.__dataclass_fields__}
    return InstanceSpec(
        id=name,
        engine="sim",
        model="",
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        options={**costs, **options},
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
