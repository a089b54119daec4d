"""convert-pd-to-exec: the operators of the steps that a pd.steps packs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter

from sagec.dialects import exec as ex
from sagec.dialects import pd
from sagec.dialects.rows import symbol
from sagec.lowering.execution_graph_builder import (
    ExecutionGraphBuilder,
    Hardware,
    Parallel,
    StepTokens,
    Tier,
)
from sagec.passes.errors import PassError
from sagec.passes.flow import graphs, ops_in
from sagec.passes.topology import Instance, Topology, topology_of
from sagec.runtime import roofline


@dataclass(frozen=True)
class ConvertPdToExecPass(ModulePass):
    """Write an exec.graph behind the pd.graph for each step of each instance, or for those named.

    `pd.graph @g {pd.steps @p0 {num_steps = 1} [...] chunks {0: "a" [0, 512)}}  -->
     pd.graph @g {...}; exec.graph @g_p0_0 {phase = "prefill", ...} {...}`

    step: this step alone, of every instance that has it. instance: this instance alone. A step that
    computes nothing gets no graph. A graph that the module has already under the name is written
    again.

    kv_tier: where the KV cache lies; if not on the device, kv_bytes_per_s and kv_latency_us say how
    far away, for each rank.

    micro_batches: parts of a step that follow each other through the stages of a pipeline.

    A row decodes from the step that its pd.steps says; where its KV is awaited from another
    instance, which may be later, as if the KV were there.
    """

    name = "convert-pd-to-exec"
    step: int | None = None
    instance: str | None = None
    kv_tier: Literal["device", "host", "disk"] = "device"
    kv_bytes_per_s: int | float | None = None
    kv_latency_us: int | float = 10.0
    micro_batches: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        tier, topology = self._tier(), topology_of(op)
        if self.instance is not None:
            topology.instance(self.instance, op)
        before = {g.symbol: g for g in op.body.block.ops if isinstance(g, ex.ExecGraphOp)}
        made: set[str] = set()
        for graph in graphs(op):
            new = list(self._graphs(graph, topology, tier))
            for one in new:
                if one.symbol in made:
                    what = f"two steps would be {symbol(one.symbol)}; rename a graph or an instance"
                    raise PassError(what, graph)
                made.add(one.symbol)
                if one.symbol in before:
                    Rewriter.erase_op(before[one.symbol])
            Rewriter.insert_op(new, InsertPoint.after(graph))
        if not made and (self.step, self.instance) != (None, None):
            asked = {"step": self.step, "instance": self.instance}
            words = " ".join(f"{n}={value}" for n, value in asked.items() if value is not None)
            there = ", ".join(
                f"{symbol(steps.instance_name)} in steps [0, {steps.number('num_steps')})"
                for graph in graphs(op)
                for steps in _steps_of(graph)
            )
            what = f"{self.name}: no graph computes anything at {words}"
            raise PassError(f"{what}; there are: {there or 'none'}", op)

    def _tier(self) -> Tier | None:
        """What the options say of where KV lies; None: on the device."""
        bytes_per_s, latency_us = self.kv_bytes_per_s, self.kv_latency_us
        said = f"{self.name}: kv-tier={self.kv_tier} kv-bytes-per-s={bytes_per_s}"
        if self.kv_tier == "device":
            if bytes_per_s is not None:
                raise PassError(f"{said}; KV on the device needs no way, name another tier")
            return None
        if bytes_per_s is None or bytes_per_s <= 0 or latency_us < 0:
            raise PassError(f"{said} kv-latency-us={latency_us}; say a bandwidth above 0, and a "
                            "latency of 0 or more")  # fmt: skip
        return Tier(self.kv_tier, roofline.Link(float(bytes_per_s), float(latency_us)))

    def _graphs(
        self, graph: pd.GraphOp, topology: Topology, tier: Tier | None
    ) -> Iterator[ex.ExecGraphOp]:
        """The graph of each step that is asked for and computes something."""
        mixes = graph.text("mode", "hybrid") != "time-share"
        for steps in _steps_of(graph):
            if self.instance not in (None, steps.instance_name):
                continue
            instance = topology.instance(steps.instance_name, steps)
            builder = builder_of(instance, topology, steps, tier, self.micro_batches)
            for number, tokens in enumerate(tokens_of(steps, mixes)):
                if tokens.tokens and self.step in (None, number):
                    name = f"{graph.symbol}_{instance.name}_{number}"
                    yield builder.build(tokens, name=name, instance=instance.name).op


def _steps_of(graph: pd.GraphOp) -> list[pd.StepsOp]:
    """The pd.steps of a graph. Raises PassError where it has work and none of them."""
    ops = ops_in(graph)
    steps = [op for op in ops if isinstance(op, pd.StepsOp)]
    if not steps and any(isinstance(op, pd.PrefillOp | pd.DecodeOp) for op in ops):
        raise PassError(f"pd.graph @{graph.symbol} has no pd.steps; run fuse-steps first", graph)
    return steps


def builder_of(
    instance: Instance,
    topology: Topology,
    at: Operation,
    kv_tier: Tier | None = None,
    micro_batches: int = 1,
) -> ExecutionGraphBuilder:
    """What builds the graphs of an instance, with the times of its devices and links.

    Raises PassError, at an op, for a layout that does not fit the model.
    """
    parallel = Parallel(instance.tp, instance.pp, 1, tuple(d.name for d in instance.devices))
    devices = {d.name: roofline.Device(d.flops_per_s, d.bytes_per_s) for d in instance.devices}

    @functools.cache
    def link_between(source: str, target: str) -> roofline.Link:
        if (path := topology.device_path(source, target)) is None:
            raise PassError(
                f"instance {symbol(instance.name)}: no link leads from {symbol(source)} to "
                f"{symbol(target)}, and its ranks exchange tensors; declare a cluster.link",
                at,
            )
        return roofline.Link(path.bytes_per_s, path.latency_us)

    try:
        return ExecutionGraphBuilder(
            instance.model,
            parallel,
            Hardware(devices, link_between),
            dtype=instance.dtype,
            kv_dtype=instance.kv_dtype,
            kv_tier=kv_tier,
            micro_batches=micro_batches,
        )
    except ValueError as error:
        raise PassError(f"instance {symbol(instance.name)}: {error}", at) from None


def tokens_of(steps: pd.StepsOp, mixes: bool) -> Iterator[StepTokens]:
    """What each of the steps computes: chunks as they stand there, and the rows that decode.

    mixes: whether rows decode in a step that has chunks. A row decodes until its KV holds `until`
    tokens; before its first decode it holds its prompt.
    """
    count = steps.number("num_steps")
    step, row, begin, end = steps.chunks
    prompt, until, first = (steps.column(name) for name in ("prompt", "until", "begin"))
    decodes_in = np.ones(count, np.int64)
    if not mixes:
        decodes_in[step] = 0
    decodes_before = np.concatenate([[0], np.cumsum(decodes_in)])
    for number in range(count):
        here = np.flatnonzero(step == number)
        held = prompt + decodes_before[number] - decodes_before[np.minimum(first, number)]
        joins = (first <= number) & (held < until) & bool(decodes_in[number])
        yield StepTokens(
            chunks=tuple(zip(begin[here].tolist(), end[here].tolist(), strict=True)),
            samples=tuple((end[here] == prompt[row[here]]).tolist()),
            contexts=tuple(held[joins].tolist()),
        )
