"""Every strategy on recorded workloads, in simulated time, and on the torch engine in real time.

    taskset -c 0 python benchmarks/strategies.py --out out

The simulated part serves requests of ../shared/traces (where these are missing, made-up ones, and
says so) through the loop, the strategy, the compiler and simulated engines: only the time of a
step is the cost model's. 60% of the requests are interactive: they are promised a first token and
a time between tokens; the others are promised nothing. Goodput counts interactive requests whose
promises were kept, and batch requests that were served. Fairness is Jain's index over tenants of
the tokens a second that their requests got. The real part serves short requests on the small model.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables

from sagec import charts
from sagec.compiler import Compiler
from sagec.language.traces import Recorded, read_trace
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.runtime import strategies
from sagec.runtime.clock import Clock, VirtualClock, WallClock
from sagec.runtime.engines import Engine, InstanceSpec, StepReport
from sagec.runtime.engines import create as create_engine
from sagec.runtime.engines.sim import SimEngine
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planned
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request

ROOT = Path(__file__).parent.parent
TRACES = ROOT.parent / "shared" / "traces"

MODEL = """
model llama8b { layers 32 hidden 4096 heads 32 kv_heads 8 head_dim 128 ffn 14336 vocab 128256 }
"""
HYBRID = """
cluster c {
  devices g0..g1 kind a100
  instances i0..i1 role both on g0..g1 engine sim model llama8b kv_blocks 20000 block 16 budget 2048
}
serve on c mode hybrid chunk 512 horizon 64 { request "any" tokens 1 generate 1 }
"""
APART = """
cluster c {
  devices g0..g3 kind h100
  links g0..g1 to g2..g3 bandwidth 50GB/s latency 10us
  instances p0..p1 role prefill on g0..g1 engine sim model llama8b kv_blocks 800 block 512
  instances d0..d1 role decode on g2..g3 engine sim model llama8b kv_blocks 800 block 512
}
serve on c mode strict chunk 4096 horizon 64 { request "any" tokens 1 generate 1 }
"""
TENANTS = ("a", "b", "c", "d")
SHARES = (0.55, 0.25, 0.15, 0.05)
"""Of the tenants in the requests."""

TTFT_US, TTFT_US_PER_TOKEN, TPOT_US = 300_000, 300, 60_000
"""What interactive requests are promised: the first token sooner where the prompt is short."""


Run = Callable[[str], "Result"]
"""Serves a workload with the strategy of that name."""


@dataclass(frozen=True)
class Workload:
    """Requests, the cluster that serves them, and where they come from."""

    name: str
    source: str
    cluster: str
    requests: list[Request]
    caches: bool = False


@dataclass(frozen=True)
class Result:
    """What a strategy made of a workload. Times are ms; rates are per second of served time."""

    workload: str
    strategy: str
    requests: int
    served: int
    goodput_per_s: float
    kept: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    fairness: float
    preemptions: int
    hit_rate: float
    rounds: int
    served_s: float
    wall_s: float
    requests_per_wall_s: float


RATES = {"azure": 8.0, "mooncake": 3.0}
"""How much faster than recorded requests come: a little more than the clusters above can take."""


def workloads(limit: int, rate: float | None) -> list[Workload]:
    """Azure's conversations on two instances, Mooncake's on prefill and decode apart."""
    azure, azure_source = recorded("azure/AzureLLMInferenceTrace_conv.csv", limit, made_up_chats)
    mooncake, mooncake_source = recorded("mooncake/synthetic_trace.jsonl", limit, made_up_sessions)
    return [
        Workload("azure", azure_source, HYBRID, asked(azure, rate or RATES["azure"], 0)),
        Workload(
            "mooncake",
            mooncake_source,
            APART,
            asked(mooncake, rate or RATES["mooncake"], 1),
            caches=True,
        ),
    ]


def recorded(
    name: str, limit: int, otherwise: Callable[[int], list[Recorded]]
) -> tuple[list[Recorded], str]:
    """The first requests of a trace, or others like them; and which of the two they are."""
    path = TRACES / name
    if path.is_file():
        return read_trace(path, limit), name
    return otherwise(limit), f"made up, for there is no {path}"


def made_up_chats(limit: int) -> list[Recorded]:
    """Chats of about the lengths of Azure's, five a second."""
    draw = np.random.default_rng(7)
    arrivals = (draw.exponential(0.2, limit).cumsum() * 1e6).astype(int).tolist()
    prompts = draw.lognormal(6.6, 1.0, limit).clip(4, 8000).astype(int).tolist()
    outputs = draw.lognormal(4.9, 0.9, limit).clip(1, 1000).astype(int).tolist()
    return [Recorded(*row) for row in zip(arrivals, prompts, outputs, strict=True)]


