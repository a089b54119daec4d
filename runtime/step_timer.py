"""Measures the steps of an engine, over a grid, with plans made by hand."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sagec.runtime.clock import WallClock
from sagec.runtime.engines import Engine, EngineError, Failed, PlanDone, StepReport
from sagec.runtime.plan import Chunks, Decodes, ExecutionPlan, Rows
from sagec.runtime.profile import Point
from sagec.runtime.request import Request

RUN_STEPS = 4
"""Decode steps of a plan."""


@dataclass(frozen=True)
class Grid:
    """What to measure, each so many times, after one that is not counted.

    chunks: tokens of a prompt, computed for each number of `prompts` and after each of `pasts`.
    batches: decodes, at each of `contexts`; in mixed steps beside each of `mixed_chunks`.
    """

    chunks: tuple[int, ...] = (
        *(1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    )
    prompts: tuple[int, ...] = (1, 4)
    pasts: tuple[int, ...] = (0, 256)
    batches: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    contexts: tuple[int, ...] = (16, 128, 384, 1024)
    mixed_chunks: tuple[int, ...] = (8, 64, 256)
    repeats: int = 9

    @staticmethod
    def quick() -> Grid:
        """Fewer points, less often: seconds for a small model."""
        return Grid(
            chunks=(1, 4, 16, 64, 256),
            pasts=(0,),
            batches=(1, 4, 8, 16, 32),
            contexts=(16, 256),
            mixed_chunks=(64,),
            repeats=5,
        )


class StepTimer:
    """Times steps of one engine that serves nobody else.

    A step's time is from when the engine was free for it to its end, so it includes what a step
    costs beside its computation; but not how long this thread waited for a processor, where the
    system tells; and of its repeats those count that waited least. Rounds over all points follow
    each other, so that what disturbs the machine for a while disturbs one repeat of each and not
    all of a few; those of prefills are dealt out among the contexts of decodes, for what a step of
    both saves is a small difference between the two. They go from small steps to large ones, and
    the next one back: a step behind a much larger one finds the caches full of that.
    """

    def __init__(
        self,
        engine: Engine,
        instance: str,
        vocab: int,
        max_batch: int = 256,
        max_step_tokens: int = 1024,
    ) -> None:
        """vocab: prompts are drawn of it. max_batch, max_step_tokens: of the steps to measure."""
        self._driver = _Driver(engine, instance, vocab)
        self._max_batch, self._max_step_tokens = max_batch, max_step_tokens
        capability = engine.capability()
        self._block_tokens = capability.block_tokens
        self._kv_tokens = capability.kv_blocks * capability.block_tokens
        self._longest = capability.max_context_tokens

    def points(self, grid: Grid) -> tuple[Point, ...]:
        """The grid's points that this instance has room for, measured. Raises EngineError."""
        prefills = sorted(self._prefills(grid), key=lambda point: point.step)
        self._prefill_round(prefills)
        rounds: list[list[_Taken]] = []
        beside: list[Point] = []
        places = len(grid.contexts) or 1
        for place in range(places):
            while len(rounds) * places < grid.repeats * (place + 1):
                back = self._prefill_round(prefills[::-1])[::-1]
                rounds += [self._prefill_round(prefills), back]
            for context in grid.contexts[place : place + 1]:
                beside += self._at_context(grid, context)
        times = zip(*rounds, strict=True)
        return (*itertools.starmap(_summary, zip(prefills, times, strict=True)), *beside)

    def _prefill_round(self, prefills: Sequence[Point]) -> list[_Taken]:
        return [self._prefill(point) for point in prefills]

    def _prefills(self, grid: Grid) -> Iterator[Point]:
        """Of all prefills those that there is room for; their times are still to be measured."""
        for past, prompts, chunk in itertools.product(grid.pasts, grid.prompts, grid.chunks):
            tokens, length = prompts * chunk, past + chunk
            room = prompts * (length + self._block_tokens) <= self._kv_tokens
            if tokens <= self._max_step_tokens and length < self._longest and room:
                yield Point(1.0, prompts=prompts, chunk_tokens=chunk, past_tokens=past)

    def _prefill(self, point: Point) -> _Taken:
        """What the step took; what its prompts have before it is computed in steps before.

        The last of these is as large as this one: as in serving, where steps follow their like.
        """
        past, chunk = point.past_tokens, point.chunk_tokens
        requests = [self._driver.request(past + chunk, 1) for _ in range(point.prompts)]
        like = max(0, past - chunk)  # from here on, a step like the one to be measured
        steps = [[(request, 0, like)] for request in requests if like]
        steps += [[(request, like, past) for request in requests]] if past else []
        steps += [[(request, past, past + chunk) for request in requests]]
        return self._driver.run(requests, requests, chunks=steps)[-1]

    def _at_context(self, grid: Grid, context: int) -> list[Point]:
        """All batches of decodes at about so much context, alone and beside chunks of a prompt."""
        grown = (grid.repeats + 1) * len(grid.batches) * (RUN_STEPS + len(grid.mixed_chunks))
        grown = min(grown, self._longest - context - 1)
        each = context + grown + 2 * self._block_tokens
        spare = self._block_tokens + max(grid.mixed_chunks, default=0)
        most = min(self._max_batch, (self._kv_tokens - spare) // each)
        batches = [batch for batch in grid.batches if batch <= most]
        if not batches or grown < RUN_STEPS:
            return []
        resident = _Residents(self._driver, context, grown)
        times: dict[Point, list[tuple[_Taken, int]]] = {}
        for is_counted in (False, *[True] * grid.repeats):
            for point in self._beside(grid, batches):
                taken = resident.steps(max(batches), point.decodes, point.chunk_tokens)
                times.setdefault(point, []).extend(taken if is_counted else [])
        resident.leave()
        return [_at_mean_context(point, taken) for point, taken in times.items() if taken]

    def _beside(self, grid: Grid, batches: Sequence[int]) -> Iterator[Point]:
        """Decodes alone, and beside each chunk that there is room for."""
        for batch in batches:
            yield Point(1.0, decodes=batch)
            for chunk in grid.mixed_chunks:
                if batch + chunk <= self._max_step_tokens and chunk < self._longest:
                    yield Point(1.0, prompts=1, chunk_tokens=chunk, decodes=batch)


Step = Sequence[tuple[Request, int, int]]
"""Tokens [begin, end) of requests, to be computed in one step."""


class _Taken(NamedTuple):
    """A step, the microseconds that it took, and for how long it waited for a processor beside."""

    report: StepReport
    us: float
    waits_us: float


class _Driver:
    """Drives an engine by plans made by hand."""

    def __init__(self, engine: Engine, instance: str, vocab: int) -> None:
        self._engine, self._instance, self._vocab = engine, instance, vocab
        self._block_tokens = engine.capability().block_tokens
        self._random = np.random.default_rng(0)
        self._numbers = itertools.count()
        self._clock = WallClock()

    def request(self, prompt_tokens: int, output_tokens: int) -> Request:
        """A request that nobody has seen, so that nothing of it is cached."""
        prompt = tuple(self._random.integers(self._vocab, size=prompt_tokens).tolist())
        name = f"request-{next(self._numbers)}"
        return Request(id=name, prompt=prompt, max_output_tokens=output_tokens)

    def run(
        self,
        requests: Sequence[Request],
        new: Sequence[Request],
        chunks: Sequence[Step] = (),
        decodes: Sequence[tuple[Request, int]] = (),
    ) -> list[_Taken]:
        """Run a plan to its end: its steps, and what each took.

        requests: all of the plan; new: those of them that the engine does not have. chunks: what
        each step computes. decodes: who decodes, and until how many tokens.
        """
        self._engine.submit(self._plan(requests, chunks, decodes), new)
        found: list[_Taken] = []
        free_us, waited_us = self._clock.now_us(), processor_wait_us()
        while True:
            events = self._engine.poll()
            before_us, waited_us = waited_us, processor_wait_us()
            for event in events:
                if isinstance(event, Failed):
                    raise EngineError(f"instance {self._instance!r}: {event.error}")
                if isinstance(event, StepReport):
                    waits_us = waited_us - before_us
                    us = max(1.0, event.end_us - free_us - waits_us)
                    found.append(_Taken(event, us, waits_us))
                    free_us, before_us = event.end_us, waited_us
                if isinstance(event, PlanDone):
                    return found

    def cancel(self, names: Iterable[str]) -> None:
        """Free what these requests hold."""
        for name in names:
            self._engine.cancel(name)
        self._engine.poll()

    def _plan(
        self,
        requests: Sequence[Request],
        chunks: Sequence[Step],
        decodes: Sequence[tuple[Request, int]],
    ) -> ExecutionPlan:
        place = {request.id: row for row, request in enumerate(requests)}
        flat = [
            (step, place[request.id], begin, end, end == len(request.prompt))
            for step, those in enumerate(chunks)
            for request, begin, end in those
        ]
        step, row, begin, end, samples = np.array(flat, np.int64).reshape(-1, 5).T
        members = [(place[request.id], until) for request, until in decodes]
        decoding, until = np.array(members, np.int64).reshape(-1, 2).T
        prompts = np.array([len(request.prompt) for request in requests])
        tokens = prompts + np.array([request.max_output_tokens for request in requests])
        return ExecutionPlan(
            plan_id=f"measure-{next(self._numbers)}",
            round=0,
            target_instance_id=self._instance,
            mode="hybrid",
            num_steps=len(chunks) or RUN_STEPS,
            max_step_tokens=int(tokens.sum()),
            request_ids=tuple(place),
            rows=Rows(
                prompt_tokens=prompts,
                computed_tokens=prompts * 0,
                kv_blocks=-(-tokens // self._block_tokens),
                deadline_us=prompts * 0,
            ),
            chunks=Chunks(step=step, row=row, begin=begin, end=end, samples=samples),
            decodes=Decodes(row=decoding, begin_step=decoding * 0, until_tokens=until),
        )


class _Residents:
    """Requests that decode, at about the same context; one that ends makes room for another."""

    def __init__(self, driver: _Driver, context: int, grown: int) -> None:
        """grown: output tokens that each may have."""
        self._driver, self._context, self._grown = driver, context, grown
        self._tokens: dict[str, int] = {}
        self._requests: dict[str, Request] = {}

    def steps(self, size: int, decodes: int, chunk: int) -> list[tuple[_Taken, int]]:
        """What steps took in which so many of `size` requests decode, and their tokens of KV.

        chunk: tokens of a prompt beside them, or 0; then it is one step.
        """
        self._fill(size)
        decoding = list(self._requests.values())[:decodes]
        prompt = [self._driver.request(chunk, 1)] if chunk else []
        ran = self._driver.run(
            [*self._requests.values(), *prompt],
            prompt,
            chunks=[[(request, 0, chunk)] for request in prompt],
            decodes=[(request, self._tokens[request.id] + RUN_STEPS) for request in decoding],
        )
        found = []
        for took in ran:
            report = took.report
            if len(report.decodes) == decodes and len(report.chunks) == len(prompt):
                found.append((took, sum(self._tokens[name] for name in report.decodes)))
            self._advance(report)
        return found

    def leave(self) -> None:
        """Free all that they hold."""
        self._driver.cancel(self._requests)

    def _advance(self, report: StepReport) -> None:
        for name in report.decodes:
            self._tokens[name] += 1
        for name, _ in report.finished:
            self._requests.pop(name, None)
            self._tokens.pop(name, None)

    def _fill(self, size: int) -> None:
        """Have so many requests, with their prompts computed."""
        while missing := size - len(self._requests):
            new = [self._driver.request(self._context, self._grown) for _ in range(missing)]
            self._requests |= {request.id: request for request in new}
            self._tokens |= {request.id: self._context for request in new}
            steps = [[(request, 0, self._context)] for request in new]
            for took in self._driver.run(list(self._requests.values()), new, chunks=steps):
                self._advance(took.report)


def _at_mean_context(point: Point, taken: Sequence[tuple[_Taken, int]]) -> Point:
    """The point of these steps with their tokens of KV, at the mean of the latter."""
    held = sum(tokens for _, tokens in taken) / len(taken)
    return replace(
        _summary(point, [took for took, _ in taken]), context_tokens=round(held / point.decodes)
    )


def processor_wait_us() -> float:
    """For how long this thread wanted a processor that others had; 0 where nobody counts it."""
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e3
    except (OSError, IndexError):
        return 0.0


def _summary(point: Point, taken: Sequence[_Taken]) -> Point:
    """The point with the median and interquartile range of what those of its steps took that waited
    for a processor no longer than half of them did."""
    waits_us = statistics.median_low(took.waits_us for took in taken)
    times_us = [took.us for took in taken if took.waits_us <= waits_us]
    low, middle, high = np.quantile(np.array(times_us), (0.25, 0.5, 0.75)).tolist()
    return replace(
        point, us=round(middle, 1), spread_us=round(high - low, 1), repeats=len(times_us)
    )
