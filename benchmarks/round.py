"""What scheduling costs: a round, stage by stage, and offline compiles from 100 to 10,000 requests.

    taskset -c 0 python benchmarks/round.py --out out

A round is what `CompilingPlanner` does between a strategy's decision and the plans on the wire:
build the graph, run each pass of the pipeline `round`, lower, encode as msgpack, drop the graph.
Beside it the direct planner makes the same plans without a graph. Both are repeated on the same
state; medians and 99th percentiles in microseconds of wall time, and of the total also of this
thread's CPU time, which says more where other programs run. Then what each strategy's `decide`
takes, and the whole round with what it decided. An offline compile reads a file, runs the pipeline
`serve`, lowers and encodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
import xdsl

from sagec.compiler import Compiler, passes_of
from sagec.lowering.execution_plan import plans_of
from sagec.pipelines import PIPELINES
from sagec.planner import CompilingPlanner, DirectFirstPlanner, Planner
from sagec.runtime import strategies
from sagec.runtime.plan import encode
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, Instances, RequestTable, Running, State, Waiting

CLUSTERS: dict[str, tuple[str, ...]] = {
    "one hybrid instance": ("both",),
    "prefill and decode": ("prefill", "decode"),
    "2 prefill, 2 decode": ("prefill", "prefill", "decode", "decode"),
}
"""Roles of the instances of each cluster."""

RESIDENTS, WAITING = (0, 64, 256, 1024), (0, 4, 64)
DECIDED = (("one hybrid instance", "prefill and decode"), ((64, 4), (1024, 64)))
"""Clusters, and residents and waiting requests, that strategies decide about."""

REQUESTS = (100, 1_000, 10_000)
HORIZON = 16
BLOCK_TOKENS = 16
BUDGET_US, BUDGET_S = 1_000, 1.0


RUNNING, CHANGED = (100, 1_000, 10_000), 64
"""Requests in a table, and of them those that change between two views."""


@dataclass(frozen=True)
class Round:
    """A round of one size. stages_us: median and 99th percentile of each, in order. direct: medians
    of the same round, planned without IR."""

    cluster: str
    residents: int
    waiting: int
    median_us: float
    p99_us: float
    cpu_median_us: float
    direct_us: float
    direct_cpu_us: float
    stages_us: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Decided:
    """A strategy's decision and the whole round with it, medians of wall and of CPU time."""

    strategy: str
    cluster: str
    residents: int
    waiting: int
    decide_us: float
    decide_cpu_us: float
    round_us: float
    round_cpu_us: float


@dataclass(frozen=True)
class Compile:
    """An offline compile of one size: seconds of each stage, the best of some runs."""

    form: str
    requests: int
    total_s: float
    stages_s: dict[str, float]


# What is measured


def cluster_text(roles: Sequence[str]) -> str:
    """A module of instances of one small model, a device each, with a link between any two."""
    lines = [
        "cluster.model @tiny {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, "
        "ffn = 688, vocab = 1024}",
        'cluster.device @g0 {kind = "h200", memory_bytes = 151397597184, flops_per_s = 9.9e14, '
        "bytes_per_s = 4.8e12}",
        *(f"cluster.device @g{device} like @g0" for device in range(1, len(roles))),
    ]
    for device in range(len(roles)):
        for other in range(device):
            ends = f"@g{other} to @g{device}"
            lines.append(f"cluster.link {ends} {{bytes_per_s = 4.5e11, latency_us = 2.0}}")
    for device, role in enumerate(roles):
        lines.append(
            f'cluster.instance @i{device} on [@g{device}] engine "torch" role {role} model @tiny '
            f"{{kv_blocks = 400000, block_tokens = {BLOCK_TOKENS}, max_step_tokens = 2048, "
            "max_batch = 2048}"
        )
    return "\n".join(lines) + "\n"


def state_of(roles: Sequence[str], residents: int, waiting: int) -> State:
    """A state with so many requests that decode, spread over the instances, and that wait."""
    random = np.random.default_rng(0)
    instances = Instances.of(
        [f"i{index}" for index in range(len(roles))],
        role=np.array(roles, object),
        model="tiny",
        engine="torch",
        kv_blocks=400_000,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=131_072,
    )
    decoding = [index for index, role in enumerate(roles) if role != "prefill"]
    at = random.choice(decoding, residents)
    running = Running.of(
        [f"resident-{row}" for row in range(residents)],
        instance=at,
        decode_on=at,
        prompt_tokens=random.integers(100, 1000, residents),
        computed_tokens=random.integers(1000, 2000, residents),
        remaining_tokens=random.integers(1, 500, residents),
        arrival_us=np.arange(residents),
    )
    asked = Waiting.of(
        [f"waiting-{row}" for row in range(waiting)],
        prompt_tokens=random.integers(16, 2000, waiting),
        generate_tokens=random.integers(16, 300, waiting),
        arrival_us=10_000 + np.arange(waiting),
    )
    return State(now_us=1_000_000, round=7, waiting=asked, running=running, instances=instances)


