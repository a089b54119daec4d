"""The operators of one exec graph as lines of Python, in the order of the text.

A value becomes a variable. Two values may share one: the residual stream, to which a norm adds in
place, and what an all-reduce sums up in place. Where an operand is needed again as it was, it is
cloned first. A name that no value needs any more is given again, so that a layer's lines read like
those of the layer before, which is how `torch_source` finds loops.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xdsl.ir import Operation, SSAValue

from sagec.dialects import exec as ex
from sagec.lowering.step_rows import StepRows
from sagec.passes.errors import PassError

ABSENT = "None"
"""What stands for the operand that the first norm of a step lacks."""

_TAKEN = {"F", "batch", "cache", "kernels", "kv", "lanes_of", "layer", "ranks", "torch", "weights",
          "expert", "made", "rows", "share"}  # fmt: skip

_WEIGHTS_OF: dict[type[Operation], str] = {
    ex.QKVOp: "layer.norm",
    ex.FFNOp: "layer.ffn_norm",
    ex.LMHeadOp: "weights.norm",
}
"""The weights of a norm, by what takes its result."""

_ATTENTIONS = {ex.PrefillAttentionOp: "chunks", ex.DecodeAttentionOp: "tokens"}

_PASSED_ON = (ex.WaitOp, ex.SliceOp, ex.ConcatOp, ex.AllGatherOp)
"""What a normed value may go through on the way."""


@dataclass(frozen=True)
class Line:
    """A statement. layer: the one in whose part of the step it stands, None: before or behind them.

    note: what it computes, for a comment. absent: the code has ABSENT for an operand.
    """

    code: str
    note: str
    layer: int | None
    absent: bool = False


@dataclass(frozen=True)
class _Variable:
    """Where a value lies: rows [begin, end) of a tensor, of which `root` is the number."""

    name: str
    root: int
    begin: int
    end: int

    def meets(self, other: _Variable) -> bool:
        """Whether a write to one is seen in the other."""
        return self.root == other.root and self.begin < other.end and other.begin < self.end


class Statements:
    """Writes the lines of one graph."""

    def __init__(self, graph: ex.ExecGraphOp) -> None:
        self.lines: list[Line] = []
        self.graph = graph
        self.rows = StepRows(graph)
        self._is_hybrid = graph.scalar("phase") == "hybrid"
        self._ops = list(graph.operators)
        self._last_use = _last_uses(self._ops)
        self._now = 0
        self._layer: int | None = None
        self._roots = 0
        self._sizes: dict[int, int] = {}  # of each root, its rows
        self._variables: dict[SSAValue, _Variable] = {}
        self._works: dict[SSAValue, str] = {}  # of what an all-reduce still makes, its variable
        self._attended: dict[SSAValue, _Variable] = {}  # of each qkv
        self._sampled: set[SSAValue] = set()  # what has only the rows that sample
        self._logits: dict[int, str] = {}  # of each lane

    def written(self) -> list[Line]:
        """All lines. Raises PassError for what the torch engine cannot run."""
        for number, op in enumerate(self._ops):
            self._now = number
            if (write := _WRITERS.get(type(op))) is None:
                raise PassError(f"{op.name}: the torch engine has no code for it", op)
            self._layer = _layer_entered(op, self._layer)
            self._await(op)
            write(self, op)
        if len(self._logits) < len(self.rows.lanes):
            raise PassError(f"exec.graph @{self.graph.symbol} samples none of its tokens; the "
                            "torch engine wants logits of a step", self.graph)  # fmt: skip
        return self.lines

    @property
    def logits(self) -> list[str]:
        """The variables of the logits of each lane, in their order, once all is written."""
        return [self._logits[lane] for lane in range(len(self.rows.lanes))]

    # What each operator becomes.

    def input(self, op: ex.InputOp) -> None:
        batch = self.rows.batch(op.tokens, op)
        self._put(op.tokens, self._variable(f"{batch}.tokens", op.tokens))

    def embedding(self, op: ex.EmbeddingOp) -> None:
        name = self._fresh(op.hidden, "hidden")
        tokens = self._name(op.tokens)
        self._add(f"{name} = F.embedding({tokens}, weights.embedding)", self._note(op))
        self._put(op.hidden, self._variable(name, op.hidden))

    def norm(self, op: ex.NormOp) -> None:
        weight, samples = self._weight_of(op), self._only_samples(op)
        added = ABSENT if op.added is None else self._name(op.added)
        hidden = self._variables[op.hidden]
        if samples:
            rows = f"[{self.rows.batch(op.hidden, op)}.sampled]"
            stream = f"{hidden.name}{rows}"
            added += rows if op.added is not None else ""
            self._sampled.add(op.normed)
        else:
            if op.added is not None:
                hidden = self._writable(op.hidden)
            stream = hidden.name
            self._put(op.sum, hidden)
        name = self._fresh(op.normed, "normed")
        self._add(f"{name} = kernels.add_norm({stream}, {added}, {weight})",
                  self._note(op, "S" if samples else ""), absent=op.added is None)  # fmt: skip
        self._put(op.normed, self._variable(name, op.normed))
        self._drop(*filter(None, [op.hidden, op.added] if samples else [op.added]))

    def qkv(self, op: ex.QKVOp) -> None:
        self._call(f"{self._layer_of(op)}.qkv", op, op.normed, op.qkv, "qkv")
        self._drop(op.normed)

    def attention(self, op: ex.AttentionOp) -> None:
        """What attention gives of one qkv is one tensor; the first op computes all of it."""
        qkv, attended, first = op.operands[0], op.results[0], op.number("first")
        if qkv not in self._attended:
            self._attended[qkv] = self._attend(op, qkv)
        whole = self._attended[qkv]
        rows = ex.tensor_of(attended).shape[0]
        self._put(attended, replace(whole, begin=first, end=first + rows))
        self._drop(qkv)

    def _attend(self, op: ex.AttentionOp, qkv: SSAValue) -> _Variable:
        """Store the new KV, and attend to it with all rows."""
        batch, cache = self.rows.batch(qkv, op), self._cache_of(op)
        given = f"{self._name(qkv)}, {cache}, {batch}"
        if not self.rows.is_one_batch:
            self._add(f"kernels.begin_step({batch})")
        self._add(f"kernels.store_kv({given}, {self._layer_of(op)})", "kv_store")
        name = self._fresh(op.results[0], "attended", self._operands())
        self._add(f"{name} = kernels.empty_attended({self._name(qkv)})")
        asking = {type(use.operation): use.operation for use in qkv.uses}
        for kind, word in _ATTENTIONS.items():
            # A hybrid step is any step: what it holds, and where, is known at run time alone.
            if (other := asking.get(kind)) is not None or self._is_hybrid:
                note = self._note(other) if isinstance(other, ex.AttentionOp) else ""
                self._add(f"kernels.attend_{word}({given}, {name})", note)
        return self._variable(name, qkv)

    def projection(self, op: ex.ProjectionOp) -> None:
        places = [self._variables[part] for part in op.parts]
        rows = sum(place.end - place.begin for place in places)
        if len({place.root for place in places}) > 1 or rows != self._sizes[places[0].root]:
            raise PassError(
                "exec.projection has some of the rows that attention gives; the torch engine "
                "projects all of them at once", op,
            )  # fmt: skip
        self._call(f"{self._layer_of(op)}.output", op, op.parts[0], op.added, "added")
        self._drop(op.parts[0])

    def ffn(self, op: ex.FFNOp) -> None:
        ffn, name = f"{self._layer_of(op)}.ffn", self._name(op.normed)
        added, note = self._fresh(op.added, "added"), self._note(op)
        if op.number("experts"):
            self._add(f"{added} = torch.zeros_like({name})", f"{note}, of experts")
            self._add(f"for expert, rows, share in {ffn}.routed({name}):")
            given = f"expert.gate_up({name}[rows])"
            self._add(f"    made = expert.down(kernels.silu_multiply({given}))")
            self._add(f"    {added}.index_add_(0, rows, made.mul_(share))")
            self._add("    del made")
        else:
            self._add(f"{added} = {ffn}.down(kernels.silu_multiply({ffn}.gate_up({name})))", note)
        self._put(op.added, self._variable(added, op.added))
        self._drop(op.normed)

    def lm_head(self, op: ex.LMHeadOp) -> None:
        name = self._name(op.normed)
        if op.normed not in self._sampled:
            name += f"[{self.rows.batch(op.normed, op)}.sampled]"
        result = self._fresh(op.logits, "logits")
        self._add(f"{result} = weights.lm_head({name})", self._note(op, "S"))
        self._put(op.logits, self._variable(result, op.logits))
        self._drop(op.normed)

    def sample(self, op: ex.SampleOp) -> None:
        """The engine samples, for each request as it asks."""
        self._logits[self.rows.of(op.logits).lane] = self._name(op.logits)

    def slice(self, op: ex.SliceOp) -> None:
        if op.whole not in self._variables:
            return self.nothing(op)
        whole, first = self._variables[op.whole], op.number("first")
        count = ex.tensor_of(op.part).shape[0]
        name = self._fresh(op.part, "part")
        first_row, last_row = (self.rows.bound(op.whole, at) for at in (first, first + count))
        bounds = f"{first_row} : {last_row}".strip()
        self._add(f"{name} = {whole.name}[{bounds}]", self._note(op))
        begin = whole.begin + first
        return self._put(op.part, _Variable(name, whole.root, begin, begin + count))

    def concat(self, op: ex.ConcatOp) -> None:
        if op.parts[0] not in self._variables:
            return self.nothing(op)
        parts = ", ".join(map(self._name, op.parts))
        name = self._fresh(op.whole, "whole")
        self._add(f"{name} = torch.cat([{parts}])", self._note(op))
        return self._put(op.whole, self._variable(name, op.whole))

    def all_reduce(self, op: ex.AllReduceOp) -> None:
        for part, total in zip(op.parts, op.sums, strict=True):
            self._put(total, self._writable(part))
        names = ", ".join(map(self._name, op.sums))
        if op.stream_name != ex.COMM:
            return self._add(f"ranks.all_reduce([{names}])", self._note(op))
        work = self._unused("work")
        self._works |= dict.fromkeys(op.sums, work)
        return self._add(f"{work} = ranks.begin_all_reduce([{names}])", self._note(op))

    def resize(self, op: ex.AllGatherOp | ex.ReduceScatterOp) -> None:
        word = op.name.removeprefix("exec.")
        for at, (before, after) in enumerate(zip(op.operands, op.results, strict=True), start=1):
            later = set(map(self._name, op.operands[at:]))
            name = self._fresh(after, "logits" if _is_logits(after) else word, later)
            self._add(f"{name} = ranks.{word}({self._name(before)}, {op.number('axis')})",
                      self._note(op, "S" if _is_logits(after) else ""))  # fmt: skip
            self._put(after, self._variable(name, after))

    def wait(self, op: ex.WaitOp) -> None:
        """`_await` has waited already; KV has no variable."""
        if op.made in self._variables:
            self._put(op.there, self._variables[op.made])

    def nothing(self, op: ex.OperatorOp) -> None:
        """KV is in its blocks before a step begins, and goes there before attention reads it."""

    # Variables.

    def _drop(self, *values: SSAValue) -> None:
        """Free large values that nobody needs any more, before others take their names."""
        used = {variable.name for _, variable in self._needed()}
        names = dict.fromkeys(self._name(value) for value in values)
        if dead := [name for name in names if name not in used]:
            self._add(f"del {', '.join(dead)}")

    def _call(
        self, function: str, op: ex.OperatorOp, operand: SSAValue, result: SSAValue, default: str
    ) -> None:
        argument = self._name(operand)
        name = self._fresh(result, default)
        self._add(f"{name} = {function}({argument})", self._note(op))
        self._put(result, self._variable(name, result))

    def _add(self, code: str, note: str = "", absent: bool = False) -> None:
        self.lines.append(Line(code, note, self._layer, absent))

    def _await(self, op: ex.OperatorOp) -> None:
        """Wait for the messages that make the operands, each once, and let go of what they hold."""
        for work in dict.fromkeys(self._works[v] for v in op.operands if v in self._works):
            self._works = {v: other for v, other in self._works.items() if other != work}
            self._add(f"{work}.wait()")
            self._add(f"del {work}")

    def _put(self, value: SSAValue, variable: _Variable) -> None:
        self._variables[value] = variable

    def _name(self, value: SSAValue) -> str:
        return self._variables[value].name

    def _variable(self, name: str, value: SSAValue) -> _Variable:
        """A tensor of its own."""
        self._roots += 1
        rows = self._sizes[self._roots] = ex.tensor_of(value).shape[0]
        return _Variable(name, self._roots, 0, rows)

    def _needed(self) -> Iterator[tuple[SSAValue, _Variable]]:
        """The values that later operators take, and where they are."""
        for value, variable in self._variables.items():
            if self._last_use.get(value, -1) > self._now:
                yield value, variable

    def _writable(self, value: SSAValue) -> _Variable:
        """Where a value is, or a clone of it where somebody needs what a write would change."""
        place = self._variables[value]
        if not any(place.meets(other) for _, other in self._needed()):
            return place
        name = self._fresh(value, "clone", self._operands())
        self.lines.append(Line(f"{name} = {place.name}.clone()", "", self._layer))
        return self._variable(name, value)

    def _operands(self) -> set[str]:
        """The names of what the operator takes: others must not have them before it has."""
        operands = self._ops[self._now].operands
        return {self._name(value) for value in operands if value in self._variables}

    def _fresh(self, value: SSAValue, default: str, kept: Collection[str] = ()) -> str:
        """A name for a value, by its hint; values in use have others, and so have those kept."""
        hint = re.sub(r"_?\d+$", "", value.name_hint or "")
        is_name = hint.isidentifier() and not keyword.iskeyword(hint) and hint not in _TAKEN
        return self._unused(hint if is_name else default, kept)

    def _unused(self, base: str, kept: Collection[str] = ()) -> str:
        used = {variable.name for _, variable in self._needed()} | {*self._works.values(), *kept}
        name, number = base, 1
        while name in used:
            number += 1
            name = f"{base}_{number}"
        return name

    def _note(self, op: ex.OperatorOp, rows: str = "") -> str:
        """`norm [T, 64], 3.1 us`; rows: how many, where it is not the tokens'."""
        result = op.results[0]
        shape = [rows or self.rows.count(result), *map(str, ex.tensor_of(result).shape[1:])]
        us = f", {op.estimated_us:.4g} us" if op.estimated_us else ""
        return f"{op.name.removeprefix('exec.')} [{', '.join(shape)}]{us}"

    # What an operator belongs to.

    def _layer_of(self, op: ex.OperatorOp) -> str:
        number = op.layer_number
        return "layer" if number == self._layer else f"weights.layers[{number}]"

    def _cache_of(self, op: ex.OperatorOp) -> str:
        number = op.layer_number
        return "cache" if number == self._layer else f"kv[{number}]"

    def _weight_of(self, op: ex.NormOp) -> str:
        for taker in _takers(op.normed):
            if (weight := _WEIGHTS_OF.get(type(taker))) is not None:
                return weight.replace("layer", self._layer_of(op), 1)
        raise PassError("exec.norm: neither exec.qkv, exec.ffn nor exec.lm_head takes its result, "
                        "so nobody knows its weights", op)  # fmt: skip

    def _only_samples(self, op: ex.NormOp) -> bool:
        """Whether only the head takes what a norm makes, so that the rows that sample will do."""
        takers = [use.operation for use in op.normed.uses]
        return not any(op.sum.uses) and all(isinstance(each, ex.LMHeadOp) for each in takers)


