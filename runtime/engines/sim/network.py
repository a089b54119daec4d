"""Links that the simulated instances of one run share: who moves KV at once gets a part each.

Bandwidth is shared max-min fairly: no transfer can be faster without one that is as slow, or
slower, losing by it. Shares are worked out again whenever a transfer begins or ends, and times are
exact, whoever asks and how often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from sagec.runtime.direct.topology import Path, Topology

Key = tuple[str, str, int]
"""What names a transfer: who sends it, the request, and when it began."""


class NetworkError(ValueError):
    """A network that cannot be; says which link or route, and what is wrong."""


@dataclass(frozen=True)
class Route:
    """The way from one instance to another: the links that it passes, each in one direction.

    links: their names. latency_us: of all of them, between the last byte's departure and arrival.
    """

    links: tuple[str, ...]
    latency_us: float = 0.0


@dataclass(eq=False)
class _Flow:
    """Bytes on their way. limit: bytes a second beyond which it does not go, whoever else does."""

    source: str
    target: str
    links: tuple[str, ...]
    latency_us: float
    left_bytes: float
    limit_bytes_per_s: float
    begin_us: int
    bytes_per_s: float = 0.0

    def end_us(self, now_us: float) -> float:
        """When the last byte leaves if nobody comes or goes."""
        return now_us + 1e6 * self.left_bytes / self.bytes_per_s


@dataclass
class Network:
    """The links of a run by name, with their bytes a second, and the routes over them.

    A pair of instances without a route has a line of its own, as fast as the source's options say.
    changes: grows whenever a transfer begins, ends or is lost, for an arrival may be another then.
    """

    links: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[tuple[str, str], Route] = field(default_factory=dict)
    changes: int = 0
    _flows: dict[Key, _Flow] = field(default_factory=dict)
    _arrivals_us: dict[Key, int] = field(default_factory=dict)
    _lost: dict[Key, str] = field(default_factory=dict)
    _now_us: float = 0.0
    _concerned: dict[str, None] = field(default_factory=dict)
    _busy_us: dict[str, float] = field(default_factory=dict)
    _moved_bytes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises NetworkError for a link that carries nothing, or that no one described."""
        for name, bytes_per_s in self.links.items():
            if not 0 < bytes_per_s < float("inf"):
                raise NetworkError(f"link {name!r}: {bytes_per_s} bytes a second; more than 0")
        for (source, target), route in self.routes.items():
            for name in route.links:
                if name not in self.links:
                    there = ", ".join(self.links) or "none"
                    way = f"route from {source!r} to {target!r}"
                    raise NetworkError(f"{way}: no link {name!r}; there are: {there}")

    @classmethod
    def of(cls, topology: Topology) -> Self:
        """The links of a cluster, each of them two, one a direction, and the ways over them."""
        numbers = {id(link): number for number, link in enumerate(topology.links)}
        links: dict[str, float] = {}
        routes: dict[tuple[str, str], Route] = {}
        for source in topology.instances:
            for target in topology.instances:
                hands_over = source.runs("prefill") and target.runs("decode")
                if source is target or source.model is not target.model or not hands_over:
                    continue
                if (path := topology.path(source, target)) is not None:
                    named = _named_links(path, numbers)
                    links |= named
                    routes[source.name, target.name] = Route(tuple(named), path.latency_us)
        return cls(links, routes)

    def begin(
        self, key: Key, target: str, num_bytes: float, bytes_per_s: float, latency_us: float
    ) -> None:
        """A transfer begins; the last two are of a line of its own, where there is no route."""
        source, _, begin_us = key
        self.settle(begin_us)
        route = self.routes.get((source, target))
        limit = bytes_per_s if route is None or not route.links else float("inf")
        links = () if route is None else route.links
        latency_us = latency_us if route is None else route.latency_us
        if not num_bytes:
            self._arrivals_us[key] = begin_us + round(latency_us)
            return
        self._flows[key] = _Flow(source, target, links, latency_us, num_bytes, limit, begin_us)
        self._share()

    def settle(self, now_us: int) -> None:
        """Let time pass until now; a moment that has passed changes nothing."""
        while self._flows and self._now_us < now_us:
            ends_us = {key: flow.end_us(self._now_us) for key, flow in self._flows.items()}
            first = min(ends_us.values())
            if first > now_us:
                break
            self._pass(first)
            for key, end_us in ends_us.items():
                if end_us == first:
                    flow = self._flows.pop(key)
                    took_us = first - flow.begin_us + flow.latency_us
                    self._arrivals_us[key] = flow.begin_us + round(took_us)
            self._share()
        self._pass(now_us)

    def arrival_us(self, key: Key) -> int | None:
        """When a transfer is there, as things stand; None: it was lost, or never was."""
        if (flow := self._flows.get(key)) is None:
            return self._arrivals_us.get(key)
        return flow.begin_us + round(flow.end_us(self._now_us) - flow.begin_us + flow.latency_us)

    def next_us(self) -> int | None:
        """When the next transfer ends, so that others go faster; None: there is none."""
        if not self._flows:
            return None
        return -int(-min(flow.end_us(self._now_us) for flow in self._flows.values()) // 1)

    def knows(self, key: Key) -> bool:
        """Whether the transfer was begun here."""
        return key in self._flows or key in self._arrivals_us or key in self._lost

    def why_lost(self, key: Key) -> str:
        """Why a transfer will never arrive; "" where it may."""
        return self._lost.get(key, "")

    def forget(self, key: Key) -> None:
        """Nobody will ask for the transfer again."""
        self._arrivals_us.pop(key, None)
        self._lost.pop(key, None)
        if self._flows.pop(key, None) is not None:
            self._share()

    def lose(self, instance: str, now_us: int, why: str) -> None:
        """What is on the way to an instance that fails now, or from it, is lost."""
        self.settle(now_us)
        gone = [key for key, f in self._flows.items() if instance in (f.source, f.target)]
        for key in gone:
            self._concerned[self._flows.pop(key).target] = None
            self._lost[key] = why
        if gone:
            self._share()

    def take_concerned(self) -> list[str]:
        """Instances whose KV may arrive at another time than when this was asked last, or never."""
        if not self._concerned:
            return []
        concerned = list(self._concerned)
        self._concerned.clear()
        return concerned

    def busy_us(self) -> dict[str, float]:
        """How long each link has carried something, as far as was settled."""
        return {name: self._busy_us.get(name, 0.0) for name in self.links}

    def moved_bytes(self) -> dict[str, float]:
        """How much each link has carried, as far as was settled."""
        return {name: self._moved_bytes.get(name, 0.0) for name in self.links}

    def _pass(self, until_us: float) -> None:
        """Move bytes at the present shares."""
        passed_us = until_us - self._now_us
        if passed_us <= 0:
            return
        self._now_us = until_us
        used: dict[str, None] = {}
        for flow in self._flows.values():
            moved = min(flow.left_bytes, flow.bytes_per_s * passed_us / 1e6)
            flow.left_bytes -= moved
            for name in flow.links:
                used[name] = None
                self._moved_bytes[name] = self._moved_bytes.get(name, 0.0) + moved
        for name in used:
            self._busy_us[name] = self._busy_us.get(name, 0.0) + passed_us

    def _share(self) -> None:
        """Give each transfer its part: the fullest link first, again and again."""
        self.changes += 1
        self._concerned.update((flow.target, None) for flow in self._flows.values())
        left = dict(self.links)
        waiting = list(self._flows.values())
        while waiting:
            users = _users_of(waiting)
            parts = [(left[name] / count, name) for name, count in users.items()]
            part, tightest = min(parts, key=lambda one: one[0], default=(float("inf"), ""))
            slow = [flow for flow in waiting if flow.limit_bytes_per_s <= part]
            settled = slow or [flow for flow in waiting if tightest in flow.links]
            for flow in settled:
                flow.bytes_per_s = min(flow.limit_bytes_per_s, part)
                for name in flow.links:
                    left[name] -= flow.bytes_per_s
            waiting = [flow for flow in waiting if flow not in settled]


def _users_of(flows: Sequence[_Flow]) -> dict[str, int]:
    """How many transfers pass each link, in the order in which they began."""
    users: dict[str, int] = {}
    for flow in flows:
        for name in flow.links:
            users[name] = users.get(name, 0) + 1
    return users


def _named_links(path: Path, numbers: Mapping[int, int]) -> dict[str, float]:
    """The links of a path in the direction in which it passes them; within a device, its memory."""
    if not path.links:
        return {f"memory of {path.places[0]}": path.bytes_per_s}
    hops = zip(path.places, path.places[1:], path.links, strict=False)
    return {
        f"{here} to {there}, link {numbers[id(link)]}": link.bytes_per_s
        for here, there, link in hops
    }
