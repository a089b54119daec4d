"""Random legal plans for TurboMind: runs of the loop and the compiler under drawn decisions.

A `Serving` is drawn first: instances, requests, and a seed. `Drawn` decides each round by that seed
and the round's number: who goes in, in which order, in which chunks, where, who leaves and how, how
far a plan looks, and when it is superseded. The compiler makes plans of that for the target
turbomind, so that each has passed `legalize`; `faults` holds them against the target's rules once
more, by the columns of the plan alone.

`on_echo` serves on engines that check every plan, under a virtual clock. `on_turbomind` serves on
TurboMind's own scheduler with the toy maths; run it in a process of its own (`turbomind_child`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.runtime.clock import Clock, VirtualClock
from sagec.runtime.conformance import Conformance
from sagec.runtime.engines import Engine, Failed, InstanceSpec, StepReport, create
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished, Instance, Planned, Retried, Token
from sagec.runtime.plan import RECOMPUTE, SWAP, ExecutionPlan, check
from sagec.runtime.request import Request
from sagec.runtime.state import Decision, State
from sagec.runtime.strategies import _admission, _room

VOCAB = 1000

MODEL = (
    "cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, "
    f"ffn = 128, vocab = {VOCAB}, max_context = 4096}}"
)

CLUSTERS = {
    "one": {"i0": "both"},
    "two": {"i0": "both", "i1": "both"},
    "pair": {"p0": "prefill", "d0": "decode"},
    "both and decode": {"i0": "both", "d0": "decode"},
}


class Asked(msgspec.Struct, frozen=True):
    """A request: its prompt begins with `shared` tokens that all of its family begin with.

    stops: some tokens end its output. cancel_at: after so many tokens its client leaves.
    """

    prompt_tokens: int
    generate: int
    family: int = 0
    shared: int = 0
    arrival_us: int = 0
    stops: bool = False
    cancel_at: int | None = None


class Serving(msgspec.Struct, frozen=True):
    """Instances, what is asked of them, and the seed of all decisions."""

    seed: int
    cluster: str
    kv_blocks: int
    block_tokens: int
    max_step_tokens: int
    max_batch: int
    mode: str
    tp: int
    prefix_cache: bool
    asked: tuple[Asked, ...]

    def module(self) -> str:
        """The cluster as a file, for the target turbomind."""
        scalars = (
            f"tp = {self.tp}, kv_blocks = {self.kv_blocks}, block_tokens = {self.block_tokens}, "
            f"max_step_tokens = {self.max_step_tokens}, max_batch = {self.max_batch}, "
            'max_partial_prefills = 1, options = "maths=toy"'
        )
        lines = [MODEL]
        for name, role in CLUSTERS[self.cluster].items():
            ranks = [f"@{name}_{rank}" for rank in range(self.tp)]
            lines += [f"cluster.device {device}\ncluster.link {device} to @hub" for device in ranks]
            lines.append(
                f'cluster.instance @{name} on [{", ".join(ranks)}] engine "turbomind" '
                f"role {role} model @m {{{scalars}}}"
            )
        return "\n".join(["cluster.switch @hub", *lines]) + "\n"

    def requests(self) -> list[Request]:
        """The requests, with their prompts."""
        return [self._request(f"r{number}", one) for number, one in enumerate(self.asked)]

    def _request(self, name: str, asked: Asked) -> Request:
        family = np.random.default_rng(asked.family).integers(1, VOCAB, asked.prompt_tokens)
        own = np.random.default_rng((self.seed, int(name[1:]))).integers(1, VOCAB, len(family))
        is_shared = np.arange(len(family)) < asked.shared
        return Request(
            id=name,
            prompt=tuple(np.where(is_shared, family, own).tolist()),
            max_output_tokens=asked.generate,
            stop_tokens=tuple(range(0, VOCAB, 9))[:32] if asked.stops else (),
            arrival_us=asked.arrival_us,
        )


@st.composite
def servings(draw: Callable[[Any], Any], most_requests: int = 8) -> Serving:
    """Any serving whose requests each fit an empty instance."""
    block_tokens = draw(st.sampled_from((4, 16, 64)))
    kv_blocks = draw(st.integers(6, 24))
    room = kv_blocks * block_tokens
    cluster = draw(st.sampled_from(tuple(CLUSTERS)))
    modes = ("strict",) if cluster == "pair" else ("time-share", "hybrid")
    return Serving(
        seed=draw(st.integers(0, 2**20)),
        cluster=cluster,
        kv_blocks=kv_blocks,
        block_tokens=block_tokens,
        max_step_tokens=draw(st.sampled_from((8, 24, 64, 256))),
        max_batch=draw(st.sampled_from((2, 4, 8))),
        mode=draw(st.sampled_from(modes)),
        tp=draw(st.sampled_from((1, 1, 1, 2))),
        prefix_cache=draw(st.booleans()),
        asked=tuple(draw(st.lists(_asked(room), min_size=1, max_size=most_requests))),
    )


@st.composite
def _asked(draw: Callable[[Any], Any], room: int) -> Asked:
    prompt = draw(st.integers(1, min(room - 2, 150)))
    generate = draw(st.integers(1, min(room - prompt - 1, 30)))
    return Asked(
        prompt_tokens=prompt,
        generate=generate,
        family=draw(st.integers(0, 1)),
        shared=draw(st.sampled_from((0, prompt // 2, prompt))),
        arrival_us=draw(st.sampled_from((0, 0, 2000, 9000))),
        stops=draw(st.sampled_from((False, False, True))),
        cancel_at=draw(st.sampled_from((None, None, None, None, 1, 3))),
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Decides by a seed and the round's number.

    most_preemptions: of a request, so that all of them end.
    """

    seed: int
    modes: tuple[str, ...] = ("",)
    most_preemptions: int = 2
    name: ClassVar[str] = "drawn"

    def decide(self, state: State) -> Decision:
        """Anything that keeps to the room there is."""
        random = np.random.default_rng((self.seed, state.round))
        waiting = state.waiting
        order = random.permutation(len(waiting))
        if len(state.running):
            order = order[random.random(len(order)) < random.choice([0.3, 1.0])]
        crowded = _room.overflowing(state, random.permutation(len(state.running)))
        because = _admission.words(np.zeros(len(waiting), np.int64), ["drawn"])
        chooser = str(random.choice(["", "least-load", "round-robin"]))
        decision = _admission.decide(state, order, because, chooser, len(crowded))
        decision = decision.preempt(crowded, "no room", int(random.choice([RECOMPUTE, SWAP])))
        if not len(crowded):
            decision = self._preempting(decision, state, random)
        return dataclasses.replace(
            decision,
            chunk_tokens=random.choice([0, 0, 1, 3, 17, 40], len(waiting)),
            mode=str(random.choice(self.modes)),
            horizon_steps=int(random.choice([1, 2, 5, 16, 40])),
            step_prompt_tokens=int(random.choice([0, 0, 5, 30])),
            again_us=state.now_us + int(random.choice([300, 2000, 20000])),
        )

    def _preempting(
        self, decision: Decision, state: State, random: np.random.Generator
    ) -> Decision:
        """The same, and now and then some of those that run leave."""
        running = state.running
        may = ~running.arriving & (running.preemptions < self.most_preemptions)
        leaves = may & (random.random(len(running)) < random.choice([0.0, 0.0, 0.3]))
        swaps = random.random(len(running)) < 0.5
        decision = decision.preempt(np.flatnonzero(leaves & ~swaps), "drawn")
        return decision.preempt(np.flatnonzero(leaves & swaps), "drawn", SWAP)


