"""The door of a service: what clients say waits here until the loop hears it, if there is room."""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from sagec.runtime.loop import Arrived, CancelRequested, Closed, Input, PlanCancelRequested, Refused
from sagec.runtime.request import Request

Load = tuple[int, int]
"""How many requests wait, and the tokens of their prompts."""


class Intake:
    """Takes requests in, now or at their time, and refuses those that find too many waiting.

    Any thread may call `submit`, `cancel`, `cancel_plan` and `close`; the rest is the server's.
    """

    def __init__(self, max_waiting: int | None = None, max_waiting_tokens: int | None = None):
        """max_waiting: requests; max_waiting_tokens: of their prompts; None: no bound.

        Raises ValueError for bounds under which nobody would ever be served.
        """
        self._bounds = {"max_waiting": max_waiting, "max_waiting_tokens": max_waiting_tokens}
        for name, bound in self._bounds.items():
            if bound is not None and bound < 1:
                raise ValueError(f"{name} {bound}: 1 or more, or None for no bound")
        self._lock = threading.Lock()
        self._said: deque[Input] = deque()
        self._unheard: dict[str, int] = {}  # submitted and not yet taken: prompt tokens
        self._expected: list[Request] = []  # the next one last
        self._forgone: set[str] = set()  # expected requests that were cancelled already
        self._refused: list[Refused] = []
        self._answered: deque[Refused] = deque()
        self._takes_more = self._owes_closed = False
        self._load: Callable[[], Load] = _nobody
        self._taken: Load = (0, 0)  # what the loop is about to hear
        self._bell: tuple[socket.socket, socket.socket] | None = None

    def open(
        self,
        requests: Iterable[Request],
        begin_us: int,
        load: Callable[[], Load],
        takes_more: bool,
    ) -> None:
        """Begin a service. requests: each comes arrival_us after `begin_us`.

        load: what waits in the loop. takes_more: requests may be submitted until `close`.
        """
        arrivals = [
            msgspec.structs.replace(request, arrival_us=begin_us + request.arrival_us)
            for request in requests
        ]
        self.shut()
        self._expected = sorted(arrivals, key=lambda request: request.arrival_us)[::-1]
        self._load, self._takes_more, self._owes_closed = load, takes_more, True
        self._bell = socket.socketpair()
        for end in self._bell:
            end.setblocking(False)

    def shut(self) -> None:
        """End the service; what nobody has taken is forgotten."""
        self.close()
        for waiting in (self._said, self._unheard, self._expected, self._forgone, self._refused):
            waiting.clear()
        bell, self._bell = self._bell, None
        for end in bell or ():
            end.close()

    def submit(self, request: Request, now_us: int, is_live: bool) -> Refused | None:
        """Take a request in, as of now; or say why not.

        is_live: whether the loop serves one of this id.
        """
        with self._lock:
            refused = self._refusal(request, is_live)
            if refused is None:
                self._unheard[request.id] = len(request.prompt)
                self._said.append(Arrived(msgspec.structs.replace(request, arrival_us=now_us)))
            else:
                self._answered.append(refused)
        self._ring()
        return refused

    def cancel(self, request_id: str) -> None:
        """A client no longer wants an answer; of a request that is still to come neither."""
        if any(request.id == request_id for request in self._expected):
            self._forgone.add(request_id)
        self._said.append(CancelRequested(request_id))
        self._ring()

    def cancel_plan(self, plan_id: str) -> None:
        """A plan is to stop."""
        self._said.append(PlanCancelRequested(plan_id))
        self._ring()

    def close(self) -> None:
        """Take no more requests in; those that were are served to their ends."""
        with self._lock:
            self._takes_more = False
        self._ring()

    def holds(self, request_id: str) -> bool:
        """Whether a request was submitted that the loop has not heard of."""
        return request_id in self._unheard

    def take(self, now_us: int, again: bool = False) -> list[Input]:
        """What the loop is to hear now. again: it has not heard yet what was taken last."""
        if not again:
            self._taken = (0, 0)
        is_closed = not self._takes_more  # read first: what was submitted before is taken below
        if not self._said and not self._owes_closed:
            return []
        inputs = [self._said.popleft() for _ in range(len(self._said))]
        arrived = [said.request for said in inputs if isinstance(said, Arrived)]
        if self._expected and self._expected[-1].arrival_us <= now_us:
            inputs += self._due(now_us, arrived)
        for request in arrived:
            self._unheard.pop(request.id, None)
        if self._owes_closed and is_closed and not self._expected:
            self._owes_closed = False
            inputs.append(Closed())
        came = [len(said.request.prompt) for said in inputs if isinstance(said, Arrived)]
        self._taken = self._taken[0] + len(came), self._taken[1] + sum(came)
        return inputs

    def take_refused(self) -> list[Refused]:
        """Requests of `open` whose time came when too many waited."""
        refused, self._refused = self._refused, []
        return refused

    def take_answered(self) -> list[Refused]:
        """Requests that `submit` refused, for whoever else wants to know."""
        if not self._answered:
            return []
        return [self._answered.popleft() for _ in range(len(self._answered))]

    @property
    def has_refused(self) -> bool:
        """Whether `take_refused` has something to say."""
        return bool(self._refused)

    @property
    def next_us(self) -> int | None:
        """When the next request comes that is known of; None: there is none."""
        return self._expected[-1].arrival_us if self._expected else None

    @property
    def bell(self) -> socket.socket | None:
        """Becomes readable when something was said; None while there is no service."""
        return self._bell[0] if self._bell else None

    def silence(self) -> None:
        """The bell was heard."""
        if self._bell is not None:
            with contextlib.suppress(BlockingIOError):
                while self._bell[0].recv(64):
                    pass

    def _due(self, now_us: int, arrived: list[Request]) -> list[Input]:
        """Expected requests whose time has come and that find room beside those just arrived."""
        inputs: list[Input] = []
        tokens = sum(len(request.prompt) for request in arrived)
        more = self._taken[0] + len(arrived), self._taken[1] + tokens
        while self._expected and self._expected[-1].arrival_us <= now_us:
            request = self._expected.pop()
            if detail := self._crowd(request, more):
                self._refused.append(Refused(request.id, detail, for_now=True))
                continue
            more = more[0] + 1, more[1] + len(request.prompt)
            inputs.append(Arrived(request))
            if request.id in self._forgone:
                self._forgone.discard(request.id)
                inputs.append(CancelRequested(request.id))
        return inputs

    def _refusal(self, request: Request, is_live: bool) -> Refused | None:
        if not self._takes_more:
            return Refused(request.id, "the intake is closed: no more requests are taken in")
        if is_live or request.id in self._unheard:
            return Refused(request.id, f"request {request.id!r} is being served")
        unheard = len(self._unheard), sum(self._unheard.values())
        if detail := self._crowd(request, unheard):
            return Refused(request.id, detail, for_now=True)
        return None

    def _crowd(self, request: Request, more: Load) -> str:
        """What is too much for this request to be taken in, more having come than the loop knows.

        Where nobody waits, a prompt of any length is taken in.
        """
        if self._bounds["max_waiting"] is None and self._bounds["max_waiting_tokens"] is None:
            return ""
        load = self._load()
        count, tokens = load[0] + more[0], load[1] + more[1]
        bound = self._bounds["max_waiting"]
        if bound is not None and count >= bound:
            return f"{count} requests wait already; max_waiting is {bound}"
        bound, prompt = self._bounds["max_waiting_tokens"], len(request.prompt)
        if bound is not None and count and tokens + prompt > bound:
            wait = f"prompts of {tokens} tokens wait already, and this one has {prompt}"
            return f"{wait}; max_waiting_tokens is {bound}"
        return ""

    def _ring(self) -> None:
        """Wake the server; a bell that is full or gone needs no ringing."""
        if (bell := self._bell) is not None:
            with contextlib.suppress(OSError):
                bell[1].send(b"\0")


def _nobody() -> Load:
    return 0, 0
