"""The cluster of a module, read once: instances, their models, and the paths between them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Operation

from sagec.dialects import cluster
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import Value, value_of
from sagec.passes.errors import PassError
from sagec.passes.flow import ops_of_block
from sagec.passes.recent import recent
from sagec.runtime.direct import topology as direct
from sagec.runtime.direct.topology import Device as Device
from sagec.runtime.direct.topology import Instance as Instance
from sagec.runtime.direct.topology import Link as Link
from sagec.runtime.direct.topology import Model as Model
from sagec.runtime.direct.topology import Path as Path
from sagec.runtime.profile import ProfileError


@dataclass(frozen=True, eq=False)
class Topology(direct.Topology):
    """The instances of a module and what connects them."""

    def instance(self, name: str, op: Operation) -> Instance:
        """The instance `@name`; raises PassError, at `op`, where there is none."""
        if (found := self.by_name.get(name)) is None:
            there = ", ".join(map(symbol, self.by_name)) or "none"
            raise PassError(f"no instance {symbol(name)}; there are: {there}", op)
        return found


_KINDS = {cluster.ModelOp, cluster.DeviceOp, cluster.SwitchOp, cluster.LinkOp, cluster.InstanceOp}


def topology_of(module: ModuleOp) -> Topology:
    """The cluster that the module declares; read again only when its cluster ops change.

    Raises PassError for a name that nothing has.
    """
    ops = [op for op in ops_of_block(module.body.block) if type(op) in _KINDS]
    key = (*ops, *itertools.chain.from_iterable([op.properties.values() for op in ops]))
    return recent(module, "_topology", key, lambda: _topology(ops))


def _topology(ops: list[Operation]) -> Topology:
    named = {op.symbol: op for op in ops if isinstance(op, cluster.ModelOp | cluster.DeviceOp)}
    models = {
        name: Model(name=name, **_scalars(op, named))  # type: ignore[arg-type]
        for name, op in named.items()
        if isinstance(op, cluster.ModelOp)
    }
    devices = {
        name: _device(op, named) for name, op in named.items() if isinstance(op, cluster.DeviceOp)
    }
    instances = [op for op in ops if isinstance(op, cluster.InstanceOp)]
    places = set(devices) | {_name(op) for op in ops if isinstance(op, cluster.SwitchOp)}
    return Topology(
        models,
        devices,
        tuple(_instance(i, op, models, devices) for i, op in enumerate(instances)),
        tuple(_link(op, places) for op in ops if isinstance(op, cluster.LinkOp)),
    )


def _device(op: cluster.DeviceOp, named: dict[str, cluster.ModelOp | cluster.DeviceOp]) -> Device:
    """A device. Raises PassError for an unknown kind whose figures are not said either."""
    values = _scalars(op, named)
    said = [name for name in cluster.DEVICE_FIGURES if name in op.properties]
    is_known = values["kind"] in cluster.DEVICE_KINDS or "like" in op.properties
    if not is_known and len(said) < len(cluster.DEVICE_FIGURES):
        raise PassError(
            f"cluster.device {symbol(op.symbol)}: no device kind {values['kind']!r}; there are: "
            f"{', '.join(cluster.DEVICE_KINDS)}; or say {', '.join(cluster.DEVICE_FIGURES)}",
            op,
        )
    says_kind = any("kind" in link.properties for link in _chain(op, named))
    return Device(name=op.symbol, says_kind=says_kind, **values)  # type: ignore[arg-type]


def _name(op: cluster.SwitchOp) -> str:
    return str(value_of(op.properties["sym_name"]))


def _scalars(
    op: cluster.ModelOp | cluster.DeviceOp, named: dict[str, cluster.ModelOp | cluster.DeviceOp]
) -> dict[str, Value]:
    """All scalars of the op: its own, else its kind's, else those of what it is like, else the
    defaults."""
    values = {scalar.name: scalar.default for scalar in op.SCALARS}
    for link in reversed(_chain(op, named)):
        said = {name: value_of(attr) for name, attr in link.properties.items() if name in values}
        if isinstance(link, cluster.DeviceOp):
            values |= cluster.DEVICE_KINDS.get(str(said.get("kind")), {})
        values |= {name: value for name, value in said.items() if value is not None}
    return values


def _chain(
    op: cluster.ModelOp | cluster.DeviceOp, named: dict[str, cluster.ModelOp | cluster.DeviceOp]
) -> list[cluster.ModelOp | cluster.DeviceOp]:
    """The op, what it is like, and so on. Raises PassError where that is none of its kind."""
    chain = [op]
    while isinstance(like := chain[-1].properties.get("like"), SymbolRefAttr):
        name = like.root_reference.data
        other = named.get(name)
        if type(other) is not type(op) or other in chain:
            raise PassError(
                f"{op.name} {symbol(op.symbol)} is like {symbol(name)}, which is none", op
            )
        chain.append(other)
    return chain


def _instance(
    index: int, op: cluster.InstanceOp, models: dict[str, Model], devices: dict[str, Device]
) -> Instance:
    model, name = op.model.root_reference.data, symbol(op.symbol)
    if model not in models:
        raise PassError(f"instance {name}: no model {symbol(model)} in the module", op)
    for device in op.device_names:
        if device not in devices:
            raise PassError(f"instance {name}: no device {symbol(device)} in the module", op)
    made = Instance(
        index=index,
        name=op.symbol,
        engine=op.engine.data,
        role=op.role.data,
        model=models[model],
        devices=tuple(devices[device] for device in op.device_names),
        op=op,
        **{scalar.name: op.scalar(scalar.name) for scalar in op.SCALARS},  # type: ignore[arg-type]
    )
    _check_profile(made, op)
    return made


def _check_profile(instance: Instance, op: cluster.InstanceOp) -> None:
    """Raise PassError, at the op, where its devices have a profile that is not of this instance."""
    if any(device.profile for device in instance.devices):
        try:
            instance.cost  # noqa: B018
        except ProfileError as error:
            raise PassError(f"instance {symbol(instance.name)}: {error}", op) from None


def _link(op: cluster.LinkOp, places: set[str]) -> Link:
    ends = (op.source.root_reference.data, op.target.root_reference.data)
    for end in ends:
        if end not in places:
            raise PassError(f"link: no device or switch {symbol(end)} in the module", op)
    bytes_per_s, latency_us = op.scalar("bytes_per_s"), op.scalar("latency_us")
    assert isinstance(bytes_per_s, float) and isinstance(latency_us, float)
    return Link(ends, bytes_per_s, latency_us)
