"""TurboMind engines over the toy model, driven through the seam by plans written by hand.

Each function below is a scenario that runs in a process of its own (`turbomind_child`), because
what goes wrong in TurboMind ends its process. It returns what happened, and the test what should.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from sagec.runtime import comm
from sagec.runtime.engines import (
    Cancelled,
    Event,
    Failed,
    InstanceSpec,
    KVCached,
    KVExported,
    KVHandle,
    KVImported,
    PlanDone,
    Preempted,
    StepReport,
    create,
)
from sagec.runtime.engines.turbomind.engine import TurboMindEngine
from sagec.runtime.engines.turbomind.toy.reference import generate
from sagec.runtime.kv import block_hashes
from sagec.runtime.plan import SWAP
from sagec.runtime.request import Request, Sampling
from tests import torch_engines
from tests.torch_engines import plan, reused, steps

VOCAB = 1000
HUNG_S = 60.0
"""Nothing here takes longer; who waits so long waits for what never comes."""


@contextmanager
def engines(
    *ids: str, kv_blocks: int = 64, model: str = "", **options: str
) -> Iterator[list[TurboMindEngine]]:
    """Instances of 16-token blocks; without a prefix cache unless an option says otherwise."""
    made: list[TurboMindEngine] = []
    given = {"maths": "toy", "channel": "local", "prefix_cache": "off", **options}
    try:
        for id in ids:
            spec = InstanceSpec(
                id=id,
                engine="turbomind",
                model=model,
                kv_blocks=kv_blocks,
                block_tokens=16,
                options=given,
            )
            made.append(create(spec))  # type: ignore[arg-type]
        yield made
        for engine in made:
            engine.check_integrity()
    finally:
        for engine in made:
            engine.close()


def prompt(length: int, seed: int = 7) -> tuple[int, ...]:
    return tuple((seed * (i + 1) + i * i) % (VOCAB - 3) for i in range(length))


def request(id: str, tokens: int | tuple[int, ...], count: int = 12, **fields: Any) -> Request:
    given = prompt(tokens) if isinstance(tokens, int) else tokens
    return Request(id=id, prompt=given, max_output_tokens=count, **fields)


def expected(*requests: Request) -> dict[str, list[int]]:
    """What the reference model says."""
    return {r.id: generate(r.prompt, r.max_output_tokens or 0, VOCAB) for r in requests}


def hear(
    *polled: TurboMindEngine, until: Callable[[list[Event]], bool], carries: bool = True
) -> list[Event]:
    """Poll the engines in turn, carrying KV between them, until enough has happened."""
    events: list[Event] = []
    by_id = {engine._id: engine for engine in polled}
    end_s = time.monotonic() + HUNG_S
    while not until(events):
        assert time.monotonic() < end_s, f"nothing more happens after {events[-3:]}"
        for engine in polled:
            events += (new := engine.poll(0.001))
            for event in new:
                if carries and isinstance(event, KVExported):
                    by_id[event.handle.target].receive(event.handle)
    return events


def done(*plan_ids: str) -> Callable[[list[Event]], bool]:
    """When these plans are done."""
    return lambda events: {*plan_ids} <= {e.plan_id for e in events if isinstance(e, PlanDone)}


def told(kind: type, count: int = 1) -> Callable[[list[Event]], bool]:
    """When an event of this kind has come."""
    return lambda events: sum(isinstance(event, kind) for event in events) >= count


def outputs(events: Iterable[Event], first: int = 0) -> dict[str, list[int]]:
    return {id: list(tokens) for id, tokens in torch_engines.outputs(events, first).items()}


def chunks(events: Iterable[Event]) -> list[tuple[tuple[str, int, int], ...]]:
    """The prompt tokens of each step."""
    return [step.chunks for step in steps(events)]


def deviations(events: Iterable[Event]) -> list[Any]:
    return [step.deviations for step in steps(events) if step.deviations]


def failures(events: Iterable[Event]) -> dict[str | None, str]:
    return {event.request_id: event.error for event in events if isinstance(event, Failed)}


# Scenarios


def chunked(tp: int = 1) -> dict[str, Any]:
    """Two prompts in chunks between each other's decodes."""
    a, b = request("a", 40, 10), request("b", 70, 8)
    with engines("i0", tp=str(tp)) as (one,):
        steps_of_a = [(0, "a", 0, 20), (1, "a", 20, 40)]
        steps_of_b = [(0, "b", 0, 30), (2, "b", 30, 33), (3, "b", 33, 70)]
        given = plan(
            "i0",
            {"a": 40, "b": 70},
            chunks=[steps_of_a[0], steps_of_a[1], *steps_of_b[1:], (1, "b", 0, 30)],
            decodes={"a": 100, "b": 100},
        )
        one.submit(given, [a, b])
        events = hear(one, until=done("plan"))
    return {
        "outputs": outputs(events),
        "expected": expected(a, b),
        "chunks": chunks(events),
        "deviations": deviations(events),
    }


