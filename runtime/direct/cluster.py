"""What the direct planner knows of a cluster: its instances, and what their engines take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sagec.runtime.direct.columns import Ints
from sagec.runtime.direct.topology import Instance, Model, Topology
from sagec.runtime.plan import Acceleration


@dataclass(frozen=True)
class Abilities:
    """What an engine takes of what plans can say; see `lowering.targets.Ability`.

    partial_prefills: prompts that a step may leave unfinished, 0: any. keeps_prefixes: prompts may
    begin with KV that was computed before. holds_empty_steps: a step may compute nothing.
    """

    partial_prefills: int = 0
    chunks_prompts: bool = True
    hands_over: bool = True
    swaps: bool = False
    keeps_prefixes: bool = False
    adapters: bool = False
    holds_empty_steps: bool = True


@dataclass(frozen=True, eq=False)
class Cluster:
    """Instances with paths between them, and abilities of their engines, by instance.

    An instance without abilities is none that plans can be made for: its engine is not known, or
    could not run what the instance is said to be.
    """

    topology: Topology
    abilities: Mapping[str, Abilities]

    def without(self, dead: frozenset[str]) -> Cluster:
        """The cluster of the instances that live."""
        living = [one for one in self.topology.instances if one.name not in dead]
        numbered = tuple(dataclasses.replace(one, index=at) for at, one in enumerate(living))
        topology = self.topology
        return Cluster(
            Topology(topology.models, topology.devices, numbered, topology.links), self.abilities
        )

    @property
    def instances(self) -> tuple[Instance, ...]:
        return self.topology.instances

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the instances, in their order."""
        return tuple(one.name for one in self.instances)

    @functools.cached_property
    def running_models(self) -> dict[str, Model]:
        """Models that instances run, by name."""
        return {one.model.name: one.model for one in self.instances}

    @functools.cached_property
    def prefills(self) -> tuple[bool, ...]:
        """Which instances compute prompts."""
        return tuple(one.runs("prefill") for one in self.instances)

    @functools.cached_property
    def decodes(self) -> tuple[bool, ...]:
        """Which instances decode."""
        return tuple(one.runs("decode") for one in self.instances)

    @functools.cached_property
    def capacity_tokens(self) -> Ints:
        """Tokens of KV that each instance holds."""
        return np.array([one.kv_blocks * one.block_tokens for one in self.instances], np.int64)

    @functools.cached_property
    def has_both(self) -> bool:
        """Whether an instance does both phases."""
        return any(one.role == "both" for one in self.instances)

    @functools.cached_property
    def only_model(self) -> bool:
        """Whether there is one model, which whoever names none means."""
        return len(self.topology.models) == len(self.running_models) == 1

    @functools.cached_property
    def only_pair(self) -> tuple[int, int] | None:
        """The instances that prefill and decode, by number, where rows have no choice."""
        if not self.only_model or sum(self.prefills) != 1 or sum(self.decodes) != 1:
            return None
        return self.prefills.index(True), self.decodes.index(True)

    @functools.cached_property
    def acceleration(self) -> tuple[Acceleration, ...]:
        """What each instance may do to be faster."""
        return tuple(
            Acceleration(
                kv_dtype=one.kv_dtype, quantization=one.quantization, draft_tokens=one.draft_tokens
            )
            for one in self.instances
        )

    @functools.cached_property
    def _hand_overs(self) -> dict[tuple[int, int], bool]:
        return {}

    def hands_over(self, source: int, target: int) -> bool:
        """Whether KV surely can go from one instance to another, by number; as for `legalize`."""
        if (found := self._hand_overs.get((source, target))) is None:
            found = self._hands_over(self.instances[source], self.instances[target])
            self._hand_overs[source, target] = found
        return found

    def _hands_over(self, source: Instance, target: Instance) -> bool:
        both = (self.abilities.get(source.name), self.abilities.get(target.name))
        alike = ("engine", "model", "tp", "block_tokens", "kv_layout", "draft_layers", "kv_dtype")
        return (
            all(ability is not None and ability.hands_over for ability in both)
            and all(getattr(source, what) == getattr(target, what) for what in alike)
            and self.topology.path(source, target) is not None
        )
