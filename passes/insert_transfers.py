"""insert-transfers: KV that is used on another instance is moved there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import ColumnAttr, Ints, NamesAttr, WordsAttr, quoted
from sagec.dialects.rows import symbol
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.flow import NOWHERE
from sagec.passes.topology import Link, Path, Topology, topology_of


@dataclass(frozen=True)
class InsertTransfersPass(ModulePass):
    """Move KV from where it is computed to where it is decoded, over the cheapest path.

    `%end = pd.decode %kv on @d0  -->
     %moved = pd.transfer %kv source @p0 target @d0 [...]; %end = pd.decode %moved on @d0`

    Transfers over one link wait for each other; `us` is when a row has arrived, counted from when
    the first could leave. Refuses two instances that nothing connects.
    """

    name = "insert-transfers"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        topology = topology_of(op)
        if len(topology.instances) < 2:
            return
        for graph in flow.graphs(op):
            busy: dict[Link, float] = defaultdict(float)
            for decode in flow.ops_of(graph, pd.DecodeOp):
                if decode.on is not None:
                    insert(decode, decode.on, topology, busy)


def insert(decode: pd.DecodeOp, on: WordsAttr, topology: Topology, busy: dict[Link, float]) -> None:
    """Put a pd.transfer before `decode` for the rows that go on, and whose KV is elsewhere.

    busy: bytes that the transfers so far put on each link.
    """
    kv = decode.operands[0]
    rows = flow.table(kv)
    crossing = _crossing(rows.place, on)
    crossing = crossing[(rows.resident | (rows.generate > 1))[crossing]]
    if not crossing.size:
        return
    source = flow.compact(rows.place.words, rows.place.codes[crossing])
    target = flow.compact(on.words, on.codes[crossing])
    names = flow.chosen(rows.names, flow.span_of(crossing))
    routes, via = _routes(decode, names, source, target, topology)
    num_bytes, us = _moves(routes, via, rows.prompt[crossing], busy)
    columns: dict[str, Attribute] = {
        "ids": NamesAttr(names),
        "source": source,
        "target": target,
        "bytes": ColumnAttr.of(num_bytes),
        "us": ColumnAttr.of(us),
        "via": WordsAttr.of(["-".join(route.path.places) for route in routes], via),
    }
    transfer = pd.TransferOp.over(kv, columns)
    transfer.location = decode.location
    moved = transfer.results[0]
    moved.name_hint = "moved"
    flow.remember(transfer, rows.but(place=flow.placed(rows.place, crossing, target)))
    assert decode.parent is not None
    decode.parent.insert_op_before(transfer, decode)
    decode.operands[0] = moved


def _crossing(place: WordsAttr, on: WordsAttr) -> Ints:
    """Rows that are in one place and decode on another."""
    number: dict[str, int] = {}
    here, there = (
        np.array([number.setdefault(word, len(number)) for word in column.words] or [0])[
            column.codes
        ]
        for column in (place, on)
    )
    moves = here != there
    if NOWHERE in number:
        moves &= (here != number[NOWHERE]) & (there != number[NOWHERE])
    rows: Ints = moves.nonzero()[0]
    return rows


@dataclass(frozen=True)
class _Route:
    """The way that some rows go."""

    path: Path
    bytes_per_token: float


def _routes(
    decode: pd.DecodeOp,
    names: tuple[str, ...],
    here: WordsAttr,
    there: WordsAttr,
    topology: Topology,
) -> tuple[list[_Route], Ints]:
    """The ways that rows go, in the order of their first rows; and which one each row goes."""
    pair = here.codes * len(there.words) + there.codes
    codes = [0] if len(here.words) == len(there.words) == 1 else [*dict.fromkeys(pair.tolist())]
    number = np.zeros(len(here.words) * len(there.words), np.int64)
    number[codes] = np.arange(len(codes))
    routes = []
    for code in codes:
        ends = here.words[code // len(there.words)], there.words[code % len(there.words)]
        source, to = (topology.instance(end, decode) for end in ends)
        if (path := topology.path(source, to)) is None:
            raise PassError(
                f"{quoted(names[int((pair == code).argmax())])}: its KV is on "
                f"{symbol(ends[0])} and it decodes on {symbol(ends[1])}, which no links connect; "
                "declare a cluster.link",
                decode,
            )
        routes.append(_Route(path, source.kv_bytes_per_token))
    return routes, number[pair]


def _moves(
    routes: list[_Route], via: Ints, prompt: Ints, busy: dict[Link, float]
) -> tuple[Ints, Ints]:
    """Bytes and microseconds of each row, in order: on a link the earlier rows go first."""
    rates = [(r.bytes_per_token, r.path.latency_us, r.path.bytes_per_s) for r in routes]
    # Of each row, or one for all.
    per_row: Any = np.array(rates).T[:, via] if len(rates) > 1 else rates[0]
    bytes_per_token, latency_us, bytes_per_s = per_row
    size = prompt * bytes_per_token
    us = latency_us + 1e6 * size / bytes_per_s
    for link in dict.fromkeys(link for route in routes for link in route.path.links):
        sharing = [number for number, route in enumerate(routes) if link in route.path.links]
        if len(sharing) == len(routes):
            arrived = size.cumsum() + busy[link]
            us = np.maximum(us, latency_us + 1e6 * arrived / link.bytes_per_s)
        else:
            rows = np.isin(via, sharing)
            arrived = np.cumsum(size[rows]) + busy[link]
            waits = latency_us[rows] + 1e6 * arrived / link.bytes_per_s
            us[rows] = np.maximum(us[rows], waits)
        busy[link] = float(arrived[-1])
    return size.astype(np.int64), np.rint(us).astype(np.int64)
