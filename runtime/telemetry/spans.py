"""Spans for OpenTelemetry: one a request with its phases below it, and one a round."""

import time
from typing import TYPE_CHECKING, Any

from sagec.runtime.engines import KVImported, Preempted, StepReport
from sagec.runtime.loop import Arrived, Finished, Planned
from sagec.runtime.request import FinishReason

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_WELL = (FinishReason.STOP, FinishReason.LENGTH)


class Spans:
    """Makes spans of what it hears; times are the loop's, shifted to those of the world.

    A request's span has attributes by OpenTelemetry's names for generative AI where it has one, and
    the children queue, prefill, kv-transfer and decode. Spans are made when a request has ended, so
    that one that is still served costs a few numbers.
    """

    def __init__(self, tracer: "Tracer", epoch_ns: int | None = None) -> None:
        """epoch_ns: the moment of the world at which the loop's clock was 0; by default that of
        the monotonic clock."""
        self._tracer = tracer
        self._epoch_ns = time.time_ns() - time.monotonic_ns() if epoch_ns is None else epoch_ns
        self._arrived: dict[str, Arrived] = {}
        self._moves: dict[str, list[KVImported]] = {}
        self._preempted: dict[str, list[tuple[int, str]]] = {}
        self._places: dict[str, list[str]] = {}
        self._now_us = 0

    def hear(self, said: object) -> None:
        """Take note; a request's end and a round become spans."""
        match said:
            case StepReport():
                self._now_us = max(self._now_us, said.end_us)
                for request_id, _, _ in said.chunks:
                    self._place(request_id, said.instance)
            case Planned():
                self._round(said)
            case Arrived():
                self._arrived.setdefault(said.request.id, said)
            case KVImported():
                self._moves.setdefault(said.request_id, []).append(said)
                self._place(said.request_id, said.instance)
            case Preempted():
                at = (self._now_us, said.instance)
                self._preempted.setdefault(said.request_id, []).append(at)
            case Finished():
                self._request(said)
            case _:
                pass

    def _place(self, request_id: str, instance: str) -> None:
        places = self._places.setdefault(request_id, [])
        if not places or places[-1] != instance:
            places.append(instance)

    def _ns(self, us: float) -> int:
        return self._epoch_ns + round(us * 1000)

    def _round(self, said: Planned) -> None:
        state, decision = said.state, said.decision
        begin_us = state.now_us
        self._now_us = max(self._now_us, begin_us)
        span = self._tracer.start_span("round", start_time=self._ns(begin_us))
        span.set_attributes(
            {
                "sagec.round": state.round,
                "sagec.waiting": len(state.waiting),
                "sagec.running": len(state.running),
                "sagec.admitted": len(decision.admitted),
                "sagec.preempted": len(decision.preempt_rows),
                "sagec.decide_us": said.decide_us,
                "sagec.plan_us": said.plan_us,
                "sagec.plans": [plan.plan_id for plan in said.plans],
            }
        )
        span.end(self._ns(begin_us + said.decide_us + said.plan_us))

    def _request(self, said: Finished) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        report = said.report
        arrived = self._arrived.pop(said.request_id, None)
        span = self._tracer.start_span("request", start_time=self._ns(report.arrival_us))
        span.set_attributes(self._attributes(said, arrived))
        for at_us, instance in self._preempted.pop(said.request_id, ()):
            span.add_event("preempted", {"sagec.instance": instance}, timestamp=self._ns(at_us))
        inside = set_span_in_context(span)
        for name, begin_us, end_us in self._phases(said):
            phase = self._tracer.start_span(name, context=inside, start_time=self._ns(begin_us))
            phase.end(self._ns(max(begin_us, end_us)))
        if said.reason not in _WELL:
            span.set_status(Status(StatusCode.ERROR, f"{said.reason}: {said.detail}"))
        span.end(self._ns(max(report.arrival_us, report.end_us)))

    def _attributes(self, said: Finished, arrived: Arrived | None) -> dict[str, Any]:
        report = said.report
        attributes: dict[str, Any] = {
            "gen_ai.request.id": said.request_id,
            "gen_ai.usage.input_tokens": report.prompt_tokens,
            "gen_ai.usage.output_tokens": report.output_tokens,
            "gen_ai.response.finish_reasons": [str(said.reason)],
            "sagec.attempts": report.attempts,
            "sagec.preemptions": report.preemptions,
            "sagec.instances": self._places.pop(said.request_id, []),
        }
        if report.ttft_us is not None:
            attributes["gen_ai.server.time_to_first_token"] = report.ttft_us / 1e6
        if report.tpot_us is not None:
            attributes["gen_ai.server.time_per_output_token"] = report.tpot_us / 1e6
        if arrived is not None:
            request = arrived.request
            named = {"model": request.model, "tenant": request.tenant, "session": request.session}
            names = {"model": "gen_ai.request.model"}
            for name, value in named.items():
                if value:
                    attributes[names.get(name, f"sagec.{name}")] = value
        return attributes

    def _phases(self, said: Finished) -> list[tuple[str, int, int]]:
        """Name, begin and end of each phase that the request came to; µs of the loop's clock."""
        report = said.report
        admitted_us, first_us = report.admitted_us, report.first_token_us
        phases = [
            ("queue", report.arrival_us, report.end_us if admitted_us is None else admitted_us)
        ]
        if admitted_us is not None:
            phases.append(("prefill", admitted_us, report.end_us if first_us is None else first_us))
        for move in self._moves.pop(said.request_id, ()):
            phases.append(("kv-transfer", move.begin_us, move.end_us))
        if first_us is not None and report.last_token_us is not None:
            phases.append(("decode", first_us, report.last_token_us))
        return phases
