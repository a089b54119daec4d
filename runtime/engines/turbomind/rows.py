"""A request on this instance, and the TurboMind session that computes it."""

from dataclasses import dataclass

from sagec.runtime.engines import KVHandle
from sagec.runtime.engines.turbomind.native_events import Exported
from sagec.runtime.engines.turbomind.sessions import Session
from sagec.runtime.request import Request
from sagec.runtime.row import Refused, RequestRow

MAX_TOP_K = 1024
"""TurboMind's own threads die of a larger one."""

MAX_STOP_TOKENS = 32
"""That TurboMind looks out for; a request may have more, and is ended by its row then."""


@dataclass(slots=True, eq=False, kw_only=True)
class Row(RequestRow):
    """One resident request.

    session: by which plans name it; another one when its session is told to end, or has ended.
    live: that session, while TurboMind has it. ending: one that was told to end and has not yet.
    kept: its KV in host memory, of a session that is over. arrived: KV of another instance, that
    its session begins with. gone: it is done or gone or started over, and nobody asks for it any
    more, though its session may still be at work.
    """

    session: int
    live: Session | None = None
    ending: int | None = None
    kept: Exported | None = None
    arrived: KVHandle | None = None
    gone: bool = False

    @property
    def held_tokens(self) -> int:
        """Of its first tokens, those whose KV is in TurboMind's blocks or kept in host memory."""
        return max(self.computed, self.kept_tokens)

    @property
    def decodes(self) -> bool:
        """Whether the next token takes a decode, its prompt being computed."""
        return self.num_output > 0 and self.num_tokens - self.held_tokens == 1

    @property
    def watched(self) -> list[int]:
        """Stop tokens that TurboMind itself ends the session at."""
        return sorted(self.stops)[:MAX_STOP_TOKENS]

    @property
    def can_begin(self) -> bool:
        """Whether no session of it is at work."""
        return self.live is None and self.ending is None

    @property
    def kept_tokens(self) -> int:
        """Of its first tokens, those whose KV is in host memory."""
        return 0 if self.kept is None else self.kept.tokens


def check_sampling(request: Request) -> None:
    """Raise Refused where TurboMind would die of what the request asks."""
    if request.sampling.top_k > MAX_TOP_K:
        raise Refused(f"top_k {request.sampling.top_k}; TurboMind has {MAX_TOP_K} at most")
