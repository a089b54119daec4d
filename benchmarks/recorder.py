"""What recording costs: microseconds of CPU and bytes a round, and the share of a whole run.

    taskset -c 0 python benchmarks/recorder.py --out out

A round's requests decode or stay as they are, and some leave while others come. Its cost is that of
`Recorder.hear` for the round and the wait after it, when the round's plans are on their way, with
one write to the file; the digests of the plans are measured apart. `held` is what the round itself
waits for: to be put aside until then. The whole run is that of echo engines, which compute nothing,
so that the loop, the compiler and the recorder are all there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.replay import header_of
from sagec.runtime.clock import WallClock
from sagec.runtime.engines import Engine, InstanceSpec
from sagec.runtime.engines.echo import create
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance, Planned, Token, Wait
from sagec.runtime.plan import Decodes, Estimates, ExecutionPlan, Rows, digest_of
from sagec.runtime.recording import Header, Recorder
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, Instances, RequestTable, State
from sagec.runtime.strategies import create as strategy_of

SIZES = (
    # running, waiting, rows that decoded, requests that left and came
    (64, 4, 64, 0),
    (1024, 64, 64, 0),
    (1024, 64, 64, 4),
    (1024, 64, 1024, 0),
    (1024, 64, 1020, 4),
    (10_000, 64, 64, 0),
    (10_000, 64, 64, 4),
)
BUDGET_US, BUDGET_BYTES = 50, 1024
HORIZON = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """Rounds of one size. held_us: what a round waits for; bytes: of one that is no keyframe."""

    running: int
    waiting: int
    changed: int
    moved: int
    held_us: float
    median_us: float
    p99_us: float
    digest_us: float
    bytes: int
    keyframe_bytes: int


class Served:
    """Requests that are served by nobody: some decode, some leave, others come."""

    def __init__(self, running: int, waiting: int) -> None:
        self._random = np.random.default_rng(0)
        self._table = RequestTable(room_tokens=[100_000] * 2)
        self._came = 0
        self._waiting = [self._add() for _ in range(running + waiting)]
        self._running = [self._admit() for _ in range(running)]
        self._instances = Instances.of(
            ["i0", "i1"],
            role="both",
            model="tiny",
            engine="torch",
            kv_blocks=400_000,
            block_tokens=16,
            max_context_tokens=100_000,
        )

    def states(self, changed: int, moved: int) -> Iterator[State]:
        """A state a round, for ever."""
        number = 0
        while True:
            for _ in range(moved):
                self._table.remove(
                    self._running.pop(int(self._random.integers(len(self._running))))
                )
                self._running.append(self._admit())
                self._waiting.append(self._add())
            chosen = self._random.choice(len(self._running), changed, replace=False)
            rows = [self._running[at] for at in sorted(chosen.tolist())]
            after = self._table.computed_tokens[rows] + 1
            self._table.generated(rows, after.tolist(), 1000 * number)
            used = self._table.kv_blocks_used(self._instances.block_tokens)
            yield State(
                now_us=1000 * number,
                round=number,
                waiting=self._table.waiting(),
                running=self._table.running(),
                instances=dataclasses.replace(self._instances, kv_blocks_used=used),
                cached_tokens=self._table.waiting_cached_tokens(),
            )
            number += 1

    def _add(self) -> int:
        self._came += 1
        request = Request(
            id=f"request-{self._came}",
            prompt=tuple(range(300)),
            max_output_tokens=500,
            arrival_us=10 * self._came,
            ttft_us=200_000,
        )
        return self._table.add(request, "tiny")

    def _admit(self) -> int:
        row = self._waiting.pop(0)
        self._table.run(row, row % 2, row % 2, 5)
        self._table.progress(row, 300)
        return row


def plan_of(ids: Sequence[str]) -> ExecutionPlan:
    """A plan in which so many rows decode."""
    column = np.arange(len(ids))
    steps = np.arange(HORIZON)
    return ExecutionPlan(
        plan_id="round_1/i0",
        round=1,
        target_instance_id="i0",
        mode="hybrid",
        num_steps=HORIZON,
        max_step_tokens=2048,
        request_ids=tuple(ids),
        rows=Rows(
            prompt_tokens=column, computed_tokens=column, kv_blocks=column, deadline_us=column
        ),
        decodes=Decodes(row=column, begin_step=column, until_tokens=column),
        estimates=Estimates(us=steps, tokens=steps, kv_blocks=steps),
    )


def measure(size: tuple[int, int, int, int], rounds: int, folder: Path) -> Cost:
    """So many rounds of a size, recorded; only the first is a keyframe."""
    running, waiting, changed, moved = size
    states = Served(running, waiting).states(changed, moved)
    held_s, spent_s, written = [], [], []
    with Recorder(folder / "rounds.rec", Header(strategy="fifo"), WallClock()) as recorder:
        for _ in range(rounds):
            state = next(states)
            decision = Decision.admit(np.arange(moved), state.waiting, "fits", "no room")
            planned, wait = Planned(state, decision, (), 1.5, 2.5), Wait(None)
            before = recorder.written_bytes
            begin_s = time.thread_time()
            recorder.hear(planned)
            held_s.append(time.thread_time() - begin_s)
            recorder.hear(wait)
            spent_s.append(time.thread_time() - begin_s)
            written.append(recorder.written_bytes - before)
    plan = plan_of(state.running.ids.tolist())
    return Cost(
        *size,
        held_us=_us(statistics.median(held_s)),
        median_us=_us(statistics.median(spent_s)),
        p99_us=_us(sorted(spent_s)[int(0.99 * len(spent_s))]),
        digest_us=_us(statistics.median(_digest_s(plan) for _ in range(rounds))),
        bytes=int(statistics.median(written)),
        keyframe_bytes=max(written),
    )


def _digest_s(plan: ExecutionPlan) -> float:
    begin_s = time.thread_time()
    digest_of(plan)
    return time.thread_time() - begin_s


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)


# A whole run


CLUSTER = """\
cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688,
                  vocab = 1024}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