def planner_of(roles: Sequence[str]) -> CompilingPlanner:
    """The planner that the loop would be given for a cluster of these roles."""
    graph = f'pd.graph @served {{mode = "hybrid", horizon = {HORIZON}}} {{ pd.yield }}\n'
    return CompilingPlanner.of(Compiler().parse(cluster_text(roles) + graph, "cluster.mlir").module)


class Stopwatch:
    """Times named stages that follow each other. seconds: of each stage, a value a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._since = time.perf_counter()

    def start(self) -> None:
        """The first stage begins."""
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """`stage` ends, and the next begins."""
        now = time.perf_counter()
        self.seconds[stage].append(now - self._since)
        self._since = time.perf_counter()


def staged_round(
    planner: CompilingPlanner, state: State, decision: Decision, watch: Stopwatch
) -> None:
    """One round, as `CompilingPlanner.plan` does it, with a stop of the watch after each stage."""
    watch.start()
    graph = planner.builder.build_round(state, decision)
    watch.lap("build")
    for compiler_pass in planner.passes.passes:
        compiler_pass.apply(planner.context, graph.module)
        watch.lap(compiler_pass.name)
    plans = plans_of(graph.module)
    watch.lap("lower")
    for plan in plans:
        encode(plan)
    watch.lap("encode")
    planner.builder.drop(graph)
    watch.lap("drop")


def timed(planner: Planner, state: State, decision: Decision) -> tuple[float, float]:
    """Seconds of wall and of CPU that a round takes, with the encoding of its plans."""
    begin_s, begin_cpu_s = time.perf_counter(), time.thread_time()
    for plan in planner.plan(state, decision):
        encode(plan)
    cpu_s = time.thread_time() - begin_cpu_s
    return time.perf_counter() - begin_s, cpu_s


def measure_round(cluster: str, residents: int, waiting: int, rounds: int) -> Round:
    """Whole rounds and staged ones, in turn."""
    roles = CLUSTERS[cluster]
    planner, state = planner_of(roles), state_of(roles, residents, waiting)
    decision = Decision.admit(np.arange(waiting), state.waiting)
    direct, watch = DirectFirstPlanner(planner), Stopwatch()
    took: list[tuple[float, ...]] = []
    for _ in range(rounds):
        took.append((*timed(planner, state, decision), *timed(direct, state, decision)))
        staged_round(planner, state, decision, watch)
    wall_s, cpu_s, direct_s, direct_cpu_s = zip(*took, strict=True)
    return Round(
        cluster=cluster,
        residents=residents,
        waiting=waiting,
        median_us=_us(statistics.median(wall_s)),
        p99_us=_us(_p99(wall_s)),
        cpu_median_us=_us(statistics.median(cpu_s)),
        direct_us=_us(statistics.median(direct_s)),
        direct_cpu_us=_us(statistics.median(direct_cpu_s)),
        stages_us={
            stage: (_us(statistics.median(seconds)), _us(_p99(seconds)))
            for stage, seconds in watch.seconds.items()
        },
    )


def measure_strategy(
    strategy: str, cluster: str, residents: int, waiting: int, rounds: int
) -> Decided:
    """Rounds as the loop makes them, with what the strategy remembers of the one before."""
    roles, decider = CLUSTERS[cluster], strategies.create(strategy)
    planner, state = planner_of(roles), promised(state_of(roles, residents, waiting))
    state = dataclasses.replace(state, memory=decider.decide(state).memory)
    times: list[tuple[float, ...]] = []
    for _ in range(rounds):
        begin = time.perf_counter(), time.thread_time()
        decision = decider.decide(state)
        decided = time.perf_counter(), time.thread_time()
        planner.plan(state, decision)
        planned = time.perf_counter(), time.thread_time()
        times.append(tuple(np.subtract([*decided, *planned], [*begin, *begin])))
    medians = [_us(statistics.median(column)) for column in zip(*times, strict=True)]
    return Decided(strategy, cluster, residents, waiting, *medians)


@dataclass(frozen=True)
class View:
    """What a strategy sees of the request table, made anew: in microseconds, after 64 rows changed
    (us), and after one of them also left and another came (moved_us)."""

    running: int
    us: float
    moved_us: float


def measure_view(running: int, repeats: int) -> View:
    """Medians of the views of a table in which so many requests run."""
    table, sizes = RequestTable(room_tokens=[1 << 20]), np.array([BLOCK_TOKENS])
    names = (Request(id=f"r{i}", prompt=(1,) * 10) for i in itertools.count())
    rows = [table.add(next(names), "m") for _ in range(running)]
    for row in rows:
        table.run(row, 0, 0)
    took: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * repeats):
        begin_s = time.perf_counter()
        table.generated(rows[:CHANGED], [20 + turn] * len(rows[:CHANGED]), 1)
        if moves := turn >= repeats:
            table.remove(rows.pop(len(rows) // 2))
            rows.append(table.add(next(names), "m"))
            table.run(rows[-1], 0, 0)
        table.waiting(), table.running(), table.kv_blocks_used(sizes)
        table.waiting_cached_tokens()
        took[moves].append(time.perf_counter() - begin_s)
    return View(running, *(_us(statistics.median(took[moves])) for moves in (False, True)))


def promised(state: State) -> State:
    """The state, in which half of the requests were promised times, and instances know their pace.

    What strategies ask for beside lengths: tenants, priorities and how far a request is, too.
    """
    columns = {}
    for name in ("waiting", "running"):
        asked: Waiting | Running = getattr(state, name)
        row = np.arange(len(asked))
        columns[name] = dataclasses.replace(
            asked,
            tenant=np.array([f"tenant-{at % 4}" for at in row.tolist()], object),
            priority=row % 2,
            ttft_us=np.where(row % 2, 0, 400_000),
            tpot_us=np.where(row % 2, 0, 50_000),
            arrival_us=800_000 + 100 * row,
        )
    running, ones = columns["running"], np.ones(len(state.instances), np.int64)
    output = np.full(len(running), 10)
    columns["running"] = dataclasses.replace(
        running, output_tokens=output, first_token_us=running.arrival_us + 50_000
    )
    instances = dataclasses.replace(
        state.instances, prefill_ns_per_token=2_000 * ones, decode_step_us=8_000 * ones
    )
    return dataclasses.replace(state, instances=instances, **columns)


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(int(len(values) * 0.99), len(values) - 1)]


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def mlir_file(requests: int) -> str:
    """A file of so many requests that nothing has decided on yet, for a pair of instances."""
    random = np.random.default_rng(1)
    prompts, outputs = random.integers(16, 2000, requests), random.integers(16, 300, requests)
    rows = ",\n".join(
        f'    "request-{row}": prompt {prompt} generate {output} arrived {1000 * row}'
        for row, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True))
    )
    return (
        cluster_text(CLUSTERS["prefill and decode"])
        + f"pd.graph @offline {{\n  %w = pd.requests [\n{rows}\n  ] : !pd.wave<{requests}>\n"
        "  %kv = pd.prefill %w\n  %end = pd.decode %kv\n  pd.yield %end\n}\n"
    )


def sage_file(requests: int) -> str:
    """The same in the language: a cluster of a pair, and requests that say their lengths."""
    rows = "\n".join(
        f'  request "request-{row}" tokens {16 + row * 37 % 1984} generate {16 + row * 11 % 284} '
        f"arrives {row}ms"
        for row in range(requests)
    )
    return f"""model tiny {{
  layers 4 hidden 256 heads 8 kv_heads 2 head_dim 32 ffn 688 vocab 1024
}}

