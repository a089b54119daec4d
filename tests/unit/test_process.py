"""The child's side of a process engine, run in this process on one end of a socket."""

import socket
import struct

import msgspec
import pytest

from sagec.runtime import plan as plans
from sagec.runtime import process
from sagec.runtime.engines import Event, Failed, InstanceSpec, PlanDone, StepReport
from sagec.runtime.process import _Child, _Frames
from sagec.runtime.request import Request
from tests.echo_cluster import spec
from tests.unit.test_executor import run_plan


def framed(*values) -> bytes:
    payloads = [msgspec.msgpack.encode(value) for value in values]
    return b"".join(struct.pack("<I", len(payload)) + payload for payload in payloads)


@pytest.fixture
def sockets():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def serve(sockets, *commands, made: InstanceSpec | None = None) -> tuple[int, list]:
    """The child's exit code and what it said, when all it hears is `commands` and then the end."""
    ours, theirs = sockets
    ours.sendall(framed(made or spec("x0"), *commands))
    ours.shutdown(socket.SHUT_WR)
    code = _Child(theirs).serve()
    theirs.close()
    said = b""
    while received := ours.recv(1 << 16):
        said += received
    return code, [
        msgspec.msgpack.decode(frame, type=process._Answer) for frame in _Frames().feed(said)
    ]


def events_of(answers) -> list[Event]:
    return [event for a in answers if isinstance(a, process._EventsFrame) for event in a.events]


SUBMIT = process._SubmitFrame(
    plans.encode(run_plan()), (Request(id="a", prompt=(1, 2, 3), max_output_tokens=7),)
)


def test_a_child_is_ready_and_ends_when_it_is_told(sockets):
    code, answers = serve(sockets, process._CloseFrame())
    assert code == 0
    assert answers == [process._ReadyFrame(answers[0].capability)]
    assert answers[0].capability.kv_blocks == 40


def test_a_child_ends_when_nobody_is_there_any_more(sockets):
    ours, theirs = sockets
    ours.close()
    assert _Child(theirs).serve() == 0


def test_a_child_takes_a_step_between_commands(sockets):
    _, answers = serve(sockets, SUBMIT, process._CancelFrame("b"))
    kinds = [type(event) for event in events_of(answers)]
    assert StepReport in kinds


def test_a_child_that_cannot_make_its_engine_says_why(sockets):
    code, answers = serve(sockets, made=spec("x0", vocab="many"))
    assert code == 1
    assert answers == [
        process._NotReadyFrame("instance 'x0': vocab='many': a whole number, 0 or more")
    ]


def test_a_child_whose_engine_fails_says_why_and_ends(sockets, monkeypatch):
    from sagec.runtime.engines import EngineError
    from sagec.runtime.engines.echo import Echo

    def poll(self, timeout_s=0.0):
        raise EngineError("the power went out")

    monkeypatch.setattr(Echo, "poll", poll)
    code, answers = serve(sockets, SUBMIT)
    assert code == 1
    assert events_of(answers) == [
        Failed(instance="x0", request_id=None, error="the power went out")
    ]


def test_a_plan_runs_to_its_end_though_nothing_more_is_said(sockets):
    ours, theirs = sockets
    ours.sendall(framed(spec("x0"), SUBMIT))
    child, heard = _Child(theirs), []

    class Done(Exception):
        pass

    def receive(wait_s):
        if wait_s is None:
            raise Done
        return []

    child._receive = receive
    with pytest.raises(Done):
        child.serve()
    theirs.close()
    while received := ours.recv(1 << 16):
        heard += _Frames().feed(received)
    events = events_of([msgspec.msgpack.decode(f, type=process._Answer) for f in heard])
    assert isinstance(events[-1], PlanDone)
    assert sum(isinstance(event, StepReport) for event in events) == 7


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_frames_come_out_whole_however_they_arrive(size):
    values = [b"", b"x", b"y" * 300, b"z"]
    stream = b"".join(struct.pack("<I", len(value)) + value for value in values)
    frames = _Frames()
    cut = [stream[i : i + size] for i in range(0, len(stream), size)]
    assert [frame for piece in cut for frame in frames.feed(piece)] == values


def test_kv_is_passed_on_to_the_engine(sockets):
    from sagec.runtime.engines import KVHandle

    handle = KVHandle(
        request=Request(id="a", prompt=(1,)),
        source="p0",
        target="x0",
        output=(2,),
        computed_tokens=1,
        layout="echo",
        place="echo:1:0",
        num_bytes=64,
        begin_us=0,
    )
    code, answers = serve(sockets, process._ReceiveFrame(handle), process._CloseFrame())
    assert code == 0
    assert events_of(answers) == []


def test_the_entry_point_serves_the_descriptor_it_is_given(sockets, monkeypatch):
    ours, theirs = sockets
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(process.sys, "argv", ["process", str(theirs.detach())])
    ours.sendall(framed(spec("x0"), process._CloseFrame()))
    assert process.main() == 0


def test_a_parent_that_vanishes_in_the_middle_of_an_answer_is_no_error(sockets, monkeypatch):
    ours, theirs = sockets
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(process.sys, "argv", ["process", str(theirs.detach())])
    ours.sendall(framed(spec("x0"), SUBMIT))
    ours.close()
    assert process.main() == 0
