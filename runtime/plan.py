"""The ExecutionPlan: what one engine instance does next, as columns.

A plan covers a *horizon* of steps. Requests are rows; every other table names them by row. A step
computes the chunks that name it and one token of each row that decodes in it:

    rows      chat-1, chat-2
    chunks    step 0: row 1 [0, 96) samples;  step 0: row 0 [0, 416);  step 1: row 0 [416, 928) ...
    decodes   row 1 from step 1 until its KV holds 111 tokens

All columns are one-dimensional int64 arrays, so that a plan is as wide as its requests and never an
object a request. Progress is absolute (tokens of KV), not relative: a plan that reaches an engine
late, or twice, computes no token twice.
"""

import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

VERSION = 1
"""Grows with every change that an older reader could misread."""

Column = npt.NDArray[np.int64]
EMPTY: Column = np.zeros(0, np.int64)
EMPTY.flags.writeable = False


def _column() -> Column:
    """A column that is empty unless given; by a factory, for the schema cannot show an array."""
    column: Column = msgspec.field(default_factory=lambda: EMPTY)
    return column


MODES = ("strict", "time-share", "hybrid")
"""How prefill and decode share an instance: not at all, by turns, or in every step."""

RECOMPUTE, SWAP = 0, 1
"""How a preempted row's KV leaves the device: dropped, or moved to host memory."""


class PlanError(ValueError):
    """A plan that cannot be read or does not hold together; says where, what and the remedy."""


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Columns of one length."""

    def __len__(self) -> int:
        return len(getattr(self, self.__struct_fields__[0]))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in self.__struct_fields__
        )

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name).tobytes() for name in self.__struct_fields__))


class Rows(Table, frozen=True):
    """A row a request: what the engine must know of it, beside its tokens.

    prompt_tokens: tokens to compute before the first one can be sampled.
    computed_tokens: tokens whose KV the instance holds when the plan begins.
    kv_blocks: blocks reserved on this instance for the whole plan.
    deadline_us: when the next token is late, on the loop's clock; 0 where nobody said.
    """

    prompt_tokens: Column = _column()
    computed_tokens: Column = _column()
    kv_blocks: Column = _column()
    deadline_us: Column = _column()


class Chunks(Table, frozen=True):
    """Prompt tokens [begin, end) of a row, computed in a step; ordered by step, then as computed.

    samples: 1 where the chunk ends its prompt, so that the step samples the row's next token.
    """

    step: Column = _column()
    row: Column = _column()
    begin: Column = _column()
    end: Column = _column()
    samples: Column = _column()


class Decodes(Table, frozen=True):
    """Rows that decode a token a step.

    A row joins at the first step >= begin_step at which its KV is on the instance and its prompt
    is computed, and leaves when its KV holds until_tokens tokens, or when it finishes. Nobody
    waits for it.
    """

    row: Column = _column()
    begin_step: Column = _column()
    until_tokens: Column = _column()


class Preemptions(Table, frozen=True):
    """Rows that leave the instance before step 0; how is RECOMPUTE or SWAP."""

    row: Column = _column()
    how: Column = _column()


class Reuses(Table, frozen=True):
    """Rows whose first tokens have KV: in the prefix cache, or their own that was swapped out."""

    row: Column = _column()
    tokens: Column = _column()


class Evictions(Table, frozen=True):
    """Cached blocks, by hash, to drop before step 0."""

    block_hash: Column = _column()


class Moves(Table, frozen=True):
    """KV of a row to or from another instance: peer is an index into `ExecutionPlan.peers`.

    An export happens after the step in which the row's first token is sampled, and frees the row's
    blocks here. An import reserves its blocks when the KV arrives; rows wait in order.
    """

    row: Column = _column()
    peer: Column = _column()
    tokens: Column = _column()


class Migrations(Table, frozen=True):
    """Cached blocks, by hash, to move between tiers: 0 device, 1 host, 2 disk."""

    block_hash: Column = _column()
    source_tier: Column = _column()
    target_tier: Column = _column()


class Acceleration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an engine may do to be faster; a target refuses what it cannot do."""

    kv_dtype: str = "auto"
    quantization: str = "none"
    draft_tokens: int = 0
    cuda_graph: bool = False


