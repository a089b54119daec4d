"""TurboMind over the toy model, for tests that decide its steps through the native library."""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.loading import Loaded, load, submit_session
from sagec.runtime.engines.turbomind.native import Move, NativeError, Question
from sagec.runtime.engines.turbomind.native_events import Exported, NativeEvent, Step
from sagec.runtime.engines.turbomind.options import read_options
from sagec.runtime.engines.turbomind.patching import ensure_patched
from sagec.runtime.engines.turbomind.sessions import SessionStatus
from sagec.runtime.engines.turbomind.toy import ToyStep, generate, install
from sagec.runtime.request import Sampling

BLOCK_TOKENS, VOCAB = 16, 1000
PATIENCE_S = 40.0
"""What takes longer will never come."""
TURN_US = 1000
NEVER_US = 100_000_000

Items = list[tuple[int, int]]
Decide = Callable[[Question], Items]
Computed = list[tuple[int, int, int]]
EventT = TypeVar("EventT", bound=NativeEvent)

_numbers = itertools.count(1)


class Stuck(AssertionError):
    """What was waited for did not come."""


@dataclass
class Session:
    """A request: `expected` is what the reference model says after the prompt.

    given: the first of that, sampled on another engine. handle: none before it is started.
    """

    id: int
    prompt: list[int]
    expected: list[int]
    given: list[int]
    handle: Any = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.handle is not None and not self.handle.wait(0)

    @property
    def ended_by(self) -> SessionStatus:
        """How it ended, or that it runs."""
        return SessionStatus(self.handle.status)

    @property
    def output(self) -> list[int]:
        """Its tokens after the prompt."""
        return [*self.given, *self.handle.output()]


def _loaded(kv_blocks: int, **options: object) -> Loaded:
    spec = InstanceSpec(
        id="toy",
        engine="turbomind",
        model="",
        kv_blocks=kv_blocks,
        block_tokens=BLOCK_TOKENS,
        options={"maths": "toy", **{name: str(value) for name, value in options.items()}},
    )
    return load(spec, read_options(spec))


@functools.cache
def _note_steps() -> None:
    install().trace()


