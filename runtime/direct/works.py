"""The work of each instance in a round: what `passes.work` reads off a graph."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from sagec.runtime.direct.cluster import Cluster
from sagec.runtime.direct.columns import (
    Bools,
    Ints,
    Lists,
    Words,
    chosen,
    flags,
    words_in_order,
    zeros,
)
from sagec.runtime.direct.places import Fresh
from sagec.runtime.direct.topology import Instance, Link
from sagec.runtime.direct.waves import NotCovered, Residents
from sagec.runtime.direct.work import (
    Work,
    bounded_by_its_room,
    in_turn,
    victims_of,
    within_its_room,
)


@dataclass(frozen=True, eq=False)
class Moves:
    """When the KV of each fresh row that decodes elsewhere has arrived there, in microseconds."""

    crosses: Bools
    us: Ints


@dataclass(frozen=True)
class Left:
    """Residents of an instance that must leave it, for want of blocks."""

    at: int
    names: tuple[str, ...]
    because: str

    @classmethod
    def of(cls, work: Work, victims: Ints) -> Left:
        """These rows of the work; the words are those of `assign-kv`."""
        needed, there = int(work.blocks.sum()), work.instance.kv_blocks
        names = tuple([work.names[row] for row in victims.tolist()])
        return cls(work.instance.index, names, f"KV: {needed} blocks needed, {there} there")


class Splitter:
    """Parts the rows of a round by instance.

    bounds: chunks of the fresh rows. tokens: that rows decode within the horizon. left: residents
    that had to leave; kept: the others, by number, None where all are.
    """

    def __init__(
        self,
        cluster: Cluster,
        residents: Residents | None,
        fresh: Fresh | None,
        bounds: Lists,
        horizon: int,
    ) -> None:
        self.cluster, self.residents, self.fresh, self.bounds = cluster, residents, fresh, bounds
        self.left: list[Left] = []
        self.kept: Ints | None = None
        if residents is not None:
            self.resident_tokens = np.minimum(residents.remaining, horizon)
        if fresh is not None:
            self.tokens = np.minimum(fresh.generate - 1, horizon)
            self.moves = _moves(fresh, cluster)

    def works(self, turns: dict[int, int]) -> list[Work]:
        """The work of each instance that has some, in their order, without residents that leave.

        Raises NotCovered where a request can never fit.
        """
        works = []
        for instance in self._busy():
            work = self._work(instance)
            is_full = int(work.blocks.sum()) > instance.kv_blocks
            if is_full:  # otherwise all is well within bounds
                work = _within_bounds(work)
            work = in_turn(work, turns.get(instance.index))
            _check_room(work)
            if is_full and (victims := victims_of(work)).size:
                self.left.append(Left.of(work, victims))
            works.append(work)
        if not self.left:
            return works
        self._let_go()
        busy = self._busy()
        return [in_turn(_within_bounds(self._work(one)), turns.get(one.index)) for one in busy]

    def _let_go(self) -> None:
        """Go on without the residents that leave."""
        residents = self.residents
        assert residents is not None
        gone = {name for left in self.left for name in left.names}
        kept = np.array([i for i, name in enumerate(residents.names) if name not in gone], np.int64)
        self.kept, self.residents = kept, residents.some(kept) if len(kept) else None
        self.resident_tokens = self.resident_tokens[kept]

    def _busy(self) -> list[Instance]:
        instances = self.cluster.instances
        if len(instances) == 1 and (self.residents is not None or self.fresh):
            return list(instances)
        busy = np.zeros(len(instances), np.bool_)
        if self.residents is not None:
            busy[self.residents.at] = True
        if self.fresh is not None:
            busy[self.fresh.on] = True
            busy[self.fresh.decode_on[self.tokens > 0]] = True
        return [instances[at] for at in busy.nonzero()[0].tolist()]

    def _work(self, instance: Instance) -> Work:
        rows = self._residents_on(instance.index)
        if self.fresh is None:
            return self._decodes_only(instance, rows)
        at, fresh = instance.index, self.fresh
        pre = (fresh.on == at).nonzero()[0]
        coming = (self.moves.crosses & (fresh.decode_on == at)).nonzero()[0]
        if not len(pre) and not len(coming):
            return self._decodes_only(instance, rows)
        return self._mixed(instance, pre, rows, coming)

    def _residents_on(self, at: int) -> Ints | slice:
        """Rows of the residents that are there."""
        residents = self.residents
        if residents is None:
            return slice(0, 0)
        here = (residents.at == at).nonzero()[0]
        return slice(None) if len(here) == len(residents.at) else here

    def _decodes_only(self, instance: Instance, rows: Ints | slice) -> Work:
        """The work of an instance on which residents decode, and nobody else."""
        residents = self.residents
        assert residents is not None
        names = residents.names
        if not isinstance(rows, slice):
            names = chosen(names, rows)
        context, count = residents.context[rows], len(names)
        awaited, source = flags(False, count), _nowhere(count)
        if residents.arriving is not None:
            awaited = residents.arriving[rows]
            source = _own(instance, awaited)
        return Work(
            instance=instance,
            names=names,
            num_prefills=0,
            prompt=context,
            held=context,
            cached=zeros(count),
            decodes=self.resident_tokens[rows],
            generate=residents.remaining[rows],
            deadline=zeros(count),
            bounds=_NO_BOUNDS,
            source=source,
            target=_nowhere(count),
            transfer_us=zeros(count),
            awaited=awaited,
        )

    def _mixed(self, instance: Instance, pre: Ints, rows: Ints | slice, coming: Ints) -> Work:
        """The work of an instance that computes prompts, or awaits KV."""
        fresh, at = self.fresh, instance.index
        assert fresh is not None
        local = fresh.decode_on[pre] == at
        parts = _Parts(self.residents, rows, fresh, pre, coming)
        num_residents, count = parts.num_residents, parts.count
        resident_tokens = self.resident_tokens[rows] if num_residents else _NOTHING
        local_tokens = np.where(local, self.tokens[pre], 0)
        first_coming = len(pre) + num_residents
        awaited = np.zeros(count, np.bool_)
        awaited[first_coming:] = True
        if num_residents and self.residents is not None and self.residents.arriving is not None:
            awaited[len(pre) : first_coming] = self.residents.arriving[rows]
        cached = zeros(count)
        if np.count_nonzero(here := fresh.cached[pre]):
            cached = _padded(here, count)
        computed = parts.column("computed")
        us = zeros(count)
        if len(coming):
            us = np.zeros(count, np.int64)
            us[first_coming:] = self.moves.us[coming]
        return Work(
            instance=instance,
            names=parts.names(),
            num_prefills=len(pre),
            prompt=parts.column("prompt"),
            held=computed if cached is zeros(count) else computed + cached,
            cached=cached,
            decodes=np.concatenate([local_tokens, resident_tokens, self.tokens[coming]]),
            generate=parts.column("generate"),
            deadline=parts.column("deadline"),
            bounds=self.bounds if len(pre) == len(fresh) else _some(self.bounds, pre),
            source=self._sources(instance, awaited, coming, first_coming),
            target=self._targets(pre, local, count),
            transfer_us=us,
            awaited=awaited,
        )

    def _sources(
        self, instance: Instance, awaited: Bools, coming: Ints, first_coming: int
    ) -> Words:
        """Where the KV of each row that is awaited comes from; what is on its way, from here."""
        rows = awaited.nonzero()[0]
        if not len(rows):
            return _nowhere(len(awaited))
        assert self.fresh is not None
        there = np.full(len(rows), instance.index)
        there[rows >= first_coming] = self.fresh.on[coming]
        words, numbers = words_in_order(self.cluster.names, there)
        codes = np.zeros(len(awaited), np.int64)
        codes[rows] = numbers + 1
        return Words(("", *words), codes)

    def _targets(self, pre: Ints, local: Bools, count: int) -> Words:
        """Where the KV of each prompt goes."""
        if np.count_nonzero(local) == len(local):
            return _nowhere(count)
        assert self.fresh is not None
        names = self.cluster.names
        codes = np.full(count, len(names))
        leaves = self.moves.crosses[pre]
        codes[: len(pre)] = np.where(leaves, self.fresh.decode_on[pre], len(names))
        return Words(*words_in_order((*names, ""), codes))


_NOTHING: Ints = np.zeros(0, np.int64)
_NO_BOUNDS = Lists(np.zeros(1, np.int64), _NOTHING)


@dataclass(frozen=True, eq=False)
class _Parts:
    """Rows of an instance: prompts, then residents, then those whose KV comes."""

    residents: Residents | None
    rows: Ints | slice
    fresh: Fresh
    pre: Ints
    coming: Ints

    @functools.cached_property
    def num_residents(self) -> int:
        if self.residents is None:
            return 0
        return len(self.residents.at) if isinstance(self.rows, slice) else len(self.rows)

    @property
    def count(self) -> int:
        return len(self.pre) + self.num_residents + len(self.coming)

    def names(self) -> tuple[str, ...]:
        names = _names(self.fresh.names, self.pre)
        if self.residents is not None and self.num_residents:
            names += _names(self.residents.names, self.rows)
        return names + _names(self.fresh.names, self.coming) if len(self.coming) else names

    def column(self, name: str) -> Ints:
        """A column of `Work`, of all rows."""
        of: Ints = getattr(self.fresh, name)
        parts = [of if len(self.pre) == len(of) else of[self.pre]]
        if self.residents is not None and self.num_residents:
            said = _OF_RESIDENTS[name]
            count = self.num_residents
            parts.append(zeros(count) if said is None else getattr(self.residents, said)[self.rows])
        if len(self.coming):
            parts.append(of[self.coming])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


_OF_RESIDENTS = {
    "prompt": "context",
    "computed": "context",
    "generate": "remaining",
    "deadline": None,
}


def _names(names: tuple[str, ...], rows: Ints | slice) -> tuple[str, ...]:
    if isinstance(rows, slice):
        return names[rows]
    return names if len(rows) == len(names) else chosen(names, rows)


def _nowhere(count: int) -> Words:
    return Words(("",), zeros(count))


def _own(instance: Instance, awaited: Bools) -> Words:
    """What is on its way comes from the instance itself, as far as anybody knows."""
    if not np.count_nonzero(awaited):
        return _nowhere(len(awaited))
    return Words(("", instance.name), awaited.astype(np.int64))


def _padded(column: Ints, rows: int) -> Ints:
    """The column, and zeros up to `rows`."""
    if len(column) == rows:
        return column
    padded = np.zeros(rows, np.int64)
    padded[: len(column)] = column
    return padded


def _some(bounds: Lists, rows: Ints) -> Lists:
    """The lists of these rows."""
    begins = bounds.offsets[rows]
    lengths = bounds.offsets[rows + 1] - begins
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    at = np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], lengths)
    return Lists(offsets, bounds.values[at])


def _moves(fresh: Fresh, cluster: Cluster) -> Moves:
    """Which rows move, and when they arrive: on a link the earlier rows go first.

    What `insert-transfers` says. Raises NotCovered where a hand-over may not be legal.
    """
    crosses = (fresh.on != fresh.decode_on) & (fresh.generate > 1)
    us = np.zeros(len(fresh), np.int64)
    rows = crosses.nonzero()[0]
    if len(rows):
        us[rows] = _arrivals(fresh, rows, cluster)
    return Moves(crosses, us)


def _arrivals(fresh: Fresh, rows: Ints, cluster: Cluster) -> Ints:
    pairs = list(zip(fresh.on[rows].tolist(), fresh.decode_on[rows].tolist(), strict=True))
    routes = list(dict.fromkeys(pairs))
    if not all(cluster.hands_over(*pair) for pair in routes):
        raise NotCovered("a hand-over that may not be legal")
    paths = [
        cluster.topology.path(cluster.instances[here], cluster.instances[there])
        for here, there in routes
    ]
    via = np.array([routes.index(pair) for pair in pairs], np.int64)
    rates = []
    links: dict[Link, None] = {}
    for (here, _), path in zip(routes, paths, strict=True):
        assert path is not None
        token = cluster.instances[here].kv_bytes_per_token
        rates.append((token, path.latency_us, path.bytes_per_s))
        links |= dict.fromkeys(path.links)
    token_bytes, latency_us, bytes_per_s = np.array(rates).T[:, via]
    size = fresh.prompt[rows] * token_bytes
    us = latency_us + 1e6 * size / bytes_per_s
    for link in links:
        shares = np.array([path is not None and link in path.links for path in paths])
        over = shares[via]
        waits = latency_us[over] + 1e6 * np.cumsum(size[over]) / link.bytes_per_s
        us[over] = np.maximum(us[over], waits)
    arrived: Ints = np.rint(us).astype(np.int64)
    return arrived


def _within_bounds(work: Work) -> Work:
    return within_its_room(bounded_by_its_room(work))


def _check_room(work: Work) -> None:
    """Raise NotCovered for a request that can never fit."""
    instance = work.instance
    room = instance.kv_blocks * instance.block_tokens
    if int(work.prompt.max()) + int(work.generate.max()) > room and work.whole.max() > room:
        raise NotCovered("a request that no empty instance of its size could hold")
