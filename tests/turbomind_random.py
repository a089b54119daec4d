"""Random requests under random decisions on the patched TurboMind, over the toy model."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.native import Question
from tests.turbomind_driven import (
    BLOCK_TOKENS,
    NEVER_US,
    Driven,
    Items,
    Session,
    as_traced,
    driven,
    exact,
    text,
)

HOLD, LEAVE_OUT, CHUNK, WILD, STALL = 0.1, 0.35, 0.5, 0.3, 0.15
"""How often a step is held, a row left out, and the last one cut; how often ends are anything, and
an answer does not come, in runs that are wild, or stall."""

STALL_US = 2000


@dataclass
class Answers:
    """Random answers to an instance's questions, and what they were."""

    one: Driven
    draw: random.Random
    wild: bool
    stalls: bool
    num_questions: int = 0
    planned: dict[int, dict[int, int]] = field(default_factory=dict)

    def answer_next(self) -> None:
        """The next question, if one comes soon."""
        self.num_questions += 1
        question = self.one.ask_or_none()
        if question is None:
            return
        items = self._items(question)
        if self.stalls and self.draw.random() < STALL:
            threading.Event().wait(2e-6 * STALL_US)
        if self.one.was_in_time(question, items):
            self.planned[question.step] = dict(items)

    def _items(self, question: Question) -> Items:
        draw, rows = self.draw, list(question.rows)
        if draw.random() < HOLD:
            return []
        draw.shuffle(rows)
        chosen = [row for row in rows if draw.random() >= LEAVE_OUT]
        items = [(row.session, row.context) for row in chosen]
        if chosen and draw.random() < CHUNK:
            last = chosen[-1]
            items[-1] = (last.session, draw.randint(last.computed + 1, last.context))
        if self.wild and draw.random() < WILD:
            items = [(row.session, draw.randint(-5, row.context + 50)) for row in rows]
        return items

    def check(self, roomy: bool, step_tokens: int) -> None:
        """The log is what the model saw, and where answers were sensible they were obeyed: each
        step computed what was decided, or nothing of a row where blocks may have been short.
        A question's budget may be more than step_tokens, and is less again when others leave.
        """
        as_traced(self.one)
        if self.wild:
            return
        for step in self.one.steps:
            if step.decided_by == abi.BY_DEADLINE:
                assert self.stalls
                continue
            left = step_tokens
            rows = {row.session: row for row in step.rows if row.planned_end}
            for session, planned_end in self.planned[step.step].items():
                if (row := rows.get(session)) is None:
                    continue  # it was cancelled meanwhile
                assert row.planned_end == planned_end
                left -= planned_end - row.begin
                is_left_out = row.end == row.begin and not roomy
                assert row.end == planned_end or is_left_out or left < 0, (step, row)


@dataclass
class Run:
    """One run of a case: `requests` are (question at which it comes, tokens that it shares with
    others, its own tokens, tokens to generate, question at which it is cancelled or 0).
    """

    answers: Answers
    requests: list[list[int]]
    sessions: list[tuple[Session, int]] = field(default_factory=list)

    def play(self) -> None:
        """Answer every question until all requests came and went."""
        while self.requests or self.answers.one.is_busy:
            self._come_and_go()
            self.answers.answer_next()

    def _come_and_go(self) -> None:
        one, now = self.answers.one, self.answers.num_questions
        while self.requests and (self.requests[0][0] <= now or not one.is_busy):
            _, shared, own, num_tokens, cancelled_at = self.requests.pop(0)
            prompt = text(shared, seed=0) + text(own, seed=len(self.sessions) + 1)
            self.sessions.append((one.submit(prompt, num_tokens), cancelled_at))
        for session, cancelled_at in self.sessions:
            if 0 < cancelled_at <= now and session.is_running:
                one.cancel(session)


def run(case: dict[str, Any]) -> int:
    """Play a case; how many steps were computed. Raises AssertionError where anything is wrong."""
    with instance_of(case) as one:
        answers = Answers(one, random.Random(case["seed"]), case["wild"], case["stalls"])
        played = Run(answers, sorted(case["requests"]))
        played.play()
        exact(*(session for session, cancelled_at in played.sessions if not cancelled_at))
        requests = [request[1:4] for request in case["requests"]]
        answers.check(blocks_of(requests) <= case["kv_blocks"], case["step_tokens"])
        return len(one.steps)


def instance_of(case: dict[str, Any]) -> AbstractContextManager[Driven]:
    """An instance as the case has it."""
    names = ("kv_blocks", "prefix_cache", "tp", "step_tokens", "max_batch", "strict")
    settings = {name: case[name] for name in names}
    return driven(**settings, deadline_us=STALL_US if case["stalls"] else NEVER_US)


def blocks_of(requests: Iterable[Sequence[int]]) -> int:
    """Blocks that requests of (shared, own, generated) tokens would hold at once, each with a token
    to spare."""
    return sum(-(-(sum(tokens) + 1) // BLOCK_TOKENS) for tokens in requests)
