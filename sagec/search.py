"""Which layout of a cluster serves most of a workload well: ranks, prefill and decode apart or not,
and how many instances of each.

The goodput of a layout is the highest rate of arrivals at which a share of the requests is served
well, found by bisection in simulated time. A closed form says beforehand what a layout cannot
exceed; who cannot exceed what others reach is not simulated.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from sagec import language
from sagec.diagnostics import Diagnostic
from sagec.language.syntax import Cluster, Instance, Program
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.planner import planner_of
from sagec.runtime.request import Request
from sagec.runtime.strategies import Strategy
from sagec.simulation import simulate

PRECISION = 0.05
"""How close the bisection comes to the goodput, as a share of it."""

REACHED = "reaches its bound; more requests a trial (--limit) may tell what breaks first"
"""Why no more, where each trial went well: a short one ends before queues grow."""

PROMISES, MOST_TIMES = 4, 4
"""A trial lasts as long as so many requests may take, one after the other; it has so many times the
requests that it has at least."""

_KEPT = ("block", "budget", "max_batch", "kv_dtype", "dtype", "options", "model")
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

    def __str__(self) -> str:
        groups = (
            (self.both, self.both_tp, "both"),
            (self.prefill, self.prefill_tp, "prefill"),
            (self.decode, self.decode_tp, "decode"),
        )
        parts = [f"{count} {role} of tp {tp}" for count, tp, role in groups if count]
        return f"{' + '.join(parts)}, chunk {self.chunk}"


@dataclass(frozen=True)
class Verdict:
    """What became of a layout.

    bound_per_s: requests a second that it cannot exceed. goodput_per_s: those that it reaches;
    None where it was not simulated. why: in words, where it lost.
    """

    layout: Layout
    bound_per_s: float
    goodput_per_s: float | None = None
    ttft_p90_ms: float | None = None
    tpot_p90_ms: float | None = None
    why: str = ""

    @property
    def per_device(self) -> float:
        """Goodput of a device; 0.0 where it was not simulated."""
        return (self.goodput_per_s or 0.0) / self.layout.num_devices


@dataclass(frozen=True)
class Target:
    """attained: the share of requests that is to be served well. Times are microseconds."""

    ttft_us: int
    tpot_us: int
    attained: float = 0.9


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

    def verdicts(
        self, candidates: Sequence[Layout], best: int = 5, tell: Callable[[str], None] = print
    ) -> list[Verdict]:
        """A verdict for each, the best first; `best` of them, at least, are simulated.

        tell: hears of each that was simulated.
        """
        bounded = sorted((self._bounded(layout) for layout in candidates), key=_by_bound)
        found: list[Verdict] = []
        for verdict in bounded:
            reached = sorted((one.goodput_per_s or 0.0 for one in found), reverse=True)
            enough = reached[best - 1] if len(reached) >= best else 0.0
            if verdict.bound_per_s <= enough:
                if not verdict.why:
                    why = "its bound is below what others reach"
                    verdict = dataclasses.replace(verdict, why=why)
                found.append(verdict)
                continue
            found.append(self._simulated(verdict))
            tell(f"{found[-1].layout}: {found[-1].goodput_per_s:.3g} /s")
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
        """What the file says of its own instances of the role, or of its first ones."""
        instances = self._cluster.instances
        like = next((i for i in instances if _role(i) == role), instances[0])
        source = self._program.source.text
        said = {name: like.settings[name] for name in _KEPT if name in like.settings}
        return "".join(f" {name} {source[v.begin : v.end]}" for name, v in said.items())

    def _bounded(self, layout: Layout) -> Verdict:
        try:
            placed = topology_of(self.module(layout)).instances
        except Diagnostic as error:
            return Verdict(layout, 0.0, why=f"does not fit: {error.message} {error.hint}".strip())
        bound, why = self._load.bound(placed, self._target)
        return Verdict(layout, bound, why=why)

    def _simulated(self, verdict: Verdict) -> Verdict:
        """Bisect the rate between none and the bound."""
        low, high = 0.0, verdict.bound_per_s
        reached: dict[str, Any] = {}
        missed: dict[str, Any] = {}
        while high - low > PRECISION * high and high > verdict.bound_per_s / 64:
            rate = (low + high) / 2
            run = self._run(verdict.layout, rate)
            if run["attained"] >= self._target.attained:
                low, reached = rate, run
            else:
                high, missed = rate, run
        shown = reached or missed
        return dataclasses.replace(
            verdict,
            goodput_per_s=low,
            ttft_p90_ms=shown.get("ttft_p90_ms"),
            tpot_p90_ms=shown.get("tpot_p90_ms"),
            why=self._limit(high, missed) if missed else REACHED,
        )

    def _limit(self, rate: float, run: dict[str, Any]) -> str:
        """What stands in the way of a higher rate."""
        asked = {"ttft": self._target.ttft_us / 1e3, "tpot": self._target.tpot_us / 1e3}
        over = [
            f"{name.upper()} p90 {found:.0f} ms of {promised:g}"
            for name, promised in asked.items()
            if (found := run[f"{name}_p90_ms"]) is not None and found > promised
        ]
        told = " and ".join(over) or "some miss the one promise, some the other"
        return f"at {rate:.3g} /s {run['attained']:.0%} are served well: {told}"

    def _run(self, layout: Layout, rate_per_s: float) -> dict[str, Any]:
        """Serve the requests as they come at so many a second."""
        module = self.module(layout)
        requests = self._trial(rate_per_s)
        planner = planner_of(module)
        simulated = simulate(module, requests, self._make_strategy(), planner)
        figures = simulated.figures()
        return {
            "attained": simulated.served_well / len(requests),
            "ttft_p90_ms": (figures["ttft_ms"] or {}).get("p90"),
            "tpot_p90_ms": (figures["tpot_ms"] or {}).get("p90"),
        }

    def _trial(self, rate_per_s: float) -> list[Request]:
        """Requests at such a rate for long enough that queues build up, as far as time allows.

        A layout that is slower than they come must have the time to fall behind its promises.
        """
        output = sum(self._load.outputs) / len(self._load.outputs)
        promised_s = (self._target.ttft_us + output * self._target.tpot_us) / 1e6
        least = self._trial_requests
        count = min(round(PROMISES * promised_s * rate_per_s), MOST_TIMES * least)
        requests = repeated(self._requests, max(count, least))
        return Load.of(requests).at_rate(requests, rate_per_s)


def repeated(requests: Sequence[Request], count: int) -> list[Request]:
    """At least `count` requests, the given ones again and again, each time when the last had come.

    A handful of requests that come at once wait for nobody, whatever their rate.
    """
    found, span_us = list(requests), Load.of(requests).span_us
    for turn in range(1, -(-count // len(requests))):
        found += [
            replace(one, id=f"{one.id}~{turn}", arrival_us=one.arrival_us + turn * span_us)
            for one in requests
        ]
    return found


@dataclass(frozen=True)
class Load:
    """A workload's lengths and arrivals, in tokens and microseconds."""

    prompts: tuple[int, ...]
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
        prompts = tuple(len(request.prompt) for request in requests)
        outputs = tuple(request.max_output_tokens or 1 for request in requests)
        return cls(prompts, outputs, tuple(arrivals))

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

    def bound(self, placed: Sequence[Placed], target: Target) -> tuple[float, str]:
        """Requests a second that no schedule exceeds, and why where that is 0.

        Each prompt takes its arithmetic, and each token of output its share of a decode step of
        the largest batch that keeps the promise and fits the KV.
        """
        share = target.attained
        longest = int(np.quantile(self.prompts, share, method="inverted_cdf"))
        alone_us = {
            o.name: float(o.cost.prefill_us(0, longest)) for o in placed if o.runs("prefill")
        }
        fastest = min(alone_us, key=alone_us.__getitem__)
        if alone_us[fastest] > target.ttft_us:
            return 0.0, (
                f"a prompt of {longest} tokens, longer than {share:.0%} are, takes "
                f"{alone_us[fastest] / 1e3:.0f} ms alone on {fastest}"
            )
        decodes = float(np.mean(self.outputs)) - 1  # the first token comes of the prompt
        request = MeanRequest(float(np.mean(self.prompts)), decodes)
        token_us = {one.name: _token_us(one, request.context, target) for one in placed}
        if decodes and all(token_us[one.name] is None for one in placed if one.runs("decode")):
            return 0.0, "one decode alone takes longer than its promise"
        # a share of the requests may be turned away
        return _rate_per_s(placed, token_us, request) / share, ""