def made_up_sessions(limit: int) -> list[Recorded]:
    """Long prompts, half of which go on where an earlier one ended."""
    draw = random.Random(7)
    rows: list[Recorded] = []
    for i in range(limit):
        before = draw.choice(rows).blocks if rows and draw.random() < 0.5 else ()
        blocks = (*before, *(100 * i + k for k in range(draw.randint(2, 20))))[:200]
        tokens = 512 * len(blocks) + draw.randint(1, 500)
        rows.append(Recorded(i * 900_000, tokens, draw.randint(5, 300), blocks))
    return rows


def asked(rows: Sequence[Recorded], rate: float, seed: int) -> list[Request]:
    """Requests of these lengths; tenants, promises and priorities are drawn."""
    draw = random.Random(seed)
    requests = []
    for i, row in enumerate(rows):
        interactive = draw.random() < 0.6
        requests.append(
            Request(
                id=f"r{i}",
                prompt=range(row.prompt_tokens),  # type: ignore[arg-type]  # of simulated engines
                max_output_tokens=row.output_tokens,
                arrival_us=round(row.arrival_us / rate),
                tenant=draw.choices(TENANTS, SHARES)[0],
                priority=0 if interactive else 1,
                ttft_us=TTFT_US + TTFT_US_PER_TOKEN * row.prompt_tokens if interactive else None,
                tpot_us=TPOT_US if interactive else None,
                block_hashes=row.blocks[: row.prompt_tokens // 512],
            )
        )
    return requests


# Serving


class Counts:
    """Rounds, prompt tokens and those of them that were cached."""

    def __init__(self) -> None:
        self.rounds = self.computed = self.reused = 0

    def hear(self, said: object) -> None:
        """Listen."""
        if isinstance(said, Planned):
            self.rounds += 1
        elif isinstance(said, StepReport):
            self.computed += sum(end - begin for _, begin, end in said.chunks)
            self.reused += sum(tokens for _, tokens in said.reused)


def simulate(workload: Workload, strategy: str) -> Result:
    """Serve the workload in simulated time."""
    compiler = Compiler()
    module = compiler.parse(MODEL + workload.cluster, f"{workload.name}.sage").module
    placed, clock = topology_of(module).instances, VirtualClock()
    engines: dict[str, Engine] = {
        p.name: SimEngine(simulated(p, workload.caches), clock) for p in placed
    }
    return serve(workload, strategy, engines, placed, compiler.planner(module), clock)


def simulated(placed: Placed, caches: bool) -> InstanceSpec:
    """A simulated instance of what the file describes."""
    return InstanceSpec(
        id=placed.name,
        engine="sim",
        model="",
        kv_blocks=placed.kv_blocks,
        block_tokens=placed.block_tokens,
        options={**placed.cost.to_options(), "prefix_cache": "on" if caches else "off"},
    )


def serve(
    workload: Workload,
    strategy: str,
    engines: dict[str, Engine],
    placed: Sequence[Placed],
    planner: Any,
    clock: Clock,
) -> Result:
    """Serve the workload on these engines; what came of it."""
    members = [
        Instance(
            id=p.name,
            role=p.role,
            engine=p.engine,
            capability=engines[p.name].capability(),
            model=p.model.name,
            cost=p.cost,
        )
        for p in placed
    ]
    counts = Counts()
    executor = ExecutorAPI(engines, members, clock, watch=[counts.hear])
    begin_s, begin_us = time.perf_counter(), clock.now_us()
    outputs = executor.serve(workload.requests, strategies.create(strategy), planner)
    ends = [output for output in outputs if isinstance(output, Finished)]
    wall_s = time.perf_counter() - begin_s
    served_s = (clock.now_us() - begin_us) / 1e6
    return result(workload, strategy, ends, counts, served_s, wall_s)


def result(
    workload: Workload,
    strategy: str,
    ends: Sequence[Finished],
    counts: Counts,
    served_s: float,
    wall_s: float,
) -> Result:
    """The figures of a run."""
    asked = {request.id: request for request in workload.requests}
    reports = [end.report for end in ends]
    done = [r for r in reports if r.reason in (FinishReason.LENGTH, FinishReason.STOP)]
    promised = [r for r in reports if asked[r.request_id].ttft_us]
    kept = [r for r in promised if was_kept(r, asked[r.request_id])]
    good = len(kept) + sum(asked[r.request_id].ttft_us is None for r in done)
    ttft = [r.ttft_us for r in done if r.ttft_us is not None]
    tpot = [r.tpot_us for r in done if r.tpot_us is not None]
    return Result(
        workload=workload.name,
        strategy=strategy,
        requests=len(reports),
        served=len(done),
        goodput_per_s=good / served_s,
        kept=len(kept) / max(1, len(promised)),
        ttft_p50_ms=percentile_ms(ttft, 50),
        ttft_p99_ms=percentile_ms(ttft, 99),
        tpot_p50_ms=percentile_ms(tpot, 50),
        tpot_p99_ms=percentile_ms(tpot, 99),
        fairness=fairness(done, asked),
        preemptions=sum(r.preemptions for r in reports),
        hit_rate=counts.reused / max(1, counts.reused + counts.computed),
        rounds=counts.rounds,
        served_s=served_s,
        wall_s=wall_s,
        requests_per_wall_s=len(reports) / wall_s,
    )


def was_kept(report: RequestReport, request: Request) -> bool:
    """Whether the request got all its tokens, the first and the others as promised."""
    well = report.reason in (FinishReason.LENGTH, FinishReason.STOP)
    first = report.ttft_us is not None and report.ttft_us <= (request.ttft_us or 0)
    rest = report.tpot_us is None or report.tpot_us <= (request.tpot_us or 0)
    return well and first and rest


def percentile_ms(values: Sequence[float], percent: float) -> float:
    """NaN where there are none."""
    return float(np.percentile(values, percent)) / 1e3 if values else float("nan")


def fairness(done: Sequence[RequestReport], asked: dict[str, Request]) -> float:
    """Jain's index over tenants of tokens a second of a request's stay: 1 where all fare alike."""
    speeds: dict[str, list[float]] = {}
    for report in done:
        stay_us = max(1, report.end_us - report.arrival_us)
        tokens = report.prompt_tokens / 20 + report.output_tokens
        speeds.setdefault(asked[report.request_id].tenant, []).append(1e6 * tokens / stay_us)
    means = np.array([np.mean(of_tenant) for of_tenant in speeds.values()])
    return float(means.sum() ** 2 / (len(means) * (means**2).sum())) if len(means) else 0.0


# The torch engine

REAL = f"""
model tiny from "{ROOT / "examples" / "models" / "tiny"}"
cluster c {{
  devices c0..c1 kind cpu
  instance i0 role both on c0 engine torch model tiny kv_blocks 60 block 16 budget 256
}}
serve on c mode hybrid chunk 64 horizon 8 {{ request "any" tokens 1 generate 1 }}
"""


def real(count: int, strategy: str) -> Result:
    """Serve short requests on the torch engine, in this process and in real time."""
    compiler = Compiler()
    module = compiler.parse(REAL, "real.sage").module
    placed = topology_of(module).instances
    engines = {
        p.name: create_engine(
            InstanceSpec(
                id=p.name,
                engine="torch",
                model=p.model.path,
                kv_blocks=p.kv_blocks,
                block_tokens=p.block_tokens,
                options={"dtype": "float32", "channel": "local"},
            )
        )
        for p in placed
    }
    draw = random.Random(3)
    requests = [
        Request(
            id=f"r{i}",
            prompt=tuple(draw.randrange(5, 900) for _ in range(draw.randint(8, 200))),
            max_output_tokens=draw.randint(8, 60),
            arrival_us=i * 8000,
            tenant=draw.choices(TENANTS, SHARES)[0],
            priority=i % 2,
            ttft_us=150_000 if i % 2 == 0 else None,
            tpot_us=30_000 if i % 2 == 0 else None,
        )
        for i in range(count)
    ]
    workload = Workload("real", "drawn", REAL, requests)
    try:
        return serve(workload, strategy, engines, placed, compiler.planner(module), WallClock())
    finally:
        for engine in engines.values():
            engine.close()


# What is said of it

COLUMNS = {
    "strategy": ("strategy", "{}"),
    "served": ("served", "{}"),
    "goodput_per_s": ("goodput/s", "{:.2f}"),
    "kept": ("promises kept", "{:.1%}"),
    "ttft_p50_ms": ("TTFT p50 ms", "{:.0f}"),
    "ttft_p99_ms": ("p99", "{:.0f}"),
    "tpot_p50_ms": ("TPOT p50 ms", "{:.1f}"),
    "tpot_p99_ms": ("p99", "{:.1f}"),
    "fairness": ("fairness", "{:.3f}"),
    "preemptions": ("preempted", "{}"),
    "hit_rate": ("prefix hits", "{:.1%}"),
    "rounds": ("rounds", "{}"),
    "requests_per_wall_s": ("requests/s of wall", "{:.0f}"),
}


def section(name: str, source: str, results: Sequence[Result]) -> str:
    """A workload's table, with a heading."""
    rows = [[form.format(getattr(r, n)) for n, (_, form) in COLUMNS.items()] for r in results]
    table = tables.table_of([title for title, _ in COLUMNS.values()], rows)
    return f"## {name}\n\n{source}\n\n{table}"


def picture(name: str, results: Sequence[Result]) -> str:
    """How many promises each strategy kept."""
    bars = {r.strategy: {name: 100 * r.kept} for r in results}
    return charts.bar_chart(bars, f"Promises kept: {name}", "workload", "%")


def runs(limit: int, rate: float | None, real_count: int) -> Iterator[tuple[str, str, Run]]:
    """Name and source of each workload, and what serves it with a strategy."""
    for workload in workloads(limit, rate):
        yield workload.name, workload.source, functools.partial(simulate, workload)
    if real_count:
        yield "torch", "the small model, in real time", functools.partial(real, real_count)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all, print the tables, and write strategies.json, .md and a picture each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the files")
    parser.add_argument("--limit", type=int, default=1000, help="requests of each trace")
    parser.add_argument("--rate", type=float, help=f"how much faster than recorded; {RATES}")
    parser.add_argument(
        "--real", type=int, default=40, help="requests on the torch engine; 0: none"
    )
    parser.add_argument("--strategy", action="append", help="only this one; may be repeated")
    parser.add_argument("--workload", action="append", help="only this one; may be repeated")
    args = parser.parse_args(argv)
    where = tables.machine()
    parts, results, pictures = [f"# Strategies\n\n{tables.machine_line(where)}"], [], {}
    for name, source, run in runs(args.limit, args.rate, args.real):
        if args.workload and name not in args.workload:
            continue
        found = [run(strategy) for strategy in args.strategy or strategies.known()]
        results += found
        parts.append(section(name, source, found))
        print(parts[-1], flush=True)
        pictures[f"strategies-{name}.svg"] = picture(name, found)
    answer = {"machine": where, "results": [asdict(one) for one in results]}
    tables.write(args.out, "strategies", answer, "\n\n".join(parts) + "\n", pictures)


if __name__ == "__main__":
    main()
