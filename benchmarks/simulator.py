"""How many requests a second the simulator serves, and what a request costs where.

    taskset -c 0 python benchmarks/simulator.py --out out

Requests of ../shared/traces (where these are missing, made-up ones, and says so) go through the
same loop, strategy and plans as on a real engine; only steps and hand-overs are the cost model's.
A request's cost falls into three parts: the strategy, the planner, and all else: loop, table,
executor and simulated engines. Times are the processor's, not the wall's, so that others on the
machine do not count. Both planners give the same plans, and so the same digest of all ends; "ir"
goes through the compiler.
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
from sagec.planner import PLANNERS, planner_of
from sagec.runtime.clock import VirtualClock
from sagec.runtime.engines import StepReport
from sagec.runtime.engines.sim.cluster import SimCluster
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planned
from sagec.runtime.strategies import create


@dataclasses.dataclass(frozen=True)
class Result:
    """A trace served once. us: of a request; reports: of steps; digest: of all ends."""

    trace: str
    strategy: str
    planner: str
    requests: int
    requests_per_s: float
    strategy_us: float
    planner_us: float
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


class Counts:
    """Rounds, reports and steps."""

    def __init__(self) -> None:
        self.rounds = self.reports = self.steps = 0

    def hear(self, said: object) -> None:
        """Listen."""
        if type(said) is StepReport:
            self.reports += 1
            self.steps += said.steps
        elif type(said) is Planned:
            self.rounds += 1


def run(workload: workloads.Workload, strategy: str, planner: str) -> Result:
    """Serve the workload, and time it."""
    module = Compiler().parse(workloads.MODEL + workload.cluster, f"{workload.name}.sage").module
    topology, clock = topology_of(module), VirtualClock()
    specs = [workloads.simulated(placed, workload.caches) for placed in topology.instances]
    cluster = SimCluster(specs, clock, Network.of(topology))
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
    counts = Counts()
    executor = ExecutorAPI(cluster.engines, members, clock, watch=[counts.hear])
    decides = Timed(create(strategy), "decide")
    plans = Timed(planner_of(module, how=planner), "plan")
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    outputs: Any = executor.serve(workload.requests, decides, plans)  # type: ignore[arg-type]
    ends = [output for output in outputs if isinstance(output, Finished)]
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    each_us = 1e6 * cpu_s / wall_s / len(ends)  # of a second of the wall that was measured
    return Result(
        trace=workload.name,
        strategy=strategy,
        planner=planner,
        requests=len(ends),
        requests_per_s=len(ends) / cpu_s,
        strategy_us=decides.spent_s * each_us,
        planner_us=plans.spent_s * each_us,
        rest_us=(wall_s - decides.spent_s - plans.spent_s) * each_us,
        rounds=counts.rounds,
        reports=counts.reports,
        steps=counts.steps,
        served_s=clock.now_us() / 1e6,
        peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        digest=hashlib.sha256(repr(ends).encode()).hexdigest()[:12],
    )


COLUMNS: dict[str, Callable[[Result], object]] = {
    "trace": lambda r: r.trace,
    "strategy": lambda r: r.strategy,
    "planner": lambda r: r.planner,
    "requests": lambda r: r.requests,
    "requests/s": lambda r: round(r.requests_per_s),
    "strategy µs": lambda r: r.strategy_us,
    "planner µs": lambda r: r.planner_us,
    "all else µs": lambda r: r.rest_us,
    "rounds": lambda r: r.rounds,
    "reports": lambda r: r.reports,
    "steps": lambda r: r.steps,
    "simulated s": lambda r: round(r.served_s),
    "peak MB": lambda r: round(r.peak_mb),
    "digest": lambda r: r.digest,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Serve each trace with each planner; print the table, write simulator.json and .md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the files")
    parser.add_argument("--limit", type=int, default=20_000, help="requests of each trace")
    parser.add_argument("--rate", type=float, default=1.0, help="how much faster than recorded")
    parser.add_argument("--strategy", default="fifo")
    parser.add_argument("--planner", action="append", choices=tuple(PLANNERS))
    args = parser.parse_args(argv)
    results, sources = [], []
    for workload in workloads.workloads(args.limit, args.rate):
        sources.append(f"{workload.name}: {workload.source}")
        results += [run(workload, args.strategy, how) for how in args.planner or ["direct"]]
    rows = [[show(result) for show in COLUMNS.values()] for result in results]
    where = tables.machine()
    head = f"# The simulator\n\n{tables.machine_line(where)} {'; '.join(sources)}."
    markdown = f"{head}\n\n{tables.table_of(list(COLUMNS), rows)}\n"
    print(markdown)
    answer = {"machine": where, "results": [dataclasses.asdict(one) for one in results]}
    tables.write(args.out, "simulator", answer, markdown, {})


if __name__ == "__main__":
    main()