class Estimates(Table, frozen=True):
    """What the compiler predicts of each step: microseconds, tokens, blocks in use."""

    us: Column = _column()
    tokens: Column = _column()
    kv_blocks: Column = _column()


class ExecutionPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one instance does for the next `num_steps` steps.

    mode is one of MODES: in a plan of mode "time-share" a step that has chunks decodes nobody.
    max_step_tokens bounds what any step computes, also where a late row joins a decode batch.
    ir_digest names the IR that the plan was lowered from (sha256, first 16 hex digits).
    """

    version: int = VERSION
    plan_id: str
    round: int
    target_instance_id: str
    mode: str
    num_steps: int
    max_step_tokens: int
    peers: tuple[str, ...] = ()
    request_ids: tuple[str, ...] = ()
    rows: Rows = msgspec.field(default_factory=Rows)
    chunks: Chunks = msgspec.field(default_factory=Chunks)
    decodes: Decodes = msgspec.field(default_factory=Decodes)
    preemptions: Preemptions = msgspec.field(default_factory=Preemptions)
    reuses: Reuses = msgspec.field(default_factory=Reuses)
    imports: Moves = msgspec.field(default_factory=Moves)
    exports: Moves = msgspec.field(default_factory=Moves)
    evictions: Evictions = msgspec.field(default_factory=Evictions)
    migrations: Migrations = msgspec.field(default_factory=Migrations)
    acceleration: Acceleration = msgspec.field(default_factory=Acceleration)
    estimates: Estimates = msgspec.field(default_factory=Estimates)
    ir_digest: str = ""

    @property
    def mixes_phases(self) -> bool:
        """Whether rows decode in a step that also computes chunks."""
        return self.mode != "time-share"

    def tables(self) -> Iterator[tuple[str, Table]]:
        """The plan's tables with their names, in the order of the fields."""
        for name in self.__struct_fields__:
            if isinstance(value := getattr(self, name), Table):
                yield name, value


def encode(plan: ExecutionPlan) -> bytes:
    """The plan as msgpack; a column is its little-endian bytes."""
    return _msgpack_encoder().encode(plan)


def digest_of(plan: ExecutionPlan) -> str:
    """A name of all that a plan says: 16 hexadecimal digits of the sha256 of its msgpack."""
    return hashlib.sha256(encode(plan)).hexdigest()[:16]


def decode(data: bytes, source: str = "plan") -> ExecutionPlan:
    """The plan that `encode` wrote.

    Raises PlanError where `data` is no plan of this version; `source` names it in the message.
    """
    return _decoded(_msgpack_decoder(), data, source)


def to_json(plan: ExecutionPlan) -> bytes:
    """The plan as JSON after the schema that `json_schema` gives; a column is a list."""
    return msgspec.json.format(_json_encoder().encode(plan), indent=1)


def from_json(data: bytes | str, source: str = "plan") -> ExecutionPlan:
    """The plan that `to_json` wrote; it is checked, for people write JSON by hand.

    Raises PlanError.
    """
    plan = _decoded(_json_decoder(), data.encode() if isinstance(data, str) else data, source)
    check(plan, source)
    return plan


