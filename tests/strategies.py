"""Random IR for property tests, with hypothesis.

`any_modules()` makes every op of the dialects with every field and any value that verifies, to test
texts. `serving_modules()` makes what a person would write: a cluster and graphs of waves and
residents that its instances can serve, to test passes; `clusters` and `graphs` are its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, SymbolRefAttr, i64
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue

from sagec.dialects import cluster, kv, pd
from sagec.dialects.columns import ColumnAttr, ListsAttr, NamesAttr, WordsAttr
from sagec.dialects.rows import READABLE_ROWS, Field, Fields, Kind
from sagec.dialects.scalars import Scalar, Scalars, properties_of

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
Draw = st.DrawFn


class ShownModule(ModuleOp):
    """A module that a failed example shows as text."""

    def __repr__(self) -> str:
        return f"parse_module({str(self)!r})"


# Words

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
"""Any string that UTF-8 can write: quotes, backslashes, newlines, other scripts."""

any_name = st.one_of(
    st.from_regex(r"[A-Za-z_][A-Za-z0-9_$.]{0,6}", fullmatch=True), any_text.filter(bool)
)
"""Names of symbols, bare ones and those that need quotes."""


def int64s(least: int | None = None) -> st.SearchStrategy[int]:
    """Integers of 64 bits from `least` on, the extremes among them."""
    low = INT64_MIN if least is None else least
    return st.one_of(st.integers(low, low + 100), st.integers(low, INT64_MAX))


@st.composite
def any_ids(draw: Draw, max_rows: int = 6) -> list[str]:
    """Ids of a table's rows: none, some, or now and then too many to print as rows."""
    if max_rows > 4 and draw(st.integers(0, 19)) == 0:
        return [f"r{row}" for row in range(READABLE_ROWS + draw(st.integers(0, 2)))]
    return draw(st.lists(any_text, max_size=max_rows, unique=True))


# Columns and scalars of any op


@st.composite
def any_column(draw: Draw, field: Field, rows: int) -> Attribute:
    """A column of `rows` values that the field's verifier takes."""
    if rows > READABLE_ROWS:
        return _long_column(field, rows, draw(st.integers(0, 9)))
    size = {"min_size": rows, "max_size": rows}
    match field.kind:
        case Kind.INT:
            return ColumnAttr.of(draw(st.lists(int64s(field.least), **size)))
        case Kind.FLAG | Kind.CHOICE:
            codes = st.integers(0, (len(field.choices) or 2) - 1)
            return ColumnAttr.of(draw(st.lists(codes, **size)))
        case Kind.TEXT:
            return NamesAttr.of(draw(st.lists(any_text, **size)))
        case Kind.LIST:
            return ListsAttr.of(draw(st.lists(st.lists(int64s(), max_size=3), **size)))
        case _:
            word = any_name if field.required else any_text
            words = draw(st.lists(word, min_size=1, max_size=4, unique=True))
            codes = st.integers(0, len(words) - 1)
            return WordsAttr.of(words, draw(st.lists(codes, **size)))


def _long_column(field: Field, rows: int, seed: int) -> Attribute:
    random = np.random.default_rng(seed)
    match field.kind:
        case Kind.INT:
            return ColumnAttr.of(random.integers(field.least or 0, 1 << 40, rows))
        case Kind.FLAG | Kind.CHOICE:
            return ColumnAttr.of(random.integers(0, len(field.choices) or 2, rows))
        case Kind.TEXT:
            return NamesAttr.of(f"text {row}" for row in range(rows))
        case Kind.LIST:
            lengths = random.integers(0, 3, rows)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            return ListsAttr.from_offsets(offsets, random.integers(-9, 9, int(offsets[-1])))
        case _:
            words = ("p0", "é", "d0" if field.required else "")
            return WordsAttr.of(words, random.integers(0, 3, rows))


@st.composite
def any_table(draw: Draw, fields: Fields, ids: Sequence[str]) -> dict[str, Attribute]:
    """Columns for `ids`: those that are required, and some others."""
    table: dict[str, Attribute] = {"ids": NamesAttr.of(ids)}
    for field in fields:
        if field.required or draw(st.booleans()):
            table[field.name] = draw(any_column(field, len(ids)))
    return table


