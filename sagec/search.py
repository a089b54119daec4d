"""Which layout of a cluster serves most of a workload well: ranks, prefill and decode apart or not,
and how many instances of each.

The goodput of a layout is the highest rate of arrivals at which a share of the requests is served
well, found by trials in simulated time. `sagec.capacity` says beforehand what a layout cannot
exceed; who cannot be among the best is not simulated, and who fails at a rate that others reach is
tried once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from msgspec.structs import replace

from sagec import language
from sagec.capacity import Target, Work, bound, caches_prefixes
from sagec.diagnostics import Diagnostic
from sagec.language.syntax import Cluster, Instance, Program
from sagec.passes.errors import PassError
from sagec.passes.topology import topology_of
from sagec.planner import planner_of
from sagec.runtime.request import Request
from sagec.runtime.strategies import Strategy
from sagec.simulation import WELL, Simulated, cache_options, simulate

PRECISION = 0.05
"""Rates that are tried are a ladder: each is higher than the one before by this share of it."""

MOST_PER_S = 1e6
"""A search looks no higher, not even where all costs nothing."""

DEPTH = 64
"""A layout that is not served well at this part of its bound is given up."""

REACHED = "reaches its bound; more requests a trial (--limit) may tell what breaks first"
"""Why no more, where each trial went well: a short one ends before queues grow."""

PROMISES, MOST_TIMES, ENOUGH_REQUESTS = 4, 4, 1200
"""A trial lasts as long as so many requests may take, one after the other. It needs no more than so
many times the requests that it has at least, unless these are few."""

FIRST = 4
"""One of so many requests of a trial come first, to see whether the others are worth it."""

_KEPT = ("block", "budget", "max_batch", "kv_dtype", "dtype", "model")
"""Settings of the file's own instances that a layout's instances have too."""


class SearchError(ValueError):
    """A search that cannot begin; says what is missing."""


@dataclass(frozen=True, order=True)
class Layout:
    """How a cluster's devices are dealt out.

    prefill, decode: instances that do one phase alone; both: those that do both. Either `both` or
    the other two are 0. chunk: most tokens of a prompt in a step.
    """

    both: int = 0
    both_tp: int = 1
    prefill: int = 0
    prefill_tp: int = 1
    decode: int = 0
    decode_tp: int = 1
    chunk: int = 512

    @property
    def num_devices(self) -> int:
        """How many devices it takes.

        >>> Layout(prefill=1, prefill_tp=2, decode=3).num_devices
        5
        """
        apart = self.prefill * self.prefill_tp + self.decode * self.decode_tp
        return self.both * self.both_tp + apart

    @property
    def mode(self) -> str:
        """How the phases share instances."""
        return "hybrid" if self.both else "strict"

    @property
    def groups(self) -> str:
        """Its instances, in words."""
        groups = (
            (self.both, self.both_tp, "both"),
            (self.prefill, self.prefill_tp, "prefill"),
            (self.decode, self.decode_tp, "decode"),
        )
        parts = [f"{count} {role} of tp {tp}" for count, tp, role in groups if count]
        return " + ".join(parts)

    def __str__(self) -> str:
        return f"{self.groups}, chunk {self.chunk}"


@dataclass(frozen=True)
class Verdict:
    """What became of a layout.

    bound_per_s: requests a second that it cannot exceed. goodput_per_s: those that it reaches;
    None where nobody looked for them. missed_per_s: a rate that it was tried at without success,
    where that was all. why: in words, why it has no more.
    """

    layout: Layout
    bound_per_s: float
    goodput_per_s: float | None = None
    ttft_p90_ms: float | None = None
    tpot_p90_ms: float | None = None
    missed_per_s: float | None = None
    why: str = ""

    @property
    def per_device(self) -> float:
        """Goodput of a device; 0.0 where it was not simulated."""
        return (self.goodput_per_s or 0.0) / self.layout.num_devices


@dataclass(frozen=True)
class Trial:
    """How a layout did at a rate.

    attained, failed, late, slow: shares of the requests: served well, without the whole answer,
    with a late first token, with more time between tokens than promised.
    """

    rate_per_s: float
    attained: float
    failed: float
    late: float
    slow: float
    ttft_p90_ms: float | None
    tpot_p90_ms: float | None

    @classmethod
    def of(cls, rate_per_s: float, simulated: Simulated, target: Target) -> Trial:
        """Of a simulation of requests that are promised the same."""
        reports, figures = simulated.reports, simulated.figures()
        count = len(simulated.requests)
        return cls(
            rate_per_s=rate_per_s,
            attained=simulated.served_well / count,
            failed=sum(report.reason not in WELL for report in reports) / count,
            late=sum((report.ttft_us or 0) > target.ttft_us for report in reports) / count,
            slow=sum((report.tpot_us or 0) > target.tpot_us for report in reports) / count,
            ttft_p90_ms=(figures["ttft_ms"] or {}).get("p90"),
            tpot_p90_ms=(figures["tpot_ms"] or {}).get("p90"),
        )

    def text(self) -> str:
        """What stood in the way of a success."""
        misses = [
            (self.failed, "get no whole answer"),
            (self.late, f"get their first token late ({_p90('TTFT', self.ttft_p90_ms)})"),
            (self.slow, f"wait too long between tokens ({_p90('TPOT', self.tpot_p90_ms)})"),
        ]
        told = ", ".join(f"{share:.0%} {what}" for share, what in misses if share >= 0.005)
        return f"at {figure(self.rate_per_s)} /s {self.attained:.0%} are served well: {told}"


def _p90(name: str, found_ms: float | None) -> str:
    return f"{name} p90 {'-' if found_ms is None else figure(found_ms)} ms"


def figure(number: float) -> str:
    """A number as a table shows it.

    >>> figure(0.01234), figure(12.345), figure(12345.6)
    ('0.0123', '12.3', '12,346')
    """
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def layouts(
    num_devices: int, tps: Sequence[int], chunks: Sequence[int], heads: int, kv_heads: int
) -> Iterator[Layout]:
    """All layouts that leave no device over for one more instance, and whose ranks share heads.

    >>> for layout in layouts(2, (1, 2), (512,), heads=8, kv_heads=2):
    ...     print(layout)
    2 both of tp 1, chunk 512
    1 both of tp 2, chunk 512
    1 prefill of tp 1 + 1 decode of tp 1, chunk 512
    """
    fitting = [tp for tp in tps if tp <= num_devices and not heads % tp and not kv_heads % tp]
    for chunk in chunks:
        for tp in fitting:
            yield Layout(both=num_devices // tp, both_tp=tp, chunk=chunk)
        for prefill_tp, decode_tp in itertools.product(fitting, fitting):
            for prefill in range(1, num_devices // prefill_tp + 1):
                decode = (num_devices - prefill * prefill_tp) // decode_tp
                if decode:
                    yield Layout(
                        prefill=prefill,
                        prefill_tp=prefill_tp,
                        decode=decode,
                        decode_tp=decode_tp,
                        chunk=chunk,
                    )


class Search:
    """Tries layouts of a program's cluster on its requests."""

    def __init__(
        self,
        program: Program,
        requests: Sequence[Request],
        make_strategy: Callable[[], Strategy],
        target: Target,
        trial_requests: int = 0,
    ) -> None:
        """trial_requests: in a trial at least; 0: as many as are given.

        Raises SearchError where the cluster's instances have several models, or none."""
        self._program, self._make_strategy, self._target = program, make_strategy, target
        self._requests = [
            replace(request, ttft_us=target.ttft_us, tpot_us=target.tpot_us) for request in requests
        ]
        self._trial_requests = max(trial_requests, len(requests))
        self._cluster = _cluster_of(program)
        self.devices = [word.text for device in self._cluster.devices for word in device.names]
        self._load = Load.of(self._requests)
        self._options = {
            placed.name: " ".join(
                f"{name}={value}" for name, value in cache_options(placed).items()
            )
            for placed in topology_of(language.lower(program)).instances
        }
        self._works: dict[int | None, Work] = {}

    def verdicts(
        self, candidates: Sequence[Layout], best: int = 5, tell: Callable[[str], None] = print
    ) -> list[Verdict]:
        """A verdict for each, the best first; the first `best` are what trials of all would find.

        tell: hears of each that was simulated.
        """
        bounded = sorted((self._bounded(layout) for layout in candidates), key=_by_bound)
        found: list[Verdict] = []
        for verdict in bounded:
            reached = sorted((one.goodput_per_s or 0.0 for one in found), reverse=True)
            enough = reached[best - 1] if len(reached) >= best else 0.0
            if not verdict.bound_per_s:
                found.append(verdict)
            elif verdict.bound_per_s < enough:
                why = f"{verdict.why}; others reach {figure(enough)}"
                found.append(dataclasses.replace(verdict, why=why))
            else:
                found.append(self._tried(verdict, enough))
                tell(_news(found[-1]))
        return sorted(found, key=_by_goodput)

    def text(self, layout: Layout) -> str:
        """The layout as the file would say it."""
        lines, left = [], iter(self.devices)
        groups = (
            ("i", "both", layout.both, layout.both_tp),
            ("p", "prefill", layout.prefill, layout.prefill_tp),
            ("d", "decode", layout.decode, layout.decode_tp),
        )
        for letter, role, count, tp in groups:
            if not count:
                continue
            names = ", ".join(f"{letter}{index}" for index in range(count))
            devices = ", ".join(itertools.islice(left, count * tp))
            kept = self._kept(role)
            tail = f" tp {tp}{kept}"
            lines.append(f"  instances {names} role {role} on {devices} engine sim{tail}")
        return "\n".join(lines)

    def module(self, layout: Layout) -> Any:
        """The cluster with the layout's instances, as a module. Raises Diagnostic where it does
        not fit the devices' memory."""
        name = self._cluster.name.text
        text = (
            f"cluster {name} {{\n{self.text(layout)}\n}}\n"
            f"serve on {name} mode {layout.mode} chunk {layout.chunk} horizon 64 {{\n"
            '  request "any" tokens 1 generate 1\n}\n'
        )
        drawn = language.parse(text, "layout.sage")
        cluster = dataclasses.replace(self._cluster, instances=drawn.clusters[0].instances)
        program = dataclasses.replace(self._program, clusters=(cluster,), serve=drawn.serve)
        return language.lower(program)

    def _kept(self, role: str) -> str:
        """What the file says of its own instances of the role, or of its first ones, and how their
        engine caches prefixes."""
        instances = self._cluster.instances
        like = next((i for i in instances if _role(i) == role), instances[0])
        source = self._program.source.text
        said = {name: like.settings[name] for name in _KEPT if name in like.settings}
        kept = "".join(f" {name} {source[v.begin : v.end]}" for name, v in said.items())
        options = self._options[like.names[0].text]
        return f'{kept} options "{options}"' if options else kept

    def _bounded(self, layout: Layout) -> Verdict:
        try:
            placed = topology_of(self.module(layout)).instances
        except (Diagnostic, PassError) as error:
            told = "; ".join(filter(None, (error.message, getattr(error, "hint", ""))))
            return Verdict(layout, 0.0, why=f"cannot be: {told}")
        blocks = [one.block_tokens for one in placed if caches_prefixes(one)]
        found = bound(placed, self._work(math.gcd(*blocks) if blocks else None), self._target)
        return Verdict(layout, min(found.per_s, MOST_PER_S), why=found.why)

    def _work(self, block_tokens: int | None) -> Work:
        if block_tokens not in self._works:
            self._works[block_tokens] = Work.of(self._requests, block_tokens)
        return self._works[block_tokens]

    def _tried(self, verdict: Verdict, enough_per_s: float) -> Verdict:
        try:
            return self._simulated(verdict, enough_per_s)
        except PassError as error:
            return dataclasses.replace(verdict, why=f"cannot serve: {error.message}")

    def _simulated(self, verdict: Verdict, enough_per_s: float) -> Verdict:
        """Find the highest rate that is reached; where that is less than `enough_per_s`, nothing
        but that."""
        trials: dict[int, Trial] = {}

        def succeeds(rung: int) -> bool:
            if rung not in trials:
                trials[rung] = self._trial_at(verdict.layout, rate_of(rung))
            return trials[rung].attained >= self._target.attained

        low, top = rung_of(verdict.bound_per_s / DEPTH), rung_of(verdict.bound_per_s)
        enough = rung_of(enough_per_s) if enough_per_s else low
        reached = highest(succeeds, low, top + 1, enough)
        failed = min((rung for rung in trials if not succeeds(rung)), default=top + 1)
        if failed <= enough:
            return _lost(verdict, trials[failed])
        missed = trials.get(reached + 1)
        shown = trials.get(reached) or missed
        assert shown is not None
        return dataclasses.replace(
            verdict,
            goodput_per_s=rate_of(reached) if reached in trials else 0.0,
            ttft_p90_ms=shown.ttft_p90_ms,
            tpot_p90_ms=shown.tpot_p90_ms,
            why=REACHED if missed is None else missed.text(),
        )

    def _trial_at(self, layout: Layout, rate_per_s: float) -> Trial:
        """Serve the requests as they come at so many a second.

        Where so many of the first ones are not served well that the others do not matter, these are
        left out: who comes later does not help who came before.
        """
        requests = self._requests_at(rate_per_s)
        first = requests[: -(-len(requests) // FIRST)]
        few = self._served(layout, first, rate_per_s)
        if (1 - few.attained) * len(first) > (1 - self._target.attained) * len(requests):
            return few
        return self._served(layout, requests, rate_per_s)

    def _served(self, layout: Layout, requests: Sequence[Request], rate_per_s: float) -> Trial:
        module = self.module(layout)
        simulated = simulate(module, requests, self._make_strategy(), planner_of(module))
        return Trial.of(rate_per_s, simulated, self._target)

    def _requests_at(self, rate_per_s: float) -> list[Request]:
        """Requests at such a rate for long enough that queues build up, as far as time allows.

        A layout that is slower than they come must have the time to fall behind its promises.
        """
        output = sum(self._load.outputs) / len(self._load.outputs)
        promised_s = (self._target.ttft_us + output * self._target.tpot_us) / 1e6
        least = self._trial_requests
        most = max(MOST_TIMES * least, ENOUGH_REQUESTS)
        count = min(round(PROMISES * promised_s * rate_per_s), most)
        requests = repeated(self._requests, max(count, least))
        return Load.of(requests).at_rate(requests, rate_per_s)


def repeated(requests: Sequence[Request], count: int) -> list[Request]:
    """At least `count` requests, the given ones again and again, each time when the last had come.

    A handful of requests that come at once wait for nobody, whatever their rate. What they have in
    common they have each time, and nothing from one time to the next: no prefix cache finds a
    request that was there before.
    """
    found, span_us = list(requests), Load.of(requests).span_us
    for turn in range(1, -(-count // len(requests))):
        found += [
            replace(
                one,
                id=f"{one.id}~{turn}",
                arrival_us=one.arrival_us + turn * span_us,
                prompt=_others(one.prompt, turn),
                block_hashes=_others(one.block_hashes, turn),
            )
            for one in requests
        ]
    return found


def _others(numbers: Sequence[int], turn: int) -> tuple[int, ...]:
    """As many other numbers of 64 bits with a sign, alike where these are alike."""
    by = turn << 40
    if isinstance(numbers, range):  # what a counted prompt is, which costs nothing
        return cast("tuple[int, ...]", range(numbers.start + by, numbers.stop + by))
    half = 1 << 63
    return tuple((number + by + half) % (2 * half) - half for number in numbers)


def rate_of(rung: int) -> float:
    """Requests a second of a rung of the ladder."""
    return float((1 + PRECISION) ** rung)


def rung_of(rate_per_s: float) -> int:
    """The highest rung that is not above a rate.

    >>> [rung_of(rate_of(rung)) for rung in (-40, 0, 90)]
    [-40, 0, 90]
    """
    rung = math.floor(math.log(rate_per_s) / math.log(1 + PRECISION))
    return rung + 1 if rate_of(rung + 1) <= rate_per_s else rung


def highest(succeeds: Callable[[int], bool], low: int, high: int, enough: int | None = None) -> int:
    """The highest in [low, high) that succeeds; low where none does, which is not asked.

    What succeeds is taken to lie below what does not. The answer is looked for near `high` first,
    and only until it is known to be less than `enough`, so that whoever asks for more goes the same
    way, only further.

    >>> highest(lambda rung: rung < 7, 0, 100)
    6
    """
    step = 1
    while high - low > 1 and (enough is None or high > enough):
        at = max(high - step, (low + high) // 2)
        if succeeds(at):
            low = at
        else:
            high, step = at, 2 * step
    return low


@dataclass(frozen=True)
class Load:
    """A workload's outputs and arrivals, in tokens and microseconds."""

    outputs: tuple[int, ...]
    arrivals_us: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> Load:
        """Of these requests; those that all come at once are taken to come at random.

        Raises SearchError where a request does not say how much it generates.
        """
        for request in requests:
            if request.max_output_tokens is None:
                raise SearchError(
                    f"request {request.id!r} does not say how much it generates; say generate"
                )
        arrivals = sorted(request.arrival_us for request in requests)
        if arrivals[-1] == arrivals[0]:
            draw = np.random.default_rng(0)
            arrivals = (1e6 * draw.exponential(1.0, len(requests)).cumsum()).astype(int).tolist()
        outputs = tuple(request.max_output_tokens or 1 for request in requests)
        return cls(outputs, tuple(arrivals))

    @property
    def span_us(self) -> int:
        """From the first arrival to one behind the last, at the mean distance."""
        count = max(1, len(self.arrivals_us) - 1)
        span_us = self.arrivals_us[-1] - self.arrivals_us[0]
        return max(1, span_us + span_us // count)

    @property
    def rate_per_s(self) -> float:
        """Arrivals a second, as they are."""
        return 1e6 * len(self.arrivals_us) / self.span_us

    def at_rate(self, requests: Sequence[Request], rate_per_s: float) -> list[Request]:
        """The requests, in their order, as they come at so many a second."""
        times = self.rate_per_s / rate_per_s
        first = self.arrivals_us[0]
        return [
            replace(request, arrival_us=round((at - first) * times))
            for request, at in zip(requests, self.arrivals_us, strict=True)
        ]


def _cluster_of(program: Program) -> Cluster:
    if program.serve is None or not program.clusters:
        raise SearchError("a search needs a cluster, and a serve with requests")
    on = program.serve.settings.get("on")
    named = [one for one in program.clusters if on is None or one.name.text == str(on.value)]
    if not named or not named[0].instances:
        raise SearchError("the cluster has no instance; one says model, block and budget")
    models = {str(i.settings["model"].value) for i in named[0].instances if "model" in i.settings}
    if len(models) > 1:
        raise SearchError(f"the cluster has {len(models)} models; a search lays out one")
    return named[0]


def _role(instance: Instance) -> str:
    said = instance.settings.get("role")
    return "both" if said is None else str(said.value)


def _lost(verdict: Verdict, trial: Trial) -> Verdict:
    """A layout that does not reach what others do."""
    return dataclasses.replace(
        verdict,
        missed_per_s=trial.rate_per_s,
        ttft_p90_ms=trial.ttft_p90_ms,
        tpot_p90_ms=trial.tpot_p90_ms,
        why=trial.text(),
    )


def _news(verdict: Verdict) -> str:
    if verdict.goodput_per_s is not None:
        return f"{verdict.layout}: {figure(verdict.goodput_per_s)} /s"
    if verdict.missed_per_s is not None:
        return f"{verdict.layout}: less than {figure(verdict.missed_per_s)} /s"
    return f"{verdict.layout}: {verdict.why}"


def _by_bound(verdict: Verdict) -> tuple[float, Layout]:
    return -verdict.bound_per_s, verdict.layout


def _by_goodput(verdict: Verdict) -> tuple[float, int, bool, float, Layout]:
    """The best first; of equals the one with fewer devices, then those that were tried."""
    reached, tried = verdict.goodput_per_s or 0.0, verdict.missed_per_s is not None
    return -reached, verdict.layout.num_devices, not tried, -verdict.bound_per_s, verdict.layout
