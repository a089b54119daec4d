"""Whom to preempt so that one who waits finds room; for strategies."""

import numpy as np

from sagec.runtime.state import Bools, Ints, State
from sagec.runtime.strategies import _room


def room_for(state: State, row: int, leaving_first: Ints) -> list[int]:
    """The fewest running rows whose leaving gives a waiting row room to prefill and to decode.

    leaving_first: the running rows that may leave, in the order in which they would. Nobody where
    there is room already, or not enough even then.
    """
    instances = state.instances
    serves = instances.model == state.waiting.model[row]
    need = -(-(int(state.waiting.prompt_tokens[row]) + 1) // instances.block_tokens)
    leaving: list[int] = []
    free = _room.free_blocks(state)
    for pool in (instances.prefills & serves, instances.decodes & serves):
        if (free[pool] >= need[pool]).any():
            continue
        rest = leaving_first[~np.isin(leaving_first, leaving)]
        enough = [
            rows
            for i in np.flatnonzero(pool).tolist()
            if (rows := _until_enough(_freed(state, rest, i), rest, int(need[i] - free[i])))
        ]
        if not enough:
            return []
        leaving += sorted(enough, key=len)[0]
        gone = np.array(leaving, np.int64)
        freed = [int(_freed(state, gone, i).sum()) for i in range(len(instances))]
        free = _room.free_blocks(state) + np.array(freed, np.int64)
    return leaving


def _until_enough(freed: Ints, rows: Ints, missing_blocks: int) -> list[int]:
    """The first of the rows that free so many blocks, without those that free none; else nobody."""
    rows, freed = rows[freed > 0], freed[freed > 0]
    count = int(np.searchsorted(np.cumsum(freed), missing_blocks)) + 1
    chosen: list[int] = rows[:count].tolist()
    return chosen if count <= len(rows) else []


def _freed(state: State, rows: Ints, instance: int) -> Ints:
    """Blocks that the instance has more when a running row leaves, with the one it takes next."""
    running = state.running
    tokens = np.maximum(running.prompt_tokens[rows], running.computed_tokens[rows]) + 1
    grows: Bools = running.decode_on[rows] == instance
    holds: Bools = (running.instance[rows] == instance) | grows
    return np.where(holds, -(-tokens // int(state.instances.block_tokens[instance])), 0) + grows
