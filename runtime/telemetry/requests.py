"""Which request is where, as far as somebody who listens can tell."""

import dataclasses

from sagec.runtime.engines import Cancelled, Failed, KVExported, KVImported, Preempted, StepReport
from sagec.runtime.loop import Arrived, Finished, Refused
from sagec.runtime.request import Request


@dataclasses.dataclass(slots=True)
class Known:
    """A request that has not ended. instance: where it runs; "" while it waits.

    since_us: when it came to where it is. token_us: when its last token came, 0 where none has.
    """

    request: Request
    instance: str = ""
    since_us: int = 0
    token_us: int = 0


class Ledger:
    """Live requests by id, kept up by listening; counts of the running by instance."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}
        self.running: dict[str, int] = {}

    @property
    def num_running(self) -> int:
        """Requests that an instance computes or holds."""
        return sum(self.running.values())

    @property
    def num_waiting(self) -> int:
        """Requests that no instance has."""
        return len(self.known) - self.num_running

    def hear(self, said: object) -> None:
        """Take note; what says nothing of a request's place is passed over."""
        match said:
            case StepReport():
                for request_id, _, _ in said.chunks:
                    self.place(request_id, said.instance, said.begin_us)
            case Arrived():
                request = said.request
                known = Known(request, since_us=request.arrival_us)
                self.known.setdefault(request.id, known)
            case KVImported():
                self.place(said.request_id, said.instance, said.end_us)
            case KVExported():
                self.place(said.handle.request.id, said.handle.target, said.end_us)
            case Preempted() | Cancelled():
                self._unplace(said.request_id, said.instance)
            case Failed():
                self._failed(said)
            case Finished():
                self.place(said.request_id, "", 0)
                self.known.pop(said.request_id, None)
            case Refused():
                pass  # the one of this id that is being served goes on
            case _:
                pass

    def place(self, request_id: str, instance: str, now_us: int) -> None:
        """The request is on this instance now; "": on none."""
        known = self.known.get(request_id)
        if known is None or known.instance == instance:
            return
        if known.instance:
            self.running[known.instance] -= 1
        if instance:
            self.running[instance] = self.running.get(instance, 0) + 1
        known.instance, known.since_us = instance, now_us

    def _unplace(self, request_id: str, instance: str) -> None:
        known = self.known.get(request_id)
        if known is not None and known.instance == instance:
            self.place(request_id, "", known.since_us)

    def _failed(self, said: Failed) -> None:
        if said.request_id is not None:
            self._unplace(said.request_id, said.instance)
            return
        for request_id, known in self.known.items():
            if known.instance == said.instance:
                self.place(request_id, "", known.since_us)
