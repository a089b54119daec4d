"""Packed steps as ExecutionPlans, checked against what their engines take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sagec.runtime import plan as p
from sagec.runtime.direct.cluster import Abilities, Cluster
from sagec.runtime.direct.columns import Coded, Ints, chosen, span_of, words_in_order
from sagec.runtime.direct.packing import Packed
from sagec.runtime.direct.topology import Instance
from sagec.runtime.direct.waves import NotCovered


@dataclass(frozen=True)
class Target:
    """What all plans of a round say. name: of its graph. gone: (name, how), by instance."""

    name: str
    round: int
    mode: str
    digest: str
    cluster: Cluster
    gone: dict[int, list[tuple[str, int]]]


_NO_CHUNKS, _NO_DECODES, _NO_MOVES, _NO_REUSES = p.Chunks(), p.Decodes(), p.Moves(), p.Reuses()
_NO_PREEMPTIONS = p.Preemptions()


def plan_of(packed: Packed, target: Target) -> p.ExecutionPlan:
    """The plan of these steps; rows that got nothing within the horizon are left out.

    Raises NotCovered where its engine may not take it, or rows are to leave that it does not swap.
    """
    work = packed.work
    _check_steps(packed, target.cluster)
    rows, names, chunk_row = _busy_rows(packed)
    prompt, until = work.prompt[rows], packed.until[rows]
    columns = (prompt, work.computed[rows], packed.blocks[rows], work.deadline[rows])
    peers: dict[str, int] = {}
    imports = _moves(work.source, rows, prompt, peers)
    exports = _moves(work.target, rows, prompt, peers)
    return p.ExecutionPlan(
        **_common(work.instance, target, names, columns),
        num_steps=len(packed.us),
        peers=tuple(peers),
        chunks=_chunks(packed, chunk_row, prompt),
        decodes=_decodes(packed.begin[rows], until),
        reuses=_reuses(work.cached[rows]),
        imports=imports,
        exports=exports,
        estimates=p.Estimates(
            us=np.rint(packed.us).astype(np.int64),
            tokens=packed.tokens,
            kv_blocks=packed.used_blocks,
        ),
    )


def idle_plan(instance: Instance, target: Target) -> p.ExecutionPlan:
    """The plan of an instance that computes nothing, and perhaps drops rows."""
    if target.cluster.abilities.get(instance.name) is None:
        raise NotCovered("an instance that its engine may not run")
    nothing = (p.EMPTY, p.EMPTY, p.EMPTY, p.EMPTY)
    return p.ExecutionPlan(**_common(instance, target, (), nothing), num_steps=0)


_Columns = tuple[Ints, Ints, Ints, Ints]
"""Prompt, computed tokens, blocks and deadline of each row."""


def _common(
    instance: Instance, target: Target, names: tuple[str, ...], columns: _Columns
) -> dict[str, Any]:
    """Fields of a plan that are not about steps; rows that leave are behind all others."""
    preemptions = _NO_PREEMPTIONS
    if gone := target.gone.get(instance.index):
        preemptions = _preemptions(gone, len(names), instance, target.cluster)
        names += tuple([name for name, _ in gone])
        nothing = np.zeros(len(gone), np.int64)
        prompt, computed, blocks, deadline = (np.concatenate([c, nothing]) for c in columns)
    else:
        prompt, computed, blocks, deadline = columns
    return {
        "plan_id": f"{target.name}/{instance.name}",
        "round": target.round,
        "target_instance_id": instance.name,
        "mode": target.mode,
        "max_step_tokens": instance.max_step_tokens,
        "request_ids": names,
        "rows": p.Rows(
            prompt_tokens=prompt, computed_tokens=computed, kv_blocks=blocks, deadline_us=deadline
        ),
        "preemptions": preemptions,
        "acceleration": target.cluster.acceleration[instance.index],
        "ir_digest": target.digest,
    }


def _busy_rows(packed: Packed) -> tuple[Ints | slice, tuple[str, ...], Ints]:
    """The rows that get something, their names, and the row of each chunk among them."""
    names, row = packed.work.names, packed.chunks[1]
    busy = (packed.until > 0) | packed.comes
    busy[row] = True
    if np.count_nonzero(busy) == len(busy):
        return slice(None), names, row
    rows = span_of(busy.nonzero()[0])
    row = row - rows.start if isinstance(rows, slice) else (busy.cumsum() - 1)[row]
    return rows, chosen(names, rows), row


def _chunks(packed: Packed, row: Ints, prompt: Ints) -> p.Chunks:
    step, _, begin, end = packed.chunks
    if not step.size:
        return _NO_CHUNKS
    samples = (end == prompt[row]).astype(np.int64)
    return p.Chunks(step=step, row=row, begin=begin, end=end, samples=samples)


def _decodes(begin: Ints, until: Ints) -> p.Decodes:
    rows = until.nonzero()[0]
    if not rows.size:
        return _NO_DECODES
    return p.Decodes(row=rows, begin_step=begin[rows], until_tokens=until[rows])


def _preemptions(
    gone: list[tuple[str, int]], rows: int, instance: Instance, cluster: Cluster
) -> p.Preemptions:
    """Those that leave are the rows behind all others."""
    how = np.array([how for _, how in gone], np.int64)
    ability = cluster.abilities.get(instance.name)
    if np.count_nonzero(how) and (ability is None or not ability.swaps):
        raise NotCovered("rows to swap out, which the engine may not do")
    return p.Preemptions(row=np.arange(rows, rows + len(gone)), how=how)


def _reuses(cached: Ints) -> p.Reuses:
    rows = cached.nonzero()[0]
    return p.Reuses(row=rows, tokens=cached[rows]) if rows.size else _NO_REUSES


def _moves(column: Coded, span: Ints | slice, prompt: Ints, peers: dict[str, int]) -> p.Moves:
    """Rows that come or go; peers are numbered in the order of the rows, and added to."""
    if not any(column.words):
        return _NO_MOVES
    named = np.array([bool(word) for word in column.words], np.bool_)
    codes = column.codes[span]
    rows = named[codes].nonzero()[0]
    if not rows.size:
        return _NO_MOVES
    words, numbers = words_in_order(column.words, codes[rows])
    number = np.array([peers.setdefault(word, len(peers)) for word in words])
    return p.Moves(row=rows, peer=number[numbers], tokens=prompt[rows])


def _check_steps(packed: Packed, cluster: Cluster) -> None:
    """Raise NotCovered where `legalize` might refuse."""
    work = packed.work
    ability = cluster.abilities.get(work.instance.name)
    if ability is None:
        raise NotCovered("an instance that its engine may not run")
    tokens, blocks = packed.tokens, packed.used_blocks
    if tokens.size and (
        tokens.max() > work.instance.max_step_tokens or blocks.max() > work.instance.kv_blocks
    ):
        raise NotCovered("steps beyond a budget")
    if not ability.holds_empty_steps and tokens.size and tokens.min() < 1:
        raise NotCovered("a step of nothing")
    if not (ability.keeps_prefixes or ability.swaps) and np.count_nonzero(work.cached):
        raise NotCovered("a prompt that begins with KV, which the engine may not keep")
    _check_partial(packed, ability)


def _check_partial(packed: Packed, ability: Abilities) -> None:
    """Raise NotCovered where a step leaves more prompts unfinished than the engine takes."""
    if ability.chunks_prompts and not ability.partial_prefills:
        return
    step, row, _, end = packed.chunks
    partial = end < packed.work.prompt[row]
    if not np.count_nonzero(partial):
        return
    if not ability.chunks_prompts or np.bincount(step[partial]).max() > ability.partial_prefills:
        raise NotCovered("prompts left unfinished")
