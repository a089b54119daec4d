"""separate-phases: prefill and decode become sub-graphs that can run in different places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Attribute, Block, Operation, Region
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import Ints
from sagec.dialects.scalars import int_attr
from sagec.passes import flow
from sagec.passes.attention_ffn import Pool, part_layers
from sagec.passes.errors import PassError
from sagec.passes.streams import exec_graphs
from sagec.passes.topology import Topology, topology_of
from sagec.runtime.direct.work import UNBOUNDED_STEPS


@dataclass(frozen=True)
class SeparatePhasesPass(ModulePass):
    """Put the prefills of a graph into one phase and its decodes into another.

    `%kv = pd.prefill %w; %end = pd.decode %kv  -->
     %kv = pd.phase prefill {...} { pd.prefill %w }; %end = pd.phase decode {...} { pd.decode %kv }`

    A phase says what it needs: tokens to compute and tokens of KV to hold. `scheme=none` leaves the
    graph alone. `scheme=af` works on operators: it moves the feed-forward of an exec.graph to the
    instance or device `ffn`, in `micro_batches` parts of its rows; see passes/attention_ffn.py. It
    refuses, with the times, where that takes longer.
    """

    name = "separate-phases"
    scheme: Literal["pd", "af", "none"] = "pd"
    ffn: str = ""
    micro_batches: int = 2

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.scheme == "af":
            self._part_layers(op)
        elif self.ffn:
            raise PassError(f"ffn={self.ffn} is for scheme=af, and this is scheme={self.scheme}")
        elif self.scheme == "pd":
            for graph in flow.graphs(op):
                separate(graph, topology_of(op))

    def _part_layers(self, module: ModuleOp) -> None:
        graphs = list(exec_graphs(module))
        if not graphs:
            raise PassError(
                "scheme=af parts the operators of a layer, and this graph has none; "
                "what separates requests is scheme=pd",
                next(flow.graphs(module), None),
            )
        if self.micro_batches < 1:
            raise PassError(f"micro_batches={self.micro_batches}; it must be 1 or more")
        topology = topology_of(module)
        pool = Pool.named(self.ffn, topology)
        for graph in graphs:
            part_layers(graph, pool, topology, self.micro_batches)


def separate(graph: pd.GraphOp, topology: Topology) -> None:
    """Wrap the graph's prefills, and its decodes with all that leads to them, in a phase each."""
    ops = list(graph.body.block.ops)
    _wrap(graph, "prefill", [op for op in ops if isinstance(op, pd.PrefillOp)], topology)
    before_decodes = pd.JoinOp | pd.TransferOp | pd.PreemptOp
    decodes = [op for op in ops if isinstance(op, pd.DecodeOp | before_decodes)]
    _wrap(graph, "decode", decodes, topology)


def _wrap(graph: pd.GraphOp, phase: str, ops: Sequence[Operation], topology: Topology) -> None:
    """Move `ops` into a phase of their own, which yields what is used outside of it."""
    if not ops:
        return
    inside = set(ops)
    outs = [r for op in ops for r in op.results if any(u.operation not in inside for u in r.uses)]
    needs = _needs(graph, phase, ops, topology)
    block = Block()
    region = Region(block)
    wrapper = pd.PhaseOp.create(
        properties={"phase": StringAttr(phase), **needs},
        regions=[region],
        result_types=[out.type for out in outs],
    )
    parent = graph.body.block
    wrapper.location = ops[0].location
    parent.insert_op_before(wrapper, ops[-1])
    for op in ops:
        parent.detach_op(op)
        block.add_op(op)
    for out, result in zip(outs, wrapper.results, strict=True):
        out.replace_uses_with_if(result, lambda use: use.operation not in inside)
        result.name_hint = out.name_hint
    block.add_op(pd.YieldOp.create(operands=outs))


def _needs(
    graph: pd.GraphOp, phase: str, ops: Sequence[Operation], topology: Topology
) -> dict[str, Attribute]:
    """What the phase computes and holds, over its horizon."""
    compute = held = 0
    for op in ops:
        if isinstance(op, pd.PrefillOp):
            rows = flow.table(op.wave)
            compute += int((rows.prompt - rows.computed - rows.cached).sum())
            held += int(rows.prompt.sum())
        elif isinstance(op, pd.DecodeOp):
            rows = flow.table(op.kv)
            tokens = int(decode_tokens(rows, op.max_steps or graph.number("horizon")).sum())
            compute += tokens
            held += tokens + int(rows.prompt.sum())
    kv_bytes = {model.kv_bytes_per_token() for model in topology.models.values()}
    size = int(held * kv_bytes.pop()) if len(kv_bytes) == 1 else 0
    needs = {"compute_tokens": compute, "kv_tokens": held, "kv_bytes": size}
    return {name: int_attr(value) for name, value in needs.items()}


def decode_tokens(rows: flow.Table, horizon: int) -> Ints:
    """Tokens that each row decodes within `horizon` steps (0: all): its first is prefill's."""
    remaining = rows.generate - ~rows.resident
    if horizon:
        return np.minimum(remaining, horizon)
    unbounded = rows.generate >= pd.UNBOUNDED
    return np.where(unbounded, np.minimum(remaining, UNBOUNDED_STEPS), remaining)