def faults(serving: Serving, plan: ExecutionPlan) -> Iterator[str]:
    """What in a plan TurboMind's loop would abort on, or die of."""
    chunks, rows = plan.chunks, plan.rows
    partial = chunks.end < rows.prompt_tokens[chunks.row]
    computes = np.zeros(plan.num_steps, np.int64)
    np.add.at(computes, chunks.step, chunks.end - chunks.begin)
    for step in np.unique(chunks.step).tolist():
        of_step = np.flatnonzero(chunks.step == step)
        if partial[of_step[:-1]].any():
            yield f"{plan.plan_id}: step {step} goes on after an unfinished prompt"
    waits = len(plan.imports) > 0  # for KV, and only the engine knows how long
    mixed = plan.mode == "hybrid"
    decodes_in = [step for step in range(plan.num_steps) if mixed or not computes[step]]
    for row, begin, until in zip(
        plan.decodes.row.tolist(), plan.decodes.begin_step.tolist(),
        plan.decodes.until_tokens.tolist(), strict=True,
    ):  # fmt: skip
        held = max(int(rows.computed_tokens[row]), int(rows.prompt_tokens[row]))
        computes[[step for step in decodes_in if step >= begin][: until - held]] += 1
    if (computes == 0).any() and not waits:
        yield f"{plan.plan_id}: step {int(computes.argmin())} computes nothing"
    if computes.max(initial=0) > serving.max_step_tokens and not waits:
        yield f"{plan.plan_id}: a step computes {computes.max()}"
    if (used := plan.estimates.kv_blocks.max(initial=0)) > serving.kv_blocks:
        yield f"{plan.plan_id}: {used} blocks of {serving.kv_blocks}"


