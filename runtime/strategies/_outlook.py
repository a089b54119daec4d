"""Who of those that wait can still get what was promised, and why not; for strategies."""

import dataclasses

import numpy as np
import numpy.typing as npt

from sagec.runtime.state import Bools, Ints, State, Strings
from sagec.runtime.strategies import _lateness, _promises
from sagec.runtime.strategies._promises import NEVER, in_words

Floats = npt.NDArray[np.float64]

GIVEN_UP = "given_up"
"""Under this name a memory holds the sequence numbers of waiting requests that were given up."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outlook:
    """What is predicted of the waiting rows that may be served, from measured speeds.

    Columns have an entry a waiting row. took_us: its prompt, alone. left_us: until its next token
    is due, less the hand-off; NEVER where nothing was promised. queued_us: what its model's
    instances have to compute before its prompt is done, if those that are saved go by deadline.
    saved: it was promised something and can be in time.
    """

    state: State
    rows: Ints
    took_us: Ints
    left_us: Ints
    queued_us: Ints
    saved: Bools

    @staticmethod
    def of(state: State, rows: Ints, margin: float, hand_off_us: int) -> "Outlook":
        """The outlook of these rows; margin and hand_off_us as `SloAware` has them."""
        waiting = state.waiting
        due_us = _promises.token_deadlines_us(waiting)
        moved_us = _moved_us(state, hand_off_us)
        left_us = np.where(due_us < NEVER, due_us - state.now_us - moved_us, NEVER)
        took_us = _promises.bare_prefill_us(state)
        given_up = np.isin(waiting.sequence, state.memory.get(GIVEN_UP, ()))
        margin_us = (margin * waiting.ttft_us).astype(np.int64)
        saved = np.zeros(len(waiting), bool)
        queued_us = took_us.copy()
        for model in set(waiting.model[rows].tolist()):
            here = rows[(waiting.model[rows] == model) & (left_us[rows] < NEVER)]
            # Several instances are reckoned as one that is as fast as they are together.
            took = np.ceil(took_us[here] * _promises.pace_share(state, model)).astype(np.int64)
            backlog_us = _promises.backlog_us(state, model)
            left = left_us[here] - backlog_us
            # But no prompt is computed on several at once.
            possible = took_us[here] <= left_us[here]
            fresh, back = possible & ~given_up[here], possible & given_up[here]
            kept = np.zeros(len(here), bool)
            kept[fresh] = _lateness.most_in_time(took[fresh], left[fresh])
            kept = _lateness.rejoined(took, left, kept, back, margin_us[here])
            saved[here] = kept
            order = np.argsort(left, kind="stable")
            before = np.cumsum(np.where(kept, took, 0)[order])
            queued = backlog_us + before + np.where(kept, 0, took)[order]
            queued_us[here[order]] = np.maximum(queued, took_us[here[order]])
        return Outlook(state, rows, took_us, left_us, queued_us, saved)

    @property
    def given_up(self) -> Bools:
        """Rows that were promised something and cannot be in time."""
        given_up: Bools = (self.left_us < NEVER) & ~self.saved
        return given_up

    def remembered(self, rows: Ints) -> dict[str, list[int]]:
        """What a memory is to hold: who of these rows was given up."""
        sequence = self.state.waiting.sequence[rows[self.given_up[rows]]].tolist()
        return {GIVEN_UP: sequence} if sequence else {}

    def because(self) -> Strings:
        """Why each row ranks where it does, in few different words."""
        waiting = self.state.waiting
        words: Strings = np.full(len(waiting), "promised nothing", np.object_)
        saved = np.flatnonzero(self.saved)
        slack_us = (self.left_us - self.took_us)[saved]
        words[saved] = [f"by deadline, slack {in_words(us)} at least" for us in slack_us.tolist()]
        for row in np.flatnonzero(self.given_up).tolist():
            words[row] = self._given_up_because(row)
        return words

    def _given_up_because(self, row: int) -> str:
        took_us, left_us = int(self.took_us[row]), int(self.left_us[row])
        ttft_us = int(self.state.waiting.ttft_us[row])
        if self.state.waiting.output_tokens[row] == 0 and took_us > ttft_us:
            return (
                f"best effort: its prompt takes {in_words(took_us)} on an idle instance, "
                f"and it was promised its first token in {in_words(ttft_us)}"
            )
        if left_us < took_us:
            return f"best effort: too late by {in_words(took_us - left_us)} at least"
        return f"best effort: it or others must be late, {in_words(left_us)} are left"

    def refused(self) -> tuple[Ints, list[str]]:
        """Rows to refuse, for a promise cannot be kept; and the numbers.

        A request that has tokens already, or lost its place, was accepted, and is served.
        """
        waiting = self.state.waiting
        asks = (self.left_us < NEVER) & (waiting.output_tokens == 0) & (waiting.preemptions == 0)
        load = self.decode_load()
        rows = self.rows[(asks & (self.given_up | (load > 1)))[self.rows]]
        reasons = []
        for row in rows.tolist():
            waited_us = self.state.now_us - waiting.arrival_us[row]
            ttft_ms = (waited_us + self.queued_us[row]) / 1000
            reasons.append(
                f"predicted: first token after {ttft_ms:.1f} ms of {waiting.ttft_us[row] / 1000:g} "
                f"promised, its prompt alone {self.took_us[row] / 1000:.1f} ms; "
                f"KV then {load[row]:.0%} full"
            )
        return rows, reasons

    def decode_load(self) -> Floats:
        """Of each row, how full the KV for decodes is predicted to be when its prompt is done.

        That is what Mooncake accepts by: the load of now would be that of prompts accepted long
        ago, and accepting by it swings between too many and none. Requests that end until then
        are gone, the others have grown by a token a step, and the saved rows that go before are
        there. 0 where nobody knows how long a step takes.
        """
        waiting, load = self.state.waiting, np.zeros(len(self.state.waiting))
        asking = self.rows[self.left_us[self.rows] < NEVER]
        for model in set(waiting.model[asking].tolist()):
            here = asking[waiting.model[asking] == model]
            here = here[np.argsort(self.left_us[here], kind="stable")]
            own = waiting.prompt_tokens[here] + 1
            ahead = np.cumsum(np.where(self.saved[here], own, 0))
            held = ahead + np.where(self.saved[here], 0, own)
            load[here] = _kv_load(self.state, model, self.queued_us[here], held)
        return load


def _kv_load(state: State, model: str, after_us: Ints, more_tokens: Ints) -> Floats:
    """How full the model's KV for decodes will be after these times, with so much more in it."""
    instances, running = state.instances, state.running
    pool = instances.decodes & (instances.model == model)
    steps_us = instances.decode_step_us[pool]
    room = int((instances.kv_blocks * instances.block_tokens)[pool].sum())
    if not (steps_us > 0).any() or not room:
        return np.zeros(len(after_us))
    step_us = float(steps_us[steps_us > 0].mean())
    here = np.flatnonzero(pool[running.decode_on])
    ends_us = running.remaining_tokens[here] * step_us
    here = here[np.argsort(ends_us)]
    held = np.maximum(running.prompt_tokens[here], running.computed_tokens[here]) + 1
    ended = np.searchsorted(np.sort(ends_us), after_us, side="right")
    left_tokens = held.sum() - np.concatenate([[0], np.cumsum(held)])[ended]
    grown = (len(here) - ended) * (after_us / step_us)
    return np.asarray((left_tokens + grown + more_tokens) / room)


def _moved_us(state: State, hand_off_us: int) -> Ints:
    """The hand-off of each waiting row: nothing where an instance does both phases."""
    instances = state.instances
    at_home = set(instances.model[instances.prefills & instances.decodes].tolist())
    moves = [model not in at_home for model in state.waiting.model.tolist()]
    return np.where(moves, hand_off_us, 0)
