"""KV that is there already: prompts begin with it, requests go where it is, and nothing is wrong.

The loop, the compiler and echo engines on a virtual clock. A `Witness` hears what the instances say
and holds what the loop tells its strategy against it, computed from nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.passes.errors import PassError
from sagec.planner import CompilingPlanner
from sagec.runtime.engines import EngineError, Failed, KVCached, Preempted, StepReport
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.kv import block_hashes
from sagec.runtime.loop import Cancel, Planned
from sagec.runtime.plan import RECOMPUTE, SWAP
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import ANY, Decision, State
from sagec.runtime.strategies import Strategy, create
from tests.echo_cluster import ONE, SPLIT, WIDE, Served, members, serve, spec
from tests.serving_graphs import Place, Round, Scene, rounds
from tests.taking_turns import TakesTurns

TWO = {"x0": "both", "x1": "both"}
BLOCK = 16
OPTIONS = {"step_us": "1000", "token_us": "10", "bytes_per_s": "10000000"}
LAX = settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=8)


@dataclasses.dataclass
class Witness(Served):
    """What instances said they have, against what the strategy is told that they have."""

    asked: dict[str, Request] = dataclasses.field(default_factory=dict)
    held: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    kept: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    produced: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def hear(self, said: Any) -> None:
        super().hear(said)
        match said:
            case KVCached():
                here = self.held.setdefault(said.instance, set())
                assert here.isdisjoint(said.stored) and here.issuperset(said.evicted)
                here |= set(said.stored)
                here -= set(said.evicted)
            case Preempted():
                self.kept[said.request_id] = said.instance, said.kept_tokens
            case StepReport():
                for name, _, _ in said.chunks:
                    self.kept.pop(name, None)
                for name, _, token in said.tokens:
                    self.produced.setdefault(name, []).append(token)
            case Cancel():
                if self.kept.get(said.request_id, ("", 0))[0] == said.instance:
                    del self.kept[said.request_id]
            case Failed(request_id=None):
                self.held.pop(said.instance, None)
                self.kept = {n: at for n, at in self.kept.items() if at[0] != said.instance}
            case Planned():
                self._check(said.state)

    def _check(self, state: State) -> None:
        expected = [
            [self._cached(name, instance) for instance in state.instances.ids]
            for name in state.waiting.ids
        ]
        assert state.cached_tokens.tolist() == expected or not len(state.waiting)
        for row, name in enumerate(state.running.ids):
            here = state.instances.ids[state.running.instance[row]]
            begun = bool(state.running.computed_tokens[row])
            cached = 0 if begun else self._cached(name, here)
            assert state.running.cached_tokens[row] == cached

    def _cached(self, name: str, instance: str) -> int:
        """The leading tokens of a request that an instance has, counted block by block."""
        where, kept = self.kept.get(name, ("", 0))
        if where == instance and kept:
            return kept
        request, held = self.asked[name], self.held.get(instance, set())
        if instance.startswith("d"):
            return 0  # it prefills nothing
        tokens = (*request.prompt, *self.produced.get(name, ()))
        count = 0
        for block_hash in block_hashes(tokens[:-1], BLOCK, request.adapter):
            if block_hash not in held:
                break
            count += BLOCK
        return count

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the instances computed, all together."""
        chunks = [c for e in self.events if isinstance(e, StepReport) for c in e.chunks]
        return sum(end - begin for _, begin, end in chunks)

    @property
    def reused_tokens(self) -> int:
        """Those that they did not."""
        return sum(n for e in self.events if isinstance(e, StepReport) for _, n in e.reused)

    def plans_with_reuse(self) -> list[tuple[str, str, int]]:
        """Request, instance and tokens of each reuse that was planned, in order."""
        return [
            (plan.request_ids[row], plan.target_instance_id, tokens)
            for planned in self.rounds
            for plan in planned.plans
            for row, tokens in zip(
                plan.reuses.row.tolist(), plan.reuses.tokens.tolist(), strict=True
            )
        ]


