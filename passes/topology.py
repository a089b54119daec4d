"""The cluster of a module, read once: instances, their models, and the paths between them."""

from __future__ import annotations

import functools
import heapq
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xdsl.dialects.builtin import ModuleOp, SymbolRefAttr
from xdsl.ir import Operation

from sagec.dialects import cluster
from sagec.dialects.rows import symbol
from sagec.dialects.scalars import Value, value_of
from sagec.passes.errors import PassError
from sagec.passes.flow import ops_of_block
from sagec.passes.recent import recent
from sagec.runtime.cost import StepCost

_DTYPE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Model:
    """A model's shape; see `cluster.model`."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: str
    max_context: int
    experts: int
    experts_per_token: int
    tied: int
    path: str

    @functools.cached_property
    def _layer_parameters(self) -> tuple[int, int]:
        """Parameters of a layer: attention, and one feed-forward block."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention, 3 * self.hidden * self.ffn

    @functools.cached_property
    def weight_bytes(self) -> float:
        """Bytes of all weights, in the model's own type."""
        attention, ffn = self._layer_parameters
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        parameters = self.layers * (attention + ffn * max(self.experts, 1)) + embeddings
        return parameters * _DTYPE_BYTES[self.dtype]

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Operations of the weights for one token: two a parameter that it passes."""
        attention, ffn = self._layer_parameters
        active = self.experts_per_token if self.experts else 1
        return 2.0 * (self.layers * (attention + ffn * active) + self.vocab * self.hidden)

    def kv_bytes_per_token(self, kv_dtype: str = "auto") -> float:
        """Bytes of keys and values of one token in all layers."""
        size = _DTYPE_BYTES[self.dtype if kv_dtype == "auto" else kv_dtype]
        return 2.0 * self.layers * self.kv_heads * self.head_dim * size


@dataclass(frozen=True)
class Device:
    """A device; see `cluster.device`."""

    name: str
    kind: str
    memory_bytes: int
    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, eq=False)
class Instance:
    """An instance; see `cluster.instance`. index: its place among the module's instances."""

    index: int
    name: str
    engine: str
    role: str
    model: Model
    devices: tuple[Device, ...]
    tp: int
    pp: int
    kv_blocks: int
    block_tokens: int
    kv_dtype: str
    kv_layout: str
    max_step_tokens: int
    max_batch: int
    max_partial_prefills: int
    quantization: str
    draft_layers: int
    draft_tokens: int
    dtype: str
    pool: str
    switch_us: int
    options: str
    op: Operation

    def runs(self, phase: str) -> bool:
        """Whether its role covers `prefill` or `decode`."""
        return self.role in (phase, "both")

    @functools.cached_property
    def kv_bytes_per_token(self) -> float:
        return self.model.kv_bytes_per_token(self.kv_dtype)

    @functools.cached_property
    def cost(self) -> StepCost:
        """The time of its steps in closed form."""
        return StepCost(
            flops_per_token=self.model.flops_per_token,
            flops_per_pair=4.0 * self.model.layers * self.model.heads * self.model.head_dim,
            weight_bytes=self.model.weight_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            flops_per_s=sum(device.flops_per_s for device in self.devices),
            bytes_per_s=sum(device.bytes_per_s for device in self.devices),
        )


@dataclass(frozen=True, eq=False)
class Link:
    """A connection between two places, usable in both directions."""

    ends: tuple[str, str]
    bytes_per_s: float
    latency_us: float


