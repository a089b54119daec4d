"""What the messages of a group of devices take, over the links that the module declares."""

from __future__ import annotations

from sagec.dialects import exec as ex
from sagec.dialects.rows import symbol
from sagec.passes.errors import PassError
from sagec.passes.topology import Topology
from sagec.runtime.roofline import Link, ring_of


def link_between(topology: Topology, source: str, target: str, op: ex.OperatorOp) -> Link:
    """The way between two devices as one link. Raises PassError, at `op`, where there is none."""
    if (path := topology.device_path(source, target)) is None:
        raise PassError(
            f"{op.name}: no link leads from {symbol(source)} to {symbol(target)}, so nobody knows "
            "what a message takes; declare a cluster.link",
            op,
        )
    return Link(path.bytes_per_s, path.latency_us)


class Rings:
    """What carries the messages of each group of devices."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._known: dict[tuple[str, ...], Link] = {}

    def of(self, op: ex.CollectiveOp) -> Link:
        """A ring of the group's devices; see `ring_of`.

        Raises PassError where a device has no link to the next.
        """
        group = op.group
        if group not in self._known:
            self._known[group] = ring_of(
                group, lambda here, there: link_between(self.topology, here, there, op)
            )
        return self._known[group]


def message_bytes(op: ex.CollectiveOp) -> int:
    """The whole of a collective's message: what all ranks have together, or each of them gets."""
    return max(
        sum(ex.tensor_of(value).num_bytes for value in values)
        for values in (op.operands, op.results)
    )


def message_us(op: ex.CollectiveOp, ring: Link, num_bytes: float) -> float:
    """What a collective of this kind and group takes with a message of so many bytes."""
    if isinstance(op, ex.AllReduceOp):
        return ring.all_reduce_us(num_bytes, len(op.group))
    return ring.all_gather_us(num_bytes, len(op.group))
