"""ExecutorAPI: plans, events and KV between a loop and real engines, in this process or others.

`serve` is a generator: it does something only while somebody asks for the next output. A consumer
that stops asking stops the service: engines in processes of their own finish the plan that they
have, at most a horizon of steps, and then wait; nothing is computed ahead of that, and of what they
say no more is kept than their sockets hold.
"""

import select
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sagec.runtime import comm
from sagec.runtime.alarms import Alarms
from sagec.runtime.clock import Clock, SteadyClock, VirtualClock, WallClock
from sagec.runtime.engines import Engine, EngineError, Event, Failed, KVHandle
from sagec.runtime.intake import Intake
from sagec.runtime.loop import (
    Action,
    Cancel,
    Deliver,
    Discard,
    Finished,
    Input,
    Instance,
    Joined,
    Loop,
    Output,
    Planned,
    Planner,
    Refused,
    Retried,
    Submit,
    Token,
    Wait,
    nothing_after,
)
from sagec.runtime.plan import ExecutionPlan, PlanError, check
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, State
from sagec.runtime.status import (
    InstanceStatus,
    PlanStatus,
    RequestPhase,
    RequestStatus,
    StatusBoard,
)
from sagec.runtime.strategies import Strategy
from sagec.runtime.supervisor import Supervisor

POLL_S = 0.001
"""How long to wait for an engine of this process that has a plan but nothing to say."""

IDLE_US = 1_000_000
"""How long to wait for word from anybody before looking whether somebody hangs."""

NOBODY_US = -(2**63)
"""Before any request comes."""

MOST_LOOKS = 2_000
"""How often instances may be asked what is new while a virtual clock stands still; where they are
asked more often, all goes in circles."""

STALL_S = 300.0
"""How long a process with a plan may say nothing before it counts as hung."""


class ExecutorError(RuntimeError):
    """A call that no engine can answer; says what there is."""


