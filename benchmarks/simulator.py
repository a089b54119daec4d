"""How many requests a second the simulator serves, and what a request costs where.

    taskset -c 0 python benchmarks/simulator.py --out out

Requests of ../shared/traces (where these are missing, made-up ones, and says so) go through the
same loop, strategy and plans as on a real engine; only steps and hand-overs are the cost model's.
A request's cost falls into three parts: the strategy, the planner, and all else: loop, table,
executor and simulated engines. Times are the processor's, not the wall's, so that others on the
machine do not count. Both planners give the same plans, and so the same digest of all ends; "ir"
goes through the compiler. So does the native core, which is the direct planner, the loop and the
engines in C++: what is timed is all from requests to reports, as Python sees them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import strategies as workloads
import tables

from sagec.compiler import Compiler
from sagec.passes.topology import topology_of
from sagec.planner import PLANNERS, DirectFirstPlanner, Planner, planner_of
from sagec.runtime import native
from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines.sim.cluster import SimCluster
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance
from sagec.runtime.meter import Meter
from sagec.runtime.strategies import Strategy, create

CORES = ("python", "native")


@dataclasses.dataclass(frozen=True)
class Result:
    """A trace served once. us: of a request; reports: of steps; digest: of all ends.

    strategy_us, planner_us: None where they are not timed apart.
    """

    trace: str
    core: str
    strategy: str
    planner: str
    requests: int
    requests_per_s: float
    strategy_us: float | None
    planner_us: float | None
    rest_us: float
    rounds: int
    reports: int
    steps: int
    served_s: float
    peak_mb: float
    digest: str


class Timed:
    """Passes calls on to `inner`, and adds up what they took."""

    def __init__(self, inner: Any, method: str) -> None:
        self.spent_s, self.name = 0.0, getattr(inner, "name", "")
        self._call = getattr(inner, method)
        setattr(self, method, self._timed)

    def _timed(self, *args: Any) -> Any:
        begin_s = time.perf_counter()
        answer = self._call(*args)
        self.spent_s += time.perf_counter() - begin_s
        return answer


def run(workload: workloads.Workload, strategy: str, planner: str, core: str) -> Result:
    """Serve the workload, and time it. Raises NotCovered where the native core does not."""
    module = Compiler().parse(workloads.MODEL + workload.cluster, f"{workload.name}.sage").module
    topology = topology_of(module)
    specs = [workloads.simulated(placed, workload.caches) for placed in topology.instances]
    cluster = SimCluster(specs, VirtualClock(), Network.of(topology))
    members = [
        Instance(
            id=placed.name,
            role=placed.role,
            engine="sim",
            capability=cluster.engines[placed.name].capability(),
            model=placed.model.name,
            cost=placed.cost,
        )
        for placed in topology.instances
    ]
    serve = natively if core == "native" else in_python
    took, ends, meter, end_us = serve(
        workload, create(strategy), planner_of(module, how=planner), cluster, members
    )
    reports = sum(len(use.ends_us) for use in meter.instances.values())
    return Result(
        trace=workload.name,
        core=core,
        strategy=strategy,
        planner=planner,
        requests=len(ends),
        requests_per_s=len(ends) / took.pop("cpu_s"),
        **took,
        rounds=len(meter.rounds_us),
        reports=reports,
        steps=sum(use.steps for use in meter.instances.values()),
        served_s=end_us / 1e6,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        digest=hashlib.sha256(repr(ends).encode()).hexdigest()[:12],
    )


Served = tuple[dict[str, Any], list[Finished], Meter, int]
"""What it took, the ends, what was used, and when it was over."""


def in_python(
    workload: workloads.Workload,
    strategy: Strategy,
    planner: Planner,
    cluster: SimCluster,
    members: Sequence[Instance],
) -> Served:
    """Through the loop of real engines."""
    meter = Meter([member.id for member in members])
    executor = ExecutorAPI(cluster.engines, members, cluster.clock, watch=[meter.hear])
    decides, plans = Timed(strategy, "decide"), Timed(planner, "plan")
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    outputs: Any = executor.serve(workload.requests, decides, plans)  # type: ignore[arg-type]
    ends = [output for output in outputs if isinstance(output, Finished)]
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    each_us = 1e6 * cpu_s / wall_s / len(ends)  # of a second of the wall that was measured
    took = {
        "cpu_s": cpu_s,
        "strategy_us": decides.spent_s * each_us,
        "planner_us": plans.spent_s * each_us,
        "rest_us": (wall_s - decides.spent_s - plans.spent_s) * each_us,
    }
    return took, ends, meter, cluster.clock.now_us()


def natively(
    workload: workloads.Workload,
    strategy: Strategy,
    planner: Planner,
    cluster: SimCluster,
    members: Sequence[Instance],
) -> Served:
    """In C++; compiling it is not timed."""
    native.load()
    direct = planner.direct if isinstance(planner, DirectFirstPlanner) else None
    begin_cpu_s = time.process_time()
    served = native.serve(
        workload.requests, strategy, planner, direct, cluster.specs, members, cluster.network
    )
    cpu_s = time.process_time() - begin_cpu_s
    each_us = 1e6 * cpu_s / len(served.ended)
    took = {"cpu_s": cpu_s, "strategy_us": None, "planner_us": None, "rest_us": each_us}
    return took, served.ended, served.meter, served.end_us


COLUMNS: dict[str, Callable[[Result], object]] = {
    "trace": lambda r: r.trace,
    "core": lambda r: r.core,
    "strategy": lambda r: r.strategy,
    "planner": lambda r: r.planner,
    "requests": lambda r: r.requests,
    "requests/s": lambda r: round(r.requests_per_s),
    "strategy µs": lambda r: "-" if r.strategy_us is None else r.strategy_us,
    "planner µs": lambda r: "-" if r.planner_us is None else r.planner_us,
    "all else µs": lambda r: r.rest_us,
    "rounds": lambda r: r.rounds,
    "reports": lambda r: r.reports,
    "steps": lambda r: r.steps,
    "simulated s": lambda r: round(r.served_s),
    "peak MB": lambda r: round(r.peak_mb),
    "digest": lambda r: r.digest,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve each trace with each core and planner; print the table, write simulator.json, .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the files")
    parser.add_argument("--limit", type=int, default=20_000, help="requests of each trace")
    parser.add_argument("--rate", type=float, default=1.0, help="how much faster than recorded")
    parser.add_argument("--strategy", default="fifo")
    parser.add_argument("--planner", action="append", choices=tuple(PLANNERS), help="again: both")
    parser.add_argument("--core", action="append", choices=CORES, help="one of both; again: both")
    args = parser.parse_args(argv)
    results, sources = [], []
    for workload in workloads.workloads(args.limit, args.rate):
        sources.append(f"{workload.name}: {workload.source}")
        for core in args.core or CORES:
            hows = ["direct"] if core == "native" else args.planner or ["direct"]
            results += [run(workload, args.strategy, how, core) for how in hows]
    rows = [[show(result) for show in COLUMNS.values()] for result in results]
    where = tables.machine()
    head = f"# The simulator\n\n{tables.machine_line(where)} {'; '.join(sources)}."
    markdown = f"{head}\n\n{tables.table_of(list(COLUMNS), rows)}\n"
    print(markdown)
    answer = {"machine": where, "results": [dataclasses.asdict(one) for one in results]}
    tables.write(args.out, "simulator", answer, markdown, {})


if __name__ == "__main__":
    main()