def time_shared() -> dict[str, Any]:
    """A plan in which a step with chunks decodes nobody."""
    a, b = request("a", 20, 8), request("b", 40, 4)
    with engines("i0") as (one,):
        given = plan(
            "i0",
            {"a": 20, "b": 40},
            chunks=[(0, "a", 0, 20), (2, "b", 0, 16), (3, "b", 16, 40)],
            decodes={"a": 100, "b": 100},
        )
        one.submit(msgspec.structs.replace(given, mode="time-share"), [a, b])
        events = hear(one, until=done("plan"))
    return {
        "outputs": outputs(events),
        "expected": expected(a, b),
        "mixed": [bool(step.chunks and step.decodes) for step in steps(events)],
    }


def preempted(how: int, tp: int = 1) -> dict[str, Any]:
    """A row leaves in the middle of its output, another runs, and it goes on."""
    a, b = request("a", 40, 16), request("b", 20, 4)
    with engines("i0", tp=str(tp)) as (one,):
        first = plan("i0", {"a": 40}, chunks=[(0, "a", 0, 40)], decodes={"a": 45}, plan_id="p1")
        one.submit(first, [a])
        events = hear(one, until=done("p1"))
        second = plan(
            "i0",
            {"a": 46, "b": 20},
            chunks=[(0, "b", 0, 20)],
            decodes={"b": 40},
            preemptions={"a": how},
            plan_id="p2",
        )
        one.submit(second, [b])
        events += hear(one, until=done("p2"))
        (left,) = [event for event in events if isinstance(event, Preempted)]
        context = 40 + len(outputs(events)["a"])
        third = plan(
            "i0",
            {"a": context},
            chunks=[(0, "a", left.kept_tokens, context)],
            decodes={"a": 100},
            reuses={"a": left.kept_tokens} if left.kept_tokens else None,
            plan_id="p3",
        )
        one.submit(third)
        back = hear(one, until=done("p3"))
        events += back
    computed = sum(len(step.decodes) for step in steps(back))
    computed += sum(end - begin for step in steps(back) for _, begin, end in step.chunks)
    return {
        "outputs": outputs(events),
        "expected": expected(a, b),
        "kept_tokens": left.kept_tokens,
        "computed": computed,
        "context": context,
    }


def prefix_cached() -> dict[str, Any]:
    """The same beginning twice: the second request begins with the KV of the first."""
    a, b = request("a", 70, 6), request("b", (*prompt(64), 5, 6, 7), 6)
    with engines("i0", prefix_cache="on") as (one,):
        first = plan("i0", {"a": 70}, chunks=[(0, "a", 0, 70)], decodes={"a": 99}, plan_id="p1")
        one.submit(first, [a])
        events = hear(one, until=done("p1"))
        stored = {h for event in events if isinstance(event, KVCached) for h in event.stored}
        second = plan(
            "i0",
            {"b": 67},
            chunks=[(0, "b", 64, 67)],
            decodes={"b": 99},
            reuses={"b": 64},
            plan_id="p2",
        )
        one.submit(second, [b])
        more = hear(one, until=done("p2"))
    return {
        "outputs": outputs(events + more),
        "expected": expected(a, b),
        "reused": reused(more),
        "chunks": chunks(more)[0],
        "stored": stored >= set(block_hashes(a.prompt, 16)),
        "deviations": deviations(events + more),
    }


