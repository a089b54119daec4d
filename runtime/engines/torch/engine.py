"""The engine: plans in, one step a poll, events out."""

from collections.abc import Collection, Iterable, Sequence

from sagec.runtime.clock import WallClock
from sagec.runtime.comm import Channel, ChannelError, open_channel
from sagec.runtime.cursor import Pick, PlanCursor
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
from sagec.runtime.engines.torch.batch import Span
from sagec.runtime.engines.torch.loading import load_residents, read_options
from sagec.runtime.engines.torch.residents import Residents
from sagec.runtime.engines.torch.row import Row
from sagec.runtime.engines.torch.sampling import draw, sample
from sagec.runtime.engines.torch.transfer import check_layout, receive_kv, send_kv
from sagec.runtime.kv.prefix_cache import PrefixCache
from sagec.runtime.plan import SWAP, ExecutionPlan, PlanError, check
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.row import Refused

Message = tuple[ExecutionPlan, tuple[Request, ...]] | KVHandle | str
"""What an engine is told between two steps; a string cancels that request."""

_REMEMBERED_PLANS = 8
"""For how many plans a request that left is remembered: a plan may name it that was made before
the loop heard of its end, and that is no error."""


class TorchEngine:
    """One instance. It has no thread: `poll` computes the next step in the caller's.

    What it is told (plans, cancellations, KV) takes effect when the next poll begins, in the order
    in which it came; so a step is never changed while it runs.
    """

    def __init__(self, spec: InstanceSpec) -> None:
        options = read_options(spec)
        self._id = spec.id
        try:
            self._channel: Channel = open_channel(options.channel, spec.id)
        except ChannelError as error:
            raise EngineError(f"instance {spec.id!r}: option channel: {error}") from None
        self._residents, self._capability = load_residents(spec, options)
        self._clock = WallClock()
        self._running: PlanCursor[Row] | None = None
        self._inbox: list[Message] = []
        self._received: dict[str, KVHandle] = {}
        self._gone: dict[str, int] = {}  # request that left -> number of plans then
        self._num_plans = 0
        self._events: list[Event] = []
        self._dead = False

    @property
    def residents(self) -> Residents:
        """The requests here and their KV; to look at, not to change."""
        return self._residents

    def capability(self) -> Capability:
        """What this instance can do."""
        return self._capability

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        """Run `plan` from the next poll on; a request that is here already starts over.

        A request that cannot be served is a Failed event, and so is each request of a plan that is
        another instance's, malformed, or asks for what this engine cannot do.
        """
        self._inbox.append((plan, tuple(requests)))

    def receive(self, handle: KVHandle) -> None:
        """Take KV that was exported to this instance; it is kept until a plan names its request."""
        self._inbox.append(handle)

    def cancel(self, request_id: str) -> None:
        """Free all that the request holds, before the next step."""
        self._inbox.append(request_id)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        """Compute the next step, if there is one, and tell what happened; never waits."""
        if not self._dead:
            try:
                self._residents.rank.check()
                self._begin_boundary()
                self._run_step()
            except (RuntimeError, MemoryError) as error:  # what torch raises, out of memory too
                self._dead, self._running = True, None
                self._events.append(
                    Failed(
                        instance=self._id,
                        request_id=None,
                        error=f"{type(error).__name__}: {' '.join(str(error).split())}",
                    )
                )
        if self._residents.cache is not None:
            stored, evicted = self._residents.cache.take_changes()
            if stored or evicted:
                self._events.append(KVCached(instance=self._id, stored=stored, evicted=evicted))
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Free the KV that waits here and the segments of this side; polls do nothing then."""
        for message in self._inbox:
            if isinstance(message, KVHandle):
                self._channel.free(message.place)
        self._inbox.clear()
        for id in list(self._received):
            self._discard(id)
        self._channel.close()
        if self._residents.cache is not None:
            self._residents.cache.close()
        self._residents.rank.close()
        self._dead, self._running = True, None

    def check_integrity(self) -> None:
        """Raise AssertionError unless pool, rows and prefix cache agree, and KV has its blocks."""
        pool, rows = self._residents.pool, self._residents.rows.values()
        if self._residents.cache is None:
            pool.check_integrity()
        else:
            self._residents.cache.check_integrity([row.prefix for row in rows])
        for row in rows:
            if row.host_kv is None and pool.held(row.slot) < pool.blocks_for(row.computed):
                raise AssertionError(f"{row.id}: {row.computed} tokens in too few blocks")

    # At the boundary between two steps

    def _begin_boundary(self) -> None:
        for message in self._inbox:
            if isinstance(message, KVHandle):
                self._discard(message.request.id)
                self._received[message.request.id] = message
            elif isinstance(message, str):
                self._cancel(message)
            else:
                self._begin_plan(*message)
        self._inbox.clear()
        if self._running is not None:
            if self._received:
                self._import_waiting(self._running)
            if self._running.exports:
                self._export_ready(self._running)

    def _cancel(self, id: str) -> None:
        if row := self._residents.rows.get(id):
            self._residents.drop(row)
        self._discard(id)
        self._gone[id] = self._num_plans
        self._events.append(Cancelled(instance=self._id, request_id=id))

    def _discard(self, id: str) -> None:
        """Free the request's KV that waits here, if there is any."""
        if handle := self._received.pop(id, None):
            self._channel.free(handle.place)

    def _begin_plan(self, plan: ExecutionPlan, requests: tuple[Request, ...]) -> None:
        """Let `plan` take over from the one at work."""
        if self._running is not None:
            self._finish_plan(self._running)
            self._running = None
        self._num_plans += 1
        self._forget_gone()
        for request in requests:
            self._add(request)
        try:
            check(plan, f"plan {plan.plan_id!r}")
            _refuse_unsupported(plan, self._id, self._residents.cache)
        except PlanError as error:
            for id in plan.request_ids:
                self._fail(id, str(error))
            self._events.append(PlanDone(instance=self._id, plan_id=plan.plan_id))
            return
        self._running = PlanCursor(plan)
        self._preempt(plan)
        self._migrate(plan)
        self._forget_older(self._running)
        self._reserve(self._running)
        self._refuse_unknown(self._running)

    def _add(self, request: Request) -> None:
        """Take in a request; what was here of it, it was before it started over."""
        if row := self._residents.rows.get(request.id):
            self._residents.drop(row)
        self._discard(request.id)
        self._gone.pop(request.id, None)
        try:
            self._residents.add(request)
        except Refused as refusal:
            self._fail(request.id, str(refusal))

    def _preempt(self, plan: ExecutionPlan) -> None:
        """Free the blocks of the plan's preempted rows.

        A swapped row is told as preempted too: whoever plans its tokens again finds them computed,
        for their KV comes back when the first of them is due.
        """
        columns = (plan.preemptions.row.tolist(), plan.preemptions.how.tolist())
        for index, how in zip(*columns, strict=True):
            row = self._residents.rows.get(plan.request_ids[index])
            if row is None:
                continue
            if how == SWAP:
                self._residents.swap_out(row)
            else:
                self._residents.forget_kv(row)
            self._events.append(
                Preempted(instance=self._id, request_id=row.id, kept_tokens=row.computed)
            )

    def _migrate(self, plan: ExecutionPlan) -> None:
        """Drop and move cached blocks as the plan says, as far as they are where it thinks."""
        cache, moves = self._residents.cache, plan.migrations
        if cache is not None:
            cache.evict(plan.evictions.block_hash.tolist())
            columns = (moves.block_hash, moves.source_tier, moves.target_tier)
            cache.migrate(zip(*(column.tolist() for column in columns), strict=True))

    def _forget_older(self, running: PlanCursor[Row]) -> None:
        """Drop what requests were here before they were placed elsewhere, whence their KV comes."""
        rows = self._residents.rows
        for row in [rows[id] for id in running.imported_ids if id in rows]:
            if row.host_kv is not None or not row.started:
                self._residents.drop(row)

    def _reserve(self, running: PlanCursor[Row]) -> None:
        """Give back blocks that the plan does not reserve, then take those that it does.

        Rows hold what they find in the prefix cache before any takes the room of what is cached.
        """
        residents, computing = self._residents, running.computing_ids
        for row in residents.rows.values():
            if row.computed and not row.started and row.id not in computing:
                residents.forget_kv(row)  # what it found is whose who needs the room
            residents.release(row, running.kv_blocks.get(row.id, 0))
        rows = [residents.rows[id] for id in running.kv_blocks if id in residents.rows]
        rows = [row for row in rows if row.id in computing]
        for row in rows:
            residents.reuse(row, counted=False)
        for row in rows:
            residents.reserve(row, running.kv_blocks[row.id])

    def _refuse_unknown(self, running: PlanCursor[Row]) -> None:
        """Fail what the plan names though nobody sent the request, and nobody will send its KV."""
        places = (self._residents.rows, self._received, self._gone, running.imported_ids)
        for id in running.plan.request_ids:
            if not any(id in place for place in places):
                self._fail(id, f"plan {running.plan.plan_id!r} names it, but it never came here")

    def _forget_gone(self) -> None:
        oldest = self._num_plans - _REMEMBERED_PLANS
        for id in [id for id, when in self._gone.items() if when < oldest]:
            del self._gone[id]

    def _import_waiting(self, running: PlanCursor[Row]) -> None:
        """Take in KV, in the order of its arrival, until one finds no room."""
        for id in [id for id in self._received if id in running.kv_blocks]:
            handle = self._received[id]
            try:
                if not self._import(handle, running.kv_blocks[id]):
                    return
            except (Refused, ChannelError) as error:
                self._fail(id, str(error))
            self._discard(id)

    def _import(self, handle: KVHandle, blocks: int) -> bool:
        """Make a row of `handle`; false where its blocks are not free."""
        residents, pool = self._residents, self._residents.pool
        check_layout(handle, self._capability.kv_layout)
        if older := residents.rows.get(handle.request.id):
            residents.drop(older)
        needed = pool.blocks_for(handle.computed_tokens + 1)
        if needed > pool.num_blocks:
            raise Refused(f"its KV needs {needed} blocks; there are {pool.num_blocks}")
        row = residents.add(handle.request, handle.output)
        if not residents.grow(row, min(max(needed, blocks), pool.num_blocks)):
            residents.drop(row)
            return False
        row.computed, row.started = handle.computed_tokens, True
        try:
            receive_kv(self._channel, residents.rank, residents.filled(row), handle)
        except ChannelError:
            row.computed = 0  # what is in the blocks is nobody's KV, and not to be cached
            residents.drop(row)
            raise
        residents.store(row)
        self._gone.pop(row.id, None)
        self._events.append(
            KVImported(
                instance=self._id,
                request_id=row.id,
                source=handle.source,
                num_bytes=handle.num_bytes,
                begin_us=handle.begin_us,
                end_us=self._clock.now_us(),
            )
        )
        return True

    def _export_ready(self, running: PlanCursor[Row]) -> None:
        """Send away the rows whose first token is sampled and whose KV is whole."""
        for id, peer in running.exports.items():
            row = self._residents.rows.get(id)
            if row is not None and row.decodes:
                self._export(row, peer)

    def _export(self, row: Row, peer: str) -> None:
        begin_us = self._clock.now_us()
        residents, layout = self._residents, self._capability.kv_layout
        if not residents.make_room(row, row.computed):
            return  # swapped out, and no room to come back now
        try:
            place, num_bytes = send_kv(
                self._channel, residents.rank, residents.filled(row), row.computed, layout
            )
        except ChannelError as error:
            self._fail(row.id, str(error))
            return
        handle = KVHandle(
            request=row.request,
            source=self._id,
            target=peer,
            output=row.output,
            computed_tokens=row.computed,
            layout=layout,
            place=place,
            num_bytes=num_bytes,
            begin_us=begin_us,
        )
        self._leave(row)
        self._events.append(KVExported(handle=handle, end_us=self._clock.now_us()))

    # One step

    def _run_step(self) -> None:
        running = self._running
        if running is None:
            return
        picks = running.next_picks(self._residents)
        self._residents.missed_tokens += running.missed_tokens
        running.missed_tokens = 0
        for id, error in running.failures:
            self._fail(id, error)
        running.failures.clear()
        picks = [pick for pick in picks if pick.row.id in self._residents.rows]
        if picks:
            self._compute(running, picks)
            running.step += 1
            self._export_ready(running)
        if running.step >= running.plan.num_steps or not (picks or self._awaits(running)):
            self._tell_reused(running)
            self._finish_plan(running)
            self._running = None

    def _awaits(self, running: PlanCursor[Row]) -> bool:
        """Whether KV may still arrive that the plan goes on with."""
        here = self._residents.rows.keys() | self._received.keys() | self._gone.keys()
        return bool((running.imported_ids & running.computing_ids) - here)

    def _compute(self, running: PlanCursor[Row], picks: list[Pick[Row]]) -> None:
        begin_us = self._clock.now_us()
        chunks = tuple((p.row.id, p.begin, p.end) for p in picks if not p.is_decode)
        decodes = tuple(p.row.id for p in picks if p.is_decode)
        reused = _take_reused(pick.row for pick in picks)
        tokens, finished = self._settle(picks, self._sample(picks), running.exports)
        end_us = self._clock.now_us()
        if self._residents.cache is not None and not decodes:
            self._residents.cache.computed(sum(p.end - p.begin for p in picks), end_us - begin_us)
        self._events.append(
            StepReport(
                instance=self._id,
                plan_id=running.plan.plan_id,
                step=running.step,
                begin_us=begin_us,
                end_us=end_us,
                chunks=chunks,
                decodes=decodes,
                tokens=tuple(tokens),
                finished=tuple(finished),
                kv_blocks_used=self._residents.pool.num_held,
                reused=reused,
            )
        )

    def _tell_reused(self, running: PlanCursor[Row]) -> None:
        """Tell of rows that computed nothing, for the cache had all that the plan wants of them.

        Without this step, which took no time, whoever plans would ask for the same tokens again.
        """
        rows = self._residents.rows
        reused = _take_reused(rows[id] for id in running.plan.request_ids if id in rows)
        if reused:
            now_us = self._clock.now_us()
            self._events.append(
                StepReport(
                    instance=self._id,
                    plan_id=running.plan.plan_id,
                    step=running.step,
                    begin_us=now_us,
                    end_us=now_us,
                    kv_blocks_used=self._residents.pool.num_held,
                    reused=reused,
                )
            )

    def _sample(self, picks: list[Pick[Row]]) -> list[tuple[Row, int]]:
        """Compute the picked tokens; each row that samples, with its new token."""
        spans = [Span(p.row.slot, p.begin, p.row.tokens[p.begin : p.end], p.samples) for p in picks]
        logits, samplers = self._residents.rank.compute(spans, self._residents.pool)
        rows = [picks[span].row for span in samplers]
        if not rows:
            return []
        samplings = [row.request.sampling for row in rows]
        draws = [draw(row.draw_key, len(row.tokens)) if row.draws else 0.0 for row in rows]
        return list(zip(rows, sample(logits, samplings, draws), strict=True))

    def _settle(
        self, picks: list[Pick[Row]], sampled: list[tuple[Row, int]], leaving: Collection[str]
    ) -> tuple[list[tuple[str, int, int]], list[tuple[str, FinishReason]]]:
        """Write the step down in the rows; the tokens to report, and the requests that ended."""
        tokens: list[tuple[str, int, int]] = []
        finished: list[tuple[str, FinishReason]] = []
        for pick in picks:
            pick.row.computed, pick.row.started = pick.end, True
            if not pick.is_decode:
                self._residents.store(pick.row)
        for row, token in sampled:
            index = row.num_output
            reason = row.append(token, row.id in leaving)
            if row.num_output > index:
                tokens.append((row.id, index, token))
            if reason is not None:
                finished.append((row.id, reason))
                self._leave(row)
        return tokens, finished

    def _leave(self, row: Row) -> None:
        self._residents.drop(row)
        self._gone[row.id] = self._num_plans

    def _fail(self, id: str, error: str) -> None:
        if row := self._residents.rows.get(id):
            self._residents.drop(row)
        self._gone[id] = self._num_plans
        self._events.append(Failed(instance=self._id, request_id=id, error=error))

    def _finish_plan(self, running: PlanCursor[Row]) -> None:
        self._events.append(PlanDone(instance=self._id, plan_id=running.plan.plan_id))


