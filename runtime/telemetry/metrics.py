"""Figures for Prometheus. Where vLLM has a figure of the same meaning, it has vLLM's name, so that
a dashboard for vLLM shows sagec too; the others begin with `sagec:`."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sagec.runtime.conformance import Outcome, outcome_of
from sagec.runtime.engines import (
    Failed,
    KVCached,
    KVExported,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
)
from sagec.runtime.loop import (
    Arrived,
    Finished,
    Instance,
    Joined,
    Planned,
    Refused,
    Retried,
    Submit,
    Token,
)
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import VERDICTS
from sagec.runtime.telemetry.requests import Ledger

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

CONFORMANCE = {
    Outcome.OBEYED: "sagec:steps_obeyed",
    Outcome.DEVIATED: "sagec:steps_deviated",
    Outcome.AT_DEADLINE: "sagec:steps_at_deadline",
}
"""Where steps are counted by what they are against their plans."""

HIT_RATIO = 0.25
"""A step was predicted well whose time is within this of the prediction."""

_WELL = (FinishReason.STOP, FinishReason.LENGTH)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SHORT_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_RATIOS = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0)

HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("from arrival to the first token", _SECONDS),
    "vllm:inter_token_latency_seconds": ("between two tokens of a request", _SHORT_S),
    "vllm:request_time_per_output_token_seconds": ("mean of a request after its first", _SHORT_S),
    "vllm:e2e_request_latency_seconds": ("from arrival to the end", _SECONDS),
    "vllm:request_queue_time_seconds": ("from arrival until an instance got it", _SECONDS),
    "vllm:request_prefill_time_seconds": ("from there to the first token", _SECONDS),
    "vllm:request_decode_time_seconds": ("from the first to the last token", _SECONDS),
    "vllm:request_inference_time_seconds": ("prefill and decode", _SECONDS),
    "vllm:request_prompt_tokens": ("prompt of a request that ended", _TOKENS),
    "vllm:request_generation_tokens": ("output of a request that ended", _TOKENS),
    "sagec:round_decide_seconds": ("what the strategy took", _SHORT_S),
    "sagec:round_plan_seconds": ("from the decision to plans: the plan latency", _SHORT_S),
}
"""Histograms of all instances together."""

INSTANCE_HISTOGRAMS = {
    "vllm:iteration_tokens_total": ("tokens that a step computed", _TOKENS),
    "sagec:dispatch_seconds": ("from a round to the first step of its plan", _SHORT_S),
    "sagec:step_seconds": ("what a step took", _SHORT_S),
    "sagec:step_time_ratio": ("measured time of a step over predicted", _RATIOS),
    "sagec:kv_transfer_seconds": ("from an export's begin to the import's end", _SHORT_S),
}
"""Histograms of each instance, label `engine`."""

COUNTERS = {
    "vllm:prompt_tokens": ("prompt tokens computed", ("engine",)),
    "vllm:generation_tokens": ("tokens generated", ("engine",)),
    "vllm:num_preemptions": ("requests that lost their place", ("engine",)),
    "vllm:prefix_cache_queries": ("prompt tokens that the prefix cache was asked for", ("engine",)),
    "vllm:prefix_cache_hits": ("of them, those that it had", ("engine",)),
    "vllm:request_success": ("requests that ended well", ("finished_reason",)),
    "sagec:request_failures": ("requests that ended otherwise", ("reason",)),
    "sagec:requests": ("requests that came", ()),
    "sagec:promises_kept": ("requests that ended within what they were promised", ("promise",)),
    "sagec:promises_broken": ("requests that did not", ("promise",)),
    "sagec:rounds": ("scheduling rounds", ()),
    "sagec:decisions": ("rows that a strategy decided on", ("verdict",)),
    "sagec:plans": ("plans given to an instance", ("engine",)),
    "sagec:plans_done": ("plans that an instance has left behind", ("engine",)),
    "sagec:steps": ("steps computed", ("engine",)),
    "sagec:steps_obeyed": ("steps that computed what they were told", ("engine",)),
    "sagec:steps_deviated": ("steps that computed something else", ("engine",)),
    "sagec:steps_at_deadline": ("steps that no decision came for in time", ("engine",)),
    "sagec:steps_predicted": ("steps whose time was predicted", ("engine",)),
    "sagec:steps_predicted_well": ("of them, within 25% of it", ("engine",)),
    "sagec:kv_evictions": ("cached blocks that went", ("engine",)),
    "sagec:kv_moved_bytes": ("KV that came from other instances", ("engine",)),
    "sagec:instance_failures": ("times that an instance failed", ("engine",)),
    "sagec:request_retries": ("requests started over because something failed", ()),
}
"""Counters; Prometheus adds `_total` to each name."""

GAUGES = {
    "vllm:num_requests_waiting": ("requests that no instance has", ()),
    "vllm:num_requests_running": ("requests that an instance computes or holds", ("engine",)),
    "vllm:kv_cache_usage_perc": ("share of KV blocks that requests hold, 1 is all", ("engine",)),
    "sagec:instance_up": ("1 while it lives", ("engine",)),
}


class RecorderFigures(Protocol):
    """What is told of a recording: rounds that could not be written, bytes that were."""

    lost_rounds: int
    written_bytes: int


class Metrics:
    """Counts what it hears; `registry` is what an exporter serves."""

    def __init__(
        self, instances: Sequence[Instance], registry: "CollectorRegistry | None" = None
    ) -> None:
        """Raises ImportError without prometheus_client: the extra `telemetry`."""
        from prometheus_client import CollectorRegistry

        self.registry = registry or CollectorRegistry()
        self._kv_blocks = {i.id: i.capability.kv_blocks for i in instances}
        self._caches = {i.id for i in instances if i.capability.caches_prefixes}
        self._ledger = Ledger()
        self._estimates: dict[str, Any] = {}
        self._planned_us = 0
        self._dispatched: dict[str, int] = {}
        self._of = _figures(self.registry)
        self._children: dict[tuple[str, str], Any] = {}
        for instance in instances:
            for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc"):
                self._labelled(name, instance.id).set(0)
            self._labelled("sagec:instance_up", instance.id).set(1)
        self._hear: dict[type, Callable[[Any], None]] = {
            Arrived: self._arrived,
            Planned: self._planned,
            Submit: self._submitted,
            StepReport: self._stepped,
            Token: self._token,
            Finished: self._finished,
            Refused: self._refused,
            Preempted: self._preempted,
            PlanDone: self._plan_done,
            KVCached: self._cached,
            KVExported: self._placed,
            KVImported: self._imported,
            Failed: self._failed,
            Retried: self._retried,
            Joined: self._joined,
        }

    def hear(self, said: object) -> None:
        """Take note of what the loop heard or said."""
        if (hear := self._hear.get(type(said))) is not None:
            hear(said)

    def follow(self, recorder: RecorderFigures) -> None:
        """Show how a recording fares, too: a full disk loses rounds, and somebody should know."""
        for name, text, read in (
            ("sagec:recording_lost_rounds", "rounds not written", lambda: recorder.lost_rounds),
            ("sagec:recording_bytes", "bytes written", lambda: recorder.written_bytes),
        ):
            self._of[name] = figure = _gauge(name, text, self.registry)
            figure.set_function(read)

    def text(self) -> str:
        """All figures, as an exporter writes them."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry).decode()

    def _labelled(self, name: str, label: str) -> Any:
        """The figure for one instance or reason; looked up once, for that is slow."""
        child = self._children.get((name, label))
        if child is None:
            child = self._children[name, label] = self._of[name].labels(label)
        return child

    def _placed(self, said: object) -> None:
        """Follow where requests are."""
        self._ledger.hear(said)
        self._of["vllm:num_requests_waiting"].set(self._ledger.num_waiting)
        for instance, running in self._ledger.running.items():
            self._labelled("vllm:num_requests_running", instance).set(running)
            if not running:  # what its last step said is over
                self._labelled("vllm:kv_cache_usage_perc", instance).set(0)

    def _arrived(self, said: Arrived) -> None:
        self._of["sagec:requests"].inc()
        self._placed(said)

    def _planned(self, said: Planned) -> None:
        self._of["sagec:rounds"].inc()
        self._of["sagec:round_decide_seconds"].observe(said.decide_us / 1e6)
        self._of["sagec:round_plan_seconds"].observe(said.plan_us / 1e6)
        self._planned_us = said.state.now_us
        verdicts = said.decision.verdict
        for code, name in enumerate(VERDICTS):
            if count := int((verdicts == code).sum()):
                self._labelled("sagec:decisions", name).inc(count)

    def _submitted(self, said: Submit) -> None:
        self._labelled("sagec:plans", said.instance).inc()
        self._estimates[said.instance] = said.plan.plan_id, said.plan.estimates.us
        self._dispatched[said.instance] = self._planned_us

    def _stepped(self, said: StepReport) -> None:
        name = said.instance
        step_us = (said.end_us - said.begin_us) / said.steps
        prompt = sum(end - begin for _, begin, end in said.chunks)
        generated = len(said.tokens) + sum(count for _, _, count in said.advanced)
        self._labelled("sagec:steps", name).inc(said.steps)
        if (counted := CONFORMANCE.get(outcome_of(said))) is not None:
            self._labelled(counted, name).inc(said.steps)
        self._labelled("sagec:step_seconds", name).observe(step_us / 1e6)
        self._labelled("vllm:iteration_tokens_total", name).observe(prompt + len(said.decodes))
        self._labelled("vllm:generation_tokens", name).inc(generated)
        if prompt:
            self._labelled("vllm:prompt_tokens", name).inc(prompt)
        self._compare(said, step_us)
        if blocks := self._kv_blocks.get(name):
            used = said.kv_blocks_used / blocks
            self._labelled("vllm:kv_cache_usage_perc", name).set(used)
        if name in self._caches:
            self._count_hits(said)
        if said.chunks:
            self._placed(said)

    def _compare(self, said: StepReport, step_us: float) -> None:
        """The step's time against what its plan predicted; the first step also ends a dispatch."""
        plan_id, estimates = self._estimates.get(said.instance, ("", ()))
        if plan_id != said.plan_id:
            return
        if (since_us := self._dispatched.pop(said.instance, None)) is not None:
            waited_s = max(0, said.begin_us - since_us) / 1e6
            self._labelled("sagec:dispatch_seconds", said.instance).observe(waited_s)
        if said.step >= len(estimates) or not (predicted_us := int(estimates[said.step])):
            return
        ratio = step_us / predicted_us
        self._labelled("sagec:step_time_ratio", said.instance).observe(ratio)
        self._labelled("sagec:steps_predicted", said.instance).inc(said.steps)
        if abs(ratio - 1) <= HIT_RATIO:
            self._labelled("sagec:steps_predicted_well", said.instance).inc(said.steps)

    def _count_hits(self, said: StepReport) -> None:
        """Prompts that begin here asked the prefix cache for all of their tokens."""
        reused = dict(said.reused)
        for request_id, begin, _ in said.chunks:
            known = self._ledger.known.get(request_id)
            if known is not None and begin == reused.get(request_id, 0):
                prompt = len(known.request.prompt)
                self._labelled("vllm:prefix_cache_queries", said.instance).inc(prompt)
        if hits := sum(reused.values()):
            self._labelled("vllm:prefix_cache_hits", said.instance).inc(hits)

    def _token(self, said: Token) -> None:
        if (known := self._ledger.known.get(said.request_id)) is None:
            return
        if known.token_us:
            gap_s = max(0, said.time_us - known.token_us) / 1e6
            self._of["vllm:inter_token_latency_seconds"].observe(gap_s)
        else:
            self._first_token(known.request, said.time_us - known.request.arrival_us)
        known.token_us = max(1, said.time_us)

    def _first_token(self, request: Request, ttft_us: int) -> None:
        self._of["vllm:time_to_first_token_seconds"].observe(max(0, ttft_us) / 1e6)
        if request.ttft_us:
            self._promised("ttft", ttft_us <= request.ttft_us)

    def _promised(self, promise: str, kept: bool) -> None:
        name = "sagec:promises_kept" if kept else "sagec:promises_broken"
        self._labelled(name, promise).inc()

    def _finished(self, said: Finished) -> None:
        report, known = said.report, self._ledger.known.get(said.request_id)
        if known is not None and report.ttft_us is not None and not known.token_us:
            self._first_token(known.request, report.ttft_us)
        if known is not None and known.request.tpot_us and report.tpot_us is not None:
            self._promised("tpot", report.tpot_us <= known.request.tpot_us)
        if said.reason in _WELL:
            self._labelled("vllm:request_success", str(said.reason)).inc()
        else:
            self._labelled("sagec:request_failures", str(said.reason)).inc()
        self._of["vllm:request_prompt_tokens"].observe(report.prompt_tokens)
        self._of["vllm:request_generation_tokens"].observe(report.output_tokens)
        self._observe_us("vllm:e2e_request_latency_seconds", report.end_us - report.arrival_us)
        self._observe_us("vllm:request_queue_time_seconds", report.queue_us)
        self._observe_us("vllm:request_time_per_output_token_seconds", report.tpot_us)
        admitted, first, last = report.admitted_us, report.first_token_us, report.last_token_us
        if admitted is not None and first is not None and last is not None:
            self._observe_us("vllm:request_prefill_time_seconds", first - admitted)
            self._observe_us("vllm:request_decode_time_seconds", last - first)
            self._observe_us("vllm:request_inference_time_seconds", last - admitted)
        self._placed(said)

    def _observe_us(self, name: str, us: float | None) -> None:
        if us is not None:
            self._of[name].observe(max(0.0, us) / 1e6)

    def _refused(self, _: Refused) -> None:
        self._labelled("sagec:request_failures", "refused").inc()

    def _preempted(self, said: Preempted) -> None:
        self._labelled("vllm:num_preemptions", said.instance).inc()
        self._placed(said)

    def _plan_done(self, said: PlanDone) -> None:
        self._labelled("sagec:plans_done", said.instance).inc()

    def _cached(self, said: KVCached) -> None:
        if said.evicted:
            self._labelled("sagec:kv_evictions", said.instance).inc(len(said.evicted))

    def _imported(self, said: KVImported) -> None:
        self._labelled("sagec:kv_moved_bytes", said.instance).inc(said.num_bytes)
        moved_s = max(0, said.end_us - said.begin_us) / 1e6
        self._labelled("sagec:kv_transfer_seconds", said.instance).observe(moved_s)
        self._placed(said)

    def _failed(self, said: Failed) -> None:
        if said.request_id is None:
            self._labelled("sagec:instance_failures", said.instance).inc()
            self._labelled("sagec:instance_up", said.instance).set(0)
            self._labelled("vllm:kv_cache_usage_perc", said.instance).set(0)
        self._placed(said)

    def _retried(self, _: Retried) -> None:
        self._of["sagec:request_retries"].inc()

    def _joined(self, said: Joined) -> None:
        self._labelled("sagec:instance_up", said.instance).set(1)


def _gauge(name: str, text: str, registry: "CollectorRegistry") -> Any:
    from prometheus_client import Gauge

    return Gauge(name, text, registry=registry)


def _figures(registry: "CollectorRegistry") -> dict[str, Any]:
    """Every figure by its name."""
    from prometheus_client import Counter, Gauge, Histogram

    of: dict[str, Any] = {}
    at: Any = {"registry": registry}
    for name, (text, buckets) in HISTOGRAMS.items():
        of[name] = Histogram(name, text, buckets=buckets, **at)
    for name, (text, buckets) in INSTANCE_HISTOGRAMS.items():
        of[name] = Histogram(name, text, ("engine",), buckets=buckets, **at)
    for name, (text, labels) in COUNTERS.items():
        of[name] = Counter(name, text, labels, **at)
    for name, (text, labels) in GAUGES.items():
        of[name] = Gauge(name, text, labels, **at)
    return of
