"""The cluster that plans are for: instances, their models, and the paths between them."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime import profile
from sagec.runtime.cost import Fit, StepCost
from sagec.runtime.profile import ProfileError, Shape

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
    def expert_bytes(self) -> float:
        """Of all weights those of experts, in all layers; 0 where the model is dense."""
        _, ffn = self._layer_parameters
        return self.layers * ffn * self.experts * _DTYPE_BYTES[self.dtype]

    @functools.cached_property
    def flops_per_token(self) -> float:
        """Operations of the layers' weights for one token: two a parameter that it passes."""
        attention, ffn = self._layer_parameters
        active = self.experts_per_token if self.experts else 1
        return 2.0 * (self.layers * (attention + ffn * active))

    @functools.cached_property
    def head_flops_per_token(self) -> float:
        """Operations of the last projection for one token that samples."""
        return 2.0 * self.vocab * self.hidden

    @functools.cached_property
    def flops_per_pair(self) -> float:
        """Operations of a token's attention to one other, in all layers."""
        return 4.0 * self.layers * self.heads * self.head_dim

    def cost(
        self,
        flops_per_s: float,
        bytes_per_s: float,
        kv_dtype: str = "auto",
        fit: Fit | None = None,
    ) -> StepCost:
        """The time of its steps on devices that do so much together."""
        return StepCost(
            flops_per_token=self.flops_per_token,
            flops_per_pair=self.flops_per_pair,
            weight_bytes=self.weight_bytes - self.expert_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token(kv_dtype),
            flops_per_s=flops_per_s,
            bytes_per_s=bytes_per_s,
            head_flops_per_token=self.head_flops_per_token,
            expert_bytes=self.expert_bytes,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            fit=fit,
        )

    def shape_in(self, dtype: str) -> Shape:
        """What a profile must have been measured of; auto: in the model's own type."""
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(Shape)}
        return Shape(**shape | ({} if dtype == "auto" else {"dtype": dtype}))

    def kv_bytes_per_token(self, kv_dtype: str = "auto") -> float:
        """Bytes of keys and values of one token in all layers."""
        size = _DTYPE_BYTES[self.dtype if kv_dtype == "auto" else kv_dtype]
        return 2.0 * self.layers * self.kv_heads * self.head_dim * size


@dataclass(frozen=True)
class Device:
    """A device; see `cluster.device`. says_kind: whether its kind is said, and not the default."""

    name: str
    kind: str
    memory_bytes: int
    flops_per_s: float
    bytes_per_s: float
    profile: str = ""
    says_kind: bool = True


@dataclass(frozen=True, eq=False)
class Instance:
    """An instance; see `cluster.instance`. index: its place among the instances.

    op: where the compiler read it, None where nobody did.
    """

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
    op: Any = None

    def runs(self, phase: str) -> bool:
        """Whether its role covers `prefill` or `decode`."""
        return self.role in (phase, "both")

    @functools.cached_property
    def kv_bytes_per_token(self) -> float:
        return self.model.kv_bytes_per_token(self.kv_dtype)

    @functools.cached_property
    def cost(self) -> StepCost:
        """The time of its steps in closed form, fitted where its devices have a profile.

        Raises ProfileError for one that cannot be read, or is of something else.
        """
        flops_per_s = sum(device.flops_per_s for device in self.devices)
        bytes_per_s = sum(device.bytes_per_s for device in self.devices)
        return self.model.cost(flops_per_s, bytes_per_s, self.kv_dtype, self._fit())

    @functools.cached_property
    def round_us(self) -> float:
        """What planning takes between two of its steps, as the profile says; 0 without one.

        Raises ProfileError as `cost` does.
        """
        path = self._profile_path()
        return profile.read(path).round_us if path else 0.0

    def _fit(self) -> Fit | None:
        if not (path := self._profile_path()):
            return None
        shape = self.model.shape_in(self.dtype)
        kinds = [device.kind for device in self.devices if device.says_kind]
        return profile.read(path).fit_for(shape, self.tp, self.pp, path, kinds)

    def _profile_path(self) -> str:
        """Of its devices; "" where they have none."""
        paths = dict.fromkeys(device.profile for device in self.devices)
        if len(paths) > 1:
            named = ", ".join(repr(path) for path in paths)
            raise ProfileError(f"profiles {named} of its devices; all need the same one")
        return next(iter(paths), "")


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
    """The instances of a cluster and what connects them."""

    models: dict[str, Model]
    devices: dict[str, Device]
    instances: tuple[Instance, ...]
    links: tuple[Link, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instance]:
        return {instance.name: instance for instance in self.instances}

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
        if source.index not in self._ways:
            block_bytes = source.kv_bytes_per_token * source.block_tokens
            places = [device.name for device in source.devices]
            self._ways[source.index] = self._ways_of(places, block_bytes)
        return self._ways[source.index]

    def device_path(self, source: str, target: str) -> Path | None:
        """The path of least time for a megabyte from one device to another, or None."""
        if source == target or target not in (ways := self._ways_of([source], 1e6)):
            return None
        _, places, links = ways[target]
        slowest = min(link.bytes_per_s for link in links)
        return Path(places, links, slowest, sum(link.latency_us for link in links))

    def _ways_of(self, sources: list[str], num_bytes: float) -> dict[str, _Way]:
        """The way of least time for so many bytes to every place that links reach."""
        order = itertools.count()  # decides between ways of the same time
        queue: list[tuple[float, int, tuple[str, ...], tuple[Link, ...]]] = [
            (0.0, next(order), (source,), ()) for source in sources
        ]
        done: dict[str, _Way] = {}
        while queue:
            us, _, places, links = heapq.heappop(queue)
            if places[-1] in done:
                continue
            done[places[-1]] = (us, places, links)
            for link, place in self._neighbours.get(places[-1], ()):
                if place not in done:
                    cost = us + link.latency_us + 1e6 * num_bytes / link.bytes_per_s
                    heapq.heappush(queue, (cost, next(order), (*places, place), (*links, link)))
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
