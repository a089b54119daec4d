"""What a recording says: its header, and between rounds what came, ran, moved and ended.

Entries are arrays in msgpack, with their names first; a field added later comes last and has a
default. A request goes by its number, which counts those that came, from 0.
"""

from typing import Any

import msgspec

from sagec.runtime.engines import DecidedBy
from sagec.runtime.loop import Instance
from sagec.runtime.recording.columns import Packed, unpack
from sagec.runtime.recording.frames import RecordingError
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded: enough to compile and to decide again.

    strategy: as text. cluster: the module of the cluster in the IR's text, without graphs; planner:
    mode, chunk, horizon, policy and pipeline, as the planner takes them. Both are empty where no
    compiler plans. prompts, tokens: whether prompts and sampled tokens are in the file. recording
    names the run, part counts its files from 0. begun_unix_us: by the wall; begun_us: the same
    moment by the loop's clock. tables: names and kinds of the columns, in the file's order.
    """

    strategy: str
    cluster: str = ""
    planner: dict[str, Any] = {}
    instances: tuple[Instance, ...] = ()
    sagec: str = ""
    prompts: bool = True
    tokens: bool = True
    recording: str = ""
    part: int = 0
    begun_unix_us: int = 0
    begun_us: int = 0
    tables: dict[str, dict[str, str]] = {}


class _Entry(msgspec.Struct, frozen=True, array_like=True, tag=str.lower):
    """Something between two rounds."""


class Came(_Entry, frozen=True):
    """A request came. Its prompt stands apart, as packed tokens; None: it was left out.

    A file begins with those that were being served when the one before it was full.
    """

    number: int
    request: Request
    prompt_tokens: int
    prompt: Packed | None

    def as_sent(self, later_us: int = 0) -> Request:
        """The request with its prompt, so much later. Raises RecordingError where it is not there,
        or not whole."""
        if self.prompt is None:
            raise RecordingError(f"request {self.request.id!r} was recorded without its prompt")
        prompt = tuple(unpack(self.prompt, self.prompt_tokens).tolist())
        arrival_us = self.request.arrival_us + later_us
        return msgspec.structs.replace(self.request, prompt=prompt, arrival_us=arrival_us)


class Refused(_Entry, frozen=True):
    """A request was not taken in."""

    number: int
    detail: str


class Step(_Entry, frozen=True):
    """A step of an instance, or `steps` like steps in one.

    decodes: how many rows decoded. chunks: (number, begin, end) of prompt tokens; reused: (number,
    tokens) that it began with KV of the prefix cache; advanced: (number, first index, count) of
    tokens of which a simulator knows only how many there are. deviations: (number, tokens planned,
    tokens computed) where the step did not do as it was told; decided_by: by whom.
    """

    instance: str
    plan_id: str
    step: int
    begin_us: int
    end_us: int
    kv_blocks_used: int
    decodes: int
    chunks: tuple[tuple[int, int, int], ...] = ()
    reused: tuple[tuple[int, int], ...] = ()
    steps: int = 1
    advanced: tuple[tuple[int, int, int], ...] = ()
    deviations: tuple[tuple[int, int, int], ...] = ()
    decided_by: DecidedBy = DecidedBy.PLAN


class Tokens(_Entry, frozen=True):
    """Tokens as clients got them, a row each: when (once, where all at the same time), of which
    request, at which index of its output, and the token itself; `tokens` is empty where those are
    left out."""

    time_us: int | list[int]
    numbers: list[int]
    indices: list[int]
    tokens: list[int]


class Moved(_Entry, frozen=True):
    """KV of a request came from another instance."""

    number: int
    source: str
    target: str
    num_bytes: int
    begin_us: int
    end_us: int


class Preempted(_Entry, frozen=True):
    """A request lost its place; the instance keeps the KV of its first tokens."""

    number: int
    instance: str
    kept_tokens: int
    time_us: int


class Failed(_Entry, frozen=True):
    """A request, or with number None a whole instance, failed."""

    instance: str
    number: int | None
    error: str
    time_us: int


class Retried(_Entry, frozen=True):
    """A request lost its KV with an instance, and starts over for the attempt-th time."""

    number: int
    instance: str
    error: str
    attempt: int
    time_us: int


class Joined(_Entry, frozen=True):
    """An instance that had failed is there again."""

    instance: str
    time_us: int


class Cancelling(_Entry, frozen=True):
    """A client no longer wants its answer."""

    number: int
    time_us: int


class Ended(_Entry, frozen=True):
    """A request's end, and its record."""

    number: int
    reason: FinishReason
    detail: str
    report: RequestReport


class Gap(_Entry, frozen=True):
    """The file could not be written for a while: rounds that are not in it, and why."""

    lost_rounds: int
    error: str


Entry = (
    Came
    | Refused
    | Step
    | Tokens
    | Moved
    | Preempted
    | Failed
    | Retried
    | Joined
    | Cancelling
    | Ended
    | Gap
)


class PlanNote(msgspec.Struct, frozen=True, array_like=True):
    """A plan of a round, by its digest. step_us, step_tokens: what the compiler predicts of each
    step. preempted: numbers of the requests that leave."""

    instance: str
    plan_id: str
    digest: str
    num_steps: int
    num_estimates: int
    step_us: Packed
    step_tokens: Packed
    preempted: tuple[int, ...] = ()


class RoundFrame(msgspec.Struct, frozen=True, array_like=True):
    """A round as it lies in the file: words are the strings that are new since the keyframe."""

    words: tuple[str, ...]
    state: list[Any]
    decision: list[Any]
    plans: tuple[PlanNote, ...]
    decide_us: float
    plan_us: float
