"""The serving loop, without I/O: events in, actions out; it alone changes a request.

    loop = Loop(instances, strategy, planner, clock)
    turns = loop.run()
    actions = next(turns)
    while True:
        ...                                  # do what the actions say, wait for events
        actions = turns.send(events)         # StopIteration: closed, and every request has ended

A request goes waiting -> running (prefilling, arriving elsewhere, decoding) -> finished. A token's
index in its request is its identity: one that is there already is dropped, a gap fails the request.
A round asks the strategy and the planner. There is one when a request came, a plan is done and
somebody could use its instance, KV came for an instance whose plan does not await it, an engine had
to decide a step itself, or something failed; never one for a mere step.
"""

import dataclasses
import heapq
import itertools
import time
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Protocol

import msgspec
import numpy as np

from sagec.runtime.clock import Clock
from sagec.runtime.cost import StepCost
from sagec.runtime.engines import (
    Cancelled,
    Capability,
    DecidedBy,
    Event,
    Failed,
    KVCached,
    KVExported,
    KVHandle,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.kv.directory import Directory
from sagec.runtime.pace import Pace
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.retry import elsewhere
from sagec.runtime.state import (
    LEAVING,
    RUNNING,
    WAITING,
    Decision,
    Instances,
    Memory,
    RequestTable,
    State,
)
from sagec.runtime.state import check as check_decision
from sagec.runtime.status import RequestPhase, RequestStatus
from sagec.runtime.strategies import Strategy

LEAD_STEPS = 2
"""How many steps before the end of a plan the next one is made."""

FUTILE_ROUNDS = 8
"""Rounds in a row without a step, a hand-over or a new request after which none will help."""


_SAID_BY_ENGINES = (FinishReason.STOP, FinishReason.LENGTH)

_PHASES = {
    WAITING: RequestPhase.WAITING,
    RUNNING: RequestPhase.RUNNING,
    LEAVING: RequestPhase.LEAVING,
}


class LoopError(RuntimeError):
    """A planner that names what does not exist; says which plan and what."""


class Planner(Protocol):
    """Turns a decision into plans; the roof hands the compiler in, tests something smaller.

    A plan holds for one instance and supersedes the one at work there. Instances that need no
    change get none. Admitted rows that no plan gives chunks go on waiting.
    """

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance:
    """An instance as the loop is told of it. model: the name by which requests ask for it.

    cost: predicts its steps until some were measured. pool, switch_us: see `Instances`.
    """

    id: str
    role: str
    engine: str
    capability: Capability
    model: str = ""
    cost: StepCost | None = None
    pool: str = ""
    switch_us: int = 0


# What the loop hears, beside an engine's events.


class Arrived(msgspec.Struct, frozen=True):
    """A request came."""

    request: Request


class CancelRequested(msgspec.Struct, frozen=True):
    """A client no longer wants its answer."""

    request_id: str


class PlanCancelRequested(msgspec.Struct, frozen=True):
    """A plan is to stop at the next step boundary; its requests stay, and are planned again."""

    plan_id: str


class Restarting(msgspec.Struct, frozen=True):
    """An instance that failed will be made again at this time; its requests may wait for it."""

    instance: str
    at_us: int


class Joined(msgspec.Struct, frozen=True):
    """An instance that had failed is there again, empty."""

    instance: str


class Closed(msgspec.Struct, frozen=True):
    """No more requests will come."""


Input = Event | Arrived | CancelRequested | PlanCancelRequested | Restarting | Joined | Closed

# What the loop says: to be done, in this order.


class Submit(msgspec.Struct, frozen=True):
    """Give an instance a plan, with the requests that it does not know."""

    instance: str
    plan: ExecutionPlan
    requests: tuple[Request, ...]


class Deliver(msgspec.Struct, frozen=True):
    """Tell an instance that KV waits for it."""

    instance: str
    handle: KVHandle


class Discard(msgspec.Struct, frozen=True):
    """Free KV that nobody will receive."""

    handle: KVHandle


class Cancel(msgspec.Struct, frozen=True):
    """Tell an instance to forget a request."""

    instance: str
    request_id: str


class Token(msgspec.Struct, frozen=True):
    """A request's next token: index counts its output from 0."""

    request_id: str
    index: int
    token: int
    time_us: int


class Finished(msgspec.Struct, frozen=True):
    """A request ended; detail says why, where it did not end by itself."""

    request_id: str
    reason: FinishReason
    detail: str
    report: RequestReport


class Refused(msgspec.Struct, frozen=True):
    """A request was not taken in, and nothing of it is kept.

    for_now: too much waits already, and the same request may be taken in later; otherwise its id is
    in use, or nobody is served any more.
    """

    request_id: str
    detail: str
    for_now: bool = False


class Retried(msgspec.Struct, frozen=True):
    """An instance lost a request's KV: it starts over, with the output that it has.

    attempt: how often it has started over, this time included.
    """

    request_id: str
    instance: str
    error: str
    attempt: int


class Planned(msgspec.Struct, frozen=True):
    """A round: what was seen, said and planned; to be recorded.

    decide_us, plan_us: what strategy and planner took, by the wall; 0 where time is simulated, for
    there they take none of it, and two runs must say the same.
    """

    state: State
    decision: Decision
    plans: tuple[ExecutionPlan, ...]
    decide_us: float = 0.0
    plan_us: float = 0.0


class Wait(msgspec.Struct, frozen=True):
    """Come back with events, or without when this time has come; None: only with events."""

    until_us: int | None


Output = Token | Finished | Refused
Action = Submit | Deliver | Discard | Cancel | Output | Retried | Planned | Wait


@dataclasses.dataclass(kw_only=True)
class _Serving:
    """How far a request's service is.

    known_on: the instance that knows the request, with the first `base` tokens of its output as
    part of its prompt. shadow_on: one that still knows what it was before, or awaits its KV.
    leaves_as: it leaves for good, and why. handle: its KV on the way. recalled: its instance was
    told to forget it, and will say when it has. ran_on: where it was, in order.
    """

    request: Request
    row: int
    output: list[int] = dataclasses.field(default_factory=list)
    known_on: int | None = None
    shadow_on: int | None = None
    base: int = 0
    leaves_as: FinishReason | None = None
    handle: KVHandle | None = None
    recalled: bool = False
    ran_on: list[str] = dataclasses.field(default_factory=list)
    reused_tokens: int = 0
    admitted_us: int | None = None
    first_token_us: int | None = None
    last_token_us: int | None = None
    attempts: int = 0
    preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.output)


