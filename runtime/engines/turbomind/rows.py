"""A request on this instance, and the TurboMind session that computes it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from sagec.runtime.engines import KVHandle
from sagec.runtime.engines.torch.text import StopStrings, TokenizerFile
from sagec.runtime.engines.turbomind.native_events import Exported
from sagec.runtime.engines.turbomind.sessions import Session
from sagec.runtime.request import FinishReason, Request

MAX_TOP_K = 1024
"""TurboMind's own threads die of a larger one."""

MAX_STOP_TOKENS = 32
"""That TurboMind looks out for; a request may have more, and is ended by its row then."""


class Refused(ValueError):
    """A request that this instance cannot serve; says why."""


@dataclass(slots=True, eq=False)
class Row:
    """One resident request.

    session: by which plans name it; another one when its session is told to end, or has ended.
    live: that session, while TurboMind has it. ending: one that was told to end and has not yet.
    tokens: prompt, then output. computed: how many of the first have KV in its blocks. kept: its KV
    in host memory, of a session that is over. arrived: KV of another instance, that its session
    begins with. reused: tokens found in the prefix cache and not told yet. max_tokens: of prompt
    and output, as the client and the model bound them; room_tokens: what this instance can hold.
    """

    request: Request
    session: int
    stops: Collection[int]
    max_tokens: int
    room_tokens: int
    stop_strings: StopStrings | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    live: Session | None = None
    ending: int | None = None
    kept: Exported | None = None
    arrived: KVHandle | None = None
    reused: int = 0

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    @property
    def output(self) -> tuple[int, ...]:
        """Tokens sampled so far."""
        return tuple(self.tokens[len(self.request.prompt) :])

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        """How many tokens were sampled."""
        return len(self.tokens) - len(self.request.prompt)

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

    def longest(self, leaves: bool) -> int:
        """Tokens of prompt and output that it may have here.

        leaves: its KV goes to another instance, so that the room here is no bound.
        """
        return self.max_tokens if leaves else min(self.max_tokens, self.room_tokens)

    def append(self, token: int, leaves: bool = False) -> FinishReason | None:
        """Take a sampled token, unless it is a stop token; why the request ends now, if it does."""
        if token in self.stops:
            return FinishReason.STOP
        if len(self.tokens) >= self.longest(leaves):
            return FinishReason.LENGTH
        self.tokens.append(token)
        if self.stop_strings is not None and self.stop_strings.push(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.longest(leaves) else None


@dataclass(frozen=True)
class Intake:
    """What this instance makes of requests. max_context_tokens: of the longest that it holds."""

    vocab: int
    eos_tokens: tuple[int, ...]
    max_context_tokens: int
    tokenizer: TokenizerFile

    def row(self, request: Request, session: int, output: tuple[int, ...] = ()) -> Row:
        """A row for `request`, without KV. Raises Refused where it cannot be served here."""
        self._check(request)
        longest = self.max_context_tokens
        if request.max_output_tokens is not None:
            longest = len(request.prompt) + request.max_output_tokens
        stop_strings = self._stop_strings(request)
        if stop_strings is not None:
            resumed = request.prompt[len(request.prompt) - request.resumed_tokens :]
            for token in (*resumed, *output):
                stop_strings.push(token)
        return Row(
            request=request,
            session=session,
            stops=frozenset(request.stop_tokens + self.eos_tokens),
            max_tokens=longest,
            room_tokens=self.max_context_tokens,
            stop_strings=stop_strings,
            tokens=[*request.prompt, *output],
        )

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise Refused("the prompt is empty; it needs a token at least")
        if bad := [token for token in request.prompt if not 0 <= token < self.vocab]:
            raise Refused(
                f"prompt token {bad[0]} is not in [0, {self.vocab}); another model's tokenizer?"
            )
        if len(request.prompt) >= self.max_context_tokens:
            raise Refused(
                f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in "
                f"{self.max_context_tokens} tokens of context"
            )
        if request.sampling.top_k > MAX_TOP_K:
            raise Refused(f"top_k {request.sampling.top_k}; TurboMind has {MAX_TOP_K} at most")
        if request.adapter:
            raise Refused(f"adapter {request.adapter!r}: this engine serves the model alone")

    def _stop_strings(self, request: Request) -> StopStrings | None:
        if not request.stop_strings:
            return None
        if "" in request.stop_strings:
            raise Refused("an empty stop string would stop before the first token; leave it out")
        try:
            return StopStrings(self.tokenizer.tokenizer, request.stop_strings)
        except ValueError as error:
            raise Refused(str(error)) from None
