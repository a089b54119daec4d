"""Random clusters and serving graphs as text, and what any plan made of them must keep.

A `Scene` is drawn first, written as MLIR second, so that a failing example shows a file that one
can run. `broken_rules` reads plans alone and says which promise of the compiler they break; it
shares no code with the passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.state import ANY, Decision, Instances, Ints, Running, State, Waiting

Draw = Callable[[st.SearchStrategy[Any]], Any]

ALL = 256
"""Steps that the compiler plans for a request without an end, where no horizon is given."""

MODEL = (
    "cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, "
    "ffn = 128, vocab = 256}"
)


@dataclass(frozen=True)
class Place:
    """An instance of a scene."""

    name: str
    role: str
    engine: str = "sim"
    kv_blocks: int = 100_000
    block_tokens: int = 16
    max_step_tokens: int = 64
    max_batch: int = 16
    max_partial_prefills: int = 0
    flops_per_s: float = 1e12
    bytes_per_s: float = 1e9

    def runs(self, phase: str) -> bool:
        return self.role in (phase, "both")

    def lines(self) -> Iterator[str]:
        device = f"g_{self.name}"
        yield f"cluster.device @{device} {{flops_per_s = {self.flops_per_s!r}}}"
        yield f"cluster.link @{device} to @hub {{bytes_per_s = {self.bytes_per_s!r}}}"
        names = ("kv_blocks", "block_tokens", "max_step_tokens", "max_batch")
        names += ("max_partial_prefills",) if self.max_partial_prefills else ()
        scalars = ", ".join(f"{name} = {getattr(self, name)}" for name in names)
        yield (
            f'cluster.instance @{self.name} on [@{device}] engine "{self.engine}" '
            f"role {self.role} model @tiny {{{scalars}}}"
        )


@dataclass(frozen=True)
class Row:
    """A request of a scene. generate: tokens to sample, None: until it stops.

    A resident's prompt is its context; decided is its verdict and rank, where one was said.
    """

    id: str
    prompt: int
    generate: int | None = 8
    computed: int = 0
    cached: int = 0
    chunk: int = 0
    on: str = ""
    decode_on: str = ""
    deadline: int = 0
    verdict: str = "admit"
    rank: int = 0

    def text(self, count: str, more: str = "") -> str:
        """The row's cells; `count` is what the table calls `generate`."""
        cells = [f'"{self.id}":{more}']
        cells += [f"{count} {self.generate}"] if self.generate is not None else []
        names = (
            ("computed", "cached", "chunk", "deadline") if count == "generate" else ("deadline",)
        )
        cells += [f"{name} {getattr(self, name)}" for name in names if getattr(self, name)]
        cells += [f"on @{self.on}"] if self.on else []
        cells += [f"decode_on @{self.decode_on}"] if self.decode_on else []
        return " ".join(cells)


