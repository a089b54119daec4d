"""A toy engine that computes nothing and obeys plans to the letter: for tests, and to try the loop.

Its next token is a checksum of all tokens before it, so every way of serving a request (any chunks,
any batch, a hand-over, a recomputation) gives the same output, and a wrong way does not. It checks
what real engines take on trust: a gap or an overlap in a prompt, a step over its budget and KV
beyond the blocks that there are fail the request that is to blame. What a plan says is in the
prefix cache may be gone by now: then the first chunk begins earlier.

Options, all numbers as text: vocab (1000), eos (a token that ends an output; none), step_us and
token_us (what a step takes, and each of its tokens; 0), bytes_per_s (of a hand-over; no time).
And prefix_cache ("on": KV of requests that are done stays while there is room; "off").
"""

import array
import dataclasses
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sagec.runtime.clock import Clock, VirtualClock, WallClock
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
from sagec.runtime.kv import block_hashes, policies
from sagec.runtime.plan import SWAP, Chunks, Decodes, ExecutionPlan, PlanError, check
from sagec.runtime.request import FinishReason, Request

KV_BYTES_PER_TOKEN = 64

Chunk = tuple[str, int, int, int]
"""Request, begin, end, and 1 where it samples."""


def create(spec: InstanceSpec) -> "Echo":
    return Echo(spec, WallClock())


@dataclasses.dataclass
class _Row:
    """A request on this instance; its KV is the checksum of the tokens computed.

    kept_tokens, kept_checksum: KV that was swapped out to host memory.
    """

    request: Request
    output: list[int]
    computed_tokens: int = 0
    checksum: int = 0
    kv_blocks: int = 0
    kept_tokens: int = 0
    kept_checksum: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt) + len(self.output)

    @property
    def prefilled(self) -> bool:
        """Only the token sampled last has no KV, so that the row can decode."""
        return bool(self.output) and self.computed_tokens == self.num_tokens - 1

    def tokens(self, begin: int, end: int) -> tuple[int, ...]:
        """The tokens [begin, end) of prompt and output."""
        split = len(self.request.prompt)
        output = self.output[max(begin - split, 0) : max(end - split, 0)]
        return (*self.request.prompt[begin:end], *output)

    def compute(self, end: int) -> None:
        """Add the KV of the tokens up to `end`."""
        self.checksum = _checksum(self.tokens(self.computed_tokens, end), self.checksum)
        self.computed_tokens = end

    def swap_out(self) -> None:
        """Take the KV to host memory; what is there already stays."""
        if self.computed_tokens:
            self.kept_tokens, self.kept_checksum = self.computed_tokens, self.checksum
        self.computed_tokens = self.checksum = 0

    def swap_in(self) -> None:
        """Take the KV back."""
        self.computed_tokens, self.checksum = self.kept_tokens, self.kept_checksum
        self.kept_tokens = self.kept_checksum = 0

    def drop(self) -> None:
        """Forget all KV."""
        self.computed_tokens = self.checksum = self.kept_tokens = self.kept_checksum = 0


def _checksum(tokens: tuple[int, ...], before: int) -> int:
    """Of tokens that follow others, whose checksum it goes on from."""
    return zlib.crc32(array.array("q", tokens).tobytes(), before)


@dataclasses.dataclass
class _Block:
    """A block of the prefix cache: its tokens, and the checksum of all tokens up to its end.

    parent: the block before it; children: how many of those behind it are cached.
    """

    tokens: tuple[int, ...]
    checksum: int
    parent: int | None
    children: int = 0


