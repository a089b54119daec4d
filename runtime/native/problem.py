"""What a native run is told: cluster, links and requests as columns."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime.cost import NUMBERS, Curve, Fit, StepCost
from sagec.runtime.direct import placement
from sagec.runtime.direct.cluster import Cluster
from sagec.runtime.direct.topology import Path
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim.network import Network
from sagec.runtime.engines.sim.options import Options
from sagec.runtime.kv import block_hashes
from sagec.runtime.native.library import Column, NotCovered, lists
from sagec.runtime.request import Request
from sagec.runtime.state import UNBOUNDED

Columns = dict[str, Column]


def ints(values: Sequence[Any]) -> npt.NDArray[np.int64]:
    """A column of these numbers."""
    return np.array(values, np.int64)


def floats(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """A column of these numbers."""
    return np.array(values, np.float64)


def engine_columns(specs: Sequence[InstanceSpec], options: Sequence[Options]) -> Columns:
    """The simulated instances."""
    return {
        "kv_blocks": ints([spec.kv_blocks for spec in specs]),
        "block_tokens": ints([spec.block_tokens for spec in specs]),
        "caches": ints([one.cache for one in options]),
        "round_us": ints([one.round_us for one in options]),
        "link_bytes_per_s": floats([one.link_bytes_per_s for one in options]),
        "link_latency_us": floats([one.link_latency_us for one in options]),
        **_cost_columns("engine", [one.cost for one in options]),
    }


def planned_columns(cluster: Cluster) -> Columns:
    """The instances and paths that plans are made for."""
    instances = cluster.instances
    pairs = itertools.product(range(len(instances)), repeat=2)
    return {
        "prefills": ints(cluster.prefills),
        "decodes": ints(cluster.decodes),
        "max_batch": ints([one.max_batch for one in instances]),
        "max_step_tokens": ints([one.max_step_tokens for one in instances]),
        "max_partial_prefills": ints([one.max_partial_prefills for one in instances]),
        "kv_bytes_per_token": floats([one.kv_bytes_per_token for one in instances]),
        "hand_overs": ints([a != b and cluster.hands_over(a, b) for a, b in pairs]),
        **_cost_columns("planned", [one.cost for one in instances]),
        **_path_columns(cluster),
    }


def _path_columns(cluster: Cluster) -> Columns:
    """Ways between instances; links have two numbers, 2n and 2n + 1, one a direction."""
    topology, instances = cluster.topology, cluster.instances
    number = {id(link): at for at, link in enumerate(topology.links)}
    found: list[tuple[int, int, Path]] = []
    sites = placement.sites_of(topology, returning=tuple(range(len(instances))))
    for source, hops in zip(sites.prefill_at, sites.hops, strict=True):
        for target, hop in zip(sites.decode_at[:-1], hops, strict=False):
            path = topology.path(instances[source], instances[target])
            if hop is not None and not hop.same and path is not None:
                found.append((source, target, path))
    passed = [
        [
            2 * number[id(link)] + (link.ends[0] == place)
            for link, place in zip(path.links, path.places, strict=False)
        ]
        for _, _, path in found
    ]
    speeds = [link.bytes_per_s for link in topology.links for _ in link.ends]
    return {
        "paths.source": ints([source for source, _, _ in found]),
        "paths.target": ints([target for _, target, _ in found]),
        "paths.latency_us": floats([path.latency_us for _, _, path in found]),
        "paths.bytes_per_s": floats([path.bytes_per_s for _, _, path in found]),
        **lists("paths.links", passed),
        "links.bytes_per_s": floats(speeds),
    }


def network_columns(network: Network, names: Sequence[str]) -> Columns:
    """The links that hand-overs share, and the routes over them."""
    instance = {name: at for at, name in enumerate(names)}
    link = {name: at for at, name in enumerate(network.links)}
    routes = network.routes
    return {
        "network.bytes_per_s": floats([*network.links.values()]),
        "routes.source": ints([instance[source] for source, _ in routes]),
        "routes.target": ints([instance[target] for _, target in routes]),
        "routes.latency_us": floats([route.latency_us for route in routes.values()]),
        **lists("routes.links", [[link[one] for one in r.links] for r in routes.values()]),
    }


def request_columns(requests: Sequence[Request], refused: Mapping[str, str]) -> Columns:
    """Requests in the order of coming; refused: why, by id, those that cannot be served."""
    limits = [UNBOUNDED if r.max_output_tokens is None else r.max_output_tokens for r in requests]
    return {
        "prompt_tokens": ints([len(request.prompt) for request in requests]),
        "max_output_tokens": ints(limits),
        "arrival_us": ints([request.arrival_us for request in requests]),
        "refused": ints([request.id in refused for request in requests]),
        "hashes_given": ints([bool(request.block_hashes) for request in requests]),
    }


class Blocks:
    """Blocks of the prompts of a run, equal ones by the same number, the first of which is 0."""

    def __init__(self, requests: Sequence[Request], block_tokens: int) -> None:
        """block_tokens: of all caches. Raises NotCovered for hashes of more than 64 bits."""
        self._requests, self._block_tokens = requests, block_tokens
        self._are_all_given = all(request.block_hashes for request in requests)
        self._hashes = [_hashes_of(request, block_tokens) for request in requests]
        try:
            self.columns = lists("hashes", self._hashes)
        except OverflowError:
            raise NotCovered("block hashes of more than 64 bits") from None
        found, self.columns["hashes"] = np.unique(self.columns["hashes"], return_inverse=True)
        self.columns["blocks"] = ints([len(found)])
        self._numbers = {block: number for number, block in enumerate(found.tolist())}

    def of(self, request: int, output_tokens: int) -> Sequence[int]:
        """The numbers of a prompt's blocks with so much output behind it, as `Directory` has them.

        Where all senders gave hashes nobody has any other block, and what is behind the first
        one that nobody knows need not be hashed.
        """
        asked, size = self._requests[request], self._block_tokens
        whole = (len(asked.prompt) + output_tokens) // size
        known = () if asked.block_hashes else self._hashes[request]
        if not self._are_all_given:
            hashes = block_hashes(_tokens(asked, whole * size), size, known=known)
            return [self._numbers.setdefault(one, len(self._numbers)) for one in hashes]
        found: list[int] = []
        while len(known) < whole:
            known = block_hashes(_tokens(asked, (len(known) + 1) * size), size, known=known)
            if (number := self._numbers.get(known[-1])) is None:
                break
            found.append(number)
        return found


def _hashes_of(request: Request, block_tokens: int) -> Sequence[int]:
    """Those that the sender gave, or all."""
    return request.block_hashes or block_hashes(request.prompt, block_tokens)


def _tokens(request: Request, count: int) -> Sequence[int]:
    """The first tokens of a prompt and its output, of which a simulator knows none but 0."""
    if count <= len(request.prompt):
        return request.prompt[:count]
    return (*request.prompt, *(0,) * (count - len(request.prompt)))


def no_blocks(requests: Sequence[Request]) -> Columns:
    """What `Blocks.columns` would say if nobody cached."""
    return {**lists("hashes", [()] * len(requests)), "blocks": ints([0])}


def _cost_columns(prefix: str, costs: Sequence[StepCost]) -> Columns:
    columns: Columns = {
        f"{prefix}.{name}": floats([getattr(cost, name) for cost in costs]) for name in NUMBERS
    }
    fits = [[] if cost.fit is None else _fit_row(cost.fit) for cost in costs]
    return columns | lists(f"{prefix}.fit", fits, np.float64)


def _fit_row(fit: Fit) -> list[float]:
    """The fit as `read_fit` in simulation.cc takes it."""
    curves = [*_curve_row(fit.prefill), *_curve_row(fit.decode)]
    return [fit.pair_us, fit.context_us, fit.shared_us, *curves]


def _curve_row(curve: Curve) -> list[float]:
    return [float(len(curve.knots)), curve.begin_us, *curve.knots, *curve.slopes]