@dataclass(frozen=True)
class Scene:
    """A cluster and a graph: waiting rows, prompts under way, and residents.

    decided: whether a pd.decide names the waiting. matched: tokens of rows that a kv.match names.
    chunk: of the pd.prefill; steps: of the pd.decode. preempted: residents that lose their KV.
    order: in which the graph's lines stand.
    """

    places: tuple[Place, ...]
    waiting: tuple[Row, ...] = ()
    started: tuple[Row, ...] = ()
    residents: tuple[Row, ...] = ()
    arriving: frozenset[str] = frozenset()
    mode: str = "hybrid"
    horizon: int = 0
    decided: bool = False
    matched: dict[str, int] = field(default_factory=dict)
    chunk: int = 0
    steps: int = 0
    preempted: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    def text(self) -> str:
        """The file."""
        cluster = [MODEL, "cluster.switch @hub"]
        for place in self.places:
            cluster += place.lines()
        numbers = f", now = 1000, horizon = {self.horizon}" if self.horizon else ", now = 1000"
        lines = [*self._lines()]
        lines = [lines[at] for at in self.order if at < len(lines)] if self.order else lines
        body = "\n".join(f"  {line}" for line in lines)
        end = "  pd.yield %end" if self.rows() else "  pd.yield"
        head = f'pd.graph @scene {{mode = "{self.mode}"{numbers}}} {{'
        return "\n".join([*cluster, head, *([body] if body else []), end, "}"]) + "\n"

    def cluster(self) -> str:
        """The file without its graph."""
        return self.text().split("pd.graph")[0]

    def _lines(self) -> Iterator[str]:
        parts = []
        if self.residents:
            rows = [
                row.text("remaining", f" context {row.prompt}")
                + (" arriving" if row.id in self.arriving else "")
                for row in self.residents
            ]
            yield f"%old = pd.resident [{', '.join(rows)}]"
            parts.append(("%old", len(rows)))
        for name, wave in (("started", self.started), ("new", self.waiting)):
            if wave:
                yield from self._wave(name, wave)
                admitted = len(wave)
                parts.append((f"%{name}_kv", admitted))
        if not parts:
            return
        types = ", ".join(f"!pd.kv<{count}>" for _, count in parts)
        total = sum(count for _, count in parts)
        yield f"%all = pd.join {', '.join(name for name, _ in parts)} : {types}"
        steps = f" steps {self.steps}" if self.steps else ""
        value = "all"
        if self.preempted:
            on = {row.id: row.on for row in self.residents}
            cells = [f'"{name}": preempt on @{on[name]}' for name in self.preempted]
            yield f"%kept = pd.preempt %all [{', '.join(cells)}] : !pd.kv<{total}>"
            value, total = "kept", total - len(cells)
        yield f"%end = pd.decode %{value}{steps} : !pd.kv<{total}>"

    def _wave(self, name: str, wave: tuple[Row, ...]) -> Iterator[str]:
        count = len(wave)
        rows = [row.text("generate", f" prompt {row.prompt}") for row in wave]
        yield f"%{name} = pd.requests [{', '.join(rows)}]"
        value = name
        if name == "new" and self.matched:
            cells = [f'"{known}": tokens {tokens}' for known, tokens in self.matched.items()]
            yield f"%hit = kv.match %new [{', '.join(cells)}] : !pd.wave<{count}>"
            value = "hit"
        if name == "new" and self.decided:
            cells = [
                f'"{row.id}": {row.verdict}'
                + (f" rank {row.rank}" if row.verdict == "admit" else ' because "drawn"')
                for row in wave
            ]
            yield f"%go = pd.decide %{value} [{', '.join(cells)}] : !pd.wave<{count}>"
            value = "go"
        chunk = f" chunk {self.chunk}" if self.chunk else ""
        yield f"%{name}_kv = pd.prefill %{value}{chunk} : !pd.kv<{count}>"

    def rows(self) -> list[Row]:
        return [*self.residents, *self.started, *self.waiting]

    def prefilled(self) -> dict[str, Row]:
        """The rows whose prompts are to be computed: those under way, and the admitted."""
        wave = [row for row in self.waiting if not self.decided or row.verdict == "admit"]
        known = [replace(r, cached=self._cached(r)) for r in wave]
        return {row.id: row for row in (*self.started, *known)}

    def _cached(self, row: Row) -> int:
        return min(self.matched.get(row.id, row.cached), row.prompt - row.computed - 1)

    def decodes_of(self, row: Row) -> int:
        """Tokens that the row decodes in this plan, beside the first, which its prefill samples."""
        bound = self.steps or self.horizon
        resident = row in self.residents
        if row.generate is None:
            return min(bound or ALL, 2**31 - 2)
        left = row.generate if resident else row.generate - 1
        return min(left, bound) if bound else left

    def place(self, name: str) -> Place:
        return next(place for place in self.places if place.name == name)


# Drawing


@st.composite
def places(draw: Draw, tight: bool = False, engine: str = "sim", most: int = 4) -> Any:
    """One to four instances behind a switch; each phase has one. tight: their KV may be full."""
    roles = draw(
        st.lists(st.sampled_from(("prefill", "decode", "both")), min_size=1, max_size=most)
    )
    for phase in ("prefill", "decode"):
        if not {phase, "both"} & set(roles):
            roles[0] = "both"
    block_tokens = draw(st.sampled_from((8, 16, 64)))
    blocks = st.integers(6, 40) if tight else st.just(100_000)
    return tuple(
        Place(
            name=f"i{number}",
            role=role,
            engine=engine,
            kv_blocks=draw(blocks),
            block_tokens=block_tokens,
            max_step_tokens=draw(st.sampled_from((4, 16, 64, 512))),
            max_batch=draw(st.sampled_from((1, 2, 8, 256))),
            max_partial_prefills=draw(st.sampled_from((0, 0, 1, 2))) if engine == "sim" else 0,
            flops_per_s=draw(st.sampled_from((1e9, 1e11, 1e13))),
            bytes_per_s=draw(st.sampled_from((1e6, 1e8, 1e10))),
        )
        for number, role in enumerate(roles)
    )


