"""An ExecutionPlan as text for people and FileCheck."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sagec.runtime.plan import RECOMPUTE, ExecutionPlan, Moves, Table

TIERS = ("device", "host", "disk")


def to_text(plan: ExecutionPlan) -> str:
    """The plan, a line a thing that the instance does.

    plan "round_42/p0" round 42 instance p0 mode strict steps 2 budget 512
      row "chat-1" prompt 600 computed 0 blocks 38
      step 0: "chat-1" [0, 512)
      step 1: "chat-1" [512, 600) samples
      export "chat-1" to d0 tokens 600
    """
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: ExecutionPlan) -> Iterator[str]:
    yield (
        f'plan "{plan.plan_id}" round {plan.round} instance {plan.target_instance_id} '
        f"mode {plan.mode} steps {plan.num_steps} budget {plan.max_step_tokens}"
    )
    ids = [f'"{name}"' for name in plan.request_ids]
    for name, (prompt, computed, blocks, deadline) in zip(ids, _rows(plan.rows), strict=True):
        late = f" deadline {deadline}" if deadline else ""
        yield f"  row {name} prompt {prompt} computed {computed} blocks {blocks}{late}"
    for row, how in _rows(plan.preemptions):
        yield f"  preempt {ids[row]} {'recompute' if how == RECOMPUTE else 'swap'}"
    for row, tokens in _rows(plan.reuses):
        yield f"  reuse {ids[row]} tokens {tokens}"
    for (block_hash,) in _rows(plan.evictions):
        yield f"  evict {block_hash}"
    for block_hash, source, target in _rows(plan.migrations):
        yield f"  migrate {block_hash} from {TIERS[source]} to {TIERS[target]}"
    yield from _moves(plan, ids, plan.imports, "import", "from")
    yield from _chunks(plan, ids)
    for row, begin, until in _rows(plan.decodes):
        yield f"  decode {ids[row]} from {begin} until {until}"
    yield from _moves(plan, ids, plan.exports, "export", "to")
    if len(plan.estimates):
        for name in plan.estimates.__struct_fields__:
            yield f"  estimate {name} {_runs(getattr(plan.estimates, name).tolist())}"


def _runs(values: list[int]) -> str:
    """The values in order, equal neighbours once with their number.

    >>> _runs([7, 7, 7, 9])
    '7x3 9'
    """
    runs = ((value, len(list(same))) for value, same in itertools.groupby(values))
    return " ".join(f"{value}x{count}" if count > 1 else f"{value}" for value, count in runs)


def _chunks(plan: ExecutionPlan, ids: list[str]) -> Iterator[str]:
    for step, chunks in itertools.groupby(_rows(plan.chunks), key=lambda chunk: chunk[0]):
        cells = [
            f"{ids[row]} [{begin}, {end}){' samples' if samples else ''}"
            for _, row, begin, end, samples in chunks
        ]
        yield f"  step {step}: {', '.join(cells)}"


def _moves(
    plan: ExecutionPlan, ids: list[str], moves: Moves, verb: str, where: str
) -> Iterator[str]:
    for row, peer, tokens in _rows(moves):
        yield f"  {verb} {ids[row]} {where} {plan.peers[peer]} tokens {tokens}"


def _rows(table: Table) -> Iterator[tuple[int, ...]]:
    """The rows of a table, a tuple each, in the order of its columns."""
    columns = (getattr(table, name).tolist() for name in table.__struct_fields__)
    return zip(*columns, strict=True)
