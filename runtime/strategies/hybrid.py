"""Requests that are promised a time and those that are not, on the same instances."""

import dataclasses
from typing import Any

import numpy as np

from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.state import ADMIT, Bools, Decision, Ints, Running, State, Strings
from sagec.runtime.strategies import _admission, _checks, _giving_way, _promises, _room
from sagec.runtime.strategies._patience import Patience
from sagec.runtime.strategies._promises import in_words
from sagec.runtime.strategies._turns import Turns

QUEUES = "queues"
"""Under this name a memory holds the turns of the tenants, by class and model."""

CLASSES = ("batch", "latency-critical")
"""Names of the classes of requests, by whether something was promised."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Latency-critical requests first, batch in what room they leave; tenants of each take turns.

    Critical is what was promised a time to its first token or between tokens. Within a class and
    model tenants take turns of quantum_tokens prompt tokens (deficit round robin); within a tenant
    deadlines count, then arrival. Prompts are cut so that no step keeps a critical request waiting
    for longer than it may, but not smaller than least_chunk_tokens. Batch that waits for longer
    than patience_us gets patience_share of the prompt tokens. backlog_us: nobody is admitted who
    has more prompts than that before it, 0: whoever has room.

    give_way: where a critical request has no room, the batch requests that were admitted last
    leave, unless they did most_preemptions times before; swap: their KV is kept elsewhere rather
    than computed again. chooser: who says where; "" leaves it to the compiler.
    """

    chooser: str = ""
    quantum_tokens: int = 2048
    give_way: bool = True
    swap: bool = False
    most_preemptions: int = 2
    backlog_us: int = 200_000
    patience_us: int = 10_000_000
    patience_share: float = 0.1
    least_chunk_tokens: int = 16
    name = "hybrid"

    def __post_init__(self) -> None:
        _checks.check_chooser(self.chooser)
        _checks.check_share(self.name, patience_share=self.patience_share)
        _checks.check_at_least(
            self.name, 0, backlog_us=self.backlog_us, patience_us=self.patience_us,
            most_preemptions=self.most_preemptions,
        )  # fmt: skip
        _checks.check_at_least(
            self.name, 1, quantum_tokens=self.quantum_tokens,
            least_chunk_tokens=self.least_chunk_tokens,
        )  # fmt: skip

    def decide(self, state: State) -> Decision:
        """Preempt on overflow; else critical, then batch, in turns; reject what never fits."""
        too_long, reasons = _room.never_fitting(state)
        rows = _room.without(state.waiting.rows, too_long)
        critical = _promises.is_promised(state.waiting)
        batch = rows[~critical[rows]]
        patience = Patience(self.patience_us, self.patience_share)
        first = patience.first(state, batch)
        because = _because(state, critical)
        because[first] = f"overdue, for it waits for {in_words(self.patience_us)} or more"
        queues = self._queues(state, _room.without(rows, first), critical)
        order = np.concatenate([first, *(queued[turns.order] for queued, turns in queues.values())])
        leaving = _room.overflowing(state, self._staying(state.running))
        paced = _admission.Paced.of(state, order, self.backlog_us)
        order = paced.order
        decision = _admission.decide(state, order, because, self.chooser, len(leaving))
        decision = paced.into(decision, because)
        memory = dict(decision.memory) | _remembered(queues, decision)
        memory |= patience.remembered(state, batch, first, decision.admitted)
        most = _promises.step_prompt_tokens(state, self.least_chunk_tokens)
        decision = dataclasses.replace(decision, memory=memory, step_prompt_tokens=most)
        decision = decision.reject(too_long, reasons)
        if len(leaving):
            return decision.preempt(leaving, "KV is full, and late batch leaves first")
        leaving = self._giving_way(state, decision, order[critical[order]])
        how = SWAP if self.swap else RECOMPUTE
        return decision.preempt(leaving, "batch gives way to a latency-critical request", how)

    def _queues(self, state: State, rows: Ints, critical: Bools) -> dict[str, tuple[Ints, Turns]]:
        """The rows of each class and model with the turns over them, critical ones first."""
        waiting = state.waiting
        due_us = _promises.token_deadlines_us(waiting)
        rows = rows[np.lexsort((waiting.sequence[rows], waiting.arrival_us[rows], due_us[rows]))]
        # Whoever lost its place has paid for it already.
        cost = np.where(waiting.preemptions > 0, 0, waiting.prompt_tokens)
        memory = state.memory.get(QUEUES, {})
        queues = {}
        for kind in (True, False):
            of_class = rows[critical[rows] == kind]
            models = waiting.model[of_class]
            for model in dict.fromkeys(models.tolist()):
                name, here = f"{CLASSES[kind]} {model}", of_class[models == model]
                before = memory.get(name, {})
                turns = Turns.over(waiting.tenant[here], cost[here], before, self.quantum_tokens)
                queues[name] = (here, turns)
        return queues

    def _may_leave(self, running: Running) -> Bools:
        return ~_promises.is_promised(running) & (running.preemptions < self.most_preemptions)

    def _staying(self, running: Running) -> Ints:
        """Running rows: critical ones first, then by arrival, so that late batch leaves first."""
        may_leave = self._may_leave(running)
        return np.lexsort((running.sequence, running.arrival_us, may_leave))

    def _giving_way(self, state: State, decision: Decision, critical: Ints) -> Ints:
        """Batch rows to preempt for the first critical row of a model that nobody is admitted of.

        Where somebody is, the next round sees what room that leaves. critical: in their order.
        """
        running, models = state.running, state.waiting.model
        leaving: list[int] = []
        if self.give_way and len(critical):
            may_leave = np.flatnonzero(self._may_leave(running) & ~running.arriving)
            latest = np.lexsort((running.sequence[may_leave], running.admitted_us[may_leave]))[::-1]
            served = set(models[decision.admitted].tolist())
            for row in critical.tolist():
                if models[row] not in served:
                    served.add(models[row])
                    leaving += _giving_way.room_for(state, row, may_leave[latest])
        return np.array(leaving, np.int64)


def _because(state: State, critical: Bools) -> Strings:
    """Why each row ranks where it does: its class and its tenant."""
    waiting = state.waiting
    pairs = zip(critical.tolist(), waiting.tenant.tolist(), strict=True)
    words: Strings = np.empty(len(waiting), np.object_)
    words[:] = [f"{CLASSES[kind]} of {name!r}" if name else CLASSES[kind] for kind, name in pairs]
    return words


def _remembered(queues: dict[str, tuple[Ints, Turns]], decision: Decision) -> dict[str, Any]:
    """The turns after this decision, which admits of each queue the first so many."""
    left = {}
    for name, (rows, turns) in queues.items():
        num_admitted = int(np.count_nonzero(decision.verdict[rows] == ADMIT))
        if num_admitted < len(rows):
            left[name] = turns.remembered(num_admitted)
    return {QUEUES: left} if left else {}