@st.composite
def scenes(draw: Draw, tight: bool = False, engine: str = "sim", most_rows: int = 5) -> Scene:
    """A cluster with requests in every stage of their lives, in any mode, under any horizon."""
    where = draw(places(tight, engine))
    roles = {place.role for place in where}
    modes = ("strict", "time-share", "hybrid") if "both" not in roles else ("time-share", "hybrid")
    names = (f"r{number}" for number in range(1000))
    prefills = [place.name for place in where if place.runs("prefill")]
    decodes = [place.name for place in where if place.runs("decode")]
    waiting = draw(_waiting(names, prefills, decodes, most_rows))
    residents = draw(_residents(names, decodes, most_rows))
    decided = draw(st.booleans())
    if decided:
        waiting = draw(_judged(waiting))
    hits = draw(st.lists(st.sampled_from(waiting), unique=True)) if waiting else []
    arriving = draw(st.lists(st.sampled_from(residents), unique=True)) if residents else []
    out = draw(st.lists(st.sampled_from(residents), unique=True)) if residents else []
    return Scene(
        places=where,
        waiting=waiting,
        started=draw(_started(names, prefills, decodes)),
        residents=residents,
        arriving=frozenset(row.id for row in arriving),
        preempted=tuple(row.id for row in out),
        mode=draw(st.sampled_from(modes)),
        horizon=draw(st.sampled_from((0, 1, 3, 16))),
        decided=decided,
        matched={row.id: draw(st.integers(0, row.prompt + 9)) for row in hits},
        chunk=draw(st.sampled_from((0, 0, 7, 32))),
        steps=draw(st.sampled_from((0, 0, 0, 5))),
        order=tuple(draw(st.permutations(range(10)))) if draw(st.booleans()) else (),
    )


_GENERATE = st.integers(1, 30) | st.just(1) | st.none()


@st.composite
def _waiting(draw: Draw, names: Any, prefills: list[str], decodes: list[str], most: int) -> Any:
    count = draw(st.integers(0, most))
    return tuple(
        Row(
            id=next(names),
            prompt=draw(st.integers(1, 150)),
            generate=draw(_GENERATE),
            chunk=draw(st.sampled_from((0, 0, 3, 20))),
            on=draw(st.sampled_from(("", "", *prefills))),
            decode_on=draw(st.sampled_from(("", "", *decodes))),
            deadline=draw(st.sampled_from((0, 5000))),
        )
        for _ in range(count)
    )


@st.composite
def _judged(draw: Draw, rows: tuple[Row, ...]) -> Any:
    verdicts = [draw(st.sampled_from(("admit", "admit", "defer", "reject"))) for _ in rows]
    ranks = iter(draw(st.permutations(range(verdicts.count("admit")))))
    return tuple(
        replace(row, verdict=said, rank=next(ranks) if said == "admit" else 0)
        for row, said in zip(rows, verdicts, strict=True)
    )


@st.composite
def _started(draw: Draw, names: Any, prefills: list[str], decodes: list[str]) -> Any:
    rows = []
    for _ in range(draw(st.integers(0, 2))):
        prompt = draw(st.integers(2, 120))
        rows.append(
            Row(
                id=next(names),
                prompt=prompt,
                generate=draw(_GENERATE),
                computed=draw(st.integers(1, prompt - 1)),
                on=draw(st.sampled_from(prefills)),
                decode_on=draw(st.sampled_from(("", *decodes))),
            )
        )
    return tuple(rows)


@st.composite
def _residents(draw: Draw, names: Any, decodes: list[str], most: int) -> Any:
    return tuple(
        Row(
            id=next(names),
            prompt=draw(st.integers(1, 120)),
            generate=draw(st.integers(0, 30) | st.none()),
            on=draw(st.sampled_from(decodes)),
        )
        for _ in range(draw(st.integers(0, most)))
    )


