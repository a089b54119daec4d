"""Random requests under random decisions on the patched TurboMind, over the toy model."""

from __future__ import annotations

import random
import threading
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
class Run:
    """One run of a case: `requests` are (question at which it comes, tokens that it shares with
    others, its own tokens, tokens to generate, question at which it is cancelled or 0).
    """

    one: Driven
    draw: random.Random
    requests: list[list[int]]
    wild: bool
    stalls: bool
    num_questions: int = 0
    sessions: list[tuple[Session, int]] = field(default_factory=list)
    planned: dict[int, dict[int, int]] = field(default_factory=dict)
    budgets: dict[int, int] = field(default_factory=dict)

    def play(self) -> None:
        """Answer every question until all requests came and went."""
        while self.requests or self.one.is_busy:
            self._come_and_go()
            question = self.one.ask_or_none()
            if question is None:
                continue
            items = self._items(question)
            if self.stalls and self.draw.random() < STALL:
                threading.Event().wait(2e-6 * STALL_US)
            if self.one.was_in_time(question, items):
                self.planned[question.step] = dict(items)
                self.budgets[question.step] = question.budget_tokens

    def _come_and_go(self) -> None:
        self.num_questions += 1
        while self.requests and (self.requests[0][0] <= self.num_questions or not self.one.is_busy):
            _, shared, own, num_tokens, cancelled_at = self.requests.pop(0)
            prompt = text(shared, seed=0) + text(own, seed=len(self.sessions) + 1)
            self.sessions.append((self.one.submit(prompt, num_tokens), cancelled_at))
        for session, cancelled_at in self.sessions:
            if 0 < cancelled_at <= self.num_questions and session.is_running:
                self.one.cancel(session)

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


def run(case: dict[str, Any]) -> int:
    """Play a case; how many steps were computed. Raises AssertionError where anything is wrong."""
    settings = {
        name: case[name]
        for name in ("kv_blocks", "prefix_cache", "tp", "step_tokens", "max_batch", "strict")
    }
    stalls = case["stalls"]
    with driven(**settings, deadline_us=STALL_US if stalls else NEVER_US) as one:
        requests = sorted(case["requests"])
        played = Run(one, random.Random(case["seed"]), requests, case["wild"], stalls)
        played.play()
        kept = [session for session, cancelled_at in played.sessions if not cancelled_at]
        exact(*kept)
        as_traced(one)
        if not case["wild"]:
            _obeyed(played, roomy=_blocks_of(case) <= case["kv_blocks"])
        return len(one.steps)


def _blocks_of(case: dict[str, Any]) -> int:
    """Blocks that all requests of a case would hold at once, each with a token to spare."""
    tokens = [shared + own + generated + 1 for _, shared, own, generated, _ in case["requests"]]
    return sum(-(-count // BLOCK_TOKENS) for count in tokens)


def _obeyed(played: Run, roomy: bool) -> None:
    """Each step computed what was decided, or nothing of a row where blocks may have been short."""
    for step in played.one.steps:
        if step.decided_by == abi.BY_DEADLINE:
            assert played.stalls
            continue
        left = played.budgets[step.step]
        rows = {row.session: row for row in step.rows if row.planned_end}
        for session, planned_end in played.planned[step.step].items():
            if (row := rows.get(session)) is None:
                continue  # it was cancelled meanwhile
            assert row.planned_end == planned_end
            left -= planned_end - row.begin
            is_left_out = row.end == row.begin and not roomy
            assert row.end == planned_end or is_left_out or left < 0, (step, row)
