"""Who of those that wait, in an order, gets a place now; for strategies."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from sagec.runtime.state import ADMIT, ANY, Bools, Decision, Ints, State, Strings
from sagec.runtime.strategies import _promises, _room, choosers
from sagec.runtime.strategies.choosers import Chooser, Placement


@dataclasses.dataclass(frozen=True, eq=False)
class Admission:
    """The rows that get a place, in their order, and the places.

    blocked: of each model the first row that has none; behind it nobody of its model has, so that
    nobody overtakes a long prompt for ever.
    """

    rows: Ints
    placement: Placement
    blocked: Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Paced:
    """Rows of an order whose prompts can begin soon, and those that are held back for now.

    Who is admitted stands before all that come later, whatever their deadlines; so nobody is, whose
    prompt would only wait on its instance. again_us: when the first of the held can be let go.
    """

    order: Ints
    held: Ints
    again_us: int | None = None

    @classmethod
    def of(cls, state: State, order: Ints, window_us: int) -> Self:
        """Hold back rows with more than window_us of prompts before them, where speeds are known.

        window_us 0 holds nobody back.
        """
        begin_us = np.zeros(len(order), np.int64)
        took_us, models = _promises.bare_prefill_us(state)[order], state.waiting.model[order]
        for model in set(models.tolist()):
            here = np.flatnonzero(models == model)
            took = (took_us[here] * _promises.pace_share(state, model)).astype(np.int64)
            begin_us[here] = _promises.backlog_us(state, model) + np.cumsum(took) - took
        late = begin_us >= window_us
        if not window_us or not late.any():
            return cls(order, order[:0])
        first_us = int(begin_us[late].min()) - window_us
        again_us = state.now_us + max(window_us // 4, first_us, 1)
        return cls(order[~late], order[late], again_us)

    def into(self, decision: Decision, because: Strings) -> Decision:
        """The decision on `order`, with what is to be said of the held."""
        decision.reason[self.held] = because[self.held] + ": waits, for prompts are before it"
        return dataclasses.replace(decision, again_us=self.again_us)


def decide(state: State, order: Ints, because: Strings, chooser: str, num_leaving: int) -> Decision:
    """The decision that admits of `order` whom there is room for; nobody while others must leave.

    because: of each waiting row, why it ranks where it does; what came of it is added. chooser: as
    `admission` has it. num_leaving: running rows that are preempted for want of KV.
    """
    if num_leaving:
        return _standstill(state, because, num_leaving)
    return decision(state, admission(state, order, chooser), because)


def admission(state: State, order: Ints, chooser: str | Chooser) -> Admission:
    """Who of `order` finds room, one after the other, each on one instance for each phase.

    chooser: says which instance, or names who does; "" leaves that to the compiler, and what counts
    is then whether there is room if all go where there is the most.
    """
    chosen = choosers.named(chooser or "least-load") if isinstance(chooser, str) else chooser
    placement = choosers.place(chosen, state, order)
    fits, blocked = _until_blocked(state, order, placement.fits)
    if blocked and (placement.decode_on == placement.prefill_on)[fits].any():
        # Rows that are blocked now took room from those before them: once more without.
        order = order[fits | np.isin(order, list(blocked.values()))]
        placement = choosers.place(chosen, state, order)
        fits, blocked_then = _until_blocked(state, order, placement.fits)
        blocked = blocked | blocked_then
    prefill_on, decode_on = placement.prefill_on[fits], placement.decode_on[fits]
    if not chooser:
        prefill_on, decode_on = (np.full(len(prefill_on), ANY, np.int64) for _ in range(2))
    return Admission(order[fits], Placement(prefill_on, decode_on), blocked)


def _until_blocked(state: State, order: Ints, fits: Bools) -> tuple[Bools, dict[str, int]]:
    """Rows of `order` before the first of their model that does not fit, and those firsts."""
    if fits.all():
        return fits, {}
    models = state.waiting.model[order]
    kept, blocked = fits.copy(), {}
    for at in np.flatnonzero(~fits).tolist():
        if models[at] not in blocked:
            blocked[models[at]] = int(order[at])
            kept[at:] &= models[at:] != models[at]
    return kept, blocked


def decision(state: State, admitted: Admission, because: Strings) -> Decision:
    """The decision that gives these their places, while all others wait.

    because: of each waiting row, why it ranks where it does; what came of it is added.
    """
    waiting = state.waiting
    outcome = _outcomes(state, admitted)
    said = Decision.admit(admitted.rows, waiting)
    said.prefill_on[admitted.rows] = admitted.placement.prefill_on
    said.decode_on[admitted.rows] = admitted.placement.decode_on
    outcome[said.verdict == ADMIT] = "it fits"
    placed = admitted.rows[admitted.placement.prefill_on != ANY]
    memory = choosers.remembered(state, placed)
    return dataclasses.replace(said, reason=because + ": " + outcome, memory=memory)


def _standstill(state: State, because: Strings, num_leaving: int) -> Decision:
    """The decision in which everybody waits, for running requests have to leave."""
    said = Decision.defer(state.waiting)
    outcome = f": waits, for KV is full and {num_leaving} running must leave"
    memory = choosers.remembered(state, state.waiting.rows[:0])
    return dataclasses.replace(said, reason=because + outcome, memory=memory)


def words(code: Ints, texts: Mapping[int, str] | list[str]) -> Strings:
    """A column of words from a column of their numbers."""
    named = texts if isinstance(texts, Mapping) else dict(enumerate(texts))
    column = np.empty(len(code), np.object_)
    column[:] = [named[one] for one in code.tolist()]
    return column


def _outcomes(state: State, admitted: Admission) -> Strings:
    """What becomes of each waiting row that is not admitted."""
    waiting = state.waiting
    column: Strings = np.full(len(waiting), "waits", np.object_)
    for model, row in admitted.blocked.items():
        column[waiting.model == model] = f"waits behind {waiting.ids[row]!r}, which has no room yet"
        column[row] = _no_room(state, row)
    return column


def _no_room(state: State, row: int) -> str:
    """Why a row has no place: what it needs, and the most that is free for it."""
    instances, waiting = state.instances, state.waiting
    serves = instances.model == waiting.model[row]
    tokens = int(waiting.prompt_tokens[row]) + 1
    free: Any = np.maximum(_room.free_blocks(state), 0) * instances.block_tokens
    for phase, allowed in (("prefill", instances.prefills), ("decode", instances.decodes)):
        pool = allowed & serves
        if not pool.any():
            return f"waits, for no live instance can {phase} its model"
        most = int(free[pool].max())
        if most < tokens:
            return f"waits for KV of {tokens} tokens, and at most {most} are free"
    return f"waits for KV of {tokens} tokens, which those before it take"
