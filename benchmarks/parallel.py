"""Step time and memory of the torch engine on one rank and on two, and what passes make of it.

    python benchmarks/parallel.py --out out/parallel

The model of benchmarks/engine.py; requests of one prompt length, all in one prefill step, then in
one decode step after the other. Each way is a generated program: one lane; two micro-batches, or
lanes, in turn, so that there are twice the messages; these overlapped, where one lane computes
while the other's message travels; fused, where the messages of both go as one and nothing runs
beside; and what the passes choose of both for a link as fast as the loopback. The ways take turns;
each figure is the median of the steps of all turns.

Memory: the most bytes that torch's allocator held in rank 0 for a step, beside what `plan-memory`
says of the same step's graph; benchmarks/memory.py has one rank and more kinds of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine as one_rank
import tables
import torch

from sagec.compiler import Compiler
from sagec.dialects import exec as ex
from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.lowering.torch_source import program_of
from sagec.passes.plan_memory import plan_memory
from sagec.passes.topology import topology_of
from sagec.runtime.engines import InstanceSpec, StepReport
from sagec.runtime.engines.torch.engine import TorchEngine
from sagec.runtime.engines.torch.live_memory import peak_bytes
from sagec.runtime.engines.torch.ranks import RankStatistics
from sagec.runtime.request import Request
from sagec.runtime.roofline import Device, Link

CORE, LOOPBACK = Device(2e10, 1e10, 5.0), Link(2e9, 200.0)
"""About one core of a small machine, and gloo between two of its processes."""

FAR = Link(2e9, 20_000.0)
"""So slow that the passes fuse whatever can be fused, and hide nothing."""

CLUSTER = """
cluster.model @m {layers = 8, hidden = 512, heads = 8, kv_heads = 4, head_dim = 64, ffn = 1408, \
vocab = 8192, dtype = "f32", tied = 1}
cluster.device @g0 {flops_per_s = 2.0e10, bytes_per_s = 1.0e10}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = LINK_BYTES, latency_us = LINK_US}
cluster.instance @i0 on [@g0, @g1] engine "torch" role both model @m {tp = 2, kv_blocks = 64}
"""


@dataclass(frozen=True)
class Way:
    """A way to compute steps: on how many ranks, in how many lanes, through which passes, which
    are told of which link."""

    name: str
    tp: int
    lanes: int = 1
    passes: str = ""
    link: Link = LOOPBACK

    def graphs(self, batch: int, prompt: int) -> list[ex.ExecGraphOp]:
        """The prefill, decode and hybrid step of so many requests."""
        text = CLUSTER.replace("LINK_BYTES", f"{self.link.bytes_per_s:.1f}")
        text = text.replace("LINK_US", f"{self.link.latency_us:.1f}")
        compiler = Compiler()
        module = compiler.parse(text, "cluster.mlir").module
        (instance,) = topology_of(module).instances
        parallel = Parallel(tp=self.tp, devices=("g0", "g1")[: self.tp])
        hardware = Hardware.uniform(parallel, CORE, self.link)
        builder = ExecutionGraphBuilder(
            instance.model, parallel, hardware, micro_batches=self.lanes
        )
        chunks, contexts = [(0, prompt)] * batch, [prompt] * batch
        made = [
            builder.build_prefill_graph(chunks).op,
            builder.build_decode_graph(contexts).op,
            builder.build_hybrid_graph(chunks, contexts).op,
        ]
        module.body.block.add_ops(made)
        if self.passes:
            compiler.optimize(module, self.passes)
        return made


_OVERLAP, _FUSE = "overlap-communication", "overlap-communication,fuse-communication"
WAYS = (
    Way("1 rank", 1),
    Way("2 ranks", 2),
    Way("2 lanes in turn", 2, 2),
    Way("2 lanes overlapped", 2, 2, _OVERLAP),
    Way("2 lanes fused", 2, 2, _FUSE, FAR),
    Way("2 lanes as estimated", 2, 2, _FUSE),
)
BASE = WAYS[1]
"""What the ratios are to."""

MEMORY_TURNS = 6


@dataclass(frozen=True)
class StepTime:
    """Medians of one way; ratio: of its decode step to that of BASE, the median over the turns.

    least_ms: the fastest of all its decode steps, which others on the machine disturb least.
    messages, waited_us: of rank 0 in a decode step, and in how much of it rank 0 stood still.
    """

    way: str
    batch: int
    prefill_ms: float
    decode_ms: float
    least_ms: float
    ratio: float
    messages: float
    waited_ms: float


@dataclass(frozen=True)
class Peak:
    """Activation memory of a step of rank 0: measured, planned, with a place for each tensor."""

    way: str
    step: str
    measured_kib: float
    planned_kib: float
    naive_kib: float
    ratio: float


class Served:
    """An engine that computes steps one way."""

    def __init__(self, way: Way, folder: Path, args: argparse.Namespace) -> None:
        self.way, self._batch, self._prompt = way, args.batch, args.prompt
        self._outputs = args.steps + 1
        self._blocks = -(-(args.prompt + self._outputs) // one_rank.BLOCK_TOKENS)
        program = folder / f"{way.name.replace(' ', '-')}.py"
        program.write_text(program_of(way.graphs(args.batch, args.prompt)))
        spec = InstanceSpec(
            id="i0",
            engine="torch",
            model=str(folder),
            kv_blocks=self._blocks * args.batch,
            block_tokens=one_rank.BLOCK_TOKENS,
            options={
                "program": str(program),
                "tp": str(way.tp),
                "dtype": "float32",
                "prefix_cache": "off",
            },
        )
        self.engine = TorchEngine(spec)

    def steps(self, counts_memory: bool = False) -> tuple[list[StepReport], list[int]]:
        """Serve all requests once: the steps, and the peak of each where memory is counted."""
        prompts = torch.randint(one_rank.VOCAB, (self._batch, self._prompt))
        requests = [
            Request(id=f"r{row}", prompt=tuple(prompt), max_output_tokens=self._outputs)
            for row, prompt in enumerate(prompts.tolist())
        ]
        ids = [request.id for request in requests]
        plan = one_rank.plan_of(ids, self._prompt, self._outputs, self._blocks)
        self.engine.submit(plan, requests)
        reports, peaks = [], []
        while True:
            poll = self.engine.poll
            events, peak = peak_bytes(poll) if counts_memory else (poll(), 0)
            if not events:
                return reports, peaks
            reports += [event for event in events if isinstance(event, StepReport)]
            peaks.append(peak)

    def statistics(self) -> RankStatistics:
        """Of rank 0; nothing where it is alone."""
        ranks = self.engine.residents.model.ranks
        return ranks.statistics() if ranks is not None else RankStatistics(0, 0, 0, 0.0)


def step_times(sides: Sequence[Served], args: argparse.Namespace) -> list[StepTime]:
    """Have all ways take turns, after one turn each to warm up."""
    for side in sides:
        side.steps()
    prefill_us, decode_us = defaultdict[Way, list[int]](list), defaultdict[Way, list[float]](list)
    least_us: dict[Way, int] = {}
    before = {side.way: side.statistics() for side in sides}
    for turn in range(args.turns):
        for side in sides if turn % 2 else reversed(sides):
            reports, _ = side.steps()
            times = [report.end_us - report.begin_us for report in reports]
            least_us[side.way] = min(least_us.get(side.way, times[1]), *times[1:])
            prefill_us[side.way].append(times[0])
            decode_us[side.way].append(statistics.median(times[1:]))
    steps = args.turns * (args.steps + 1)
    found = []
    for side in sides:
        way, old, new = side.way, before[side.way], side.statistics()
        ratios = [a / b for a, b in zip(decode_us[way], decode_us[BASE], strict=True)]
        found.append(
            StepTime(
                way=way.name,
                batch=args.batch,
                prefill_ms=round(statistics.median(prefill_us[way]) / 1e3, 2),
                decode_ms=round(statistics.median(decode_us[way]) / 1e3, 2),
                least_ms=round(least_us[way] / 1e3, 2),
                ratio=round(statistics.median(ratios), 2),
                messages=round((new.messages - old.messages) / steps, 1),
                waited_ms=round((new.waited_us - old.waited_us) / steps / 1e3, 2),
            )
        )
    return found


def memory_peaks(side: Served, args: argparse.Namespace) -> list[Peak]:
    """The prefill step and the first decode step.

    Where a thread of gloo happens to let go of a message's tensor last, the account does not see it
    freed: the least of some turns is what a step held.
    """
    turns = [side.steps(counts_memory=True)[1] for _ in range(MEMORY_TURNS)]
    measured = [min(peaks) for peaks in zip(*turns, strict=True)]
    found = []
    for at, graph in enumerate(side.way.graphs(args.batch, args.prompt)[:2]):
        arena = plan_memory(graph).largest
        found.append(
            Peak(
                way=side.way.name,
                step=("prefill", "decode")[at],
                measured_kib=round(measured[at] / 1024, 1),
                planned_kib=round(arena.peak_bytes / 1024, 1),
                naive_kib=round(arena.naive_bytes / 1024, 1),
                ratio=round(measured[at] / arena.peak_bytes, 2),
            )
        )
    return found


TIME_HEADS = (
    "way",
    "batch",
    "prefill ms",
    "decode ms",
    "least ms",
    "ratio",
    "messages",
    "waited ms",
)
PEAK_HEADS = ("way", "step", "measured KiB", "planned KiB", "a place each KiB", "measured/planned")


def markdown(where: dict[str, Any], times: Sequence[StepTime], peaks: Sequence[Peak]) -> str:
    """The results as tables, with what the machine means for them."""
    parts = [
        "# Tensor parallelism of the torch engine",
        tables.machine_line(where),
        f"Ratio: decode step over that of '{BASE.name}', smaller is better. Messages and waiting "
        "are rank 0's, a step on average. Each rank computes with one thread; where there are no "
        "more cores than ranks, none is left for gloo's threads, so that what runs beside compute "
        "takes time from it, and each collective waits for whatever else the machine does.",
        tables.table_of(TIME_HEADS, [list(asdict(time).values()) for time in times]),
        "Activation memory of rank 0 in one step. The plan leaves out the batch's own indices, and "
        "what the engine needs to sample; with lanes the code keeps the logits of each to the end.",
        tables.table_of(PEAK_HEADS, [list(asdict(peak).values()) for peak in peaks]),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and write parallel.json and parallel.md where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for parallel.json and parallel.md")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="requests")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--steps", type=int, default=32, help="decode steps")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        one_rank.make_model(folder)
        sides = []
        for way in WAYS:
            sides.append(Served(way, folder, args))
            stack.callback(sides[-1].engine.close)
        times = step_times(sides, args)
        peaks = [peak for side in sides for peak in memory_peaks(side, args)]
    where = {**tables.machine(), "torch": torch.__version__, "threads": 1, **vars(args)}
    del where["out"]
    text = markdown(where, times, peaks)
    print(text)
    if args.out:
        answer = {
            **where,
            "step_times": [asdict(time) for time in times],
            "peaks": [asdict(peak) for peak in peaks],
        }
        tables.write(args.out, "parallel", answer, text, {})


if __name__ == "__main__":
    main()