class ExecutorAPI:
    """Stands over engine instances: gives them plans, hears them all, moves KV between them.

    While `serve` runs in one thread, any other may `submit`, `cancel`, `close_intake` and ask for
    a status; all else is for the thread that serves.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        instances: Sequence[Instance] = (),
        clock: Clock | None = None,
        watch: Sequence[Callable[[Input | Action], None]] = (),
        restart: Callable[[str], Engine] | None = None,
        *,
        max_attempts: int = 3,
        max_waiting: int | None = None,
        max_waiting_tokens: int | None = None,
        stall_s: float | None = STALL_S,
    ) -> None:
        """engines: by instance id. instances: their roles; without, each does everything.

        watch: each hears all that the loop hears and says, in order, e.g. `Timeline.hear`.
        restart: makes a new engine for an instance that failed while serving, see `Supervisor`;
        without, it stays dead. max_attempts: how often a request is started over after failures.
        max_waiting, max_waiting_tokens: beyond these requests are refused, None: never. stall_s: a
        process that has a plan and says nothing for so long, and for ten times its longest step,
        is killed; None: never.
        """
        self.engines = dict(engines)
        self.clock = clock or WallClock()
        self.instances = tuple(instances) or tuple(
            Instance(id=name, role="both", engine=type(e).__name__, capability=e.capability())
            for name, e in self.engines.items()
        )
        self._watch, self._max_attempts = list(watch), max_attempts
        self._time = SteadyClock(self.clock)
        self._board = StatusBoard(self.engines)
        self._intake = Intake(max_waiting, max_waiting_tokens)
        self._opens_us: int | None = None  # when requests that have come are let in
        self._looked_at_us, self._looks = NOBODY_US, 0
        self._supervisor = Supervisor(self.engines, restart, stall_s)
        self._alarms = _alarms_of(self.engines)
        self._sharing = _shared_by(self.engines)
        self._orphaned: list[int] = []  # pids of dead engines whose KV is still to be freed
        self._loop: Loop | None = None
        self._serving = False
        if unknown := {i.id for i in self.instances} - self.engines.keys():
            raise ExecutorError(f"no engine for instance {min(unknown)!r}; {self._known()}")

    def __enter__(self) -> "ExecutorAPI":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def watch(self, watcher: Callable[[Input | Action], None]) -> None:
        """From now on this one, too, hears all that the loop hears and says."""
        self._watch.append(watcher)

    # Plans and requests by hand.

    def submit_plan(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        """Give an instance a plan, and the requests in it that it has not seen.

        Raises PlanError for a plan that does not hold together, ExecutorError where its instance
        does not exist or has failed.
        """
        check(plan, f"plan {plan.plan_id}")
        status = self.status(plan.target_instance_id)
        if status.error:
            raise ExecutorError(f"instance {status.instance!r} has failed: {status.error}")
        self._give(plan, requests)

    def deliver(self, handle: KVHandle) -> None:
        """Tell the target of a hand-over that its KV waits."""
        self._told(self.status(handle.target).instance).receive(handle)

    def cancel(self, request_id: str) -> None:
        """Stop a request, wherever it is; its blocks are freed at the next step boundary.

        Under `serve` it then ends as cancelled, also one that is still to come; a request that has
        ended, or that nobody knows, is no error.
        """
        if self._loop is not None:
            self._intake.cancel(request_id)
            return
        for name in self._board.live():
            self._told(name).cancel(request_id)

    def cancel_plan(self, plan_id: str) -> None:
        """Stop a plan at the next step boundary; its requests stay where they are.

        Under `serve` the next round plans them again. A plan that has ended is no error. Raises
        ExecutorError for one that was never given to an instance.
        """
        status = self.status_of_plan(plan_id)
        if self._loop is not None:
            self._intake.cancel_plan(plan_id)
        elif not status.ended:
            self._give(nothing_after(plan_id, status.instance), ())

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """What happened on all instances since; waits up to timeout_s for something to."""
        if self._alarms is not None:
            self._wake_concerned(self._alarms)
            due = self._alarms.due(self.clock.now_us())
            return [event for name in due for event in self._hear(name)]
        names = self._board.live() + self._supervisor.coming()
        sockets = {fd: name for name in names if (fd := self._fileno(name)) is not None}
        local = [name for name in names if name not in sockets.values()]
        events = [event for name in local for event in self._hear(name)]
        wait_s = 0.0 if events or isinstance(self.clock, VirtualClock) else max(0.0, timeout_s)
        if wait_s > POLL_S and any(map(self._is_busy, local)):
            wait_s = POLL_S
        if sockets or wait_s:
            for ready in self._select(sockets, wait_s):
                events += self._hear(sockets[ready])
        return events

    def _catch_up(self) -> list[Event]:
        """Steps that have ended in the midst of what engines will tell of at once."""
        if self._alarms is None:
            return []
        now_us = self.clock.now_us()
        names = [name for name in self._board.live() if self._owes(self.engines[name], now_us)]
        return [event for name in names for event in self._hear(name)]

    def _owes(self, engine: Any, now_us: int) -> bool:
        """Whether a step has ended of which the engine has not told."""
        ends_us: int | None = engine.owed_since_us
        return ends_us is not None and ends_us <= now_us

    def _wake_concerned(self, alarms: Alarms) -> None:
        """Ask those, too, for whom something has changed in what engines share."""
        for shared in self._sharing:
            for name in shared.take_concerned():
                alarms.wake(name)

    def _is_busy(self, name: str) -> bool:
        """Whether an engine of this process may have something to say at any time."""
        owes_events = getattr(self.engines[name], "owes_events", False)
        return owes_events or self.status(name).plan_id is not None

    # What is at what.

    def status(self, instance: str) -> InstanceStatus:
        """What an instance is at. Raises ExecutorError where there is none of this name."""
        if (status := self._board.instance(instance)) is None:
            raise ExecutorError(f"no instance {instance!r}; {self._known()}")
        return status

    def status_of_plan(self, plan_id: str) -> PlanStatus:
        """What a plan is at, also one that ended not long ago.

        Raises ExecutorError where none of this id was given to an instance.
        """
        if (status := self._board.plan(plan_id)) is None:
            at_work = ", ".join(self._board.at_work()) or "none"
            raise ExecutorError(f"no plan {plan_id!r} is known; at work: {at_work}")
        return status

    def status_of_request(self, request_id: str) -> RequestStatus:
        """What a request under `serve` is at.

        Raises ExecutorError for one that has not come yet, or has ended.
        """
        if self._loop is not None and request_id in self._loop:
            return self._loop.status_of(request_id)
        if self._intake.holds(request_id):
            return RequestStatus(request_id=request_id, phase=RequestPhase.WAITING)
        raise ExecutorError(f"no request {request_id!r} is being served")

    def check_integrity(self) -> None:
        """Let the live engines that can check their books, for tests.

        Raises AssertionError where a block is lost, or held by nobody.
        """
        for name in self._board.live():
            getattr(self.engines[name], "check_integrity", lambda: None)()

    # Serving.

    def serve(
        self,
        requests: Iterable[Request],
        strategy: Strategy,
        planner: Planner,
        until_closed: bool = False,
    ) -> Iterator[Output]:
        """Serve these requests to their ends; yields tokens and ends as they happen.

        A request comes arrival_us after the start. until_closed: goes on, and takes in what is
        submitted, until `close_intake`. While this runs, `cancel` goes through the loop. Requests
        that have not ended when the caller stops asking for outputs, and closes the generator, are
        cancelled. Raises ExecutorError where something is being served already.
        """
        if self._serving:
            raise ExecutorError("something is being served already; one `serve` at a time")
        timed = self._time, self._max_attempts, self._stopwatch_s(), self._catch_up
        loop = Loop(self.instances, strategy, planner, *timed)
        self._intake.open(requests, self._time.now_us(), loop.waiting_load, until_closed)
        self._loop = loop
        return self._serve(loop)

    def submit(self, request: Request) -> Refused | None:
        """Take a request in, as of now, into what is being served `until_closed`.

        What is taken in ends with one Finished among the outputs. What is not is returned at once,
        refused, with the reason: too much waits already, its id is in use, the intake is closed.
        """
        loop = self._loop
        is_live = loop is not None and request.id in loop
        return self._intake.submit(request, self._time.now_us(), is_live)

    def close_intake(self) -> None:
        """Take no more requests in; `serve` ends when those that came have ended."""
        self._intake.close()

    def execute(
        self,
        plans: Sequence[ExecutionPlan],
        requests: Iterable[Request],
        otherwise: Planner | None = None,
        strategy: Strategy | None = None,
    ) -> Iterator[Output]:
        """Run plans that were made offline, each instance's in their order.

        Requests that are not at their end when the plans are go on under `strategy` and
        `otherwise`, where these are given, and fail where not.
        """
        fixed = _Fixed(plans, strategy, otherwise)
        return self.serve(requests, fixed, fixed)

    def close(self) -> None:
        """Close every engine, also those that failed, and free what dead ones left."""
        for engine in self.engines.values():
            engine.close()
            if (pid := getattr(engine, "pid", None)) is not None:
                self._orphaned.append(pid)
        self._free_orphaned(())

    def _stopwatch_s(self) -> Callable[[], float]:
        """The wall's; one that stands still where time is simulated."""
        return _standing_still if isinstance(self.clock, VirtualClock) else time.perf_counter

    def _known(self) -> str:
        return f"there are: {', '.join(self.engines)}"

    def _give(self, plan: ExecutionPlan, requests: Sequence[Request]) -> None:
        self._board.give(plan)
        self._told(plan.target_instance_id).submit(plan, requests)

    def _told(self, name: str) -> Engine:
        """The engine, which is told something now."""
        if self._alarms is not None:
            self._alarms.wake(name)
        return self.engines[name]

    def _tell(self, said: Input | Action) -> None:
        for watcher in self._watch:
            watcher(said)

    # Engines.

    def _fileno(self, name: str) -> int | None:
        """What to wait for until the engine has something to say; None: it is asked at once."""
        engine: Any = self.engines[name]
        if not hasattr(engine, "fileno") or engine.has_news:
            return None
        number: int = engine.fileno()
        return number

    def _select(self, sockets: Mapping[int, str], wait_s: float) -> set[int]:
        """Sockets of engines that can be read or written; a bell of the intake ends the wait."""
        unsent = [fd for fd, n in sockets.items() if getattr(self.engines[n], "unsent", False)]
        bell = [] if self._intake.bell is None else [self._intake.bell.fileno()]
        readable, writable, _ = select.select([*sockets, *bell], unsent, (), wait_s)
        self._intake.silence()
        return {*readable, *writable}.difference(bell)

    def _hear(self, name: str) -> list[Event]:
        engine: Any = self.engines[name]
        try:
            events: list[Event] = engine.poll(0.0)
            if self._alarms is not None:
                self._alarms.set(name, engine.next_us())
        except EngineError as error:
            events = [Failed(instance=name, request_id=None, error=str(error))]
            if self._alarms is not None:
                self._alarms.set(name, None)
        for event in events:
            self._board.hear(event)
            self._tell(event)
        return events

    def _supervise(self, loop: Loop, events: Sequence[Event]) -> list[Input]:
        """Bury instances that failed and make others again; what the loop is to hear of it."""
        now_us = self._time.now_us()
        said = self._bury(events, now_us)
        next_us = self._supervisor.next_us
        revived = self._supervisor.revive(now_us)
        if next_us is not None and next_us <= now_us:  # some were made again
            for name in self._supervisor.coming():
                self._told(name)
        for event in revived:
            self._tell(event)
            said.append(event)
            if isinstance(event, Joined):
                self._told(event.instance)
                self._board.revive(event.instance)
            else:
                self._board.hear(event)
                said += self._bury([event], now_us)
        self._supervisor.end_hung(now_us, loop.step_bound_us)
        return said

    def _dead_already(self) -> list[Input]:
        """What a new loop must hear of instances that died before it was there."""
        said: list[Input] = []
        for name, engine in self.engines.items():
            error = self.status(name).error or getattr(engine, "error", "")
            if error:
                self._board.fail(name, error)
                failed = Failed(instance=name, request_id=None, error=error)
                self._tell(failed)
                said += [failed, *self._bury([failed], self._time.now_us())]
        return said

    def _bury(self, events: Sequence[Event], now_us: int) -> list[Input]:
        said: list[Input] = []
        for event in events:
            if not isinstance(event, Failed) or event.request_id is not None:
                continue
            if (pid := getattr(self.engines[event.instance], "pid", None)) is not None:
                self._orphaned.append(pid)
            if restarting := self._supervisor.bury(event.instance, now_us):
                self._tell(restarting)
                said.append(restarting)
        return said

    def _free_orphaned(self, in_flight: Iterable[KVHandle]) -> None:
        """Free KV of dead processes that nobody will receive."""
        if self._orphaned:
            keep = {handle.place for handle in in_flight}
            for pid in self._orphaned:
                comm.free_left_by(pid, keep)
            self._orphaned.clear()

    # Turns of the loop.

    def _serve(self, loop: Loop) -> Iterator[Output]:
        if self._serving or self._loop is not loop:
            raise ExecutorError("something else was served since; call `serve` again")
        self._serving = True
        turns = loop.run()
        try:
            actions = next(turns)
            if dead := self._dead_already():
                actions = turns.send(dead)
            while True:
                yield from self._perform(actions)
                wait = actions[-1] if actions else None
                if not isinstance(wait, Wait):
                    return
                inputs = self._inputs(loop, wait.until_us)
                actions = [*self._intake.take_refused(), *turns.send(inputs)]
        finally:
            turns.close()
            self._leave(loop)

    def _leave(self, loop: Loop) -> None:
        """Serving has ended, perhaps too early: nothing of it stays on an engine."""
        self._serving, self._loop = False, None
        for refused in self._intake.take_answered():
            self._tell(refused)
        self._intake.shut()
        for request_id in loop.live():
            self.cancel(request_id)
        for handle in loop.kv_in_flight():
            comm.free(handle.place)

    def _perform(self, actions: Sequence[Action]) -> Iterator[Output]:
        """Do what the loop says; what is for clients is yielded."""
        for action in actions:
            self._tell(action)
            match action:
                case Token() | Finished() | Refused():
                    yield action
                case Submit():
                    self._give(action.plan, action.requests)
                case Deliver():
                    self._told(action.instance).receive(action.handle)
                case Cancel():
                    self._told(action.instance).cancel(action.request_id)
                case Discard():
                    comm.free(action.handle.place)
                case Planned() | Retried() | Wait():
                    pass

    def _inputs(self, loop: Loop, until_us: int | None) -> list[Input]:
        """What is next: requests whose time has come, what clients said, or events of engines.

        Who came while an engine of this process computed is heard together with what it did.
        """
        self._free_orphaned(loop.kv_in_flight() if self._orphaned else ())
        while True:
            now_us = self._time.now_us()
            self._check_progress(now_us)
            is_open = self._is_open(now_us)
            inputs = self._take(now_us if is_open else NOBODY_US)
            coming_us = self._intake.next_us if is_open else self._opens_us
            known = (until_us, coming_us, self._supervisor.next_us)
            times = [us for us in known if us is not None]
            wait_us = min([*times, now_us + IDLE_US]) - now_us
            is_due = bool(inputs) or self._intake.has_refused
            events = self.poll(0.0 if is_due else wait_us / 1e6)
            inputs += [*events, *self._supervise(loop, events)]
            if inputs and not isinstance(self.clock, VirtualClock):  # engines may have computed
                inputs += self._take(self._time.now_us(), again=True)
            is_late = until_us is not None and until_us <= self._time.now_us()
            if inputs or is_late or self._intake.has_refused:
                return inputs
            self._jump(times)

    def _take(self, until_us: int, again: bool = False) -> list[Input]:
        """Requests that have come by then, and what clients said. again: in the same turn."""
        inputs = self._intake.take(until_us, again)
        for said in (*self._intake.take_answered(), *inputs):
            self._tell(said)
        return inputs

    def _is_open(self, now_us: int) -> bool:
        """Whether requests whose time has come are let in now.

        Where every engine says how long its step lasts, those that come while all of them compute
        are let in together when the first can begin something new: no round sooner than that could
        give them anything.
        """
        next_us = self._intake.next_us
        if self._alarms is None or next_us is None or next_us > now_us:
            return True
        if self._opens_us is None:
            ends_us = [engine.step_end_us(now_us) for engine in self._living()]
            begin_at_once = [now_us for end_us in ends_us if end_us is None]
            self._opens_us = min(begin_at_once or [us for us in ends_us if us is not None] or [0])
        if now_us < self._opens_us:
            return False
        self._opens_us = None
        return True

    def _living(self) -> list[Any]:
        return [self.engines[name] for name in self._board.live()]

    def _check_progress(self, now_us: int) -> None:
        """Raise ExecutorError where a virtual clock will never go on."""
        if now_us != self._looked_at_us:
            self._looked_at_us, self._looks = now_us, 0
        self._looks += 1
        if self._looks > MOST_LOOKS and isinstance(self.clock, VirtualClock):
            raise ExecutorError(
                f"the virtual clock stands at {now_us} us: what instances say makes them plan, "
                "and what they plan takes no time"
            )

    def _jump(self, times: list[int]) -> None:
        """Let a virtual clock jump to what happens next."""
        if not isinstance(self.clock, VirtualClock):
            return
        if self._alarms is not None:
            self._wake_concerned(self._alarms)
            if self._alarms.is_anyone_awake:
                return
            known = [self._alarms.next_us()]
        else:
            names = self._board.live() + self._supervisor.coming()
            known = [getattr(self.engines[name], "next_us", lambda: None)() for name in names]
        times += [us for us in known if us is not None]
        if not times:
            raise ExecutorError("no engine will ever say anything, and no request will come")
        self.clock.advance_to(min(times))


