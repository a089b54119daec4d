"""What instances cannot exceed: requests a second of which a share is served well.

Some times add up, whatever the order in which requests are served: the arithmetic of their prompts
and decodes, and what steps read while they decode. No schedule has more requests a second than fit
into the time of all instances, even if it serves only the cheapest of them and its prefix caches
have all that prompts have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sagec.passes.topology import Instance as Placed
from sagec.runtime.cost import Curve, StepCost
from sagec.runtime.kv import block_hashes
from sagec.runtime.request import Request

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """attained: the share of requests that is to be served well. Times are microseconds."""

    ttft_us: int
    tpot_us: int
    attained: float = 0.9


class Bound(NamedTuple):
    """Requests a second that cannot be exceeded, and why, in words."""

    per_s: float
    why: str


@dataclass(frozen=True)
class Work:
    """What requests ask for: columns with a row a request, and a table of pieces of their prompts.

    prompts: tokens. decodes: tokens of output after the first one, which comes of the prompt.
    owner, begin, end, users: tokens [begin, end) of the prompt of request `owner`, which so many
    requests have in common: one computes them, the others may find them in a prefix cache.
    """

    prompts: Floats
    decodes: Floats
    owner: npt.NDArray[np.int64]
    begin: Floats
    end: Floats
    users: Floats

    @classmethod
    def of(cls, requests: Sequence[Request], block_tokens: int | None = None) -> Work:
        """block_tokens: of the prefix caches; None: there are none."""
        hashes = [_hashes(request, block_tokens) for request in requests]
        users = Counter(block for blocks in hashes for block in blocks)
        rows = [
            (owner, *piece)
            for owner, (request, blocks) in enumerate(zip(requests, hashes, strict=True))
            for piece in _pieces(
                len(request.prompt), [users[block] for block in blocks], block_tokens or 1
            )
        ]
        table = np.array(rows, np.float64).reshape(-1, 4)
        return cls(
            prompts=np.array([len(request.prompt) for request in requests], np.float64),
            decodes=np.array([(one.max_output_tokens or 1) - 1 for one in requests], np.float64),
            owner=table[:, 0].astype(np.int64),
            begin=table[:, 1],
            end=table[:, 2],
            users=table[:, 3],
        )

    @property
    def is_shared(self) -> bool:
        """Whether prompts have something in common."""
        return bool((self.users > 1).any())

    @functools.cached_property
    def own_begin(self) -> Floats:
        """Where the part of each prompt begins that no other request has."""
        shared = np.where(self.users > 1, self.end, 0.0)
        begin = np.zeros(len(self.prompts))
        np.maximum.at(begin, self.owner, shared)
        return begin

    @property
    def contexts(self) -> Floats:
        """Tokens of KV at a decode, in the mean over the decodes of each request."""
        return self.prompts + self.decodes / 2

    def shared_out_us(self, token_us: float, pair_us: float) -> Floats:
        """Of each prompt, with pieces shared out among those who have them in common."""
        pairs = (self.end * (self.end + 1) - self.begin * (self.begin + 1)) / 2
        us = ((self.end - self.begin) * token_us + pairs * pair_us) / self.users
        return np.asarray(np.bincount(self.owner, us, len(self.prompts)), np.float64)


def _hashes(request: Request, block_tokens: int | None) -> Sequence[int]:
    if block_tokens is None:
        return ()
    given = request.block_hashes
    return given or block_hashes(request.prompt, block_tokens, request.adapter)


def _pieces(length: int, users: Sequence[int], block_tokens: int) -> list[tuple[int, int, int]]:
    """(begin, end, users) of a prompt's pieces; users: of each of its first blocks.

    >>> _pieces(100, [3, 3, 1, 1, 1], 16)
    [(0, 32, 3), (32, 100, 1)]
    """
    ends = [i + 1 for i in range(len(users)) if i + 1 == len(users) or users[i + 1] != users[i]]
    pieces = [
        (begin * block_tokens, end * block_tokens, users[begin])
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    if pieces and pieces[-1][2] == 1:
        pieces.pop()
    known = pieces[-1][1] if pieces else 0
    return [*pieces, (known, length, 1)] if known < length else pieces


@dataclass(frozen=True, eq=False)
class Side:
    """One of several ways to say what a step takes at least; each adds up over steps.

    A step takes at least token_us for each token of prompts, pair_us for each pair of these of
    which one attends to the other, base_us[n - 1] where n requests decode, and context_us for each
    token of their KV.
    """

    token_us: float
    pair_us: float
    base_us: Floats
    context_us: float

    def most_tokens(self, us: float) -> float:
        """Tokens of KV of a step that takes no longer than so; 0 or less where none does."""
        return (us - float(self.base_us[0])) / self.context_us if self.context_us else math.inf


@functools.lru_cache(maxsize=256)
def sides_of(cost: StepCost, max_batch: int, most_tokens: int) -> tuple[Side, Side]:
    """What steps of up to `max_batch` decodes and `most_tokens` tokens of prompts take at least.

    Of a roofline: its arithmetic, and what it reads. Of a fit: a step of both phases takes less
    than one of each, by a time that is taken once from the decodes and once from the prompts.
    """
    batches = np.arange(1, max_batch + 1, dtype=np.float64)
    if (fit := cost.fit) is not None:
        decode_us = fit.decode.each(batches)
        whole = _least_us(fit.prefill, most_tokens, 0.0)
        saved = _least_us(fit.prefill, most_tokens, fit.shared_us)
        return (
            Side(whole, fit.pair_us, np.maximum(decode_us - fit.shared_us, 0), fit.context_us),
            Side(saved, fit.pair_us, decode_us, fit.context_us),
        )
    flop_us, byte_us = 1e6 / cost.flops_per_s, 1e6 / cost.bytes_per_s
    token_us, pair_us = cost.flops_per_token * flop_us, cost.flops_per_pair * flop_us
    sampled_us = token_us + cost.head_flops_per_token * flop_us
    idle = dataclasses.replace(
        cost, flops_per_token=0.0, flops_per_pair=0.0, head_flops_per_token=0.0
    )
    return (
        Side(token_us, pair_us, cost.overhead_us + batches * sampled_us, pair_us),
        Side(0.0, 0.0, idle.step_us(batches, 0, 0, batches), cost.kv_bytes_per_token * byte_us),
    )


def _least_us(curve: Curve, most: int, less_us: float) -> float:
    """The least share of one of up to `most` in what all take together, less so much.

    On a straight piece the share rises or falls all the way, so that it is least at an end.

    >>> _least_us(Curve(10.0, (0.0, 20.0), (1.0, 5.0)), most=100, less_us=0.0)
    1.5
    """
    counts = np.array([1.0, *(knot for knot in curve.knots if 1 < knot < most), max(1, most)])
    return max(0.0, float(((curve.each(counts) - less_us) / counts).min()))


@dataclass(frozen=True, eq=False)
class Pace:
    """How fast one instance can be."""

    placed: Placed
    sides: tuple[Side, Side]

    @classmethod
    def of(cls, placed: Placed) -> Pace:
        return cls(placed, sides_of(placed.cost, placed.max_batch, placed.max_step_tokens))

    def alone_us(self, work: Work) -> Floats:
        """Until the first token of each request with nobody beside it, at least."""
        side, begin, end = self.sides[0], work.own_begin, work.prompts
        pairs = (end * (end + 1) - begin * (begin + 1)) / 2
        return (end - begin) * side.token_us + pairs * side.pair_us

    def next_us(self, work: Work) -> Floats:
        """From one token of each request to its next with nobody beside it, at least."""
        each = [side.base_us[0] + side.context_us * work.prompts for side in self.sides]
        return np.where(work.decodes > 0, np.maximum(*each), 0.0)

    def prompt_us(self, work: Work) -> list[Floats]:
        """Of each request's prompt, on each side."""
        return [work.shared_out_us(side.token_us, side.pair_us) for side in self.sides]

    def decode_us(self, work: Work, tpot_us: int) -> list[list[Floats]]:
        """Of each request's decodes, on each side; several bounds each, of which any holds.

        A step is shared out by rows or by their KV. Neither may be more than the promise leaves
        room for, nor the KV more than the instance has.
        """
        placed, room_tokens = self.placed, self._room_tokens(work)
        rows_us = _rows_us(placed.cost, placed.max_batch, placed.max_step_tokens, tpot_us)
        kept_tokens = max(1.0, min(side.most_tokens(tpot_us) for side in self.sides))
        found = []
        for side, row_us in zip(self.sides, rows_us, strict=True):
            kv_us = work.decodes * work.contexts * side.context_us
            shares = [
                work.decodes * row_us,
                work.decodes * work.prompts * (side.base_us[0] / kept_tokens),
                work.decodes * work.contexts * (side.base_us[0] / room_tokens),
            ]
            found.append([kv_us + share for share in shares])
        return found

    def all_decode_us(self, work: Work, tpot_us: int) -> list[Floats]:
        """`decode_us` of both sides."""
        return [us for bounds in self.decode_us(work, tpot_us) for us in bounds]

    def _room_tokens(self, work: Work) -> float:
        """Most tokens of KV that rows have; those that share some of it may have any number."""
        if work.is_shared and caches_prefixes(self.placed):
            return math.inf
        return self.placed.kv_blocks * self.placed.block_tokens