@functools.lru_cache
def planner_of(roles: tuple[tuple[str, str], ...], kv_blocks: int) -> CompilingPlanner:
    places = tuple(
        Place(name, role, "echo", kv_blocks=kv_blocks, block_tokens=BLOCK) for name, role in roles
    )
    module = Compiler().parse(Scene(places).cluster(), "cluster.mlir").module
    mode = "hybrid" if "both" in dict(roles).values() else "strict"
    return CompilingPlanner(module, mode=mode, horizon=6)


def run(
    roles: dict[str, str],
    asked: Sequence[Request],
    strategy: Strategy | None = None,
    kv_blocks: int = 60,
    prefix_cache: str = "on",
    engine: type[Echo] = Echo,
) -> Witness:
    """Serve; afterwards instances hold nothing but their caches, and the witness knows those."""
    witness = Witness(asked={request.id: request for request in asked})
    options = {**OPTIONS, "prefix_cache": prefix_cache}

    def start(name: str) -> Echo:
        return engine(spec(name, kv_blocks, BLOCK, **options), witness.clock)

    engines = {name: start(name) for name in roles}
    executor = ExecutorAPI(
        engines,
        members(engines, roles),
        witness.clock,
        watch=[witness.hear],
        restart=lambda name: Echo(spec(name, kv_blocks, BLOCK, **options), witness.clock),
    )
    planner = planner_of(tuple(roles.items()), kv_blocks)
    witness.take(executor.serve(asked, strategy or create("fifo"), planner))
    executor.check_integrity()
    for name in roles:
        left = executor.engines[name]
        assert isinstance(left, Echo)
        assert left.cached_blocks() == witness.held.get(name, set())
        assert len(left.cached_blocks()) <= kv_blocks
        assert left.kv_blocks_used() == 0 and left.kept_tokens() == {}
    return witness


def request(name: str, prompt: Sequence[int], generate: int = 8, at_us: int = 0) -> Request:
    return Request(id=name, prompt=tuple(prompt), max_output_tokens=generate, arrival_us=at_us)


@st.composite
def workloads(draw: Any, most: int = 10) -> list[Request]:
    """Requests whose prompts begin with one of two texts, or with what an earlier one was."""
    texts = [tuple(range(k, k + 100)) for k in (0, 500)]
    asked: list[Request] = []
    at_us = 0
    for number in range(draw(st.integers(1, most))):
        shared = draw(st.sampled_from([*texts, *(one.prompt for one in asked)]))
        prompt = (*shared[: draw(st.integers(0, 100))], *range(900, 900 + draw(st.integers(1, 40))))
        at_us += draw(st.sampled_from((0, 500, 20_000)))
        asked.append(request(f"r{number}", prompt, draw(st.integers(1, 20)), at_us))
    return asked


ROLES = pytest.mark.parametrize(
    "roles", [ONE, TWO, SPLIT, WIDE], ids=["one", "two", "split", "wide"]
)


# One round


@settings(LAX, max_examples=60)
@given(rounds())
def test_a_plan_begins_a_prompt_with_all_that_its_instance_has_and_no_more(asked: Round) -> None:
    planner = CompilingPlanner(Compiler().parse(asked.cluster(), "cluster.mlir").module)
    state = asked.state
    try:
        plans = planner.plan(state, asked.decision)
    except PassError:
        return
    waiting = {name: row for row, name in enumerate(state.waiting.ids)}
    running = {name: row for row, name in enumerate(state.running.ids)}
    for plan in plans:
        at = state.instances.ids.tolist().index(plan.target_instance_id)
        reused = dict(zip(plan.reuses.row.tolist(), plan.reuses.tokens.tolist(), strict=True))
        first = dict(zip(plan.chunks.row[::-1], plan.chunks.begin[::-1], strict=True))
        assert reused.keys() <= first.keys()
        for row, begin in first.items():
            name = plan.request_ids[row]
            if name in waiting:
                cached = state.cached_tokens[waiting[name], at]
            else:
                cached = state.running.cached_tokens[running[name]]
            assert reused.get(row, 0) == cached
            assert begin == cached + plan.rows.computed_tokens[row]