def _layer_entered(op: ex.OperatorOp, layer: int | None) -> int | None:
    """The layer whose part of the step an operator opens, or goes on."""
    if not isinstance(op, _OF_A_LAYER):
        return layer
    number = op.layer_number
    return number if number is None or layer is None or number > layer else layer


_OF_A_LAYER = (ex.EmbeddingOp, ex.NormOp, ex.QKVOp, ex.AttentionOp, ex.ProjectionOp, ex.FFNOp,
               ex.LMHeadOp)  # fmt: skip


def _last_uses(ops: Sequence[ex.OperatorOp]) -> dict[SSAValue, int]:
    """The place of the last operator that takes each value; logits are needed to the end."""
    found: dict[SSAValue, int] = {}
    for number, op in enumerate(ops):
        last = len(ops) if isinstance(op, ex.SampleOp) else number
        found |= {value: max(last, found.get(value, 0)) for value in op.operands}
    return found


def _takers(value: SSAValue) -> Iterator[Operation]:
    """What takes a value, also behind what only passes it on."""
    for use in value.uses:
        yield use.operation
        if isinstance(use.operation, _PASSED_ON):
            for result in use.operation.results:
                yield from _takers(result)


def _is_logits(value: SSAValue) -> bool:
    """Whether a value is what collectives made of what the head gives."""
    while isinstance(value.owner, ex.WaitOp | ex.CollectiveOp):
        value = value.owner.operands[0]
    return isinstance(value.owner, ex.LMHeadOp)


_WRITERS: dict[type[ex.OperatorOp], Callable[[Statements, Any], None]] = {
    ex.InputOp: Statements.input,
    ex.EmbeddingOp: Statements.embedding,
    ex.NormOp: Statements.norm,
    ex.QKVOp: Statements.qkv,
    ex.PrefillAttentionOp: Statements.attention,
    ex.DecodeAttentionOp: Statements.attention,
    ex.ProjectionOp: Statements.projection,
    ex.FFNOp: Statements.ffn,
    ex.LMHeadOp: Statements.lm_head,
    ex.SampleOp: Statements.sample,
    ex.SliceOp: Statements.slice,
    ex.ConcatOp: Statements.concat,
    ex.AllReduceOp: Statements.all_reduce,
    ex.AllGatherOp: Statements.resize,
    ex.ReduceScatterOp: Statements.resize,
    ex.WaitOp: Statements.wait,
    ex.KVLoadOp: Statements.nothing,
    ex.KVStoreOp: Statements.nothing,
}