def promised_too_much() -> dict[str, Any]:
    """A plan takes for cached what is not: the tokens are computed."""
    a = request("a", 70, 6)
    with engines("i0", prefix_cache="on") as (one,):
        given = plan(
            "i0", {"a": 70}, chunks=[(0, "a", 64, 70)], decodes={"a": 99}, reuses={"a": 64}
        )
        one.submit(given, [a])
        events = hear(one, until=done("plan"))
    return {"outputs": outputs(events), "expected": expected(a), "chunks": chunks(events)[0]}


def found_more() -> dict[str, Any]:
    """The cache has more than the plan wants: it is told, and the next plan goes on from there."""
    a, b = request("a", 70, 2), request("b", 70, 6)
    with engines("i0", prefix_cache="on") as (one,):
        first = plan("i0", {"a": 70}, chunks=[(0, "a", 0, 70)], decodes={"a": 99}, plan_id="p1")
        one.submit(first, [a])
        hear(one, until=done("p1"))
        second = plan("i0", {"b": 70}, chunks=[(0, "b", 0, 20)], num_steps=1, plan_id="p2")
        one.submit(second, [b])
        events = hear(one, until=done("p2"))
        third = plan("i0", {"b": 70}, chunks=[(0, "b", 64, 70)], decodes={"b": 99}, plan_id="p3")
        one.submit(third)
        events += hear(one, until=done("p3"))
    return {
        "outputs": outputs(events),
        "expected": expected(b),
        "reused": reused(events),
        "chunks": [step for step in chunks(events) if step],
    }


def handed_over(prefix_cache: str, tp: int = 1) -> dict[str, Any]:
    """One instance computes the prompts, another the outputs; the second time from the cache."""
    a, b, c = request("a", 70, 9), request("b", 33, 5), request("c", 50, 1)
    with engines("p0", "d0", prefix_cache=prefix_cache, tp=str(tp)) as (prefill, decode):
        decode.submit(_decodes({"a": 70, "b": 33}))
        prefill.submit(_prefills(a, b, c), [a, b, c])
        events = hear(prefill, decode, until=done("prefills", "decodes"))
        again = msgspec.structs.replace(a, id="again")
        decode.submit(_decodes({"again": 70}, plan_id="more"))
        prefill.submit(_prefills(again, plan_id="again"), [again])
        events += hear(prefill, decode, until=done("again", "more"))
    decoded = [step for step in steps(events) if step.instance == "d0"]
    return {
        "outputs": outputs(events),
        "expected": expected(a, b, c, again),
        "exported": sorted(e.handle.request.id for e in events if isinstance(e, KVExported)),
        "imported": sorted(e.request_id for e in events if isinstance(e, KVImported)),
        "prompts on d0": [step.chunks for step in decoded if step.chunks],
        "failures": failures(events),
    }


def _prefills(*requests: Request, plan_id: str = "prefills") -> Any:
    lengths = {r.id: len(r.prompt) for r in requests}
    return plan(
        "p0",
        lengths,
        chunks=[(step, id, 0, length) for step, (id, length) in enumerate(lengths.items())],
        exports=dict.fromkeys(lengths, "d0"),
        plan_id=plan_id,
    )


def _decodes(lengths: Mapping[str, int], plan_id: str = "decodes") -> Any:
    return plan(
        "d0",
        lengths,
        decodes={id: length + 50 for id, length in lengths.items()},
        imports=dict.fromkeys(lengths, "p0"),
        plan_id=plan_id,
    )