@dataclass(frozen=True, eq=False)
class Path:
    """The way of KV between two instances: its places, and the links it passes."""

    places: tuple[str, ...]
    links: tuple[Link, ...]
    bytes_per_s: float
    latency_us: float

    def transfer_us(self, num_bytes: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Time for `num_bytes` where nothing else is on the way."""
        return self.latency_us + 1e6 * np.asarray(num_bytes) / self.bytes_per_s


@dataclass(frozen=True, eq=False)
class Topology:
    """The instances of a module and what connects them."""

    models: dict[str, Model]
    devices: dict[str, Device]
    instances: tuple[Instance, ...]
    links: tuple[Link, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instance]:
        return {instance.name: instance for instance in self.instances}

    def instance(self, name: str, op: Operation) -> Instance:
        """The instance `@name`; raises PassError, at `op`, where there is none."""
        if (found := self.by_name.get(name)) is None:
            there = ", ".join(map(symbol, self.by_name)) or "none"
            raise PassError(f"no instance {symbol(name)}; there are: {there}", op)
        return found

    @functools.cached_property
    def _paths(self) -> dict[tuple[int, int], Path | None]:
        return {}

    def path(self, source: Instance, target: Instance) -> Path | None:
        """The path of least time for a block of KV, or None; within a device, its memory."""
        key = (source.index, target.index)
        if key not in self._paths:
            self._paths[key] = self._find_path(source, target)
        return self._paths[key]

    def _find_path(self, source: Instance, target: Instance) -> Path | None:
        targets = {device.name for device in target.devices}
        if shared := [device for device in source.devices if device.name in targets]:
            return Path((shared[0].name,), (), shared[0].bytes_per_s / 2, 0.0)
        ways = self._ways_from(source)
        found = [ways[device.name] for device in target.devices if device.name in ways]
        if not found:
            return None
        _, places, links = min(found, key=lambda way: way[0])
        slowest = min(link.bytes_per_s for link in links)
        return Path(places, links, slowest, sum(link.latency_us for link in links))

    @functools.cached_property
    def _ways(self) -> dict[int, dict[str, _Way]]:
        return {}

    def _ways_from(self, source: Instance) -> dict[str, _Way]:
        """The way of least time for a block of KV to every place that links reach."""
        if source.index in self._ways:
            return self._ways[source.index]
        block_bytes = source.kv_bytes_per_token * source.block_tokens
        order = itertools.count()  # decides between ways of the same time
        queue: list[tuple[float, int, tuple[str, ...], tuple[Link, ...]]] = [
            (0.0, next(order), (device.name,), ()) for device in source.devices
        ]
        done: dict[str, _Way] = {}
        while queue:
            us, _, places, links = heapq.heappop(queue)
            if places[-1] in done:
                continue
            done[places[-1]] = (us, places, links)
            for link, place in self._neighbours.get(places[-1], ()):
                if place not in done:
                    cost = us + link.latency_us + 1e6 * block_bytes / link.bytes_per_s
                    heapq.heappush(queue, (cost, next(order), (*places, place), (*links, link)))
        self._ways[source.index] = done
        return done

    @functools.cached_property
    def _neighbours(self) -> dict[str, list[tuple[Link, str]]]:
        """Of each place, its links and where they lead."""
        found: dict[str, list[tuple[Link, str]]] = {}
        for link in self.links:
            for here, there in (link.ends, link.ends[::-1]):
                found.setdefault(here, []).append((link, there))
        return found


_Way = tuple[float, tuple[str, ...], tuple[Link, ...]]
"""Microseconds, places and links of a way."""

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
        name: Device(name=name, **_scalars(op, named))  # type: ignore[arg-type]
        for name, op in named.items()
        if isinstance(op, cluster.DeviceOp)
    }
    instances = [op for op in ops if isinstance(op, cluster.InstanceOp)]
    places = set(devices) | {_name(op) for op in ops if isinstance(op, cluster.SwitchOp)}
    return Topology(
        models,
        devices,
        tuple(_instance(i, op, models, devices) for i, op in enumerate(instances)),
        tuple(_link(op, places) for op in ops if isinstance(op, cluster.LinkOp)),
    )


def _name(op: cluster.SwitchOp) -> str:
    return str(value_of(op.properties["sym_name"]))


def _scalars(
    op: cluster.ModelOp | cluster.DeviceOp, named: dict[str, cluster.ModelOp | cluster.DeviceOp]
) -> dict[str, Value]:
    """All scalars of the op: its own, else those of what it is like, else the defaults."""
    chain = [op]
    while isinstance(like := chain[-1].properties.get("like"), SymbolRefAttr):
        name = like.root_reference.data
        other = named.get(name)
        if type(other) is not type(op) or other in chain:
            raise PassError(
                f"{op.name} {symbol(op.symbol)} is like {symbol(name)}, which is none", op
            )
        chain.append(other)
    values = {scalar.name: scalar.default for scalar in op.SCALARS}
    for link in reversed(chain):
        said = {name: value_of(attr) for name, attr in link.properties.items() if name in values}
        values |= {name: value for name, value in said.items() if value is not None}
    return values


def _instance(
    index: int, op: cluster.InstanceOp, models: dict[str, Model], devices: dict[str, Device]
) -> Instance:
    model, name = op.model.root_reference.data, symbol(op.symbol)
    if model not in models:
        raise PassError(f"instance {name}: no model {symbol(model)} in the module", op)
    for device in op.device_names:
        if device not in devices:
            raise PassError(f"instance {name}: no device {symbol(device)} in the module", op)
    return Instance(
        index=index,
        name=op.symbol,
        engine=op.engine.data,
        role=op.role.data,
        model=models[model],
        devices=tuple(devices[device] for device in op.device_names),
        op=op,
        **{scalar.name: op.scalar(scalar.name) for scalar in op.SCALARS},  # type: ignore[arg-type]
    )


def _link(op: cluster.LinkOp, places: set[str]) -> Link:
    ends = (op.source.root_reference.data, op.target.root_reference.data)
    for end in ends:
        if end not in places:
            raise PassError(f"link: no device or switch {symbol(end)} in the module", op)
    bytes_per_s, latency_us = op.scalar("bytes_per_s"), op.scalar("latency_us")
    assert isinstance(bytes_per_s, float) and isinstance(latency_us, float)
    return Link(ends, bytes_per_s, latency_us)
