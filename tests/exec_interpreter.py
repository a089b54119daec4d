"""What an exec.graph computes, by numpy: to show that a pass changes no result.

All ranks of a tensor parallel group are simulated: a value has the shape [ranks, *its own].
Weights, tokens and cached KV are pseudo-random and depend only on what they belong to, a layer or a
device, never on where an op stands in the text. Numbers are float64, so that another order of
summation shows only in the last digits.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from xdsl.ir import SSAValue

from sagec.dialects import exec as ex

Array = npt.NDArray[Any]


@dataclass
class Outcome:
    """What a step leaves behind: the yielded values, and of each layer the KV that it stored, a row
    a token, in an order that does not depend on how many stores there were."""

    yielded: list[Array]
    stored: dict[int | None, Array]


def run(graph: ex.ExecGraphOp) -> Outcome:
    """Compute a graph, op by op in the order of the text."""
    machine = _Machine(ranks_in(graph))
    for op in graph.operators:
        made = _KERNELS[type(op)](machine, op, *(machine.values[value] for value in op.operands))
        for result, array in zip(op.results, made, strict=True):
            shape = (machine.ranks, *ex.tensor_of(result).shape)
            assert array.shape == shape, f"{op.name}: {array.shape} is not {shape}"
            machine.values[result] = array
    last = graph.body.block.last_op
    assert isinstance(last, ex.ExecYieldOp)
    return Outcome([machine.values[value] for value in last.operands], machine.all_stored())


def assert_same(before: ex.ExecGraphOp | Outcome, after: ex.ExecGraphOp | Outcome) -> None:
    """Fail unless two graphs yield and store the same."""
    one, other = (run(g) if isinstance(g, ex.ExecGraphOp) else g for g in (before, after))
    assert len(one.yielded) == len(other.yielded)
    for a, b in zip(one.yielded, other.yielded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert one.stored.keys() == other.stored.keys()
    for layer, kv in one.stored.items():
        np.testing.assert_allclose(kv, other.stored[layer], rtol=1e-9, atol=1e-12)


def ranks_in(graph: ex.ExecGraphOp) -> int:
    """How many ranks must be simulated so that every group of the graph is whole."""
    tp = graph.scalar("tp")
    assert isinstance(tp, int)
    groups = [len(op.group) for op in graph.operators if isinstance(op, ex.CollectiveOp)]
    return math.lcm(tp, *groups)


@dataclass
class _Machine:
    """The values of a run so far."""

    ranks: int
    values: dict[SSAValue, Array] = field(default_factory=dict)
    messages: dict[int, Array] = field(default_factory=dict)
    stored: dict[int | None, list[Array]] = field(default_factory=dict)

    def all_stored(self) -> dict[int | None, Array]:
        tables = {}
        for layer, parts in self.stored.items():
            rows = np.concatenate([part.swapaxes(0, 1) for part in parts])
            flat = rows.reshape(len(rows), -1)
            tables[layer] = flat[np.lexsort(flat.round(6).T[::-1])]
        return tables


@functools.lru_cache(4096)
def _drawn(*name: object) -> Array:
    """Numbers of about 1 that depend on the name alone; its last entry is their shape."""
    shape = name[-1]
    assert isinstance(shape, tuple)
    return np.random.default_rng(zlib.crc32(repr(name).encode())).standard_normal(shape)


def _sharded(machine: _Machine, op: ex.OperatorOp, part: str, *shape: int) -> Array:
    """Weights that are others on each rank: [ranks, *shape]."""
    drawn = [
        _drawn(op.name, part, op.layer_number, rank, shape) / math.sqrt(shape[-2])
        for rank in range(machine.ranks)
    ]
    return np.stack(drawn)


def _input(machine: _Machine, op: ex.OperatorOp) -> list[Array]:
    (count,) = ex.tensor_of(op.results[0]).shape
    tokens = (np.abs(_drawn("tokens", op.device, (count,))) * 1000).astype(np.int64)
    return [np.stack([tokens] * machine.ranks)]


def _embedding(machine: _Machine, op: ex.OperatorOp, tokens: Array) -> list[Array]:
    hidden = ex.tensor_of(op.results[0]).shape[1]
    return [_drawn("embedding", (997, hidden))[tokens % 997]]


def _norm(
    machine: _Machine, op: ex.OperatorOp, hidden: Array, added: Array | None = None
) -> list[Array]:
    total = hidden if added is None else hidden + added
    scale = _drawn(op.name, op.layer_number, (hidden.shape[-1],))
    root = np.sqrt((total**2).mean(-1, keepdims=True) + 1e-6)
    return [total / root * scale, total]


def _qkv(machine: _Machine, op: ex.OperatorOp, normed: Array) -> list[Array]:
    width = ex.tensor_of(op.results[0]).shape[1]
    return [normed @ _sharded(machine, op, "w", normed.shape[-1], width)]


def _attention(machine: _Machine, op: ex.OperatorOp, qkv: Array, kv: Array) -> list[Array]:
    assert isinstance(op, ex.AttentionOp)
    heads, kv_heads, dim = map(op.number, ("heads", "kv_heads", "head_dim"))
    row, at = op.number("first"), 0
    attended, stored = [], []
    for context, new in zip(op.context_tokens, op.new_tokens, strict=True):
        rows = qkv[:, row : row + new].reshape(machine.ranks, new, -1, dim)
        queries, keys_values = rows[:, :, :heads], rows[:, :, heads:]
        new_kv = keys_values.reshape(machine.ranks, new, 2, kv_heads, dim)
        all_kv = np.concatenate([kv[:, at : at + context], new_kv], axis=1)
        attended.append(_attended(queries, all_kv.repeat(heads // kv_heads, axis=3), context))
        stored.append(new_kv)
        row, at = row + new, at + context
    return [np.concatenate(attended, axis=1), np.concatenate(stored, axis=1)]


def _attended(queries: Array, kv: Array, context: int) -> Array:
    """Of each query, the values of what stands before it and of itself, by likeness."""
    keys, values = kv[:, :, 0], kv[:, :, 1]
    scores = np.einsum("rqhd,rkhd->rhqk", queries, keys) / math.sqrt(queries.shape[-1])
    new, tokens = scores.shape[-2:]
    hidden = np.arange(tokens) > context + np.arange(new)[:, None]
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("rhqk,rkhd->rqhd", weights, values)
    return mixed.reshape(*mixed.shape[:2], -1)


def _projection(machine: _Machine, op: ex.OperatorOp, *parts: Array) -> list[Array]:
    rows = np.concatenate(parts, axis=1)
    hidden = ex.tensor_of(op.results[0]).shape[1]
    return [rows @ _sharded(machine, op, "w", rows.shape[-1], hidden)]


def _ffn(machine: _Machine, op: ex.OperatorOp, normed: Array) -> list[Array]:
    hidden, width = normed.shape[-1], op.number("width")
    experts = op.number("experts")
    if not experts:
        return [_gated(machine, op, "dense", normed, width)]
    router = _drawn("router", op.layer_number, (hidden, experts * machine.ranks))
    scores = normed @ router
    best = np.sort(scores, axis=-1)[..., -op.number("experts_per_token")][..., None]
    share = np.where(scores >= best, np.exp(scores), 0.0)
    share /= share.sum(-1, keepdims=True)
    added = np.zeros_like(normed)
    for expert in range(experts):
        mine = [share[r, :, r * experts + expert] for r in range(machine.ranks)]
        added += np.stack(mine)[..., None] * _gated(machine, op, f"e{expert}", normed, width)
    return [added]


def _gated(machine: _Machine, op: ex.OperatorOp, part: str, normed: Array, width: int) -> Array:
    hidden = normed.shape[-1]
    gate = normed @ _sharded(machine, op, f"{part} gate", hidden, width)
    up = normed @ _sharded(machine, op, f"{part} up", hidden, width)
    return (gate / (1 + np.exp(-gate)) * up) @ _sharded(machine, op, f"{part} down", width, hidden)


def _lm_head(machine: _Machine, op: ex.OperatorOp, normed: Array) -> list[Array]:
    vocab = ex.tensor_of(op.results[0]).shape[1]
    return [normed[:, op.column("rows")] @ _sharded(machine, op, "w", normed.shape[-1], vocab)]


def _sample(machine: _Machine, op: ex.OperatorOp, logits: Array) -> list[Array]:
    return [logits.argmax(-1)]


def _slice(machine: _Machine, op: ex.OperatorOp, whole: Array) -> list[Array]:
    first, rows = op.number("first"), ex.tensor_of(op.results[0]).shape[0]
    return [whole[:, first : first + rows]]


def _concat(machine: _Machine, op: ex.OperatorOp, *parts: Array) -> list[Array]:
    return [np.concatenate(parts, axis=1)]


def _groups(machine: _Machine, op: ex.OperatorOp, part: Array) -> Array:
    """[groups, ranks of a group, ...]"""
    assert isinstance(op, ex.CollectiveOp)
    return part.reshape(-1, len(op.group), *part.shape[1:])


def _spread(machine: _Machine, op: ex.OperatorOp, wholes: Array) -> Array:
    """What each group has, [groups, ...], on each of its ranks."""
    assert isinstance(op, ex.CollectiveOp)
    return wholes.repeat(len(op.group), axis=0)


def _all_reduce(machine: _Machine, op: ex.OperatorOp, *parts: Array) -> list[Array]:
    return [_spread(machine, op, _groups(machine, op, part).sum(1)) for part in parts]


def _all_gather(machine: _Machine, op: ex.OperatorOp, *parts: Array) -> list[Array]:
    axis, made = op.number("axis"), []
    for part in parts:
        ranks = np.moveaxis(_groups(machine, op, part), 1, 0)
        made.append(_spread(machine, op, np.concatenate(list(ranks), axis=axis + 1)))
    return made


def _reduce_scatter(machine: _Machine, op: ex.OperatorOp, *parts: Array) -> list[Array]:
    assert isinstance(op, ex.CollectiveOp)
    axis, made = op.number("axis"), []
    for part in parts:
        shares = np.split(_groups(machine, op, part).sum(1), len(op.group), axis=axis + 1)
        made.append(np.stack(shares, axis=1).reshape(machine.ranks, *shares[0].shape[1:]))
    return made


def _send(machine: _Machine, op: ex.OperatorOp, sent: Array) -> list[Array]:
    machine.messages[op.number("channel")] = sent
    return []


def _recv(machine: _Machine, op: ex.OperatorOp) -> list[Array]:
    return [machine.messages.pop(op.number("channel"))]


def _same(machine: _Machine, op: ex.OperatorOp, value: Array) -> list[Array]:
    return [value]


def _kv_load(machine: _Machine, op: ex.OperatorOp) -> list[Array]:
    shape = ex.tensor_of(op.results[0]).shape
    ranks = [_drawn("kv", op.layer_number, op.device, r, shape) for r in range(machine.ranks)]
    return [np.stack(ranks)]


def _kv_store(machine: _Machine, op: ex.OperatorOp, kv: Array) -> list[Array]:
    machine.stored.setdefault(op.layer_number, []).append(kv)
    return []


_KERNELS: dict[type[ex.OperatorOp], Callable[..., list[Array]]] = {
    ex.InputOp: _input,
    ex.EmbeddingOp: _embedding,
    ex.NormOp: _norm,
    ex.QKVOp: _qkv,
    ex.PrefillAttentionOp: _attention,
    ex.DecodeAttentionOp: _attention,
    ex.ProjectionOp: _projection,
    ex.FFNOp: _ffn,
    ex.LMHeadOp: _lm_head,
    ex.SampleOp: _sample,
    ex.SliceOp: _slice,
    ex.ConcatOp: _concat,
    ex.AllReduceOp: _all_reduce,
    ex.AllGatherOp: _all_gather,
    ex.ReduceScatterOp: _reduce_scatter,
    ex.SendOp: _send,
    ex.RecvOp: _recv,
    ex.WaitOp: _same,
    ex.KVLoadOp: _kv_load,
    ex.KVStoreOp: _kv_store,
    ex.KVMigrateOp: _same,
}
