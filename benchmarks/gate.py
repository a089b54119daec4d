"""Whether a change made serving worse: figures of fixed workloads beside a stored baseline.

    python benchmarks/gate.py --report out/gate.md      # what no machine changes: simulated
    python benchmarks/gate.py --timed                   # and rounds, as ratios within this run
    python benchmarks/gate.py --write-baseline          # after a change that is meant

Workloads lie in benchmarks/gate, and are made up once from a seed. What is simulated is the same on
every machine, to the last digit. A time is only ever compared with another time of the same run.
thresholds.toml says of each figure which way is better, and by what share it may be worse. The exit
code is 1 where a figure is worse than that, 2 where baseline and figures do not fit each other.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables
from round import CLUSTERS, measure_round

from sagec.compiler import Compiler
from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.passes.topology import topology_of
from sagec.runtime.roofline import Device, Link
from sagec.simulation import simulate

HOME = Path(__file__).parent / "gate"
WORKLOADS = ("hybrid", "apart")
BASELINE, THRESHOLDS = HOME / "baseline.json", HOME / "thresholds.toml"

REQUESTS = 240
TURNS_KEPT = 3
"""How many of a conversation's turns its next prompt begins with."""


TIMED = "direct_round_share"
"""What only a timed run has."""


class GateError(ValueError):
    """Baseline, thresholds and figures that do not fit each other; says which."""


@dataclass(frozen=True)
class Threshold:
    """better: "higher" or "lower". worse_by: the share by which a figure may be worse."""

    better: str
    worse_by: float

    def is_kept(self, before: float, now: float) -> bool:
        """Whether a figure is not worse than it may be.

        >>> Threshold("lower", 0.1).is_kept(before=10.0, now=10.9)
        True
        >>> Threshold("higher", 0.0).is_kept(before=10.0, now=9.9)
        False
        """
        slack = abs(before) * self.worse_by + 1e-9
        return now <= before + slack if self.better == "lower" else now >= before - slack


def sessions(count: int = REQUESTS, seed: int = 11) -> list[dict[str, Any]]:
    """Conversations, as lines of a trace: each turn's prompt begins with those before it."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    open_turns: list[list[int]] = []
    now_ms = 0.0
    for number in range(count):
        now_ms += draw.expovariate(1 / 160)
        before = draw.choice(open_turns) if open_turns and draw.random() < 0.5 else []
        blocks = [*before, *(1000 * number + part for part in range(draw.randint(1, 4)))]
        open_turns = [*open_turns[-40:], blocks] if len(blocks) < 12 else open_turns
        length = 512 * len(blocks) + draw.randint(1, 400)
        output = draw.randint(8, 200)
        rows.append({"timestamp": round(now_ms), "input_length": length,
                     "output_length": output, "hash_ids": blocks})  # fmt: skip
    return rows


# Figures


def simulated(workload: str) -> dict[str, float]:
    """What one workload came to."""
    compiler = Compiler()
    unit = compiler.read(str(HOME / f"{workload}.sage"))
    requests = unit.requests(counted=True)
    planner = compiler.planner(unit.module)
    run = simulate(unit.module, requests, unit.make_strategy(), planner)
    total = run.figures()
    devices = sum(len(one.devices) for one in topology_of(unit.module).instances)
    tokens = sum(report.output_tokens for report in run.reports)
    times = {
        f"{kind}_{quantile}_ms": total[f"{kind}_ms"][quantile]
        for kind in ("ttft", "tpot")
        for quantile in ("p50", "p95")
    }
    return {
        **times,
        "served_well": total["served_well"] / len(requests),
        "kv_hit_rate": total["kv_hit_rate"],
        "mfu": total["mfu"],
        "device_s_per_1000_tokens": round(1000 * devices * run.duration_s / tokens, 6),
        "rounds_per_request": round(total["rounds"] / len(requests), 6),
    }


def communication() -> dict[str, float]:
    """Of a step over two ranks, the share of its time that goes by in messages."""
    model = topology_of(Compiler().read(str(HOME / "hybrid.sage")).module).models["llama-8b"]
    parallel = Parallel(tp=2, devices=("g0", "g1"))
    device, link = Device(3.12e14, 2.04e12), Link(3e11, 2.0)
    builder = ExecutionGraphBuilder(model, parallel, Hardware.uniform(parallel, device, link))
    graphs = {
        "prefill": builder.build_prefill_graph([(0, 2048)]),
        "decode": builder.build_decode_graph([1000] * 64),
    }
    figures = {}
    for phase, graph in graphs.items():
        messages = sum(n.estimated_us for n in graph.nodes if n.op.name in MESSAGES)
        figures[f"{phase}_message_share"] = round(messages / graph.makespan_us(), 6)
    return figures


MESSAGES = ("exec.all_reduce", "exec.all_gather", "exec.reduce_scatter")


def figures() -> dict[str, float]:
    """All that no machine changes, by workload and name."""
    found = {f"{name}.{key}": v for name in WORKLOADS for key, v in simulated(name).items()}
    return found | {f"tp2.{key}": value for key, value in communication().items()}


def timed() -> dict[str, float]:
    """Round latencies: the direct planner's, as a share of the compiler's in the same run."""
    found = {}
    for cluster in CLUSTERS:
        one = measure_round(cluster, residents=64, waiting=4, rounds=60)
        found[f"{cluster}.direct_round_share"] = round(one.direct_cpu_us / one.cpu_median_us, 4)
    return found


# Comparing


@dataclass(frozen=True)
class Comparison:
    """A figure beside its baseline."""

    name: str
    before: float
    now: float
    threshold: Threshold

    @property
    def is_kept(self) -> bool:
        """Whether it is not worse than it may be."""
        return self.threshold.is_kept(self.before, self.now)

    def row(self) -> list[object]:
        """Its line of the report."""
        change = (self.now - self.before) / self.before if self.before else 0.0
        told = "kept" if self.is_kept else "WORSE"
        may = f"{self.threshold.better}, {self.threshold.worse_by:.1%}"
        return [self.name, f"{self.before:g}", f"{self.now:g}", f"{change:+.2%}", may, told]


def thresholds() -> dict[str, Threshold]:
    """By the last part of a figure's name. Raises GateError."""
    try:
        said = tomllib.loads(THRESHOLDS.read_text("utf-8"))
        found = {name: Threshold(**fields) for name, fields in said.items()}
    except (OSError, TypeError, tomllib.TOMLDecodeError) as error:
        raise GateError(f"{THRESHOLDS}: {error}") from None
    for name, one in found.items():
        if one.better not in ("higher", "lower") or not isinstance(one.worse_by, int | float):
            raise GateError(f"{THRESHOLDS}: {name}: {one}; better is higher or lower, worse_by "
                            "a number")  # fmt: skip
    return found