def _alarms_of(engines: Mapping[str, Engine]) -> Alarms | None:
    """Where every engine says when it has something to say; else None."""
    if all(getattr(engine, "says_when", False) for engine in engines.values()):
        return Alarms(engines)
    return None


def _shared_by(engines: Mapping[str, Engine]) -> list[Any]:
    """What several of the engines share, each once."""
    shared = [getattr(engine, "shared", None) for engine in engines.values()]
    return list({id(one): one for one in shared if one is not None}.values())


def _standing_still() -> float:
    return 0.0


class _Fixed:
    """Strategy and planner in one that only hand out what was planned offline."""

    name = "offline plans"

    def __init__(
        self,
        plans: Sequence[ExecutionPlan],
        strategy: Strategy | None,
        otherwise: Planner | None,
    ) -> None:
        if (strategy is None) != (otherwise is None):
            raise PlanError("to go on after the plans takes both a strategy and a planner")
        self._left = list(plans)
        self._strategy, self._otherwise = strategy, otherwise
        self._came: set[str] = set()

    def decide(self, state: State) -> Decision:
        if not self._left and self._strategy is not None:
            return self._strategy.decide(state)
        return Decision.admit(np.arange(len(state.waiting)), state.waiting, "planned offline")

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        """The next plan of each idle instance whose requests have all come."""
        if not self._left and self._otherwise is not None:
            return self._otherwise.plan(state, decision)
        self._came.update(state.waiting.ids.tolist(), state.running.ids.tolist())
        idle = set(state.instances.ids[state.instances.idle & state.instances.alive].tolist())
        plans = []
        for plan in list(self._left):
            if plan.target_instance_id in idle:
                idle.remove(plan.target_instance_id)
                if self._came.issuperset(plan.request_ids):
                    plans.append(plan)
                    self._left.remove(plan)
        return plans
