"""What serving came to: a record for each finished request, and their sum; printing is not here."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sagec.runtime.conformance import NO_STEPS, Conformance
from sagec.runtime.request import FinishReason, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestReport:
    """A request that ended. Times are microseconds on the loop's clock.

    admitted_us, first_token_us: None where it never came to that. attempts: how often it was
    started over because an instance failed. instances: where it ran, in order, an instance again
    for each time. reused_tokens: whose KV a prefix cache had, so that nobody computed them.
    """

    request_id: str
    reason: FinishReason
    prompt_tokens: int
    output_tokens: int
    arrival_us: int
    end_us: int
    admitted_us: int | None = None
    first_token_us: int | None = None
    last_token_us: int | None = None
    attempts: int = 0
    preemptions: int = 0
    instances: tuple[str, ...] = ()
    reused_tokens: int = 0

    @property
    def queue_us(self) -> int | None:
        """From arrival until an instance was given the prompt."""
        return None if self.admitted_us is None else self.admitted_us - self.arrival_us

    @property
    def ttft_us(self) -> int | None:
        """From arrival until the first token."""
        return None if self.first_token_us is None else self.first_token_us - self.arrival_us

    @property
    def tpot_us(self) -> float | None:
        """Mean time of a token after the first; None with fewer than two."""
        if self.first_token_us is None or self.last_token_us is None or self.output_tokens < 2:
            return None
        return (self.last_token_us - self.first_token_us) / (self.output_tokens - 1)


def was_served_well(report: RequestReport, request: Request) -> bool:
    """Whether the request got its whole answer, the first token and the others when promised.

    One that nothing was promised only has to end by itself.
    """
    if report.reason not in (FinishReason.STOP, FinishReason.LENGTH):
        return False
    first, between = report.ttft_us, report.tpot_us
    if request.ttft_us is not None and (first is None or first > request.ttft_us):
        return False
    return request.tpot_us is None or between is None or between <= request.tpot_us


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantiles:
    """Median and 99th percentile of a figure over requests, and of how many; µs."""

    count: int
    p50_us: float
    p99_us: float

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Quantiles | None":
        """None where no request has the figure.

        >>> Quantiles.of([1.0, None, 3.0]).p50_us
        2.0
        """
        present = [value for value in values if value is not None]
        if not present:
            return None
        p50, p99 = np.percentile(present, [50, 99]).tolist()
        return cls(count=len(present), p50_us=p50, p99_us=p99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The sum of a run.

    duration_us: from the first arrival to the last end. kv_moved_bytes and num_moves: KV handed
    over between instances. rounds: how often the strategy was asked. conformance: whether the
    steps did as they were told.
    """

    requests: tuple[RequestReport, ...]
    duration_us: int
    prompt_tokens: int
    output_tokens: int
    steps: int
    rounds: int
    num_moves: int
    kv_moved_bytes: int
    ttft: Quantiles | None
    tpot: Quantiles | None
    conformance: Conformance = NO_STEPS

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens generated a second of the run; 0.0 for a run without duration."""
        return self.output_tokens * 1e6 / self.duration_us if self.duration_us else 0.0

    @classmethod
    def of(
        cls,
        requests: Sequence[RequestReport],
        *,
        steps: int = 0,
        rounds: int = 0,
        num_moves: int = 0,
        kv_moved_bytes: int = 0,
        conformance: Conformance = NO_STEPS,
    ) -> "Summary":
        """The sum of these requests; what happened in between is counted by the caller."""
        begin_us = min((request.arrival_us for request in requests), default=0)
        end_us = max((request.end_us for request in requests), default=0)
        return cls(
            requests=tuple(requests),
            duration_us=end_us - begin_us,
            prompt_tokens=sum(request.prompt_tokens for request in requests),
            output_tokens=sum(request.output_tokens for request in requests),
            steps=steps,
            rounds=rounds,
            num_moves=num_moves,
            kv_moved_bytes=kv_moved_bytes,
            ttft=Quantiles.of([request.ttft_us for request in requests]),
            tpot=Quantiles.of([request.tpot_us for request in requests]),
            conformance=conformance,
        )
