"""A strategy that is a list of rules, each an expression."""

import dataclasses
from functools import cached_property

import numpy as np

from sagec.runtime.expressions.compiled import Condition, Ranking
from sagec.runtime.expressions.ranked_chooser import RankedChooser
from sagec.runtime.expressions.rules import BY_ARRIVAL, LATEST, Key, Rules
from sagec.runtime.expressions.values import (
    EVERY,
    AdmissionValues,
    RunningValues,
    VictimValues,
    WaitingValues,
)
from sagec.runtime.state import Bools, Decision, Ints, State, Strings
from sagec.runtime.strategies import _admission, _room
from sagec.runtime.strategies.choosers import Chooser


@dataclasses.dataclass(frozen=True)
class RuledStrategy:
    """Does what its rules say, and whatever they say, admits only what there is room for."""

    rules: Rules

    @property
    def name(self) -> str:
        """As the statement calls it."""
        return self.rules.name

    @np.errstate(all="ignore")
    def decide(self, state: State) -> Decision:
        """Reject, preempt, admit; in a round in which somebody has to leave nobody is admitted."""
        waiting = state.waiting
        too_long, too_long_why = _room.never_fitting(state)
        refused, refused_why = self._refused(state, too_long)
        leaving, leaving_why = self._leaving(state)
        if len(leaving):
            said = Decision.defer(waiting, f"waits, for {len(leaving)} running must leave")
        else:
            said = self._admitting(state, self._order(state, too_long, refused))
        if len(too_long) or len(refused):
            said = said.reject(too_long, too_long_why).reject(refused, refused_why)
        if len(leaving):
            said = said.preempt(leaving, leaving_why)
        return self._bounded(said)

    def _bounded(self, said: Decision) -> Decision:
        """The same, with the mode, chunk and horizon of the rules."""
        rules = self.rules
        said.chunk_tokens[:] = rules.chunk_tokens
        if not rules.mode and not rules.horizon_steps:
            return said
        return dataclasses.replace(said, mode=rules.mode, horizon_steps=rules.horizon_steps)

    # What the rules compile to.

    @cached_property
    def _ranking(self) -> Ranking:
        return Ranking(self.rules.order or BY_ARRIVAL)

    @cached_property
    def _staying(self) -> Ranking:
        """Who is to stay the longest: who is to leave, the other way round."""
        keys = self.rules.preempt or (LATEST,)
        return Ranking([Key(key.expression, not key.largest) for key in keys])

    @cached_property
    def _admits(self) -> Condition | None:
        return Condition(self.rules.admit) if self.rules.admit is not None else None

    @cached_property
    def _rejects(self) -> Condition | None:
        return Condition(self.rules.reject) if self.rules.reject is not None else None

    @cached_property
    def _preempts(self) -> Condition | None:
        return Condition(self.rules.preempt_when) if self.rules.preempt_when is not None else None

    @cached_property
    def _chooser(self) -> Chooser | str:
        """Who says where requests go; "" leaves it to the compiler."""
        rules = self.rules
        if rules.prefill_on or rules.decode_on:
            return RankedChooser(rules.prefill_on, rules.decode_on)
        return rules.place_by

    # Who waits.

    def _refused(self, state: State, too_long: Ints) -> tuple[Ints, list[str]]:
        """Rows that are to be rejected, and why."""
        rows = state.waiting.rows
        if self._rejects is None or not len(rows):
            return rows[:0], []
        values = WaitingValues(state, rows)
        holds = self._rejects.holds(values, len(rows))
        holds[too_long] = False
        refused = np.flatnonzero(holds)
        told = self._rejects.told(values, refused.tolist(), True)
        return refused, [f"rejected: {reason}" for reason in told]

    def _order(self, state: State, *gone: Ints) -> Ints:
        """The rows that are left, the first first."""
        rows = state.waiting.rows
        if any(map(len, gone)):
            rows = rows[~np.isin(rows, np.concatenate(gone))]
        if not len(rows):
            return rows
        return rows[self._ranking.order(WaitingValues(state, rows), len(rows))]

    def _admitting(self, state: State, order: Ints) -> Decision:
        """The decision that admits those of the order for whom there is room and no rule stops."""
        order, stopped, why = self._until_stopped(state, order)
        because = self.rules.order_text
        if self._chooser:
            column: Strings = np.full(len(state.waiting), because, np.object_)
            said = _admission.decision(
                state, _admission.admission(state, order, self._chooser), column
            )
        else:
            rows = _room.fitting(state, order)
            said = Decision.admit(rows, state.waiting, f"{because}: it fits")
            _tell_blocked(said, state, order[len(rows) :])
        said.reason[stopped] = why
        return said

    def _until_stopped(self, state: State, order: Ints) -> tuple[Ints, Ints, Strings]:
        """Rows until `admit while` ends, those behind with the reason of each.

        It ends for each model by itself, for models have their KV apart.
        """
        nobody, no_reasons = order[:0], np.empty(0, np.object_)
        if self._admits is None or not len(order):
            return order, nobody, no_reasons
        values = AdmissionValues(state, order)
        holds = self._admits.holds(values, len(order))
        if holds.all():
            return order, nobody, no_reasons
        why: Strings = np.full(len(order), "", np.object_)
        models = state.waiting.model[order]
        for model in dict.fromkeys(models[~holds].tolist()):
            here = np.flatnonzero(models == model)
            first = int(here[~holds[here]][0])
            (told,) = self._admits.told(values, [first], False)
            why[here[here > first]] = f"waits behind {state.waiting.ids[order[first]]!r}: {told}"
            why[first] = f"waits: {told}"
        stops = why != ""
        return order[~stops], order[stops], why[stops]

    # Who runs.

    def _leaving(self, state: State) -> tuple[Ints, list[str]]:
        """Running rows that have to leave, and why: those for whom KV runs out come first."""
        running = state.running
        values = RunningValues(state, EVERY)
        told_any = self._holds_for_any(values)
        if not told_any and not _overflows(values):
            return running.rows[:0], []
        staying = self._staying.order(values, len(running))
        crowded = _room.overflowing(state, staying).tolist()
        why = dict.fromkeys(crowded, "KV is full, and it is the first to leave")
        told = self._told_to_leave(state, staying) if told_any else {}
        why |= {row: reason for row, reason in told.items() if row not in why}
        return np.array([*why], np.int64), [*why.values()]

    def _holds_for_any(self, values: RunningValues) -> bool:
        """Whether the rule tells any row that is there to leave, as long as nobody did."""
        if self._preempts is None:
            return False
        holds = self._preempts.holds(values, len(values.places))
        return bool((holds & ~values.table.arriving).any())

    def _told_to_leave(self, state: State, staying: Ints) -> dict[int, str]:
        """Rows that leave, one after the other on each instance, as long as `when` holds; and why.

        One is left in any case. Those whose KV is on its way have nothing to leave.
        """
        running, rule = state.running, self._preempts
        assert rule is not None
        first_to_leave = staying[::-1]
        first_to_leave = first_to_leave[~running.arriving[first_to_leave]]
        rows = first_to_leave[np.argsort(running.instance[first_to_leave], kind="stable")]
        values = VictimValues(state, rows)
        leaves = np.flatnonzero(_while_true(rule.holds(values, len(rows)), values.places))
        _, first, of_row = np.unique(values.places[leaves], return_index=True, return_inverse=True)
        told = rule.told(values, leaves[first].tolist(), True)
        return {int(rows[at]): told[n] for at, n in zip(leaves.tolist(), of_row, strict=True)}


def _overflows(values: RunningValues) -> bool:
    """Whether some instance lacks the blocks for the next token of all that it has."""
    kv_blocks = values.state.instances.kv_blocks
    held = np.bincount(values.places, values.held_blocks, len(kv_blocks))
    return bool((held > kv_blocks).any())


def _while_true(holds: Bools, groups: Ints) -> Bools:
    """Of each group of adjacent rows those before the first that does not hold, nor the last."""
    index = np.arange(len(holds))
    first = np.searchsorted(groups, groups)
    last = np.searchsorted(groups, groups, side="right") - 1
    broken = np.cumsum(~holds)
    before: Ints = broken - np.where(first > 0, broken[first - 1], 0)
    kept: Bools = (before == 0) & (index < last)
    return kept


def _tell_blocked(said: Decision, state: State, blocked: Ints) -> None:
    """Give the rows behind the first without room their reasons."""
    if len(blocked):
        first = int(blocked[0])
        waiting = state.waiting
        said.reason[blocked] = f"waits behind {waiting.ids[first]!r}, which has no room yet"
        said.reason[first] = f"waits for KV of {waiting.prompt_tokens[first] + 1} tokens"
