"""Whose turn it is: how many steps each instance may compute, where a graph says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sagec.dialects import pd
from sagec.dialects.rows import symbol
from sagec.passes.errors import PassError
from sagec.passes.topology import Topology

Turns = Mapping[str, int]
"""Steps that instances may compute, by name; those that are not in it have no bound."""

NO_TURNS: Turns = {}


def turns_of(ops: Iterable[pd.TurnsOp], topology: Topology) -> Turns:
    """What these ops say. Raises PassError for an instance that is not there, or has two turns."""
    turns: dict[str, int] = {}
    for op in ops:
        for name, steps in zip(op.names, op.column("steps").tolist(), strict=True):
            topology.instance(name, op)
            if name in turns:
                raise PassError(f"{symbol(name)} has two turns in one graph; say it once", op)
            turns[name] = steps
    return turns
