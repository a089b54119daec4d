"""Costs of an operator with other rows or on another device, told from those that it has."""

from __future__ import annotations

from collections.abc import Iterator

from xdsl.ir import Attribute

from sagec.dialects import exec as ex
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import attr_of
from sagec.passes.errors import PassError
from sagec.passes.messages import Rings, link_between, message_bytes, message_us
from sagec.passes.topology import Topology
from sagec.runtime import roofline
from sagec.runtime.cost import experts_read


class ScaledCosts:
    """What an op of a graph costs on other rows or on another device.

    An estimate may come from measurements; so what is asked of the roofline, and of the links, is
    how much longer or shorter an op gets, not how long it takes.
    """

    def __init__(self, topology: Topology, graph: ex.ExecGraphOp) -> None:
        self.topology = topology
        self.rings = Rings(topology)
        self.num_ranks = int(graph.scalar("tp")) * int(graph.scalar("dp"))  # that share the experts
        self._devices: dict[str, roofline.Device] = {}

    def operator_us(self, op: ex.OperatorOp, flops: float, num_bytes: float) -> float:
        """An operator of such costs on the device of `op`.

        Raises PassError for a device that the module does not declare.
        """
        if op.device not in self._devices:
            if (device := self.topology.devices.get(op.device)) is None:
                there = ", ".join(map(symbol, self.topology.devices)) or "none"
                raise PassError(f"no cluster.device {symbol(op.device)}; there are: {there}", op)
            speeds = device.flops_per_s, device.bytes_per_s
            self._devices[op.device] = roofline.Device(*speeds)
        return self._devices[op.device].operator_us(flops, num_bytes)

    def of(self, old: ex.OperatorOp, new: ex.OperatorOp) -> dict[str, Attribute]:
        """time_us, flops and bytes of `new`, which does to its tensors what `old` does to others.

        What `old` does not say stays unsaid. Raises PassError for a device or a link that the
        module does not declare.
        """
        flops, moved = float(old.scalar("flops")), float(old.scalar("bytes"))
        new_flops, new_moved = flops * _work(old, new), self._traffic(old, new, moved)
        us = self._us(old, flops, moved)
        share = self._us(new, new_flops, new_moved) / us if us else 1.0
        costs = {
            "time_us": round(old.estimated_us * share, 3),
            "flops": float(round(new_flops)),
            "bytes": float(round(new_moved)),
        }
        return {name: attr_of(cost) for name, cost in costs.items() if name in old.properties}

    def _us(self, op: ex.OperatorOp, flops: float, moved: float) -> float:
        """What roofline and links say of an op of such costs; 0 where it takes no time."""
        if not op.estimated_us:
            return 0.0
        if isinstance(op, ex.CollectiveOp):
            return message_us(op, self.rings.of(op), message_bytes(op))
        if isinstance(op, ex.SendOp):
            way = link_between(self.topology, op.device, op.other, op)
            return way.send_us(ex.tensor_of(op.sent).num_bytes)
        return self.operator_us(op, flops, moved)

    def _traffic(self, old: ex.OperatorOp, new: ex.OperatorOp, moved: float) -> float:
        """Bytes that are moved: weights as before, tensors as they are now."""
        tensors, new_tensors = (sum(_tensor_bytes(op)) for op in (old, new))
        weights = 0.0
        if isinstance(old, ex.QKVOp | ex.ProjectionOp | ex.FFNOp):
            weights = max(0.0, moved - tensors)
        share = new_tensors / tensors if tensors else 1.0
        return weights * self._weights_share(old, new) + (moved - weights) * share

    def _weights_share(self, old: ex.OperatorOp, new: ex.OperatorOp) -> float:
        """Weights as a share of what they were: of experts, those that a token goes to."""
        if not isinstance(old, ex.FFNOp) or not old.number("experts"):
            return 1.0
        return self._columns_read(new) / self._columns_read(old)

    def _columns_read(self, op: ex.OperatorOp) -> float:
        """How many columns, as long as a token is wide, an op of experts reads: of the router one
        an expert, and of gate, up and down of each expert that a token goes to."""
        experts = op.number("experts")
        everywhere, tokens = experts * self.num_ranks, ex.tensor_of(op.operands[0]).shape[0]
        read = experts * experts_read(everywhere, op.number("experts_per_token"), tokens)
        return everywhere + 3 * op.number("width") * read


def _work(old: ex.OperatorOp, new: ex.OperatorOp) -> float:
    """Arithmetic as a share of what it was: by pairs of tokens that attend, or else by rows."""
    if isinstance(old, ex.AttentionOp) and isinstance(new, ex.AttentionOp):
        return _pairs(new) / _pairs(old)
    rows, new_rows = (ex.tensor_of((*op.results, *op.operands)[0]).shape[0] for op in (old, new))
    return new_rows / rows


def _pairs(op: ex.AttentionOp) -> int:
    new = op.new_tokens
    return int((new * op.context_tokens + new * (new + 1) // 2).sum())


def _tensor_bytes(op: ex.OperatorOp) -> Iterator[float]:
    """Of each tensor of an op, the bytes that it touches: attention reads its own rows of all."""
    for value in (*op.operands, *op.results):
        tensor = ex.tensor_of(value)
        if isinstance(op, ex.AttentionOp) and value is op.operands[0]:
            yield tensor.num_bytes * int(op.new_tokens.sum()) / tensor.shape[0]
        else:
            yield tensor.num_bytes
