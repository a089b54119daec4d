"""The engine: plans in, to a patched TurboMind that runs by itself; its steps out, as events."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from sagec.runtime.clock import WallClock
from sagec.runtime.comm import ChannelError, open_channel
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
from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind import native_events as native
from sagec.runtime.engines.turbomind.handovers import Handovers
from sagec.runtime.engines.turbomind.native import NativeError
from sagec.runtime.engines.turbomind.opening import open_instance
from sagec.runtime.engines.turbomind.options import read_options
from sagec.runtime.engines.turbomind.plans import Running, columns, refuse_unsupported
from sagec.runtime.engines.turbomind.prefixes import Published
from sagec.runtime.engines.turbomind.reports import Settlement
from sagec.runtime.engines.turbomind.residents import Residents
from sagec.runtime.engines.turbomind.rows import Row
from sagec.runtime.engines.turbomind.sessions import Session, SessionStatus
from sagec.runtime.plan import SWAP, ExecutionPlan, PlanError, check
from sagec.runtime.request import Request
from sagec.runtime.row import Refused

_REMEMBERED_PLANS = 8
"""For how many plans a request that left is remembered: a plan may name it that was made before
the loop heard of its end, and that is no error."""

_LISTEN_S = 0.01
"""How long to wait for the event log at a time: what TurboMind refuses is not told there."""

_WHY_NOT = {
    abi.NOT_ALL_RANKS: "arrived on some ranks alone",
    abi.TOO_LONG: "is of more tokens than the request has here",
    abi.OTHER_BLOCKS: "is in blocks of another size",
    abi.OTHER_TOKENS: "is of other tokens than the request has here",
    abi.NOT_COPIED: "could not be copied to the device",
}
"""What may be said of KV that was not imported."""


class TurboMindEngine:
    """One instance. TurboMind computes on threads of its own; nothing here runs on them.

    A plan is given to the native side whole, which decides each step by it. `poll` reads what came
    of that, settles the rows, and lets sessions begin that wait for another to end.
    """

    def __init__(self, spec: InstanceSpec) -> None:
        options = read_options(spec)
        self._id = spec.id
        try:
            channel = open_channel(options.channel, spec.id)
        except ChannelError as error:
            raise EngineError(f"instance {spec.id!r}: option channel: {error}") from None
        self._opened = opened = open_instance(spec, options)
        self._native, self._residents = opened.native, opened.residents
        self._handovers = Handovers(spec.id, channel, opened.native, opened.capability.kv_layout)
        self._published = Published(spec.block_tokens)
        self._clock = WallClock()
        self._running: Running | None = None
        self._plan_ids: dict[int, str] = {}
        self._plan_numbers = itertools.count(1)
        self._gone: dict[str, int] = {}  # request that left -> number of plans then
        self._num_plans = 0
        self._events: list[Event] = []
        self._closed = False
        self._hear_by_type: dict[type, Callable[[Any], None]] = {
            native.Step: self._stepped,
            native.PlanEnded: self._plan_ended,
            native.LostKV: self._lost_kv,
            native.Erased: self._erased,
            native.Matched: self._matched,
            native.Stored: self._stored,
            native.Evicted: self._evicted,
            native.Exported: self._exported,
            native.Imported: self._imported,
            native.NotImported: self._not_imported,
        }

    @property
    def residents(self) -> Residents:
        """The requests here and their sessions; to look at, not to change."""
        return self._residents

    @property
    def owes_events(self) -> bool:
        """Whether something is still to be told though no plan is at work."""
        return self._residents.owes

    def capability(self) -> Capability:
        """What this instance can do."""
        return self._opened.capability

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        """Run `plan` from the next step on; a request that is here already starts over.

        A request that cannot be served is a Failed event, and so is each request of a plan that is
        another instance's, malformed, or asks for what this engine cannot do.
        """
        if self._closed:
            return
        self._listen(0.0)
        if self._running is not None:
            self._finish_plan(self._running)
        self._num_plans += 1
        self._forget_gone()
        for request in requests:
            self._add(request)
        try:
            check(plan, f"plan {plan.plan_id!r}")
            refuse_unsupported(plan, self._id)
            self._begin_plan(plan)
        except (PlanError, NativeError) as error:
            self._running = None
            for id in plan.request_ids:
                self._fail(id, str(error))
            self._tell(PlanDone(instance=self._id, plan_id=plan.plan_id))

    def receive(self, handle: KVHandle) -> None:
        """Take KV that was exported to this instance; it is kept until a plan names its request."""
        self._handovers.announce(handle)
        if self._closed:
            self._handovers.discard(handle.request.id)
        self._import_waiting()

    def cancel(self, request_id: str) -> None:
        """End the request's session; `Cancelled` says when TurboMind holds nothing of it."""
        if self._closed:
            return
        self._handovers.discard(request_id)
        self._gone[request_id] = self._num_plans
        gone = functools.partial(self._tell, Cancelled(instance=self._id, request_id=request_id))
        if row := self._residents.rows.get(request_id):
            self._residents.drop(row, gone)
        else:
            gone()

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """Tell what happened; waits up to timeout_s for something to."""
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            self._listen(0.0 if self._events else min(left_s, _LISTEN_S))
            self._end_plan_if_done()
            stored, evicted = self._published.take_changes()
            if stored or evicted:
                self._tell(KVCached(instance=self._id, stored=stored, evicted=evicted))
            if self._events or not left_s:
                events, self._events = self._events, []
                return events

    def close(self) -> None:
        """End all sessions and TurboMind's threads; free the KV that waits here."""
        if not self._closed:
            self._closed, self._running = True, None
            self._opened.close()
            self._handovers.close()

    def check_integrity(self) -> None:
        """Raise AssertionError unless blocks add up, and rows and sessions agree."""
        try:
            totals = self._native.block_totals()
        except NativeError:
            return  # no step yet, so that nothing has a block
        if totals.active + totals.cached + totals.free != totals.num_blocks:
            raise AssertionError(f"blocks do not add up: {totals}")
        for row in self._residents.rows.values():
            if row.can_begin and row.computed:
                raise AssertionError(f"{row.id}: {row.computed} tokens computed, without a session")

    # Plans

    def _begin_plan(self, plan: ExecutionPlan) -> None:
        """Let sessions begin and end as the plan needs it, then let it decide the steps.

        Raises NativeError where the native side refuses the plan.
        """
        running = self._running = Running(plan, next(self._plan_numbers))
        self._preempt(plan)
        self._forget_older(running)
        self._refuse_impossible(running)
        self._residents.expect_nobody()
        running.sessions = {id: self._residents.session_for(id) for id in plan.request_ids}
        for id, peer in running.exports.items():
            row = self._residents.rows.get(id)
            if row is not None and not running.has_left(row):
                self._export(row, peer)
        self._plan_ids[running.number] = plan.plan_id
        self._plan_ids.pop(running.number - _REMEMBERED_PLANS, None)
        self._import_waiting()
        self._begin_rows()
        self._native.post_plan(columns(running))

    def _add(self, request: Request) -> None:
        """Take in a request; what was here of it, it was before it started over."""
        self._handovers.discard(request.id)
        self._gone.pop(request.id, None)
        try:
            self._residents.add(request)
        except Refused as refusal:
            self._fail(request.id, str(refusal))

    def _preempt(self, plan: ExecutionPlan) -> None:
        rows = (plan.preemptions.row.tolist(), plan.preemptions.how.tolist())
        for index, how in zip(*rows, strict=True):
            if row := self._residents.rows.get(plan.request_ids[index]):
                if how != SWAP:
                    self._residents.forget_kept(row)
                told = functools.partial(self._tell_preempted, row)
                self._residents.end(row, told, keeps_kv=how == SWAP)

    def _tell_preempted(self, row: Row) -> None:
        row.arrived, row.reused = None, 0
        self._tell(Preempted(instance=self._id, request_id=row.id, kept_tokens=row.kept_tokens))

    def _forget_older(self, running: Running) -> None:
        """Drop what requests were here before they were placed elsewhere, whence their KV comes."""
        rows = self._residents.rows
        for row in [rows[id] for id in running.imported_ids if id in rows]:
            if row.can_begin:
                self._residents.drop(row)

    def _refuse_impossible(self, running: Running) -> None:
        """Fail what the plan names though nobody sent it, or whose chunks cannot be computed."""
        plan, rows = running.plan, self._residents.rows
        for id in plan.request_ids:
            if row := rows.get(id):
                if error := running.gap_of(row):
                    self._fail(id, error)
            elif not (
                id in self._gone or id in running.imported_ids or self._handovers.waits_for(id)
            ):
                self._fail(id, f"plan {plan.plan_id!r} names it, but it never came here")

    def _forget_gone(self) -> None:
        oldest = self._num_plans - _REMEMBERED_PLANS
        for id in [id for id, when in self._gone.items() if when < oldest]:
            del self._gone[id]

    def _begin_rows(self) -> None:
        """Let TurboMind have the rows that the plan computes, as far as it has not."""
        if (running := self._running) is None:
            return
        for id in running.computing_ids:
            row = self._residents.rows.get(id)
            if row is not None and row.can_begin and running.has_left(row):
                self._begin(row, running)

    def _begin(self, row: Row, running: Running, blob: memoryview | None = None) -> None:
        try:
            self._residents.begin(row, leaves=row.id in running.exports, blob=blob)
        except (NativeError, EngineError) as error:
            self._fail(row.id, str(error))

    def _import_waiting(self) -> None:
        """Begin with KV that has arrived, in the order of its arrival, where the plan names it."""
        if (running := self._running) is None:
            return
        for handle in self._handovers.waiting(running.plan.request_ids):
            try:
                blob = self._handovers.open(handle)
                row = self._residents.add(handle.request, handle.output)
                row.arrived, row.computed = handle, handle.computed_tokens
                self._gone.pop(row.id, None)
                self._begin(row, running, blob)
            except (Refused, ChannelError) as error:
                self._fail(handle.request.id, str(error))
            self._handovers.discard(handle.request.id)

    def _end_plan_if_done(self) -> None:
        running = self._running
        if running is None or self._residents.owes or self._is_exporting(running):
            return
        if not running.is_over and (self._awaits(running) or self._has_left(running)):
            return
        self._tell_reused(running)
        self._finish_plan(running)

    def _awaits(self, running: Running) -> bool:
        """Whether KV may still arrive that the plan goes on with."""
        rows, gone = self._residents.rows, self._gone
        return any(id not in rows and id not in gone for id in running.awaited_ids)

    def _is_exporting(self, running: Running) -> bool:
        """Whether a session is about to end whose KV goes to another instance.

        Its KV is told of before the step that computed the last of it.
        """
        rows = self._residents.rows
        return any(
            row is not None and row.live is not None and (row.decodes or row.kept is not None)
            for row in map(rows.get, running.exports)
        )

    def _has_left(self, running: Running) -> bool:
        """Whether somebody whom TurboMind has is still to be computed by the plan."""
        rows = self._residents.rows
        return any(
            row is not None and row.live is not None and running.has_left(row)
            for row in map(rows.get, running.computing_ids)
        )

    def _tell_reused(self, running: Running) -> None:
        """Tell of rows that computed nothing, for the cache had all that the plan wants of them.

        Without this step, which took no time, whoever plans would ask for the same tokens again.
        """
        settled, rows = Settlement(), self._residents.rows
        for id in running.plan.request_ids:
            if row := rows.get(id):
                settled.tell_reused(row)
        if settled.reused:
            now_us = self._clock.now_us()
            self._tell(
                StepReport(
                    instance=self._id,
                    plan_id=running.plan.plan_id,
                    step=running.step or 0,
                    begin_us=now_us,
                    end_us=now_us,
                    reused=tuple(settled.reused),
                )
            )

    def _finish_plan(self, running: Running) -> None:
        self._running = None
        self._tell(PlanDone(instance=self._id, plan_id=running.plan.plan_id))

    def _tell(self, event: Event) -> None:
        self._events.append(event)

    # What TurboMind did

    def _listen(self, timeout_s: float) -> None:
        """Hear all that happened, then what sessions have ended; waits for the first of it."""
        if self._closed:
            return
        ended = self._residents.take_ended()
        heard = self._native.read(0 if ended else round(1e6 * timeout_s))
        while heard:
            for event in heard:
                if hear := self._hear_by_type.get(type(event)):
                    hear(event)
            heard = self._native.read(0)
        if ended:
            for row, session in self._residents.settle_ended():
                self._session_ended(row, session)
            self._begin_rows()

    def _session_ended(self, row: Row, session: Session) -> None:
        """A session is over that nobody told to end."""
        if row.gone:
            return
        if session.status is not SessionStatus.FINISHED:
            self._fail(row.id, f"TurboMind ended it: {session.status.name}")
        elif self._running is not None and row.id in self._running.exports:
            self._send(row, self._running.exports[row.id])

    def _stepped(self, step: native.Step) -> None:
        running, residents = self._running, self._residents
        exports = running.exports if running is not None else {}
        settled, leaving = Settlement(), []
        for part in step.rows:
            if not part.begin and part.end and not part.finished:  # its first tokens
                residents.hold(part.session)
            if (row := residents.here(part.session)) is None:
                continue
            if settled.settle(row, part, exports) is not None:
                self._gone[row.id] = self._num_plans
                residents.drop(row)
            elif exports and row.id in exports and (row.kept is not None or not part.finished):
                leaving.append(row)
        if running is not None and step.plan == running.number:
            running.step = step.plan_step
        plan_id = self._plan_ids.get(step.plan, "")
        self._tell(settled.report(step, self._id, plan_id))
        for row in leaving:
            self._export(row, exports[row.id])

    def _plan_ended(self, event: native.PlanEnded) -> None:
        if self._running is not None and self._running.number == event.plan:
            self._running.is_over = True

    def _lost_kv(self, event: native.LostKV) -> None:
        """TurboMind took a row's blocks for others.

        It is forgotten, or it could begin again by a plan made before its loss was heard of, and
        who had that plan made would not take its tokens.
        """
        row = self._residents.here(event.session)
        if row is None:
            return
        row.computed = event.after
        if row.live is not None:  # otherwise it is told to end already, and that is to be told
            self._residents.drop(row)
            self._gone[row.id] = self._num_plans
            self._tell(Preempted(instance=self._id, request_id=row.id, is_forgotten=True))

    def _erased(self, event: native.Erased) -> None:
        self._residents.erase(event.session)

    def _matched(self, event: native.Matched) -> None:
        self._residents.hold(event.session)
        row = self._residents.here(event.session)
        if row is None:
            return
        row.computed = row.reused = event.tokens
        if row.arrived is not None:  # its own KV found no room, and would find none here later
            self._fail(row.id, f"KV from {row.arrived.source!r} found no room")

    def _stored(self, event: native.Stored) -> None:
        if row := self._residents.of_session(event.session):
            self._published.store(row.tokens, event.uids)

    def _evicted(self, event: native.Evicted) -> None:
        self._published.evict(event.uids)

    def _exported(self, event: native.Exported) -> None:
        if row := self._residents.here(event.session):
            row.kept = event
        else:
            self._native.forget(event.session)

    def _imported(self, event: native.Imported) -> None:
        self._residents.hold(event.session)
        row = self._residents.here(event.session)
        if row is None or row.arrived is None:
            return
        self._tell(
            KVImported(
                instance=self._id,
                request_id=row.id,
                source=row.arrived.source,
                num_bytes=row.arrived.num_bytes,
                begin_us=row.arrived.begin_us,
                end_us=event.end_us,
            )
        )
        row.arrived = None

    def _not_imported(self, event: native.NotImported) -> None:
        """Its KV is to be computed again, unless only room was wanting: that may come yet."""
        row = self._residents.here(event.session)
        if row is not None and event.why != abi.NO_ROOM:
            row.computed = 0
            if row.arrived is not None:
                self._fail(row.id, f"KV from {row.arrived.source!r} {_WHY_NOT[event.why]}")

    def _export(self, row: Row, peer: str) -> None:
        """Send the row away once its first token is sampled and its KV is whole."""
        if row.num_output and row.num_tokens - row.kept_tokens == 1:
            self._send(row, peer)
        elif row.decodes:
            self._residents.end(row, lambda: self._send(row, peer), keeps_kv=True)

    def _send(self, row: Row, peer: str) -> None:
        if row.kept is None:
            self._fail(row.id, f"its KV could not be copied to host memory, on its way to {peer!r}")
            return
        try:
            handle = self._handovers.send(row, row.kept, peer)
        except ChannelError as error:
            self._fail(row.id, str(error))
            return
        self._gone[row.id] = self._num_plans
        self._residents.drop(row)
        self._tell(KVExported(handle=handle, end_us=self._clock.now_us()))

    def _fail(self, id: str, error: str) -> None:
        if row := self._residents.rows.get(id):
            self._residents.drop(row)
        self._handovers.discard(id)
        self._gone[id] = self._num_plans
        self._tell(Failed(instance=self._id, request_id=id, error=error))
