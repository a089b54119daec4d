"""A workload served in simulated time, and what it came to: figures, series and plots."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from xdsl.dialects.builtin import ModuleOp

from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import Topology, topology_of
from sagec.planner import DirectFirstPlanner, member_of, put_on
from sagec.runtime import native
from sagec.runtime.clock import VirtualClock
from sagec.runtime.compiled import Unbuilt
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim.cluster import SimCluster
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.engines.sim.outages import Outage
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planner
from sagec.runtime.meter import Meter, mean_over, share_over
from sagec.runtime.report import RequestReport, was_served_well
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import Strategy

Floats = npt.NDArray[np.float64]

BINS = 120
"""Points of a series over time."""

QUANTILES = (50, 90, 95, 99)

CORES = ("auto", "python", "native")
"""What simulates: the loop of real engines, the same in C++, or that where it can."""

WORTH_COMPILING = 1000
"""Requests from which on the native core is built where it is not there."""

WELL = (FinishReason.STOP, FinishReason.LENGTH)


def simulate(
    module: ModuleOp,
    requests: Sequence[Request],
    strategy: Strategy,
    planner: Planner,
    outages: Sequence[Outage] = (),
    core: str = "auto",
) -> Simulated:
    """Serve the requests on the module's instances, each of them simulated.

    The module's instances become simulated ones: what they compute is what the cost model says,
    and their KV shares the cluster's links. core: one of CORES; all say the same. Raises
    EngineError where an instance cannot be simulated, OutageError where the schedule of failures
    makes no sense; and for the native core NotCovered, and Unbuilt where there is no compiler.
    """
    if core not in CORES:
        raise ValueError(f"no core {core!r}; there are: {', '.join(CORES)}")
    caches = {placed.name: cache_options(placed) for placed in topology_of(module).instances}
    put_on(module, "sim")
    topology = topology_of(module)
    specs = [simulated_spec(placed, caches[placed.name]) for placed in topology.instances]
    cluster = SimCluster(specs, VirtualClock(), Network.of(topology), outages)
    members = [member_of(placed, cluster.engines[placed.name]) for placed in topology.instances]
    asked = _Asked(requests, strategy, planner, members, cluster)
    served = None if core == "python" else _natively(asked, must=core == "native")
    ended, meter, wall_s = served or _in_python(asked)
    return Simulated(
        topology=topology,
        strategy=strategy.name,
        requests={request.id: request for request in requests},
        ended=ended,
        meter=meter,
        wall_s=wall_s,
        core="python" if served is None else "native",
    )


class _Asked(NamedTuple):
    """A run to be simulated."""

    requests: Sequence[Request]
    strategy: Strategy
    planner: Planner
    members: Sequence[Instance]
    cluster: SimCluster


_Served = tuple[list[Finished], Meter, float]
"""Ends, what was used, and how long it took to simulate."""


def _natively(asked: _Asked, must: bool) -> _Served | None:
    """The run in C++; None where it is not for that, unless it must be.

    A few requests do not wait for a compiler.
    """
    if not must and len(asked.requests) < WORTH_COMPILING and not native.is_built():
        return None
    try:
        if asked.cluster.outages:
            raise native.NotCovered("instances that fail")
        served = native.serve(
            asked.requests,
            asked.strategy,
            asked.planner,
            asked.planner.direct if isinstance(asked.planner, DirectFirstPlanner) else None,
            asked.cluster.specs,
            asked.members,
            asked.cluster.network,
        )
    except (native.NotCovered, Unbuilt):
        if must:
            raise
        return None
    return served.ended, served.meter, served.wall_s


def _in_python(asked: _Asked) -> _Served:
    cluster, meter = asked.cluster, Meter([spec.id for spec in asked.cluster.specs])
    executor = ExecutorAPI(
        cluster.engines, asked.members, cluster.clock, watch=[meter.hear], restart=cluster.restart
    )
    begin_s = time.perf_counter()
    outputs = executor.serve(asked.requests, asked.strategy, asked.planner)
    ended = [output for output in outputs if isinstance(output, Finished)]
    return ended, meter, time.perf_counter() - begin_s


def simulated_spec(placed: Placed, more: dict[str, str]) -> InstanceSpec:
    """What it takes to simulate an instance of the file."""
    return InstanceSpec(
        id=placed.name,
        engine="sim",
        model="",
        kv_blocks=placed.kv_blocks,
        block_tokens=placed.block_tokens,
        options=placed.cost.to_options() | {"round_us": repr(placed.round_us)} | more,
    )


def cache_options(placed: Placed) -> dict[str, str]:
    """How the instance's own engine caches prefixes, for the simulated one to do the same."""
    said = dict(word.partition("=")[::2] for word in placed.options.split())
    if placed.engine == "sim":
        return said
    cached = said.get("prefix_cache", "on")
    return {"prefix_cache": cached} | {n: said[n] for n in ("eviction",) if n in said}


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What a simulation came to. wall_s: how long it took to simulate, core: who did; all else is
    simulated."""

    topology: Topology
    strategy: str
    requests: dict[str, Request]
    ended: Sequence[Finished]
    meter: Meter
    wall_s: float
    core: str = "python"

    @functools.cached_property
    def reports(self) -> list[RequestReport]:
        """Of the requests, in the order in which they ended."""
        return [output.report for output in self.ended]

    @functools.cached_property
    def span_us(self) -> tuple[int, int]:
        """From the first arrival to the last end."""
        begin_us = min((report.arrival_us for report in self.reports), default=0)
        return begin_us, max((report.end_us for report in self.reports), default=0)

    @property
    def duration_s(self) -> float:
        """Of the serving that was simulated."""
        begin_us, end_us = self.span_us
        return (end_us - begin_us) / 1e6

    @functools.cached_property
    def served_well(self) -> int:
        """Requests that got their whole answer, as early as they were promised it."""
        return sum(was_served_well(r, self.requests[r.request_id]) for r in self.reports)

    def figures(self) -> dict[str, Any]:
        """The sums of the run; times in milliseconds, rates a second of simulated time."""
        uses = self.meter.instances.values()
        duration_s = self.duration_s or 1.0
        output = sum(report.output_tokens for report in self.reports)
        reused = sum(use.reused_tokens for use in uses)
        prompt = sum(use.prompt_tokens for use in uses)
        return {
            "strategy": self.strategy,
            "requests": len(self.reports),
            "served": sum(report.reason in WELL for report in self.reports),
            "served_well": self.served_well,
            "duration_s": round(self.duration_s, 6),
            "requests_per_s": round(len(self.reports) / duration_s, 4),
            "goodput_per_s": round(self.served_well / duration_s, 4),
            "output_tokens_per_s": round(output / duration_s, 2),
            "ttft_ms": quantiles_ms([report.ttft_us for report in self.reports]),
            "tpot_ms": quantiles_ms([report.tpot_us for report in self.reports]),
            "e2e_ms": quantiles_ms([r.end_us - r.arrival_us for r in self.reports]),
            "queue_ms": quantiles_ms([report.queue_us for report in self.reports]),
            "kv_hit_rate": round(reused / (reused + prompt), 6) if reused + prompt else 0.0,
            "mfu": round(self.mfu(), 6),
            "preemptions": sum(report.preemptions for report in self.reports),
            "restarts": sum(report.attempts for report in self.reports),
            "rounds": len(self.meter.rounds_us),
            "steps": sum(use.steps for use in uses),
            "kv_moves": len(self.meter.moves),
            "kv_moved_bytes": sum(move.num_bytes for move in self.meter.moves),
        }

    def mfu(self) -> float:
        """Of the arithmetic that all devices could have done, what the model's tokens needed."""
        could = sum(self._peak_flops_per_s(name) for name in self.meter.instances) * self.duration_s
        return sum(map(self._flops, self.meter.instances)) / could if could else 0.0

    def instances(self) -> list[dict[str, Any]]:
        """A row an instance."""
        rows = []
        duration_us = max(1.0, 1e6 * self.duration_s)
        for name, use in self.meter.instances.items():
            placed = self.topology.by_name[name]
            could = self._peak_flops_per_s(name) * self.duration_s
            rows.append(
                {
                    "instance": name,
                    "role": placed.role,
                    "steps": use.steps,
                    "prompt_tokens": use.prompt_tokens,
                    "reused_tokens": use.reused_tokens,
                    "decode_tokens": use.decode_tokens,
                    "busy": round(use.busy_us / duration_us, 4),
                    "mfu": round(self._flops(name) / could, 6) if could else 0.0,
                    "kv_hit_rate": round(use.kv_hit_rate, 4),
                    "kv_peak": round(max(use.kv_blocks, default=0) / placed.kv_blocks, 4),
                    "kv_sent_bytes": use.sent_bytes,
                }
            )
        return rows

    def links(self) -> list[dict[str, Any]]:
        """A row for each direction of a link that KV went over: bytes, and its mean use of the
        bandwidth."""
        rows = []
        for name, moves in self._moves_by_link().items():
            num_bytes = sum(move.num_bytes for move, _ in moves)
            could = moves[0][1] * (self.duration_s or 1.0)
            row = {"link": name, "moves": len(moves), "bytes": num_bytes}
            rows.append({**row, "use": round(num_bytes / could, 6)})
        return rows

    def series(self, bins: int = BINS) -> dict[str, dict[str, list[float]]]:
        """Figures over time, each a list of `bins` means, and the times at which they stand (s).

        queue: requests that wait, and that run. kv: share of each instance's blocks. links:
        hand-overs under way on each link.
        """
        meter, (begin_us, end_us) = self.meter, self.span_us
        over = functools.partial(mean_over, begin_us=begin_us, end_us=end_us, bins=bins)
        queue = {
            "waiting": over(meter.rounds_us, meter.waiting),
            "running": over(meter.rounds_us, meter.running),
        }
        kv = {
            name: over(use.ends_us, use.kv_blocks) / self.topology.by_name[name].kv_blocks
            for name, use in meter.instances.items()
        }
        links = {
            name: share_over([(m.begin_us, m.end_us) for m, _ in moves], begin_us, end_us, bins)
            for name, moves in self._moves_by_link().items()
        }
        middles = (np.arange(bins) + 0.5) * (end_us - begin_us) / bins / 1e6
        return {
            "time_s": {"time_s": _rounded(middles)},
            **{
                kind: {name: _rounded(values) for name, values in lines.items()}
                for kind, lines in (("queue", queue), ("kv", kv), ("links", links))
            },
        }

    def _moves_by_link(self) -> dict[str, list[tuple[Any, float]]]:
        """The moves over each direction of a link, each with the link's bandwidth."""
        found: dict[str, list[tuple[Any, float]]] = defaultdict(list)
        by_name = self.topology.by_name
        for move in self.meter.moves:
            path = self.topology.path(by_name[move.source], by_name[move.target])
            if path is not None:
                for here, there, link in zip(
                    path.places, path.places[1:], path.links, strict=False
                ):
                    found[f"{here} to {there}"].append((move, link.bytes_per_s))
        return dict(found)

    def _flops(self, name: str) -> float:
        use, model = self.meter.instances[name], self.topology.by_name[name].model
        flops = use.tokens * model.flops_per_token + use.pairs * model.flops_per_pair
        return flops + use.sampled_tokens * model.head_flops_per_token

    def _peak_flops_per_s(self, name: str) -> float:
        return sum(device.flops_per_s for device in self.topology.by_name[name].devices)


def quantiles_ms(values_us: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and quantiles, in milliseconds; None where there are no values.

    >>> quantiles_ms([1000, None, 3000])["p50"]
    2.0
    """
    present = [value for value in values_us if value is not None]
    if not present:
        return None
    found = np.percentile(present, QUANTILES) / 1e3
    named = {f"p{q}": round(float(value), 4) for q, value in zip(QUANTILES, found, strict=True)}
    return {"mean": round(float(np.mean(present)) / 1e3, 4), **named}


def _rounded(values: Floats) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
