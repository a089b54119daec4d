"""The requests on an instance, and the sessions in which TurboMind computes them."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from sagec.runtime.engines import EngineError
from sagec.runtime.engines.turbomind.abi import INSTANCE_SHIFT
from sagec.runtime.engines.turbomind.loading import Loaded, submit_session
from sagec.runtime.engines.turbomind.native import Bytes, Move, NativeInstance
from sagec.runtime.engines.turbomind.rows import Row, check_sampling
from sagec.runtime.engines.turbomind.sessions import Session
from sagec.runtime.request import Request
from sagec.runtime.row import Intake

Then = Callable[[], None]


class Residents:
    """Rows by request id; a row that computes has a session, of which the native side speaks.

    layout: what the KV blobs of this instance carry. A session that is told to end goes on until
    TurboMind hears of it; what it samples meanwhile is still its row's.
    """

    def __init__(self, loaded: Loaded, native: NativeInstance, intake: Intake, layout: int) -> None:
        self._loaded, self._native, self._intake, self._layout = loaded, native, intake, layout
        self._rows: dict[str, Row] = {}
        self._of_session: dict[int, Row] = {}
        self._then: dict[int, Then | None] = {}
        self._holding: set[int] = set()
        self._over: list[Session] = []
        self._expected: dict[str, int] = {}
        self._numbers = itertools.count((native.number << INSTANCE_SHIFT) + 1)
        self._ended: deque[Session] = deque()  # written by TurboMind's threads

    @property
    def rows(self) -> Mapping[str, Row]:
        """The requests here, by id."""
        return self._rows

    @property
    def owes(self) -> bool:
        """Whether a session was told to end, and somebody is to be told when it has."""
        return any(then is not None for then in self._then.values())

    @property
    def are_idle(self) -> bool:
        """Whether TurboMind has none of them."""
        return not self._of_session

    def of_session(self, session: int) -> Row | None:
        """The row that a session computes, or computed until it was told to end."""
        return self._of_session.get(session)

    def here(self, session: int) -> Row | None:
        """The row of a session, if it is not yet done, gone or started over."""
        row = self._of_session.get(session)
        return None if row is None or row.gone else row

    def session_for(self, id: str) -> int:
        """By which a plan names the request; one that is still to come will get it."""
        if row := self._rows.get(id):
            return row.session
        return self._expected.setdefault(id, next(self._numbers))

    def expect_nobody(self) -> None:
        """Forget numbers that were given for requests to come: a newer plan gives others."""
        self._expected.clear()

    def add(self, request: Request, output: tuple[int, ...] = ()) -> Row:
        """A row for `request`, without a session; what was here of it before is dropped.

        Raises Refused where it cannot be served here.
        """
        if older := self._rows.get(request.id):
            self.drop(older)
        session = self._expected.pop(request.id, None) or next(self._numbers)
        check_sampling(request)
        fields = self._intake.fields(request, output)
        row = self._rows[request.id] = Row(**fields, session=session)
        return row

    def drop(self, row: Row, then: Then | None = None) -> None:
        """Forget the row; `then` is done when TurboMind holds nothing of it any more."""
        del self._rows[row.id]
        row.gone = True
        self.forget_kept(row)
        self.end(row, then)

    def begin(self, row: Row, *, leaves: bool, blob: Bytes | None = None) -> None:
        """Let TurboMind have the row, with the KV of `blob` or what is kept of it, if any.

        leaves: it goes to another instance when its first token is sampled, with its KV.

        Raises NativeError where the blob is refused, EngineError where TurboMind would not answer.
        """
        moves = []
        if row.kept is not None:
            blob = bytearray(row.kept.num_bytes)
            self._native.take_export(row.kept.session, blob)
            row.computed, row.kept = row.kept.tokens, None
        if blob is not None:
            moves.append(Move(row.session, blob, self._layout))
        if leaves:
            moves.append(Move(row.session))
        if moves:
            self._native.migrate(moves)
        try:
            row.live = submit_session(
                self._loaded,
                row.session,
                row.tokens,
                1 if leaves else row.longest(leaves) - row.num_tokens,
                row.request.sampling,
                row.watched,
                self._ended.append,
            )
        except EngineError:
            self._native.forget(row.session)
            raise
        self._of_session[row.session] = row

    def end(self, row: Row, then: Then | None, *, keeps_kv: bool = False) -> None:
        """Tell the row's session to end; `then` is done when it has, or now where there is none.

        keeps_kv: its KV is kept in host memory. The row may begin again after that, under another
        number. A session that was told to end already gets another `then`.
        """
        if row.live is not None:
            if keeps_kv:
                self._native.migrate([Move(row.session)])
            row.live.cancel()
            self._native.wake()
            row.ending = row.session
            row.live, row.session = None, next(self._numbers)
        if row.ending is not None:
            self._then[row.ending] = then
        elif then is not None:
            then()

    def forget_kept(self, row: Row) -> None:
        """Free the row's KV in host memory."""
        if row.kept is not None:
            self._native.forget(row.kept.session)
            row.kept = None

    def hold(self, session: int) -> None:
        """TurboMind has KV of the session: it is not over before it is erased, on all ranks."""
        self._holding.add(session)

    def erase(self, session: int) -> None:
        """No rank has anything of the session any more."""
        self._holding.discard(session)

    def take_ended(self) -> bool:
        """Whether sessions have ended: what rank 0 had to say of them can be read now."""
        self._over += [self._ended.popleft() for _ in range(len(self._ended))]
        return bool(self._over)

    def settle_ended(self) -> Iterator[tuple[Row, Session]]:
        """Do what was to be done when a session is over; those that nobody told to end."""
        over = [session for session in self._over if session.number not in self._holding]
        self._over = [session for session in self._over if session.number in self._holding]
        for session in over:
            row = self._of_session.pop(session.number)
            if row.kept is None or row.kept.session != session.number:
                self._native.forget(session.number)
            row.computed, row.ending = 0, None
            if session.number not in self._then:
                row.live, row.session = None, next(self._numbers)
                yield row, session
            elif then := self._then.pop(session.number):
                then()

    def close(self) -> None:
        """Tell all sessions to end."""
        for row in list(self._rows.values()):
            self.drop(row)