class _PrefixCache:
    """Blocks of requests that are done, by hash; who was used longest ago goes first."""

    def __init__(self, block_tokens: int, capacity_blocks: int) -> None:
        self.blocks: dict[int, _Block] = {}
        self._block_tokens = block_tokens
        self._policy = policies.create("lru", capacity_blocks)
        self._said: frozenset[int] = frozenset()

    def store(self, row: _Row) -> None:
        """Keep the whole blocks that the row has computed."""
        size, parent, checksum = self._block_tokens, None, 0
        for begin, block_hash in enumerate(self._hashes(row, row.computed_tokens)):
            tokens = row.tokens(begin * size, (begin + 1) * size)
            checksum = _checksum(tokens, checksum)
            if block_hash in self.blocks:
                self._policy.touched(block_hash)
            else:
                self.blocks[block_hash] = _Block(tokens, checksum, parent)
                self._policy.stored(block_hash)
                if parent is not None:
                    self.blocks[parent].children += 1
            parent = block_hash

    def give(self, row: _Row, most: int) -> int:
        """Give a row the longest cached prefix of at most so many tokens; says how many."""
        size = self._block_tokens
        for begin, block_hash in enumerate(self._hashes(row, min(most, row.num_tokens - 1))):
            block = self.blocks.get(block_hash)
            if block is None or block.tokens != row.tokens(begin * size, (begin + 1) * size):
                break
            self._policy.touched(block_hash)
            row.computed_tokens, row.checksum = (begin + 1) * size, block.checksum
        return row.computed_tokens

    def shrink(self, num_blocks: int) -> None:
        """Let go of blocks until there are no more than these; the last of a prefix goes first."""
        while len(self.blocks) > num_blocks:
            gone = self._policy.victim(lambda block_hash: not self.blocks[block_hash].children)
            assert gone is not None, "the last block of a prefix may always go"
            parent = self.blocks.pop(gone).parent
            if parent is not None:
                self.blocks[parent].children -= 1
                if not self.blocks[parent].children:
                    self._policy.released(parent)

    def changes(self) -> tuple[frozenset[int], frozenset[int]]:
        """Blocks that came, and those that went, since this was asked last."""
        before, self._said = self._said, frozenset(self.blocks)
        return self._said - before, before - self._said

    def _hashes(self, row: _Row, tokens: int) -> tuple[int, ...]:
        return block_hashes(row.tokens(0, tokens), self._block_tokens, row.request.adapter)


