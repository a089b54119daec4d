"""Generated code for instances of the torch engine, kept in the cache folder.

A program depends on a model's shape and layout alone, so one file does for all instances that have
them, and for all that is ever served there.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path

from sagec.lowering.execution_graph_builder import ExecutionGraphBuilder, Hardware, Parallel
from sagec.lowering.torch_source import program_of
from sagec.passes.errors import PassError
from sagec.passes.topology import Instance, Model
from sagec.runtime import roofline
from sagec.runtime.compiled import cache_folder

CHUNK_TOKENS, DECODES, CONTEXT_TOKENS = 512, 32, 512
"""The step that a program's estimates are for; the code is the same for any."""


def program_for(instance: Instance) -> str:
    """The program of an instance: its prefill, decode and hybrid steps.

    Raises PassError for a model or layout that the torch engine cannot run.
    """
    device = instance.devices[0]
    speed = roofline.Device(device.flops_per_s, device.bytes_per_s)
    try:
        return _program(instance.model, instance.tp, instance.pp, instance.dtype, speed)
    except ValueError as error:
        raise PassError(f"instance @{instance.name}: {error}", instance.op) from None


@functools.lru_cache(maxsize=64)
def _program(model: Model, tp: int, pp: int, dtype: str, device: roofline.Device) -> str:
    parallel = Parallel(tp=tp, pp=pp)
    hardware = Hardware.uniform(parallel, device, _LINK)
    builder = ExecutionGraphBuilder(model, parallel, hardware, dtype=dtype)
    chunks, contexts = [(0, CHUNK_TOKENS)], [CONTEXT_TOKENS] * DECODES
    graphs = (
        builder.build_prefill_graph(chunks),
        builder.build_decode_graph(contexts),
        builder.build_hybrid_graph(chunks, contexts),
    )
    return program_of([graph.op for graph in graphs])


_LINK = roofline.Link(bytes_per_s=1e10, latency_us=10.0)


def kept(program: str) -> Path:
    """The file of a program in the cache folder, written unless it is there. Raises OSError."""
    digest = hashlib.sha256(program.encode()).hexdigest()[:20]
    folder = cache_folder() / "programs"
    path = folder / f"torch-{digest}.py"
    if path.is_file() and path.read_bytes() == program.encode():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="writing-") as scratch:
        fresh = Path(scratch) / path.name
        fresh.write_text(program, encoding="utf-8")
        return fresh.replace(path)
