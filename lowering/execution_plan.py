"""From scheduled graphs to ExecutionPlans: one for each pd.steps."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Attribute, Operation
from xdsl.utils.target import Target

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Ints, ListsAttr, NamesAttr, WordsAttr
from sagec.dialects.scalars import value_of
from sagec.passes.errors import PassError
from sagec.passes.flow import compact, graphs, ops_in, zeros
from sagec.passes.topology import Instance, Topology, topology_of
from sagec.runtime import plan as p
from sagec.runtime.plan_text import to_text


def plans_of(module: ModuleOp) -> list[p.ExecutionPlan]:
    """The plans of all graphs of the module, in the order of their pd.steps; then those of
    instances that only free or move KV.

    Raises PassError for a graph that has requests and no steps: fuse-steps has not run.
    """
    topology = topology_of(module)
    return [plan for graph in graphs(module) for plan in _graph_plans(graph, topology)]


def _graph_plans(graph: pd.GraphOp, topology: Topology) -> list[p.ExecutionPlan]:
    ops = ops_in(graph)
    steps = [op for op in ops if type(op) is pd.StepsOp]
    if not steps and any(type(op) in _WORK and pd.rows_of(op.results[0]) for op in ops):
        raise PassError(f"pd.graph @{graph.symbol} has no pd.steps; run fuse-steps first", graph)
    digest = digest_of(ops)
    extras = _Extras(ops)
    scheduled = {op.instance_name for op in steps}
    instances = [topology.instance(op.instance_name, op) for op in steps]
    for name in extras.instances():
        if name not in scheduled:
            instances.append(instance := topology.instance(name, graph))
            steps.append(pd.StepsOp.none(name, instance.max_step_tokens))
    return [
        _plan(graph, op, instance, extras, digest)
        for op, instance in zip(steps, instances, strict=True)
    ]


_WORK = {pd.PrefillOp, pd.DecodeOp}


class _Extras:
    """What ops beside pd.steps make an instance do."""

    def __init__(self, ops: Iterable[Operation]) -> None:
        self.preempts: list[pd.PreemptOp] = []
        self.evicts: list[kv.EvictOp] = []
        self.migrates: list[kv.MigrateOp] = []
        for op in ops:
            kind = type(op)
            if kind is pd.PreemptOp:
                self.preempts.append(op)  # type: ignore[arg-type]
            elif kind is kv.EvictOp:
                self.evicts.append(op)  # type: ignore[arg-type]
            elif kind is kv.MigrateOp:
                self.migrates.append(op)  # type: ignore[arg-type]

    def instances(self) -> list[str]:
        """The instances that have something to do, each once."""
        named = [name for op in self.preempts for name in op.words("on")]
        named += [_names(op.instance) for op in self.evicts]
        named += [_names(op.instance) for op in self.migrates]
        return list(dict.fromkeys(named))

    def preempted(self, instance: str) -> tuple[list[str], list[int]]:
        """Ids of the rows that leave the instance, and how."""
        names: list[str] = []
        how: list[int] = []
        for op in self.preempts:
            rows = zip(op.names, op.words("on"), op.column("verdict").tolist(), strict=True)
            for name, place, verdict in rows:
                if place == instance:
                    names.append(name)
                    how.append(p.SWAP if verdict == pd.SWAP else p.RECOMPUTE)
        return names, how

    def evictions(self, instance: str) -> p.Evictions:
        hashes = [op.hashes.array for op in self.evicts if _names(op.instance) == instance]
        return p.Evictions(block_hash=np.concatenate(hashes)) if hashes else _NO_EVICTIONS

    def migrations(self, instance: str) -> p.Migrations:
        ops = [op for op in self.migrates if _names(op.instance) == instance]
        if not ops:
            return _NO_MIGRATIONS
        counts = [len(op.hashes) for op in ops]
        return p.Migrations(
            block_hash=np.concatenate([op.hashes.array for op in ops]),
            source_tier=np.repeat([kv.TIERS.index(op.source.data) for op in ops], counts),
            target_tier=np.repeat([kv.TIERS.index(op.target.data) for op in ops], counts),
        )


def _names(ref: SymbolRefAttr) -> str:
    return ref.root_reference.data


def _plan(
    graph: pd.GraphOp, steps: pd.StepsOp, instance: Instance, extras: _Extras, digest: str
) -> p.ExecutionPlan:
    gone, how = extras.preempted(instance.name)
    names = (*steps.names, *gone) if gone else steps.names
    prompt, until, cached = (_column(steps, name) for name in ("prompt", "until", "cached"))
    peers, imports, exports = _moves(steps, prompt)
    return p.ExecutionPlan(
        plan_id=f"{graph.symbol}/{instance.name}",
        round=graph.number("round"),
        target_instance_id=instance.name,
        mode=graph.text("mode", "hybrid"),
        num_steps=steps.number("num_steps"),
        max_step_tokens=steps.number("max_step_tokens"),
        peers=peers,
        request_ids=names,
        rows=p.Rows(
            prompt_tokens=_padded(prompt, len(gone)),
            computed_tokens=_padded(_column(steps, "computed"), len(gone)),
            kv_blocks=_padded(_column(steps, "blocks"), len(gone)),
            deadline_us=_padded(_column(steps, "deadline"), len(gone)),
        ),
        chunks=_chunks(steps, prompt),
        decodes=_decodes(steps, until),
        preemptions=_preemptions(len(steps.names), how),
        reuses=_reuses(cached),
        imports=imports,
        exports=exports,
        evictions=extras.evictions(instance.name),
        migrations=extras.migrations(instance.name),
        acceleration=_acceleration(instance),
        estimates=_estimates(steps),
        ir_digest=digest,
    )


def _column(steps: pd.StepsOp, name: str) -> Ints:
    """A column of the rows; what an op leaves out is 0 in every row."""
    attr = steps.properties.get(name)
    return attr.array if isinstance(attr, ColumnAttr) else zeros(len(steps.names))


def _chunks(steps: pd.StepsOp, prompt: Ints) -> p.Chunks:
    columns = [steps.properties[name] for name in ("chunk_step", "chunk_row")]
    columns += [steps.properties[name] for name in ("chunk_begin", "chunk_end")]
    step, row, begin, end = [attr.array for attr in columns if isinstance(attr, ColumnAttr)]
    if not step.size:
        return _NO_CHUNKS
    samples = (end == prompt[row]).astype(np.int64)
    return p.Chunks(step=step, row=row, begin=begin, end=end, samples=samples)


def _decodes(steps: pd.StepsOp, until: Ints) -> p.Decodes:
    rows = until.nonzero()[0]
    if not rows.size:
        return _NO_DECODES
    begin = _column(steps, "begin")
    return p.Decodes(row=rows, begin_step=begin[rows], until_tokens=until[rows])


def _preemptions(rows: int, how: list[int]) -> p.Preemptions:
    """Those that leave are the rows behind all others."""
    if not how:
        return _NO_PREEMPTIONS
    return p.Preemptions(row=np.arange(rows, rows + len(how)), how=np.array(how, np.int64))


def _reuses(cached: Ints) -> p.Reuses:
    rows = cached.nonzero()[0]
    return p.Reuses(row=rows, tokens=cached[rows]) if rows.size else _NO_REUSES


_NO_CHUNKS, _NO_DECODES, _NO_MOVES = p.Chunks(), p.Decodes(), p.Moves()
_NO_PREEMPTIONS, _NO_REUSES = p.Preemptions(), p.Reuses()
_NO_EVICTIONS, _NO_MIGRATIONS = p.Evictions(), p.Migrations()


@functools.lru_cache(256)
def _acceleration(instance: Instance) -> p.Acceleration:
    return p.Acceleration(
        kv_dtype=instance.kv_dtype,
        quantization=instance.quantization,
        draft_tokens=instance.draft_tokens,
    )


def _padded(column: Ints, rows: int) -> Ints:
    """The column, and `rows` more zeros for those that only leave."""
    return np.concatenate([column, np.zeros(rows, np.int64)]) if rows else column


def _moves(steps: pd.StepsOp, prompt: Ints) -> tuple[tuple[str, ...], p.Moves, p.Moves]:
    """The peers, and the rows that come from them and go to them."""
    peers: dict[str, int] = {}
    moves = []
    for end in ("source", "target"):
        words = steps.properties.get(end)
        if not isinstance(words, WordsAttr) or not any(words.words):
            moves.append(_NO_MOVES)
            continue
        rows, peer = _peers(words, peers)
        moves.append(p.Moves(row=rows, peer=peer, tokens=prompt[rows]))
    return tuple(peers), moves[0], moves[1]


def _peers(words: WordsAttr, peers: dict[str, int]) -> tuple[Ints, Ints]:
    """The rows that have a peer, and its number: peers are numbered in the order of the rows."""
    named = np.array([bool(word) for word in words.words], np.bool_)
    rows = named[words.codes].nonzero()[0]
    there = compact(words.words, words.codes[rows])
    number = np.array([peers.setdefault(word, len(peers)) for word in there.words if word])
    return rows, number[there.codes] if rows.size else rows


def _estimates(steps: pd.StepsOp) -> p.Estimates:
    if steps.step_us is None or steps.step_tokens is None or steps.step_blocks is None:
        return p.Estimates()
    return p.Estimates(
        us=steps.step_us.array, tokens=steps.step_tokens.array, kv_blocks=steps.step_blocks.array
    )


_DERIVED = {pd.StepsOp, pd.TransferOp, pd.PhaseOp, pd.YieldOp, kv.ReserveOp}
"""Ops that passes make of the others: they add nothing to what a digest names."""


def digest_of(ops: Iterable[Operation]) -> str:
    """A name of what the ops say: 16 hexadecimal digits of a sha256, the same on every machine.

    The order of the ops says nothing, so that phases, which move them, change nothing either.
    """
    said = sorted(_bytes_of(op) for op in ops if type(op) not in _DERIVED)
    return hashlib.sha256(b"\0".join(said)).hexdigest()[:16]


def _bytes_of(op: Operation) -> bytes:
    parts: list[bytes | memoryview] = [op.name.encode()]
    properties = op.properties
    for name in sorted(properties):
        attr = properties[name]
        parts.append(name.encode())
        parts += _BYTES.get(type(attr), _bytes_of_scalar)(attr)
    return b"\0".join(parts)


_Bytes = tuple[bytes | memoryview, ...]


def _bytes_of_scalar(attr: Attribute) -> _Bytes:
    value = value_of(attr)
    return (str(attr if value is None else value).encode(),)


_BYTES: dict[type[Attribute], Callable[[Any], _Bytes]] = {
    ColumnAttr: lambda attr: (attr.array.data,),
    NamesAttr: lambda attr: ("\0".join(attr.data).encode(),),
    WordsAttr: lambda attr: ("\0".join(attr.words).encode(), attr.codes.data),
    ListsAttr: lambda attr: (attr.offsets.data, attr.values.data),
}


@dataclass(frozen=True)
class PlanTarget(Target):
    """Write the ExecutionPlans of a module: `-t plan{form=json}` or `-t plan{form=text}`.

    JSON is a list of plans after docs/plan.schema.json.
    """

    name = "plan"
    form: Literal["json", "text"] = "json"

    def emit(self, ctx: Context, module: ModuleOp, output: IO[str]) -> None:
        plans = plans_of(module)
        if self.form == "text":
            output.write("\n".join(map(to_text, plans)))
        else:
            output.write("[" + ",\n".join(p.to_json(plan).decode() for plan in plans) + "]\n")
