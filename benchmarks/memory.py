"""Activation memory of the torch engine's steps: what plan-memory says of a step's graph, beside
what torch's allocator held while it was computed.

    python benchmarks/memory.py --out out/memory

The model of benchmarks/engine.py on one rank, with C kernels; one prompt, several prompts, a later
chunk of one, decodes, and all of these in one step. Measured is the most that was allocated at a
time from the step's begin to its logits: tensors, and what torch's operators need within; the
batch's indices, weights and KV were there before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler is to print nothing

import engine as served
import tables
import torch

from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, StepTokens
from sagec.passes.plan_memory import plan_memory
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.torch.batch import Batch, Span, build_batch
from sagec.runtime.engines.torch.engine import TorchEngine
from sagec.runtime.engines.torch.live_memory import peak_bytes
from sagec.runtime.engines.torch.model import Model
from sagec.runtime.kv.pool import BlockPool

BLOCKS = 700
STEPS = {
    "one prompt": StepTokens(((0, 512),), (True,)),
    "prompts": StepTokens(((0, 64),) * 16, (True,) * 16),
    "later chunk": StepTokens(((512, 1024),), (True,)),
    "decode": StepTokens((), (), (300,) * 32),
    "mixed": StepTokens(((0, 200), (100, 300)), (True, False), (50,) * 32),
}


@dataclass(frozen=True)
class Peak:
    """Of one kind of step. handwritten_kib: measured with the engine's own layers instead of
    generated code; naive_kib: what a place of its own for each tensor would need."""

    step: str
    tokens: int
    planned_kib: float
    measured_kib: float
    ratio: float
    handwritten_kib: float
    naive_kib: float


def batch_of(step: StepTokens, model: Model) -> Batch:
    """The step's tokens, of as many requests with KV of their own."""
    pool, spans = BlockPool(BLOCKS, served.BLOCK_TOKENS), []
    decodes = [(context, context + 1) for context in step.contexts]
    samples = (*step.samples, *(True for _ in decodes))
    for (begin, end), samples_here in zip((*step.chunks, *decodes), samples, strict=True):
        slot = pool.open_slot()
        if not pool.grow(slot, pool.blocks_for(end)):
            raise SystemExit(f"{BLOCKS} KV blocks are too few for a step")
        spans.append(Span(slot, begin, range(end - begin), samples_here))
    kernels = model.kernels
    return build_batch(spans, pool, torch.device("cpu"), kernels.short_tokens, kernels.padded)


def peak_of(name: str, model: Model, builder: ExecutionGraphBuilder) -> Peak:
    """Compute a step twice in either way, and measure the second time."""
    step, program = STEPS[name], model.program
    arena = plan_memory(builder.build(step, name="step").op).largest
    batch, measured = batch_of(step, model), []
    for code in (program, None):
        model.program = code
        model.forward(batch)
        measured.append(peak_bytes(lambda: model.forward(batch))[1])
    model.program = program
    return Peak(
        step=name,
        tokens=step.tokens,
        planned_kib=round(arena.peak_bytes / 1024, 1),
        measured_kib=round(measured[0] / 1024, 1),
        ratio=round(measured[0] / arena.peak_bytes, 3),
        handwritten_kib=round(measured[1] / 1024, 1),
        naive_kib=round(arena.naive_bytes / 1024, 1),
    )


HEADS = (
    "step", "tokens", "planned KiB", "measured KiB", "measured/planned", "hand-written KiB",
    "a place each KiB",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write memory.json and memory.md where --out says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, help="folder for memory.json and memory.md")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served.make_model(folder)
        options = {"program": str(served.make_program(folder)), "native": "on"}
        engine = TorchEngine(
            InstanceSpec(
                id="i0",
                engine="torch",
                model=name,
                kv_blocks=BLOCKS,
                block_tokens=served.BLOCK_TOKENS,
                options=options,
            )
        )
        model, builder = engine.residents.model, served.builder_of(folder)
        peaks = [peak_of(step, model, builder) for step in STEPS]
        engine.close()
    where = {**tables.machine(), "torch": torch.__version__, "threads": 1}
    rows = [[str(cell) for cell in asdict(peak).values()] for peak in peaks]
    parts = ["# Memory of a step", tables.machine_line(where), tables.table_of(HEADS, rows)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.out:
        answer = {**where, "peaks": [asdict(peak) for peak in peaks]}
        tables.write(args.out, "memory", answer, text, {})


if __name__ == "__main__":
    main()