@st.composite
def fresh_scenes(draw: Draw, tight: bool = False, apart: bool = True) -> Scene:
    """Requests that all wait, with an end each, on engines that can run what is planned.

    apart: whether phases may be on different instances; those hold as long a context each.
    """
    where = draw(places(tight, "echo", most=3 if apart else 1))
    where = tuple(replace(place, kv_blocks=where[0].kv_blocks) for place in where)
    rows = tuple(
        Row(id=f"r{number}", prompt=draw(st.integers(1, 120)), generate=draw(st.integers(1, 20)))
        for number in range(draw(st.integers(1, 8)))
    )
    roles = {place.role for place in where}
    modes = ("strict", "time-share", "hybrid") if "both" not in roles else ("time-share", "hybrid")
    return Scene(
        places=where,
        waiting=rows,
        mode=draw(st.sampled_from(modes)),
        chunk=draw(st.sampled_from((0, 7, 32))),
    )


# What every plan must keep


Chunk = tuple[int, int, int, int]
"""Step, begin, end, samples."""


def chunks_of(plans: Sequence[ExecutionPlan]) -> dict[str, list[tuple[str, Chunk]]]:
    """Of each request its chunks in the order of the plans, with the instance of each."""
    found: dict[str, list[tuple[str, Chunk]]] = defaultdict(list)
    for plan in plans:
        for step, row, begin, end, samples in _rows(plan.chunks):
            chunk = (step, begin, end, samples)
            found[plan.request_ids[row]].append((plan.target_instance_id, chunk))
    return found


def _rows(table: Any) -> Iterator[tuple[int, ...]]:
    return zip(*(getattr(table, name).tolist() for name in table.__struct_fields__), strict=True)


def broken_rules(scene: Scene, plans: Sequence[ExecutionPlan]) -> Iterator[str]:
    """What the plans of a scene break: nothing, where the compiler keeps its word."""
    yield from _prompt_faults(scene, plans)
    yield from _decode_faults(scene, plans)
    yield from _hand_over_faults(plans)
    for plan in plans:
        place = scene.place(plan.target_instance_id)
        for fault in (*_step_faults(scene, place, plan), *_room_faults(scene, place, plan)):
            yield f"{plan.plan_id}: {fault}"


def _prompt_faults(scene: Scene, plans: Sequence[ExecutionPlan]) -> Iterator[str]:
    """Every admitted prompt token once, in order, in chunks under its bound."""
    computed = chunks_of(plans)
    expected = scene.prefilled()
    if strangers := computed.keys() - expected.keys():
        yield f"computes prompts of {sorted(strangers)}, which are not to be prefilled"
    for name, row in expected.items():
        chunks = computed.get(name, [])
        if len({on for on, _ in chunks} | ({row.on} if row.on and chunks else set())) > 1:
            yield f"{name}: chunks on {chunks}, but it is on {row.on or 'one instance'}"
        at, before = row.computed + row.cached, -1
        for _, (step, begin, end, samples) in chunks:
            if begin != at or end <= begin or step <= before:
                yield f"{name}: chunk [{begin}, {end}) in step {step} after {at} in {before}"
            if samples != (end == row.prompt):
                yield f"{name}: chunk [{begin}, {end}) of {row.prompt} samples {samples}"
            bound = row.chunk or scene.chunk
            if bound and end - begin > bound:
                yield f"{name}: chunk [{begin}, {end}) is longer than {bound}"
            at, before = end, step
        if at > row.prompt or (not scene.horizon and at != row.prompt):
            yield f"{name}: prefilled up to {at} of {row.prompt}"


def _decode_faults(scene: Scene, plans: Sequence[ExecutionPlan]) -> Iterator[str]:
    """Each row decodes once, as many tokens as it is to, unless it was preempted."""
    expected = {row.id: row for row in scene.residents} | scene.prefilled()
    seen: dict[str, tuple[str, int]] = {}
    gone = {p.request_ids[row] for p in plans for row in p.preemptions.row.tolist()}
    rooms = {place.name: place.kv_blocks * place.block_tokens for place in scene.places}
    for plan in plans:
        for row, _, until in _rows(plan.decodes):
            name = plan.request_ids[row]
            if name in seen:
                yield f"{name} decodes on {seen[name][0]} and on {plan.target_instance_id}"
            seen[name] = (plan.target_instance_id, until)
    if strangers := seen.keys() - expected.keys():
        yield f"decodes {sorted(strangers)}, which are not to be decoded"
    for name, row in expected.items():
        on, until = seen.get(name, ("", 0))
        tokens = scene.decodes_of(row)
        if on and row.generate is None:  # it goes on until its instance is full
            tokens = max(1, min(tokens, rooms[on] - row.prompt))
        least = tokens if not scene.horizon and name not in gone else 0
        if on and not row.prompt < until <= row.prompt + tokens:
            yield f"{name} decodes until {until}, after {row.prompt} and {tokens} to go"
        if least and until != row.prompt + tokens:
            yield f"{name} decodes until {until}, not {row.prompt + tokens}"
        if on and row.decode_on and on != row.decode_on:
            yield f"{name} decodes on {on}, not on {row.decode_on}"
        if on and name in gone:
            yield f"{name} was preempted and decodes"


