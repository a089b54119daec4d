"""A request on an engine instance: its tokens so far, and when its output ends.

What every engine that samples tokens shares; each adds where its KV is.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sagec.runtime.request import FinishReason, Request
from sagec.runtime.text import StopStrings, TokenizerFile


class Refused(ValueError):
    """A request that this instance cannot serve; says why."""


@dataclass(slots=True, eq=False, kw_only=True)
class RequestRow:
    """One resident request.

    tokens: prompt, then output. computed: how many of the first tokens have KV here. reused: tokens
    found in the prefix cache and not told yet. max_tokens: of prompt and output, as the client and
    the model bound them; room_tokens: what this instance can hold.
    """

    request: Request
    stops: Collection[int]
    max_tokens: int
    room_tokens: int
    stop_strings: StopStrings | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
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

    def longest(self, leaves: bool) -> int:
        """Tokens of prompt and output that it may have here.

        leaves: its KV goes to another instance, so that the room here is no bound.
        """
        return self.max_tokens if leaves else min(self.max_tokens, self.room_tokens)

    def append(self, token: int, leaves: bool = False) -> FinishReason | None:
        """Take a sampled token, unless it is a stop token; why the request ends now, if it does."""
        if token in self.stops:
            return FinishReason.STOP
        longest = self.longest(leaves)
        if len(self.tokens) >= longest:
            return FinishReason.LENGTH
        self.tokens.append(token)
        if self.stop_strings is not None and self.stop_strings.push(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= longest else None


@dataclass(frozen=True)
class Intake:
    """What an instance makes of requests.

    room_tokens: of the longest request that it holds. max_tokens: of the longest that the model
    takes, on an instance with more room too; None where that is not known.
    """

    vocab: int
    eos_tokens: tuple[int, ...]
    room_tokens: int
    tokenizer: TokenizerFile
    max_tokens: int | None = None

    def fields(self, request: Request, output: tuple[int, ...]) -> dict[str, Any]:
        """Those of a RequestRow for `request`, without KV.

        Raises Refused where it cannot be served here, whatever room there is now.
        """
        self._check(request)
        stop_strings = self._stop_strings(request)
        if stop_strings is not None:
            resumed = request.prompt[len(request.prompt) - request.resumed_tokens :]
            for token in (*resumed, *output):
                stop_strings.push(token)
        return {
            "request": request,
            "stops": frozenset(request.stop_tokens + self.eos_tokens),
            "max_tokens": self._longest(request),
            "room_tokens": self.room_tokens,
            "stop_strings": stop_strings,
            "tokens": [*request.prompt, *output],
        }

    def _check(self, request: Request) -> None:
        if not request.prompt:
            raise Refused("the prompt is empty; it needs a token at least")
        if min(request.prompt) < 0 or max(request.prompt) >= self.vocab:
            bad = next(token for token in request.prompt if not 0 <= token < self.vocab)
            raise Refused(
                f"prompt token {bad} is not in [0, {self.vocab}); another model's tokenizer?"
            )
        if len(request.prompt) >= self.room_tokens:
            raise Refused(
                f"a prompt of {len(request.prompt)} tokens leaves no room for an answer in "
                f"{self.room_tokens} tokens of context"
            )
        if request.adapter:
            raise Refused(f"adapter {request.adapter!r}: this engine serves the model alone")

    def _longest(self, request: Request) -> int:
        if request.max_output_tokens is None:
            return self.room_tokens if self.max_tokens is None else self.max_tokens
        asked = len(request.prompt) + request.max_output_tokens
        return asked if self.max_tokens is None else min(self.max_tokens, asked)

    def _stop_strings(self, request: Request) -> StopStrings | None:
        if not request.stop_strings:
            return None
        if "" in request.stop_strings:
            raise Refused("an empty stop string would stop before the first token; leave it out")
        try:
            return StopStrings(self.tokenizer.tokenizer, request.stop_strings)
        except ValueError as error:
            raise Refused(str(error)) from None