# With a cache


@ROLES
@LAX
@given(asked=workloads(), kv_blocks=st.sampled_from((20, 24, 40)))
def test_tokens_are_those_without_a_cache(roles, asked, kv_blocks):
    expected = serve(ONE, asked, kv_blocks=400).tokens
    witness = run(roles, asked, kv_blocks=kv_blocks)
    assert not witness.failures
    assert witness.tokens == expected
    assert {end.reason for end in witness.ends.values()} == {FinishReason.LENGTH}


@LAX
@given(asked=workloads(), roles=st.sampled_from([ONE, TWO]))
def test_what_is_reused_is_not_computed(asked, roles):
    witness = run(roles, asked, kv_blocks=400)
    whole = sum(len(one.prompt) for one in asked)
    assert witness.computed_tokens + witness.reused_tokens == whole
    without = run(roles, asked, kv_blocks=400, prefix_cache="off")
    assert without.computed_tokens == whole
    assert not without.held


def test_a_prompt_that_came_before_is_computed_but_for_its_end():
    prompt = range(100)
    again = request("again", prompt, at_us=100_000)
    witness = run(ONE, [request("first", prompt), again])
    assert witness.plans_with_reuse() == [("again", "x0", 96)]
    assert witness.reused_tokens == 96
    assert witness.ends["again"].report.reused_tokens == 96


def test_the_answer_is_reused_with_the_question():
    first = request("first", range(20), generate=30)
    answer = serve(ONE, [first]).tokens["first"]
    follow_up = request("next", (*first.prompt, *answer, 1, 2, 3), at_us=100_000)
    witness = run(ONE, [first, follow_up])
    assert witness.plans_with_reuse() == [("next", "x0", 48)]


def test_a_request_goes_where_its_prefix_is():
    texts = {"a": range(200), "b": range(500, 700)}
    first = [request(name, prompt) for name, prompt in texts.items()]
    again = [request(f"{name}2", p, at_us=100_000) for name, p in [*texts.items()][::-1]]
    witness = run(TWO, [*first, *again], kv_blocks=100)
    where = {
        plan.request_ids[row]: plan.target_instance_id
        for planned in witness.rounds
        for plan in planned.plans
        for row in plan.chunks.row.tolist()
    }
    assert where["a"] != where["b"]
    assert where["a2"] == where["a"] and where["b2"] == where["b"]
    assert {(name, tokens) for name, _, tokens in witness.plans_with_reuse()} == {
        ("a2", 192),
        ("b2", 192),
    }


def test_prefill_instances_keep_what_they_hand_over():
    asked = [request("first", range(100)), request("again", range(100), at_us=100_000)]
    witness = run(SPLIT, asked)
    assert witness.plans_with_reuse() == [("again", "p0", 96)]


def test_a_match_is_claimed_until_the_prompt_is_begun():
    """A newer plan that comes before the first chunk says once more what can be reused."""
    warm = [request("warm", range(100))]
    crowd = [request(f"c{i}", range(200 + i, 263 + i), at_us=100_000) for i in range(4)]
    late = [request(f"l{i}", (900, i), at_us=100_010 + 500 * i) for i in range(4)]
    again = request("again", range(100), at_us=100_000)
    witness = run(ONE, [*warm, *crowd, again, *late], kv_blocks=100)
    claims = [claim for claim in witness.plans_with_reuse() if claim[0] == "again"]
    assert len(claims) > 1 and set(claims) == {("again", "x0", 96)}
    assert witness.reused_tokens == 96


