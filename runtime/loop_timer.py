"""Measures what the loop takes between the steps of an engine that computes in its thread."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sagec.runtime.clock import WallClock
from sagec.runtime.engines import Engine, EngineError, Event, StepReport
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planner
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.step_timer import processor_wait_us
from sagec.runtime.strategies import create

AT_ONCE = 8
"""Requests that are served at the same time, where there is room."""

PROMPT_TOKENS = 24

OUTPUT_TOKENS = (6, 22)
"""From and up to; so requests end one by one, and each end lets another one in, by a new plan."""


@dataclass(frozen=True)
class LoopTimes:
    """turn_us: between two steps, to hear what the first one did. round_us: so much longer, where
    there is a new plan in between."""

    turn_us: float
    round_us: float


def measure(
    engine: Engine, instance: Instance, planner: Planner, vocab: int, count: int = 64
) -> LoopTimes:
    """Serve `count` short requests, first come, first served, and take the medians.

    The engine serves nobody else, and computes a step in a poll. vocab: prompts are drawn of it.
    Raises EngineError where a request fails.
    """
    capability = engine.capability()
    longest = PROMPT_TOKENS + OUTPUT_TOKENS[1] + capability.block_tokens
    room = capability.kv_blocks * capability.block_tokens // longest
    at_once = max(1, min(AT_ONCE, room))
    requests = _requests(vocab, count)
    watched: Any = _Watched(engine)
    executor = ExecutorAPI({instance.id: watched}, [instance])
    outputs = executor.serve(requests[:at_once], create("fifo"), planner, until_closed=True)
    coming = iter(requests[at_once:])
    for output in outputs:
        if not isinstance(output, Finished):
            continue
        if output.reason not in (FinishReason.LENGTH, FinishReason.STOP):
            raise EngineError(f"instance {instance.id!r}: {output.reason}: {output.detail}")
        if (request := next(coming, None)) is None:
            executor.close_intake()
        else:
            executor.submit(request)
    turn_us = _median(watched.turns_us)
    return LoopTimes(turn_us, max(0.0, round(_median(watched.rounds_us) - turn_us, 1)))


class _Watched:
    """An engine whose polls are timed: what passes between two of them that computed a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._clock = engine, WallClock()
        self._left_us: float | None = None  # the last poll, if it computed a step
        self._is_planned = False
        self.turns_us: list[float] = []
        self.rounds_us: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        self._is_planned = True
        self._engine.submit(plan, requests)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        begin_us, left_us, is_planned = self._now_us(), self._left_us, self._is_planned
        events = self._engine.poll(timeout_s)
        computed = any(isinstance(e, StepReport) and (e.chunks or e.decodes) for e in events)
        if computed and left_us is not None:
            (self.rounds_us if is_planned else self.turns_us).append(begin_us - left_us)
        self._left_us, self._is_planned = (self._now_us() if computed else None), False
        return events

    def _now_us(self) -> float:
        """Without the time in which this thread wanted a processor that others had."""
        return self._clock.now_us() - processor_wait_us()


def _requests(vocab: int, count: int) -> list[Request]:
    draw = np.random.default_rng(0)
    prompts = draw.integers(vocab, size=(count, PROMPT_TOKENS)).tolist()
    outputs = draw.integers(*OUTPUT_TOKENS, size=count).tolist()
    numbers = itertools.count()
    return [
        Request(id=f"loop-{next(numbers)}", prompt=tuple(prompt), max_output_tokens=output)
        for prompt, output in zip(prompts, outputs, strict=True)
    ]


def _median(times_us: Sequence[float]) -> float:
    """0 of none."""
    return round(float(np.median(times_us)), 1) if times_us else 0.0