class _Progress:
    """A plan at work: which of its steps comes next, and its columns by row."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.step = 0
        self.crowded_out: set[str] = set()
        self.reserved_blocks = dict(
            zip(plan.request_ids, plan.rows.kv_blocks.tolist(), strict=True)
        )
        self.exports = _peers(plan, plan.exports.row.tolist(), plan.exports.peer.tolist())
        self.imports = [plan.request_ids[row] for row in plan.imports.row.tolist()]
        reuses = zip(plan.reuses.row.tolist(), plan.reuses.tokens.tolist(), strict=True)
        self.reuses = {plan.request_ids[row]: tokens for row, tokens in reuses}
        self.chunks: list[list[Chunk]] = [[] for _ in range(plan.num_steps)]
        for step, row, *chunk in _tuples(plan.chunks):
            self.chunks[step].append((plan.request_ids[row], *chunk))
        self.decodes = [(plan.request_ids[row], *rest) for row, *rest in _tuples(plan.decodes)]


def _tuples(table: Chunks | Decodes) -> Iterator[Any]:
    return zip(*(getattr(table, f).tolist() for f in table.__struct_fields__), strict=True)


def _peers(plan: ExecutionPlan, rows: list[int], peers: list[int]) -> dict[str, str]:
    return {plan.request_ids[r]: plan.peers[p] for r, p in zip(rows, peers, strict=True)}


class _Refused(Exception):
    """A request that breaks a rule; the message says which."""


class Echo:
    """An instance of the toy engine; steps begin in `poll` and end when the clock says so."""

    def __init__(self, spec: InstanceSpec, clock: Clock) -> None:
        """Raises EngineError where an option is unknown or not a number."""
        self._spec, self._clock = spec, clock
        options = _options(spec)
        self._vocab = options["vocab"]
        self._eos = (options["eos"],) if "eos" in spec.options else ()
        self._step_us, self._token_us = options["step_us"], options["token_us"]
        self._bytes_per_s = options["bytes_per_s"]
        self._rows: dict[str, _Row] = {}
        self._departed: dict[str, None] = {}
        self._handles: dict[str, KVHandle] = {}
        self._progress: _Progress | None = None
        self._inbox: list[tuple[ExecutionPlan, tuple[Request, ...]] | KVHandle | str] = []
        self._ready: list[Event] = []
        self._pending: list[Event] = []
        self._free_at_us = 0
        self._cache: _PrefixCache | None = None
        if spec.options.get("prefix_cache") == "on":
            self._cache = _PrefixCache(spec.block_tokens, spec.kv_blocks)
        self._reused: list[tuple[str, int]] = []
        self._capability = Capability(
            kv_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            kv_layout="echo",
            kv_bytes_per_token=KV_BYTES_PER_TOKEN,
            max_context_tokens=spec.kv_blocks * spec.block_tokens,
            eos_tokens=self._eos,
            caches_prefixes=self._cache is not None,
        )

    def capability(self) -> Capability:
        return self._capability

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        self._inbox.append((plan, tuple(requests)))

    def receive(self, handle: KVHandle) -> None:
        self._inbox.append(handle)

    def cancel(self, request_id: str) -> None:
        self._inbox.append(request_id)

    def close(self) -> None:
        self._rows.clear()
        self._handles.clear()

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if not self._pending and not self._ready:
            self._turn()
        if self._pending and not self._ready and not isinstance(self._clock, VirtualClock):
            left_s = (self._free_at_us - self._clock.now_us()) / 1e6
            time.sleep(max(0.0, min(timeout_s, left_s)))
        if self._pending and self._clock.now_us() >= self._free_at_us:
            self._ready += self._pending
            self._pending = []
        events, self._ready = self._ready, []
        return events

    def next_us(self) -> int | None:
        """When something happens next, so that a virtual clock can jump there; None: nothing."""
        if self._pending:
            return self._free_at_us
        awaited = self._progress.imports if self._progress else ()
        arriving = (self._arrival_us(self._handles[n]) for n in awaited if n in self._handles)
        later = [us for us in arriving if us > self._clock.now_us()]
        return min(later, default=None)

    def kv_blocks_used(self) -> int:
        """Blocks that rows on this instance hold."""
        return sum(row.kv_blocks for row in self._rows.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows hold the blocks that their KV fills, and no more than
        there are, beside what the prefix cache holds of prefixes that are whole."""
        used, held = self.kv_blocks_used(), self._cache.blocks if self._cache else {}
        if used + len(held) > self._spec.kv_blocks:
            there = f"{used} blocks are in use and {len(held)} cached"
            raise AssertionError(f"{there}; there are {self._spec.kv_blocks}")
        for name, row in self._rows.items():
            if row.kv_blocks < self._blocks(row.computed_tokens):
                tokens = f"{name}: {row.computed_tokens} tokens in {row.kv_blocks} blocks"
                raise AssertionError(f"{tokens} of {self._spec.block_tokens}")
        for block in held.values():
            if block.parent is not None and block.parent not in held:
                raise AssertionError("a cached block whose prefix is not cached")

    def cached_blocks(self) -> frozenset[int]:
        """Hashes of the blocks in the prefix cache."""
        return frozenset(self._cache.blocks if self._cache else ())

    def kept_tokens(self) -> dict[str, int]:
        """Of each request that was swapped out, the tokens whose KV is in host memory."""
        return {name: row.kept_tokens for name, row in self._rows.items() if row.kept_tokens}

    def _turn(self) -> None:
        """A step boundary: hear what came in, take in KV, begin a step or end the plan."""
        for message in self._inbox:
            if isinstance(message, KVHandle):
                self._rows.pop(message.request.id, None)
                self._departed.pop(message.request.id, None)
                self._handles[message.request.id] = message
            elif isinstance(message, str):
                self._forget(message)
                self._ready.append(Cancelled(instance=self._spec.id, request_id=message))
            else:
                self._begin(*message)
        self._inbox.clear()
        if self._progress is not None:
            self._import(self._progress)
            self._step(self._progress)
        if self._cache is not None:
            self._trim(self._cache)

    def _trim(self, cache: _PrefixCache) -> None:
        """What rows do not hold is there for the cache; say what came to it and what went."""
        cache.shrink(self._spec.kv_blocks - self.kv_blocks_used())
        stored, evicted = cache.changes()
        if stored or evicted:
            said = KVCached(instance=self._spec.id, stored=tuple(stored), evicted=tuple(evicted))
            (self._pending or self._ready).append(said)

    def _retire(self, request_id: str) -> None:
        """A row is done here; its KV may be of use to others."""
        if self._cache is not None:
            self._cache.store(self._rows[request_id])
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._handles.pop(request_id, None)
        self._rows.pop(request_id, None)
        self._departed[request_id] = None

    def _fail(self, request_id: str, error: str) -> None:
        self._forget(request_id)
        self._ready.append(Failed(instance=self._spec.id, request_id=request_id, error=error))

    def _begin(self, plan: ExecutionPlan, requests: Sequence[Request]) -> None:
        if self._progress is not None:
            self._end_plan(self._progress)
        for request in requests:
            self._rows[request.id] = _Row(request, [])
            self._departed.pop(request.id, None)
        try:
            _check_plan(plan, self._spec.id)
        except PlanError as error:
            for request_id in plan.request_ids:
                self._fail(request_id, str(error))
            self._ready.append(PlanDone(instance=self._spec.id, plan_id=plan.plan_id))
            return
        self._progress = progress = _Progress(plan)
        self._preempt(plan)
        for request_id in progress.imports:  # what it was here before it was placed elsewhere
            if (row := self._rows.get(request_id)) and not row.computed_tokens:
                del self._rows[request_id]
        self._reserve(progress)
        for request_id in plan.request_ids:
            known = (self._rows, self._handles, self._departed, progress.imports)
            if not any(request_id in place for place in known):
                self._fail(
                    request_id, f"plan {plan.plan_id} names {request_id!r}, which never came"
                )
        self._ready += self._export(progress)

    def _reserve(self, progress: _Progress) -> None:
        """Rows that hold KV get the blocks that the plan reserves, others keep what they fill.

        A plan may have been made before the last steps of the one it supersedes, so that less is
        free than it assumed: then rows get less, and go on with the next plan.
        """
        for held in self._rows.values():
            held.kv_blocks = self._blocks(held.computed_tokens)
        free = self._spec.kv_blocks - self.kv_blocks_used()
        for request_id, wanted in progress.reserved_blocks.items():
            row = self._rows.get(request_id)
            if row is not None and row.computed_tokens and wanted > row.kv_blocks:
                more = min(free, wanted - row.kv_blocks)
                row.kv_blocks += more
                free -= more

    def _preempt(self, plan: ExecutionPlan) -> None:
        pairs = zip(plan.preemptions.row.tolist(), plan.preemptions.how.tolist(), strict=True)
        for request_id, how in ((plan.request_ids[row], how) for row, how in pairs):
            if row := self._rows.get(request_id):
                if how == SWAP:
                    row.swap_out()
                else:
                    row.drop()
                kept = row.kept_tokens
                said = Preempted(instance=self._spec.id, request_id=request_id, kept_tokens=kept)
                self._ready.append(said)

    def _end_plan(self, progress: _Progress) -> None:
        self._progress = None
        self._ready.append(PlanDone(instance=self._spec.id, plan_id=progress.plan.plan_id))

    def _import(self, progress: _Progress) -> None:
        """Take in KV that has arrived, in the plan's order, as far as there is room."""
        for request_id in [name for name in progress.imports if name in self._handles]:
            blocks = progress.reserved_blocks[request_id]
            if self.kv_blocks_used() + blocks > self._spec.kv_blocks:
                break
            if self._arrival_us(self._handles[request_id]) > self._clock.now_us():
                continue
            handle = self._handles.pop(request_id)
            row = _Row(handle.request, list(handle.output), kv_blocks=blocks)
            row.compute(handle.computed_tokens)
            if handle.place != _place(row):
                self._fail(request_id, f"its KV at {handle.place!r} is not that of its tokens")
                continue
            self._rows[request_id] = row
            self._ready.append(self._imported(handle))

    def _imported(self, handle: KVHandle) -> KVImported:
        return KVImported(
            instance=self._spec.id,
            request_id=handle.request.id,
            source=handle.source,
            num_bytes=handle.num_bytes,
            begin_us=handle.begin_us,
            end_us=self._clock.now_us(),
        )

    def _arrival_us(self, handle: KVHandle) -> int:
        return handle.begin_us + self._move_us(handle)

    def _move_us(self, handle: KVHandle) -> int:
        return handle.num_bytes * 1_000_000 // self._bytes_per_s if self._bytes_per_s else 0

    def _step(self, progress: _Progress) -> None:
        """Compute the next step in which there is something to do; else end, or wait for KV."""
        for step in range(progress.step, progress.plan.num_steps):
            chunks = self._chunks(progress, step)
            num_tokens = sum(end - begin for _, begin, end, _ in chunks)
            alone = chunks and not progress.plan.mixes_phases
            decodes = [] if alone else self._decodes(progress, step, num_tokens)
            if chunks or decodes:
                progress.step = step + 1
                self._compute(progress, chunks, decodes)
                return
        now_us = self._clock.now_us()
        arrived = {n for n, h in self._handles.items() if self._arrival_us(h) <= now_us}
        here = {name for name, row in self._rows.items() if row.prefilled}
        here |= self._departed.keys() | arrived
        awaited = {request_id for request_id, _, _ in progress.decodes if request_id not in here}
        if progress.step == progress.plan.num_steps or awaited.isdisjoint(progress.imports):
            self._end_plan(progress)

    def _chunks(self, progress: _Progress, step: int) -> list[Chunk]:
        """The step's chunks, less what an earlier plan has computed."""
        chunks = []
        for request_id, begin, end, samples in progress.chunks[step]:
            row = self._rows.get(request_id)
            if row is None or end <= row.computed_tokens or request_id in progress.crowded_out:
                continue
            try:
                self._check_chunk(progress, row, begin, end, bool(samples))
            except _Refused as error:
                self._fail(request_id, f"plan {progress.plan.plan_id}: {error}")
                continue
            if not self._has_room(progress, row):
                progress.crowded_out.add(request_id)
                continue
            if not row.computed_tokens:
                self._take_up(progress, row)
            if row.computed_tokens < end:
                chunks.append((request_id, row.computed_tokens, end, samples))
        return chunks

    def _take_up(self, progress: _Progress, row: _Row) -> None:
        """A row begins with the KV that is there already."""
        claimed = progress.reuses.get(row.request.id, 0)
        if row.kept_tokens:
            row.swap_in()
        elif self._cache is not None and (reused := self._cache.give(row, claimed)):
            self._reused.append((row.request.id, reused))

    def _check_chunk(
        self, progress: _Progress, row: _Row, begin: int, end: int, samples: bool
    ) -> None:
        claimed = progress.reuses.get(row.request.id, 0)
        if begin > max(row.computed_tokens, row.kept_tokens, claimed):
            raise _Refused(f"tokens [{row.computed_tokens}, {begin}) were left out")
        if end > row.num_tokens or samples != (end == row.num_tokens):
            verb = "samples" if samples else "does not sample"
            chunk = f"a chunk [{begin}, {end}) that {verb}"
            raise _Refused(f"{chunk}, of a prompt of {row.num_tokens} tokens")
        reserved = progress.reserved_blocks[row.request.id]
        if self._blocks(end) > reserved:
            raise _Refused(f"{end} tokens do not fit the {reserved} blocks it reserves")

    def _has_room(self, progress: _Progress, row: _Row) -> bool:
        """Give a row that begins its blocks, if there are so many.

        Raises no error where the plan was made too early to know what is free.
        """
        reserved = progress.reserved_blocks
        others = self.kv_blocks_used() - row.kv_blocks
        if others + reserved[row.request.id] <= self._spec.kv_blocks:
            row.kv_blocks = max(row.kv_blocks, reserved[row.request.id])
            return True
        own = sum(
            reserved[name] for name, r in self._rows.items() if r.kv_blocks and name in reserved
        )
        own += 0 if row.kv_blocks else reserved[row.request.id]
        if own > self._spec.kv_blocks:
            error = f"{own} blocks are reserved of the {self._spec.kv_blocks} there are"
            self._fail(row.request.id, f"plan {progress.plan.plan_id}: {error}")
        return False

    def _decodes(self, progress: _Progress, step: int, chunk_tokens: int) -> list[str]:
        """Rows that decode in this step, as far as the step's budget goes."""
        decodes = []
        for request_id, begin_step, until_tokens in progress.decodes:
            row = self._rows.get(request_id)
            if row is None or begin_step > step or not row.prefilled:
                continue
            if row.computed_tokens >= until_tokens:
                continue
            needed = self._blocks(row.computed_tokens + 1)
            if needed > (reserved := progress.reserved_blocks[request_id]):
                error = f"token {row.computed_tokens} is beyond the {reserved} blocks it reserves"
                self._fail(request_id, f"plan {progress.plan.plan_id}: {error}")
            elif needed <= row.kv_blocks:
                decodes.append(request_id)
        return decodes[: progress.plan.max_step_tokens - chunk_tokens]

    def _compute(
        self,
        progress: _Progress,
        chunks: list[Chunk],
        decodes: list[str],
    ) -> None:
        num_tokens = sum(end - begin for _, begin, end, _ in chunks) + len(decodes)
        begin_us = max(self._clock.now_us(), self._free_at_us)
        self._free_at_us = begin_us + self._step_us + num_tokens * self._token_us
        sampling = list(decodes)
        for request_id, _, end, samples in chunks:
            self._rows[request_id].compute(end)
            if samples:
                sampling.append(request_id)
        for request_id in decodes:
            self._rows[request_id].compute(self._rows[request_id].num_tokens)
        used = self.kv_blocks_used()
        tokens, finished = self._sample(sampling, progress.exports)
        reused, self._reused = self._reused, []
        self._pending.append(
            StepReport(
                instance=self._spec.id,
                plan_id=progress.plan.plan_id,
                step=progress.step - 1,
                begin_us=begin_us,
                end_us=self._free_at_us,
                chunks=tuple((request_id, begin, end) for request_id, begin, end, _ in chunks),
                decodes=tuple(decodes),
                tokens=tuple(tokens),
                finished=tuple(finished),
                kv_blocks_used=used,
                reused=tuple(reused),
            )
        )
        self._pending += self._export(progress)

    def _sample(
        self, request_ids: list[str], leaving: Collection[str]
    ) -> tuple[list[tuple[str, int, int]], list[tuple[str, FinishReason]]]:
        """The next token of each row, and the rows that end with it: also those that fill the
        instance, unless they leave it."""
        tokens, finished = [], []
        for request_id in request_ids:
            row = self._rows[request_id]
            token = (row.checksum * 2654435761 >> 8) % self._vocab
            if token in self._eos or token in row.request.stop_tokens:
                finished.append((request_id, FinishReason.STOP))
                self._retire(request_id)
                continue
            tokens.append((request_id, len(row.output), token))
            row.output.append(token)
            room = self._capability.max_context_tokens
            full = row.num_tokens >= room and request_id not in leaving
            if len(row.output) == row.request.max_output_tokens or full:
                finished.append((request_id, FinishReason.LENGTH))
                self._retire(request_id)
        return tokens, finished

    def _export(self, progress: _Progress) -> Iterator[Event]:
        """Hand over the rows whose first token has been sampled; they leave."""
        for request_id in [n for n in progress.exports if (r := self._rows.get(n)) and r.prefilled]:
            row = self._rows[request_id]
            handle = KVHandle(
                request=row.request,
                source=self._spec.id,
                target=progress.exports.pop(request_id),
                output=tuple(row.output),
                computed_tokens=row.computed_tokens,
                layout=self._capability.kv_layout,
                place=_place(row),
                num_bytes=row.computed_tokens * KV_BYTES_PER_TOKEN,
                begin_us=self._free_at_us,
            )
            self._retire(request_id)
            yield KVExported(handle=handle, end_us=self._arrival_us(handle))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._spec.block_tokens)