class Driven:
    """One TurboMind with its instance of the native library; patched=False: without one."""

    def __init__(
        self,
        *,
        patched: bool = True,
        decider: int = abi.ANSWERS,
        strict: bool = True,
        guard: bool = True,
        deadline_us: int = NEVER_US,
        kv_blocks: int = 64,
        prefix_cache: bool = False,
        tp: int = 1,
        step_tokens: int = 256,
        max_batch: int = 16,
        layout_seed: int = 1,
        step_us: int = 0,
    ) -> None:
        self.number = next(_numbers) if patched else 0
        self._answers = patched and decider == abi.ANSWERS
        self._may_be_late = deadline_us < NEVER_US
        self.loaded = _loaded(
            kv_blocks,
            tp=tp,
            prefix_cache="on" if prefix_cache else "off",
            step_tokens=step_tokens,
            max_batch=max_batch,
            step_us=step_us,
        )
        _note_steps()
        self.question: Question | None = None
        self.sessions: list[Session] = []
        """All that were made for it, whether they were started or not."""
        self._events: list[NativeEvent] = []
        self._trace: list[ToyStep] = []
        if patched:
            self._native = ensure_patched()
            self._open = functools.partial(
                self._native.open,
                self.number,
                decider=decider,
                strict=strict,
                guard=guard,
                num_ranks=tp,
                deadline_us=deadline_us,
            )
            self.native = self._open()
            self._layout = self._native.layout(layout_seed, 1, BLOCK_TOKENS, tp)
            self.native.set_layout(self._layout)

    def close(self) -> None:
        """End the engine, whatever is under way."""
        if self.number:
            self.native.close()
        self.loaded.close()

    def reopen(self) -> None:
        """Close the instance and open it anew, while the engine runs; its log begins anew too."""
        self.native.close()
        self.native, self.question = self._open(), None

    # Requests

    def submit(self, prompt: Sequence[int], num_tokens: int) -> Session:
        """Start a session that generates so many tokens."""
        session = self.expect(prompt, num_tokens)
        self.start(session)
        return session

    def expect(self, prompt: Sequence[int], num_tokens: int, given: Sequence[int] = ()) -> Session:
        """A session that is not started yet, and begins after `given` tokens of its output."""
        expected = generate(prompt, num_tokens, VOCAB)
        number = (self.number << abi.INSTANCE_SHIFT) + len(self.sessions) + 1
        session = Session(number, list(prompt), expected, list(given))
        self.sessions.append(session)
        return session

    def start(self, session: Session) -> None:
        """Hand the session to TurboMind."""
        tokens = [*session.prompt, *session.given]
        left = len(session.expected) - len(session.given)
        session.handle = submit_session(
            self.loaded, session.id, tokens, left, Sampling(), (), lambda _: None
        )

    def cancel(self, session: Session) -> None:
        """Cancel it; a step on hold looks at once."""
        session.handle.cancel()
        self.native.wake()

    @property
    def is_busy(self) -> bool:
        """Whether any session runs."""
        return any(session.is_running for session in self.sessions)

    # Questions and answers

    def ask_or_none(self) -> Question | None:
        """The question at hand, or the next one if it comes soon."""
        if self.question is None:
            self.question = self.native.wait_question(TURN_US)
        return self.question

    def answer(self, question: Question, items: Items) -> None:
        """Raises NativeError where the native side refuses."""
        self.question = None
        self.native.answer(question.step, items)

    def was_in_time(self, question: Question, items: Items) -> bool:
        """Answer; False where there is a deadline and it was missed."""
        try:
            self.answer(question, items)
        except NativeError:
            if not self._may_be_late:
                raise
            return False
        return True

    def serve(
        self,
        decide: Decide,
        until: Iterable[Session] | None = None,
        steps: int | None = None,
    ) -> None:
        """Answer until these sessions (all) have ended, or so many questions are answered."""
        watched, answered, begin_s = list(until or ()), 0, time.monotonic()
        while answered != steps:
            if not any(session.is_running for session in watched or self.sessions):
                return
            if (question := self.ask_or_none()) is not None:
                answered += self.was_in_time(question, decide(question))
            self._be_patient(begin_s)

    def hold_until(self, come: Callable[[Question], bool]) -> Question:
        """Hold everything until a question is as wanted; that one is left to be answered."""
        begin_s = time.monotonic()
        while (question := self.ask_or_none()) is None or not come(question):
            if question is not None:
                self.was_in_time(question, [])
            self._be_patient(begin_s)
        return question

    def wait_for(self, come: Callable[[], bool]) -> None:
        """Read events until it is so."""
        begin_s = time.monotonic()
        while not come():
            self._read(TURN_US)
            self._be_patient(begin_s)

    def finish(self, sessions: Iterable[Session]) -> list[Session]:
        """These sessions when they have ended; where answers are wanted, everybody computes."""
        running = list(sessions)
        if self._answers:
            self.serve(whole, running)
        begin_s = time.monotonic()
        for session in running:
            while not session.handle.wait(0.01):
                self._be_patient(begin_s)
        return running

    def _be_patient(self, begin_s: float) -> None:
        if time.monotonic() - begin_s > PATIENCE_S:
            running = [session.id for session in self.sessions if session.is_running]
            raise Stuck(f"sessions {running} hang; question {self.question}; {self.events[-3:]}")

    # What happened

    @property
    def events(self) -> list[NativeEvent]:
        """All events so far."""
        self._read(0)
        return self._events

    def of(self, kind: type[EventT]) -> list[EventT]:
        """Events of a kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def steps(self) -> list[Step]:
        """All steps so far."""
        return self.of(Step)

    @property
    def counters(self) -> dict[str, int]:
        """The native counters."""
        return self.native.counters()

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """NCCL's calls in this process, by collective."""
        return self._native.collectives()

    def time_collectives(self, every: int) -> None:
        """Time one of so many of them; 0: none."""
        self._native.time_collectives(every)

    def _read(self, timeout_us: int) -> None:
        if self.number:
            self._events += self.native.read(timeout_us)

    # KV

    def prefill(self, prompt: Sequence[int]) -> tuple[bytes, list[int]]:
        """The KV of a prompt, exported, and the first token after it."""
        session = self.expect(prompt, 1)
        self.native.migrate([Move(session.id)])
        self.start(session)
        self.serve(whole, [session])
        return self.take_export(session), session.output

    def take_export(self, session: Session) -> bytes:
        """The KV of a session that ends or has ended, and was wanted."""
        self.wait_for(lambda: any(event.session == session.id for event in self.of(Exported)))
        (size,) = (e.num_bytes for e in self.of(Exported) if e.session == session.id)
        blob = bytearray(size)
        self.native.take_export(session.id, blob)
        return bytes(blob)

    def stage(self, session: Session, blob: bytes) -> None:
        """Have the session begin with this KV. Raises NativeError where it is refused."""
        self.native.migrate([Move(session.id, blob, self._layout)])

    # Blocks, steps, ranks

    def watch_evictions(self) -> list[int]:
        """Uids of the blocks that the eviction callback is told of, as they go."""
        uids: list[int] = []
        self.native.on_eviction(lambda _, uid: uids.append(uid))
        return uids

    def trace(self, rank: int = 0) -> list[Computed]:
        """What the model saw: (session, begin, end) of each step of this instance on a rank."""
        _traces.extend(install().take_trace())
        self._trace += [step for step in _traces if self._computed(step)]
        _traces[:] = [step for step in _traces if not self._computed(step)]
        mine = [step.rows for step in self._trace if step.rank == rank]
        return [sorted((id, *tokens) for id, tokens in rows.items()) for rows in mine]

    def _computed(self, step: ToyStep) -> bool:
        return all(session >> abi.INSTANCE_SHIFT == self.number for session in step.rows)


