"""The loop inside somebody else's engine: one instance, stepped by its owner.

    session = Session(strategy, planner, kv_blocks=512, block_tokens=16)
    session.add(Request(id="a", prompt=(1, 2, 3), max_output_tokens=8))
    while session.num_requests:
        if step := session.next_step():
            session.settle(step, my_engine.compute(step))
        for output in session.outputs():
            ...

Nothing here starts a thread or a process, sleeps, or calls back later: work is done in the calls
above and nowhere else. For several instances, write an `Engine` (docs/writing-an-engine.md).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from sagec.runtime.clock import Clock, WallClock
from sagec.runtime.cursor import Pick, PlanCursor
from sagec.runtime.engines import Cancelled, Capability, Event, Failed, PlanDone, Preempted
from sagec.runtime.engines import StepReport as Report
from sagec.runtime.loop import (
    Action,
    Arrived,
    Cancel,
    CancelRequested,
    Finished,
    Input,
    Instance,
    Loop,
    Output,
    Planner,
    Refused,
    Submit,
    Token,
    Wait,
)
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.strategies import Strategy


class SessionError(RuntimeError):
    """A call that does not fit what the session is at; says what would."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens [begin, end) of a request, to be computed in one step.

    tokens: their ids, as many as end - begin. samples: the request's next token is wanted then.
    context before `begin` has KV; a decode is a chunk of one token.
    """

    request_id: str
    begin: int
    tokens: tuple[int, ...]
    samples: bool

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.begin + len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the engine. dropped: requests whose KV is to be freed before it: they were
    preempted or cancelled, and start over if they are named again. chunks: what to compute."""

    chunks: tuple[Chunk, ...]
    dropped: tuple[str, ...]


@dataclasses.dataclass(slots=True)
class _Row:
    request: Request
    tokens: list[int]
    computed: int = 0
    blocks: int = 0

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def decodes(self) -> bool:
        return self.computed == len(self.tokens) - 1 and len(self.tokens) > len(self.request.prompt)


