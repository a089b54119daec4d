"""assign-kv: every request gets the blocks it will need, or leaves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Ints, NamesAttr, WordsAttr, quoted
from sagec.dialects.rows import symbol
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.retype import carry_rows
from sagec.passes.topology import Topology, topology_of
from sagec.passes.work import work_of
from sagec.runtime.direct.work import Work, victims_of


@dataclass(frozen=True)
class AssignKVPass(ModulePass):
    """Reserve KV blocks for the horizon; where those that decode need more than there are, the
    last of them is preempted.

    `pd.decode %all steps 16 on @d0  -->  kv.reserve on @d0 ["a": blocks 21, ...]`

    Refuses a request that no empty instance of its size could hold.
    """

    name = "assign-kv"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        topology = topology_of(op)
        for graph in flow.graphs(op):
            assign(graph, topology)


def assign(graph: pd.GraphOp, topology: Topology) -> None:
    """Preempt what does not fit, then write a kv.reserve for each instance with work."""
    works = work_of(graph, topology)
    preempted = False
    for work in works:
        _check_fits(work, graph)
        if (victims := victims_of(work)).size:
            _preempt(graph, work, victims)
            preempted = True
    block = graph.body.block
    for op in flow.ops_of_block(block):
        if type(op) is kv.ReserveOp:
            Rewriter.erase_op(op)
    last = block.last_op
    assert last is not None
    for work in work_of(graph, topology) if preempted else works:
        block.insert_op_before(_reserve(work), last)


def _check_fits(work: Work, graph: pd.GraphOp) -> None:
    """Raise PassError for a request that can never have the KV it needs."""
    instance = work.instance
    room = instance.kv_blocks * instance.block_tokens
    if int(work.prompt.max()) + int(work.generate.max()) <= room:
        return
    whole = work.whole
    if whole.max() > room:
        needs = -(-whole // instance.block_tokens)
        row = int(needs.argmax())
        raise PassError(
            f"{quoted(work.names[row])} needs {needs[row]} KV blocks for {work.whole[row]} tokens, "
            f"and {symbol(instance.name)} has {instance.kv_blocks} of {instance.block_tokens} "
            f"tokens: {needs[row] - instance.kv_blocks} too few",
            graph,
        )


def _preempt(graph: pd.GraphOp, work: Work, victims: Ints) -> None:
    """Take the victims out of the decodes of their instance."""
    gone = {work.names[row] for row in victims.tolist()}
    needed = int(work.blocks.sum())
    because = f"KV: {needed} blocks needed, {work.instance.kv_blocks} there"
    for decode in flow.ops_of(graph, pd.DecodeOp):
        rows = flow.table(decode.kv)
        named = [name for name in rows.names if name in gone]
        if not named:
            continue
        columns: dict[str, Attribute] = {
            "ids": NamesAttr.of(named),
            "verdict": ColumnAttr.of(np.full(len(named), pd.PREEMPT)),
            "on": WordsAttr.same(work.instance.name, len(named)),
            "because": WordsAttr.same(because, len(named)),
        }
        preempt = pd.PreemptOp.over(decode.kv, columns)
        preempt.location = decode.location
        assert decode.parent is not None
        decode.parent.insert_op_before(preempt, decode)
        preempt.rest.name_hint = "kept"
        if decode.on is not None:
            kept = [row for row, name in enumerate(rows.names) if name not in gone]
            decode.on = decode.on.take(np.array(kept, np.int64))
        decode.operands[0] = preempt.rest
        carry_rows(preempt.rest)


def _reserve(work: Work) -> kv.ReserveOp:
    columns: dict[str, Attribute] = {
        "ids": NamesAttr(work.names),
        "on": WordsAttr.same(work.instance.name, len(work.names)),
        "blocks": ColumnAttr.of(work.blocks),
    }
    return kv.ReserveOp.create(properties=columns)