class MeanRequest(NamedTuple):
    """Of all requests: tokens of the prompt, and those that are decoded after the first one."""

    prompt: float
    decodes: float

    @property
    def context(self) -> float:
        """Tokens of KV at a decode."""
        return self.prompt + self.decodes / 2


def _token_us(one: Placed, context: float, target: Target) -> float | None:
    """Time of a token of output in the best batch; None where no batch keeps the promise."""
    most = min(one.max_batch, int(one.kv_blocks * one.block_tokens // max(context, 1)))
    batches = np.unique(np.geomspace(1, max(1, most), 24).astype(int))
    step_us = one.cost.step_us(batches, batches * context, batches * context, batches)
    kept = step_us <= target.tpot_us
    return float((step_us / batches)[kept].min()) if kept.any() else None


def _rate_per_s(
    placed: Sequence[Placed], token_us: Mapping[str, float | None], request: MeanRequest
) -> float:
    """Instances that do both share their time; the others are as fast as the slower phase."""
    both = prefill = decode = 0.0
    for one in placed:
        if (us := token_us[one.name] if request.decodes else 0.0) is None and one.runs("decode"):
            continue
        decodes_us = request.decodes * (us or 0.0)
        if one.role == "both":
            both += 1e6 / _both_us(one, decodes_us, request)
        elif one.role == "prefill":
            prefill += 1e6 / float(one.cost.prefill_us(0, request.prompt))
        else:
            decode += 1e6 / decodes_us if decodes_us else np.inf
    return both + min(prefill, decode)


def _both_us(one: Placed, decodes_us: float, request: MeanRequest) -> float:
    """The time that a request takes, at least, of an instance that does both.

    A step of both phases reads weights and KV while it computes prompts, so that one may hide
    behind the other; a fit to measured steps says what is left of that.
    """
    prefill_us = float(one.cost.prefill_us(0, request.prompt))
    if one.cost.fit is not None:
        return prefill_us + decodes_us
    token_us = float(one.cost.prefill_us(request.context, request.context + 1))
    return max(prefill_us + request.decodes * token_us, decodes_us)


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


def _by_bound(verdict: Verdict) -> tuple[float, Layout]:
    return -verdict.bound_per_s, verdict.layout


def _by_goodput(verdict: Verdict) -> tuple[float, int, float, Layout]:
    """The best first; of equals the one with fewer devices."""
    reached = verdict.goodput_per_s or 0.0
    return -reached, verdict.layout.num_devices, -verdict.bound_per_s, verdict.layout
