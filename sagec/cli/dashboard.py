"""What `sagec top` shows: figures of a metrics page, and how fast they grow."""

from __future__ import annotations

import dataclasses
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sagec.cli.failure import InputError
from sagec.runtime.telemetry.metrics import CONFORMANCE

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

TIMEOUT_S = 5.0

Key = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and labels."""


@dataclasses.dataclass(frozen=True)
class Page:
    """The samples of a metrics page, at a moment in seconds."""

    samples: Mapping[Key, float]
    time_s: float

    @staticmethod
    def of(text: str, time_s: float) -> Page:
        """The page of this text. Raises ValueError where it is none of Prometheus's."""
        from prometheus_client.parser import text_string_to_metric_families

        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return Page(samples, time_s)

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that have these labels; 0 where there are none."""
        wanted = set(labels.items())
        return sum(
            v for (n, found), v in self.samples.items() if n == name and wanted <= set(found)
        )

    def instances(self) -> list[str]:
        """Names of the instances that the page tells of."""
        engines = [
            dict(k[1]).get("engine", "") for k in self.samples if k[0] == "sagec:instance_up"
        ]
        return sorted(engines)

    def quantile(self, name: str, q: float, since: Page | None = None) -> float | None:
        """A quantile of a histogram, in between the bounds of its buckets; of what came after
        `since`, where that is given and something did. None: it is empty."""
        counts = sorted(self._buckets(name, since))
        if (since is not None and not counts) or not counts or not counts[-1][1]:
            return None if since is None else self.quantile(name, q)
        target, below, low = q * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= target:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (target - below) / max(count - below, 1e-9)
            below, low = count, bound
        return low

    def _buckets(self, name: str, since: Page | None) -> Iterator[tuple[float, float]]:
        sums: dict[float, float] = {}
        for (found, labels), value in self.samples.items():
            if found == f"{name}_bucket":
                bound = float(dict(labels)["le"])
                before = since.samples.get((found, labels), 0.0) if since is not None else 0.0
                sums[bound] = sums.get(bound, 0.0) + value - before
        yield from sums.items()


def read(url: str, time_s: float) -> Page:
    """The page at `url`. Raises InputError where nobody answers, or not with metrics."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url!r} is no address, as in http://127.0.0.1:9090/metrics")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        page = Page.of(text, time_s)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        reason = getattr(reason, "strerror", None) or reason
        said = f"{url}: {reason}; serve with `sagec run --metrics PORT`"
        raise InputError(said) from None
    except (ValueError, UnicodeDecodeError):
        raise InputError(f"{url}: this is no metrics page") from None
    if not page.instances():
        raise InputError(f"{url}: these are not sagec's metrics: nothing tells of an instance")
    return page


def view(page: Page, before: Page | None) -> Group:
    """Tables of the page: requests, times, instances. Rates are since `before`."""
    from rich.console import Group

    return Group(_requests(page, before), _times(page, before), _instances(page, before))


def _rate(page: Page, before: Page | None, name: str, **labels: str) -> str:
    if before is None or page.time_s <= before.time_s:
        return "-"
    grown = page.value(name, **labels) - before.value(name, **labels)
    return f"{grown / (page.time_s - before.time_s):,.0f}"


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _requests(page: Page, before: Page | None) -> Table:
    table = _table(
        "requests", "waiting", "running", "done", "failed", "preempted", "retried", "promises kept"
    )
    kept, broken = (page.value(f"sagec:promises_{end}_total") for end in ("kept", "broken"))
    table.add_row(
        f"{page.value('vllm:num_requests_waiting'):.0f}",
        f"{page.value('vllm:num_requests_running'):.0f}",
        f"{page.value('vllm:request_success_total'):.0f}",
        f"{page.value('sagec:request_failures_total'):.0f}",
        f"{page.value('vllm:num_preemptions_total'):.0f}",
        f"{page.value('sagec:request_retries_total'):.0f}",
        _share(kept, kept + broken),
    )
    return table


_TIMES = {
    "queue": "vllm:request_queue_time_seconds",
    "TTFT": "vllm:time_to_first_token_seconds",
    "between tokens": "vllm:inter_token_latency_seconds",
    "TPOT": "vllm:request_time_per_output_token_seconds",
    "end to end": "vllm:e2e_request_latency_seconds",
    "strategy": "sagec:round_decide_seconds",
    "plan": "sagec:round_plan_seconds",
    "dispatch": "sagec:dispatch_seconds",
}


def _times(page: Page, before: Page | None) -> Table:
    table = _table("times, ms", "", "p50", "p99", "count")
    for title, name in _TIMES.items():
        quantiles = [page.quantile(name, q, before) for q in (0.5, 0.99)]
        shown = ["-" if q is None else f"{1e3 * q:,.2f}" for q in quantiles]
        table.add_row(title, *shown, f"{page.value(f'{name}_count'):.0f}")
    return table


def _instances(page: Page, before: Page | None) -> Table:
    table = _table(
        "instances",
        "",
        "running",
        "KV",
        "prompt tok/s",
        "output tok/s",
        "steps/s",
        "step ms",
        "as planned",
        "predicted well",
        "prefix hits",
    )
    for name in page.instances():
        at = {"engine": name}
        steps = page.value("sagec:step_seconds_count", **at)
        step_ms = 1e3 * page.value("sagec:step_seconds_sum", **at) / steps if steps else 0.0
        told = sum(page.value(f"{figure}_total", **at) for figure in CONFORMANCE.values())
        predicted = page.value("sagec:steps_predicted_total", **at)
        asked = page.value("vllm:prefix_cache_queries_total", **at)
        table.add_row(
            name if page.value("sagec:instance_up", **at) else f"{name} (down)",
            f"{page.value('vllm:num_requests_running', **at):.0f}",
            f"{100 * page.value('vllm:kv_cache_usage_perc', **at):.0f}%",
            _rate(page, before, "vllm:prompt_tokens_total", **at),
            _rate(page, before, "vllm:generation_tokens_total", **at),
            _rate(page, before, "sagec:steps_total", **at),
            f"{step_ms:.2f}",
            _share(page.value("sagec:steps_obeyed_total", **at), told),
            _share(page.value("sagec:steps_predicted_well_total", **at), predicted),
            _share(page.value("vllm:prefix_cache_hits_total", **at), asked),
        )
    return table


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "-"