class Loop:
    """Serves requests on instances; see the module's text for how it is driven."""

    def __init__(
        self,
        instances: Sequence[Instance],
        strategy: Strategy,
        planner: Planner,
        clock: Clock,
        max_attempts: int = 3,
        stopwatch_s: Callable[[], float] = time.perf_counter,
        catch_up: Callable[[], Sequence[Event]] = tuple,
    ) -> None:
        """max_attempts: how often a request is started over after failures before it fails.

        stopwatch_s: by which strategy and planner are timed. catch_up: what engines have done and
        not said, asked before a round: those that tell of many steps at once owe some of them.
        """
        self.instances = tuple(instances)
        self._strategy, self._planner, self._clock = strategy, planner, clock
        self._max_attempts = max_attempts
        self._stopwatch_s, self._catch_up = stopwatch_s, catch_up
        self._fixed = columns_of(self.instances)
        self._index = {instance.id: i for i, instance in enumerate(self.instances)}
        self._alive = np.ones(len(self.instances), bool)
        self._returning = np.zeros(len(self.instances), bool)
        self._plans: list[ExecutionPlan | None] = [None] * len(self.instances)
        self._pace = Pace([instance.cost for instance in self.instances])
        self._memory: Memory = {}
        self._table = RequestTable(room_tokens=[_room_tokens(i) for i in self.instances])
        caches = [instance.capability.caches_prefixes for instance in self.instances]
        self._directory = Directory(self._fixed, caches, self._table)
        self._serving: dict[str, _Serving] = {}
        self._actions: list[Action] = []
        self._round = self._futile_rounds = 0
        self._now_us = clock.now_us()
        self._again_us: int | None = None
        self._timeouts: list[tuple[int, int, _Serving]] = []
        self._numbers = itertools.count()
        self._last: tuple[State, Decision] | None = None
        self._failed_on: dict[str, int] = {}  # request -> who failed it, until it runs elsewhere
        self._due = self._closed = False
        self._hear_by_type = self._hearers()

    def _hearers(self) -> dict[type, Callable[..., None]]:
        """What is done about each kind of input."""
        return {
            Arrived: self._arrived,
            CancelRequested: self._cancel_requested,
            PlanCancelRequested: self._plan_cancel_requested,
            Restarting: self._restarting,
            Joined: self._joined,
            Closed: self._no_more,
            StepReport: self._stepped,
            KVCached: self._kv_cached,
            KVExported: self._exported,
            KVImported: self._imported,
            Preempted: self._preempted,
            PlanDone: self._plan_done,
            Cancelled: self._left,
            Failed: self._failed,
        }

    def run(self) -> Generator[list[Action], Sequence[Input], None]:
        """Turns of the loop: actions out, the last of them a Wait, and events in.

        Raises LoopError where the planner, StateError where the strategy makes no sense.
        """
        while True:
            events = yield [*self._take_actions(), Wait(self._until_us())]
            self._now_us = max(self._now_us, self._clock.now_us())
            for event in events:
                self._hear_by_type[type(event)](event)
            self._end_timeouts()
            self._fail_unserved()
            if self._due or (self._again_us is not None and self._now_us >= self._again_us):
                self._ask()
            if self._closed:
                self._fail_stalled()
                if not self._serving:
                    yield self._take_actions()
                    return

    def state(self) -> State:
        """What a strategy sees now."""
        return State(
            now_us=self._now_us,
            round=self._round,
            waiting=self._table.waiting(),
            running=self._table.running(),
            instances=self._instances(),
            cached_tokens=self._table.waiting_cached_tokens(),
            memory=self._memory,
        )

    def output(self, request_id: str) -> tuple[int, ...]:
        """Tokens of a live request so far."""
        return tuple(self._output(self._serving[request_id]))

    def __contains__(self, request_id: str) -> bool:
        """Whether a request has come and not yet ended."""
        return request_id in self._serving

    def live(self) -> tuple[str, ...]:
        """Requests that have come and not yet ended."""
        return tuple(self._serving)

    def status_of(self, request_id: str) -> RequestStatus:
        """How far a live request is. Raises KeyError where it is not live."""
        serving = self._serving[request_id]
        row, table = serving.row, self._table
        waits = table.phase[row] == WAITING
        return RequestStatus(
            request_id=request_id,
            phase=_phase(int(table.phase[row]), bool(table.arriving[row])),
            instance=None if waits else self.instances[table.instance[row]].id,
            output_tokens=len(self._output(serving)),
            attempts=serving.attempts,
            preemptions=serving.preemptions,
            reason=self._last_reason(request_id) if waits else "",
        )

    def waiting_load(self) -> tuple[int, int]:
        """How many requests wait, and the tokens that they have to compute."""
        rows = np.flatnonzero(self._table.phase == WAITING)
        return len(rows), int(self._table.prompt_tokens[rows].sum())

    def kv_in_flight(self) -> list[KVHandle]:
        """KV that left an instance and has not arrived at another."""
        return [s.handle for s in list(self._serving.values()) if s.handle is not None]

    def step_bound_us(self, instance: str) -> float:
        """What the longest step of the plan at work there should take; 0 where nobody knows."""
        index = self._index[instance]
        if (plan := self._plans[index]) is None:
            return 0.0
        decode_us = float(self._pace.decode_step_us[index])
        prefill_us = float(self._pace.prefill_ns_per_token[index]) * plan.max_step_tokens / 1e3
        return max(decode_us + prefill_us, float(plan.estimates.us.max(initial=0)))

    def _last_reason(self, request_id: str) -> str:
        """What the last round said of a request that waits; "" where none has seen it."""
        if self._last is None:
            return ""
        state, decision = self._last
        rows = np.flatnonzero(state.waiting.ids == request_id)
        return str(decision.reason[rows[0]]) if len(rows) else ""

    def _instances(self) -> Instances:
        """The instances' columns; only those that change are made again."""
        used = self._table.kv_blocks_used(self._fixed.block_tokens)
        idle = np.array([plan is None for plan in self._plans], bool)
        alive = self._alive.copy()
        prefill_ns, decode_us = self._pace.prefill_ns_per_token, self._pace.decode_step_us
        for column in (used, idle, alive):
            column.flags.writeable = False
        return dataclasses.replace(
            self._fixed,
            kv_blocks_used=used,
            alive=alive,
            idle=idle,
            prefill_ns_per_token=prefill_ns,
            decode_step_us=decode_us,
        )

    def _take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions

    # Clients.

    def _arrived(self, event: Arrived) -> None:
        request = event.request
        if request.id in self._serving:
            self._actions.append(Refused(request.id, f"request {request.id!r} is being served"))
            return
        model = request.model or self.instances[0].model
        serving = _Serving(request=request, row=self._table.add(request, model))
        self._serving[request.id] = serving
        self._changed()
        if request.timeout_us is not None:
            self._note_timeout(serving, request.arrival_us + request.timeout_us)
        if detail := refusal_of(request, model, {i.model for i in self.instances}):
            self._finish(serving, FinishReason.REJECTED, detail)
        else:
            self._directory.wait(serving.row, request)

    def _cancel_requested(self, event: CancelRequested) -> None:
        serving = self._serving.get(event.request_id)
        if serving is not None:
            self._end_early(serving, FinishReason.CANCELLED)

    def _end_early(self, serving: _Serving, reason: FinishReason) -> None:
        """Let a request go that has not come to its end; it ends when its instance says so."""
        if serving.leaves_as is not None:
            return
        serving.leaves_as = reason
        if self._table.phase[serving.row] == WAITING:
            self._finish(serving, reason, _early_detail(serving))
        else:
            self._recall(serving)

    def _note_timeout(self, serving: _Serving, when_us: int) -> None:
        """Remember when a request's time is up; those that ended are forgotten in bulk."""
        if len(self._timeouts) > 2 * len(self._serving) + 64:
            self._timeouts = [entry for entry in self._timeouts if self._is_live(entry[2])]
            heapq.heapify(self._timeouts)
        heapq.heappush(self._timeouts, (when_us, next(self._numbers), serving))

    def _is_live(self, serving: _Serving) -> bool:
        return self._serving.get(serving.request.id) is serving

    def _until_us(self) -> int | None:
        """When there is something to do at the latest, though no event comes."""
        while self._timeouts and not self._is_live(self._timeouts[0][2]):
            heapq.heappop(self._timeouts)
        if not self._timeouts:
            return self._again_us
        next_us = self._timeouts[0][0]
        return next_us if self._again_us is None else min(next_us, self._again_us)

    def _end_timeouts(self) -> None:
        while self._timeouts and self._timeouts[0][0] <= self._now_us:
            serving = heapq.heappop(self._timeouts)[2]
            if self._is_live(serving):
                self._end_early(serving, FinishReason.TIMEOUT)

    def _plan_cancel_requested(self, event: PlanCancelRequested) -> None:
        for index, plan in enumerate(self._plans):
            if plan is not None and plan.plan_id == event.plan_id:
                self._plans[index] = nothing = nothing_after(plan.plan_id, plan.target_instance_id)
                self._actions.append(Submit(plan.target_instance_id, nothing, ()))

    def _no_more(self, _: Closed) -> None:
        self._closed = True
        self._due = True

    # Engines.

    def _stepped(self, report: StepReport) -> None:
        self._futile_rounds = 0
        self._pace.note(self._index[report.instance], report)
        for request_id, tokens in report.reused:
            if serving := self._on(report.instance, request_id):
                serving.reused_tokens += tokens
                self._table.progress(serving.row, tokens)
        for request_id, _, end in report.chunks:
            if serving := self._on(report.instance, request_id):
                self._table.progress(serving.row, end)
                self._directory.leave(serving.row)
        self._take_tokens(report)
        if report.advanced:
            self._count_tokens(report)
        for request_id, reason in report.finished:
            if serving := self._on(report.instance, request_id):
                self._finish(serving, reason, "")
        self._changed(only_if=bool(report.finished) and self._table.num_waiting > 0)
        plan = self._plans[self._index[report.instance]]
        if plan is not None and plan.plan_id == report.plan_id:
            self._due |= _is_ending(plan, report.step)
        self._due |= report.decided_by is DecidedBy.DEADLINE

    def _take_tokens(self, report: StepReport) -> None:
        """The step's new tokens go to their requests and out; the table is written at once.

        A request's times never go backwards, whatever its instance's clock does.
        """
        rows, computed_tokens = [], []
        first_us = report.end_us
        for request_id, index, token in report.tokens:
            serving = self._on(report.instance, request_id)
            if serving is None or (index := serving.base + index) < len(serving.output):
                continue
            if index > len(serving.output):
                self._lose(serving, index, report.instance)
                continue
            rows.append(serving.row)
            computed_tokens.append(serving.num_tokens)
            serving.output.append(token)
            time_us = max(report.end_us, serving.last_token_us or serving.admitted_us or 0)
            serving.last_token_us = time_us
            if serving.first_token_us is None:
                serving.first_token_us = first_us = time_us
            self._actions.append(Token(request_id, index, token, time_us))
        self._table.generated(rows, computed_tokens, first_us)

    def _count_tokens(self, report: StepReport) -> None:
        """The tokens of simulated steps: as many as were said, whichever they are.

        They are counted in the table alone; see `_output`.
        """
        table, first_us = self._table, report.begin_us
        first_us += (report.end_us - report.begin_us) // report.steps
        found = map(self._serving.get, [entry[0] for entry in report.advanced])
        said = [(s, entry) for s, entry in zip(found, report.advanced, strict=True) if s]
        rows = np.array([serving.row for serving, _ in said], np.int64)
        here = table.are_on(rows, self._index[report.instance])
        if not here.all():
            said = [one for one, is_here in zip(said, here.tolist(), strict=True) if is_here]
            rows = rows[here]
        index = np.array([serving.base + entry[1] for serving, entry in said], np.int64)
        if (lost := index != table.output_tokens[rows]).any():
            for at in np.flatnonzero(lost).tolist():
                self._lose(said[at][0], int(index[at]), report.instance)
            rows = rows[~lost]
        table.counted(rows, report.steps, first_us, report.end_us)

    def _output(self, serving: _Serving) -> list[int]:
        """A request's tokens so far; of those that were only counted nobody knows which."""
        counted = int(self._table.output_tokens[serving.row]) - len(serving.output)
        if counted > 0:
            serving.output += [0] * counted
            serving.last_token_us = int(self._table.last_token_us[serving.row])
            if serving.first_token_us is None:
                serving.first_token_us = int(self._table.first_token_us[serving.row])
        return serving.output

    def _lose(self, serving: _Serving, index: int, instance: str) -> None:
        """End a request of whose tokens some never came."""
        detail = (
            f"instance {instance!r} sent token {index} of {serving.request.id!r} "
            f"after token {len(self._output(serving)) - 1}; those between are lost"
        )
        self._finish(serving, FinishReason.FAILED, detail)

    def _exported(self, event: KVExported) -> None:
        handle = event.handle
        target = self._index[handle.target]
        serving = self._on(handle.source, handle.request.id)
        if serving is None:
            self._actions.append(Discard(handle))
            return
        serving.known_on = None
        leaving = self._table.phase[serving.row] == LEAVING
        if leaving and serving.recalled:  # its Cancelled is still to come
            self._actions.append(Discard(handle))
            return
        # Who was to be preempted and has left already loses that KV instead.
        if leaving or not self._alive[target]:
            self._actions.append(Discard(handle))
            self._go_on_waiting(serving)
            return
        waiting = self._table.num_waiting > 0
        self._changed(only_if=waiting or not self._imports(target, handle.request.id))
        serving.known_on, serving.handle = target, handle
        serving.ran_on.append(handle.target)
        self._drop_shadow(serving, keep=target)
        self._table.move(serving.row, target, arriving=True)
        self._table.progress(serving.row, handle.computed_tokens)
        self._actions.append(Deliver(handle.target, handle))

    def _imports(self, instance: int, request_id: str) -> bool:
        """Whether the plan at work there knows that this KV comes."""
        plan = self._plans[instance]
        return plan is not None and request_id in (
            plan.request_ids[row] for row in plan.imports.row.tolist()
        )

    def _imported(self, event: KVImported) -> None:
        self._futile_rounds = 0
        serving = self._serving.get(event.request_id)
        if serving is None or self._table.instance[serving.row] != self._index[event.instance]:
            return
        serving.handle = None
        self._table.move(serving.row, self._index[event.instance], arriving=False)

    def _preempted(self, event: Preempted) -> None:
        if serving := self._on(event.instance, event.request_id):
            serving.preemptions += 1
            self._table.preempted(serving.row)
            if event.is_forgotten:
                serving.known_on = None
            self._go_on_waiting(serving, event.kept_tokens)

    def _kv_cached(self, event: KVCached) -> None:
        self._directory.changed(self._index[event.instance], event.stored, event.evicted)

    def _plan_done(self, event: PlanDone) -> None:
        index = self._index[event.instance]
        plan = self._plans[index]
        if plan is not None and plan.plan_id == event.plan_id:
            self._plans[index] = None
            self._due |= self._is_idle_in_vain()

    def _is_idle_in_vain(self) -> bool:
        """Whether somebody waits, or is on an instance that has no plan."""
        table = self._table
        idle = np.array([plan is None for plan in self._plans]) & self._alive
        on_idle = idle[table.instance] | idle[table.decode_on]
        there = (table.phase == WAITING) | ((table.phase >= RUNNING) & on_idle)
        return bool(there.any())

    def _left(self, event: Cancelled) -> None:
        serving = self._serving.get(event.request_id)
        if serving is None or self._table.phase[serving.row] != LEAVING:
            return
        if self._table.instance[serving.row] == self._index[event.instance]:
            serving.known_on = None
            self._go_on_waiting(serving)

    def _failed(self, event: Failed) -> None:
        index = self._index[event.instance]
        if event.request_id is None:
            self._instance_failed(index, event.error)
            return
        serving = self._serving.get(event.request_id)
        if serving is None:
            return
        if self._table.phase[serving.row] == WAITING:
            if serving.known_on == index:  # it failed a plan from before it was preempted there
                serving.known_on = None
                self._go_on_waiting(serving)
        elif self._table.instance[serving.row] == index:
            serving.known_on = None
            self._try_again(serving, index, event.error)

    def _instance_failed(self, index: int, error: str) -> None:
        """Start over what was there; what it was still to be told, its successor must not hear."""
        self._alive[index] = self._returning[index] = False
        name = self.instances[index].id
        self._actions = [action for action in self._actions if not _is_for(name, action)]
        self._plans[index] = None
        self._directory.lose(index)
        self._due = True
        for serving in list(self._serving.values()):
            phase = self._table.phase[serving.row]
            if serving.known_on == index:
                serving.known_on = None
            if serving.shadow_on == index:
                serving.shadow_on = None
            if phase == WAITING:
                continue
            if self._table.instance[serving.row] == index:
                self._try_again(serving, index, f"instance {name!r}: {error}")
            elif phase == RUNNING and self._table.decode_on[serving.row] == index:
                self._recall(serving)

    def _restarting(self, event: Restarting) -> None:
        self._returning[self._index[event.instance]] = True

    def _joined(self, event: Joined) -> None:
        index = self._index[event.instance]
        self._alive[index], self._returning[index] = True, False
        self._changed()

    # Requests.

    def _on(self, instance: str, request_id: str) -> _Serving | None:
        """The request, if it is on this instance; None: what is said of it came too late."""
        serving = self._serving.get(request_id)
        if serving is None or self._table.phase[serving.row] == WAITING:
            return None
        here = self._table.instance[serving.row] == self._index[instance]
        return serving if here and serving.handle is None else None

    def _changed(self, only_if: bool = True) -> None:
        """There is something new to decide on."""
        if only_if:
            self._due, self._futile_rounds = True, 0

    def _try_again(self, serving: _Serving, index: int, error: str) -> None:
        """An instance lost the request's KV: start over with the output it has, not for ever."""
        serving.attempts += 1
        self._failed_on[serving.request.id] = index
        if serving.handle is not None:
            self._actions.append(Discard(serving.handle))
        if (target := int(self._table.decode_on[serving.row])) != self._table.instance[serving.row]:
            self._drop_shadow(serving, keep=target)
            serving.shadow_on = target
        if serving.attempts > self._max_attempts and serving.leaves_as is None:
            self._finish(serving, FinishReason.FAILED, error)
            return
        if serving.leaves_as is None:
            name = self.instances[index].id
            self._actions.append(Retried(serving.request.id, name, error, serving.attempts))
        self._go_on_waiting(serving)

    def _go_on_waiting(self, serving: _Serving, kept_tokens: int = 0) -> None:
        """kept_tokens: of the request, those whose KV its instance holds in host memory."""
        self._output(serving)
        serving.handle, serving.recalled = None, False
        self._changed()
        if serving.leaves_as is not None:
            self._finish(serving, serving.leaves_as, _early_detail(serving))
        else:
            self._table.wait(serving.row, serving.num_tokens)
            self._directory.wait(serving.row, serving.request, serving.output)
            if kept_tokens and serving.known_on is not None:
                self._directory.keep(serving.row, serving.known_on, kept_tokens)

    def _recall(self, serving: _Serving) -> None:
        """Take a request off its instance; `Cancelled` will say when it is gone."""
        self._table.leave(serving.row)
        serving.recalled = True
        for index in {int(self._table.decode_on[serving.row]), serving.known_on}:
            if index is not None:
                self._cancel_on(serving, index)

    def _drop_shadow(self, serving: _Serving, keep: int | None = None) -> None:
        """Let an instance forget what the request was before, unless its KV goes there anyway."""
        if serving.shadow_on is not None and serving.shadow_on != keep:
            self._cancel_on(serving, serving.shadow_on)
        serving.shadow_on = None

    def _cancel_on(self, serving: _Serving, index: int) -> None:
        if self._alive[index]:
            self._actions.append(Cancel(self.instances[index].id, serving.request.id))

    def _finish(self, serving: _Serving, reason: FinishReason, detail: str) -> None:
        request, output_tokens = serving.request, len(self._output(serving))
        self._drop_shadow(serving)
        if reason not in _SAID_BY_ENGINES and serving.known_on is not None:
            self._cancel_on(serving, serving.known_on)
        report = RequestReport(
            request_id=request.id,
            reason=reason,
            prompt_tokens=len(request.prompt),
            output_tokens=output_tokens,
            arrival_us=request.arrival_us,
            end_us=max(self._now_us, serving.last_token_us or 0),
            admitted_us=serving.admitted_us,
            first_token_us=serving.first_token_us,
            last_token_us=serving.last_token_us,
            attempts=serving.attempts,
            preemptions=serving.preemptions,
            instances=tuple(serving.ran_on),
            reused_tokens=serving.reused_tokens,
        )
        self._directory.forget(serving.row)
        self._table.remove(serving.row)
        del self._serving[request.id]
        self._failed_on.pop(request.id, None)
        self._actions.append(Finished(request.id, reason, detail, report))

    # Rounds.

    def _ask(self) -> None:
        """A round: the strategy decides, the planner plans, the instances get their plans."""
        is_anybody = self._table.num_waiting or self._table.num_running
        if not is_anybody or not self._alive.any():
            self._due, self._again_us = False, None
            return
        for event in self._catch_up():
            self._hear_by_type[type(event)](event)
        self._due, self._again_us = False, None
        state = self.state()
        begin_s = self._stopwatch_s()
        decision = self._strategy.decide(state)
        decided_s = self._stopwatch_s()
        check_decision(decision, state, f"strategy {self._strategy.name!r}")
        decision = elsewhere(decision, state, self._failures(state))
        self._last = state, decision
        self._memory = decision.memory
        self._reject(state, decision)
        self._again_us = decision.again_us
        if self._futile_rounds > FUTILE_ROUNDS:
            return
        plan_s = self._stopwatch_s()
        plans = tuple(self._planner.plan(state, decision))
        plan_us = 1e6 * (self._stopwatch_s() - plan_s)
        self._round += 1
        self._futile_rounds += 1
        decide_us = 1e6 * (decided_s - begin_s)
        self._actions.append(Planned(state, decision, plans, decide_us, plan_us))
        for plan in plans:
            self._submit(plan)

    def _failures(self, state: State) -> dict[int, int]:
        """The instance that failed it last, for each waiting row that one did."""
        if not self._failed_on:
            return {}
        ids = enumerate(state.waiting.ids)
        return {row: self._failed_on[name] for row, name in ids if name in self._failed_on}

    def _reject(self, state: State, decision: Decision) -> None:
        for row in decision.rejected.tolist():
            serving = self._serving[state.waiting.ids[row]]
            self._finish(serving, FinishReason.REJECTED, decision.reason[row])

    def _submit(self, plan: ExecutionPlan) -> None:
        index = self._index.get(plan.target_instance_id)
        if index is None or not self._alive[index]:
            live = [i.id for i, alive in zip(self.instances, self._alive, strict=True) if alive]
            raise LoopError(
                f"plan {plan.plan_id}: no live instance {plan.target_instance_id!r}; "
                f"there are: {', '.join(live)}"
            )
        decode_on = dict(zip(plan.exports.row.tolist(), plan.exports.peer.tolist(), strict=True))
        requests = []
        for row in np.unique(plan.chunks.row).tolist():
            serving = self._serving.get(plan.request_ids[row])
            if serving is None:
                continue
            if self._table.phase[serving.row] == WAITING:
                requests += self._place(serving, index)
            if self._table.instance[serving.row] == index:
                target = (
                    plan.peers[decode_on[row]] if row in decode_on else self.instances[index].id
                )
                self._table.decode_at(serving.row, self._index[target])
                if serving.shadow_on != self._index[target]:
                    self._drop_shadow(serving)
        for row in plan.preemptions.row.tolist():
            if serving := self._serving.get(plan.request_ids[row]):
                self._table.leave(serving.row)
        self._plans[index] = plan
        self._actions.append(Submit(plan.target_instance_id, plan, tuple(requests)))

    def _place(self, serving: _Serving, index: int) -> list[Request]:
        """Give a waiting request to an instance; the request, if the instance has to be told it."""
        self._table.run(serving.row, index, index, self._now_us)
        if serving.admitted_us is None:
            serving.admitted_us = max(self._now_us, serving.request.arrival_us)
        if self._failed_on.get(serving.request.id) != index:
            self._failed_on.pop(serving.request.id, None)
        serving.ran_on.append(self.instances[index].id)
        if serving.known_on == index:
            return []
        if serving.known_on is not None:
            self._drop_shadow(serving)
            serving.shadow_on = serving.known_on
        serving.known_on, serving.base = index, len(serving.output)
        return [self._as_sent(serving)]

    def _as_sent(self, serving: _Serving) -> Request:
        """The request with its output so far as part of the prompt, bounded by what fits."""
        request = serving.request
        limit = request.max_output_tokens
        if limit is None:
            limit = self._limit_tokens(str(self._table.model[serving.row]), len(request.prompt))
        return msgspec.structs.replace(
            request,
            prompt=(*request.prompt, *serving.output) if serving.output else request.prompt,
            resumed_tokens=request.resumed_tokens + len(serving.output),
            max_output_tokens=max(1, limit - len(serving.output)),
        )

    def _limit_tokens(self, model: str, prompt_tokens: int) -> int:
        """Output that any instance of the model can hold after a prompt of this length.

        The smallest that holds the prompt counts, so that an answer does not depend on its place.
        """
        decodes = [i for i in self.instances if i.model == model and i.role != "prefill"]
        rooms = [_room_tokens(instance) for instance in decodes]
        return min((room for room in rooms if room > prompt_tokens), default=1) - prompt_tokens

    # Ends that nobody else would see.

    def _fail_unserved(self) -> None:
        """Requests whose model has lost its last instance of a role, for good, fail now."""
        if self._alive.all():
            return
        for serving in list(self._serving.values()):
            model = str(self._table.model[serving.row])
            if self._table.phase[serving.row] != WAITING:
                continue
            for phase, other in (("prefill", "decode"), ("decode", "prefill")):
                if not self._is_served(model, other):
                    detail = f"no live instance can {phase} model {model!r}"
                    self._finish(serving, FinishReason.FAILED, detail)
                    break

    def _is_served(self, model: str, other_role: str) -> bool:
        expected = self._alive | self._returning
        return any(
            there and instance.model == model and instance.role != other_role
            for instance, there in zip(self.instances, expected.tolist(), strict=True)
        )

    def _fail_stalled(self) -> None:
        """With no plan at work and no request to come, whoever is left would wait for ever."""
        at_work = any(plan is not None for plan in self._plans)
        leaving = bool((self._table.phase == LEAVING).any())
        coming = bool(self._returning.any())
        if at_work or leaving or coming or self._due or self._again_us is not None:
            return
        for serving in list(self._serving.values()):
            detail = f"{self._strategy.name} and the planner found no place, and nothing else runs"
            self._finish(serving, FinishReason.FAILED, detail)