def _hand_over_faults(plans: Sequence[ExecutionPlan]) -> Iterator[str]:
    """What arrives was sent, to where it arrives, whole, and goes on there."""
    sent = {
        (plan.request_ids[row], plan.target_instance_id, plan.peers[peer]): tokens
        for plan in plans
        for row, peer, tokens in _rows(plan.exports)
    }
    computed = chunks_of(plans)
    for plan in plans:
        for row, peer, tokens in _rows(plan.imports):
            name, source = plan.request_ids[row], plan.peers[peer]
            if source == plan.target_instance_id or name not in computed:
                continue
            if sent.get((name, source, plan.target_instance_id)) != tokens:
                yield f"{plan.plan_id} awaits {name} from {source}, which does not send it"
            if row not in plan.decodes.row:
                yield f"{plan.plan_id} takes in {name}, and does not decode it"


def _step_faults(scene: Scene, place: Place, plan: ExecutionPlan) -> Iterator[str]:
    """No step over its budget, seats or unfinished prompts; none of two phases if strict."""
    tokens, seats = defaultdict(int), defaultdict(int)
    partial, prompts = defaultdict(int), set()
    for step, row, begin, end, _ in _rows(plan.chunks):
        tokens[step] += end - begin
        seats[step] += 1
        partial[step] += end < plan.rows.prompt_tokens[row]
        prompts.add(step)
    if plan.num_steps > len(plan.estimates.tokens):
        yield f"{plan.num_steps} steps, {len(plan.estimates.tokens)} estimates"
    for _, step in _decoded(scene, plan):
        tokens[step] += 1
        seats[step] += 1
        if scene.mode == "strict" and step in prompts:
            yield f"step {step} prefills and decodes in strict mode"
    for step, count in tokens.items():
        if count > plan.max_step_tokens or plan.max_step_tokens > place.max_step_tokens:
            yield f"step {step} computes {count} of {plan.max_step_tokens} tokens"
        if step < plan.num_steps and count > plan.estimates.tokens[step]:
            yield f"step {step} computes {count} tokens, predicted {plan.estimates.tokens[step]}"
        if seats[step] > place.max_batch:
            yield f"step {step} has {seats[step]} rows of {place.max_batch}"
        if place.max_partial_prefills and partial[step] > place.max_partial_prefills:
            yield f"step {step} leaves {partial[step]} prompts unfinished"
    if scene.horizon and plan.num_steps > scene.horizon:
        yield f"{plan.num_steps} steps, beyond the horizon of {scene.horizon}"


def _decoded(scene: Scene, plan: ExecutionPlan) -> Iterator[tuple[int, int]]:
    """(row, step) of the decodes that are sure: of rows whose KV is not on its way."""
    awaited = set(plan.imports.row.tolist())
    prompts = set(plan.chunks.step.tolist()) if scene.mode == "time-share" else set()
    shared = _shared_steps(plan) if prompts else set()
    for row, begin, until in _rows(plan.decodes):
        left = until - int(plan.rows.prompt_tokens[row])
        for step in range(begin, plan.num_steps):
            if row in awaited or not left:
                break
            if step not in prompts or step in shared:
                yield row, step
                left -= 1


def _shared_steps(plan: ExecutionPlan) -> set[int]:
    """Steps of a time-shared plan in which more is predicted than its chunks."""
    chunks: dict[int, int] = defaultdict(int)
    for step, _, begin, end, _ in _rows(plan.chunks):
        chunks[step] += end - begin
    return {step for step, count in chunks.items() if plan.estimates.tokens[step] > count}