def json_schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of a plan; docs/plan.schema.json is this text."""
    return msgspec.json.schema(ExecutionPlan, schema_hook=_column_schema)


def check(plan: ExecutionPlan, source: str = "plan") -> None:
    """Raise PlanError unless every column fits its table and every row and step exists.

    What it cannot see is left to the engine: whether prompts go on where they stopped, and room.
    """
    for name, table in plan.tables():
        lengths = {field: len(getattr(table, field)) for field in table.__struct_fields__}
        if len(set(lengths.values())) > 1:
            raise PlanError(f"{source}: {name}: columns of different lengths: {lengths}")
    if len(plan.rows) != len(plan.request_ids):
        raise PlanError(
            f"{source}: rows has {len(plan.rows)} rows for {len(plan.request_ids)} request_ids; "
            "one each"
        )
    if len(set(plan.request_ids)) < len(plan.request_ids):
        twice = next(name for name in plan.request_ids if plan.request_ids.count(name) > 1)
        raise PlanError(f"{source}: request_ids names {twice!r} twice; a row each")
    if plan.mode not in MODES:
        raise PlanError(f"{source}: mode {plan.mode!r}; one of: {', '.join(MODES)}")
    for name in ("num_steps", "max_step_tokens"):
        if (value := getattr(plan, name)) < 0:
            raise PlanError(f"{source}: {name} {value}: 0 or more")
    _check_bounds(plan, source)
    if (bad := np.flatnonzero(plan.chunks.end <= plan.chunks.begin)).size:
        chunk = int(bad[0])
        raise PlanError(
            f"{source}: chunks[{chunk}]: [{plan.chunks.begin[chunk]}, {plan.chunks.end[chunk]}) "
            "is empty; leave it out"
        )


def _check_bounds(plan: ExecutionPlan, source: str) -> None:
    bounds = {
        "row": len(plan.request_ids),
        "peer": len(plan.peers),
        "step": plan.num_steps,
        "how": len(("recompute", "swap")),
        "samples": 2,
    }
    for name, table in plan.tables():
        for field in bounds.keys() & set(table.__struct_fields__):
            column = getattr(table, field)
            if (bad := np.flatnonzero((column < 0) | (column >= bounds[field]))).size:
                raise PlanError(
                    f"{source}: {name}.{field}[{bad[0]}]: {column[bad[0]]} is not in "
                    f"[0, {bounds[field]})"
                )


def _decoded(
    decoder: "msgspec.msgpack.Decoder[ExecutionPlan] | msgspec.json.Decoder[ExecutionPlan]",
    data: bytes,
    source: str,
) -> ExecutionPlan:
    try:
        plan = decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{source}: not an ExecutionPlan: {error}") from None
    if plan.version != VERSION:
        raise PlanError(f"{source}: plan version {plan.version}; this sagec reads {VERSION}")
    return plan


def _column_bytes(column: Any) -> bytes:
    if not isinstance(column, np.ndarray) or column.dtype != np.int64:
        kind = getattr(column, "dtype", type(column).__name__)
        raise TypeError(f"a column is an array of int64, not {kind}")
    return column.tobytes()


def _column_from_bytes(_: type, data: Any) -> Column:
    if not isinstance(data, bytes) or len(data) % 8:
        raise ValueError("a column is the bytes of an int64 array")
    return np.frombuffer(data, np.int64)


def _column_from_list(_: type, items: Any) -> Column:
    if not isinstance(items, list) or not all(type(item) is int for item in items):
        raise ValueError("a column is a list of integers")
    try:
        column = np.array(items, np.int64)
    except OverflowError:
        raise ValueError("a column holds integers of 64 bits") from None
    column.flags.writeable = False
    return column


def _column_schema(_: type) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "integer"}}


@functools.cache
def _msgpack_encoder() -> msgspec.msgpack.Encoder:
    return msgspec.msgpack.Encoder(enc_hook=_column_bytes)


@functools.cache
def _msgpack_decoder() -> "msgspec.msgpack.Decoder[ExecutionPlan]":
    return msgspec.msgpack.Decoder(ExecutionPlan, dec_hook=_column_from_bytes)


@functools.cache
def _json_encoder() -> msgspec.json.Encoder:
    return msgspec.json.Encoder(enc_hook=lambda column: column.tolist())


@functools.cache
def _json_decoder() -> "msgspec.json.Decoder[ExecutionPlan]":
    return msgspec.json.Decoder(ExecutionPlan, dec_hook=_column_from_list)