def any_value(scalar: Scalar) -> st.SearchStrategy[int | float | str]:
    """A value of a scalar that its verifier takes."""
    if scalar.choices:
        return st.sampled_from(scalar.choices)
    match scalar.default:
        case str():
            return any_text
        case float():
            return st.floats(scalar.least, allow_nan=False, allow_infinity=False)
        case _:
            return st.integers(int(scalar.least), int(min(scalar.most, INT64_MAX)))


@st.composite
def any_scalars(draw: Draw, scalars: Scalars, optional: bool = False) -> dict[str, Any]:
    """Values for the required scalars and some others; `optional`: none is required."""
    return {
        scalar.name: draw(any_value(scalar))
        for scalar in scalars
        if (scalar.required and not optional) or draw(st.booleans())
    }


# Every op


@st.composite
def any_cluster_ops(draw: Draw) -> list[Operation]:
    """An op of each kind of the cluster dialect."""
    model, like, device, switch, instance = draw(
        st.lists(any_name, min_size=5, max_size=5, unique=True)
    )
    shape = draw(any_scalars(cluster.MODEL_SCALARS))
    shape["heads"] = shape["kv_heads"] * draw(st.integers(1, 3))
    shape["kv_heads"], shape["heads"] = min(shape["kv_heads"], 1 << 60), shape["heads"]
    if shape["heads"] > INT64_MAX or shape["heads"] % shape["kv_heads"]:
        shape["heads"] = shape["kv_heads"]
    values = draw(any_scalars(cluster.INSTANCE_SCALARS))
    values["tp"], values["pp"] = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    ranks = [f"g{rank}" for rank in range(values["tp"] * values["pp"])]
    role = draw(st.sampled_from(cluster.ROLES))
    return [
        cluster.ModelOp.named(model, **shape),
        cluster.ModelOp.named(like, like=model),
        cluster.DeviceOp.named(
            device,
            like=draw(st.none() | st.just("g0")),
            **draw(any_scalars(cluster.DEVICE_SCALARS)),
        ),
        cluster.SwitchOp.create(properties={"sym_name": StringAttr(switch)}),
        cluster.LinkOp.between(device, switch, **draw(any_scalars(cluster.LINK_SCALARS))),
        cluster.InstanceOp.of(instance, ranks, draw(any_text), role, model, **values),
    ]


@st.composite
def any_kv_ops(draw: Draw, wave: SSAValue, ids: Sequence[str]) -> list[Operation]:
    """An op of each kind of the kv dialect, over a wave with these ids."""
    hashes = ColumnAttr.of(draw(st.lists(int64s(), max_size=4)))
    on = SymbolRefAttr(draw(any_name))
    tiers = draw(st.permutations(kv.TIERS))[:2]
    ends = {"source": StringAttr(tiers[0]), "target": StringAttr(tiers[1])}
    return [
        kv.MatchOp.over(wave, draw(any_table(kv.MATCH_FIELDS, ids))),
        kv.ReserveOp.create(properties=draw(any_table(kv.RESERVE_FIELDS, ids))),
        kv.EvictOp.create(properties={"instance": on, "hashes": hashes}),
        kv.MigrateOp.create(properties={"instance": on, "hashes": hashes} | ends),
    ]