@functools.lru_cache(maxsize=256)
def _rows_us(cost: StepCost, max_batch: int, most_tokens: int, tpot_us: int) -> tuple[float, float]:
    """The least share of a row in a step of decodes that keeps the promise, on each side."""
    first, second = sides_of(cost, max_batch, most_tokens)
    base_us = np.maximum(first.base_us, second.base_us)
    rows = np.arange(1, max_batch + 1)
    return (
        _least_within(first.base_us / rows, base_us, tpot_us),
        _least_within(second.base_us / rows, base_us, tpot_us),
    )


def _least_within(values: Floats, costs: Floats, limit: float) -> float:
    """The least mean of values whose mean cost keeps the limit; costs never fall.

    It is one value, or of two whose costs are on both sides of the limit. Where all cost more, the
    least of all.

    >>> _least_within(np.array([4.0, 2.0, 1.0]), np.array([1.0, 2.0, 5.0]), limit=3.0)
    1.6666666666666667
    """
    within = costs <= limit
    if not within.any() or within.all():
        return float(values.min())
    least = float(values[within].min())
    over, over_costs = values[~within], costs[~within]
    for value, cost in zip(values[within], costs[within], strict=True):
        share = (limit - cost) / (over_costs - cost)
        least = min(least, float((value + share * (over - value)).min()))
    return least


