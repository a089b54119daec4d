"""fuse-steps: chunks and decodes become the steps of each instance."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Frozen, Ints, NamesAttr, WordsAttr
from sagec.dialects.scalars import int_attr
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.topology import Topology, topology_of
from sagec.passes.work import work_of
from sagec.runtime.direct.packing import Order, Packed, packed
from sagec.runtime.direct.work import Work


@dataclass(frozen=True)
class FuseStepsPass(ModulePass):
    """Pack prefill chunks and decodes into steps under each instance's token budget.

    `pd.prefill %w bounds [[0, 600]]; pd.decode %all  -->
     pd.steps @p0 {...} [...] chunks {0: "a" [0, 511); 1: "a" [511, 600);}`

    Stall-free batching: in every step all that decode go first, a token each; then prompts that
    are under way; then waiting ones, in rank order, each only when all its blocks are free. What is
    left of the budget cuts the last chunk. mode=hybrid puts both into one step; mode=time-share
    alternates one step of prompts with `turn` steps of decodes; mode=strict lets an instance do one
    phase only. Without mode, the graph's own counts. A graph's step_prompt_tokens bounds the prompt
    tokens of each step further.

    An instance with a turn of n steps (`pd.turns`) gets n at most. With a turn of none it gets a
    pd.steps of nothing, so that it stops: its rows keep their KV and wait.
    """

    name = "fuse-steps"
    mode: Literal["strict", "time-share", "hybrid"] | None = None
    turn: int = 4

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.turn < 1:
            raise PassError(f"fuse-steps: turn={self.turn}; at least 1 step of decodes")
        topology = topology_of(op)
        for graph in flow.graphs(op):
            mode = self.mode or graph.text("mode", "hybrid")
            horizon, most = graph.number("horizon"), graph.number("step_prompt_tokens")
            fuse(graph, topology, Order(mode, self.turn, horizon, most))


def fuse(graph: pd.GraphOp, topology: Topology, order: Order) -> None:
    """Write a pd.steps for each instance with work, instead of those that are there."""
    block = graph.body.block
    reserved: dict[str, kv.ReserveOp] = {}
    scheduled: list[tuple[WordsAttr, SSAValue]] = []
    for op in flow.ops_of_block(block):
        kind = type(op)
        if kind is pd.StepsOp:
            Rewriter.erase_op(op)
        elif kind is kv.ReserveOp:
            on = op.properties["on"]
            if isinstance(on, WordsAttr) and len(on):
                reserved[on.words[on.codes[0]]] = op  # type: ignore[assignment]
        elif kind in _COMPUTING:
            scheduled += _scheduled(op)
    last = block.last_op
    assert last is not None
    works = _computing(work_of(graph, topology), block, last)
    blocks = [_blocks(work, reserved.get(work.instance.name)) for work in works]
    for one in packed(works, blocks, order):
        name = one.work.instance.name
        operands = [value for on, value in scheduled if name in on.words]
        steps = pd.StepsOp.create(operands=operands, properties=_properties(one))
        block.insert_op_before(steps, last)


def _computing(works: Iterable[Work], block: Block, last: Operation) -> list[Work]:
    """The works that may compute, those that prefill first; the others get steps of nothing."""
    computing = []
    for work in works:
        if work.turn_steps != 0:
            computing.append(work)
        else:
            name, budget = work.instance.name, work.instance.max_step_tokens
            block.insert_op_before(pd.StepsOp.none(name, budget), last)
    return sorted(computing, key=lambda work: work.num_prefills == 0)


def _blocks(work: Work, reserve: kv.ReserveOp | None) -> Ints:
    """Blocks of each row: what assign-kv reserved, else what the row needs."""
    if reserve is None:
        return work.blocks
    if reserve.names is work.names:
        return reserve.column("blocks")
    by_name = dict(zip(reserve.names, reserve.column("blocks").tolist(), strict=True))
    needed = zip(work.names, work.blocks.tolist(), strict=True)
    return np.array([by_name.get(name, blocks) for name, blocks in needed], np.int64)


def _properties(packed: Packed) -> dict[str, Attribute]:
    """The properties of a pd.steps; rows that got nothing within the horizon are left out."""
    work, (step, row, begin, end) = packed.work, packed.chunks
    busy = (packed.until > 0) | packed.comes
    busy[row] = True
    rows: Ints | slice | None = None
    names = work.names
    if np.count_nonzero(busy) < len(busy):
        rows = flow.span_of(busy.nonzero()[0])
        names = flow.chosen(names, rows)
        row = row - rows.start if isinstance(rows, slice) else (busy.cumsum() - 1)[row]
    return {
        "instance": _symbol(work.instance.name),
        "num_steps": int_attr(len(packed.us)),
        "max_step_tokens": int_attr(work.instance.max_step_tokens),
        "ids": NamesAttr(names),
        **_row_columns(packed, rows),
        "chunk_step": ColumnAttr(Frozen(step)),
        "chunk_row": ColumnAttr(Frozen(row)),
        "chunk_begin": ColumnAttr(Frozen(begin)),
        "chunk_end": ColumnAttr(Frozen(end)),
        "step_us": ColumnAttr(Frozen(np.rint(packed.us).astype(np.int64))),
        "step_tokens": ColumnAttr(Frozen(packed.tokens)),
        "step_blocks": ColumnAttr(Frozen(packed.used_blocks)),
    }


_symbol = functools.lru_cache(4096)(SymbolRefAttr)


def _row_columns(packed: Packed, rows: Ints | slice | None) -> dict[str, Attribute]:
    """The columns of a pd.steps, of these rows or all; those that say nothing are left out."""
    work = packed.work
    columns = {
        "prompt": work.prompt,
        "computed": work.computed,
        "cached": work.cached,
        "blocks": packed.blocks,
        "deadline": work.deadline,
        "begin": packed.begin,
        "until": packed.until,
    }
    attrs: dict[str, Attribute] = {}
    for name, column in columns.items():
        if name in _ALWAYS or np.count_nonzero(column):
            attrs[name] = ColumnAttr(Frozen(column if rows is None else column[rows]))
    for name, words in (("source", work.source), ("target", work.target)):
        if any(words.words):
            attrs[name] = WordsAttr.of(
                words.words, words.codes if rows is None else words.codes[rows]
            )
    return attrs


_ALWAYS = {"prompt", "blocks"}


_COMPUTING = {pd.PhaseOp, pd.PrefillOp, pd.DecodeOp}


def _scheduled(op: Operation) -> list[tuple[WordsAttr, SSAValue]]:
    """What the op computes, as far as it is seen outside of its phase, and where."""
    if not isinstance(op, pd.PhaseOp):
        on = op.properties.get("on")
        return [(on, op.results[0])] if isinstance(on, WordsAttr) else []
    last = op.body.block.last_op
    assert last is not None
    found: list[tuple[WordsAttr, SSAValue]] = []
    for inner, result in zip(last.operands, op.results, strict=True):
        on = inner.owner.properties.get("on") if isinstance(inner.owner, Operation) else None
        if isinstance(on, WordsAttr):
            found.append((on, result))
    return found
