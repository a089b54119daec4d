"""Torch engines, plans written by hand, and a loop that only carries events."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sagec.runtime.engines import Engine, Event, InstanceSpec, KVExported, StepReport, create
from sagec.runtime.plan import (
    Chunks,
    Column,
    Decodes,
    Evictions,
    ExecutionPlan,
    Migrations,
    Moves,
    Preemptions,
    Reuses,
    Rows,
)
from sagec.runtime.request import Request

Chunk = tuple[int, str, int, int]
"""Step, request, begin, end."""

Migration = tuple[int, int, int]
"""Hash of a block, its tier, the tier it goes to."""


def engine(id: str, folder: Path, kv_blocks: int = 64, block_tokens: int = 8, **options: str):
    """A torch engine; float32 unless an option says otherwise."""
    spec = InstanceSpec(
        id=id,
        engine="torch",
        model=str(folder),
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        options=options,
    )
    return create(spec)


def column(values: Iterable[int]) -> Column:
    return np.array(list(values), np.int64)


def plan(
    target: str,
    prompts: Mapping[str, int],
    *,
    chunks: Iterable[Chunk] = (),
    decodes: Mapping[str, int] | None = None,
    joins: Mapping[str, int] | None = None,
    preemptions: Mapping[str, int] | None = None,
    imports: Mapping[str, str] | None = None,
    exports: Mapping[str, str] | None = None,
    kv_blocks: Mapping[str, int] | None = None,
    reuses: Mapping[str, int] | None = None,
    evictions: Iterable[int] = (),
    migrations: Iterable[Migration] = (),
    num_steps: int = 64,
    max_step_tokens: int = 512,
    plan_id: str = "plan",
) -> ExecutionPlan:
    """A plan for `target`. prompts: request -> its prompt_tokens, a row each, in order.

    decodes: request -> until_tokens; joins: request -> begin_step, 0 where not given.
    """
    ids = tuple(prompts)
    row = {id: index for index, id in enumerate(ids)}
    chunks = sorted(chunks)
    decodes, joins, kv_blocks = decodes or {}, joins or {}, kv_blocks or {}
    imports, exports, preemptions = imports or {}, exports or {}, preemptions or {}
    reuses, migrations = reuses or {}, list(migrations)
    peers = tuple(dict.fromkeys([*imports.values(), *exports.values()]))

    def moves(of: Mapping[str, str]) -> Moves:
        return Moves(
            row=column(row[id] for id in of),
            peer=column(peers.index(peer) for peer in of.values()),
            tokens=column(prompts[id] for id in of),
        )

    return ExecutionPlan(
        plan_id=plan_id,
        round=0,
        target_instance_id=target,
        mode="hybrid",
        num_steps=num_steps,
        max_step_tokens=max_step_tokens,
        peers=peers,
        request_ids=ids,
        rows=Rows(
            prompt_tokens=column(prompts.values()),
            computed_tokens=column(0 for _ in ids),
            kv_blocks=column(kv_blocks.get(id, 0) for id in ids),
            deadline_us=column(0 for _ in ids),
        ),
        chunks=Chunks(
            step=column(step for step, _, _, _ in chunks),
            row=column(row[id] for _, id, _, _ in chunks),
            begin=column(begin for _, _, begin, _ in chunks),
            end=column(end for _, _, _, end in chunks),
            samples=column(end == prompts[id] for _, id, _, end in chunks),
        ),
        decodes=Decodes(
            row=column(row[id] for id in decodes),
            begin_step=column(joins.get(id, 0) for id in decodes),
            until_tokens=column(decodes.values()),
        ),
        preemptions=Preemptions(
            row=column(row[id] for id in preemptions), how=column(preemptions.values())
        ),
        reuses=Reuses(row=column(row[id] for id in reuses), tokens=column(reuses.values())),
        evictions=Evictions(block_hash=column(evictions)),
        migrations=Migrations(
            block_hash=column(hash for hash, _, _ in migrations),
            source_tier=column(source for _, source, _ in migrations),
            target_tier=column(target for _, _, target in migrations),
        ),
        imports=moves(imports),
        exports=moves(exports),
    )


def run(*engines: Engine) -> list[Event]:
    """Poll the engines in turn, carrying KV between them, until none has anything to tell."""
    events: list[Event] = []
    by_id = {one._id: one for one in engines}  # type: ignore[attr-defined]
    while new := [event for one in engines for event in one.poll()]:
        events += new
        for event in new:
            if isinstance(event, KVExported) and event.handle.target in by_id:
                by_id[event.handle.target].receive(event.handle)
    return events


def outputs(events: Iterable[Event], first: int = 0) -> dict[str, tuple[int, ...]]:
    """Each request's tokens from index `first` on; one told twice or left out is an error."""
    found: dict[str, dict[int, int]] = {}
    for event in events:
        if isinstance(event, StepReport):
            for id, index, token in event.tokens:
                assert index not in found.setdefault(id, {}), f"{id}: token {index} came twice"
                found[id][index] = token
    for id, tokens in found.items():
        assert sorted(tokens) == list(range(first, first + len(tokens))), (
            f"{id}: tokens are missing"
        )
    return {id: tuple(tokens[i] for i in sorted(tokens)) for id, tokens in found.items()}


def steps(events: Iterable[Event]) -> list[StepReport]:
    return [event for event in events if isinstance(event, StepReport)]


def reused(events: Iterable[Event]) -> dict[str, int]:
    """Each request's tokens from the prefix cache; one told twice is an error."""
    found: dict[str, int] = {}
    for step in steps(events):
        for id, tokens in step.reused:
            assert id not in found, f"{id}: told twice what it began with"
            found[id] = tokens
    return found


def of(kind: type, events: Iterable[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


def request(id: str, prompt: tuple[int, ...], max_output_tokens: int = 24, **fields) -> Request:
    return Request(id=id, prompt=prompt, max_output_tokens=max_output_tokens, **fields)
