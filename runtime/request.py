"""What a client asks for, and where a request stands; the loop alone changes the latter."""

from enum import StrEnum

import msgspec


class RequestError(ValueError):
    """A request that cannot be served as asked; says why and what could be."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next token is chosen.

    temperature 0 is greedy. top_k 0 and top_p 1 cut nothing. With a seed, a request's tokens do
    not depend on what else is in its batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise RequestError(f"temperature {self.temperature}: 0 (greedy) or more")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k}: 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p}: in (0, 1]")


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sent.

    prompt: token ids. max_output_tokens: never more than these; None: until a stop, or the
    model's length. stop_tokens end the output and are not part of it; stop strings cut the text
    before they begin. ttft_us, tpot_us: what the client was promised, None: nothing. timeout_us:
    after its arrival, when the client no longer waits. block_hashes: of the prompt's whole blocks,
    as `sagec.runtime.kv.block_hashes` makes them, where the sender knows them; else empty.
    resumed_tokens: the last so many of the prompt are output of an earlier attempt, which stop
    strings may begin in.
    """

    id: str
    prompt: tuple[int, ...]
    max_output_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    model: str = ""
    arrival_us: int = 0
    priority: int = 0
    ttft_us: int | None = None
    tpot_us: int | None = None
    tenant: str = ""
    session: str = ""
    adapter: str = ""
    timeout_us: int | None = None
    block_hashes: tuple[int, ...] = ()
    resumed_tokens: int = 0


class FinishReason(StrEnum):
    """Why a request ended; the words are those of the OpenAI API where it has one."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    FAILED = "failed"
    TIMEOUT = "timeout"
