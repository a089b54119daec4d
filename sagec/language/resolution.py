"""What the names of a program mean; everything wrong with one cluster is reported together."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from sagec.diagnostics import there_are
from sagec.language import syntax
from sagec.language.devices import Device, Link, resolve_devices, resolve_links
from sagec.language.errors import Errors
from sagec.language.instances import Instance, Placement
from sagec.language.known import strategies
from sagec.language.models import Model, resolve_model
from sagec.language.sizes import Sizes
from sagec.language.syntax import Program, Word

GRAPH = "serve"
"""The symbol of the graph that a program lowers to."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A program whose names mean something. switches: where the statement of each begins."""

    program: Program
    models: dict[str, Model]
    cluster: syntax.Cluster
    devices: dict[str, Device]
    switches: dict[str, int]
    links: tuple[Link, ...]
    instances: dict[str, Instance]


@functools.lru_cache(maxsize=4)
def resolve(program: Program) -> Scene:
    """The models, devices and instances of the cluster to serve on. Raises Diagnostic."""
    errors = Errors(program.source)
    cluster = _the_cluster(program)
    _check_strategy(program, errors)
    _check_unique(program, cluster, errors)
    found = [resolve_model(model, errors) for model in program.models]
    models = {model.at.text: model for model in found if model is not None}
    placed = [device for d in cluster.devices for device in resolve_devices(d, errors)]
    devices = {device.at.text: device for device in placed}
    switches = {word.text: switch.begin for switch in cluster.switches for word in switch.names}
    links = [
        link for statement in cluster.links for link in resolve_links(statement, cluster, errors)
    ]
    errors.stop_if_any()
    placement = Placement(models, devices, errors)
    instances = [i for statement in cluster.instances for i in placement.instances(statement)]
    errors.stop_if_any()
    sizes = Sizes(errors, models, devices, instances)
    for instance in instances:
        instance.scalars["kv_blocks"] = sizes.kv_blocks(instance)
    errors.stop_if_any()
    by_name = {instance.at.text: instance for instance in instances}
    return Scene(program, models, cluster, devices, switches, tuple(links), by_name)


def _the_cluster(program: Program) -> syntax.Cluster:
    """The cluster that `serve` names, or the only one."""
    named = program.serve.settings.get("on") if program.serve else None
    by_name = {cluster.name.text: cluster for cluster in program.clusters}
    if named is not None:
        if (found := by_name.get(str(named.value))) is None:
            raise program.error(
                named, f"no cluster '{named.value}'", there_are(str(named.value), by_name)
            )
        return found
    if len(program.clusters) == 1:
        return program.clusters[0]
    begin, end = (program.serve.begin, program.serve.end) if program.serve else (0, 0)
    if not program.clusters:
        hint = "as in: cluster here { device cpu kind cpu ... }"
        raise program.source.error(begin, end, "there is no cluster", hint)
    hint = f"serve on {' or serve on '.join(sorted(by_name))}"
    message = f"there are {len(program.clusters)} clusters and none is named"
    raise program.source.error(begin, end, message, hint)


def _check_strategy(program: Program, errors: Errors) -> None:
    serve = program.serve
    named = serve.settings.get("with") if serve else None
    there = [*strategies(), *(statement.name.text for statement in program.strategies)]
    if named is not None and named.value not in there:
        errors.at(named, f"no strategy '{named.value}'", there_are(str(named.value), there))


def _check_unique(program: Program, cluster: syntax.Cluster, errors: Errors) -> None:
    """Models, devices, switches and instances share one space of names: the IR's symbols."""
    clusters: set[str] = set()
    for other in program.clusters:
        if other.name.text in clusters:
            errors.at(other.name, f"a second cluster '{other.name.text}'", "rename one")
        clusters.add(other.name.text)
    seen = {GRAPH: "the graph"}
    for kind, name in _named(program, cluster):
        if (before := seen.get(name.text)) is not None:
            message = f"the name '{name.text}' is taken by {before}"
            errors.at(name, message, "models, devices, switches, instances: a name each")
        seen.setdefault(name.text, kind)


def _named(program: Program, cluster: syntax.Cluster) -> Iterator[tuple[str, Word]]:
    """Everything that becomes a symbol, and what it is."""
    yield from (("a model", model.name) for model in program.models)
    yield from (("a device", name) for device in cluster.devices for name in device.names)
    yield from (("a switch", name) for switch in cluster.switches for name in switch.names)
    yield from (("an instance", name) for i in cluster.instances for name in i.names)
