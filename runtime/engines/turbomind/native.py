"""libsagec_turbomind.so: the patch of this process, and the instances under it.

Calls let other Python threads run; nothing here is called back from the engine's threads, but for
an eviction callback that somebody registers.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.native_events import NativeEvent, events

Column = npt.NDArray[np.int64]
Bytes = bytes | bytearray | memoryview

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce")
"""Names of the collectives that are counted, in the order of the ABI."""

BLOCK = np.dtype([(field[0], np.dtype(field[1])) for field in abi.Block._fields_])
"""A block: uid (0: it is free), timestamp, id, use_count (0 and a uid: cached), data."""

_FIRST_WORDS = 1 << 16
"""int64s that the buffer for events holds to begin with."""


class NativeError(RuntimeError):
    """The native side refuses; says what and why."""


class PlanColumns(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of an ExecutionPlan for one instance: see sagec_tm_plan.

    plan grows from one to the next. sessions is uint64, all else int64; a table's columns are of
    one length.
    """

    plan: int
    num_steps: int
    max_step_tokens: int
    mixes_phases: bool
    sessions: npt.NDArray[np.uint64]
    prompt_tokens: Column
    reused_tokens: Column
    chunk_step: Column
    chunk_row: Column
    chunk_begin: Column
    chunk_end: Column
    decode_row: Column
    decode_begin_step: Column
    decode_until_tokens: Column


_TABLES: dict[str, tuple[str, ...]] = {
    "num_rows": ("sessions", "prompt_tokens", "reused_tokens"),
    "num_chunks": ("chunk_step", "chunk_row", "chunk_begin", "chunk_end"),
    "num_decodes": ("decode_row", "decode_begin_step", "decode_until_tokens"),
}
"""The columns of a plan's tables, which are of one length, by the field that tells it."""


class Row(NamedTuple):
    """A session that could compute in a step: context are its tokens, computed those with KV.

    priority: stock's, lower is first. status: 0 cached, 1 locked, 2 active.
    """

    session: int
    priority: int
    context: int
    computed: int
    status: int


class Question(NamedTuple):
    """A step that waits for an answer. budget_tokens: the most that the engine takes."""

    step: int
    free_blocks: int
    cached_blocks: int
    budget_tokens: int
    rows: tuple[Row, ...]


class Move(NamedTuple):
    """A session's KV to be moved: to host memory, or with a blob of this layout, to the device."""

    session: int
    blob: Bytes | None = None
    layout: int = 0


class BlockTotals(NamedTuple):
    """The blocks of a rank: bytes and tokens of each; how many there are, and of each kind."""

    block_bytes: int
    block_tokens: int
    num_blocks: int
    active: int
    cached: int
    free: int


