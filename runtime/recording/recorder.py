"""Recorder: hears what a loop hears and says, and appends it to a file."""

import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sagec.runtime import engines, loop
from sagec.runtime.clock import Clock
from sagec.runtime.recording import entries
from sagec.runtime.recording.columns import all_kinds, pack
from sagec.runtime.recording.files import RotatingFile
from sagec.runtime.recording.frames import (
    ENTRIES,
    FIRST_LINE,
    HEADER,
    KEYFRAME,
    ROUND,
    RecordingError,
    framed,
)
from sagec.runtime.recording.rounds import ENCODER, RoundWriter
from sagec.runtime.request import Request

FLUSH_S = 1.0
"""Without a round, what was heard is written after so long."""

HEARD_LIMIT = 65536
"""So much is heard without a Wait before it is written down in any case."""

_log = logging.getLogger(__name__)


_CANNOT_HOLD = (TypeError, ValueError, OverflowError)
"""What msgpack raises: for a strategy's memory of other things than numbers and strings, for text
that is none."""


class _Live(NamedTuple):
    """A request that is being served, and its number."""

    number: int
    request: Request


class Recorder:
    """Appends every round, and what happened between rounds, to a file; a watcher of a loop.

    `hear` only keeps what it hears until the loop waits: by then the round's plans are on their
    way, and recording delays none of them. Then a round is one write, with all that came before it.
    A crash of this process loses what was heard since the last write: no round whose plans an
    engine has reported on, and at most FLUSH_S of what came after it.

    Where the file cannot be written, serving goes on: `lost_rounds` counts, `error` says why until
    writing works again, and one line is logged. The recording then goes on with a keyframe.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: entries.Header,
        clock: Clock,
        *,
        rotate_bytes: int = 256 << 20,
        keep_files: int = 8,
        keyframe_rounds: int = 512,
        retry_s: float = 1.0,
        name: str = "",
    ) -> None:
        """clock: the loop's. A file of rotate_bytes becomes FILE.1, that FILE.2, up to keep_files;
        so does a recording that is there already. Every keyframe_rounds a round is written with
        all it needs. retry_s: after a failure to write, how long until the next attempt. name: of
        the recording, which then has nothing of the wall's time in it, so that a simulated run is
        recorded to the same bytes again; "": one that no other has.

        Raises OSError where the file cannot be opened, RecordingError where it is something else.
        """
        for option, value in (("keep_files", keep_files), ("keyframe_rounds", keyframe_rounds)):
            if value < 1:
                raise RecordingError(f"{option} {value}: 1 or more")
        self.rounds = self.lost_rounds = self.written_bytes = 0
        self.error = ""
        self._clock, self._header = clock, _begun(header, clock, name)
        self._named = bool(name)
        self._rotate_bytes, self._full_bytes = rotate_bytes, rotate_bytes
        self._keyframe_rounds = keyframe_rounds
        self._retry_s, self._failed_s = retry_s, 0.0
        self._heard: list[Any] = []
        self._tokens: list[loop.Token] = []
        self._entries: list[entries.Entry] = []
        self._frames: list[bytes] = []
        self._pending_rounds = self._gap_rounds = 0
        self._live: dict[str, _Live] = {}
        self._refused: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        self._num_came = 0
        self._writer: RoundWriter | None = None
        self._since_keyframe = 0
        self._write_by_type = self._writers()
        self._file = RotatingFile(Path(path), keep_files)
        self._begins, self._closed = True, False
        self._written_s = self._now_s()
        self._write()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hear(self, said: object) -> None:
        """Keep what a loop hears or says; where it waits, write it down. Deaf once it is closed."""
        if self._closed:
            return
        self._heard.append(said)
        if type(said) is loop.Wait or len(self._heard) >= HEARD_LIMIT:
            self._settle()

    def close(self) -> None:
        """Write what is left, and close the file; once."""
        if not self._closed:
            self._settle()
            self._write()
            self._file.close()
            self._closed = True

    def _now_s(self) -> float:
        """By which writes are spaced: the wall's time, unless none of it is to be seen."""
        return self._clock.now_us() / 1e6 if self._named else time.monotonic()

    # What is heard, as entries.

    def _writers(self) -> dict[type, Callable[[Any], None]]:
        return {
            loop.Token: self._tokens.append,
            engines.StepReport: self._stepped,
            loop.Planned: self._planned,
            loop.Arrived: self._arrived,
            loop.Refused: self._was_refused,
            loop.Finished: self._finished,
            loop.CancelRequested: self._cancel_requested,
            loop.Joined: self._joined,
            loop.Retried: self._retried,
            engines.KVImported: self._imported,
            engines.Preempted: self._preempted,
            engines.Failed: self._failed,
        }

    def _settle(self) -> None:
        """Turn what was heard into frames; write them where there is a round, or after a while."""
        heard, self._heard = self._heard, []
        for said in heard:
            if write := self._write_by_type.get(type(said)):
                write(said)
        self._bundle_tokens()
        waited_s = self._now_s() - self._written_s
        if self._pending_rounds or (self._entries and waited_s >= FLUSH_S):
            self._write()

    def _arrived(self, event: loop.Arrived) -> None:
        request, number = event.request, self._num_came
        self._num_came += 1
        if request.id in self._live:
            self._refused[request.id] = number
        else:
            self._live[request.id] = _Live(number, request)
            self._numbers[request.id] = number
        self._entries.append(self._came(number, request))

    def _came(self, number: int, request: Request) -> entries.Came:
        prompt = pack(np.array(request.prompt, np.int64)) if self._header.prompts else None
        return entries.Came(
            number=number,
            request=msgspec.structs.replace(request, prompt=()),
            prompt_tokens=len(request.prompt),
            prompt=prompt,
        )

    def _was_refused(self, said: loop.Refused) -> None:
        if (number := self._refused.pop(said.request_id, None)) is not None:
            self._entries.append(entries.Refused(number, said.detail))

    def _finished(self, said: loop.Finished) -> None:
        self._bundle_tokens()
        self._live.pop(said.request_id, None)
        if (number := self._numbers.pop(said.request_id, None)) is not None:
            self._entries.append(entries.Ended(number, said.reason, said.detail, said.report))

    def _bundle_tokens(self) -> None:
        """Tokens that came one by one, as one entry."""
        numbers = self._numbers
        tokens = [token for token in self._tokens if token.request_id in numbers]
        self._tokens.clear()
        if not tokens:
            return
        times = [token.time_us for token in tokens]
        self._entries.append(
            entries.Tokens(
                time_us=times[0] if times.count(times[0]) == len(times) else times,
                numbers=[numbers[token.request_id] for token in tokens],
                indices=[token.index for token in tokens],
                tokens=[token.token for token in tokens] if self._header.tokens else [],
            )
        )

    def _stepped(self, report: engines.StepReport) -> None:
        numbers = self._numbers
        self._entries.append(
            entries.Step(
                instance=report.instance,
                plan_id=report.plan_id,
                step=report.step,
                begin_us=report.begin_us,
                end_us=report.end_us,
                kv_blocks_used=report.kv_blocks_used,
                decodes=len(report.decodes),
                chunks=tuple((numbers[r], b, e) for r, b, e in report.chunks if r in numbers),
                reused=tuple((numbers[r], n) for r, n in report.reused if r in numbers),
                steps=report.steps,
                advanced=tuple((numbers[r], i, n) for r, i, n in report.advanced if r in numbers),
                deviations=tuple(
                    (numbers[r], p, c) for r, p, c in report.deviations if r in numbers
                ),
                decided_by=report.decided_by,
            )
        )

    def _imported(self, event: engines.KVImported) -> None:
        if (number := self._numbers.get(event.request_id)) is not None:
            self._entries.append(
                entries.Moved(
                    number=number,
                    source=event.source,
                    target=event.instance,
                    num_bytes=event.num_bytes,
                    begin_us=event.begin_us,
                    end_us=event.end_us,
                )
            )

    def _preempted(self, event: engines.Preempted) -> None:
        if (number := self._numbers.get(event.request_id)) is not None:
            now_us = self._clock.now_us()
            self._entries.append(
                entries.Preempted(number, event.instance, event.kept_tokens, now_us)
            )

    def _failed(self, event: engines.Failed) -> None:
        number = self._numbers.get(event.request_id or "")
        if number is not None or event.request_id is None:
            now_us = self._clock.now_us()
            self._entries.append(entries.Failed(event.instance, number, event.error, now_us))

    def _retried(self, said: loop.Retried) -> None:
        if (number := self._numbers.get(said.request_id)) is not None:
            now_us = self._clock.now_us()
            self._entries.append(
                entries.Retried(number, said.instance, said.error, said.attempt, now_us)
            )

    def _joined(self, event: loop.Joined) -> None:
        self._entries.append(entries.Joined(event.instance, self._clock.now_us()))

    def _cancel_requested(self, event: loop.CancelRequested) -> None:
        if (number := self._numbers.get(event.request_id)) is not None:
            self._entries.append(entries.Cancelling(number, self._clock.now_us()))

    # Rounds.

    def _planned(self, planned: loop.Planned) -> None:
        self._bundle_tokens()
        if self._file.size_bytes >= self._full_bytes and not self._begins:
            self._rotate()
        self._pending_rounds += 1
        if not self._may_write():
            return
        if self._writer is None or self._since_keyframe >= self._keyframe_rounds:
            self._writer, self._since_keyframe = RoundWriter(), 0
        kind = ROUND if self._since_keyframe else KEYFRAME
        self._since_keyframe += 1
        try:
            self._close_entries()
            payload = ENCODER.encode(self._writer.frame(planned, self._numbers))
        except _CANNOT_HOLD as error:
            self._lose(f"a recording cannot hold it: {error}")
        else:
            self._frames.append(framed(kind, payload))

    # The file.

    def _may_write(self) -> bool:
        """Whether writing works, or it is time to try it again."""
        return not self.error or self._now_s() - self._failed_s >= self._retry_s

    def _write(self) -> None:
        """Write all there is in one piece."""
        if not self._may_write():
            self._drop()
            return
        try:
            self._close_entries()
            beginning = self._beginning() if self._begins else b""
            content = b"".join([beginning, *self._frames])
            self._file.append(content)
        except OSError as error:
            self._lose(error.strerror or str(error))
            return
        except _CANNOT_HOLD as error:
            self._lose(f"a recording cannot hold it: {error}")
            return
        if self.error:
            path, rounds = self._file.path, self._gap_rounds
            _log.warning("recording to %s goes on after %s lost rounds", path, rounds)
        if self._begins:
            # However many requests are being served, half of a file is not its beginning.
            self._full_bytes = max(self._rotate_bytes, 2 * len(beginning))
        self.error, self._begins = "", False
        self.rounds += self._pending_rounds
        self.written_bytes += len(content)
        self._pending_rounds = self._gap_rounds = 0
        self._frames.clear()
        self._written_s = self._now_s()

    def _close_entries(self) -> None:
        """The entries so far as a frame, so that a round can follow them."""
        if self._entries:
            self._frames.append(framed(ENTRIES, ENCODER.encode(self._entries)))
            self._entries = []

    def _beginning(self) -> bytes:
        """What a file begins with, or goes on with after a gap: who is being served."""
        parts = []
        if not self._file.size_bytes:
            parts = [FIRST_LINE, framed(HEADER, ENCODER.encode(self._header))]
        known: list[entries.Entry] = []
        if self._gap_rounds:
            known.append(entries.Gap(self._gap_rounds, self.error))
        known += [self._came(live.number, live.request) for live in self._live.values()]
        if known:
            parts.append(framed(ENTRIES, ENCODER.encode(known)))
        return b"".join(parts)

    def _rotate(self) -> None:
        """Begin a new file, which can be read without the others."""
        self._write()
        try:
            self._file.rotate()
        except (OSError, RecordingError) as error:
            _log.warning("recording to %s grows beyond its size: %s", self._file.path, error)
            self._full_bytes = self._file.size_bytes + self._rotate_bytes
            return
        part = self._header.part + 1
        self._header = msgspec.structs.replace(self._header, part=part)
        self._begins, self._writer = True, None

    def _lose(self, error: str) -> None:
        """What was to be written is lost; the next that is written is a keyframe."""
        if not self.error:
            _log.error("recording to %s fails, serving goes on: %s", self._file.path, error)
        self.error, self._failed_s = error, self._now_s()
        self._drop()

    def _drop(self) -> None:
        self.lost_rounds += self._pending_rounds
        self._gap_rounds += self._pending_rounds
        self._pending_rounds = 0
        self._entries = []
        self._frames.clear()
        self._begins, self._writer = True, None


def _begun(header: entries.Header, clock: Clock, name: str) -> entries.Header:
    """The header of a recording that begins now."""
    header = msgspec.structs.replace(header, begun_us=clock.now_us(), tables=all_kinds())
    if name:
        return msgspec.structs.replace(header, recording=name)
    return msgspec.structs.replace(
        header, recording=secrets.token_hex(8), begun_unix_us=time.time_ns() // 1000
    )