class Outcome(msgspec.Struct):
    """What came of a serving: tokens and end of each request, and what went on underneath.

    deviations: which step, of which request, tokens planned and computed.
    """

    tokens: dict[str, list[int]] = {}
    ends: dict[str, str] = {}
    details: dict[str, str] = {}
    steps: int = 0
    plans: int = 0
    preempted: int = 0
    swapped: int = 0
    moves: int = 0
    reused_tokens: int = 0
    conformance: dict[str, int] = {}
    deviations: list[tuple[str, str, int, int]] = []
    failures: list[str] = []
    faults: list[str] = []


class _Watch:
    """Hears a run, and sums it up."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.outcome = serving, Outcome()
        self.reports: list[StepReport] = []

    def hear(self, said: object) -> None:
        """Count plans and steps, and look at each."""
        outcome = self.outcome
        match said:
            case Planned():
                for plan in said.plans:
                    check(plan)
                    outcome.plans += 1
                    outcome.preempted += len(plan.preemptions)
                    outcome.swapped += int((plan.preemptions.how == SWAP).sum())
                    outcome.moves += len(plan.exports)
                    outcome.faults += faults(self.serving, plan)
            case StepReport():
                self.reports.append(said)
                outcome.steps += said.steps
                outcome.reused_tokens += sum(tokens for _, tokens in said.reused)
                where = f"step {said.step} of {said.plan_id} on {said.instance}"
                outcome.deviations += [(where, *deviation) for deviation in said.deviations]
            case Failed() | Retried():
                outcome.failures.append(repr(said))

    def end(self) -> Outcome:
        """The sum."""
        self.outcome.conformance = dataclasses.asdict(Conformance.of(self.reports))
        return self.outcome


def serve(serving: Serving, engines: Mapping[str, Engine], clock: Clock | None) -> Outcome:
    """Serve on these engines, which are empty again afterwards."""
    instances = [
        Instance(
            id=name, role=role, engine="turbomind", capability=engines[name].capability(), model="m"
        )
        for name, role in CLUSTERS[serving.cluster].items()
    ]
    watch = _Watch(serving)
    executor = ExecutorAPI(engines, instances, clock, watch=[watch.hear])
    module = Compiler().parse(serving.module(), "serving.mlir").module
    planner = CompilingPlanner(module, mode=serving.mode)
    modes = ("",) if serving.cluster == "pair" else ("", "time-share", "hybrid")
    cancel_at = {f"r{n}": asked.cancel_at for n, asked in enumerate(serving.asked)}
    outcome = watch.outcome
    for output in executor.serve(serving.requests(), Drawn(serving.seed, modes), planner):
        if isinstance(output, Token):
            tokens = outcome.tokens.setdefault(output.request_id, [])
            assert output.index == len(tokens), f"token {output.index} after {len(tokens)}"
            tokens.append(output.token)
            if len(tokens) == cancel_at[output.request_id]:
                executor.cancel(output.request_id)
        elif isinstance(output, Finished):
            outcome.ends[output.request_id] = str(output.reason)
            outcome.details[output.request_id] = output.detail
    executor.check_integrity()
    return watch.end()


def on_echo(serving: Serving) -> Outcome:
    """Serve on echo engines, which fail what a plan gets wrong."""
    from sagec.runtime.engines.echo import Echo

    clock = VirtualClock()
    options = {"step_us": "1000", "token_us": "10", "bytes_per_s": "10000000", "vocab": str(VOCAB)}
    options["prefix_cache"] = "on" if serving.prefix_cache else "off"
    engines = {
        name: Echo(_spec(serving, name, "echo", options), clock)
        for name in CLUSTERS[serving.cluster]
    }
    return serve(serving, engines, clock)


def on_turbomind(serving: dict[str, Any], options: dict[str, str] | None = None) -> dict[str, Any]:
    """Serve on TurboMind with the toy maths; arguments and answer as JSON has them."""
    asked = msgspec.convert(serving, Serving)
    said = {
        "maths": "toy",
        "tp": str(asked.tp),
        "prefix_cache": "on" if asked.prefix_cache else "off",
        "channel": "local",
        "max_batch": str(4 * len(asked.asked)),
        "step_tokens": str(asked.max_step_tokens),
        **(options or {}),
    }
    engines: dict[str, Engine] = {}
    try:
        for name in CLUSTERS[asked.cluster]:
            engines[name] = create(_spec(asked, name, "turbomind", said))
        answer: dict[str, Any] = msgspec.to_builtins(serve(asked, engines, None))
    finally:
        for engine in engines.values():
            engine.close()
    return answer


def expected(serving: Serving, generate: Callable[..., list[int]]) -> dict[str, list[int]]:
    """The tokens of each request alone. generate: prompt, count, vocabulary and stop tokens to
    output."""
    return {
        request.id: generate(request.prompt, request.max_output_tokens, VOCAB, request.stop_tokens)
        for request in serving.requests()
    }


def wrong(serving: Serving, outcome: Outcome, right: Mapping[str, Sequence[int]]) -> list[str]:
    """What came out other than it should have: nothing, where the engine keeps its word."""
    said = [*outcome.faults]
    for number, asked in enumerate(serving.asked):
        name = f"r{number}"
        tokens, whole = outcome.tokens.get(name, []), list(right[name])
        cancelled = asked.cancel_at is not None and len(whole) > asked.cancel_at
        if cancelled and outcome.ends.get(name) == "cancelled":
            whole = whole[: len(tokens)]
        if tokens != whole:
            ended = f"{outcome.ends.get(name)} {outcome.details.get(name)}"
            said.append(f"{name}: {tokens}, not {whole}; it ended: {ended}")
        elif outcome.ends.get(name) not in ("length", "stop", "cancelled"):
            said.append(f"{name}: {outcome.ends.get(name)} {outcome.details.get(name)}")
    return said


def _spec(serving: Serving, name: str, engine: str, options: dict[str, str]) -> InstanceSpec:
    return InstanceSpec(
        id=name,
        engine=engine,
        model="",
        kv_blocks=serving.kv_blocks,
        block_tokens=serving.block_tokens,
        options=options,
    )
