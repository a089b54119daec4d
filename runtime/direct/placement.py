"""Where requests prefill and where they decode: the problem as arrays, and two answers.

The objective is the makespan T in microseconds, the largest of

- each instance's time: predicted prefills and decodes of its rows, and what it has to do already;
- each instance's KV: the tokens of its rows times how long they stay, over its capacity;
- each link's time: the bytes over it, in each direction by itself, over its bandwidth;

plus MINOR times (the longest prefill queue and the sum of all transfers), which decides between
equal makespans: prefills spread, and KV stays where it is. `greedy` serves a scheduling round; for
offline compiles there are `improve` and, in `solver`, an exact answer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sagec.runtime.cost import StepCost
from sagec.runtime.direct.columns import Ints
from sagec.runtime.direct.topology import Instance, Topology

Floats = npt.NDArray[np.float64]
Pair = tuple[int, int]
"""A prefill site and a decode site, as indices into a problem's columns."""

MINOR = 1e-3
"""Weight of what decides between placements of the same makespan."""


class Hop(NamedTuple):
    """What moving KV from a prefill to a decode site takes. links: (link, us per token) passed.

    same: one instance does both, and nothing moves.
    """

    latency_us: float = 0.0
    us_per_token: float = 0.0
    links: tuple[tuple[int, float], ...] = ()
    same: bool = False


@dataclass(frozen=True, eq=False)
class Sites:
    """A cluster as placement sees it: P instances that prefill, D that decode, and their hops.

    prefill_at, decode_at: index of each among the instances. decode_at and hops have one column
    more than there are instances that decode: "nowhere", for rows that are only prefilled.
    costs: the different step costs; cost_of, capacity_tokens: of each instance its cost among
    them, and its KV cache. hops: [P][D + 1], None without a path.
    """

    num_links: int
    prefill_at: list[int]
    decode_at: list[int]
    costs: tuple[StepCost, ...]
    cost_of: Ints
    capacity_tokens: Floats
    hops: list[list[Hop | None]]

    @property
    def num_instances(self) -> int:
        return len(self.cost_of)

    @functools.cached_property
    def all_connected(self) -> bool:
        return all(hop is not None for hops in self.hops for hop in hops)

    @functools.cached_property
    def alone_us(self) -> Floats:
        """Of each cost, what a decode step takes beside its requests."""
        return np.array([float(cost.step_us(0, 0, 0)) for cost in self.costs])

    @functools.cached_property
    def nearest(self) -> tuple[float, float]:
        """The least latency and microseconds a token of any move; zeros where KV may stay."""
        hops = [hop for row in self.hops for hop in row[:-1] if hop is not None]
        if not hops or any(hop.same for hop in hops):
            return 0.0, 0.0
        return min(hop.latency_us for hop in hops), min(hop.us_per_token for hop in hops)


@functools.lru_cache(maxsize=16)
def sites_of(topology: Topology, matching: bool = True, returning: tuple[int, ...] = ()) -> Sites:
    """The sites of a cluster; `matching`: only hops between caches of the same shape.

    returning: instances, by number, that also take rows of whose prompts only the last token is to
    be computed, whatever their role.
    """
    prefills = [one for one in topology.instances if one.runs("prefill") or one.index in returning]
    decodes = [one for one in topology.instances if one.runs("decode")]
    costs = tuple(dict.fromkeys(one.cost for one in topology.instances))
    links: dict[tuple[int, bool], int] = {}
    hops = [[*(_hop(topology, a, b, links, matching) for b in decodes), Hop()] for a in prefills]
    return Sites(
        num_links=len(links),
        prefill_at=[one.index for one in prefills],
        decode_at=[*(one.index for one in decodes), len(topology.instances)],
        costs=costs,
        cost_of=np.array([costs.index(one.cost) for one in topology.instances], np.int64),
        capacity_tokens=np.array(
            [float(one.kv_blocks * one.block_tokens) for one in topology.instances]
        ),
        hops=hops,
    )


