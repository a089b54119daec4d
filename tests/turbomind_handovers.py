"""Requests that move with their KV between two patched TurboMinds, under random decisions.

A journey is a request with its legs: on which instance it stays for how many questions, and what
becomes of its KV on the way to the next. Whatever that is, its tokens are those of the reference.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from sagec.runtime.engines.turbomind import abi
from sagec.runtime.engines.turbomind.native import Move, NativeError
from sagec.runtime.engines.turbomind.native_events import Erased, Exported, Imported, NotImported
from sagec.runtime.engines.turbomind.sessions import SessionStatus
from tests.turbomind_driven import Driven, Session, exact, text
from tests.turbomind_random import Answers, blocks_of, instance_of

FATES = ("intact", "intact", "intact", "flipped", "cut", "lost", "late", "forgotten", "nobody")
"""What becomes of KV: it is staged; refused; not sent; staged when its request is there already;
staged and forgotten; or nobody wants the rest of the request."""

REFUSED = ("flipped", "cut")


@dataclass
class Journey:
    """A request on its way. legs: (questions that it stays, fate of its KV then), first one first;
    behind them it stays where it is until it ends.
    """

    prompt: list[int]
    num_tokens: int
    legs: list[tuple[int, str]]
    number_of_leg: int = 0
    leaves_at: int = 0
    session: Session | None = None
    is_over: bool = False


@dataclass
class Journeys:
    """All journeys of a case, and the two instances between which they go."""

    sides: list[Answers]
    draw: random.Random
    coming: list[tuple[int, Journey]]
    under_way: list[Journey] = field(default_factory=list)
    staged: list[tuple[Driven, Session, int]] = field(default_factory=list)
    refused: list[tuple[Driven, Session]] = field(default_factory=list)

    def play(self) -> None:
        """Answer both instances until all requests came and went."""
        turn = 0
        while self.coming or not all(journey.is_over for journey in self.under_way):
            turn += 1
            while self.coming and self.coming[0][0] <= turn:
                journey = self.coming.pop(0)[1]
                self.under_way.append(journey)
                self._begin_leg(journey, b"", [], "lost")
            for journey in self.under_way:
                if not journey.is_over:
                    self._go_on(journey)
            for side in self.sides:
                side.answer_next()

    def _side(self, journey: Journey) -> Answers:
        return self.sides[journey.number_of_leg % 2]

    def _go_on(self, journey: Journey) -> None:
        side, session = self._side(journey), journey.session
        assert session is not None
        if not session.is_running:
            self._end_leg(journey, session)
        elif 0 < journey.leaves_at <= side.num_questions:
            side.one.cancel(session)

    def _begin_leg(self, journey: Journey, blob: bytes, given: list[int], fate: str) -> None:
        """Start its next session, to which comes what is left of the blob."""
        side = self._side(journey)
        journey.leaves_at = 0
        if journey.number_of_leg < len(journey.legs):
            journey.leaves_at = side.num_questions + journey.legs[journey.number_of_leg][0]
        journey.session = session = side.one.expect(journey.prompt, journey.num_tokens, given)
        if journey.leaves_at:
            side.one.native.migrate([Move(session.id)])
        is_late = fate == "late"
        if is_late:
            side.one.start(session)
        if blob and fate != "lost":
            self._stage(side.one, session, blob, fate)
        if not is_late:
            side.one.start(session)

    def _stage(self, one: Driven, session: Session, blob: bytes, fate: str) -> None:
        at = self.draw.randrange(len(blob))
        if fate == "flipped":
            blob = blob[:at] + bytes([blob[at] ^ 1 << self.draw.randrange(8)]) + blob[at + 1 :]
        elif fate == "cut":
            blob = blob[:at]
        try:
            one.stage(session, blob)
        except NativeError:
            assert fate in (*REFUSED, "late")
            self.refused.append((one, session))
            return
        assert fate not in REFUSED, "altered KV was taken"
        if fate == "intact":
            self.staged.append((one, session, _tokens_of(blob)))
        elif fate == "forgotten":
            one.native.forget(session.id)

    def _end_leg(self, journey: Journey, session: Session) -> None:
        """It ended by itself, or left: then it goes on with its KV on the other instance."""
        one = self._side(journey).one
        if session.ended_by == SessionStatus.FINISHED:
            exact(session)
            journey.is_over = True
            return
        assert session.ended_by == SessionStatus.CANCELLED
        blob = _blob_left_by(one, session)
        fate = journey.legs[journey.number_of_leg][1]
        given = session.given + _sampled(one, session)
        journey.is_over = fate == "nobody" or len(given) == journey.num_tokens
        journey.number_of_leg += 1
        if not journey.is_over:
            self._begin_leg(journey, blob, given, fate)

    def check(self) -> None:
        """KV that was staged was imported as it was, or there was no room; KV that was refused
        was not."""
        for one, session, tokens in self.staged:
            if any(row.session == session.id for step in one.steps for row in step.rows):
                imported = [e.tokens for e in one.of(Imported) if e.session == session.id]
                whys = {e.why for e in one.of(NotImported) if e.session == session.id}
                assert imported == [tokens] or (not imported and whys == {abi.NO_ROOM}), session.id
        for one, session in self.refused:
            assert session.id not in {event.session for event in one.of(Imported)}


def run(case: dict[str, Any]) -> dict[str, int]:
    """Play a case; counters of both instances. Raises AssertionError where anything is wrong."""
    draw = random.Random(case["seed"])
    journeys = [
        Journey(text(shared, seed=0) + text(own, seed=number + 1), num_tokens, legs)
        for number, (_, shared, own, num_tokens, legs) in enumerate(case["requests"])
    ]
    times = [request[0] for request in case["requests"]]
    with instance_of(case) as a, instance_of(case) as b:
        sides = [Answers(one, draw, case["wild"], case["stalls"]) for one in (a, b)]
        played = Journeys(sides, draw, _by_time(times, journeys))
        played.play()
        roomy = blocks_of(request[1:4] for request in case["requests"]) <= case["kv_blocks"]
        for side in sides:
            side.check(roomy, case["step_tokens"])
        played.check()
        counters = [one.counters for one in (a, b)]
        return {name: sum(each[name] for each in counters) for name in counters[0]}


def _by_time(times: list[int], journeys: list[Journey]) -> list[tuple[int, Journey]]:
    return sorted(zip(times, journeys, strict=True), key=lambda pair: pair[0])


def _tokens_of(blob: bytes) -> int:
    """Tokens that a blob says it is of (kv_store.h)."""
    return int.from_bytes(blob[24:32], "little")


def _blob_left_by(one: Driven, session: Session) -> bytes:
    """The KV of a session that was cancelled, or nothing where it computed none.

    With several ranks the last one to erase it may come behind the end that rank 0 tells of.
    """

    def is_of_it(event: Exported | Erased) -> bool:
        return event.session == session.id

    if not any(row.session == session.id and row.end for step in one.steps for row in step.rows):
        return b""
    one.wait_for(lambda: any(map(is_of_it, one.of(Erased))))
    return one.take_export(session) if any(map(is_of_it, one.of(Exported))) else b""


def _sampled(one: Driven, session: Session) -> list[int]:
    """The tokens that the log says a session sampled."""
    rows = [row for step in one.steps for row in step.rows if row.session == session.id]
    return [row.token for row in rows if row.samples]