def test_hashes_that_the_sender_knows_are_taken_and_need_not_be_true():
    prompt = tuple(range(100))
    first = request("first", prompt)
    known = Request(
        id="known",
        prompt=prompt,
        max_output_tokens=4,
        arrival_us=100_000,
        block_hashes=block_hashes(prompt, BLOCK),
    )
    other = Request(
        id="other",
        prompt=tuple(range(1000, 1100)),
        max_output_tokens=4,
        arrival_us=200_000,
        block_hashes=block_hashes(prompt, BLOCK),
    )
    witness = run_unchecked(ONE, [first, known, other])
    expected = serve(ONE, [first, known, other]).tokens
    assert witness.tokens == expected
    assert [name for name, _, _ in witness.plans_with_reuse()] == ["known", "other"]
    assert witness.reused_tokens == 96


def run_unchecked(roles: dict[str, str], asked: Sequence[Request]) -> Witness:
    """As `run`, but hashes that lie are believed until an engine looks."""

    class Gullible(Witness):
        def _check(self, state: State) -> None:
            """What is cached is what the sender says."""

    witness = Gullible(asked={one.id: one for one in asked})
    engines = {name: Echo(spec(name, 60, BLOCK, **OPTIONS, prefix_cache="on"), witness.clock)
               for name in roles}  # fmt: skip
    executor = ExecutorAPI(engines, members(engines, roles), witness.clock, watch=[witness.hear])
    witness.take(executor.serve(asked, create("fifo"), planner_of(tuple(roles.items()), 60)))
    return witness


# Swapped out


@pytest.mark.parametrize("how", [RECOMPUTE, SWAP], ids=["recompute", "swap"])
@ROLES
@LAX
@given(
    asked=workloads(),
    prefix_cache=st.sampled_from(("on", "off")),
    kv_blocks=st.sampled_from((20, 24)),
)
def test_who_loses_a_place_gets_another_and_all_tokens(roles, how, asked, prefix_cache, kv_blocks):
    expected = serve(ONE, asked, kv_blocks=400).tokens
    witness = run(roles, asked, TakesTurns(how), kv_blocks, prefix_cache)
    assert not witness.failures
    assert witness.tokens == expected


@LAX
@given(asked=workloads())
def test_who_was_swapped_out_computes_nothing_twice(asked):
    """Every prompt token once, and of each row that came back the one token sampled last."""
    witness = run(ONE, asked, TakesTurns(), kv_blocks=400, prefix_cache="off")
    kept = {
        (e.request_id, e.kept_tokens)
        for e in witness.events
        if isinstance(e, Preempted) and e.kept_tokens
    }
    prompts = {one.id: len(one.prompt) for one in asked}
    began = [
        (name, begin)
        for event in witness.events
        if isinstance(event, StepReport)
        for name, begin, _ in event.chunks
    ]
    assert not witness.failures
    for name, tokens in kept:
        assert (name, tokens) in began or prompts[name] > tokens
    again = sum(1 for name, tokens in kept if tokens >= prompts[name])
    assert witness.computed_tokens == sum(prompts.values()) + again


def test_who_was_swapped_out_goes_back_and_is_not_sent_again():
    asked = [request("a", range(40), generate=20), request("b", range(100, 140), generate=20)]
    witness = run(TWO, asked, TakesTurns(most=1), prefix_cache="off")
    swaps = [e for e in witness.events if isinstance(e, Preempted)]
    assert {e.request_id for e in swaps} == {"a", "b"} and all(e.kept_tokens for e in swaps)
    reused = {name: (instance, tokens) for name, instance, tokens in witness.plans_with_reuse()}
    assert reused == {e.request_id: (e.instance, e.kept_tokens) for e in swaps}


def test_who_was_swapped_out_of_a_decode_goes_on_there_though_it_prefills_nothing():
    asked = [request("a", range(40), generate=20), request("b", range(100, 140), generate=20)]
    witness = run(SPLIT, asked, TakesTurns(most=1, only_on="d0"), prefix_cache="off")
    swaps = [e for e in witness.events if isinstance(e, Preempted)]
    assert {e.request_id for e in swaps} == {"a", "b"}
    reused = {name: (instance, tokens) for name, instance, tokens in witness.plans_with_reuse()}
    assert reused == {e.request_id: ("d0", e.kept_tokens) for e in swaps}
    assert witness.computed_tokens == 40 + 40 + len(swaps)