@st.composite
def any_requests(draw: Draw) -> pd.RequestsOp:
    """A pd.requests whose prompts are longer than what has KV already."""
    ids = draw(any_ids())
    table = draw(any_table(pd.REQUEST_FIELDS, ids))
    for name in ("computed", "cached"):
        held = table.get(name)
        prompt = table["prompt"]
        if isinstance(held, ColumnAttr) and isinstance(prompt, ColumnAttr):
            table[name] = ColumnAttr.of(np.minimum(held.array, (prompt.array - 1) // 2))
    return pd.RequestsOp.of(table)


@st.composite
def any_placement(draw: Draw, rows: int) -> dict[str, Attribute]:
    """`on` for `rows` rows, or nothing."""
    if draw(st.booleans()):
        return {}
    return {"on": draw(any_column(Field("on", Kind.SYMBOL, ""), rows))}


@st.composite
def any_prefill(draw: Draw, wave: SSAValue) -> pd.PrefillOp:
    """A pd.prefill with some of its options."""
    rows = pd.rows_of(wave)
    properties = draw(any_placement(rows))
    if draw(st.booleans()):
        properties["chunk"] = IntegerAttr(draw(st.integers(1, INT64_MAX)), i64)
    if draw(st.booleans()):
        bounds = st.lists(int64s(0), min_size=2, max_size=4, unique=True).map(sorted)
        few = draw(st.lists(bounds, min_size=min(rows, 4), max_size=min(rows, 4)))
        properties["bounds"] = ListsAttr.of(few[row % 4] for row in range(rows))
    return pd.PrefillOp.of(wave, properties)


@st.composite
def any_decode(draw: Draw, value: SSAValue) -> pd.DecodeOp:
    """A pd.decode with some of its options."""
    properties = draw(any_placement(pd.rows_of(value)))
    if draw(st.booleans()):
        properties["steps"] = IntegerAttr(draw(st.integers(0, INT64_MAX)), i64)
    return pd.DecodeOp.of(value, properties)


@st.composite
def any_steps(draw: Draw, scheduled: Sequence[SSAValue]) -> pd.StepsOp:
    """A pd.steps whose chunks cut each prompt in order, at random places and steps."""
    ids = draw(st.lists(any_text, max_size=4, unique=True))
    table = draw(any_table(pd.STEP_FIELDS, ids))
    num_steps = draw(st.integers(1, 4))
    chunks: list[tuple[int, int, int, int]] = []
    prompts = table["prompt"]
    assert isinstance(prompts, ColumnAttr)
    for row, prompt in enumerate(prompts.array.tolist()):
        cuts = sorted(draw(st.sets(st.integers(0, prompt), max_size=4)))
        steps = sorted(draw(st.lists(st.integers(0, num_steps - 1), min_size=4, max_size=4)))
        chunks += zip(steps, [row] * 4, cuts, cuts[1:], strict=False)
    columns = np.array(sorted(chunks), np.int64).reshape(-1, 4).T.copy()
    names = ("chunk_step", "chunk_row", "chunk_begin", "chunk_end")
    properties = table | {n: ColumnAttr.of(c) for n, c in zip(names, columns, strict=True)}
    for name in ("step_us", "step_tokens", "step_blocks"):
        if draw(st.booleans()):
            column = draw(st.lists(int64s(), min_size=num_steps, max_size=num_steps))
            properties[name] = ColumnAttr.of(column)
    properties["instance"] = SymbolRefAttr(draw(any_name))
    properties["num_steps"] = IntegerAttr(num_steps, i64)
    properties["max_step_tokens"] = IntegerAttr(draw(st.integers(1, INT64_MAX)), i64)
    return pd.StepsOp.create(operands=scheduled, properties=properties)


@st.composite
def any_graphs(draw: Draw, name: str) -> pd.GraphOp:
    """A graph with every op of the pd and kv dialects, each with any of its fields."""
    requests = draw(any_requests())
    ids = list(requests.names)
    some = ids[: draw(st.integers(0, len(ids)))] if len(ids) < READABLE_ROWS else ids
    decide = pd.DecideOp.over(requests.wave, draw(any_table(pd.DECIDE_FIELDS, some)))
    prefill = draw(any_prefill(decide.verdicts))
    old = draw(any_ids())
    resident = pd.ResidentOp.of(draw(any_table(pd.RESIDENT_FIELDS, old)))
    moves = draw(any_table(pd.TRANSFER_FIELDS, some))
    moves |= {n: WordsAttr.same(w, len(some)) for n, w in (("source", "p 0"), ("target", "d0"))}
    transfer = pd.TransferOp.over(prefill.kv, moves)
    leaving = old[: draw(st.integers(0, 2))]
    reasons = draw(any_table(pd.PREEMPT_FIELDS, leaving))
    reasons["verdict"] = ColumnAttr.of(
        [draw(st.sampled_from((pd.PREEMPT, pd.SWAP)))] * len(leaving)
    )
    preempt = pd.PreemptOp.over(resident.kv, reasons)
    join = pd.JoinOp.of(draw(st.permutations([transfer.moved, preempt.rest, resident.kv])))
    decode = draw(any_decode(join.kv))
    gone = draw(any_table(pd.LEAVE_FIELDS, draw(any_ids(max_rows=3))))
    gone["verdict"] = ColumnAttr.of(np.full(len(gone["ids"].data), pd.DEFER))  # type: ignore[attr-defined]
    phase = draw(any_phase([decode.end]))
    ops: list[Operation] = [
        requests, decide, prefill, resident, transfer, preempt, join, pd.JoinOp.of([]), decode,
        pd.LeaveOp.create(properties=gone), phase,
        pd.TurnsOp.create(properties=draw(any_table(pd.TURN_FIELDS, draw(any_ids(max_rows=3))))),
        *draw(any_kv_ops(requests.wave, some)),
        draw(any_steps(draw(st.sampled_from([[], [decode.end], [prefill.kv, decode.end]])))),
        pd.YieldOp.create(operands=draw(st.sampled_from([[], [decode.end, join.kv]]))),
    ]  # fmt: skip
    return _graph(name, ops, draw(any_scalars(pd.GraphOp.SCALARS)))


@st.composite
def any_phase(draw: Draw, values: Sequence[SSAValue]) -> pd.PhaseOp:
    """A phase that decodes each of the values, and yields that or nothing."""
    decodes = [pd.DecodeOp.of(value) for value in values]
    given = [op.end for op in decodes] if draw(st.booleans()) else []
    block = Block([*decodes, pd.YieldOp.create(operands=given)])
    scalars = draw(any_scalars(pd.PhaseOp.SCALARS))
    properties: dict[str, Attribute] = {"phase": StringAttr(draw(st.sampled_from(pd.PHASES)))}
    return pd.PhaseOp.create(
        properties=properties | {name: IntegerAttr(value, i64) for name, value in scalars.items()},
        regions=[Region(block)],
        result_types=[value.type for value in given],
    )


def _graph(name: str, ops: Sequence[Operation], scalars: dict[str, Any]) -> pd.GraphOp:
    properties: dict[str, Attribute] = {"sym_name": StringAttr(name)}
    properties |= properties_of(scalars, pd.GraphOp.SCALARS)
    return pd.GraphOp.create(properties=properties, regions=[Region(Block(ops))])


@st.composite
def any_modules(draw: Draw) -> ModuleOp:
    """A module with every op; it verifies, but would make no sense to a pass."""
    ops = draw(any_cluster_ops())
    taken = {op.properties.get("sym_name") for op in ops}
    graph = draw(any_name.filter(lambda name: StringAttr(name) not in taken))
    return ShownModule([*ops, draw(any_graphs(graph))])


# What a person would write


@st.composite
def clusters(draw: Draw, max_instances: int = 4, tight: bool = False) -> list[Operation]:
    """A model, devices around a switch, and an instance on each; every phase has an instance.

    Engines are torch. The KV holds every graph of `graphs` many times; `tight`: perhaps not once.
    """
    count = draw(st.integers(1, max_instances))
    roles = draw(st.lists(st.sampled_from(cluster.ROLES), min_size=count, max_size=count))
    for phase in pd.PHASES:
        if not {phase, "both"} & set(roles):
            roles[0] = "both"
    ops: list[Operation] = [
        cluster.ModelOp.named(
            "tiny", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256
        ),
        cluster.SwitchOp.create(properties={"sym_name": StringAttr("hub")}),
    ]
    for number, role in enumerate(roles):
        device, block_tokens = f"g{number}", draw(st.sampled_from((16, 64)))
        speed = draw(st.sampled_from((1e11, 1e12, 1e13)))
        blocks = draw(st.integers(1, 64)) if tight else 100_000
        ops += [
            cluster.DeviceOp.named(device, flops_per_s=speed),
            cluster.LinkOp.between(device, "hub", bytes_per_s=draw(st.sampled_from((1e9, 1e10)))),
            cluster.InstanceOp.of(
                f"i{number}", [device], "torch", role, "tiny",
                kv_blocks=blocks,
                block_tokens=block_tokens,
                max_step_tokens=draw(st.sampled_from((16, 64, 512))),
                max_batch=draw(st.sampled_from((2, 8, 256))),
            ),
        ]  # fmt: skip
    return ops


@st.composite
def graphs(
    draw: Draw,
    instances: Sequence[cluster.InstanceOp],
    name: str = "round",
    max_requests: int = 6,
    shuffled: bool = True,
) -> pd.GraphOp:
    """Waves that may be decided and matched, prefilled, joined with residents and decoded.

    Residents lie on instances that decode. shuffled: the order of the text may be any.
    """
    ids = (f"r{number}" for number in range(1000))
    ops: list[Operation] = []
    values: list[SSAValue] = []
    for _ in range(draw(st.integers(0, 2))):
        chain = draw(_prefilled(ids, max_requests))
        ops += chain
        values.append(chain[-1].results[0])
    homes = [i.symbol for i in instances if i.role.data != "prefill"]
    for _ in range(draw(st.integers(0, 2))):
        resident = draw(_residents(ids, homes, max_requests))
        ops.append(resident)
        values.append(resident.kv)
    join = pd.JoinOp.of(draw(st.permutations(values)))
    steps = draw(st.none() | st.integers(1, 8))
    bound = {} if steps is None else {"steps": IntegerAttr(steps, i64)}
    decode = pd.DecodeOp.of(join.kv, bound)
    ops += [join, decode] if values else []
    ops = list(draw(st.permutations(ops))) if shuffled else ops
    end = pd.YieldOp.create(operands=[decode.end] if values else [])
    mode = draw(st.sampled_from(pd.MODES))
    horizon = draw(st.integers(1, 16))
    return _graph(name, [*ops, end], {"mode": mode, "now": 1_000_000, "horizon": horizon})


@st.composite
def _prefilled(draw: Draw, ids: Any, max_requests: int) -> list[Operation]:
    """A wave of requests that becomes KV; the last op gives it."""
    names = [next(ids) for _ in range(draw(st.integers(1, max_requests)))]

    def column(values: st.SearchStrategy[int]) -> ColumnAttr:
        return ColumnAttr.of(draw(st.lists(values, min_size=len(names), max_size=len(names))))

    requests = pd.RequestsOp.of(
        {
            "ids": NamesAttr.of(names),
            "prompt": column(st.integers(1, 200)),
            "generate": column(st.integers(1, 40)),
            "arrived": column(st.integers(0, 1_000_000)),
            "deadline": column(st.sampled_from((0, 1_100_000, 2_000_000))),
            "chunk": column(st.sampled_from((0, 0, 16, 50))),
        }
    )
    ops: list[Operation] = [requests]
    if draw(st.booleans()):
        ops.append(pd.DecideOp.over(ops[-1].results[0], draw(_decided(names))))
    if draw(st.booleans()):
        prompts = requests.column("prompt")
        tokens = [draw(st.integers(0, prompt - 1)) for prompt in prompts.tolist()]
        # Rows that a decision takes out of the wave cannot be matched any more.
        if len(ops) == 1:
            matched = {"ids": requests.properties["ids"], "tokens": ColumnAttr.of(tokens)}
            ops.append(kv.MatchOp.over(requests.wave, matched))
    chunk = draw(st.none() | st.sampled_from((16, 64)))
    bound = {} if chunk is None else {"chunk": IntegerAttr(chunk, i64)}
    return [*ops, pd.PrefillOp.of(ops[-1].results[0], bound)]


@st.composite
def _decided(draw: Draw, names: Sequence[str]) -> dict[str, Attribute]:
    """Verdicts for some of the names, in any order; the admitted have ranks of their own."""
    chosen = list(draw(st.permutations(names)))[: draw(st.integers(0, len(names)))]
    verdicts = st.sampled_from((pd.ADMIT, pd.ADMIT, pd.DEFER, pd.REJECT))
    return {
        "ids": NamesAttr.of(chosen),
        "verdict": ColumnAttr.of([draw(verdicts) for _ in chosen]),
        "rank": ColumnAttr.of(draw(st.permutations(range(len(chosen))))),
        "because": WordsAttr.from_rows(draw(st.sampled_from(("", "slack"))) for _ in chosen),
    }


@st.composite
def _residents(draw: Draw, ids: Any, homes: Sequence[str], most: int) -> pd.ResidentOp:
    names = [next(ids) for _ in range(draw(st.integers(1, most)))]
    return pd.ResidentOp.of(
        {
            "ids": NamesAttr.of(names),
            "on": WordsAttr.from_rows(draw(st.sampled_from(homes)) for _ in names),
            "context": ColumnAttr.of([draw(st.integers(1, 300)) for _ in names]),
            "remaining": ColumnAttr.of([draw(st.integers(1, 40)) for _ in names]),
        }
    )


@st.composite
def serving_modules(
    draw: Draw,
    max_instances: int = 4,
    max_requests: int = 6,
    tight: bool = False,
    shuffled: bool = True,
) -> ModuleOp:
    """A cluster and one graph that it can serve; see `clusters` and `graphs`."""
    ops = draw(clusters(max_instances, tight))
    instances = [op for op in ops if isinstance(op, cluster.InstanceOp)]
    return ShownModule([*ops, draw(graphs(instances, "round", max_requests, shuffled))])
