"""An engine in a process of its own: the engine seam over a socket.

The parent's side is `ProcessEngine`; the child is `python -m sagec.runtime.process FD`, which makes
the engine and serves it until the parent closes the socket or disappears. Frames are a length (four
bytes, little-endian) and msgpack. Neither side starts a thread; the parent never blocks on a send.

A parent that does not read stops its child: plans are finite, and what the socket does not hold the
child waits to send. A child with a plan but nothing to tell says every ALIVE_S that it lives, so
that one that waits for KV is told from one that hangs.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec

from sagec.runtime import plan as plans
from sagec.runtime.engines import (
    Capability,
    Engine,
    EngineError,
    Event,
    Failed,
    InstanceSpec,
    KVHandle,
    PlanDone,
    create,
)
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.request import Request

CLOSE_S = 5.0
"""How long a child may take to close by itself before it is told by a signal."""

AWAIT_S = 0.001
"""How long a child with a plan, but nothing to compute yet, waits for word from its parent."""

ALIVE_S = 0.25
"""How often a child with a plan says that it lives, when it has nothing else to say."""

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


class _SubmitFrame(msgspec.Struct, frozen=True, tag=True):
    plan: bytes
    requests: tuple[Request, ...]


class _ReceiveFrame(msgspec.Struct, frozen=True, tag=True):
    handle: KVHandle


class _CancelFrame(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class _CheckFrame(msgspec.Struct, frozen=True, tag=True):
    pass


class _CloseFrame(msgspec.Struct, frozen=True, tag=True):
    pass


class _ReadyFrame(msgspec.Struct, frozen=True, tag=True):
    capability: Capability


class _NotReadyFrame(msgspec.Struct, frozen=True, tag=True):
    error: str


class _EventsFrame(msgspec.Struct, frozen=True, tag=True):
    events: list[Event]


class _AliveFrame(msgspec.Struct, frozen=True, tag=True):
    pass


class _CheckedFrame(msgspec.Struct, frozen=True, tag=True):
    error: str


_Command = _SubmitFrame | _ReceiveFrame | _CancelFrame | _CheckFrame | _CloseFrame
_Answer = _ReadyFrame | _NotReadyFrame | _EventsFrame | _AliveFrame | _CheckedFrame


def start(specs: Sequence[InstanceSpec]) -> dict[str, "ProcessEngine"]:
    """A process for each instance; they start side by side, and all are ready on return.

    Raises EngineError where one does not come up; the others are closed then.
    """
    engines: dict[str, ProcessEngine] = {}
    try:
        for spec in specs:
            engines[spec.id] = ProcessEngine(spec)
        for engine in engines.values():
            engine.capability()
    except BaseException:
        for engine in engines.values():
            engine.close()
        raise
    return engines


class ProcessEngine:
    """The engine that `spec` names, in a child process; an `Engine` like any other.

    The child starts at once and comes up on its own: `capability` waits for it. A child that dies
    is a `Failed` event without a request, after everything it had said.
    """

    def __init__(self, spec: InstanceSpec) -> None:
        self.instance = spec.id
        self._capability: Capability | None = None
        self._events: list[Event] = []
        self._unsent = bytearray()
        self._frames = _Frames()
        self._ended = False
        self._plan_id: str | None = None
        self._heard_s = time.monotonic()
        self._checked: str | None = None
        self._killed_because = ""
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sagec.runtime.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": spec.options.get("threads", "1")},
            )
        self._socket.setblocking(False)
        self._send(msgspec.msgpack.encode(spec))

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def unsent(self) -> bool:
        """Whether commands wait until the child reads; `poll` sends them."""
        return bool(self._unsent) and not self._ended

    @property
    def is_up(self) -> bool:
        """Whether the child is ready for plans; `capability` waits for it, `poll` hears of it."""
        return self._capability is not None and not self._ended

    @property
    def error(self) -> str:
        """How the child ended; "" while it lives."""
        return self._ending() if self._ended else ""

    @property
    def silent_s(self) -> float:
        """How long the child has said nothing, though it has a plan; 0 without one."""
        if self._plan_id is None or not self.is_up:
            return 0.0
        return time.monotonic() - self._heard_s

    @property
    def has_news(self) -> bool:
        """Whether `poll` has something to return without waiting."""
        return bool(self._events) or self._ended

    def fileno(self) -> int:
        """A descriptor that becomes readable when `poll` has something to return."""
        return self._socket.fileno()

    def capability(self) -> Capability:
        """What the child's engine can do; waits until it is up.

        Raises EngineError with the child's own words where it cannot be made.
        """
        while self._capability is None:
            if self._ended:
                raise EngineError(self._ending())
            self._exchange(None)
        return self._capability

    def submit(self, plan: ExecutionPlan, requests: Sequence[Request] = ()) -> None:
        if self._plan_id is None:
            self._heard_s = time.monotonic()
        self._plan_id = plan.plan_id
        self._command(_SubmitFrame(plans.encode(plan), tuple(requests)))

    def receive(self, handle: KVHandle) -> None:
        self._command(_ReceiveFrame(handle))

    def cancel(self, request_id: str) -> None:
        self._command(_CancelFrame(request_id))

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if not self._events and not self._ended:
            self._exchange(timeout_s)
        events, self._events = self._events, []
        return events

    def check_integrity(self) -> None:
        """Let the child's engine check its books, where it can, and wait for the answer.

        Raises AssertionError with what it found, EngineError where the child is dead.
        """
        self._checked = None
        self._command(_CheckFrame())
        while self._checked is None:
            if self._ended:
                raise EngineError(self._ending())
            self._exchange(None)
        if self._checked:
            raise AssertionError(f"instance {self.instance!r}: {self._checked}")

    def kill(self, because: str) -> None:
        """End the child at once; `poll` will say that it failed, and why."""
        if self._process.poll() is None:
            self._killed_because = because
            self._process.kill()

    def close(self) -> None:
        """Ask the child to end; where it does not within CLOSE_S, tell it by signals.

        One that is not up has nothing to give back, and hears nobody: it ends at once.
        """
        if self._capability is None:
            self._process.kill()
        elif self._process.poll() is None:
            self._command(_CloseFrame())
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self._socket.close()
        self._ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        for stop in (self._process.terminate, self._process.kill):
            if self._process.poll() is None:
                stop()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(CLOSE_S)

    def _command(self, command: _Command) -> None:
        if not self._ended:
            self._send(msgspec.msgpack.encode(command))

    def _send(self, payload: bytes) -> None:
        self._unsent += _LENGTH.pack(len(payload)) + payload
        self._flush()

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError:  # The child is gone; reading will say so, after its last words.
                self._unsent.clear()
                return
            del self._unsent[:sent]

    def _exchange(self, timeout_s: float | None) -> None:
        """Send what is unsent and hear what there is; waits up to timeout_s for the latter."""
        writers = [self._socket] if self._unsent else []
        readable, writable, _ = select.select([self._socket], writers, (), timeout_s)
        if writable:
            self._flush()
        if readable:
            self._read()

    def _read(self) -> None:
        try:
            while received := self._socket.recv(_READ_BYTES):
                self._heard_s = time.monotonic()
                for payload in self._frames.feed(received):
                    self._hear(msgspec.msgpack.decode(payload, type=_Answer))
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        self._end()

    def _hear(self, answer: _Answer) -> None:
        match answer:
            case _ReadyFrame():
                self._capability = answer.capability
            case _NotReadyFrame():
                self.close()
                raise EngineError(answer.error)
            case _EventsFrame():
                self._events += answer.events
                for event in answer.events:
                    if isinstance(event, PlanDone) and event.plan_id == self._plan_id:
                        self._plan_id = None
            case _CheckedFrame():
                self._checked = answer.error
            case _AliveFrame():
                pass

    def _end(self) -> None:
        self._ended = True
        self._socket.close()
        failed = Failed(instance=self.instance, request_id=None, error=self._ending())
        self._events.append(failed)

    def _ending(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        because = f": {self._killed_because}" if self._killed_because else ""
        return f"process {self._process.pid} of instance {self.instance!r} {how}{because}"


class _Frames:
    """Cuts a stream of bytes into frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, received: bytes) -> list[bytes]:
        """The frames that are complete now."""
        self._received += received
        frames, begin = [], 0
        while len(self._received) - begin >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received, begin)
            end = begin + _LENGTH.size + length
            if len(self._received) < end:
                break
            frames.append(bytes(self._received[begin + _LENGTH.size : end]))
            begin = end
        del self._received[:begin]
        return frames