@dataclasses.dataclass(frozen=True)
class Parks:
    """When `a` has some tokens it loses its place; it goes on at `then`, or with None never."""

    then: int | None = None
    name = "parks"

    def decide(self, state: State) -> Decision:
        waiting, running = state.waiting, state.running
        parked = waiting.preemptions > 0
        rows = waiting.rows if self.then is not None else np.flatnonzero(~parked)
        tired = (running.output_tokens >= 3) & (running.preemptions == 0)
        tired &= running.ids == "a"
        decision = Decision.admit(rows, waiting).preempt(np.flatnonzero(tired), "tired", SWAP)
        decision.prefill_on[parked] = ANY if self.then is None else self.then
        decision.decode_on[parked] = decision.prefill_on[parked]
        return decision


def parked(strategy: Parks, **fields: Any) -> tuple[Witness, dict[str, Echo], list[Any]]:
    """Serve `a`, which is swapped out, beside another; `a` is cancelled when it has been for long
    where it has no timeout and never goes on."""
    a = Request(id="a", prompt=tuple(range(40)), max_output_tokens=30, **fields)
    asked = [a, request("b", range(100, 140), generate=60)]
    witness = Witness(asked={one.id: one for one in asked})
    engines = {name: Echo(spec(name, 60, BLOCK, **OPTIONS), witness.clock) for name in TWO}
    said: list[Any] = []
    executor = ExecutorAPI(
        engines, members(engines, TWO), witness.clock, watch=[witness.hear, said.append]
    )
    held = []
    for output in executor.serve(asked, strategy, planner_of(tuple(TWO.items()), 60)):
        witness.take([output])
        held += [name for name, engine in engines.items() if engine.kept_tokens()]
        if len(held) == 8 and strategy.then is None and a.timeout_us is None:
            executor.cancel("a")
    assert held or strategy.then is not None
    return witness, engines, said


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, FinishReason.CANCELLED), ({"timeout_us": 25_000}, FinishReason.TIMEOUT)],
    ids=["cancelled", "timed-out"],
)
def test_what_is_kept_of_a_request_goes_when_it_ends_while_it_waits(fields, reason):
    witness, engines, said = parked(Parks(), **fields)
    assert witness.ends["a"].reason is reason
    (kept_by,) = [e.instance for e in witness.events if isinstance(e, Preempted)]
    assert Cancel(kept_by, "a") in said
    assert all(engine.kept_tokens() == {} for engine in engines.values())


@pytest.mark.parametrize("then", [0, 1])
def test_who_goes_on_elsewhere_is_forgotten_where_it_was(then):
    witness, engines, said = parked(Parks(then))
    expected = serve(ONE, [*witness.asked.values()], kv_blocks=400).tokens
    assert witness.tokens == expected
    (kept,) = [e for e in witness.events if isinstance(e, Preempted)]
    assert kept.kept_tokens
    back = kept.instance == f"x{then}"
    assert (Cancel(kept.instance, "a") in said) is not back
    assert witness.plans_with_reuse() == ([("a", f"x{then}", kept.kept_tokens)] if back else [])
    assert all(engine.kept_tokens() == {} for engine in engines.values())


# Failures


class Mortal(Echo):
    """Dies once, in its tenth turn."""

    turns = 0

    def poll(self, timeout_s: float = 0.0):
        self.turns += 1
        if self.turns == 10:
            raise EngineError("out of luck")
        return super().poll(timeout_s)


@ROLES
@pytest.mark.parametrize("strategy", [create("fifo"), TakesTurns()], ids=lambda s: s.name)
@LAX
@given(asked=workloads())
def test_an_instance_that_is_made_again_has_nothing(roles, strategy, asked):
    expected = serve(ONE, asked, kv_blocks=400).tokens
    witness = run(roles, asked, strategy, engine=Mortal)
    assert witness.tokens == expected