def _room_faults(scene: Scene, place: Place, plan: ExecutionPlan) -> Iterator[str]:
    """No more blocks than there are, and no row in fewer than it fills."""
    blocks, prompt = plan.rows.kv_blocks.tolist(), plan.rows.prompt_tokens.tolist()
    needed = dict(enumerate(prompt))
    gone = set(plan.preemptions.row.tolist())
    for row, _, until in _rows(plan.decodes):
        needed[row] = until
    for row, tokens in needed.items():
        if row not in gone and tokens > blocks[row] * place.block_tokens:
            yield f"{plan.request_ids[row]} fills {tokens} tokens of {blocks[row]} blocks"
    for step, used in sorted(_used(scene, plan).items()):
        if used > place.kv_blocks:
            yield f"step {step} holds {used} blocks of {place.kv_blocks}"
        if used > plan.estimates.kv_blocks[step]:
            yield f"step {step} holds {used} blocks, predicted {plan.estimates.kv_blocks[step]}"
    if len(plan.estimates.kv_blocks) and max(plan.estimates.kv_blocks) > place.kv_blocks:
        yield f"predicts {max(plan.estimates.kv_blocks)} blocks of {place.kv_blocks}"


def _used(scene: Scene, plan: ExecutionPlan) -> dict[int, int]:
    """Blocks in use in each step by rows whose KV is not on its way."""
    awaited = set(plan.imports.row.tolist())
    exported = set(plan.exports.row.tolist())
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for step, row, *_ in _rows(plan.chunks):
        first.setdefault(row, step)
        last[row] = step
    decoding = {row for row, _, _ in _rows(plan.decodes)}
    done = dict.fromkeys(decoding, plan.num_steps - 1)
    steps: dict[int, int] = defaultdict(int)
    for row, step in _decoded(scene, plan):
        steps[row] += 1
        if steps[row] == _tokens(plan, row):
            done[row] = step
    used: dict[int, int] = defaultdict(int)
    for row, blocks in enumerate(plan.rows.kv_blocks.tolist()):
        if row in awaited or (row not in first and row not in decoding):
            continue
        held = int(plan.rows.computed_tokens[row]) > 0 or row not in first
        begin = 0 if held else first[row]
        if row in decoding:
            end = done[row]
        else:
            end = last[row] if row in exported or _is_done(plan, row) else plan.num_steps - 1
        for step in range(begin, end + 1):
            used[step] += blocks
    return used


def _tokens(plan: ExecutionPlan, row: int) -> int:
    at = plan.decodes.row.tolist().index(row)
    return int(plan.decodes.until_tokens[at]) - int(plan.rows.prompt_tokens[row])


def _is_done(plan: ExecutionPlan, row: int) -> bool:
    """Whether the plan computes the last token of the row's prompt."""
    return any(named == row and samples for _, named, _, _, samples in _rows(plan.chunks))


# Rounds: what the loop's planner is asked


@dataclass(frozen=True)
class Round:
    """The state of a cluster's requests and what a strategy said of it."""

    places: tuple[Place, ...]
    state: State
    decision: Decision

    def cluster(self) -> str:
        """The cluster alone, as text."""
        return Scene(self.places).cluster()


@st.composite
def rounds(draw: Draw, where: tuple[Place, ...] | None = None) -> Round:
    """Waiting and running requests on some instances, and a decision with gaps in its ranks."""
    where = draw(places(tight=draw(st.booleans()))) if where is None else where
    waiting = draw(_waiting_columns())
    state = State(
        now_us=draw(st.integers(0, 10**6)),
        round=draw(st.integers(0, 99)),
        waiting=waiting,
        running=draw(_running_columns(where)),
        cached_tokens=draw(_cached_tokens(waiting, len(where))),
        instances=Instances.of(
            [place.name for place in where],
            role=[place.role for place in where],
            kv_blocks=[place.kv_blocks for place in where],
            block_tokens=[place.block_tokens for place in where],
            idle=False,
        ),
    )
    return Round(where, state, draw(_decisions(where, state)))


def _lists(draw: Draw, values: st.SearchStrategy[Any], count: int) -> list[Any]:
    return draw(st.lists(values, min_size=count, max_size=count))


_LEFT = st.integers(1, 30) | st.just(2**31 - 1)
_PROMISE = st.sampled_from((0, 0, 50_000))


