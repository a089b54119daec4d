"""Where every request and instance stands, as columns, and what a strategy says about it.

The loop keeps a `RequestTable` and alone writes it. A strategy and the planner read `State`, a
view that does not change, and a strategy answers with a `Decision`. Columns have one row a request
(or instance); rows of `Waiting` and `Running` are ordered by the order in which requests came.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, get_type_hints

import numpy as np
import numpy.typing as npt

from sagec.runtime.plan import RECOMPUTE
from sagec.runtime.request import Request
from sagec.runtime.roster import Roster

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Strings = npt.NDArray[np.object_]

UNBOUNDED = 2**31 - 1
"""Tokens of a request that goes on until it stops."""

ANY = 2**31 - 1
"""An instance index where the compiler is free to choose."""

ADMIT, DEFER, REJECT = 0, 1, 2
VERDICTS = ("admit", "defer", "reject")
"""Names of the verdicts, by code."""

ROLES = ("prefill", "decode", "both")

Memory = Mapping[str, Any]
"""What a strategy knows of earlier rounds: numbers, strings, lists and mappings of them, so that a
recording can hold it. A strategy has no other memory, and so the same state, the same decision."""


class StateError(ValueError):
    """Columns or a decision that do not hold together; says which row, and what is wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Columns:
    """Arrays of one length; a field without a value is all zeros, False or empty strings."""

    ids: Strings
    _defaults: ClassVar[dict[str, Any]] = {}

    @classmethod
    def of(cls, ids: Sequence[str], **columns: Any) -> Self:
        """Columns of the given values, the rest at their defaults: a list, or one value for all.

        >>> Waiting.of(["a", "b"], prompt_tokens=[3, 5], generate_tokens=8).generate_tokens
        array([8, 8])
        """
        dtypes = _dtypes(cls)
        if unknown := sorted(columns.keys() - dtypes.keys()):
            raise StateError(f"{cls.__name__} has no column {unknown[0]!r}; it has {list(dtypes)}")
        values = {"ids": list(ids), **cls._defaults, **columns}
        return cls(
            **{
                name: _column(values.get(name, _EMPTY[dtype]), dtype, len(ids))
                for name, dtype in dtypes.items()
            }
        )

    def __post_init__(self) -> None:
        lengths = {f.name: len(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if len(set(lengths.values())) > 1:
            raise StateError(f"{type(self).__name__}: columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rows(self) -> Ints:
        """Every row's number: what orders and choices are expressed in."""
        return np.arange(len(self))


_DTYPES: dict[Any, Any] = {Ints: np.int64, Bools: np.bool_, Strings: np.object_}
_EMPTY: dict[Any, Any] = {np.int64: 0, np.bool_: False, np.object_: ""}


def _dtypes(table: type) -> dict[str, Any]:
    """Type of each column, read off the annotations."""
    hints = get_type_hints(table)
    return {field.name: _DTYPES[hints[field.name]] for field in dataclasses.fields(table)}


def _column(values: Any, dtype: Any, length: int) -> Any:
    column = np.empty(length, dtype)
    column[:] = values
    column.flags.writeable = False
    return column


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Asked(_Columns):
    """What a client asked for, as far as it bears on a decision.

    sequence: the order of coming; it names a request for as long as the loop runs, in every round.
    ttft_us and tpot_us are 0 where nothing was promised; empty strings mean none was named.
    output_tokens: sampled so far; first_token_us: when the first of them was, 0 where none is.
    preemptions: how often it lost its place.
    """

    sequence: Ints
    arrival_us: Ints
    priority: Ints
    ttft_us: Ints
    tpot_us: Ints
    output_tokens: Ints
    first_token_us: Ints
    preemptions: Ints
    model: Strings
    tenant: Strings
    session: Strings
    adapter: Strings


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Waiting(_Asked):
    """Requests that hold no KV anywhere.

    prompt_tokens: tokens to compute before the next one can be sampled; after a preemption this
    includes the output so far. generate_tokens: how many may still be generated, or UNBOUNDED.
    """

    prompt_tokens: Ints
    generate_tokens: Ints


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Running(_Asked):
    """Requests that an instance computes, holds or is about to get.

    instance: index into `State.instances` where the request is, or is going while arriving.
    prompt_tokens: tokens before the first one sampled since it was admitted; a prefill that is
    not done has computed_tokens < prompt_tokens. computed_tokens: tokens whose KV is there.
    cached_tokens: of a prompt that its instance has not begun, the leading tokens whose KV is there
    already, to be reused. remaining_tokens: how many may still be generated; where the client set
    no limit, as many as the instance holds. decode_on: where it will decode. admitted_us: when it
    got its place.
    """

    instance: Ints
    prompt_tokens: Ints
    computed_tokens: Ints
    cached_tokens: Ints
    remaining_tokens: Ints
    arriving: Bools
    decode_on: Ints
    admitted_us: Ints


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Instances(_Columns):
    """Instances of the cluster; an index into these columns names one everywhere.

    role: one of ROLES. kv_blocks of block_tokens tokens each; kv_blocks_used: those that hold or
    are promised to running requests, each with its whole prompt and the next token.
    idle: no plan is at work there. pool: instances of one name, other than "", share devices and
    compute by turns; switch_us: what it takes to begin a turn.
    prefill_ns_per_token, decode_step_us: what a prompt token and a step of decodes take, measured
    as it serves and estimated until then; 0 where nobody knows.
    """

    role: Strings
    model: Strings
    engine: Strings
    kv_blocks: Ints
    block_tokens: Ints
    kv_blocks_used: Ints
    max_context_tokens: Ints
    alive: Bools
    idle: Bools
    pool: Strings
    switch_us: Ints
    prefill_ns_per_token: Ints
    decode_step_us: Ints
    _defaults = {"alive": True, "idle": True}

    @property
    def prefills(self) -> Bools:
        """Alive, and allowed to prefill."""
        allowed: Bools = self.role != "decode"
        return self.alive & allowed

    @property
    def decodes(self) -> Bools:
        """Alive, and allowed to decode."""
        allowed: Bools = self.role != "prefill"
        return self.alive & allowed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """What a strategy and the planner see of a round; nothing in it ever changes.

    cached_tokens: [waiting, instances], leading tokens of each waiting request whose KV an instance
    has already: of its prefix cache, or of the request itself, swapped out. memory: what the
    strategy's last decision said to remember.
    """

    now_us: int
    round: int
    waiting: Waiting
    running: Running
    instances: Instances
    cached_tokens: Ints = dataclasses.field(default_factory=lambda: np.zeros((0, 0), np.int64))
    memory: Memory = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.waiting), len(self.instances))
        if not self.cached_tokens.size:
            nothing = np.broadcast_to(np.int64(0), shape)
            object.__setattr__(self, "cached_tokens", nothing)
        elif self.cached_tokens.shape != shape:
            found = self.cached_tokens.shape
            raise StateError(f"cached_tokens is {found}; {shape} is [waiting, instances]")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What a strategy says: a row for each waiting request, and the running ones to preempt.

    verdict: ADMIT, DEFER or REJECT. rank: admitted rows go in this order, smallest first.
    reason: why, in words. prefill_on, decode_on: index of an instance, or ANY. chunk_tokens: no
    chunk of the row's prompt is longer; 0: nothing said.
    preempt_rows: rows of `State.running`; preempt_how: RECOMPUTE or SWAP.
    mode, horizon_steps: how the round is to be fused and how far it looks; "" and 0: as configured.
    step_prompt_tokens: no step computes more tokens of prompts; 0: as many as its instance takes.
    turn_steps: of each instance, how many steps it may compute before the next round, ANY: as the
    horizon says; with 0 it computes nothing, and its requests keep their KV. None: ANY for all.
    again_us: when to be asked again at the latest, though nothing happens until then.
    memory: what the next state is to remember.
    """

    verdict: npt.NDArray[np.int8]
    rank: Ints
    reason: Strings
    prefill_on: Ints
    decode_on: Ints
    chunk_tokens: Ints
    preempt_rows: Ints
    preempt_how: Ints
    preempt_reason: Strings
    mode: str = ""
    horizon_steps: int = 0
    step_prompt_tokens: int = 0
    turn_steps: Ints | None = None
    again_us: int | None = None
    memory: Memory = dataclasses.field(default_factory=dict)

    @classmethod
    def defer(cls, waiting: Waiting, because: str = "") -> Self:
        """Everybody waits."""
        n = len(waiting)
        return cls(
            verdict=np.full(n, DEFER, np.int8),
            rank=np.zeros(n, np.int64),
            reason=_strings_of(because, n),
            prefill_on=np.full(n, ANY, np.int64),
            decode_on=np.full(n, ANY, np.int64),
            chunk_tokens=np.zeros(n, np.int64),
            preempt_rows=np.zeros(0, np.int64),
            preempt_how=np.zeros(0, np.int64),
            preempt_reason=_strings_of("", 0),
        )

    @classmethod
    def admit(
        cls,
        rows: Ints,
        waiting: Waiting,
        because: str | Sequence[str] = "",
        otherwise: str = "",
    ) -> Self:
        """The given rows are admitted in the given order, all others wait.

        >>> waiting = Waiting.of(["late", "early"], arrival_us=[9, 2])
        >>> decision = Decision.admit(np.argsort(waiting.arrival_us), waiting)
        >>> decision.rank
        array([1, 0])
        """
        decision = cls.defer(waiting, otherwise)
        decision.verdict[rows] = ADMIT
        decision.rank[rows] = np.arange(len(rows))
        decision.reason[rows] = _strings_of(because, len(rows))
        return decision

    def reject(self, rows: Ints, because: str | Sequence[str]) -> Self:
        """The same, but the given rows will never be served."""
        if not len(rows):
            return self
        verdict, reason = self.verdict.copy(), self.reason.copy()
        verdict[rows] = REJECT
        reason[rows] = _strings_of(because, len(rows))
        return dataclasses.replace(self, verdict=verdict, reason=reason)

    def preempt(self, rows: Ints, because: str | Sequence[str], how: int = RECOMPUTE) -> Self:
        """The same, and the given rows of `State.running` lose their place."""
        if not len(rows):
            return self
        return dataclasses.replace(
            self,
            preempt_rows=np.concatenate([self.preempt_rows, rows]).astype(np.int64),
            preempt_how=np.concatenate([self.preempt_how, np.full(len(rows), how)]),
            preempt_reason=np.concatenate([self.preempt_reason, _strings_of(because, len(rows))]),
        )

    @property
    def admitted(self) -> Ints:
        """Rows of the admitted, in the order of their rank."""
        rows = np.flatnonzero(self.verdict == ADMIT)
        return rows[np.argsort(self.rank[rows], kind="stable")]

    @property
    def rejected(self) -> Ints:
        """Rows of the rejected."""
        return np.flatnonzero(self.verdict == REJECT)


def _strings_of(values: str | Sequence[str], length: int) -> Strings:
    column = np.empty(length, np.object_)
    column[:] = values
    return column


def check(decision: Decision, state: State, source: str = "decision") -> None:
    """Raise StateError unless the decision fits the state: lengths, codes, rows, instances."""
    n, num_running = len(state.waiting), len(state.running)
    for name in ("verdict", "rank", "reason", "prefill_on", "decode_on", "chunk_tokens"):
        if len(column := getattr(decision, name)) != n:
            raise StateError(f"{source}: {name} has {len(column)} rows for {n} waiting requests")
    _check_codes(decision.verdict, len(VERDICTS), f"{source}: verdict")
    _check_codes(decision.preempt_rows, num_running, f"{source}: preempt_rows")
    if len(set(decision.preempt_rows.tolist())) < len(decision.preempt_rows):
        raise StateError(f"{source}: preempt_rows names a row twice")
    for name in ("prefill_on", "decode_on"):
        chosen = getattr(decision, name)
        _check_codes(chosen[chosen != ANY], len(state.instances), f"{source}: {name}")
    if (turns := decision.turn_steps) is not None and len(turns) != len(state.instances):
        wrong = f"turn_steps has {len(turns)} rows for {len(state.instances)} instances"
        raise StateError(f"{source}: {wrong}")


def _check_codes(column: npt.NDArray[Any], bound: int, place: str) -> None:
    if (bad := np.flatnonzero((column < 0) | (column >= bound))).size:
        raise StateError(f"{place}[{bad[0]}]: {column[bad[0]]} is not in [0, {bound})")


_NO_ROWS: Ints = np.zeros(0, np.int64)

FREE, WAITING, RUNNING, LEAVING = 0, 1, 2, 3
"""Phases of a table row. LEAVING: told to leave its instance, which has not yet said it did."""

_ASKED = (
    "ids",
    "sequence",
    "arrival_us",
    "priority",
    "ttft_us",
    "tpot_us",
    "output_tokens",
    "first_token_us",
    "preemptions",
)
_NAMED = ("model", "tenant", "session", "adapter")
_WAITING_COLUMNS = (*_ASKED, *_NAMED, "prompt_tokens", "generate_tokens")
_CHANGING_COLUMNS = (
    "output_tokens",
    "first_token_us",
    "instance",
    "computed_tokens",
    "cached_tokens",
    "remaining_tokens",
    "arriving",
    "decode_on",
)
_RUNNING_COLUMNS = (
    *(name for name in _ASKED if name not in _CHANGING_COLUMNS),
    *_NAMED,
    *_CHANGING_COLUMNS,
    "prompt_tokens",
    "admitted_us",
)
_STORED_AS = {"generate_tokens": "remaining_tokens"}
"""Columns of views that the table keeps under another name."""


class RequestTable:
    """All live requests, a row each; a row that becomes free is used again. Only the loop writes.

    Columns mean what they mean in `Waiting` and `Running`; sequence is the order of coming.
    """

    def __init__(self, capacity: int = 64, room_tokens: Sequence[int] = (UNBOUNDED,)) -> None:
        """room_tokens: of each instance, the longest context that it holds."""
        self._room_tokens = np.array(room_tokens, np.int64)
        self.phase = np.zeros(capacity, np.int8)
        self.sequence = np.zeros(capacity, np.int64)
        self.ids, self.model, self.tenant = (np.full(capacity, "", object) for _ in range(3))
        self.session, self.adapter = (np.full(capacity, "", object) for _ in range(2))
        self.arrival_us, self.priority = np.zeros((2, capacity), np.int64)
        self.ttft_us, self.tpot_us = np.zeros((2, capacity), np.int64)
        self.prompt_tokens, self.computed_tokens = np.zeros((2, capacity), np.int64)
        self.remaining_tokens, self.instance, self.decode_on = np.zeros((3, capacity), np.int64)
        self.output_tokens, self.first_token_us = np.zeros((2, capacity), np.int64)
        self.preemptions, self.admitted_us = np.zeros((2, capacity), np.int64)
        self._asked_tokens, self.last_token_us = np.zeros((2, capacity), np.int64)
        self.cached_tokens = np.zeros((capacity, len(room_tokens)), np.int64)
        self.arriving = np.zeros(capacity, np.bool_)
        self._caches = False
        self._free = list(range(capacity))[::-1]
        self._num_added = 0
        self._waiting = Roster(Waiting, self._waiting_values, _WAITING_COLUMNS, ())
        self._running = Roster(Running, self._running_values, _RUNNING_COLUMNS, _CHANGING_COLUMNS)
        self._changed = np.zeros(capacity, np.bool_)
        self._usage = _Usage(capacity, len(room_tokens))

    def __len__(self) -> int:
        return len(self.phase) - len(self._free)

    def add(self, request: Request, model: str) -> int:
        """A row for a request that came, waiting; the columns are doubled where none is free."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.sequence[row] = self._num_added
        self._num_added += 1
        self.ids[row], self.model[row] = request.id, model
        self.tenant[row], self.session[row] = request.tenant, request.session
        self.adapter[row] = request.adapter
        self.arrival_us[row], self.priority[row] = request.arrival_us, request.priority
        self.ttft_us[row], self.tpot_us[row] = request.ttft_us or 0, request.tpot_us or 0
        limit = request.max_output_tokens
        self.remaining_tokens[row] = UNBOUNDED if limit is None else limit
        self.output_tokens[row] = self.first_token_us[row] = 0
        self.preemptions[row] = self.admitted_us[row] = 0
        self._asked_tokens[row] = len(request.prompt)
        self.wait(row, len(request.prompt))
        return row

    def wait(self, row: int, prompt_tokens: int) -> None:
        """The request holds no KV; so many tokens are to be computed before it can go on."""
        if self.phase[row] == WAITING:
            self._enter(row, LEAVING)
        self._enter(row, WAITING)
        self.prompt_tokens[row], self.computed_tokens[row] = prompt_tokens, 0
        self.cached_tokens[row], self.arriving[row] = 0, False

    def run(self, row: int, instance: int, decode_on: int, now_us: int = 0) -> None:
        """A waiting request is given to an instance."""
        self._enter(row, RUNNING)
        self.instance[row], self.decode_on[row] = instance, decode_on
        self.admitted_us[row] = now_us

    def preempted(self, row: int) -> None:
        """The request lost its place once more; `wait` says what it has to compute again."""
        self.preemptions[row] += 1

    def leave(self, row: int) -> None:
        """A running request is told to leave; strategies see it no more."""
        self._enter(row, LEAVING)

    def remove(self, row: int) -> None:
        """The request has ended; its row is free."""
        self._enter(row, FREE)
        self.ids[row] = ""
        self._free.append(row)

    def progress(self, row: int, computed_tokens: int) -> None:
        """An instance holds KV of so many tokens."""
        self.computed_tokens[row] = computed_tokens
        self._changed[row] = self._usage.changed[row] = True

    def generated(
        self,
        rows: Sequence[int],
        computed_tokens: Sequence[int],
        now_us: int = 0,
    ) -> None:
        """A token was sampled for each of these rows, after so many in KV, at this time."""
        if rows:
            at = np.array(rows)
            self.computed_tokens[at] = computed_tokens
            first = at[self.output_tokens[at] == 0]
            self.first_token_us[first] = now_us
            np.add.at(self.output_tokens, at, 1)
            bounded = self.remaining_tokens[at] != UNBOUNDED
            np.subtract.at(self.remaining_tokens, at, bounded.astype(np.int64))
            self._touch(at)

    def are_on(self, rows: Ints, instance: int) -> Bools:
        """Which of the rows are on the instance, and not only on their way there."""
        here: Bools = (self.instance[rows] == instance) & (self.phase[rows] != WAITING)
        return here & ~self.arriving[rows]

    def counted(self, rows: Ints, count: int, first_us: int, last_us: int) -> None:
        """`count` more tokens were sampled for each of these rows, all of which differ.

        first_us, last_us: when the first and the last of them were.
        """
        output = self.output_tokens[rows]
        if np.count_nonzero(output) < len(rows):
            self.first_token_us[rows[output == 0]] = first_us
        self.output_tokens[rows] = output + count
        self.computed_tokens[rows] = self._asked_tokens[rows] + output + (count - 1)
        left = self.remaining_tokens[rows]
        self.remaining_tokens[rows] = np.where(left == UNBOUNDED, left, left - count)
        self.last_token_us[rows] = last_us
        self._touch(rows)

    def move(self, row: int, instance: int, arriving: bool) -> None:
        """The request's KV is on its way to an instance, or has come there."""
        self.instance[row] = self.decode_on[row] = instance
        self.arriving[row] = arriving
        self._touch([row])

    def decode_at(self, row: int, instance: int) -> None:
        """The request will decode there."""
        self.decode_on[row] = instance
        self._touch([row])

    def cached(self, rows: Sequence[int], instance: int, tokens: int) -> None:
        """An instance has KV of so many leading tokens of these requests, not begun there yet."""
        self.cached_tokens[rows, instance] = tokens
        self._caches |= tokens > 0
        self._changed[rows] = True

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests are on instances."""
        return len(self._running)

    def waiting_cached_tokens(self) -> Ints:
        """[waiting, instances]: rows as in `waiting`; see `State.cached_tokens`."""
        if not self._caches:  # nobody ever had anything
            return np.broadcast_to(np.int64(0), (self.num_waiting, self.cached_tokens.shape[1]))
        self.waiting()
        cached: Ints = self.cached_tokens[self._waiting.rows]
        cached.flags.writeable = False
        return cached

    def waiting(self) -> Waiting:
        """The waiting requests, in the order in which they came."""
        return self._waiting.view(_NO_ROWS, _NO_ROWS)

    def running(self) -> Running:
        """The requests on instances, in the order in which they came."""
        rows = self._changed.nonzero()[0]
        self._changed[rows] = False
        return self._running.view(rows, self.sequence[rows])

    def kv_blocks_used(self, block_tokens: Ints) -> Ints:
        """Blocks of each instance that hold or are promised to its requests."""
        return self._usage.count(self, block_tokens)

    def _enter(self, row: int, phase: int) -> None:
        sequence = int(self.sequence[row])
        if (before := self.phase[row]) != phase:
            if before == WAITING:
                self._waiting.leave(sequence)
            elif before == RUNNING:
                self._running.leave(sequence)
            if phase == WAITING:
                self._waiting.enter(sequence, row)
            elif phase == RUNNING:
                self._running.enter(sequence, row)
        self.phase[row] = phase
        self._usage.changed[row] = True

    def _touch(self, rows: Sequence[int] | Ints) -> None:
        """Something of these running rows has changed."""
        self._changed[rows] = self._usage.changed[rows] = True

    def _waiting_values(self, rows: Ints, names: Sequence[str]) -> dict[str, Any]:
        return {name: getattr(self, _STORED_AS.get(name, name))[rows] for name in names}

    def _running_values(self, rows: Ints, names: Sequence[str]) -> dict[str, Any]:
        """A column each. cached_tokens is of the row's instance; remaining_tokens, which bounds a
        plan, is what the instance has room for where the client set no limit."""
        columns = {name: getattr(self, name)[rows] for name in names}
        computed, prompt = self.computed_tokens[rows], self.prompt_tokens[rows]
        there = columns["cached_tokens"][np.arange(len(rows)), self.instance[rows]]
        columns["cached_tokens"] = np.where(computed == 0, there, 0)
        held = np.where(computed < prompt, prompt, computed + 1)
        room = self._room_tokens[self.decode_on[rows]] - held
        columns["remaining_tokens"] = np.minimum(columns["remaining_tokens"], room)
        return columns

    def _grow(self) -> None:
        capacity = len(self.phase)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray) and name != "_room_tokens":
                setattr(self, name, np.concatenate([column, np.zeros_like(column)]))
        self._usage.grow()
        self._free = list(range(capacity, 2 * capacity))[::-1]


class _Usage:
    """Blocks that a table's requests take on each instance, counted again only where rows changed.

    A row takes them where it is and, while that is another place, where it will decode: two columns
    of `_places`, with the blocks that were counted there in `_blocks`.
    """

    def __init__(self, capacity: int, num_instances: int) -> None:
        self.changed = np.zeros(capacity, np.bool_)
        self._places, self._blocks = np.zeros((2, capacity, 2), np.int64)
        self._used = np.zeros(num_instances, np.int64)
        self._block_tokens: Ints = _NO_ROWS

    def grow(self) -> None:
        """Room for twice as many rows."""
        self.changed = np.concatenate([self.changed, np.zeros_like(self.changed)])
        self._places = np.concatenate([self._places, np.zeros_like(self._places)])
        self._blocks = np.concatenate([self._blocks, np.zeros_like(self._blocks)])

    def count(self, table: RequestTable, block_tokens: Ints) -> Ints:
        """Blocks of each instance, which are of so many tokens each."""
        if not np.array_equal(block_tokens, self._block_tokens):
            self.changed[:], self._blocks[:] = True, 0
            self._block_tokens, self._used = block_tokens, np.zeros_like(block_tokens)
        rows = self.changed.nonzero()[0]
        self.changed[rows] = False
        np.subtract.at(self._used, self._places[rows], self._blocks[rows])
        places = np.stack([table.instance[rows], table.decode_on[rows]], axis=1)
        tokens = np.maximum(table.prompt_tokens[rows], table.computed_tokens[rows]) + 1
        blocks = -(-tokens[:, None] // block_tokens[places])
        blocks[table.phase[rows] < RUNNING] = 0
        blocks[places[:, 0] == places[:, 1], 1] = 0
        self._places[rows], self._blocks[rows] = places, blocks
        np.add.at(self._used, places, blocks)
        return self._used.copy()
