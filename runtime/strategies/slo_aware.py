"""Whoever was promised a time gets it, as far as that is possible."""

import dataclasses

import numpy as np

from sagec.runtime.state import Decision, Ints, State
from sagec.runtime.strategies import _admission, _checks, _promises, _room
from sagec.runtime.strategies._outlook import Outlook
from sagec.runtime.strategies._patience import Patience
from sagec.runtime.strategies._promises import in_words

STARTS = "latest_starts_us"
"""Under this name a memory holds [sequence number, time] of waiting requests, to order them by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SloAware:
    """Earliest deadline first among those that can still be in time, then all others by arrival.

    Where not all can be in time, as few as possible are given up (Moore-Hodgson) and go to best
    effort; one given up comes back only if it can be saved with `margin` of its TTFT to spare and
    at nobody's expense. reject: those that cannot be saved, and those after whose prompts the KV
    is predicted to be more than full, are refused instead. Who was promised nothing, or was given
    up, is overdue after patience_us and gets patience_share of the prompt tokens from then on.

    least_laxity: by the time at which a prompt has to begin, rather than by deadline; the order of
    two changes only where that time moved by more than the margin. hand_off_us: what moving KV to
    where it decodes takes. backlog_us: nobody is admitted who has more prompts than that before
    it, so that a later one with an earlier deadline can still go first; 0: whoever has room.
    least_chunk_tokens: prompts are not cut smaller than this to keep promises between tokens. On
    overflow the one with the most time to its next token leaves, those that left most_preemptions
    times after all others. chooser: who says where; "" leaves it to the compiler.
    """

    chooser: str = ""
    reject: bool = False
    least_laxity: bool = False
    margin: float = 0.1
    hand_off_us: int = 0
    backlog_us: int = 200_000
    patience_us: int = 10_000_000
    patience_share: float = 0.1
    least_chunk_tokens: int = 16
    most_preemptions: int = 2
    name = "slo-aware"

    def __post_init__(self) -> None:
        _checks.check_chooser(self.chooser)
        _checks.check_share(self.name, patience_share=self.patience_share)
        _checks.check_at_least(
            self.name, 0, margin=self.margin, hand_off_us=self.hand_off_us,
            backlog_us=self.backlog_us, patience_us=self.patience_us,
            most_preemptions=self.most_preemptions,
        )  # fmt: skip
        _checks.check_at_least(self.name, 1, least_chunk_tokens=self.least_chunk_tokens)

    def decide(self, state: State) -> Decision:
        """Preempt on overflow; else admit by deadline what fits; reject what never will."""
        too_long, reasons = _room.never_fitting(state)
        rows = _room.without(state.waiting.rows, too_long)
        outlook = Outlook.of(state, rows, self.margin, self.hand_off_us)
        refused, why = outlook.refused() if self.reject else (rows[:0], [])
        rows = _room.without(rows, refused)
        saved, behind = rows[outlook.saved[rows]], rows[~outlook.saved[rows]]
        patience = Patience(self.patience_us, self.patience_share)
        first = patience.first(state, behind)
        because = outlook.because()
        because[first] = f"overdue, for it waits for {in_words(self.patience_us)} or more"
        starts_us = self._starts_us(outlook)
        rest = _by(state.waiting.arrival_us, _room.without(behind, first))
        order = np.concatenate([first, _by(starts_us, saved), rest])
        leaving = _room.overflowing(state, self._staying(state))
        paced = _admission.Paced.of(state, order, self.backlog_us)
        decision = _admission.decide(state, paced.order, because, self.chooser, len(leaving))
        decision = paced.into(decision, because)
        memory = dict(decision.memory) | outlook.remembered(rows)
        memory |= patience.remembered(state, behind, first, decision.admitted)
        if self.least_laxity and len(saved):
            sequence = state.waiting.sequence[saved]
            memory[STARTS] = np.column_stack([sequence, starts_us[saved]]).tolist()
        most = _promises.step_prompt_tokens(state, self.least_chunk_tokens)
        decision = dataclasses.replace(decision, memory=memory, step_prompt_tokens=most)
        decision = decision.reject(np.append(too_long, refused), [*reasons, *why])
        return decision.preempt(leaving, "KV is full, and its next token has the most time")

    def _starts_us(self, outlook: Outlook) -> Ints:
        """By what the saved rows are ordered: deadlines, or the latest times to begin.

        Such a time is that of an earlier round while the new one is not further away than the
        margin: predictions tremble, and the order must not.
        """
        state, waiting = outlook.state, outlook.state.waiting
        if not self.least_laxity:
            return outlook.left_us
        starts_us = np.where(
            outlook.saved, state.now_us + outlook.left_us - outlook.took_us, _promises.NEVER
        )
        before = dict(state.memory.get(STARTS, ()))
        known = np.array([before.get(one, -1) for one in waiting.sequence.tolist()], np.int64)
        near = np.abs(starts_us - known) <= self.margin * waiting.ttft_us
        return np.where((known >= 0) & near, known, starts_us)

    def _staying(self, state: State) -> Ints:
        """Running rows, first those that have the least time to their next token.

        What counts is the time that is left after computing the row's tokens once more.
        """
        running = state.running
        due_us = _promises.token_deadlines_us(running)
        tokens = np.maximum(running.prompt_tokens, running.computed_tokens)
        again_us = tokens * state.instances.prefill_ns_per_token[running.instance] // 1000
        laxity_us = np.where(due_us < _promises.NEVER, due_us - again_us, due_us)
        laxity_us[running.preemptions >= self.most_preemptions] = -_promises.NEVER
        return np.lexsort((running.sequence, running.arrival_us, laxity_us))


def _by(key: Ints, rows: Ints) -> Ints:
    return rows[np.argsort(key[rows], kind="stable")]