def damaged_on_the_way() -> dict[str, Any]:
    """A byte of the KV changes between two instances; then the request is computed anew."""
    a = request("a", 70, 9)
    with engines("p0", "d0") as (prefill, decode):
        prefill.submit(_prefills(a), [a])
        events = hear(prefill, decode, until=told(KVExported), carries=False)
        (handle,) = [event.handle for event in events if isinstance(event, KVExported)]
        segment = comm.open_channel("local", "d0").receive(handle.place, handle.num_bytes)
        segment[len(segment) // 2] ^= 1
        decode.submit(_decodes({"a": 70}))
        decode.receive(handle)
        events += hear(decode, until=done("decodes"))
        first = outputs(events)["a"]
        retried = Request(id="a", prompt=(*a.prompt, *first), max_output_tokens=9 - len(first))
        anew = plan("d0", {"a": 71}, chunks=[(0, "a", 0, 71)], decodes={"a": 99}, plan_id="anew")
        decode.submit(anew, [retried])
        rest = hear(decode, until=done("anew"))
    return {
        "outputs": {"a": first + outputs(rest)["a"]},
        "expected": expected(a),
        "failures": failures(events),
    }


def of_another_layout() -> dict[str, Any]:
    """KV of an instance with another layout is refused by name."""
    a = request("a", 40, 4)
    with engines("p0") as (prefill,), engines("d0", tp="2") as (decode,):
        prefill.submit(_prefills(a), [a])
        decode.submit(_decodes({"a": 40}))
        events = hear(prefill, decode, until=done("decodes"))
    return {"failures": failures(events)}


def late_kv() -> dict[str, Any]:
    """KV comes while the plan that imports it is at work on others; nobody waits for it."""
    late, here = request("late", 70, 9), request("here", 30, 20)
    with engines("p0", "d0") as (prefill, decode):
        prefill.submit(_prefills(late), [late])
        events = hear(prefill, until=told(KVExported), carries=False)
        (handle,) = [event.handle for event in events if isinstance(event, KVExported)]
        given = plan(
            "d0",
            {"here": 30, "late": 70},
            chunks=[(0, "here", 0, 30)],
            decodes={"here": 99, "late": 99},
            imports={"late": "p0"},
        )
        decode.submit(given, [here])
        events += hear(decode, until=lambda e: len(steps(e)) > 2)
        decode.receive(handle)
        events += hear(decode, until=done("plan"))
    decoded = [step for step in steps(events) if step.instance == "d0"]
    return {
        "outputs": outputs(events),
        "expected": expected(late, here),
        "imported": [e.request_id for e in events if isinstance(e, KVImported)],
        "chunks": [step.chunks for step in decoded if step.chunks],
    }


def stopped() -> dict[str, Any]:
    """Outputs that end at stop tokens: the first at once, the second later, one with 40 of them."""
    whole = expected(request("a", 40, 12), request("b", 50, 12))
    stops = {"a": (whole["a"][0],), "b": (whole["b"][5],)}
    many = (*range(900, 940), whole["b"][3])
    asked = [
        request("a", 40, stop_tokens=stops["a"]),
        request("b", 50, stop_tokens=stops["b"]),
        request("c", 50, stop_tokens=many),
    ]
    with engines("i0") as (one,):
        given = plan(
            "i0",
            {"a": 40, "b": 50, "c": 50},
            chunks=[(0, "a", 0, 40), (0, "b", 0, 50), (0, "c", 0, 50)],
            decodes={"a": 99, "b": 99, "c": 99},
        )
        one.submit(given, asked)
        events = hear(one, until=done("plan"))
    return {
        "outputs": {"a": [], **outputs(events)},
        "expected": {r.id: generate(r.prompt, 12, VOCAB, r.stop_tokens) for r in asked},
        "finished": dict(end for step in steps(events) for end in step.finished),
    }


def cancelled() -> dict[str, Any]:
    """Requests are cancelled before they begin, in their prompt and in their output."""
    asked = [request(id, 100 + 9 * i, 30) for i, id in enumerate("abcd")]
    lengths = {r.id: len(r.prompt) for r in asked}
    with engines("i0", step_us="2000") as (one,):
        given = plan(
            "i0",
            lengths,
            chunks=[
                (0, "a", 0, 100),
                (0, "b", 0, 30),
                (1, "d", 0, 127),
                (40, "b", 30, 109),
                (41, "c", 0, 118),
            ],
            decodes=dict.fromkeys(lengths, 200),
        )
        one.submit(given, asked)
        events = hear(one, until=lambda e: len(outputs(e).get("a", ())) > 2)
        for id in "abc":
            one.cancel(id)
        one.cancel("never came")
        events += hear(one, until=done("plan"))
        hear(one, until=lambda _: one.residents.are_idle)
    return {
        "outputs": outputs(events),
        "expected": expected(*asked),
        "cancelled": sorted(e.request_id for e in events if isinstance(e, Cancelled)),
    }


def without_a_plan() -> dict[str, Any]:
    """Plans stop coming: TurboMind goes on by itself, and says so."""
    a = request("a", 40, 12)
    with engines("i0", deadline_us="20000") as (one,):
        given = plan("i0", {"a": 40}, chunks=[(0, "a", 0, 40)], decodes={"a": 43})
        one.submit(given, [a])
        finished = lambda events: any(step.finished for step in steps(events))  # noqa: E731
        events = hear(one, until=finished)
    return {
        "outputs": outputs(events),
        "expected": expected(a),
        "decided": [step.decided_by for step in steps(events)],
        "deviations": deviations(events)[:1],
    }


def refused() -> dict[str, Any]:
    """Plans and requests that make no sense fail their requests, and nothing else."""
    good, long = request("good", 20, 4), request("long", 20_000, 4)
    with engines("i0") as (one,):
        one.submit(plan("elsewhere", {"x": 5}, plan_id="p1"), [])
        one.submit(plan("i0", {"never": 5}, chunks=[(0, "never", 0, 5)], plan_id="p2"))
        gap = plan("i0", {"gap": 20}, chunks=[(0, "gap", 9, 20)], plan_id="p3")
        one.submit(gap, [request("gap", 20)])
        given = plan(
            "i0",
            {"good": 20, "long": 20_000, "hot": 20},
            chunks=[(0, "good", 0, 20), (0, "hot", 0, 20)],
            decodes={"good": 99},
            plan_id="p4",
        )
        hot = request("hot", 20, sampling=Sampling(temperature=1.0))
        one.submit(given, [good, long, hot])
        events = hear(one, until=done("p1", "p2", "p3", "p4"))
    return {
        "outputs": outputs(events),
        "expected": expected(good),
        "failures": failures(events),
    }


def superseded() -> dict[str, Any]:
    """A newer plan takes over in the middle of a prompt; a row that it does not name waits."""
    a, b = request("a", 100, 5), request("b", 30, 5)
    with engines("i0", step_us="2000") as (one,):
        first = plan(
            "i0",
            {"a": 100, "b": 30},
            chunks=[(0, "b", 0, 30), *((i, "a", 10 * i, 10 * i + 10) for i in range(10))],
            decodes={"b": 99},
            plan_id="p1",
        )
        one.submit(first, [a, b])
        events = hear(one, until=lambda e: len(steps(e)) > 2)
        begin = max(end for step in chunks(events) for id, _, end in step if id == "a")
        second = plan(
            "i0", {"a": 100}, chunks=[(0, "a", begin, 100)], decodes={"a": 101}, plan_id="p2"
        )
        one.submit(second)
        events += hear(one, until=done("p2"))
        third = plan("i0", {"a": 100, "b": 30}, decodes={"a": 150, "b": 99}, plan_id="p3")
        one.submit(third)
        events += hear(one, until=done("p3"))
    alone = [step.decodes for step in steps(events) if step.plan_id == "p2"]
    return {
        "outputs": outputs(events),
        "expected": expected(a, b),
        "decoded under p2": sorted({id for decodes in alone for id in decodes}),
    }


def short_of_room() -> dict[str, Any]:
    """Less KV than the rows want: TurboMind takes some of it away, and what it took is told."""
    asked = [request(id, 40, 30) for id in "abc"]
    with engines("i0", kv_blocks=8) as (one,):
        events = _to_the_end(one, asked)
    return {
        "outputs": outputs(events),
        "expected": expected(*asked),
        "preempted": sum(isinstance(event, Preempted) for event in events),
        "failures": failures(events),
    }


def _to_the_end(one: TurboMindEngine, asked: list[Request]) -> list[Event]:
    """Plan after plan until all requests have ended; one that is forgotten is sent again."""
    events: list[Event] = []
    waiting, unsent, base = {r.id: 0 for r in asked}, asked, {r.id: 0 for r in asked}
    for number in itertools.count():
        given = _next_plan(f"p{number}", asked, events, waiting)
        one.submit(given, unsent)
        new = hear(one, until=done(given.plan_id))
        events += [_counted_from(base, event) for event in new]
        ended = {id for step in steps(events) for id, _ in step.finished}
        waiting = {id: _computed(events, id) for id in waiting.keys() - ended}
        if not waiting:
            break
        lost = {e.request_id for e in new if isinstance(e, Preempted) and e.is_forgotten}
        said = {id: outputs(events).get(id, []) for id in lost}
        base |= {id: len(tokens) for id, tokens in said.items()}
        unsent = [_going_on(r, said[r.id]) for r in asked if r.id in lost]
    return events


def _going_on(r: Request, output: list[int]) -> Request:
    left = (r.max_output_tokens or 0) - len(output)
    return msgspec.structs.replace(r, prompt=(*r.prompt, *output), max_output_tokens=left)


def _counted_from(base: Mapping[str, int], event: Event) -> Event:
    """The same, with tokens counted from the beginning of each request's output."""
    if not isinstance(event, StepReport):
        return event
    tokens = tuple((id, base[id] + index, token) for id, index, token in event.tokens)
    return msgspec.structs.replace(event, tokens=tokens)


def _next_plan(
    plan_id: str, asked: list[Request], events: list[Event], computed: dict[str, int]
) -> Any:
    """Prefill what is not computed, one after the other, and let all decode for six steps."""
    lengths = {
        r.id: len(r.prompt) + len(outputs(events).get(r.id, ())) for r in asked if r.id in computed
    }
    begun = {id: computed[id] for id in sorted(lengths)}
    return plan(
        "i0",
        lengths,
        chunks=[
            (step, id, begun[id], lengths[id])
            for step, id in enumerate(begun)
            if lengths[id] - begun[id] > 1 or not outputs(events).get(id)
        ],
        decodes={id: length + 6 for id, length in lengths.items()},
        num_steps=10,
        plan_id=plan_id,
    )


def _computed(events: list[Event], id: str) -> int:
    """Tokens of the request whose KV the instance has, by what it told."""
    computed = 0
    for event in events:
        if isinstance(event, StepReport):
            computed = max([computed, *(end for name, _, end in event.chunks if name == id)])
            computed += id in event.decodes
        elif isinstance(event, Preempted) and event.request_id == id:
            computed = 0
    return computed


def started_over() -> dict[str, Any]:
    """A request comes again while it is here, with what it has said as part of its prompt."""
    a = request("a", 30, 12)
    with engines("i0", step_us="1000") as (one,):
        given = plan("i0", {"a": 30}, chunks=[(0, "a", 0, 30)], decodes={"a": 99}, plan_id="p1")
        one.submit(given, [a])
        events = hear(one, until=lambda e: len(outputs(e).get("a", ())) > 2)
        begun = outputs(events)["a"][:3]
        again = Request(id="a", prompt=(*a.prompt, *begun), max_output_tokens=9)
        given = plan("i0", {"a": 33}, chunks=[(0, "a", 0, 33)], decodes={"a": 99}, plan_id="p2")
        one.submit(given, [again])
        rest = [e for e in hear(one, until=done("p2")) if getattr(e, "plan_id", "p2") == "p2"]
    return {
        "outputs": {"a": begun + outputs(rest)["a"]},
        "expected": expected(a),
        "chunks of the second": [step for step in chunks(rest) if step],
    }


def closed() -> list[Any]:
    """An instance is closed in the middle of its plan."""
    with engines("i0", step_us="1000") as (one,):
        given = plan("i0", {"a": 30}, chunks=[(0, "a", 0, 30)], decodes={"a": 99})
        one.submit(given, [request("a", 30, 60)])
        hear(one, until=lambda e: len(steps(e)) > 2)
        one.close()
        one.submit(given, [request("b", 30, 60)])
        one.receive(_nowhere())
        one.cancel("a")
        return list(one.poll(0.05))


def _nowhere() -> KVHandle:
    return KVHandle(
        request=request("c", 4),
        source="p0",
        target="i0",
        output=(1,),
        computed_tokens=4,
        layout="none",
        place="local:nobody:0",
        num_bytes=1,
        begin_us=0,
    )


def stop_string() -> dict[str, Any]:
    """The text of an output contains what its client stops at."""
    from tokenizers import Tokenizer

    folder = Path(__file__).parent.parent / "examples" / "models" / "tiny"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size()
    whole = generate(prompt(40), 24, vocab)
    stop = tokenizer.decode(whole[9:11])
    a = request("a", 40, 24, stop_strings=(stop,))
    with engines("i0", model=str(folder)) as (one,):
        given = plan("i0", {"a": 40}, chunks=[(0, "a", 0, 40)], decodes={"a": 99})
        one.submit(given, [a])
        events = hear(one, until=done("plan"))
        hear(one, until=lambda _: one.residents.are_idle)
    return {
        "outputs": outputs(events),
        "expected": {"a": whole},
        "finished": dict(end for step in steps(events) for end in step.finished),
    }


def swapped_in_its_prompt() -> dict[str, Any]:
    """A prompt is swapped out half-way, twice, and computes no token of it twice."""
    a = request("a", 90, 4)
    events: list[Event] = []
    with engines("i0") as (one,):
        for begin, end in ((0, 40), (40, 57), (57, 90)):
            name = f"to {end}"
            given = plan(
                "i0",
                {"a": 90},
                chunks=[(0, "a", begin, end)],
                decodes={"a": 99},
                reuses={"a": begin},
                plan_id=name,
            )
            one.submit(given, [a] if not begin else [])
            events += hear(one, until=done(name))
            out = plan("i0", {"a": 90}, preemptions={"a": SWAP}, plan_id=f"out {end}")
            one.submit(out)
            events += hear(one, until=done(f"out {end}"))
    return {
        "outputs": outputs(events),
        "expected": expected(a),
        "kept": [e.kept_tokens for e in events if isinstance(e, Preempted)],
        "chunks": [step for step in chunks(events) if step],
    }


def called_off() -> dict[str, Any]:
    """A prompt is to leave when it is computed; a newer plan lets it decode where it is."""
    a = request("a", 60, 9)
    with engines("p0", step_us="3000") as (one,):
        given = plan(
            "p0",
            {"a": 60},
            chunks=[(step, "a", 10 * step, 10 * step + 10) for step in range(6)],
            exports={"a": "d0"},
            plan_id="p1",
        )
        one.submit(given, [a])
        events = hear(one, until=lambda e: len(steps(e)) > 1)
        begin = chunks(events)[-1][0][2]
        here = plan("p0", {"a": 60}, chunks=[(0, "a", begin, 60)], decodes={"a": 99}, plan_id="p2")
        one.submit(here)
        events += hear(one, until=done("p2"))
        one.submit(
            plan("p0", {"a": 61}, decodes={"a": 99}, chunks=[(0, "a", 60, 61)], plan_id="p3")
        )
        events += hear(one, until=done("p3"))
    return {
        "outputs": outputs(events),
        "expected": expected(a),
        "exported": sum(isinstance(event, KVExported) for event in events),
    }


def moved_while_decoding(tp: int = 1) -> dict[str, Any]:
    """A row that decodes leaves for another instance in the middle of its output."""
    a = request("a", 60, 12)
    with engines("p0", "d0", tp=str(tp)) as (source, target):
        given = plan("p0", {"a": 60}, chunks=[(0, "a", 0, 60)], decodes={"a": 64}, plan_id="p1")
        source.submit(given, [a])
        events = hear(source, until=done("p1"))
        target.submit(_decodes({"a": 60}))
        source.submit(plan("p0", {"a": 65}, exports={"a": "d0"}, plan_id="p2"))
        events += hear(source, target, until=done("p2", "decodes"))
    return {
        "outputs": outputs(events),
        "expected": expected(a),
        "imported": [e.request_id for e in events if isinstance(e, KVImported)],
        "tokens here and there": [
            sum(len(step.tokens) for step in steps(events) if step.instance == id)
            for id in ("p0", "d0")
        ],
    }


def more_than_the_batch() -> dict[str, Any]:
    """More requests than TurboMind's batch has places for: they come as the others leave."""
    asked = [request(id, 30 + 5 * i, 6) for i, id in enumerate("abcd")]
    with engines("i0", max_batch="2", deadline_us="50000") as (one,):
        events = _to_the_end(one, asked)
    return {
        "outputs": outputs(events),
        "expected": expected(*asked),
        "failures": failures(events),
    }


def malformed() -> dict[str, Any]:
    """A plan whose steps do not ascend is refused before it decides anything."""
    a, b = request("a", 20, 4), request("b", 20, 4)
    with engines("i0") as (one,):
        given = plan("i0", {"a": 20}, chunks=[(0, "a", 0, 9), (1, "a", 9, 20)])
        turned = msgspec.structs.replace(given.chunks, step=given.chunks.step[::-1].copy())
        one.submit(msgspec.structs.replace(given, chunks=turned), [a])
        good = plan("i0", {"b": 20}, chunks=[(0, "b", 0, 20)], decodes={"b": 99}, plan_id="good")
        one.submit(good, [b])
        events = hear(one, until=done("plan", "good"))
    return {"outputs": outputs(events), "expected": expected(b), "failures": failures(events)}


def never_arrived() -> dict[str, Any]:
    """KV whose bytes are gone, and KV that is of other tokens than the request has."""
    a, b, c = request("a", 40, 4), request("b", 50, 4), request("c", 20, 4)
    with engines("p0", "d0") as (prefill, decode):
        prefill.submit(_prefills(a, b), [a, b])
        events = hear(prefill, until=told(KVExported, 2), carries=False)
        gone, other = [event.handle for event in events if isinstance(event, KVExported)]
        changed = msgspec.structs.replace(b, prompt=(*b.prompt[:-1], 1))
        comm.free(gone.place)
        given = plan(
            "d0",
            {"a": 40, "b": 50, "c": 20},
            chunks=[(0, "c", 0, 20)],
            decodes={"a": 99, "b": 99, "c": 99},
            imports={"a": "p0", "b": "p0"},
        )
        decode.submit(given, [c])
        decode.receive(gone)
        decode.receive(msgspec.structs.replace(other, request=changed))
        events = hear(decode, until=done("plan"))
    return {"outputs": outputs(events), "expected": expected(c), "failures": failures(events)}


def no_room_for_kv(prefix_cache: str) -> dict[str, Any]:
    """KV comes to an instance that is full, and whose cache may have the request's beginning."""
    before, late = request("before", 33, 1), request("late", 70, 9)
    here = request("here", prompt(60, seed=11), 12)
    options = {"prefix_cache": prefix_cache, "step_us": "1000"}
    with (
        engines("p0", **options) as (prefill,),  # type: ignore[arg-type]
        engines("d0", kv_blocks=7, **options) as (decode,),  # type: ignore[arg-type]
    ):
        first = plan("d0", {"before": 33}, chunks=[(0, "before", 0, 33)], plan_id="before")
        decode.submit(first, [before])
        events = hear(decode, until=done("before"))
        prefill.submit(_prefills(late), [late])
        events += hear(prefill, until=told(KVExported), carries=False)
        (handle,) = [event.handle for event in events if isinstance(event, KVExported)]
        given = plan(
            "d0",
            {"here": 60, "late": 70},
            chunks=[(0, "here", 0, 60)],
            decodes={"here": 99, "late": 99},
            imports={"late": "p0"},
        )
        decode.submit(given, [here])
        events += hear(decode, until=told(StepReport, 2))
        decode.receive(handle)
        events += hear(decode, until=done("plan"))
    return {
        "outputs": outputs(events),
        "expected": expected(before, late, here),
        "failures": failures(events),
        "deviations": deviations(events),
    }


def moved_from_host_memory() -> dict[str, Any]:
    """A row that was swapped out while it decoded leaves for another instance from there."""
    a = request("a", 60, 12)
    with engines("p0", "d0") as (source, target):
        given = plan("p0", {"a": 60}, chunks=[(0, "a", 0, 60)], decodes={"a": 64}, plan_id="p1")
        source.submit(given, [a])
        events = hear(source, until=done("p1"))
        source.submit(plan("p0", {"a": 65}, preemptions={"a": SWAP}, plan_id="p2"))
        events += hear(source, until=done("p2"))
        target.submit(_decodes({"a": 60}))
        chunk = (0, "a", 64, 65)
        moves = {"chunks": [chunk], "reuses": {"a": 64}, "exports": {"a": "d0"}}
        source.submit(plan("p0", {"a": 65}, plan_id="p3", **moves))  # type: ignore[arg-type]
        events += hear(source, target, until=done("p3", "decodes"))
    return {
        "outputs": outputs(events),
        "expected": expected(a),
        "failures": failures(events),
        "tokens here and there": [
            sum(len(step.tokens) for step in steps(events) if step.instance == id)
            for id in ("p0", "d0")
        ],
    }
