"""What parts of operators take: an operator's own estimate, scaled as the roofline says."""

from __future__ import annotations

from xdsl.ir import Attribute

from sagec.dialects import exec as ex
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import attr_of
from sagec.passes.errors import PassError
from sagec.passes.messages import Rings, link_between, message_bytes, message_us
from sagec.passes.topology import Topology
from sagec.runtime import roofline


class OperatorTimes:
    """Times by the devices and links that a module declares.

    An estimate may come from measurements; so what is asked of the roofline is how much shorter a
    part is, not how long.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.rings = Rings(topology)
        self._devices: dict[str, roofline.Device] = {}

    def operator_us(self, op: ex.OperatorOp, flops: float, num_bytes: float) -> float:
        """An operator of such costs on the device of `op`. Raises PassError for one that the module
        does not declare."""
        if op.device not in self._devices:
            if (device := self.topology.devices.get(op.device)) is None:
                raise PassError(f"no cluster.device {symbol(op.device)} in the module", op)
            speeds = device.flops_per_s, device.bytes_per_s
            self._devices[op.device] = roofline.Device(*speeds)
        return round(self._devices[op.device].operator_us(flops, num_bytes), 3)

    def of_part(self, whole: ex.OperatorOp, part: ex.OperatorOp) -> dict[str, Attribute]:
        """time_us, flops and bytes of an op on some of the rows of another, as properties.

        What an op moves beside its tensors are weights, and each part reads all of them.
        """
        flops, moved = float(whole.scalar("flops")), float(whole.scalar("bytes"))
        tensors = _tensor_bytes(whole)
        share = _tensor_bytes(part) / tensors if tensors else 1.0
        part_flops = flops * _flops_share(whole, part)
        weights = max(0.0, moved - tensors) if not isinstance(whole, ex.KVStoreOp) else 0.0
        part_moved = weights + (moved - weights) * share
        costs = {
            "time_us": whole.estimated_us * self._time_share(whole, part, part_flops, part_moved),
            "flops": part_flops,
            "bytes": part_moved,
        }
        return {
            name: attr_of(round(cost, 3))
            for name, cost in costs.items()
            if name in whole.properties
        }

    def _time_share(
        self, whole: ex.OperatorOp, part: ex.OperatorOp, flops: float, num_bytes: float
    ) -> float:
        """The time of a part, of costs that are given, as a share of the whole op's."""
        if isinstance(whole, ex.CollectiveOp) and isinstance(part, ex.CollectiveOp):
            ring = self.rings.of(whole)
            us, of_us = (message_us(op, ring, message_bytes(op)) for op in (part, whole))
        elif isinstance(whole, ex.SendOp):
            link = link_between(self.topology, whole.device, whole.other, whole)
            us, of_us = (link.send_us(_tensor_bytes(op)) for op in (part, whole))
        else:
            us = self.operator_us(whole, flops, num_bytes)
            of_us = self.operator_us(
                whole, float(whole.scalar("flops")), float(whole.scalar("bytes"))
            )
        return us / of_us if of_us else 1.0


def _tensor_bytes(op: ex.OperatorOp) -> int:
    return sum(ex.tensor_of(value).num_bytes for value in (*op.operands, *op.results))


def _flops_share(whole: ex.OperatorOp, part: ex.OperatorOp) -> float:
    """Arithmetic goes by rows; of attention, by pairs of tokens that attend to each other."""
    if isinstance(whole, ex.AttentionOp) and isinstance(part, ex.AttentionOp):
        return _pairs(part) / _pairs(whole)
    values = [(op.results or op.operands)[0] for op in (whole, part)]
    rows, part_rows = (ex.tensor_of(value).shape[0] for value in values)
    return part_rows / rows if rows else 1.0


def _pairs(op: ex.AttentionOp) -> int:
    new = op.new_tokens
    return int((new * op.context_tokens + new * (new + 1) // 2).sum())
