"""Programs for torch engines: exec graphs of a checkpoint's steps, through passes, to a file."""

import functools
from pathlib import Path

from sagec.compiler import Compiler
from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.lowering.torch_source import program_of
from sagec.passes.topology import Model
from sagec.runtime.engines.torch.config import ModelConfig, read_config
from sagec.runtime.roofline import Device, Link

CPU, BYTES_PER_S = Device(2e10, 1e10, 2.0), 2e9
"""About one core of a small machine, and how fast gloo is between two of them."""


def model_of(folder: Path) -> Model:
    """The shape of a checkpoint, as a cluster would say it."""
    config: ModelConfig = read_config(folder)
    return Model(
        name="m",
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn,
        vocab=config.vocab,
        dtype="f32",
        max_context=config.max_context_tokens,
        experts=config.experts,
        experts_per_token=config.experts_per_token,
        tied=int(config.tied),
        path=str(folder),
    )


def graphs_of(folder: Path, tp: int, lanes: int = 1, passes: str = "", latency_us: float = 200.0):
    """A hybrid, a prefill and a decode step of the model on devices g0, g1, ..., of which a link of
    such a latency leads from each to the next."""
    parallel = Parallel(tp=tp)
    hardware = Hardware.uniform(parallel, CPU, Link(BYTES_PER_S, latency_us))
    builder = ExecutionGraphBuilder(model_of(folder), parallel, hardware, micro_batches=lanes)
    chunks, contexts = [(0, 16)] * lanes, [24] * 2 * lanes
    made = [
        builder.build_hybrid_graph(chunks, contexts).op,
        builder.build_prefill_graph(chunks).op,
        builder.build_decode_graph(contexts).op,
    ]
    if passes:
        link = f"{{bytes_per_s = {BYTES_PER_S}, latency_us = {latency_us}}}"
        devices = "".join(f"cluster.device @g{rank}\n" for rank in range(tp))
        links = "".join(f"cluster.link @g{r} to @g{r + 1} {link}\n" for r in range(tp - 1))
        compiler = Compiler()
        module = compiler.parse(devices + links, "cluster.mlir").module
        module.body.block.add_ops(made)
        compiler.optimize(module, passes)
    return made


@functools.cache
def program(folder: Path, tp: int, *how) -> Path:
    """A file with the program of a checkpoint for so many ranks, beside its weights; how: what else
    `graphs_of` is told."""
    path = folder / f"program-{tp}-{len(list(folder.iterdir()))}.py"
    path.write_text(program_of(graphs_of(folder, tp, *how)))
    return path
