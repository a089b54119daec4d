"""A request on this instance: its tokens, and how many of them have KV here."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from sagec.runtime.engines.torch.text import StopStrings
from sagec.runtime.kv.prefix_cache import Prefix
from sagec.runtime.request import FinishReason, Request


@dataclass(slots=True)
class Row:
    """One resident request.

    tokens: prompt, then output. computed: how many of the first tokens have KV, in the blocks of
    pool slot `slot` or, while swapped out, in `host_kv`, a tensor a layer. max_tokens: of prompt
    and output, as the client and the model bound them; room_tokens: what this instance can hold.
    prefix: its blocks in the prefix cache. reused: tokens found there and not told yet. started:
    whether it has computed tokens, or told of those found; before, it may lose what it found.
    """

    request: Request
    slot: int
    draw_key: str
    prefix: Prefix
    stops: Collection[int]
    max_tokens: int
    room_tokens: int
    stop_strings: StopStrings | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    host_kv: list[torch.Tensor] | None = None
    started: bool = False
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
    def pending(self) -> int:
        """Tokens to compute before the next can be sampled: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the next token takes a decode, its prompt being computed."""
        return self.num_output > 0 and self.pending == 1

    @property
    def draws(self) -> bool:
        """Whether its tokens are drawn, and not simply the likeliest."""
        return self.request.sampling.temperature > 0

    def append(self, token: int, leaves: bool = False) -> FinishReason | None:
        """Take a sampled token, unless it is a stop token; why the request ends now, if it does.

        leaves: its KV goes to another instance, so that the room here is no bound.
        """
        if token in self.stops:
            return FinishReason.STOP
        longest = self.max_tokens if leaves else min(self.max_tokens, self.room_tokens)
        if len(self.tokens) >= longest:
            return FinishReason.LENGTH
        self.tokens.append(token)
        if self.stop_strings is not None and self.stop_strings.push(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= longest else None