cluster pair {{
  devices g0, g1 kind h200
  link g0 to g1 bandwidth 450GB/s latency 2us
  instance p0 role prefill on g0 engine torch kv_blocks 400000 block 16 budget 2048 max_batch 2048
  instance d0 role decode on g1 engine torch kv_blocks 400000 block 16 budget 2048 max_batch 2048
}}

serve on pair with fifo mode strict {{
{rows}
}}
"""


FILES: dict[str, Callable[[int], str]] = {"mlir": mlir_file, "sage": sage_file}


def measure_compile(form: str, requests: int, runs: int) -> Compile:
    """The best of `runs` compiles of a file; the first of a size pays for what is made once."""
    text, name = FILES[form](requests), f"offline.{form}"
    compiler = Compiler()
    watch = Stopwatch()
    for _ in range(runs):
        watch.start()
        module = compiler.parse(text, name).module
        watch.lap("parse")
        for compiler_pass in passes_of("serve").passes:
            compiler_pass.apply(compiler.context, module)
            watch.lap(compiler_pass.name)
        plans = compiler.lower(module)
        watch.lap("lower")
        for plan in plans:
            encode(plan)
        watch.lap("encode")
    totals = [sum(run) for run in zip(*watch.seconds.values(), strict=True)]
    best = totals.index(min(totals))
    stages = {stage: round(seconds[best], 5) for stage, seconds in watch.seconds.items()}
    return Compile(form, requests, round(min(totals), 4), stages)


# What is said of it


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    return {
        **tables.machine(),
        "xdsl": str(xdsl.__version__),
        "horizon": HORIZON,
        "pipeline": PIPELINES["round"].text,
    }


def report(
    where: dict[str, Any],
    rounds: Sequence[Round],
    decided: Sequence[Decided],
    views: Sequence[View],
    compiles: Sequence[Compile],
) -> str:
    """All figures as Markdown."""
    parts = [
        "# A scheduling round",
        tables.machine_line({name: where[name] for name in where if name != "pipeline"}),
        *round_parts(rounds),
        *decided_parts(decided),
        "# What a strategy sees",
        f"Views of the request table: {CHANGED} rows changed; one also left and another came.",
        tables.table_of(
            ("running", "changed", "came and left"), [(v.running, v.us, v.moved_us) for v in views]
        ),
        *compile_parts(compiles),
        vllm_line(),
    ]
    return "\n\n".join(parts) + "\n"


def round_parts(rounds: Sequence[Round]) -> list[str]:
    """Totals of every size, and the stages of the largest."""
    heads = ("cluster", "residents", "waiting", "IR median", "p99", "CPU", "direct median", "CPU")
    totals = [
        (
            r.cluster,
            r.residents,
            r.waiting,
            r.median_us,
            r.p99_us,
            r.cpu_median_us,
            r.direct_us,
            r.direct_cpu_us,
        )
        for r in rounds
    ]
    most = max((r.residents, r.waiting) for r in rounds)
    largest = [r for r in rounds if (r.residents, r.waiting) == most]
    stages = dict.fromkeys(stage for r in largest for stage in r.stages_us)
    return [
        f"Microseconds; the budget is {BUDGET_US} at 1024 residents and 64 waiting.",
        tables.table_of(heads, totals),
        f"Its stages at {most[0]} residents, {most[1]} waiting:",
        tables.table_of(
            ("stage", *(f"{r.cluster}{what}" for r in largest for what in ("", ", p99"))),
            [(stage, *(us for r in largest for us in r.stages_us[stage])) for stage in stages],
        ),
    ]


def decided_parts(decided: Sequence[Decided]) -> list[str]:
    """What strategies take: a table for each cluster."""
    heads = ("strategy", "residents", "waiting", "decide", "CPU", "whole round", "CPU")
    parts = [
        "# Strategies",
        "Microseconds, medians: `decide`, and the round with it, from state to plans; half of the "
        "requests were promised times.",
    ]
    for cluster in dict.fromkeys(one.cluster for one in decided):
        of_cluster = [asdict(one) for one in decided if one.cluster == cluster]
        rows = [[v for name, v in one.items() if name != "cluster"] for one in of_cluster]
        parts += [f"On {cluster}:", tables.table_of(heads, rows)]
    return parts


def compile_parts(compiles: Sequence[Compile]) -> list[str]:
    """Offline compiles: a table for each form of the file."""
    parts = ["# Offline compiles", f"Milliseconds; the budget is {BUDGET_S * 1e3:.0f} at 10,000."]
    for form in dict.fromkeys(c.form for c in compiles):
        of_form = [c for c in compiles if c.form == form]
        heads = ("requests", "total", "us a request", *of_form[0].stages_s)
        rows = [
            [c.requests, *(1e3 * s for s in (c.total_s, 1e3 * c.total_s / c.requests))]
            + [seconds * 1e3 for seconds in c.stages_s.values()]
            for c in of_form
        ]
        parts += [f"From .{form}:", tables.table_of(heads, rows)]
    return parts


@functools.cache
def vllm_line() -> str:
    """Whether vLLM's scheduler could be measured beside ours."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here, so that its scheduler was not measured beside."
    return "vLLM is installed here; this script does not measure its scheduler."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write round.json and round.md where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the two files")
    parser.add_argument("--rounds", type=int, default=300, help="rounds of each size")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it runs")
    args = parser.parse_args(argv)
    residents, waiting = (RESIDENTS, WAITING) if not args.quick else ((0, 64), (4,))
    sizes, runs = (REQUESTS, 3) if not args.quick else ((100,), 1)
    rounds = [
        measure_round(cluster, r, w, args.rounds if not args.quick else 3)
        for cluster in CLUSTERS
        for r in residents
        for w in waiting
        if r + w
    ]
    repeats = args.rounds // 3 if not args.quick else 3
    decided = [
        measure_strategy(strategy, cluster, *size, repeats)
        for cluster in DECIDED[0]
        for size in (DECIDED[1] if not args.quick else DECIDED[1][:1])
        for strategy in strategies.known()
    ]
    views = [measure_view(running, repeats) for running in RUNNING]
    compiles = [measure_compile(form, size, runs) for form in FILES for size in sizes]
    where = machine()
    text = report(where, rounds, decided, views, compiles)
    print(text)
    answer = {
        **where,
        "rounds": [asdict(one) for one in rounds],
        "strategies": [asdict(one) for one in decided],
        "views": [asdict(one) for one in views],
        "compiles": [asdict(one) for one in compiles],
    }
    tables.write(args.out, "round", answer, text, {})


if __name__ == "__main__":
    main()
