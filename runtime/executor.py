"""ExecutorAPI: plans, events and KV between a loop and real engines, in this process or others."""

import select
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from sagec.runtime import comm
from sagec.runtime.clock import Clock, VirtualClock, WallClock
from sagec.runtime.engines import Engine, EngineError, Event, Failed, KVHandle, PlanDone, StepReport
from sagec.runtime.loop import (
    Action,
    Arrived,
    Cancel,
    CancelRequested,
    Closed,
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
    Submit,
    Token,
    Wait,
)
from sagec.runtime.plan import ExecutionPlan, PlanError, check
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, State
from sagec.runtime.strategies import Strategy

POLL_S = 0.001
"""How long to wait for an engine of this process that has a plan but nothing to say."""


MAX_RESTARTS = 3
"""After these an instance that keeps failing is left alone."""


class ExecutorError(RuntimeError):
    """A call that no engine can answer; says what there is."""


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """An instance now: error is "" while it lives, plan_id None while no plan is at work."""

    instance: str
    plan_id: str | None = None
    steps: int = 0
    kv_blocks_used: int = 0
    error: str = ""


class ExecutorAPI:
    """Stands over engine instances: gives them plans, hears them all, moves KV between them."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        instances: Sequence[Instance] = (),
        clock: Clock | None = None,
        watch: Sequence[Callable[[Input | Action], None]] = (),
        restart: Callable[[str], Engine] | None = None,
    ) -> None:
        """engines: by instance id. instances: their roles; without, each does everything.

        watch: each hears all that the loop hears and says, in order, e.g. `Timeline.hear`.
        restart: makes a new engine for an instance that failed while serving, at most MAX_RESTARTS
        times each; without, it stays dead.
        """
        self.engines = dict(engines)
        self.clock = clock or WallClock()
        self.instances = tuple(instances) or tuple(
            Instance(id=name, role="both", engine=type(e).__name__, capability=e.capability())
            for name, e in self.engines.items()
        )
        self._watch, self._restart = tuple(watch), restart
        self._restarts = dict.fromkeys(self.engines, 0)
        self._status = {name: InstanceStatus(instance=name) for name in self.engines}
        self._inbox: list[Input] = []
        self._serving = False
        if unknown := {i.id for i in self.instances} - self.engines.keys():
            raise ExecutorError(f"no engine for instance {min(unknown)!r}; {self._known()}")

    def __enter__(self) -> "ExecutorAPI":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit_plan(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        """Give an instance a plan, and the requests in it that it has not seen.

        Raises PlanError for a plan that does not hold together, ExecutorError where its instance
        does not exist or has failed.
        """
        check(plan, f"plan {plan.plan_id}")
        status = self.status(plan.target_instance_id)
        if status.error:
            raise ExecutorError(f"instance {status.instance!r} has failed: {status.error}")
        self._update(status.instance, plan_id=plan.plan_id)
        self.engines[status.instance].submit(plan, requests)

    def cancel(self, request_id: str) -> None:
        """Stop a request, wherever it is; its blocks are freed at the next step boundary."""
        if self._serving:
            self._inbox.append(CancelRequested(request_id))
            return
        for name in self._live():
            self.engines[name].cancel(request_id)

    def status(self, instance: str) -> InstanceStatus:
        """What an instance is at. Raises ExecutorError where there is none of this name."""
        if instance not in self._status:
            raise ExecutorError(f"no instance {instance!r}; {self._known()}")
        return self._status[instance]

    def deliver(self, handle: KVHandle) -> None:
        """Tell the target of a hand-over that its KV waits."""
        self.engines[self.status(handle.target).instance].receive(handle)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """What happened on all instances since; waits up to timeout_s for something to."""
        local = [name for name in self._live() if not hasattr(self.engines[name], "fileno")]
        remote = [name for name in self._live() if hasattr(self.engines[name], "fileno")]
        events = [event for name in local for event in self._hear(name, 0.0)]
        busy = any(self._status[name].plan_id is not None for name in local)
        if busy and not isinstance(self.clock, VirtualClock):
            timeout_s = min(timeout_s, POLL_S)
        wait_s = 0.0 if events or isinstance(self.clock, VirtualClock) else max(0.0, timeout_s)
        if remote or wait_s:
            sockets = {self._fileno(name): name for name in remote}
            unsent = [
                fd for fd, name in sockets.items() if getattr(self.engines[name], "unsent", 0)
            ]
            readable, writable, _ = select.select(list(sockets), unsent, (), wait_s)
            for ready in {*readable, *writable}:
                events += self._hear(sockets[ready], 0.0)
        return events

    def serve(
        self,
        requests: Iterable[Request],
        strategy: Strategy,
        planner: Planner,
    ) -> Iterator[Output]:
        """Serve these requests to their ends; yields tokens and ends as they happen.

        A request comes arrival_us after the start. While this runs, `cancel` goes through the loop.
        """
        loop = Loop(self.instances, strategy, planner, self.clock)
        begin_us = self.clock.now_us()
        arrivals = [
            msgspec.structs.replace(request, arrival_us=begin_us + request.arrival_us)
            for request in requests
        ]
        arrivals = sorted(arrivals, key=lambda request: request.arrival_us)[::-1]
        turns = loop.run()
        actions = next(turns)
        if not arrivals:
            self._inbox.append(Closed())
        self._serving = True
        try:
            while True:
                yield from self._perform(actions)
                wait = actions[-1] if actions else None
                if not isinstance(wait, Wait):
                    return
                actions = turns.send(self._inputs(arrivals, wait.until_us))
        finally:
            self._serving = False
            turns.close()

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
        """Close every engine, also those that failed."""
        for engine in self.engines.values():
            engine.close()

    def _known(self) -> str:
        return f"there are: {', '.join(self.engines)}"

    def _live(self) -> list[str]:
        return [name for name, status in self._status.items() if not status.error]

    def _fileno(self, name: str) -> int:
        engine: Any = self.engines[name]
        number: int = engine.fileno()
        return number

    def _update(self, instance: str, **changes: Any) -> None:
        self._status[instance] = msgspec.structs.replace(self._status[instance], **changes)

    def _hear(self, name: str, timeout_s: float) -> list[Event]:
        try:
            events = self.engines[name].poll(timeout_s)
        except EngineError as error:
            events = [Failed(instance=name, request_id=None, error=str(error))]
        for event in events:
            self._note(name, event)
            self._tell(event)
        return events

    def _tell(self, said: Input | Action) -> None:
        for watcher in self._watch:
            watcher(said)

    def _note(self, name: str, event: Event) -> None:
        status = self._status[name]
        if isinstance(event, StepReport):
            self._update(name, steps=status.steps + 1, kv_blocks_used=event.kv_blocks_used)
        elif isinstance(event, PlanDone) and event.plan_id == status.plan_id:
            self._update(name, plan_id=None)
        elif isinstance(event, Failed) and event.request_id is None:
            self._update(name, plan_id=None, error=event.error)

    def _perform(self, actions: Sequence[Action]) -> Iterator[Output]:
        """Do what the loop says; what is for clients is yielded."""
        for action in actions:
            self._tell(action)
            match action:
                case Token() | Finished() | Refused():
                    yield action
                case Submit():
                    self._update(action.instance, plan_id=action.plan.plan_id)
                    self.engines[action.instance].submit(action.plan, action.requests)
                case Deliver():
                    self.engines[action.instance].receive(action.handle)
                case Cancel():
                    self.engines[action.instance].cancel(action.request_id)
                case Discard():
                    _free(action.handle)
                case Planned() | Wait():
                    pass

    def _inputs(self, arrivals: list[Request], until_us: int | None) -> list[Input]:
        """What is next: requests whose time has come, what clients said, or events of engines."""
        while True:
            inputs = self._take_inbox()
            now_us = self.clock.now_us()
            while arrivals and arrivals[-1].arrival_us <= now_us:
                inputs.append(Arrived(arrivals.pop()))
                if not arrivals:
                    inputs.append(Closed())
            for said in inputs:
                self._tell(said)
            times = [us for us in (until_us, arrivals[-1].arrival_us if arrivals else None) if us]
            wait_us = min(times, default=now_us + 1_000_000) - now_us
            events = self.poll(0.0 if inputs else wait_us / 1e6)
            inputs += [*events, *self._restarted(events)]
            if inputs or (until_us is not None and until_us <= self.clock.now_us()):
                return inputs
            self._jump(times)

    def _restarted(self, events: Sequence[Event]) -> Iterator[Joined]:
        """Make new engines for instances that failed just now."""
        for event in events:
            if not isinstance(event, Failed) or event.request_id is not None:
                continue
            name = event.instance
            if self._restart is None or self._restarts[name] == MAX_RESTARTS:
                continue
            self._restarts[name] += 1
            self.engines[name].close()
            try:
                self.engines[name] = self._restart(name)
            except EngineError as error:
                self._update(name, error=str(error))
            else:
                self._update(name, error="")
                self._tell(joined := Joined(name))
                yield joined

    def _take_inbox(self) -> list[Input]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def _jump(self, times: list[int]) -> None:
        """Let a virtual clock jump to what happens next."""
        if not isinstance(self.clock, VirtualClock):
            return
        for name in self._live():
            next_us = getattr(self.engines[name], "next_us", lambda: None)()
            if next_us is not None:
                times.append(next_us)
        if not times:
            raise ExecutorError("no engine will ever say anything, and no request will come")
        self.clock.advance_to(min(times))


def _free(handle: KVHandle) -> None:
    """Free KV that nobody will receive; the place tells its channel."""
    for name in comm.known():
        comm.open_channel(name, "executor").free(handle.place)


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
