"""What a round must respect after an instance failed, whatever the strategy said."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from sagec.runtime.state import ADMIT, ANY, DEFER, UNBOUNDED, Bools, Decision, Ints, State


def elsewhere(decision: Decision, state: State, failed_on: Mapping[int, int]) -> Decision:
    """The same decision, but a request does not go back to the instance that failed it.

    failed_on: that instance's index, by waiting row. Another of its role and model, which can hold
    the request, takes the row: the one with most blocks free. Where there is none, the decision
    stands. Rows that nobody can serve until an instance is back are deferred, and the turn of a
    dead instance is nobody's.
    """
    alive = state.instances.alive
    if not failed_on and bool(alive.all()):
        return decision
    if decision.turn_steps is not None:
        turns = np.where(alive, decision.turn_steps, ANY)
        decision = dataclasses.replace(decision, turn_steps=turns)
    decision = _deferred(decision, state)
    free = state.instances.kv_blocks - state.instances.kv_blocks_used
    for row in decision.admitted.tolist():
        if row in failed_on:
            decision = _moved(decision, state, row, failed_on[row], free)
    return decision


def _deferred(decision: Decision, state: State) -> Decision:
    """Admitted rows whose model has no instance alive for one of the phases wait."""
    instances, models = state.instances, state.waiting.model
    lost = np.zeros(len(models), bool)
    for model in set(models.tolist()):
        serves = instances.model == model
        if not (serves & instances.prefills).any() or not (serves & instances.decodes).any():
            lost |= models == model
    lost &= decision.verdict == ADMIT
    if not lost.any():
        return decision
    verdict, reason = decision.verdict.copy(), decision.reason.copy()
    verdict[lost] = DEFER
    reason[lost] = "its instances failed and are being made again"
    return dataclasses.replace(decision, verdict=verdict, reason=reason)


def _moved(decision: Decision, state: State, row: int, failed: int, free: Ints) -> Decision:
    """The row on another instance of the role; `free` is less by what it takes there."""
    role = state.instances.role[failed]
    columns = {"prefill": ("prefill_on",), "decode": ("decode_on",)}
    names = columns.get(role, ("prefill_on", "decode_on"))
    if any(getattr(decision, name)[row] not in (ANY, failed) for name in names):
        return decision
    others = np.flatnonzero(_alike(state, row, failed))
    if not len(others):
        return decision
    chosen = others[np.argmax(free[others])]
    tokens = state.waiting.prompt_tokens[row] + 1
    free[chosen] -= -(-tokens // state.instances.block_tokens[chosen])
    changed = {name: getattr(decision, name).copy() for name in (*names, "reason")}
    for name in names:
        changed[name][row] = chosen
    told = f"not on {state.instances.ids[failed]!r}, which failed it"
    changed["reason"][row] = f"{decision.reason[row]}; {told}" if decision.reason[row] else told
    return dataclasses.replace(decision, **changed)


def _alike(state: State, row: int, failed: int) -> Bools:
    """Instances alive, other than this one, of its role and model, that can hold the row."""
    instances, waiting = state.instances, state.waiting
    generate = waiting.generate_tokens[row]
    output = 1 if generate == UNBOUNDED or instances.role[failed] == "prefill" else generate
    fits = waiting.prompt_tokens[row] + output <= instances.kv_blocks * instances.block_tokens
    same_role = instances.role == instances.role[failed]
    same_model = instances.model == instances.model[failed]
    found: Bools = same_role & same_model & fits & instances.alive
    found[failed] = False
    return found