class Native:
    """The library at `path`, which is built for the TurboMind that this process has loaded.

    Raises NativeError where it does not load or is of another version.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.library = abi.load(str(path))
        except (OSError, AttributeError) as error:
            raise NativeError(f"{path} does not load: {error}") from None
        if (version := self.library.sagec_tm_abi()) != abi.ABI:
            raise NativeError(f"{path} is of ABI {version}; wanted is {abi.ABI}")

    def seams(self) -> None:
        """Raise NativeError unless every function to be hooked is exported and called by PLT."""
        _check(self.library.sagec_tm_seams())

    def selftest(self) -> None:
        """Raise NativeError unless TurboMind's objects are laid out as the patches believe."""
        _check(self.library.sagec_tm_selftest())

    def apply(self) -> None:
        """Patch every slot or, with a NativeError, none; twice is once."""
        _check(self.library.sagec_tm_apply())

    def revert(self) -> None:
        """Put every slot back. Raises NativeError while an instance is open."""
        _check(self.library.sagec_tm_revert())

    def num_slots(self) -> int:
        """Slots that are patched now."""
        return int(self.library.sagec_tm_num_slots())

    def open(
        self,
        instance: int,
        *,
        decider: int,
        strict: bool = True,
        guard: bool = True,
        num_ranks: int = 1,
        deadline_us: int = 1_000_000,
        log_capacity: int = 0,
    ) -> "NativeInstance":
        """The instance of this number, 1 to 65535. decider: abi.STOCK, PLANS or ANSWERS.

        strict: nobody computes whom a decision does not name. guard: the prefix cache publishes
        computed blocks alone. deadline_us: without a decision for so long, stock takes the step.
        log_capacity: int64s of the event log to begin with, 0 for the default.

        Raises NativeError where the number is out of range or taken.
        """
        options = abi.Options(decider, strict, guard, num_ranks, deadline_us, log_capacity)
        _check(self.library.sagec_tm_open(instance, options))
        return NativeInstance(self.library, instance)

    def layout(self, seed: int, block_bytes: int, block_tokens: int, num_ranks: int) -> int:
        """Fingerprint of KV blobs; `seed`: the caller's hash of all else that must agree."""
        return int(self.library.sagec_tm_layout(seed, block_bytes, block_tokens, num_ranks))

    def crc32c(self, blob: Bytes, by_table: bool = False) -> int:
        """The checksum of blobs; by_table: without the processor's instruction for it."""
        words = np.frombuffer(blob, np.uint8)
        return int(self.library.sagec_tm_crc32c(words.ctypes.data, len(words), by_table))

    def collectives(self) -> dict[str, dict[str, int]]:
        """Calls, bytes and times of each collective of this process, by COLLECTIVES."""
        counted = (abi.Collective * abi.NUM_COLLECTIVES)()
        self.library.sagec_tm_collectives(counted)
        return dict(zip(COLLECTIVES, map(_fields_of, counted), strict=True))

    def time_collectives(self, every: int) -> None:
        """Time one call in `every` between events on its stream; 0: none, as it begins."""
        self.library.sagec_tm_time_collectives(every)