def refusal_of(request: Request, model: str, models: Collection[str]) -> str:
    """Why a request, which means this model, cannot be served as it asks; "" where it can."""
    if not request.prompt:
        return "an empty prompt; give one token at least"
    if (limit := request.max_output_tokens) is not None and limit < 1:
        return f"max_output_tokens {limit}: 1 or more"
    if request.timeout_us is not None and request.timeout_us < 1:
        return f"timeout_us {request.timeout_us}: 1 or more"
    if model not in models:
        return f"no model {model!r}; there are: {', '.join(sorted(models))}"
    return ""


def nothing_after(plan_id: str, instance: str) -> ExecutionPlan:
    """A plan that supersedes another and does nothing: its requests stay where they are."""
    return ExecutionPlan(
        plan_id=f"{plan_id}-cancelled",
        round=0,
        target_instance_id=instance,
        mode="hybrid",
        num_steps=0,
        max_step_tokens=1,
    )


def _phase(code: int, arriving: bool) -> RequestPhase:
    """The phase of a table row, as clients are told of it."""
    if code == RUNNING and arriving:
        return RequestPhase.ARRIVING
    return _PHASES[code]


def _is_for(instance: str, action: Action) -> bool:
    """Whether an action is a command for this instance."""
    return isinstance(action, Submit | Deliver | Cancel) and action.instance == instance


