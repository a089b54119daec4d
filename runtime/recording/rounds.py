"""Rounds as frames: what of a state differs from the one before, what was decided and planned."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sagec.runtime.loop import Planned
from sagec.runtime.plan import ExecutionPlan, digest_of
from sagec.runtime.recording.columns import (
    CELLS,
    DTYPES,
    TABLE,
    TABLES,
    TEXT,
    VALUE,
    TableReader,
    TableWriter,
    Words,
    all_kinds,
    pack,
    text_column,
    unpack,
)
from sagec.runtime.recording.entries import PlanNote, RoundFrame
from sagec.runtime.recording.frames import RecordingError
from sagec.runtime.state import Decision, State, StateError

Kinds = Mapping[str, Mapping[str, str]]

AS_BEFORE = True
"""What stands for something that is as it was: in the last round, or for a state's memory as the
last decision said."""


class RoundWriter:
    """Makes frames of rounds that follow each other; the first holds everything."""

    def __init__(self) -> None:
        kinds = all_kinds()
        self._words = Words()
        self._state, self._decision = kinds["state"], kinds["decision"]
        self._tables = {
            name: TableWriter(kinds[name], self._words)
            for name, kind in self._state.items()
            if kind == TABLE
        }
        self._cells: dict[str, bytes] = {}
        self._columns: dict[str, tuple[npt.NDArray[Any], bytes]] = {}
        self._said: dict[str, Any] = {}

    def frame(self, planned: Planned, numbers: Mapping[str, int]) -> RoundFrame:
        """The frame of a round. numbers: of the requests that are being served, by id."""
        state = [self._seen(planned.state, name, kind) for name, kind in self._state.items()]
        decision = [
            self._decided(planned.decision, name, kind) for name, kind in self._decision.items()
        ]
        return RoundFrame(
            words=self._words.take_fresh(),
            state=state,
            decision=decision,
            plans=tuple(note_of(plan, numbers) for plan in planned.plans),
            decide_us=planned.decide_us,
            plan_us=planned.plan_us,
        )

    def _seen(self, state: State, name: str, kind: str) -> Any:
        value = getattr(state, name)
        if kind == TABLE:
            return self._tables[name].change(value)
        if kind == CELLS:
            return self._changed_cells(name, value)
        return AS_BEFORE if name in self._said and value is self._said[name] else [value]

    def _changed_cells(self, name: str, cells: npt.NDArray[Any]) -> Any:
        """[count, places in the flat array, values] of what is not 0; None: nothing is."""
        if not np.count_nonzero(cells):
            self._cells.pop(name, None)
            return None
        content = cells.tobytes()
        if content == self._cells.get(name):
            return AS_BEFORE
        self._cells[name] = content
        flat = cells.ravel()
        places = flat.nonzero()[0]
        return [len(places), pack(places), pack(flat[places])]

    def _decided(self, decision: Decision, name: str, kind: str) -> Any:
        value = getattr(decision, name)
        if kind == VALUE:
            if name in self._said and value is self._said[name]:
                return AS_BEFORE
            self._said[name] = value
            return [value]
        if value is None:
            self._columns.pop(name, None)
            return None
        content = value.tobytes()
        before = self._columns.get(name)
        # The array is kept so that its texts stay where they lie, and so mean the same.
        self._columns[name] = (value, content)
        if before is not None and before[1] == content and before[0].dtype == value.dtype:
            return AS_BEFORE
        if kind == TEXT:
            return [len(value), self._words.pack(value)]
        return [len(value), pack(value.astype(DTYPES[kind], copy=False))]


def note_of(plan: ExecutionPlan, numbers: Mapping[str, int]) -> PlanNote:
    """What a recording keeps of a plan."""
    leaving = [plan.request_ids[row] for row in plan.preemptions.row.tolist()]
    return PlanNote(
        instance=plan.target_instance_id,
        plan_id=plan.plan_id,
        digest=digest_of(plan),
        num_steps=plan.num_steps,
        num_estimates=len(plan.estimates),
        step_us=pack(plan.estimates.us),
        step_tokens=pack(plan.estimates.tokens),
        preempted=tuple(numbers[name] for name in leaving if name in numbers),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """A round, as it was; offset: where its frame begins in its file."""

    state: State
    decision: Decision
    plans: tuple[PlanNote, ...]
    decide_us: float
    plan_us: float
    offset: int = 0


_SENSELESS = (ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)
"""What numpy and Python raise over a frame whose checksum is right, and whose content is not."""


class RoundReader:
    """Makes rounds of frames again, from a keyframe on."""

    def __init__(self, kinds: Kinds) -> None:
        """kinds: of the columns, as the file's header says them."""
        self._kinds = kinds
        self._words: list[str] = []
        self._tables = {
            name: TableReader(TABLES[name], kinds[name])
            for name, kind in kinds["state"].items()
            if kind == TABLE
        }
        self._before: dict[str, Any] = {}
        self._said: dict[str, Any] = {}

    def round(self, frame: RoundFrame, offset: int = 0) -> Round:
        """The next round. Raises RecordingError where the frame makes no sense after the last."""
        self._words += frame.words
        try:
            state = self._state(frame.state)
            decision = self._decision(frame.decision)
        except _SENSELESS as error:
            what = error if isinstance(error, RecordingError | StateError) else repr(error)
            raise RecordingError(f"a round that does not hold together: {what}") from None
        return Round(
            state=state,
            decision=decision,
            plans=frame.plans,
            decide_us=frame.decide_us,
            plan_us=frame.plan_us,
            offset=offset,
        )

    def _state(self, said: list[Any]) -> State:
        fields: dict[str, Any] = {}
        cells = {}
        for (name, kind), value in zip(self._kinds["state"].items(), said, strict=True):
            if kind == TABLE:
                fields[name] = self._tables[name].table(value, self._words)
            elif kind == CELLS:
                cells[name] = value
            else:
                fields[name] = self._said[name] if value is AS_BEFORE else value[0]
        shape = (len(fields["waiting"]), len(fields["instances"]))
        for name, value in cells.items():
            fields[name] = self._filled(name, value, shape)
        return State(**_known(State, fields))

    def _filled(self, name: str, value: Any, shape: tuple[int, int]) -> npt.NDArray[Any]:
        if value is AS_BEFORE:
            filled: npt.NDArray[Any] = self._before[name].reshape(shape)
            return filled
        filled = np.zeros(shape, np.int64)
        if value is not None:
            count, places, values = value
            filled.reshape(-1)[unpack(places, count)] = unpack(values, count)
        filled.flags.writeable = False
        self._before[name] = filled
        return filled

    def _decision(self, said: list[Any]) -> Decision:
        fields: dict[str, Any] = {}
        for (name, kind), value in zip(self._kinds["decision"].items(), said, strict=True):
            if kind == VALUE:
                if value is not AS_BEFORE:
                    self._said[name] = value[0]
                fields[name] = self._said[name]
                continue
            if value is not AS_BEFORE:
                self._before[name] = self._column(value, kind)
            fields[name] = self._before[name]
        return Decision(**_known(Decision, fields))

    def _column(self, value: Any, kind: str) -> npt.NDArray[Any] | None:
        if value is None:
            return None
        count, packed = value
        if kind == TEXT:
            return text_column(packed, count, self._words)
        return unpack(packed, count, DTYPES[kind])


def _known(table: type[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version of sagec has."""
    known = {field.name for field in dataclasses.fields(table)}
    return {name: value for name, value in fields.items() if name in known}


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of a field are recorded alike: columns, tables or what msgpack writes."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        names = [field.name for field in dataclasses.fields(one)]
        return all(same_value(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return False
    return _SORTING.encode(one) == _SORTING.encode(other)


def _plain(value: Any) -> Any:
    """What msgpack is given for a value of numpy that a strategy remembers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"a recording holds no {type(value).__name__}")


ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_SORTING = msgspec.msgpack.Encoder(enc_hook=_plain, order="deterministic")