class _Residents:
    """Rows, and their blocks, which are counted and not named: the engine knows where they are."""

    def __init__(self, kv_blocks: int, block_tokens: int) -> None:
        self.kv_blocks, self.block_tokens = kv_blocks, block_tokens
        self.rows: dict[str, _Row] = {}

    @property
    def used_blocks(self) -> int:
        return sum(row.blocks for row in self.rows.values())

    def begin(self, row: _Row) -> None:
        """No prefix is cached here that it could begin with."""

    def make_room(self, row: _Row, tokens: int) -> bool:
        needed = -(-tokens // self.block_tokens)
        if needed - row.blocks > self.kv_blocks - self.used_blocks:
            return False
        row.blocks = max(row.blocks, needed)
        return True

    def never_fits(self, row: _Row, tokens: int) -> str:
        needed = -(-tokens // self.block_tokens)
        if needed <= self.kv_blocks:
            return ""
        return f"{tokens} tokens need {needed} KV blocks; there are {self.kv_blocks}"


class Session:
    """Requests in, steps out, tokens in, outputs out."""

    def __init__(
        self,
        strategy: Strategy,
        planner: Planner,
        *,
        kv_blocks: int,
        block_tokens: int,
        instance: str = "engine",
        model: str = "",
        max_context_tokens: int | None = None,
        eos_tokens: Sequence[int] = (),
        clock: Clock | None = None,
        watch: Sequence[Callable[[Input | Action], None]] = (),
    ) -> None:
        """planner: of a cluster with this one instance. kv_blocks of block_tokens tokens each are
        what the engine has; plans never need more. watch: see `ExecutorAPI`."""
        capability = Capability(
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            kv_layout="",
            kv_bytes_per_token=0,
            max_context_tokens=max_context_tokens or kv_blocks * block_tokens,
            eos_tokens=tuple(eos_tokens),
        )
        alone = Instance(id=instance, role="both", engine="", capability=capability, model=model)
        self.clock = clock or WallClock()
        self._id, self._eos, self._watch = instance, frozenset(eos_tokens), tuple(watch)
        self._room_tokens = min(capability.max_context_tokens, kv_blocks * block_tokens)
        self._residents = _Residents(kv_blocks, block_tokens)
        self._cursor: PlanCursor[_Row] | None = None
        self._inbox: list[Input] = []
        self._outputs: list[Output] = []
        self._dropped: dict[str, None] = {}
        self._given: tuple[Step, list[Pick[_Row]], int] | None = None
        self._wake_us: int | None = None
        self._live: set[str] = set()
        self._turns = Loop([alone], strategy, planner, self.clock).run()
        self._perform(next(self._turns))

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def wake_us(self) -> int | None:
        """When `next_step` may have something though nothing is added; None: not before that."""
        return self._wake_us

    def add(self, request: Request) -> None:
        """Take in a request; it is considered when the next step is asked for."""
        if request.stop_strings:
            raise SessionError(
                f"request {request.id!r}: stop strings need a tokenizer, which a session has not; "
                "cancel the request when its text has come to one"
            )
        self._live.add(request.id)
        self._hear(Arrived(request))

    def cancel(self, request_id: str) -> None:
        """Give up a request; its end is among the outputs of the next step."""
        self._hear(CancelRequested(request_id))

    def outputs(self) -> list[Output]:
        """Tokens and ends since this was asked last."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def next_step(self) -> Step | None:
        """What to compute next; None: nothing now. Raises SessionError before `settle`."""
        if self._given is not None:
            raise SessionError("the last step is not settled yet; call settle with its tokens")
        while True:
            if self._inbox or self._is_due():
                self._turn()
            elif (step := self._picked()) is not None:
                return step
            elif not self._inbox:
                return None

    def settle(self, step: Step, tokens: Mapping[str, int]) -> None:
        """Say that `step` is computed; tokens: the next one of each request that samples in it.

        Raises SessionError where it is another step, or a token is missing.
        """
        if self._given is None or self._given[0] is not step:
            raise SessionError("this is not the step that next_step gave last")
        wanted = [chunk.request_id for chunk in step.chunks if chunk.samples]
        if missing := [name for name in wanted if name not in tokens]:
            raise SessionError(f"request {missing[0]!r} samples in this step; its token is missing")
        _, picks, begin_us = self._given
        self._given = None
        assert self._cursor is not None
        sampled = [self._sample(pick.row, tokens[pick.row.id]) for pick in picks if pick.samples]
        for pick in picks:
            pick.row.computed = pick.end
        finished = [(row.id, reason) for row, _, reason in sampled if reason is not None]
        self._hear(
            Report(
                instance=self._id,
                plan_id=self._cursor.plan.plan_id,
                step=self._cursor.step,
                begin_us=begin_us,
                end_us=self.clock.now_us(),
                chunks=tuple((p.row.id, p.begin, p.end) for p in picks if not p.is_decode),
                decodes=tuple(p.row.id for p in picks if p.is_decode),
                tokens=tuple(token for _, token, _ in sampled if token is not None),
                finished=tuple(finished),
                kv_blocks_used=self._residents.used_blocks,
            )
        )
        for name, _ in finished:
            del self._residents.rows[name]
        self._cursor.step += 1
        self._turn()

    def _sample(
        self, row: _Row, token: int
    ) -> tuple[_Row, tuple[str, int, int] | None, FinishReason | None]:
        """Take a sampled token: what to report of it, and why the request ends now, if it does."""
        request = row.request
        if token in self._eos or token in request.stop_tokens:
            return row, None, FinishReason.STOP
        index = len(row.tokens) - len(request.prompt)
        row.tokens.append(token)
        full = len(row.tokens) >= self._room_tokens or index + 1 == request.max_output_tokens
        return row, (row.id, index, token), FinishReason.LENGTH if full else None

    def _picked(self) -> Step | None:
        """The next step of the plan at work, if it has one; else the plan is done."""
        if (cursor := self._cursor) is None:
            return None
        picks = [] if cursor.is_done else cursor.next_picks(self._residents)
        for name, error in cursor.failures:
            self._residents.rows.pop(name, None)
            self._dropped[name] = None
            self._hear(Failed(instance=self._id, request_id=name, error=error))
        cursor.failures.clear()
        picks = [pick for pick in picks if pick.row.id in self._residents.rows]
        if not picks:
            self._cursor = None
            self._hear(PlanDone(instance=self._id, plan_id=cursor.plan.plan_id))
            return None
        chunks = tuple(
            Chunk(
                request_id=pick.row.id,
                begin=pick.begin,
                tokens=tuple(pick.row.tokens[pick.begin : pick.end]),
                samples=pick.samples,
            )
            for pick in picks
        )
        step = Step(chunks=chunks, dropped=tuple(self._dropped))
        self._dropped.clear()
        self._given = step, picks, self.clock.now_us()
        return step

    # Between the loop and the engine

    def _is_due(self) -> bool:
        return self._wake_us is not None and self.clock.now_us() >= self._wake_us

    def _hear(self, said: Input) -> None:
        self._inbox.append(said)
        for watcher in self._watch:
            watcher(said)

    def _turn(self) -> None:
        inbox, self._inbox = self._inbox, []
        self._perform(self._turns.send(inbox))

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            for watcher in self._watch:
                watcher(action)
            match action:
                case Token() | Finished() | Refused():
                    self._outputs.append(action)
                    if isinstance(action, Finished):
                        self._live.discard(action.request_id)
                case Submit():
                    self._begin(action)
                case Cancel():
                    if self._residents.rows.pop(action.request_id, None):
                        self._dropped[action.request_id] = None
                    self._hear(Cancelled(instance=self._id, request_id=action.request_id))
                case Wait():
                    self._wake_us = action.until_us
                case _:
                    pass  # a round, for those who watch; alone, nobody hands KV over

    def _begin(self, submit: Submit) -> None:
        """Let a plan take over from the one at work."""
        rows, plan = self._residents.rows, submit.plan
        done: list[Event] = []
        if self._cursor is not None:
            done.append(PlanDone(instance=self._id, plan_id=self._cursor.plan.plan_id))
        for request in submit.requests:
            rows[request.id] = _Row(request, list(request.prompt))
        self._cursor = PlanCursor(plan)
        for index in plan.preemptions.row.tolist():
            row = rows[plan.request_ids[index]]
            row.computed = row.blocks = 0
            self._dropped[row.id] = None
            done.append(Preempted(instance=self._id, request_id=row.id))
        for event in done:
            self._hear(event)
