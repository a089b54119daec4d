"""What instances have to do as rows are given to them one after the other; for choosers."""

from collections.abc import Callable

import numpy as np

from sagec.runtime.state import ANY, Ints, State
from sagec.runtime.strategies._room import free_blocks, room_tokens, whole_tokens

PLACED = "placed"
"""Under this name a memory holds how many rows of each model were placed so far."""


class Load:
    """The load of each instance in a phase, and the rows to be placed; each row taken adds to it.

    Lists that are not named after rows have an entry an instance. requests: those that are there;
    kv_blocks, free_blocks, used_blocks: of its KV; pending_tokens: prompt tokens still to be
    computed. prompt_tokens, models: of the rows. need_blocks: of each row, what its prompt and its
    next token take on each instance.
    """

    def __init__(self, state: State, rows: Ints, phase: str) -> None:
        self.state, self.rows = state, rows
        instances, running, waiting = state.instances, state.running, state.waiting
        prefilling = phase == "prefill"
        num_instances = len(instances)
        at = running.instance if prefilling else running.decode_on
        pending = np.maximum(running.prompt_tokens - running.computed_tokens, 0)
        self.requests: list[int] = np.bincount(at, minlength=num_instances).tolist()
        pending_tokens = np.bincount(running.instance, pending, num_instances)
        self.pending_tokens: list[int] = pending_tokens.astype(np.int64).tolist()
        self.kv_blocks: list[int] = instances.kv_blocks.tolist()
        self.free_blocks: list[int] = free_blocks(state).tolist()
        self.used_blocks: list[int] = instances.kv_blocks_used.tolist()
        self.block_tokens: list[int] = instances.block_tokens.tolist()
        self.prompt_tokens: list[int] = waiting.prompt_tokens[rows].tolist()
        need = -(-(waiting.prompt_tokens[rows] + 1)[:, None] // instances.block_tokens)
        self.need_blocks: list[list[int]] = need.tolist()
        self.models: list[str] = waiting.model[rows].tolist()
        longest = waiting.prompt_tokens[rows] + 1 if prefilling else whole_tokens(waiting, rows)
        self._longest: list[int] = longest.tolist()
        self._room: list[int] = room_tokens(instances).tolist()
        able = np.flatnonzero(instances.prefills if prefilling else instances.decodes)
        self._able: dict[str, list[int]] = {}
        for index, model in zip(able.tolist(), instances.model[able].tolist(), strict=True):
            self._able.setdefault(model, []).append(index)

    def able(self, row: int) -> list[int]:
        """Instances that do the phase for the row's model, whether they have room or not."""
        return self._able.get(self.models[row], [])

    def with_room(self, row: int) -> list[int]:
        """Instances that are able, and can take the row now."""
        need, free = self.need_blocks[row], self.free_blocks
        longest, room = self._longest[row], self._room
        return [i for i in self.able(row) if need[i] <= free[i] and longest <= room[i]]

    def only_instance(self) -> int | None:
        """The instance that takes all rows, if there is no other and it can; cheap to see."""
        if len(set(self.models)) != 1 or len(able := self.able(0)) != 1:
            return None
        (only,) = able
        fits = sum(need[only] for need in self.need_blocks) <= self.free_blocks[only]
        return only if fits and max(self._longest) <= self._room[only] else None

    def take(self, row: int, instance: int) -> None:
        """The row goes there."""
        blocks = self.need_blocks[row][instance]
        self.requests[instance] += 1
        self.free_blocks[instance] -= blocks
        self.used_blocks[instance] += blocks
        self.pending_tokens[instance] += self.prompt_tokens[row]


def in_turn(
    state: State, rows: Ints, phase: str, pick: Callable[[Load, int, list[int]], int]
) -> Ints:
    """An instance for each row, one after the other; ANY where none has room.

    pick: says which, of the load so far, the row's index in `rows`, and the instances with room.
    """
    load = Load(state, rows, phase)
    if (only := load.only_instance()) is not None:
        return np.full(len(rows), only, np.int64)
    chosen = [ANY] * len(rows)
    for row in range(len(rows)):
        if there := load.with_room(row):
            chosen[row] = pick(load, row, there)
            load.take(row, chosen[row])
    return np.array(chosen, np.int64)