def _hop(
    topology: Topology,
    source: Instance,
    target: Instance,
    links: dict[tuple[int, bool], int],
    matching: bool,
) -> Hop | None:
    """The hop between two instances. links: (link, direction) to its number, added to."""
    if source is target:
        return Hop(same=True)
    if source.model is not target.model or (matching and not _matches(source, target)):
        return None
    if (path := topology.path(source, target)) is None:
        return None
    token_bytes = source.kv_bytes_per_token
    passed = tuple(
        (
            links.setdefault((id(link), link.ends[0] == place), len(links)),
            1e6 * token_bytes / link.bytes_per_s,
        )
        for link, place in zip(path.links, path.places, strict=False)
    )
    return Hop(path.latency_us, 1e6 * token_bytes / path.bytes_per_s, passed)


def _matches(source: Instance, target: Instance) -> bool:
    """Whether one takes the other's KV as it is; what else is legal, `legalize` knows."""
    return (
        source.block_tokens == target.block_tokens
        and source.kv_bytes_per_token == target.kv_bytes_per_token
        and source.kv_layout == target.kv_layout
        and source.draft_layers == target.draft_layers
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows to place. A column a site; infinite where the row may not be.

    prefill_us: [rows, P]. decode_us, kv_us: [rows, D], or D + 1 with "nowhere". moved_tokens:
    [rows], KV to move where the two are apart. load_us, kv_load_us: [instances + 1], what they
    have to do before any row comes.
    """

    sites: Sites
    prefill_us: Floats
    decode_us: Floats
    kv_us: Floats
    moved_tokens: Floats
    load_us: Floats
    kv_load_us: Floats

    def __len__(self) -> int:
        return len(self.moved_tokens)

    @functools.cached_property
    def decode_at(self) -> list[int]:
        return self.sites.decode_at[: self.decode_us.shape[1]]

    @functools.cached_property
    def connected(self) -> npt.NDArray[np.bool_]:
        """[P, D]: pairs with a hop."""
        width = self.decode_us.shape[1]
        hops = [[hop is not None for hop in row[:width]] for row in self.sites.hops]
        return np.array(hops, np.bool_).reshape(len(hops), width)

    def where(
        self,
        may_prefill: npt.NDArray[np.bool_],
        may_decode: npt.NDArray[np.bool_],
        decoded: npt.NDArray[np.bool_],
    ) -> Problem:
        """The problem with rows only where they may be: [rows, P], [rows, D], and [rows].

        Rows that are not decoded go "nowhere" for it.
        """
        prefill_us, decode_us, kv_us = self.prefill_us, self.decode_us, self.kv_us
        if not may_prefill.all():
            prefill_us = np.where(may_prefill, prefill_us, inf)
        if not (all_decoded := bool(decoded.all())):
            may_decode = may_decode & decoded[:, None]
        if not may_decode.all():
            decode_us = np.where(may_decode, decode_us, inf)
        if not all_decoded:
            decode_us = np.column_stack([decode_us, np.where(decoded, inf, 0.0)])
            kv_us = np.column_stack([kv_us, np.zeros(len(self))])
        return replace(self, prefill_us=prefill_us, decode_us=decode_us, kv_us=kv_us)

    def stuck_row(self) -> int | None:
        """The first row that no pair of sites takes; None where all can be placed."""
        prefills, decodes = np.isfinite(self.prefill_us), np.isfinite(self.decode_us)
        free = prefills.all() and prefills.size and decodes.all() and decodes.size
        if free and self.sites.all_connected:
            return None
        reached = (prefills.astype(np.float64) @ self.connected) > 0
        stuck = np.flatnonzero(~(reached & decodes).any(axis=1))
        return int(stuck[0]) if stuck.size else None


def problem_of(
    sites: Sites, begin: Ints, end: Ints, decodes: Ints, load_us: Floats, kv_load_us: Floats
) -> Problem:
    """The problem of rows that prefill the tokens [begin, end) and then decode some, anywhere.

    begin: [rows], or [P, rows] where it is not the same at all sites.
    """
    context = end + decodes / 2
    each: Floats = np.array([cost.decode_us(context) for cost in sites.costs])
    stay = (sites.alone_us[:, None] + each) * (context * decodes)
    here = sites.cost_of[sites.prefill_at]
    there = sites.cost_of[sites.decode_at[:-1]]
    if begin.ndim == 1:
        prefill = np.array([cost.prefill_us(begin, end) for cost in sites.costs])[here]
    else:
        each_begin = zip(here.tolist(), begin, strict=True)
        prefill = np.array([sites.costs[cost].prefill_us(b, end) for cost, b in each_begin])
        prefill = prefill.reshape(begin.shape)
    return Problem(
        sites=sites,
        prefill_us=prefill.T,
        decode_us=np.multiply(each, decodes, dtype=np.float64)[there].T,
        kv_us=stay[there].T / sites.capacity_tokens[sites.decode_at[:-1]],
        moved_tokens=end.astype(np.float64),
        load_us=load_us,
        kv_load_us=kv_load_us,
    )


def loads_of(sites: Sites, at: Ints, context: Ints, decodes: Ints) -> tuple[Floats, Floats]:
    """load_us and kv_load_us of residents: `at` is the instance of each, by number.

    They are added up by instance first, so that thousands cost little more than one.
    """
    width = sites.num_instances
    tokens = np.bincount(at, weights=decodes, minlength=width)
    pairs = np.bincount(at, weights=(context + decodes * 0.5) * decodes, minlength=width)
    mean = pairs / np.maximum(tokens, 1.0)
    each = np.array([cost.decode_us(mean) for cost in sites.costs])[sites.cost_of, range(width)]
    stay = (sites.alone_us[sites.cost_of] + each) * pairs / sites.capacity_tokens
    return np.append(each * tokens, 0.0), np.append(stay, 0.0)


@dataclass(frozen=True, eq=False)
class Assignment:
    """Where each row prefills and decodes: columns of the problem, [rows] each.

    objective_us is the makespan with its minor terms. gap: how far above the best objective it
    may be at most, relative; None where nobody knows. status: "greedy", "improved", or of a
    solver "within gap", "time limit", or "size classes" where it solved for classes of rows.
    """

    prefill: Ints
    decode: Ints
    makespan_us: float
    objective_us: float
    status: str
    gap: float | None = None


class Loads:
    """What every instance and link has to do, while rows come and go."""

    def __init__(self, problem: Problem) -> None:
        self.hops, self.decode_at = problem.sites.hops, problem.decode_at
        self.prefill_at = problem.sites.prefill_at
        all_decoded = len(self.decode_at) < len(problem.sites.decode_at)
        self.nearest = problem.sites.nearest if all_decoded else (0.0, 0.0)
        self.prefill_us: list[list[float]] = problem.prefill_us.tolist()
        self.decode_us: list[list[float]] = problem.decode_us.tolist()
        self.kv_us: list[list[float]] = problem.kv_us.tolist()
        self.moved_tokens: list[float] = problem.moved_tokens.tolist()
        self.time: list[float] = problem.load_us.tolist()
        self.kv: list[float] = problem.kv_load_us.tolist()
        self.link = [0.0] * problem.sites.num_links
        self.queue = [0.0] * len(self.time)
        self.transfers_us = 0.0
        self.peak_us = self.measured_peak()

    def measured_peak(self) -> float:
        """The makespan, from all loads; `peak_us` follows rows that come, not those that go."""
        return max(itertools.chain(self.time, self.kv, self.link), default=0.0)

    def objective(self) -> float:
        """The objective of the rows so far."""
        return self.measured_peak() + MINOR * (max(self.queue) + self.transfers_us)

    def add(self, row: int, pair: Pair, sign: float = 1.0) -> None:
        """Book a row, or with sign -1 take it out again."""
        prefill, decode = pair
        here, there = self.prefill_at[prefill], self.decode_at[decode]
        us = sign * self.prefill_us[row][prefill]
        time, kv, peak = self.time, self.kv, self.peak_us
        time[here] += us
        self.queue[here] += us
        time[there] += sign * self.decode_us[row][decode]
        kv[there] += sign * self.kv_us[row][decode]
        hop = self.hops[prefill][decode]
        assert hop is not None
        latency_us, us_per_token, links, same = hop
        if not same:
            tokens = sign * self.moved_tokens[row]
            self.transfers_us += sign * latency_us + tokens * us_per_token
            for link, us_per_token in links:
                self.link[link] = us = self.link[link] + tokens * us_per_token
                if us > peak:
                    peak = us
        for us in (time[here], time[there], kv[there]):
            if us > peak:
                peak = us
        self.peak_us = peak

    def choose(self, row: int) -> Pair:
        """The pair that raises the makespan least; of equals the least loaded, then the nearest.

        A row is done at the earliest when its prefill, its transfer and its decode have followed
        each other: without that, two idle instances would swap KV to share the work of one row.
        Pairs are tried in the order of their load, and no more than can still be the best.
        """
        prefill, decode = self._ends(row)
        decode_us, peak = self.decode_us[row], self.peak_us
        by_decode = _ascending(decode)
        least, shortest = decode[by_decode[0]], min(decode_us)
        tokens = self.moved_tokens[row]
        nearest_us = self.nearest[0] + self.nearest[1] * tokens
        best, chosen = inf, None
        for p in _ascending(prefill):
            before, hops = prefill[p], self.hops[p]
            ahead = before + nearest_us
            floor = x if (x := ahead + shortest) > peak else peak
            if (least if least > floor else floor) + MINOR * (ahead + least) >= best:
                break
            for d in by_decode:
                after = decode[d]
                worst = after if after > floor else floor
                if worst + MINOR * (ahead + after) >= best:
                    break
                if (hop := hops[d]) is None:
                    continue
                arrived = before
                if not hop[3]:
                    arrived += hop[0] + hop[1] * tokens
                    for link, us_per_token in hop[2]:
                        if (us := self.link[link] + tokens * us_per_token) > worst:
                            worst = us
                done = arrived + decode_us[d]
                score = (worst if worst > done else done) + MINOR * (arrived + after)
                if score < best:
                    best, chosen = score, (p, d)
        assert chosen is not None, "a row without a pair; ask stuck_row first"
        return chosen

    def _ends(self, row: int) -> tuple[list[float], list[float]]:
        """How long each prefill site and each decode site would be busy with the row too."""
        time, kv = self.time, self.kv
        prefill_us, decode_us = self.prefill_us[row], self.decode_us[row]
        prefill = [time[i] + us for i, us in zip(self.prefill_at, prefill_us, strict=True)]
        decode = [
            x if (x := time[i] + us) > (y := kv[i] + stay) else y
            for i, us, stay in zip(self.decode_at, decode_us, self.kv_us[row], strict=True)
        ]
        return prefill, decode


_ONLY = (0,)
_FIRST_SECOND, _SECOND_FIRST = (0, 1), (1, 0)


def _ascending(values: list[float]) -> Sequence[int]:
    """Indices of the values, the smallest first; of equals the first."""
    if len(values) == 1:
        return _ONLY
    if len(values) == 2:
        return _FIRST_SECOND if values[0] <= values[1] else _SECOND_FIRST
    return sorted(range(len(values)), key=values.__getitem__)


def greedy(problem: Problem) -> Assignment:
    """Rows in their order, each to the best pair for it as things stand."""
    loads = Loads(problem)
    pairs = []
    for row, only in enumerate(_only_pairs(problem)):
        pair = only or loads.choose(row)
        loads.add(row, pair)
        pairs.append(pair)
    return _assignment(loads, pairs, "greedy")


def _only_pairs(problem: Problem) -> list[Pair | None]:
    """Of each row, the pair of sites that it may use; None where there are several."""
    prefills, decodes = np.isfinite(problem.prefill_us), np.isfinite(problem.decode_us)
    only = (prefills.sum(axis=1) == 1) & (decodes.sum(axis=1) == 1)
    ends = zip(prefills.argmax(axis=1).tolist(), decodes.argmax(axis=1).tolist(), strict=True)
    return [pair if one else None for pair, one in zip(ends, only.tolist(), strict=True)]


def measured(problem: Problem, pairs: Sequence[Pair], status: str) -> Assignment:
    """The assignment of these pairs, a row each, its objective computed from nothing."""
    loads = Loads(problem)
    for row, pair in enumerate(pairs):
        loads.add(row, pair)
    return _assignment(loads, pairs, status)


def pairs_of(assignment: Assignment) -> list[Pair]:
    """The pair of each row."""
    return list(zip(assignment.prefill.tolist(), assignment.decode.tolist(), strict=True))


def _assignment(loads: Loads, pairs: Sequence[Pair], status: str) -> Assignment:
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    peak = loads.peak_us
    objective = peak + MINOR * (max(loads.queue) + loads.transfers_us)
    return Assignment(columns[:, 0], columns[:, 1], peak, objective, status)


# Local search

TRIES = 20_000
"""What `improve` may spend: a change of a small cluster is 1, about 15 us."""
_CRITICAL_ROWS = 64


def improve(problem: Problem, start: Assignment, tries: int = TRIES) -> Assignment:
    """`start` after moves and swaps of the rows of the busiest resource; never worse.

    Stops when none helps or after `tries` of them, so that the same input gives the same answer.
    """
    search = _Search(problem, pairs_of(start), tries)
    while search.tries > 0 and (search.move() or search.swap()):
        pass
    found = measured(problem, search.pairs, "improved")
    return found if found.objective_us < start.objective_us else start


class _Search:
    """An assignment that is changed in place, as long as a change makes it better."""

    def __init__(self, problem: Problem, pairs: list[Pair], tries: int) -> None:
        self.loads, self.pairs, self.tries = Loads(problem), pairs, tries
        sites = problem.sites
        self.price = 1 + (sites.num_instances + sites.num_links) // 16
        for row, pair in enumerate(pairs):
            self.loads.add(row, pair)
        self.objective = self.loads.objective()

    def move(self) -> bool:
        """Take a critical row out and put it where it is best then."""
        for row in self._critical()[:_CRITICAL_ROWS]:
            self.loads.add(row, self.pairs[row], -1.0)
            self.loads.peak_us = self.loads.measured_peak()
            new = self.loads.choose(row)
            self.loads.add(row, self.pairs[row])
            if self._better({row: new}):
                return True
        return False

    def swap(self) -> bool:
        """Exchange one site, or both, of a critical row and another."""
        critical = self._critical()
        outside = set(critical)
        others = [row for row in range(len(self.pairs)) if row not in outside]
        for row in critical[:_CRITICAL_ROWS]:
            for other in others[:_CRITICAL_ROWS]:
                (p, d), (q, e) = self.pairs[row], self.pairs[other]
                for mine, theirs in (((q, d), (p, e)), ((p, e), (q, d)), ((q, e), (p, d))):
                    if self.tries <= 0:
                        return False
                    if mine != (p, d) and self._better({row: mine, other: theirs}):
                        return True
        return False

    def _better(self, change: dict[int, Pair]) -> bool:
        """Make a change if the objective falls; whether it did."""
        self.tries -= self.price
        if not all(self._allowed(row, pair) for row, pair in change.items()):
            return False
        for row, pair in change.items():
            self.loads.add(row, self.pairs[row], -1.0)
            self.loads.add(row, pair)
        after = self.loads.objective()
        if after < self.objective * (1 - 1e-9):
            self.objective = after
            for row, pair in change.items():
                self.pairs[row] = pair
            return True
        for row, pair in change.items():
            self.loads.add(row, pair, -1.0)
            self.loads.add(row, self.pairs[row])
        return False

    def _allowed(self, row: int, pair: Pair) -> bool:
        loads = self.loads
        return (
            loads.hops[pair[0]][pair[1]] is not None
            and loads.prefill_us[row][pair[0]] < inf
            and loads.decode_us[row][pair[1]] < inf
        )

    def _critical(self) -> list[int]:
        """Rows that use the busiest resource, those that use it most first."""
        self.tries -= 1 + len(self.pairs) // 16
        peak = self.loads.measured_peak()
        use = {row: us for row in range(len(self.pairs)) if (us := self._use(row, peak)) > 0.0}
        return sorted(use, key=lambda row: -use[row])

    def _use(self, row: int, peak: float) -> float:
        """How much a row uses resources that are as busy as the busiest."""
        loads, (prefill, decode) = self.loads, self.pairs[row]
        here, there = loads.prefill_at[prefill], loads.decode_at[decode]
        used = loads.prefill_us[row][prefill] * (loads.time[here] >= peak)
        used += loads.decode_us[row][decode] * (loads.time[there] >= peak)
        used += loads.kv_us[row][decode] * (loads.kv[there] >= peak)
        hop = loads.hops[prefill][decode]
        for link, us_per_token in hop.links if hop is not None else ():
            used += loads.moved_tokens[row] * us_per_token * (loads.link[link] >= peak)
        return used