def baseline() -> dict[str, float]:
    """The figures that are stored. Raises GateError."""
    try:
        found = json.loads(BASELINE.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise GateError(f"{BASELINE}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, int | float) for v in found.values()):
        raise GateError(f"{BASELINE}: figures by name are wanted")
    return found


def compared(before: Mapping[str, float], now: Mapping[str, float]) -> list[Comparison]:
    """Each figure beside its baseline. Raises GateError where one of them is missing."""
    limits = thresholds()
    if missing := sorted(before.keys() ^ now.keys()):
        raise GateError(
            f"{missing[0]} is in {'the baseline' if missing[0] in before else 'this run'} alone; "
            "--write-baseline after a change that is meant"
        )
    kinds = {name: name.rpartition(".")[2] for name in now}
    if unknown := sorted(set(kinds.values()) - limits.keys()):
        raise GateError(f"{THRESHOLDS}: nothing about {unknown[0]}")
    return [Comparison(name, before[name], now[name], limits[kinds[name]]) for name in sorted(now)]


def report(comparisons: list[Comparison]) -> str:
    """The comparison as Markdown."""
    worse = [one.name for one in comparisons if not one.is_kept]
    verdict = f"{len(worse)} of {len(comparisons)} figures are worse: {', '.join(worse)}"
    heads = ["figure", "baseline", "now", "change", "better is; may be worse by", ""]
    return "\n".join(
        [
            "# Gate",
            "",
            verdict if worse else f"None of {len(comparisons)} figures is worse than it may be.",
            "",
            tables.table_of(heads, [one.row() for one in comparisons]),
            "",
        ]
    )


def main() -> int:
    """Run, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--report", metavar="MD", type=Path, help="write the comparison here")
    parser.add_argument("--timed", action="store_true", help="round latencies too, as ratios")
    parser.add_argument("--write-baseline", action="store_true", help="these figures are right")
    args = parser.parse_args()
    if args.write_baseline:
        lines = map(json.dumps, sessions())
        (HOME / "sessions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    now = figures() | (timed() if args.timed or args.write_baseline else {})
    if args.write_baseline:
        BASELINE.write_text(json.dumps(now, indent=2) + "\n", "utf-8")
        print(f"{BASELINE}: {len(now)} figures")
        return 0
    try:
        before = baseline()
        if not args.timed:
            before = {name: value for name, value in before.items() if TIMED not in name}
        comparisons = compared(before, now)
    except GateError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    text = report(comparisons)
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(text, "utf-8")
    print(text)
    return 0 if all(one.is_kept for one in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