cluster.link @c0 to @c1
cluster.instance @p0 on [@c0] engine "echo" role prefill model @m {kv_blocks = 4000}
cluster.instance @d0 on [@c1] engine "echo" role decode model @m {kv_blocks = 4000}
pd.graph @serve {policy = "fifo", horizon = 16} { pd.yield }
"""


def serve(count: int, path: Path | None) -> tuple[float, int, int, int]:
    """Serve so many requests; CPU seconds, rounds, tokens and bytes written."""
    planner = CompilingPlanner.of(Compiler().parse(CLUSTER, "cluster.mlir").module)
    running: dict[str, Engine] = {}
    instances = []
    for name, role in (("p0", "prefill"), ("d0", "decode")):
        spec = InstanceSpec(id=name, engine="echo", model="", kv_blocks=4000, block_tokens=16)
        running[name] = create(spec)
        capability = running[name].capability()
        instances.append(
            Instance(id=name, role=role, engine="echo", capability=capability, model="m")
        )
    requests = [
        Request(id=f"r{i}", prompt=tuple(range(i % 90 + 10)), max_output_tokens=64)
        for i in range(count)
    ]
    strategy = strategy_of("fifo")
    tokens = 0
    with ExecutorAPI(running, instances) as executor:
        recorder = None
        if path is not None:
            recorder = Recorder(path, header_of(strategy, planner, instances), executor.clock)
            executor.watch(recorder.hear)
        begin_s = time.process_time()
        for output in executor.serve(requests, strategy, planner):
            tokens += isinstance(output, Token)
        if recorder is not None:
            recorder.close()
        spent_s = time.process_time() - begin_s
    return spent_s, recorder.rounds if recorder else 0, tokens, _size(path)


def _size(path: Path | None) -> int:
    return 0 if path is None else path.stat().st_size


def whole_run(count: int, runs: int, folder: Path) -> dict[str, Any]:
    """The same requests with and without a recorder, in turn; the best of each counts."""
    plain, recorded = [], []
    for _ in range(runs):
        plain.append(serve(count, None)[0])
        recorded.append(serve(count, folder / "run.rec"))
    best = min(recorded)
    return {
        "requests": count,
        "rounds": best[1],
        "tokens": best[2],
        "plain_s": round(min(plain), 4),
        "recorded_s": round(best[0], 4),
        "us_a_token": round(1e6 * (best[0] - min(plain)) / best[2], 2),
        "share_percent": round(100 * (best[0] / min(plain) - 1), 1),
        "bytes": best[3],
        "bytes_a_token": round(best[3] / best[2], 1),
    }


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, aligned, so that it reads as plain text too."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write recorder.json and recorder.md where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the two files")
    parser.add_argument("--rounds", type=int, default=400, help="rounds of each size")
    parser.add_argument("--quick", action="store_true", help="a few of each, to see that it runs")
    args = parser.parse_args(argv)
    sizes, rounds, count = SIZES, args.rounds, 1000
    if args.quick:
        sizes, rounds, count = SIZES[:1], 5, 20
    with tempfile.TemporaryDirectory() as folder:
        costs = [dataclasses.asdict(measure(size, rounds, Path(folder))) for size in sizes]
        run = whole_run(count, 1 if args.quick else 5, Path(folder))
    budget = (
        f"The budget of a round is {BUDGET_US} us and {BUDGET_BYTES} bytes with 64 changed rows."
    )
    parts = [
        "# Recording",
        budget,
        table_of(costs),
        "A whole run on echo engines:",
        table_of([run]),
    ]
    text = "\n\n".join(part.rstrip("\n") for part in parts) + "\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    answer = {"cores": os.cpu_count(), "numpy": np.__version__, "rounds": costs, "run": run}
    (args.out / "recorder.json").write_text(json.dumps(answer, indent=1))
    (args.out / "recorder.md").write_text(text)


if __name__ == "__main__":
    main()