class _Child:
    """The child's side: an engine, and the socket to the parent."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._frames = _Frames()
        self._decoder = msgspec.msgpack.Decoder(_Command)
        self._plan_id: str | None = None
        self._said_s = time.monotonic()

    def serve(self) -> int:
        """Make the engine and run it until told to close; the process's exit code."""
        first: list[bytes] = []
        while not first:
            if not (received := self._socket.recv(_READ_BYTES)):
                return 0
            first = self._frames.feed(received)
        spec = msgspec.msgpack.decode(first[0], type=InstanceSpec)
        try:
            engine = create(spec)
        except EngineError as error:
            self._send(_NotReadyFrame(str(error)))
            return 1
        self._send(_ReadyFrame(engine.capability()))
        try:
            self._run(engine, first[1:])
        except EngineError as error:
            failed = Failed(instance=spec.id, request_id=None, error=str(error))
            self._send(_EventsFrame([failed]))
            return 1
        finally:
            engine.close()
        return 0

    def _run(self, engine: Engine, payloads: list[bytes]) -> None:
        """Commands, then a step, then commands: nothing waits longer than a step."""
        while True:
            for payload in payloads:
                if not self._obey(engine, self._decoder.decode(payload)):
                    return
            events = engine.poll(0.0 if self._plan_id is None else AWAIT_S)
            for event in events:
                if isinstance(event, PlanDone) and event.plan_id == self._plan_id:
                    self._plan_id = None
            if events:
                self._send(_EventsFrame(events))
            elif self._plan_id is not None and time.monotonic() - self._said_s > ALIVE_S:
                self._send(_AliveFrame())
            is_busy = self._plan_id is not None or getattr(engine, "owes_events", False)
            wait_s = 0.0 if events else AWAIT_S if is_busy else None
            heard = self._receive(wait_s)
            if heard is None:
                return
            payloads = heard

    def _obey(self, engine: Engine, command: _Command) -> bool:
        """Do as told; False: to end."""
        match command:
            case _SubmitFrame():
                plan = plans.decode(command.plan)
                self._plan_id = plan.plan_id
                engine.submit(plan, command.requests)
            case _ReceiveFrame():
                engine.receive(command.handle)
            case _CancelFrame():
                engine.cancel(command.request_id)
            case _CheckFrame():
                self._send(_CheckedFrame(_integrity_error(engine)))
            case _CloseFrame():
                return False
        return True

    def _receive(self, wait_s: float | None) -> list[bytes] | None:
        """Frames that came within wait_s; None: the parent is gone."""
        if not select.select([self._socket], (), (), wait_s)[0]:
            return []
        received = self._socket.recv(_READ_BYTES)
        return self._frames.feed(received) if received else None

    def _send(self, answer: _Answer) -> None:
        payload = msgspec.msgpack.encode(answer)
        self._socket.sendall(_LENGTH.pack(len(payload)) + payload)
        self._said_s = time.monotonic()


def _integrity_error(engine: Engine) -> str:
    """What an engine that can check its books finds wrong in them; "" for nothing."""
    try:
        getattr(engine, "check_integrity", lambda: None)()
    except AssertionError as error:
        return str(error) or "its books are wrong"
    return ""


def main() -> int:
    """Entry of the child. The parent decides when it ends, not the terminal's Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            return _Child(connection).serve()
        except (BrokenPipeError, ConnectionResetError):
            return 0


if __name__ == "__main__":
    sys.exit(main())
