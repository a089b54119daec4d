"""The simulated instance: plans in; steps that take their time, and events, out."""

import time
from collections.abc import Sequence

from sagec.runtime.clock import Clock, VirtualClock
from sagec.runtime.engines import (
    Cancelled,
    Capability,
    EngineError,
    Event,
    Failed,
    InstanceSpec,
    KVCached,
    KVExported,
    KVHandle,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.engines.sim.network import Key, Network
from sagec.runtime.engines.sim.options import read_options
from sagec.runtime.engines.sim.outages import Outage
from sagec.runtime.engines.sim.residents import Residents
from sagec.runtime.engines.sim.row import Row
from sagec.runtime.engines.sim.running import Chunk, RunningPlan, Stretch
from sagec.runtime.kv.policies import PolicyError
from sagec.runtime.plan import SWAP, ExecutionPlan, PlanError
from sagec.runtime.request import FinishReason, Request

Message = tuple[ExecutionPlan, tuple[Request, ...]] | KVHandle | str


class SimEngine:
    """One instance. Steps begin and end when its clock says so; `poll` tells of those that ended.

    What it is told takes effect at the end of the step at work, as on a real engine.
    """

    says_when = True
    """Before `next_us` it has nothing to say unless it is told something, or `shared` names it."""

    def __init__(
        self,
        spec: InstanceSpec,
        clock: Clock,
        network: Network | None = None,
        outages: Sequence[Outage] = (),
        up_from_us: int = 0,
    ) -> None:
        """network: what it shares with the other instances; without, a line of its own to each.

        outages: when it fails, of which those before `up_from_us`, when it comes up, are over.
        Raises EngineError where an option is wrong.
        """
        self._id, self._clock, self.shared = spec.id, clock, network
        self._shared_changes = 0
        self._up_from_us = up_from_us
        fails_us = [o.fail_at_us for o in outages if o.instance == spec.id]
        self._fails_at_us = min((us for us in fails_us if us >= up_from_us), default=None)
        self._options = read_options(spec)
        eviction = self._options.eviction if self._options.cache else ""
        try:
            self._residents = Residents(spec.kv_blocks, spec.block_tokens, eviction)
        except PolicyError as error:
            raise EngineError(f"instance {spec.id!r}: {error}") from None
        self._kv_bytes = self._options.cost.kv_bytes_per_token
        self._running: RunningPlan | None = None
        self._stretch: Stretch | None = None
        self._inbox: list[Message] = []
        self._received: dict[str, KVHandle] = {}
        self._gone: dict[str, None] = {}
        self._events: list[Event] = []
        self._free_at_us, self._polled_us = 0, -1
        self._capability = Capability(
            kv_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            kv_layout=f"sim:{spec.block_tokens}",
            kv_bytes_per_token=round(self._kv_bytes),
            max_context_tokens=spec.kv_blocks * spec.block_tokens,
            caches_prefixes=self._options.cache,
        )

    def capability(self) -> Capability:
        return self._capability

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        self._inbox.append((plan, tuple(requests)))

    def receive(self, handle: KVHandle) -> None:
        self._inbox.append(handle)

    def cancel(self, request_id: str) -> None:
        self._inbox.append(request_id)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if not isinstance(self._clock, VirtualClock):
            self._wait(timeout_s)
        self._polled_us = now_us = self._clock.now_us()
        if self._fails_at_us is not None and now_us >= self._fails_at_us:
            return self._last_words(self._fails_at_us)
        if self.shared is not None:
            self._follow(self.shared, now_us)
        if self._inbox or not (self._is_idle or self._is_amid_step(now_us)):
            self._turn(now_us)
            stored, evicted = self._residents.take_changes()
            if stored or evicted:
                self._events.append(KVCached(instance=self._id, stored=stored, evicted=evicted))
        events, self._events = self._events, []
        return events

    @property
    def is_up(self) -> bool:
        """Whether it takes plans: one that failed does again from a time on."""
        return self._clock.now_us() >= self._up_from_us

    def next_us(self) -> int | None:
        """When something happens next, so that a virtual clock can jump there; None: nothing."""
        if not self.is_up:
            return self._up_from_us
        shared_us = None
        if self.shared is not None and self._received:
            shared_us = self.shared.next_us()
        known = (self._own_next_us(), self._fails_at_us, shared_us)
        return min((us for us in known if us is not None), default=None)

    @property
    def owed_since_us(self) -> int | None:
        """When the first step ends that it has not told of; None: it computes nothing."""
        return None if self._stretch is None else self._stretch.step_ends_us

    def step_end_us(self, now_us: int) -> int | None:
        """When the step at work ends, now or later; None: it could begin one at once."""
        return None if self._stretch is None else self._stretch.end_of_step_at(now_us)

    def _own_next_us(self) -> int | None:
        if self._stretch is not None:
            return self._stretch.ends_us[-1]
        if self._inbox:
            return self._clock.now_us()
        if self._running is None:
            return None
        # KV that is here already found no room, and finds none before something else happens
        return min((us for us in self._coming(self._running) if us > self._polled_us), default=None)

    def close(self) -> None:
        self._running = self._stretch = None
        self._inbox.clear()

    def kv_blocks_used(self) -> int:
        """Blocks that requests on this instance hold."""
        return self._residents.used_blocks

    def check_integrity(self) -> None:
        """Raise AssertionError unless all blocks are accounted for."""
        self._residents.check_integrity()

    @property
    def _is_idle(self) -> bool:
        return self._running is None and self._stretch is None

    def _is_amid_step(self, now_us: int) -> bool:
        """Whether the step at work goes on, so that there is nothing to tell."""
        return self._stretch is not None and now_us < self._stretch.step_ends_us

    def _wait(self, timeout_s: float) -> None:
        """Let the wall's time pass until the stretch at work ends, or timeout_s have gone by."""
        if self._stretch is not None and not self._events:
            left_s = (self._stretch.ends_us[-1] - self._clock.now_us()) / 1e6
            time.sleep(max(0.0, min(timeout_s, left_s)))

    # Turns

    def _last_words(self, failed_us: int) -> list[Event]:
        """What ended before it failed; raises EngineError once that is told."""
        if self._stretch is not None and (over := self._stretch.over_by(failed_us)):
            self._tell(self._stretch, over)
        self._stretch = None
        if not self._events:
            error = f"it failed at {failed_us} us, as its schedule says"
            if self.shared is not None:
                self.shared.lose(self._id, failed_us, f"instance {self._id!r}: {error}")
            raise EngineError(error)
        events, self._events = self._events, []
        return events

    def _follow(self, network: Network, now_us: int) -> None:
        """Transfers may come at other times than was thought when the stretch began, or never."""
        network.settle(now_us)
        if network.changes == self._shared_changes:
            return
        self._shared_changes = network.changes
        self._give_up_lost()
        if self._running is not None and self._stretch is not None:
            self._end_with_arrivals(self._stretch, self._running, now_us)

    def _end_with_arrivals(self, stretch: Stretch, running: RunningPlan, now_us: int) -> None:
        """KV that comes joins at the next step: the second one, where it comes while the first is
        being planned. KV that has come already and found no room waits until rows leave, with the
        stretch."""
        if arrivals := [us for us in self._coming(running) if us > now_us]:
            stretch.end_with_the_step_at(max(min(arrivals), stretch.told_until_us + 1))

    def _turn(self, now_us: int) -> None:
        """Tell of steps that ended, hear what came in and begin what is next."""
        if (stretch := self._stretch) is not None:
            if over := stretch.over_by(now_us):
                self._tell(stretch, over)
            if self._inbox:
                stretch.end_with_the_step_at(now_us)
            if not stretch.is_done:
                return
            self._stretch = None
        self._hear_inbox()
        if (running := self._running) is None:
            return
        self._import_arrived(running, now_us)
        begin_us = max(self._free_at_us, now_us)
        self._stretch = running.next_stretch(self._residents, self._options.cost, begin_us)
        if self._residents.copied:
            self._copy_first(begin_us)
        if self._stretch is not None:
            self._end_with_arrivals(self._stretch, running, now_us)
        elif running.step >= running.plan.num_steps or not self._awaits(running):
            self._finish_plan()

    def _copy_first(self, begin_us: int) -> None:
        """KV that goes to host memory, or comes back, is copied before anything is computed."""
        options, copied = self._options, self._residents.copied
        link_us = 1e6 * sum(copied) * self._kv_bytes / options.link_bytes_per_s
        copy_us = round(len(copied) * options.link_latency_us + link_us)
        copied.clear()
        self._free_at_us = begin_us + copy_us
        if self._stretch is not None:
            self._stretch.begin_later(copy_us)

    def _coming(self, running: RunningPlan) -> list[int]:
        """When KV will be here that the plan imports."""
        received = self._received
        return [self._arrival_us(received[name]) for name in running.imports if name in received]

    def _tell(self, stretch: Stretch, steps: int) -> None:
        """Report so many more steps of the stretch, and what came of them."""
        assert self._running is not None
        running, begin_us = self._running, stretch.told_until_us
        computed = stretch.chunks_of(steps)
        stretch.done += steps
        running.step = stretch.first + stretch.done
        self._free_at_us = end_us = stretch.ends_us[stretch.done - 1]
        advanced = self._advance(stretch.decodes, computed, steps)
        finished = self._finished(stretch, running)
        self._events.append(
            StepReport(
                instance=self._id,
                plan_id=running.plan.plan_id,
                step=running.step - 1,
                begin_us=begin_us,
                end_us=end_us,
                chunks=tuple([(row.request.id, begin, end) for row, begin, end in computed]),
                decodes=tuple([row.request.id for row in stretch.decodes]),
                finished=tuple(finished),
                kv_blocks_used=self._residents.used_blocks,
                steps=steps,
                advanced=tuple(advanced),
                reused=tuple(self._residents.reused),
            )
        )
        self._residents.reused.clear()
        for request_id, _ in finished:
            self._leave(request_id)
        self._export_ready(running, end_us)

    def _advance(
        self, decodes: Sequence[Row], computed: Sequence[Chunk], steps: int
    ) -> list[tuple[str, int, int]]:
        """Have the rows be so many steps further; what was sampled, as a report says it."""
        advanced = [(row.request.id, row.num_output, steps) for row in decodes]
        for row in decodes:
            row.computed += steps
            row.num_tokens += steps
        for row, _, end in computed:
            row.computed = end
            self._residents.store(row)
            if end == row.num_tokens:
                advanced.append((row.request.id, row.num_output, 1))
                row.num_tokens += 1
        return advanced

    def _finished(self, stretch: Stretch, running: RunningPlan) -> list[tuple[str, FinishReason]]:
        """Rows that have all their tokens, or no room for more and nowhere to go."""
        rows = stretch.decodes + [row for row, _, _ in stretch.chunks if row.num_output]
        room = self._residents.room_tokens
        return [
            (row.request.id, FinishReason.LENGTH)
            for row in rows
            if row.num_tokens >= row.limit
            or (row.num_tokens >= room and row.request.id not in running.exports)
        ]

    # What it was told

    def _hear_inbox(self) -> None:
        for message in self._inbox:
            if isinstance(message, KVHandle):
                self._residents.drop(message.request.id)
                self._received[message.request.id] = message
            elif isinstance(message, str):
                self._leave(message)
                self._received.pop(message, None)
                self._events.append(Cancelled(instance=self._id, request_id=message))
            else:
                self._begin(*message)
        self._inbox.clear()
        self._give_up_lost()

    def _give_up_lost(self) -> None:
        """Report requests whose KV will never come, for an instance has failed meanwhile."""
        if self.shared is None:
            return
        for request_id, handle in list(self._received.items()):
            if why := self.shared.why_lost(_key(handle)):
                del self._received[request_id]
                self.shared.forget(_key(handle))
                self._fail(request_id, f"its KV was lost: {why}")

    def _begin(self, plan: ExecutionPlan, requests: Sequence[Request]) -> None:
        """Let `plan` take over from the one at work."""
        self._finish_plan()
        for request in requests:
            self._received.pop(request.id, None)
            self._gone.pop(request.id, None)
            if error := self._residents.refusal(request):
                self._fail(request.id, error)
            else:
                self._residents.add(request)
        if plan.target_instance_id != self._id:
            raise PlanError(f"plan {plan.plan_id}: for {plan.target_instance_id!r}, not {self._id}")
        self._running = running = RunningPlan(plan)
        self._free_at_us = max(self._free_at_us, self._clock.now_us()) + self._options.round_us
        self._preempt(plan)
        for request_id in running.imports:  # what it was here before it was placed elsewhere
            self._gone.pop(request_id, None)
            row = self._residents.rows.get(request_id)
            if row is not None and (row.swapped or not row.computed):
                self._residents.drop(request_id)
        self._residents.evict(plan.evictions.block_hash.tolist())
        self._residents.keep_only(running.kv_blocks)
        known = self._residents.rows
        for request_id in [name for name in plan.request_ids if name not in known]:
            places = (self._received, self._gone, running.imports)
            if not any(request_id in place for place in places):
                self._fail(request_id, f"plan {plan.plan_id} names it, but it never came here")
        self._export_ready(running, self._clock.now_us())

    def _preempt(self, plan: ExecutionPlan) -> None:
        columns = (plan.preemptions.row.tolist(), plan.preemptions.how.tolist())
        for index, how in zip(*columns, strict=True):
            if (row := self._residents.rows.get(plan.request_ids[index])) is None:
                continue
            if how == SWAP:
                self._residents.swap_out(row)
            else:
                self._residents.let_go(row)
                row.swapped, row.computed = False, 0
            self._events.append(
                Preempted(instance=self._id, request_id=row.request.id, kept_tokens=row.computed)
            )

    def _finish_plan(self) -> None:
        if self._running is not None:
            self._events.append(PlanDone(instance=self._id, plan_id=self._running.plan.plan_id))
            self._running = None

    def _leave(self, request_id: str) -> None:
        self._residents.drop(request_id)
        self._gone[request_id] = None

    def _fail(self, request_id: str, error: str) -> None:
        self._leave(request_id)
        self._events.append(Failed(instance=self._id, request_id=request_id, error=error))

    # KV between instances

    def _export_ready(self, running: RunningPlan, now_us: int) -> None:
        """Send away the rows whose first token is sampled."""
        rows = self._residents.rows
        for request_id in [name for name in running.exports if name in rows]:
            row = rows[request_id]
            if not row.decodes or not self._residents.make_room(row, row.computed):
                continue
            handle = KVHandle(
                request=row.request,
                source=self._id,
                target=running.exports.pop(request_id),
                output=(0,) * row.num_output,
                computed_tokens=row.computed,
                layout=self._capability.kv_layout,
                place="",
                num_bytes=round(row.computed * self._kv_bytes),
                begin_us=now_us,
            )
            self._leave(request_id)
            if self.shared is not None:
                options = self._options
                line = options.link_bytes_per_s, options.link_latency_us
                self.shared.begin(_key(handle), handle.target, handle.num_bytes, *line)
            self._events.append(KVExported(handle=handle, end_us=self._arrival_us(handle)))

    def _arrival_us(self, handle: KVHandle) -> int:
        if self.shared is not None:
            arrival_us = self.shared.arrival_us(_key(handle))
            if arrival_us is not None:
                return arrival_us
        options = self._options
        us = options.link_latency_us + 1e6 * handle.num_bytes / options.link_bytes_per_s
        return handle.begin_us + round(us)

    def _import_arrived(self, running: RunningPlan, now_us: int) -> None:
        """Take in KV that has come, in the order of the plan, as far as there is room."""
        for request_id in [name for name in running.imports if name in self._received]:
            handle = self._received[request_id]
            if self._arrival_us(handle) > now_us:
                continue
            row = self._residents.add(handle.request, len(handle.output))
            tokens = handle.computed_tokens
            if not self._residents.make_room(row, tokens + 1, running.kv_blocks[request_id]):
                self._residents.drop(request_id)
                break
            row.computed = tokens
            del self._received[request_id]
            if self.shared is not None:
                self.shared.forget(_key(handle))
            self._gone.pop(request_id, None)
            self._events.append(
                KVImported(
                    instance=self._id,
                    request_id=request_id,
                    source=handle.source,
                    num_bytes=handle.num_bytes,
                    begin_us=handle.begin_us,
                    end_us=now_us,
                )
            )

    def _awaits(self, running: RunningPlan) -> bool:
        """Whether KV may still arrive that the plan goes on with."""
        return any(map(self._is_to_come, running.imports.keys() & running.computing))

    def _is_to_come(self, request_id: str) -> bool:
        """Whether KV of the request may still arrive."""
        if (handle := self._received.get(request_id)) is not None:
            return self._arrival_us(handle) > self._clock.now_us()
        return request_id not in self._residents.rows and request_id not in self._gone


def _key(handle: KVHandle) -> Key:
    """The transfer that brings the KV."""
    return handle.source, handle.request.id, handle.begin_us