def _early_detail(serving: _Serving) -> str:
    """Why a request ended before its end, where that is not plain."""
    if serving.leaves_as is not FinishReason.TIMEOUT or serving.request.timeout_us is None:
        return ""
    seconds = serving.request.timeout_us / 1e6
    return f"not done {seconds:g} s after it came; {len(serving.output)} tokens of output"


def _is_ending(plan: ExecutionPlan, step: int) -> bool:
    """Whether the next plan should be made now, so that the instance need not wait for it."""
    return plan.num_steps > 2 * LEAD_STEPS and step + 1 >= plan.num_steps - LEAD_STEPS


def columns_of(instances: Sequence[Instance]) -> Instances:
    """What never changes of the instances, as columns; the rest at its defaults."""
    capabilities = [instance.capability for instance in instances]
    return Instances.of(
        [instance.id for instance in instances],
        role=[instance.role for instance in instances],
        model=[instance.model for instance in instances],
        engine=[instance.engine for instance in instances],
        kv_blocks=[c.kv_blocks for c in capabilities],
        block_tokens=[c.block_tokens for c in capabilities],
        max_context_tokens=[c.max_context_tokens for c in capabilities],
        pool=[instance.pool for instance in instances],
        switch_us=[instance.switch_us for instance in instances],
    )


def _room_tokens(instance: Instance) -> int:
    """Tokens of the longest context that an instance holds."""
    capability = instance.capability
    return min(capability.max_context_tokens, capability.kv_blocks * capability.block_tokens)