def _take_reused(rows: Iterable[Row]) -> tuple[tuple[str, int], ...]:
    """The rows that began with KV of the prefix cache, each told once, and with how many tokens.

    What was told of is the row's own from now on: whoever plans relies on it.
    """
    found = []
    for row in rows:
        if row.reused:
            found.append((row.id, row.reused))
            row.reused, row.started = 0, True
    return tuple(found)


def _refuse_unsupported(plan: ExecutionPlan, instance: str, cache: PrefixCache | None) -> None:
    """Raise PlanError where the plan asks for what this engine cannot do."""
    source = f"plan {plan.plan_id!r}"
    if plan.target_instance_id != instance:
        raise PlanError(f"{source} is for {plan.target_instance_id!r}; this is {instance!r}")
    if plan.max_step_tokens < 1:
        raise PlanError(f"{source}: max_step_tokens is {plan.max_step_tokens}; 1 at least")
    wishes = plan.acceleration
    for name, table in plan.tables():
        if name in ("evictions", "migrations") and len(table) and cache is None:
            raise PlanError(f"{source}: {name}: {instance!r} has no prefix cache; it is off")
    for tier in {*plan.migrations.source_tier.tolist(), *plan.migrations.target_tier.tolist()}:
        if cache is not None and not cache.has_tier(tier):
            raise PlanError(
                f"{source}: migrations: {instance!r} has no blocks in tier {tier} (0 device, 1 "
                "host, 2 disk); options host_blocks and disk_blocks give it some"
            )
    if wishes.quantization != "none" or wishes.draft_tokens or wishes.cuda_graph:
        raise PlanError(f"{source}: acceleration: the torch engine computes plainly; ask for none")
    if wishes.kv_dtype != "auto":
        raise PlanError(f"{source}: kv_dtype {wishes.kv_dtype!r}: KV has the model's dtype; 'auto'")
