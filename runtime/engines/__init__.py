"""The engine seam: what the loop asks of an engine instance, and what it hears back.

An engine is one file or folder here that defines `create(spec: InstanceSpec) -> Engine`; nothing
else lists it. A strategy decides, an engine computes, and the loop alone changes a request.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.request import FinishReason, Request


class EngineError(RuntimeError):
    """An engine that cannot be made, or that died; says which, why and what would help."""


class InstanceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A running copy of an engine to be made.

    model: path of a checkpoint. kv_blocks of block_tokens tokens each is the whole KV cache.
    options: what this engine alone understands (the torch engine: dtype, threads, device).
    """

    id: str
    engine: str
    model: str
    kv_blocks: int
    block_tokens: int
    options: dict[str, str] = {}


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance can do, as it found out when it started.

    kv_layout is a fingerprint: KV moves only between instances whose fingerprints are equal.
    caches_prefixes: the KV of finished requests stays until its room is needed, and plans may
    reuse it.
    """

    kv_blocks: int
    block_tokens: int
    kv_layout: str
    kv_bytes_per_token: int
    max_context_tokens: int
    eos_tokens: tuple[int, ...] = ()
    caches_prefixes: bool = False


class KVHandle(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request's KV on its way from one instance to another: everything to go on with it.

    place is the channel's name of the bytes (e.g. a shared memory segment); output are the tokens
    sampled so far, of which the last one's KV is still to be computed.
    """

    request: Request
    source: str
    target: str
    output: tuple[int, ...]
    computed_tokens: int
    layout: str
    place: str
    num_bytes: int
    begin_us: int


class DecidedBy(StrEnum):
    """Who said what a step computes.

    PLAN: the plan at work. ANSWER: somebody asked about that step alone. DEADLINE: the engine
    itself, for no decision had come in time. STOCK: the engine itself, which nobody decides for.
    """

    PLAN = "plan"
    ANSWER = "answer"
    DEADLINE = "deadline"
    STOCK = "stock"


class StepReport(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One step that an instance computed.

    chunks: (request_id, begin, end) of prompt tokens. decodes: ids of the rows that decoded.
    tokens: (request_id, index in the output, token id), each sent once; finished: (id, reason).
    reused: (request_id, tokens) of requests that this step began with KV of the prefix cache.
    A simulator knows how many tokens there are, but not which: it says (request_id, index of the
    first, how many) in `advanced`, and may report `steps` like steps that followed one another,
    `step` being the last of them, in one.
    deviations: (request_id, tokens that the plan gave it in this step, tokens computed) where the
    two differ; empty: the step obeyed its plan. A decode is one token; who was not planned was
    given 0. What leaves or finishes by the plan's own rules is none: progress is absolute.
    Times are on the monotonic clock of the machine, in microseconds.
    """

    instance: str
    plan_id: str
    step: int
    begin_us: int
    end_us: int
    chunks: tuple[tuple[str, int, int], ...] = ()
    decodes: tuple[str, ...] = ()
    tokens: tuple[tuple[str, int, int], ...] = ()
    finished: tuple[tuple[str, FinishReason], ...] = ()
    kv_blocks_used: int = 0
    reused: tuple[tuple[str, int], ...] = ()
    steps: int = 1
    advanced: tuple[tuple[str, int, int], ...] = ()
    deviations: tuple[tuple[str, int, int], ...] = ()
    decided_by: DecidedBy = DecidedBy.PLAN


class KVExported(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request's KV left its instance and waits at `handle.place` to be received."""

    handle: KVHandle
    end_us: int


class KVImported(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request's KV arrived: begin_us is when its export began, end_us when it could decode."""

    instance: str
    request_id: str
    source: str
    num_bytes: int
    begin_us: int
    end_us: int


class Preempted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request's blocks were freed; its output stays.

    kept_tokens: of its first tokens the instance keeps the KV in host memory, and computes only
    those after them when the request goes on there; 0: it starts over. is_forgotten: the instance
    took the blocks by itself and knows the request no more, so that no plan made before this was
    heard can have it go on: it is to be sent again.
    """

    instance: str
    request_id: str
    kept_tokens: int = 0
    is_forgotten: bool = False


class KVCached(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The prefix cache of an instance has changed: hashes of blocks that it holds now, and no more.

    Hashes are those of `sagec.runtime.kv.block_hashes`.
    """

    instance: str
    stored: tuple[int, ...] = ()
    evicted: tuple[int, ...] = ()


class PlanDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Nothing is left to do of this plan: steps ran, rows finished, left or were superseded."""

    instance: str
    plan_id: str


class Cancelled(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A cancelled request holds nothing on this instance any more."""

    instance: str
    request_id: str


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request, or with request_id None the whole instance, failed; the rest goes on."""

    instance: str
    request_id: str | None
    error: str


Event = StepReport | KVExported | KVImported | KVCached | Preempted | PlanDone | Cancelled | Failed


class Engine(Protocol):
    """A running instance.

    submit: the requests are those that a row of the plan names and the instance has not seen.
    A newer plan supersedes the rest of the older at the next step boundary: rows that it does not
    name keep their KV and compute nothing. What is here of a request that it imports, without KV
    in blocks, was before the request was placed elsewhere: that is forgotten, and its KV awaited.
    receive: KV that another instance exported, for a request that a plan here imports, or will.
    poll: what happened since; waits up to timeout_s for something to. An engine without a thread
    or process of its own computes its next step in here. One with them, which may have something
    to tell though it has no plan (a request that it was told to cancel is gone), has a property
    `owes_events` that says so while it does.
    """

    def capability(self) -> Capability: ...
    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None: ...
    def receive(self, handle: KVHandle) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def poll(self, timeout_s: float = 0.0) -> list[Event]: ...
    def close(self) -> None: ...


def known() -> list[str]:
    """Names of the engines that lie in this folder.

    >>> "torch" in known()
    True
    """
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def create(spec: InstanceSpec) -> Engine:
    """The engine that `spec` names, loaded and ready for plans.

    Raises EngineError where there is no such engine, its library is missing or its model does not
    load.
    """
    if spec.engine not in known():
        raise EngineError(f"no engine {spec.engine!r} here; there are: {', '.join(known())}")
    module: Any = importlib.import_module(f"{__name__}.{spec.engine}")
    engine: Engine = module.create(spec)
    return engine