@st.composite
def _waiting_columns(draw: Draw) -> Waiting:
    count = draw(st.integers(0, 5))
    return Waiting.of(
        [f"w{number}" for number in range(count)],
        prompt_tokens=_lists(draw, st.integers(1, 100), count),
        generate_tokens=_lists(draw, _LEFT, count),
        arrival_us=_lists(draw, st.integers(0, 1000), count),
        ttft_us=_lists(draw, _PROMISE, count),
        priority=_lists(draw, st.integers(-2, 2), count),
        tenant=_lists(draw, st.sampled_from(("", "blue")), count),
    )


@st.composite
def _cached_tokens(draw: Draw, waiting: Waiting, instances: int) -> Any:
    """Nothing of most rows, or blocks, or all that can be: some instance swapped it out."""
    cells = st.sampled_from((0, 0, 8, 16, 64, 10**6))
    rows = [_lists(draw, cells, instances) for _ in range(len(waiting))]
    cached = np.array(rows, np.int64).reshape(len(waiting), instances)
    return np.minimum(cached, waiting.prompt_tokens[:, None] - 1)


@st.composite
def _running_columns(draw: Draw, where: tuple[Place, ...]) -> Running:
    """Prompts under way on what prefills, the others on what decodes."""
    prefills = [at for at, place in enumerate(where) if place.runs("prefill")]
    decodes = [at for at, place in enumerate(where) if place.runs("decode")]
    count = draw(st.integers(0, 6))
    started = _lists(draw, st.booleans(), count)
    prompt = _lists(draw, st.integers(2, 100), count)
    computed = [
        draw(st.integers(0, tokens - 1)) if begun else tokens + draw(st.integers(0, 20))
        for tokens, begun in zip(prompt, started, strict=True)
    ]
    cached = [
        0 if done else draw(st.integers(0, tokens - 1))
        for tokens, done in zip(prompt, computed, strict=True)
    ]
    at = [draw(st.sampled_from(prefills if begun else decodes)) for begun in started]
    return Running.of(
        [f"q{number}" for number in range(count)],
        instance=at,
        prompt_tokens=prompt,
        computed_tokens=computed,
        cached_tokens=cached,
        remaining_tokens=_lists(draw, _LEFT, count),
        arriving=[not begun and draw(st.booleans()) for begun in started],
        decode_on=[
            draw(st.sampled_from(decodes)) if begun else a
            for a, begun in zip(at, started, strict=True)
        ],
    )


@st.composite
def _decisions(draw: Draw, where: tuple[Place, ...], state: State) -> Decision:
    waiting = state.waiting
    rows = np.array(draw(st.permutations(range(len(waiting)))), np.int64)
    admitted = rows[: draw(st.integers(0, len(rows)))]
    decision = Decision.admit(admitted, waiting, "slack", "no KV")
    late = [row for row in rows.tolist() if row not in admitted.tolist()]
    if late and draw(st.booleans()):
        decision = decision.reject(np.array(late[:1]), "too late")
    prefills = [at for at, place in enumerate(where) if place.runs("prefill")]
    decodes = [at for at, place in enumerate(where) if place.runs("decode")]
    out = (
        draw(st.lists(st.sampled_from(range(len(state.running))), unique=True))
        if len(state.running)
        else []
    )
    roles = {place.role for place in where}
    return replace(
        decision.preempt(np.array(out, np.int64), "KV"),
        rank=decision.rank * draw(st.sampled_from((1, 3))),
        prefill_on=np.array(
            _lists(draw, st.sampled_from((ANY, *prefills)), len(waiting)), np.int64
        ),
        decode_on=np.array(_lists(draw, st.sampled_from((ANY, *decodes)), len(waiting)), np.int64),
        chunk_tokens=np.array(_lists(draw, st.sampled_from((0, 5)), len(waiting)), np.int64),
        mode=draw(st.sampled_from(("", "time-share") if "both" in roles else ("", "strict"))),
        horizon_steps=draw(st.sampled_from((0, 4))),
        step_prompt_tokens=draw(st.sampled_from((0, 0, 3))),
        turn_steps=draw(_turns(len(where))),
    )


def _turns(instances: int) -> st.SearchStrategy[Ints | None]:
    """Steps that each instance may compute, or None: nobody says."""
    steps = st.lists(st.sampled_from((0, 1, 3, ANY)), min_size=instances, max_size=instances)
    return st.none() | steps.map(lambda column: np.array(column, np.int64))
