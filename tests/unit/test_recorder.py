"""The recorder writes every round, and the reader gives every column of it back."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagec.runtime import loop
from sagec.runtime.clock import VirtualClock
from sagec.runtime.loop import Planned, Wait
from sagec.runtime.plan import digest_of
from sagec.runtime.recording import Header, Recorder, Recording, RecordingError, Round, entries
from sagec.runtime.recording.columns import LIST_ROWS, all_kinds, pack, unpack
from sagec.runtime.recording.files import part_of
from sagec.runtime.recording.frames import (
    ENTRIES,
    FIRST_LINE,
    KEYFRAME,
    MARK,
    ROUND,
    Damage,
    Frame,
    framed,
    frames,
)
from sagec.runtime.recording.rounds import ENCODER, RoundReader, RoundWriter, same_value
from sagec.runtime.report import RequestReport
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import Decision, Instances, Running, State, Waiting
from tests.echo_cluster import requests
from tests.recordings import INT64, recorded, rounds

HEADER = Header(strategy="fifo")


def write(path: Path, planned: list[Planned], **options: Any) -> Recorder:
    """A recording of these rounds, a wait after each."""
    with Recorder(path, HEADER, VirtualClock(), **options) as recorder:
        for one in planned:
            recorder.hear(one)
            recorder.hear(Wait(None))
    return recorder


def plain_round(number: int, waiting: int = 3) -> Planned:
    asked = Waiting.of(
        [f"r{i}" for i in range(number, number + waiting)],
        sequence=np.arange(number, number + waiting),
        prompt_tokens=np.arange(waiting) + number,
    )
    state = State(
        now_us=number,
        round=number,
        waiting=asked,
        running=Running.of([]),
        instances=Instances.of(["i0"], kv_blocks_used=number),
    )
    return Planned(state, Decision.defer(asked, f"no room {number}"), ())


def decoded(payload: bytes) -> entries.RoundFrame:
    return msgspec.msgpack.decode(payload, type=entries.RoundFrame)


def assert_same(planned: Planned, read: Round) -> None:
    for name in ("state", "decision"):
        one, other = getattr(planned, name), getattr(read, name)
        for field in dataclasses.fields(one):
            before, after = getattr(one, field.name), getattr(other, field.name)
            assert same_value(before, after), (name, field.name, before, after)
            if isinstance(before, np.ndarray):
                assert before.dtype == after.dtype, field.name
    assert (planned.decide_us, planned.plan_us) == (read.decide_us, read.plan_us)


@given(st.lists(INT64, max_size=LIST_ROWS + 40))
def test_packed_integers_come_back(values: list[int]) -> None:
    column = np.array(values, np.int64)
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(pack(column)))
    assert np.array_equal(unpack(packed, len(values)), column)


@pytest.mark.parametrize(
    ("packed", "wrong"),
    [
        (b"x123", "integers of the type 'x' in 3 bytes"),
        (b"h123", "integers of the type 'h' in 3 bytes"),
        (b"h1234", "2 integers for 3 rows"),
        ([1, 2], "2 integers for 3 rows"),
    ],
)
def test_what_is_no_packed_column_is_named(packed: Any, wrong: str) -> None:
    with pytest.raises(RecordingError, match=wrong):
        unpack(packed, 3)


@pytest.mark.parametrize(("bound", "width"), [(100, 1), (10_000, 2), (10**9, 4), (10**12, 8)])
def test_packed_integers_take_the_bytes_that_they_need(bound: int, width: int) -> None:
    packed = pack(np.arange(LIST_ROWS + 1) * bound // LIST_ROWS)
    assert isinstance(packed, bytes)
    assert len(packed) == 1 + width * (LIST_ROWS + 1)


@settings(max_examples=40)
@given(rounds())
def test_states_and_decisions_come_back_column_for_column(planned: list[Planned]) -> None:
    writer, reader = RoundWriter(), RoundReader(all_kinds())
    for one in planned:
        frame = ENCODER.encode(writer.frame(one, {}))
        assert_same(one, reader.round(decoded(frame)))


def test_a_run_comes_back_round_by_round_with_its_plans(tmp_path: Path) -> None:
    served, recorder = recorded(tmp_path / "run.rec", requests(30), keyframe_rounds=7)
    recording = Recording(tmp_path / "run.rec")
    read = list(recording.rounds())
    assert len(read) == len(served.rounds) == recorder.rounds > 20
    for planned, one in zip(served.rounds, read, strict=True):
        assert_same(planned, one)
        assert [note.digest for note in one.plans] == [digest_of(p) for p in planned.plans]
    assert recording.damages == []
    assert recorder.lost_rounds == 0


def test_a_run_comes_back_request_by_request(tmp_path: Path) -> None:
    asked = requests(12)
    served, _ = recorded(tmp_path / "run.rec", asked)
    came = [e for e in Recording(tmp_path / "run.rec").entries() if isinstance(e, entries.Came)]
    assert [entry.as_sent() for entry in came] == asked
    tokens: dict[str, list[int]] = {}
    ends = {}
    for entry in Recording(tmp_path / "run.rec").entries():
        if isinstance(entry, entries.Tokens):
            for number, index, token in zip(
                entry.numbers, entry.indices, entry.tokens, strict=True
            ):
                so_far = tokens.setdefault(asked[number].id, [])
                assert index == len(so_far)
                so_far.append(token)
        elif isinstance(entry, entries.Ended):
            ends[asked[entry.number].id] = entry.report
    assert tokens == served.tokens
    assert ends == {name: end.report for name, end in served.ends.items()}


def test_what_may_not_be_recorded_is_not(tmp_path: Path) -> None:
    recorded(tmp_path / "run.rec", requests(3), prompts=False, tokens=False)
    found = list(Recording(tmp_path / "run.rec").entries())
    assert all(e.prompt is None for e in found if isinstance(e, entries.Came))
    assert all(e.tokens == [] for e in found if isinstance(e, entries.Tokens))
    came = next(e for e in found if isinstance(e, entries.Came))
    with pytest.raises(RecordingError, match="'r0' was recorded without its prompt"):
        came.as_sent()


def test_a_request_with_an_id_in_use_is_recorded_as_refused(tmp_path: Path) -> None:
    with Recorder(tmp_path / "x.rec", HEADER, VirtualClock()) as recorder:
        for said in (
            loop.Arrived(Request(id="a", prompt=(1,))),
            loop.Arrived(Request(id="a", prompt=(2,))),
            loop.Refused("a", "request 'a' is being served"),
            loop.Token("a", 0, 7, 100),
        ):
            recorder.hear(said)
    found = list(Recording(tmp_path / "x.rec").entries())
    assert [type(entry).__name__ for entry in found] == ["Came", "Came", "Refused", "Tokens"]
    assert (found[2].number, found[3].numbers) == (1, [0])


def test_a_round_is_written_when_the_loop_waits_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    with Recorder(path, HEADER, VirtualClock()) as recorder:
        begun = path.stat().st_size
        recorder.hear(plain_round(0))
        assert path.stat().st_size == begun
        recorder.hear(Wait(None))
        assert path.stat().st_size > begun
        assert [one.state.round for one in Recording(path).rounds()] == [0]


def test_a_closed_recorder_is_deaf(tmp_path: Path) -> None:
    recorder = write(tmp_path / "x.rec", [plain_round(0)])
    recorder.hear(plain_round(1))
    recorder.hear(Wait(None))
    recorder.close()
    assert len(list(Recording(tmp_path / "x.rec").rounds())) == 1


# Files.


def test_each_file_of_a_rotation_can_be_read_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    served, _ = recorded(path, requests(40), rotate_bytes=20_000)
    recording = Recording(path)
    older = recording.files()[:-1]
    assert len(older) > 2
    assert [one.state.round for one in recording.rounds()] == list(range(len(served.rounds)))
    next_round = 0
    for part, file in enumerate(older):
        alone = Recording(file)
        assert alone.header.part == part
        numbers = [one.state.round for one in alone.rounds()]
        assert numbers == list(range(next_round, next_round + len(numbers)))
        next_round += len(numbers)
        found = list(alone.entries())
        came = {entry.number for entry in found if isinstance(entry, entries.Came)}
        assert {e.number for e in found if isinstance(e, entries.Ended)} <= came
        assert alone.damages == []


def test_a_file_is_not_full_of_the_requests_it_begins_with(tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    served, _ = recorded(path, requests(40), rotate_bytes=1, keep_files=100)
    assert 2 < len(Recording(path).files()) < len(served.rounds) // 2


def test_only_so_many_older_files_are_kept(tmp_path: Path) -> None:
    recorded(tmp_path / "run.rec", requests(40), rotate_bytes=15_000, keep_files=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.rec", "run.rec.1", "run.rec.2"]
    rounds_kept = [one.state.round for one in Recording(tmp_path / "run.rec").rounds()]
    assert rounds_kept == list(range(rounds_kept[0], rounds_kept[-1] + 1))
    assert rounds_kept[0] > 0


def test_a_file_that_cannot_be_moved_aside_grows_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.rec"
    (tmp_path / "run.rec.1").mkdir()
    served, recorder = recorded(path, requests(40), rotate_bytes=20_000)
    assert "grows beyond its size" in caplog.text
    assert recorder.lost_rounds == 0
    assert len(list(Recording(path).rounds())) == len(served.rounds)


@pytest.mark.parametrize("option", ["keep_files", "keyframe_rounds"])
def test_an_option_that_makes_no_sense_is_named(tmp_path: Path, option: str) -> None:
    with pytest.raises(RecordingError, match=f"{option} 0: 1 or more"):
        Recorder(tmp_path / "x.rec", HEADER, VirtualClock(), **{option: 0})


def test_an_earlier_recording_is_moved_aside_and_not_read_with_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    write(path, [plain_round(1)])
    write(path, [plain_round(2)])
    assert [one.state.round for one in Recording(path).rounds()] == [2]
    assert [one.state.round for one in Recording(part_of(path, 1)).rounds()] == [1]


def test_another_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "letter.txt"
    path.write_text("Dear reader")
    with pytest.raises(RecordingError, match=r"letter.txt: not a recording: .* not written over"):
        Recorder(path, HEADER, VirtualClock())
    assert path.read_text() == "Dear reader"
    recording = tmp_path / "x.rec"
    write(recording, [plain_round(0)])
    part_of(recording, 1).write_text("Dear reader")
    with pytest.raises(RecordingError, match=r"x.rec.1: not a recording"):
        Recorder(recording, HEADER, VirtualClock())
    assert len(list(Recording(recording).rounds())) == 1


# Damage.


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "empty; a recording begins with 'sagec recording 1"),
        (b"PK\x03\x04 a zip", r"not a recording: it begins with b'PK"),
        (b"sagec recording 7\nxyz", "recording version 7; this sagec reads 1"),
        (FIRST_LINE, "its header cannot be read: there is none"),
        (FIRST_LINE + b"xyz", "header cannot be read: it ends within the head of a frame, after 3"),
        (FIRST_LINE + framed(ROUND, b"x"), "its header cannot be read: there is none"),
        (FIRST_LINE + framed(b"H", b"x"), "its header cannot be read: Expected"),
    ],
)
def test_a_foreign_file_is_named(tmp_path: Path, content: bytes, wrong: str) -> None:
    path = tmp_path / "x.rec"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=wrong) as caught:
        Recording(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_is_read_up_to_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    write(path, [plain_round(i) for i in range(6)])
    content = path.read_bytes()
    ends = [*[frame.offset for frame in frames(content)][1:], len(content)]
    near = {end + beside for end in ends for beside in (-1, 0, 1, 13)}
    for length in sorted({*near, *range(ends[0], len(content), 97)}):
        if not ends[0] <= length <= len(content):
            continue
        path.write_bytes(content[:length])
        recording = Recording(path)
        whole = sum(end <= length for end in ends[1:])
        assert [one.state.round for one in recording.rounds()] == list(range(whole))
        assert len(recording.damages) == (length not in ends)
        if recording.damages:
            assert (
                f"at byte {max(end for end in ends if end < length)}: it ends within"
                in (recording.damages[0])
            )


@settings(max_examples=40)
@given(st.floats(0, 1), st.binary(min_size=1, max_size=30))
def test_damage_costs_no_round_beyond_the_next_keyframe(place: float, junk: bytes) -> None:
    content = CONTENT
    first = next(f for f in frames(content) if isinstance(f, Frame) and f.kind == KEYFRAME)
    at = first.offset + int(place * (len(content) - first.offset - len(junk)))
    broken = content[:at] + junk + content[at + len(junk) :]
    reader: RoundReader | None = None
    found = []
    for frame in frames(broken):
        if isinstance(frame, Damage):
            reader = None
        elif frame.kind in (KEYFRAME, ROUND):
            reader = RoundReader(all_kinds()) if frame.kind == KEYFRAME else reader
            assert reader is not None, "a frame after damage is a keyframe"
            found.append(reader.round(decoded(frame.payload)).state.round)
    assert len(found) >= 30 - 2 * 5
    assert found == sorted(set(found))


def _content() -> bytes:
    writer, parts = RoundWriter(), [FIRST_LINE, framed(b"H", ENCODER.encode(HEADER))]
    for number in range(30):
        if number % 5 == 0:
            writer = RoundWriter()
        payload = ENCODER.encode(writer.frame(plain_round(number), {}))
        parts.append(framed(ROUND if number % 5 else KEYFRAME, payload))
    return b"".join(parts)


CONTENT = _content()


def test_a_frame_that_makes_no_sense_is_damage_too(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    senseless = [
        framed(ENTRIES, b"\xc0"),
        framed(KEYFRAME, ENCODER.encode([[], [], [], [], 0.0, 0.0])),
        framed(KEYFRAME, ENCODER.encode([[], [7] * 7, [True] * 15, [], 0.0, 0.0])),
    ]
    path.write_bytes(CONTENT + b"".join(senseless))
    recording = Recording(path)
    assert sum(isinstance(one, Round) for one in recording.everything()) == 30
    assert len(recording.damages) == 3
    assert all(f"{path}: at byte " in damage for damage in recording.damages)


def test_columns_of_other_versions_are_left_out_or_at_their_defaults() -> None:
    kinds = {name: dict(columns) for name, columns in all_kinds().items()}
    del kinds["waiting"]["priority"]
    kinds["waiting"]["mood"] = "i8"
    payload = RoundWriter().frame(plain_round(0), {})
    table = payload.state[list(kinds["state"]).index("waiting")]
    names = list(all_kinds()["waiting"])
    table[3].pop(names.index("priority"))
    table[3].append([1, 2, 3])
    read = RoundReader(kinds).round(
        msgspec.msgpack.decode(ENCODER.encode(payload), type=entries.RoundFrame)
    )
    assert read.state.waiting.ids.tolist() == ["r0", "r1", "r2"]
    assert read.state.waiting.priority.tolist() == [0, 0, 0]


# A disk that takes no more.


@pytest.fixture
def small_files() -> Iterator[Any]:
    """A function that bounds how long a file of this process may grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(
        resource.RLIMIT_FSIZE, (soft if size is None else size, hard)
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_serving_goes_on_when_the_disk_is_full_and_so_does_recording_later(
    tmp_path: Path, small_files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.rec"
    caplog.set_level(logging.WARNING)
    with Recorder(path, HEADER, VirtualClock(), retry_s=0.0) as recorder:
        recorder.hear(loop.Arrived(Request(id="a", prompt=(1, 2))))
        for number in range(30):
            if number == 10:
                small_files(path.stat().st_size + 50)  # within the next frame
            if number == 20:
                small_files(None)
            recorder.hear(plain_round(number))
            recorder.hear(Wait(None))
            assert (recorder.error != "") == (10 <= number < 20)
    assert (recorder.rounds, recorder.lost_rounds) == (20, 10)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert os.strerror(errno.EFBIG) in caplog.text
    recording = Recording(path)
    found = list(recording.everything())
    assert recording.damages == []
    kept = [entry.state.round for entry in found if isinstance(entry, Round)]
    assert kept == [*range(10), *range(20, 30)]
    assert Counter(type(entry).__name__ for entry in found)["Came"] == 2
    gap = next(entry for entry in found if isinstance(entry, entries.Gap))
    assert (gap.lost_rounds, gap.error) == (10, os.strerror(errno.EFBIG))


def test_a_disk_that_is_full_from_the_beginning_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served, recorder = recorded(Path("/dev/full"), requests(5))
    assert len(served.ends) == 5
    assert recorder.lost_rounds == len(served.rounds) > 0
    assert recorder.error == os.strerror(errno.ENOSPC)
    assert len(caplog.records) == 1


def test_between_two_attempts_a_recorder_that_cannot_write_does_nothing(tmp_path: Path) -> None:
    with Recorder("/dev/full", HEADER, VirtualClock(), retry_s=3600.0) as recorder:
        for number in range(5):
            recorder.hear(plain_round(number))
            recorder.hear(Wait(None))
    assert recorder.lost_rounds == 5


@pytest.mark.parametrize("odd", [{"a": object()}, {"a": 2**70}, {"a": "\ud800"}])
def test_a_memory_that_cannot_be_written_loses_rounds_and_not_the_service(
    tmp_path: Path, odd: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.rec"
    planned = [plain_round(i) for i in range(6)]
    decision = dataclasses.replace(planned[2].decision, memory=odd)
    planned[2] = msgspec.structs.replace(planned[2], decision=decision)
    recorder = write(path, planned, retry_s=0.0)
    assert recorder.lost_rounds == 1
    assert "a recording cannot hold it" in caplog.text
    assert [one.state.round for one in Recording(path).rounds()] == [0, 1, 3, 4, 5]


def test_a_request_that_cannot_be_written_loses_rounds_while_it_is_served(tmp_path: Path) -> None:
    path, odd = tmp_path / "x.rec", Request(id="\ud800", prompt=(1,))
    with Recorder(path, HEADER, VirtualClock(), retry_s=0.0) as recorder:
        recorder.hear(plain_round(0))
        recorder.hear(Wait(None))
        recorder.hear(loop.Arrived(odd))
        recorder.hear(plain_round(1))
        recorder.hear(Wait(None))
        assert "a recording cannot hold it" in recorder.error
        recorder.hear(loop.Finished(odd.id, FinishReason.LENGTH, "", report_of("a")))
        recorder.hear(Wait(None))
        recorder.hear(plain_round(2))
        recorder.hear(Wait(None))
    assert recorder.lost_rounds == 1
    assert [one.state.round for one in Recording(path).rounds()] == [0, 2]


def report_of(name: str) -> RequestReport:
    return RequestReport(
        request_id=name,
        reason=FinishReason.LENGTH,
        prompt_tokens=1,
        output_tokens=0,
        arrival_us=0,
        end_us=5,
    )


def test_numbers_of_numpy_in_a_memory_are_recorded_as_numbers(tmp_path: Path) -> None:
    one = plain_round(0)
    memory = {"share": np.float64(0.5), "tenants": np.arange(2), "count": np.int64(3)}
    decision = dataclasses.replace(one.decision, memory=memory)
    write(tmp_path / "x.rec", [msgspec.structs.replace(one, decision=decision)])
    (read,) = Recording(tmp_path / "x.rec").rounds()
    assert read.decision.memory == {"share": 0.5, "tenants": [0, 1], "count": 3}


def test_a_mark_within_a_payload_misleads_nobody() -> None:
    content = (
        FIRST_LINE + framed(ENTRIES, MARK + KEYFRAME + b"xxxxxxxxxxxx") + framed(KEYFRAME, b"k")
    )
    assert [type(part) for part in frames(content)] == [Frame, Frame]
    damaged = content.replace(b"xxxxxxxxxxxx", b"yxxxxxxxxxxx")
    assert [(type(part), part[-1][:1]) for part in frames(damaged)][1] == (Frame, b"k")
