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


class ScaledCosts:
    """What an op costs on other rows, or on another device, told from what it costs as it is."""

    def __init__(self, topology: Topology, num_ranks: int) -> None:
        self.topology, self.num_ranks = topology, num_ranks
        self.rings = Rings(topology)

    def device(self, name: str) -> roofline.Device:
        """The roofline of a device. Raises PassError where the module has none of that name."""
        if (found := self.topology.devices.get(name)) is None:
            there = ", ".join(map(symbol, self.topology.devices)) or "none"
            raise PassError(f"scheme=af: no cluster.device {symbol(name)}; there are: {there}")
        return roofline.Device(found.flops_per_s, found.bytes_per_s)

    def of(self, old: ex.OperatorOp, new: ex.OperatorOp) -> dict[str, Attribute]:
        """The costs of `new`, which does to its tensors what `old` does to others.

        An operator's time changes as its roofline does, so what was measured counts.
        """
        flops, moved = float(old.scalar("flops")), float(old.scalar("bytes"))
        new_flops, new_moved = flops * _work(old, new), self._traffic(old, new, moved)
        if isinstance(new, ex.CollectiveOp):
            us = message_us(new, self.rings.of(new), message_bytes(new))
        elif isinstance(new, ex.SendOp):
            way = link_between(self.topology, new.device, new.other, new)
            us = way.send_us(ex.tensor_of(new.sent).num_bytes)
        elif us := old.estimated_us:
            us *= self.device(new.device).operator_us(new_flops, new_moved)
            us /= self.device(old.device).operator_us(flops, moved)
        said = {"time_us": round(us, 3), "flops": round(new_flops), "bytes": round(new_moved)}
        return {name: attr_of(float(value)) for name, value in said.items() if value}

    def _traffic(self, old: ex.OperatorOp, new: ex.OperatorOp, moved: float) -> float:
        """Bytes that are moved: weights as before, tensors as they are now."""
        tensors, new_tensors = (sum(_tensor_bytes(op)) for op in (old, new))
        if isinstance(old, ex.QKVOp | ex.ProjectionOp | ex.FFNOp):
            return max(0.0, moved - tensors) * self._weights_read(old, new) + new_tensors
        return moved * new_tensors / tensors if tensors else 0.0

    def _weights_read(self, old: ex.OperatorOp, new: ex.OperatorOp) -> float:
        """Weights as a share of what they were: of experts, those that a token goes to."""
        if not isinstance(old, ex.FFNOp) or not (experts := old.number("experts")):
            return 1.0
        chosen = min(1.0, old.number("experts_per_token") / (experts * self.num_ranks))
        read = [1 - (1 - chosen) ** ex.tensor_of(op.operands[0]).shape[0] for op in (old, new)]
        return read[1] / read[0]


def _work(old: ex.OperatorOp, new: ex.OperatorOp) -> float:
    """Arithmetic as a share of what it was: by pairs of tokens that attend, or else by rows."""
    if isinstance(old, ex.AttentionOp) and isinstance(new, ex.AttentionOp):
        pairs = [float((op.new_tokens * (op.context_tokens + (op.new_tokens + 1) / 2)).sum())
                 for op in (old, new)]  # fmt: skip
        return pairs[1] / pairs[0]
    rows = [ex.tensor_of((*op.results, *op.operands)[0]).shape[0] for op in (old, new)]
    return rows[1] / rows[0]


def _tensor_bytes(op: ex.OperatorOp) -> Iterator[float]:
    """Of each tensor of an op, the bytes that it touches: attention reads its own rows of all."""
    for value in (*op.operands, *op.results):
        tensor = ex.tensor_of(value)
        if isinstance(op, ex.AttentionOp) and value is op.operands[0]:
            yield tensor.num_bytes * int(op.new_tokens.sum()) / tensor.shape[0]
        else:
            yield tensor.num_bytes