class NativeInstance:
    """An open instance. Any thread may call; one alone reads events, for they share a buffer."""

    def __init__(self, library: Any, number: int) -> None:
        self.number = number
        self._library = library
        self._words = np.empty(_FIRST_WORDS, np.int64)
        self._rows = (abi.Row * 64)()
        self._callback: Any = None

    def close(self) -> None:
        """Its sessions become TurboMind's own; whoever waits is woken."""
        self._library.sagec_tm_close(self.number)

    def wake(self) -> None:
        """A step on hold looks again, e.g. at the engine's queue."""
        self._library.sagec_tm_wake(self.number)

    def post_plan(self, plan: PlanColumns) -> None:
        """Decide the next steps by this plan, from the next one on. Its columns are copied.

        Raises NativeError for a plan that the native side refuses, ValueError where the columns of
        a table differ in length.
        """
        posted = abi.Plan(plan.plan, plan.num_steps, plan.max_step_tokens, plan.mixes_phases)
        kept = []  # the arrays that `posted` points to
        for length, names in _TABLES.items():
            arrays = [_array(plan, name) for name in names]
            if len({len(array) for array in arrays}) > 1:
                raise ValueError(f"columns of one table differ in length: {', '.join(names)}")
            setattr(posted, length, len(arrays[0]))
            for name, array in zip(names, arrays, strict=True):
                setattr(posted, name, array.ctypes.data)
            kept += arrays
        _check(self._library.sagec_tm_post_plan(self.number, posted))

    def wait_question(self, timeout_us: int) -> Question | None:
        """The step that waits for an answer; None after timeout_us, or when closed."""
        question = abi.Question()
        while True:
            capacity = len(self._rows)
            if not self._library.sagec_tm_wait_question(
                self.number, timeout_us, question, self._rows, capacity
            ):
                return None
            if question.num_rows <= capacity:
                break
            self._rows = (abi.Row * (2 * question.num_rows))()
        rows = (self._rows[index] for index in range(question.num_rows))
        return Question(
            question.step,
            question.free_blocks,
            question.cached_blocks,
            question.budget_tokens,
            tuple(Row(r.session, r.priority, r.context, r.computed, r.status) for r in rows),
        )

    def answer(self, step: int, items: Sequence[tuple[int, int]]) -> None:
        """In this order, each session computes tokens [computed, min(end, context)).

        items: (session, end); none hold the step. Raises NativeError where the answer is too late,
        of another step, or leaves more than one session unfinished.
        """
        array = (abi.Item * len(items))(*(abi.Item(*item) for item in items))
        _check(self._library.sagec_tm_answer(self.number, step, array, len(items)))

    def read(self, timeout_us: int = 0) -> list[NativeEvent]:
        """What happened since the last call; waits up to timeout_us for something to."""
        pointer = self._words.ctypes.data
        read = self._library.sagec_tm_read
        count = read(self.number, pointer, len(self._words), timeout_us)
        if count < 0:
            self._words = np.empty(max(-count, 2 * len(self._words)), np.int64)
            count = read(self.number, self._words.ctypes.data, len(self._words), 0)
        return list(events(self._words[:count].tolist()))

    def migrate(self, moves: Sequence[Move]) -> None:
        """Ask for all of these moves; blobs are copied. Raises NativeError, and then none is."""
        array = (abi.Move * len(moves))()
        blobs = []  # referred to until the call returns
        for wanted, move in zip(array, moves, strict=True):
            wanted.session, wanted.layout = move.session, move.layout
            wanted.direction = abi.TO_HOST if move.blob is None else abi.TO_DEVICE
            if move.blob is not None:
                blobs.append(np.frombuffer(move.blob, np.uint8))
                wanted.blob, wanted.num_bytes = blobs[-1].ctypes.data, len(blobs[-1])
        _check(self._library.sagec_tm_migrate_blocks(self.number, array, len(moves)))

    def forget(self, session: int) -> None:
        """Forget what `migrate` asked of a session, and its blob."""
        self._library.sagec_tm_forget(self.number, session)

    def take_export(self, session: int, into: bytearray | memoryview) -> None:
        """Fill `into` with the exported blob of a session, of just this size, and forget it.

        Raises NativeError where there is none.
        """
        target = np.frombuffer(into, np.uint8)
        _check(
            self._library.sagec_tm_take_export(
                self.number, session, target.ctypes.data, len(target)
            )
        )

    def set_layout(self, layout: int) -> None:
        """What the blobs that it exports say of their layout."""
        self._library.sagec_tm_set_layout(self.number, layout)

    def block_totals(self, rank: int = 0) -> BlockTotals:
        """The blocks of a rank in numbers. Raises NativeError before its first step."""
        return self._block_info(rank, np.empty(0, BLOCK))

    def blocks(self, rank: int = 0) -> npt.NDArray[np.void]:
        """An array of BLOCK: a rank's blocks as the last step left them. Raises NativeError."""
        found = np.empty(self.block_totals(rank).num_blocks, BLOCK)
        self._block_info(rank, found)
        return found

    def _block_info(self, rank: int, blocks: npt.NDArray[np.void]) -> BlockTotals:
        totals = abi.Blocks()
        _check(
            self._library.sagec_tm_get_block_info(
                self.number, rank, totals, blocks.ctypes.data, len(blocks)
            )
        )
        return BlockTotals(*(getattr(totals, name) for name in BlockTotals._fields))

    def on_eviction(self, callback: Callable[[int, int], None] | None) -> None:
        """Call back with (block id, uid) for every cached block that goes; None: nobody.

        It runs on the engine's thread with its locks held, and takes the GIL there: for tests and
        tools. The event log has the same, without that. Raises NativeError.
        """

        def evicted(_instance: int, block: int, uid: int, _argument: object) -> None:
            if callback is not None:
                callback(block, uid)

        taken = abi.Evicted() if callback is None else abi.Evicted(evicted)
        _check(self._library.sagec_tm_register_eviction_callback(self.number, taken, None))
        self._callback = taken

    def counters(self) -> dict[str, int]:
        """sagec_tm_counters, by name. Raises NativeError where the instance is closed."""
        counters = abi.Counters()
        _check(self._library.sagec_tm_count(self.number, counters))
        return _fields_of(counters)


def _check(refusal: bytes | None) -> None:
    if refusal is not None:
        raise NativeError(refusal.decode("utf-8", "replace"))


def _array(plan: PlanColumns, name: str) -> npt.NDArray[Any]:
    kind = np.uint64 if name == "sessions" else np.int64
    return np.ascontiguousarray(getattr(plan, name), kind)


def _fields_of(structure: ctypes.Structure) -> dict[str, int]:
    return {name: getattr(structure, name) for name, *_ in structure._fields_}
