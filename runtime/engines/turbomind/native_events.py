"""What happened in a patched TurboMind, as its event log tells it: int64s to objects.

Sessions are TurboMind's names of requests; times are microseconds of the machine's monotonic clock.
"""

from collections.abc import Callable, Iterator, Sequence

import msgspec

from sagec.runtime.engines.turbomind import abi

_SESSION = (1 << 64) - 1
"""Sessions are unsigned, the words of the log are not."""


class StepRow(msgspec.Struct, frozen=True, gc=False):
    """A session's part of a step: tokens [begin, end) computed; the plan wanted [begin, planned).

    planned_end: 0 where nobody planned it. token: the one sampled, where flags has ROW_SAMPLED.
    """

    session: int
    begin: int
    end: int
    planned_end: int
    token: int
    flags: int

    @property
    def samples(self) -> bool:
        """Whether the step sampled a token of it."""
        return bool(self.flags & abi.ROW_SAMPLED)

    @property
    def finished(self) -> bool:
        """Whether that ended it."""
        return bool(self.flags & abi.ROW_FINISHED)


class Step(msgspec.Struct, frozen=True):
    """A step that was computed. plan: 0 where none decided it; decided_by: BY_STOCK, BY_PLAN, ...

    Rows that were planned and not computed are in it too, with begin = end.
    """

    step: int
    plan: int
    plan_step: int
    decided_by: int
    begin_us: int
    end_us: int
    active_blocks: int
    cached_blocks: int
    free_blocks: int
    rows: tuple[StepRow, ...]


class PlanEnded(msgspec.Struct, frozen=True):
    """All steps of the plan are gone by, or a newer one took over."""

    plan: int


class Erased(msgspec.Struct, frozen=True):
    """The session holds nothing any more; it had the KV of so many tokens."""

    session: int
    computed: int


class LostKV(msgspec.Struct, frozen=True):
    """TurboMind took blocks of the session for others: of `before` tokens `after` are left."""

    session: int
    before: int
    after: int


class Matched(msgspec.Struct, frozen=True):
    """The prefix cache had the KV of the session's first tokens."""

    session: int
    tokens: int


class Stored(msgspec.Struct, frozen=True):
    """The session's first blocks, by uid in the order of its tokens, are in the prefix cache."""

    session: int
    uids: tuple[int, ...]


class Evicted(msgspec.Struct, frozen=True):
    """Cached blocks that are gone."""

    uids: tuple[int, ...]


class Exported(msgspec.Struct, frozen=True):
    """The session's KV is in host memory: `take_export` gets its num_bytes."""

    session: int
    tokens: int
    num_bytes: int
    begin_us: int
    end_us: int


class Imported(msgspec.Struct, frozen=True):
    """The session began with the KV that was staged for it."""

    session: int
    tokens: int
    num_bytes: int
    begin_us: int
    end_us: int


class NotImported(msgspec.Struct, frozen=True):
    """The KV staged for the session was not used; why: NO_ROOM, NOT_ALL_RANKS, TOO_LONG, ..."""

    session: int
    why: int


class Gap(msgspec.Struct, frozen=True):
    """A chunk that begins behind tokens that nobody computed; it was left out."""

    session: int
    plan: int
    plan_step: int
    begin: int
    computed: int


NativeEvent = (
    Step
    | PlanEnded
    | Erased
    | LostKV
    | Matched
    | Stored
    | Evicted
    | Exported
    | Imported
    | NotImported
    | Gap
)

_Words = Sequence[int]
_STEP_FIELDS, _ROW_FIELDS = 10, 6
_STEP_WORDS = _STEP_FIELDS + _ROW_FIELDS  # of a step with one row


def events(words: _Words) -> Iterator[NativeEvent]:
    """The events in the log's words, in order.

    Raises ValueError for a kind that this version does not know: the library is another's.
    """
    at = 0
    while at < len(words):
        kind, size = words[at], words[at + 1]
        if (read := _READERS.get(kind)) is None:
            raise ValueError(f"the event log has an event of kind {kind}, which is none of ours")
        yield read(words[at + 2 : at + size])
        at += size


def _step(words: _Words) -> Step:
    step, plan, plan_step, decided_by, begin_us, end_us, *blocks = words[: _STEP_FIELDS - 1]
    active, cached, free = blocks
    sessions, *others = (words[at::_ROW_FIELDS] for at in range(_STEP_FIELDS, _STEP_WORDS))
    rows = tuple(map(StepRow, [session & _SESSION for session in sessions], *others))
    return Step(step, plan, plan_step, decided_by, begin_us, end_us, active, cached, free, rows)


def _stored(words: _Words) -> Stored:
    return Stored(words[0] & _SESSION, tuple(words[2 : 2 + words[1]]))


def _evicted(words: _Words) -> Evicted:
    return Evicted(tuple(words[1 : 1 + words[0]]))


def _of_session(kind: Callable[..., NativeEvent]) -> Callable[[_Words], NativeEvent]:
    return lambda words: kind(words[0] & _SESSION, *words[1:])


_READERS: dict[int, Callable[[_Words], NativeEvent]] = {
    abi.STEP: _step,
    abi.PLAN_DONE: lambda words: PlanEnded(*words),
    abi.ERASED: _of_session(Erased),
    abi.PREEMPTED: _of_session(LostKV),
    abi.MATCHED: _of_session(Matched),
    abi.STORED: _stored,
    abi.EVICTED: _evicted,
    abi.EXPORTED: _of_session(Exported),
    abi.IMPORTED: _of_session(Imported),
    abi.NOT_IMPORTED: _of_session(NotImported),
    abi.GAP: _of_session(Gap),
}