def _place(row: _Row) -> str:
    return f"echo:{row.computed_tokens}:{row.checksum:08x}"


def _options(spec: InstanceSpec) -> dict[str, int]:
    options = {"vocab": 1000, "eos": 0, "step_us": 0, "token_us": 0, "bytes_per_s": 0}
    for name, text in spec.options.items():
        if name == "prefix_cache":
            if text not in ("on", "off"):
                raise EngineError(f"instance {spec.id!r}: {name}={text!r}: on or off")
            continue
        if name not in options:
            known = ", ".join([*options, "prefix_cache"])
            raise EngineError(f"instance {spec.id!r}: echo has no option {name!r}; it has {known}")
        if not text.isdigit():
            raise EngineError(f"instance {spec.id!r}: {name}={text!r}: a whole number, 0 or more")
        options[name] = int(text)
    if not options["vocab"]:
        raise EngineError(f"instance {spec.id!r}: vocab='0': 1 or more")
    return options


def _check_plan(plan: ExecutionPlan, instance: str) -> None:
    """Raise PlanError where the plan is for another instance or breaks its own rules."""
    check(plan, f"plan {plan.plan_id}")
    if plan.target_instance_id != instance:
        raise PlanError(f"plan {plan.plan_id}: for {plan.target_instance_id!r}, not {instance!r}")
    tokens = [0] * plan.num_steps
    ends: dict[int, int] = {}
    chunks = plan.chunks
    for step, row, begin, end in zip(
        chunks.step.tolist(),
        chunks.row.tolist(),
        chunks.begin.tolist(),
        chunks.end.tolist(),
        strict=True,
    ):
        tokens[step] += end - begin
        if tokens[step] > plan.max_step_tokens:
            raise PlanError(
                f"plan {plan.plan_id}: step {step}: chunks of {tokens[step]} tokens; "
                f"max_step_tokens is {plan.max_step_tokens}"
            )
        if ends.get(row, begin) != begin:
            raise PlanError(
                f"plan {plan.plan_id}: step {step}: {plan.request_ids[row]!r} goes on at {begin} "
                f"after a chunk that ends at {ends[row]}"
            )
        ends[row] = end