def caches_prefixes(placed: Placed) -> bool:
    """Whether a simulated instance keeps KV of prompts for those that come."""
    return "prefix_cache=on" in placed.options.split()


def bound(placed: Sequence[Placed], work: Work, target: Target) -> Bound:
    """What the instances cannot exceed, whoever is served when; 0.0 where too few can be served
    well at all."""
    paces = [Pace.of(one) for one in placed]
    prefill = [pace for pace in paces if pace.placed.runs("prefill")]
    decode = [pace for pace in paces if pace.placed.runs("decode")]
    first_us = np.min([pace.alone_us(work) for pace in prefill], axis=0)
    next_us = np.min([pace.next_us(work) for pace in decode], axis=0)
    needed = _needed(work, target)
    early, fast = first_us <= target.ttft_us, next_us <= target.tpot_us
    if early.sum() < needed:
        return Bound(0.0, _too_late(first_us, work, target))
    if (early & fast).sum() < needed:
        return Bound(0.0, _too_slow(next_us, target))
    chosen = early & fast
    rate = functools.partial(_rate_per_s, chosen=chosen, needed=needed)
    if prefill == decode:
        per_s = _least_rate([_together(pace, work, target) for pace in prefill], rate)
        return Bound(per_s, f"{_counted(prefill, 'instance')} can serve {per_s:.4g} /s at most")
    prompts = _least_rate([pace.prompt_us(work) for pace in prefill], rate)
    decodes = _least_rate([pace.all_decode_us(work, target.tpot_us) for pace in decode], rate)
    if prompts <= decodes:
        who = _counted(prefill, "prefill instance")
        return Bound(prompts, f"{who} can compute prompts for {prompts:.4g} /s at most")
    who = _counted(decode, "decode instance")
    return Bound(decodes, f"{who} can decode for {decodes:.4g} /s at most")


def _needed(work: Work, target: Target) -> float:
    """How many requests are to be served well; 0.7 of 10 are 7, however 0.7 is rounded."""
    return (target.attained - 1e-9) * len(work.prompts)


def _together(pace: Pace, work: Work, target: Target) -> list[Floats]:
    """Bounds of the time that requests take of an instance that does both phases."""
    prompts, decodes = pace.prompt_us(work), pace.decode_us(work, target.tpot_us)
    return [
        prompt_us + decode_us
        for prompt_us, several in zip(prompts, decodes, strict=True)
        for decode_us in several
    ]


def _least_rate(times: Sequence[Sequence[Floats]], rate: Callable[[Floats], float]) -> float:
    """times: bounds of each instance, each of them a number a request."""
    return min(rate(np.array(each)) for each in zip(*times, strict=True))


def _rate_per_s(us: Floats, chosen: npt.NDArray[np.bool_], needed: float) -> float:
    """Requests a second, at most. us: [instances, requests].

    Time of a fast instance is worth more than that of a slow one, by how long all would take it. At
    these prices no request costs less than where it is cheapest; only the cheapest ones are served.
    """
    mean_us = us.mean(axis=1)
    if not (mean_us > 0).all():
        return math.inf
    least = (us / mean_us[:, None]).min(axis=0)[chosen]
    whole = math.floor(needed)
    order = np.sort(least)
    served = order[:whole].sum() + (needed - whole) * (order[whole] if whole < len(order) else 0.0)
    return float(1e6 * us.shape[1] * (1 / mean_us).sum() / served) if served > 0 else math.inf


def _counted(paces: Sequence[Pace], noun: str) -> str:
    return f"{len(paces)} {noun}{'s' if len(paces) > 1 else ''}"


def _too_late(first_us: Floats, work: Work, target: Target) -> str:
    at = np.argsort(first_us, kind="stable")[math.ceil(_needed(work, target)) - 1]
    tokens = work.prompts[at] - work.own_begin[at]
    return (
        f"a prompt of {tokens:.0f} tokens, longer than {target.attained:.0%} are, takes "
        f"{first_us[at] / 1e3:.3g} ms alone; the promise is {target.ttft_us / 1e3:g} ms"
    )


def _too_slow(next_us: Floats, target: Target) -> str:
    at = np.quantile(next_us, target.attained, method="inverted_cdf")
    return f"one decode alone takes {at / 1e3:.3g} ms; the promise is {target.tpot_us / 1e3:g} ms"
