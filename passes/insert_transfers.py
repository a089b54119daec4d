"""insert-transfers: KV that is used on another instance is moved there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

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
from sagec.passes.topology import Link, Topology, topology_of


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
        for graph in flow.graphs(op):
            busy: dict[Link, float] = defaultdict(float)
            for decode in [o for o in flow.ops_in(graph) if isinstance(o, pd.DecodeOp)]:
                if decode.on is not None:
                    insert(decode, decode.on, topology, busy)


def insert(decode: pd.DecodeOp, on: WordsAttr, topology: Topology, busy: dict[Link, float]) -> None:
    """Put a pd.transfer before `decode` for the rows whose KV is elsewhere.

    busy: bytes that the transfers so far put on each link.
    """
    rows = flow.table(decode.kv)
    crossing = _crossing(rows.place, on)
    if not crossing.size:
        return
    source, target = rows.place.take(crossing), on.take(crossing)
    num_bytes, us, via = _moves(decode, rows.take(crossing), target, topology, busy)
    columns: dict[str, Attribute] = {
        "ids": NamesAttr.of([rows.names[row] for row in crossing.tolist()]),
        "source": source,
        "target": target,
        "bytes": ColumnAttr.of(num_bytes),
        "us": ColumnAttr.of(us),
        "via": WordsAttr.from_rows(via),
    }
    transfer = pd.TransferOp.over(decode.kv, columns)
    transfer.location = decode.location
    transfer.moved.name_hint = "moved"
    assert decode.parent is not None
    decode.parent.insert_op_before(transfer, decode)
    decode.operands[0] = transfer.moved


def _crossing(place: WordsAttr, on: WordsAttr) -> Ints:
    """Rows that are in one place and decode on another."""
    both = flow.joined_words([place, on])
    here, there = both.codes[: len(place)], both.codes[len(place) :]
    known = np.array([bool(word) for word in both.words], np.bool_)
    return np.flatnonzero((here != there) & known[here] & known[there])


def _moves(
    decode: pd.DecodeOp,
    rows: flow.Table,
    target: WordsAttr,
    topology: Topology,
    busy: dict[Link, float],
) -> tuple[list[int], list[int], list[str]]:
    """Bytes, microseconds and path of each row, in order: the earlier rows go first."""
    sizes, times, paths = [], [], []
    ends = zip(rows.names, rows.place.rows(), target.rows(), rows.prompt.tolist(), strict=True)
    for name, here, there, tokens in ends:
        source, to = topology.instance(here, decode), topology.instance(there, decode)
        path = topology.path(source, to)
        if path is None:
            raise PassError(
                f"{quoted(name)}: its KV is on {symbol(here)} and it decodes on {symbol(there)}, "
                "which no links connect; declare a cluster.link",
                decode,
            )
        size = tokens * source.kv_bytes_per_token
        us = path.transfer_us(size)
        for link in path.links:
            busy[link] += size
            us = max(us, path.latency_us + 1e6 * busy[link] / link.bytes_per_s)
        sizes.append(int(size))
        times.append(round(us))
        paths.append("-".join(path.places))
    return sizes, times, paths
