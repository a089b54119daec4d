"""fuse-steps: chunks and decodes become the steps of each instance."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, SymbolRefAttr, i64
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Frozen, Ints, NamesAttr, WordsAttr
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.topology import Topology, topology_of
from sagec.passes.work import Work, work_of


@dataclass(frozen=True)
class FuseStepsPass(ModulePass):
    """Pack prefill chunks and decodes into steps under each instance's token budget.

    `pd.prefill %w bounds [[0, 600]]; pd.decode %all  -->
     pd.steps @p0 {...} [...] chunks {0: "a" [0, 511); 1: "a" [511, 600);}`

    Stall-free batching: in every step all that decode go first, a token each; then prompts that
    are under way; then waiting ones, in rank order, each only when all its blocks are free. What is
    left of the budget cuts the last chunk. mode=hybrid puts both into one step; mode=time-share
    alternates one step of prompts with `turn` steps of decodes; mode=strict lets an instance do one
    phase only. Without mode, the graph's own counts.
    """

    name = "fuse-steps"
    mode: Literal["strict", "time-share", "hybrid"] | None = None
    turn: int = 4

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.turn < 1:
            raise PassError(f"fuse-steps: turn={self.turn}; at least 1 step of decodes")
        topology = topology_of(op)
        for graph in flow.graphs(op):
            fuse(graph, topology, self.mode or graph.text("mode", "hybrid"), self.turn)


def fuse(graph: pd.GraphOp, topology: Topology, mode: str, turn: int) -> None:
    """Write a pd.steps for each instance with work, instead of those that are there."""
    block = graph.body.block
    for steps in [op for op in block.ops if isinstance(op, pd.StepsOp)]:
        Rewriter.erase_op(steps)
    reserved = {
        place: op
        for op in block.ops
        if isinstance(op, kv.ReserveOp)
        for place in op.words("on")[:1]
    }
    works = sorted(work_of(graph, topology), key=lambda w: w.num_prefills == 0)
    blocks = [_blocks(work, reserved.get(work.instance.name)) for work in works]
    last = block.last_op
    assert last is not None
    for packer in packed(works, blocks, mode, turn, graph.number("horizon")):
        block.insert_op_before(_steps_op(graph, packer), last)


def packed(
    works: list[Work], blocks: list[Ints], mode: str, turn: int, horizon: int
) -> list[Packer]:
    """The steps of all instances; those that prefill come first, for the others await their KV.

    Two instances may await each other's: what was packed too early to know when KV comes is packed
    once more.
    """
    finished: dict[str, float] = {}
    packers: list[Packer] = []
    for work, reserved in zip(works, blocks, strict=True):
        packers.append(Packer(work, reserved, mode, turn, horizon, finished))
        packers[-1].run()
    for at, packer in enumerate(packers):
        if packer.missed_some():
            packers[at] = Packer(packer.work, blocks[at], mode, turn, horizon, finished)
            packers[at].run()
    return packers


def _blocks(work: Work, reserve: kv.ReserveOp | None) -> Ints:
    """Blocks of each row: what assign-kv reserved, else what the row needs."""
    if reserve is None:
        return work.blocks
    if reserve.names is work.names:
        return reserve.column("blocks")
    by_name = dict(zip(reserve.names, reserve.column("blocks").tolist(), strict=True))
    needed = zip(work.names, work.blocks.tolist(), strict=True)
    return np.array([by_name.get(name, blocks) for name, blocks in needed], np.int64)


class Packer:
    """Packs the steps of one instance, one after the other.

    Plain numbers and lists: a step has few changes. `clock` counts the steps in which rows decode;
    in time-share mode those are fewer than the steps. joins and leaves say by that clock how many
    rows begin to decode and how many are done, frees how many blocks they give back.
    """

    def __init__(
        self,
        work: Work,
        blocks: Ints,
        mode: str,
        turn: int,
        horizon: int,
        finished_us: dict[str, float],
    ) -> None:
        self.work, self.mode, self.turn = work, mode, turn
        self.horizon = horizon or _NO_HORIZON
        self.finished_us = finished_us
        self.reserved = blocks
        self.blocks: list[int] = blocks.tolist()
        self.chunks: list[tuple[int, int, int, int]] = []
        self.us: list[float] = []
        self.tokens: list[int] = []
        self.used_blocks: list[int] = []
        self.begin = np.zeros(len(work.names), np.int64)
        self.joined = np.full(len(work.names), _NEVER)
        self.clock = self.active = self.turns = 0
        self.context = 0.0
        self.now_us = 0.0
        self.free = work.instance.kv_blocks
        self.leaves: dict[int, list[float]] = defaultdict(lambda: [0, 0.0, 0])
        self.returned: dict[int, int] = defaultdict(int)
        self._sort_rows()

    def _sort_rows(self) -> None:
        """Who has KV here already, who waits for it, and who waits to be computed."""
        work, prefills = self.work, range(self.work.num_prefills)
        held = (work.held - work.cached)[: work.num_prefills].tolist()
        self.position = work.held[: work.num_prefills].tolist()
        self.prompt = work.prompt[: work.num_prefills].tolist()
        self.decodes = work.decodes.tolist()
        self.offsets, self.bounds = work.bounds.offsets.tolist(), work.bounds.values.tolist()
        self.running = [row for row in prefills if held[row] > 0]
        self.waiting = deque(row for row in prefills if held[row] == 0)
        self.free -= sum(self.blocks[row] for row in self.running)
        others = np.arange(work.num_prefills, len(work.names))
        awaited = work.awaited[work.num_prefills :]
        self._seat_residents(others[~awaited])
        self.comes = np.zeros(len(work.names), np.bool_)
        self.comes[[row for row in others[awaited].tolist() if self._will_come(row)]] = True
        self.awaited = deque(self._by_arrival(np.flatnonzero(self.comes)))
        self.reserve = len(self.awaited) if work.num_prefills else 0

    def _seat_residents(self, rows: Ints) -> None:
        """Residents decode from step 0, as many as a step takes; the rest as places get free."""
        instance = self.work.instance
        seats = min(instance.max_batch, instance.max_step_tokens)
        seated, self.standing = rows[:seats], deque(rows[seats:].tolist())
        self.joined[seated] = 0
        self.active = len(seated)
        self.context = float(self.work.prompt[seated].sum())
        self.free -= int(self.reserved[rows].sum())
        decodes = self.work.decodes[seated]
        for row in seated[decodes < self.horizon].tolist():
            self._leaves_after(row, self.decodes[row])

    def _by_arrival(self, rows: Ints) -> list[int]:
        order: list[int] = rows.tolist()
        if len(order) > 1 and self.finished_us:
            order.sort(key=self._arrival_us)
        return order

    def _will_come(self, row: int) -> bool:
        """Whether the row's KV is on its way, or is computed elsewhere within the horizon."""
        work = self.work
        source = work.source.words[work.source.codes[row]]
        return source == work.instance.name or work.names[row] in self.finished_us

    def missed_some(self) -> bool:
        """Whether KV comes that nobody knew of when this was packed."""
        work = self.work
        if not work.num_prefills or not work.awaited.any():
            return False
        missed = np.flatnonzero(work.awaited & ~self.comes).tolist()
        return any(self._will_come(row) for row in missed)

    def _arrival_us(self, row: int) -> float:
        ready = self.finished_us.get(self.work.names[row], 0.0)
        return ready + float(self.work.transfer_us[row])

    def run(self) -> None:
        """Pack steps until nothing is left to do, or the horizon ends."""
        while len(self.us) < self.horizon:
            self._leave()
            self._join()
            if not self._pack() and not self._unblock():
                break

    def _unblock(self) -> bool:
        """Where nothing can be computed: wait for exported KV to leave, or other KV to come."""
        if self.returned:
            self.free += sum(self.returned.values())
            self.returned.clear()
            return True
        if self.awaited and (arrival := self._arrival_us(self.awaited[0])) > self.now_us:
            self.now_us = arrival
            return True
        return False

    def _leave(self) -> None:
        """Rows whose last decode is behind give back their place and their blocks."""
        if self.clock in self.leaves:
            rows, context, blocks = self.leaves.pop(self.clock)
            self.active -= int(rows)
            self.context -= context
            self.free += int(blocks)
        self.free += self.returned.pop(len(self.us), 0)

    def _leaves_after(self, row: int, steps: int) -> None:
        """The row is done once `steps` more steps have decoded."""
        leaving = self.leaves[self.clock + steps]
        leaving[0] += 1
        leaving[1] += float(self.work.prompt[row]) + steps
        leaving[2] += self.blocks[row]

    def _join(self) -> None:
        """Residents that stood and rows whose KV has arrived decode, where there is room."""
        instance = self.work.instance
        seats = min(instance.max_batch, instance.max_step_tokens) - self.active
        while self.standing and seats > 0:
            self._decode(self.standing.popleft())
            seats -= 1
        while self.awaited and seats > 0:
            row = self.awaited[0]
            if self._arrival_us(row) > self.now_us or self.blocks[row] > self.free:
                break
            self.awaited.popleft()
            self.free -= self.blocks[row]
            self._decode(row)
            seats -= 1

    def _decode(self, row: int) -> None:
        """The row decodes from the step that is packed next."""
        self.begin[row] = len(self.us)
        self.joined[row] = self.clock
        self.active += 1
        self.context += float(self.work.prompt[row])
        self._leaves_after(row, self.decodes[row])

    def _pack(self) -> bool:
        """Pack one step; False where there is nothing to compute."""
        step, before = len(self.us), len(self.chunks)
        decoding = self._decoding()
        prompts, pairs, finished = self._take_chunks(decoding)
        has_chunks = len(self.chunks) > before
        decoding = decoding if has_chunks else self.active
        if not decoding and not has_chunks:
            return False
        self.turns = self.turn if has_chunks else self.turns - 1
        self._append(prompts, decoding, pairs)
        for row in finished:
            self._finish(row, step)
        return True

    def _append(self, prompts: int, decoding: int, pairs: float) -> None:
        """Count the step that is packed: its time, tokens and blocks."""
        context = self.context if decoding else 0.0
        us = self.work.instance.cost.one_step_us(prompts + decoding, pairs + context, self.context)
        self.now_us += us
        self.us.append(us)
        self.tokens.append(prompts + decoding)
        self.used_blocks.append(self.work.instance.kv_blocks - self.free)
        if decoding:
            self.clock += 1
            self.context += decoding

    def _decoding(self) -> int:
        """How many rows decode in this step if it has chunks."""
        if self.mode == "hybrid" or not (self.running or self.waiting):
            return self.active
        if self.mode == "time-share" and self.turns > 0:
            return self.active
        return 0

    def _take_chunks(self, decoding: int) -> tuple[int, float, list[int]]:
        """Prompt tokens, the pairs they attend to, and the rows whose prompt ends in this step."""
        instance = self.work.instance
        if decoding and self.mode != "hybrid":
            return 0, 0.0, []
        budget = instance.max_step_tokens - decoding
        budget -= min(self.reserve, instance.max_step_tokens // 2)
        # Whose prompt ends decodes from the next step on, beside all that decode now.
        seats = min(instance.max_batch, instance.max_step_tokens) - self.active
        partial = instance.max_partial_prefills or seats
        left, total, pairs = budget, 0, 0.0
        finished: list[int] = []
        queue, self.running = self.running, []
        while left > 0 and seats > 0 and partial > 0 and (queue or self._starts()):
            row = queue.pop(0) if queue else self._start()
            begin = self.position[row]
            end = min(self._bound(row), begin + left)
            self.chunks.append((len(self.us), row, begin, end))
            self.position[row] = end
            left -= end - begin
            seats -= 1
            total += end - begin
            pairs += (end * (end + 1) - begin * (begin + 1)) / 2
            if end == self.prompt[row]:
                finished.append(row)
            else:
                self.running.append(row)
                partial -= 1
        self.running += queue
        return total, pairs, finished

    def _starts(self) -> bool:
        """Whether the first that waits finds all its blocks; those behind wait for it."""
        return bool(self.waiting) and self.blocks[self.waiting[0]] <= self.free

    def _start(self) -> int:
        row = self.waiting.popleft()
        self.free -= self.blocks[row]
        return row

    def _bound(self, row: int) -> int:
        """Where the chunk ends that the row is in."""
        low, high = self.offsets[row], self.offsets[row + 1]
        return int(self.bounds[bisect.bisect_right(self.bounds, self.position[row], low, high)])

    def _finish(self, row: int, step: int) -> None:
        """The row's prompt is computed: it decodes here from the next step, or leaves."""
        self.finished_us[self.work.names[row]] = self.now_us
        if self.decodes[row] > 0:
            self._decode(row)
        else:
            self.returned[step + 1] += self.blocks[row]

    @property
    def until(self) -> Ints:
        """Tokens of KV of each row after its last decode; 0 where it does not decode."""
        work = self.work
        last = np.minimum(self.joined + work.decodes, self.clock)
        taken = np.where(self.joined == _NEVER, 0, last - self.joined)
        taken = np.where(self.comes, work.decodes, taken)
        return np.where(taken > 0, work.prompt + taken, 0)


_NO_HORIZON = 1 << 30
_NEVER = 1 << 40


def _steps_op(graph: pd.GraphOp, packer: Packer) -> pd.StepsOp:
    """The pd.steps of what was packed; rows that got nothing within the horizon are left out."""
    work = packer.work
    chunks = np.array(packer.chunks, np.int64).reshape(-1, 4)
    until = packer.until
    busy = (until > 0) | packer.comes
    busy[chunks[:, 1]] = True
    rows = None if busy.all() else np.flatnonzero(busy)
    properties: dict[str, Attribute] = {
        "instance": SymbolRefAttr(work.instance.name),
        "num_steps": IntegerAttr(len(packer.us), i64),
        "max_step_tokens": IntegerAttr(work.instance.max_step_tokens, i64),
        "ids": NamesAttr(work.names if rows is None else tuple(compress(work.names, busy))),
        **_row_columns(packer, until, rows),
        "chunk_step": ColumnAttr.of(chunks[:, 0].copy()),
        "chunk_row": ColumnAttr.of((np.cumsum(busy) - 1)[chunks[:, 1]]),
        "chunk_begin": ColumnAttr.of(chunks[:, 2].copy()),
        "chunk_end": ColumnAttr.of(chunks[:, 3].copy()),
        "step_us": ColumnAttr.of(np.round(packer.us).astype(np.int64)),
        "step_tokens": ColumnAttr.of(packer.tokens),
        "step_blocks": ColumnAttr.of(packer.used_blocks),
    }
    return pd.StepsOp.create(operands=_scheduled(graph, work), properties=properties)


def _row_columns(packer: Packer, until: Ints, rows: Ints | None) -> dict[str, Attribute]:
    """The columns of a pd.steps, of these rows or all; those that say nothing are left out."""
    work = packer.work
    columns = {
        "prompt": work.prompt,
        "computed": np.where(work.awaited, 0, work.held - work.cached),
        "cached": work.cached,
        "blocks": packer.reserved,
        "deadline": work.deadline,
        "begin": np.where(packer.comes, 0, packer.begin),
        "until": until,
    }
    attrs: dict[str, Attribute] = {}
    for name, column in columns.items():
        if name in _ALWAYS or column.any():
            attrs[name] = ColumnAttr(Frozen(column if rows is None else column[rows]))
    for name, words in (("source", work.source), ("target", work.target)):
        if any(words.words):
            attrs[name] = words if rows is None else words.take(rows)
    return attrs


_ALWAYS = {"prompt", "blocks"}


def _scheduled(graph: pd.GraphOp, work: Work) -> list[SSAValue]:
    """The values that the instance's steps compute, as far as they are seen outside the phases."""
    values: list[SSAValue] = []
    for op in graph.body.block.ops:
        if isinstance(op, pd.PhaseOp):
            for inner, result in zip(_yielded(op), op.results, strict=True):
                if _runs_on(inner, work.instance.name):
                    values.append(result)
        elif isinstance(op, pd.PrefillOp | pd.DecodeOp) and _runs_on(op, work.instance.name):
            values.append(op.results[0])
    return values


def _yielded(phase: pd.PhaseOp) -> list[Operation]:
    last = phase.body.block.last_op
    assert last is not None
    return [value.owner for value in last.operands if isinstance(value.owner, Operation)]


def _runs_on(op: Operation, instance: str) -> bool:
    on = op.properties.get("on")
    return isinstance(on, WordsAttr) and instance in on.words