_traces: list[ToyStep] = []
"""Steps of all engines of this process that none of them has asked for."""


def computed(step: Step) -> Computed:
    """(session, begin, end) of those who computed in a step."""
    return sorted((row.session, row.begin, row.end) for row in step.rows if row.end > row.begin)


@contextmanager
def driven(**settings: Any) -> Iterator[Driven]:
    """A TurboMind for as long as a test needs it."""
    one = Driven(**settings)
    try:
        yield one
    finally:
        one.close()


def text(num_tokens: int, seed: int) -> list[int]:
    """So many tokens, the same for the same seed; a longer text begins with the shorter one."""
    draw = random.Random(seed)
    return [draw.randrange(VOCAB) for _ in range(num_tokens)]


# What must be so


def exact(*sessions: Session) -> None:
    """Every session ended by itself with the tokens of the reference model."""
    for session in sessions:
        assert session.ended_by == SessionStatus.FINISHED, f"{session.id}: {session.ended_by!r}"
        assert session.output == session.expected, f"{session.id}: wrong tokens"


def as_traced(one: Driven) -> None:
    """What was reported is what the model saw, step by step, and the tokens are the reference's."""
    reported = [computed(step) for step in one.steps]
    assert [rows for rows in reported if rows] == one.trace(), "the log and the model differ"
    sampled: dict[int, list[int]] = {}
    for step in one.steps:
        for row in step.rows:
            if row.samples:
                sampled.setdefault(row.session, []).append(row.token)
    for session in one.sessions:
        told = session.given + sampled.get(session.id, [])
        assert told == session.expected[: len(told)], f"{session.id}: wrong tokens in the log"


# Decisions


def whole(question: Question) -> Items:
    """Everybody, in TurboMind's own order."""
    return [(row.session, row.context) for row in question.rows]


def hold(question: Question) -> Items:
    """Nobody."""
    return []


def only(session: int) -> Decide:
    """This one alone, in every step."""
    return lambda question: [item for item in whole(question) if item[0] == session]


def shortest_first(question: Question) -> Items:
    """One a step, that with the fewest tokens to compute."""
    row = min(question.rows, key=lambda row: row.context - row.computed)
    return [(row.session, row.context)]


def at_most(chunk: int) -> Decide:
    """Everybody who needs no more than `chunk` tokens, and so many of one other."""

    def decide(question: Question) -> Items:
        rows = question.rows
        items = [(r.session, r.context) for r in rows if r.context - r.computed <= chunk]
        cut = [(r.session, r.computed + chunk) for r in rows if r.context - r.computed > chunk]
        return items + cut[:1]

    return decide
