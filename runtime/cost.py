"""What a step costs, in closed form: fitted to measured steps, else the roofline of a model.

The roofline: a step computes some tokens. Each passes through the weights (two operations a
parameter) and attends to the tokens before it; those that sample pass through the last projection,
too. Weights are read once a step, of experts those that a token goes to, and so is the KV of each
request that decodes. The time is the larger of arithmetic and memory traffic at the peak of the
devices, and a fixed overhead. Tensor parallelism divides both by the ranks.

A fit knows nothing of operations and bytes: see `Fit`. `sagec.runtime.profile` makes it of measured
steps. Microseconds; arrays welcome everywhere.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STEP_OVERHEAD_US = 100.0
"""Launches, sampling and bookkeeping of a step, where nothing was measured."""

MOST_SHARES = 1 << 16
"""Numbers of tokens of which `expert_shares` knows the share; no step has more."""


@functools.cache
def expert_shares(experts: float, experts_per_token: float) -> tuple[float, ...]:
    """Of 0 tokens, 1, 2, ...: the share of a layer's experts that one of them goes to, on average.

    It is 1 - (1 - k/E)^tokens, where each token goes to k of E experts, all as likely. By repeated
    multiplication, so that whoever does the same gets the same to the bit. The last share holds for
    all more tokens, too. Where nobody says how many experts there are, all are read.

    >>> expert_shares(8, 2)[:4]
    (0.0, 0.25, 0.4375, 0.578125)
    """
    if not experts:
        return (1.0,)
    missed, shares = 1.0, [0.0]
    others = 1.0 - min(1.0, experts_per_token / experts)
    while len(shares) < MOST_SHARES:
        missed *= others
        if (share := 1.0 - missed) == shares[-1]:
            break
        shares.append(share)
    return tuple(shares)


def experts_read(experts: float, experts_per_token: float, tokens: int) -> float:
    """The share of `expert_shares` at so many tokens."""
    shares = expert_shares(experts, experts_per_token)
    return shares[min(tokens, len(shares) - 1)]


@dataclass(frozen=True)
class Curve:
    """Microseconds over a count, in straight pieces that never fall.

    begin_us: at 0. knots: where pieces begin, ascending, the first at 0. slopes: of the pieces, as
    many; the last goes on beyond all that was measured.

    >>> Curve(5.0, (0.0, 10.0), (1.0, 2.0)).one(12)
    19.0
    """

    begin_us: float
    knots: tuple[float, ...]
    slopes: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for pieces that are none."""
        ascending = all(a < b for a, b in zip(self.knots, self.knots[1:], strict=False))
        if not self.knots or self.knots[0] or not ascending or len(self.slopes) != len(self.knots):
            raise ValueError("a curve has knots from 0 on, ascending, and a slope at each")
        if not all(0 <= number < float("inf") for number in (self.begin_us, *self.slopes)):
            raise ValueError("a curve begins at 0 or more and never falls")

    @functools.cached_property
    def _us(self) -> tuple[float, ...]:
        """At each knot."""
        us = [self.begin_us]
        for i in range(1, len(self.knots)):
            us.append(us[-1] + self.slopes[i - 1] * (self.knots[i] - self.knots[i - 1]))
        return tuple(us)

    @functools.cached_property
    def _columns(self) -> tuple[Floats, Floats, Floats]:
        return np.array(self.knots), np.array(self._us), np.array(self.slopes)

    @functools.cached_property
    def mean_slope(self) -> float:
        """From 0 to where the last piece begins: what one more costs, whatever the count."""
        if not self.knots[-1]:
            return self.slopes[-1]
        return (self._us[-1] - self.begin_us) / self.knots[-1]

    def each(self, counts: Floats) -> Floats:
        """At each of the counts, 0 or more."""
        knots, us, slopes = self._columns
        piece = knots.searchsorted(counts, "right") - 1
        return np.asarray(us[piece] + slopes[piece] * (counts - knots[piece]))

    def one(self, count: float) -> float:
        """`each` of one number, to the same bit."""
        piece = bisect.bisect_right(self.knots, count) - 1
        return self._us[piece] + self.slopes[piece] * (count - self.knots[piece])


@dataclass(frozen=True)
class Fit:
    """The time of measured steps, of DistServe's form, with curves for its straight lines.

    A step of prompts takes prefill(tokens) + pair_us for each pair of tokens of which one attends
    to the other. A step of decodes takes decode(requests) + context_us for each token of their KV.
    One of both takes the sum, less what its tokens save by passing through the weights together:
    prefill(prompts) + prefill(requests) - prefill(both), at most shared_us.
    """

    prefill: Curve
    pair_us: float
    decode: Curve
    context_us: float
    shared_us: float

    def each(self, tokens: Floats, pairs: Floats, context: Floats, decodes: Floats) -> Floats:
        """As `StepCost.step_us`; the two phases apart where all steps are of one, for speed."""
        prompts = tokens - decodes
        if not np.any(prompts > 0):
            return np.asarray(self.decode.each(tokens) + self.context_us * context)
        alone = self.prefill.each(np.maximum(prompts, 0))
        prefill = alone + self.pair_us * (pairs - context)
        if np.all(prompts > 0) and not np.any(decodes > 0):
            return prefill
        decode = self.decode.each(decodes) + self.context_us * context
        saved = alone + self.prefill.each(decodes) - self.prefill.each(tokens)
        both = prefill + decode - np.clip(saved, 0.0, self.shared_us)
        return np.where(prompts <= 0, decode, np.where(decodes <= 0, prefill, both))

    def one(self, tokens: float, pairs: float, context: float, decodes: float) -> float:
        """`each` of plain numbers, to the same bit."""
        if tokens <= decodes:
            return self.decode.one(tokens) + self.context_us * context
        alone = self.prefill.one(tokens - decodes)
        prefill = alone + self.pair_us * (pairs - context)
        if decodes <= 0:
            return prefill
        decode = self.decode.one(decodes) + self.context_us * context
        saved = alone + self.prefill.one(decodes) - self.prefill.one(tokens)
        return prefill + decode - min(max(saved, 0.0), self.shared_us)


@dataclass(frozen=True)
class StepCost:
    """The time of a step of one instance, from the numbers of its model and devices.

    flops_per_token: of the weights but the last projection; head_flops_per_token: of this, which
    computes the rows that sample: the decodes, and one of the prompts if there are any.
    flops_per_pair: attention of one token to one other, in all layers. weight_bytes: all but the
    experts, expert_bytes: these, in all layers. experts, experts_per_token: of a layer.
    flops_per_s, bytes_per_s: of all ranks together. fit: what steps were measured to take; where
    there is one, it alone counts.
    """

    flops_per_token: float
    flops_per_pair: float
    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_s: float
    bytes_per_s: float
    overhead_us: float = STEP_OVERHEAD_US
    head_flops_per_token: float = 0.0
    expert_bytes: float = 0.0
    experts: float = 0
    experts_per_token: float = 0
    fit: Fit | None = None

    @functools.cached_property
    def _expert_shares(self) -> Floats:
        return np.array(expert_shares(self.experts, self.experts_per_token))

    def step_us(
        self,
        tokens: npt.ArrayLike,
        pairs: npt.ArrayLike,
        context_tokens: npt.ArrayLike,
        decodes: npt.ArrayLike = 0,
    ) -> Floats:
        """A step of `tokens` new tokens, of which `decodes` are decodes and the others of prompts.

        They attend to `pairs` tokens in sum; context_tokens of these are KV of the decodes.

        >>> cost = StepCost(2e9, 0.0, 2e9, 1e5, 1e15, 1e12)
        >>> float(cost.step_us(1, 100, 100, 1).round())  # the weights' 2 GB at 1 TB/s
        2110.0
        """
        if self.fit is not None:
            columns = (tokens, pairs, context_tokens, decodes)
            return self.fit.each(*(np.asarray(column, np.float64) for column in columns))
        flops = np.multiply(tokens, self.flops_per_token) + np.multiply(pairs, self.flops_per_pair)
        sampled = np.add(decodes, np.greater(tokens, decodes))
        flops = flops + sampled * self.head_flops_per_token
        moved = self.weight_bytes + np.multiply(context_tokens, self.kv_bytes_per_token)
        if self.expert_bytes:
            known = np.minimum(tokens, len(self._expert_shares) - 1).astype(np.int64)
            moved = moved + self._expert_shares[known] * self.expert_bytes
        return self.overhead_us + 1e6 * np.maximum(
            flops / self.flops_per_s, moved / self.bytes_per_s
        )

    def one_step_us(
        self, tokens: int, pairs: float, context_tokens: float, decodes: int = 0
    ) -> float:
        """`step_us` of plain numbers, to the same bit, without numpy's overhead."""
        if self.fit is not None:
            return self.fit.one(tokens, pairs, context_tokens, decodes)
        flops = tokens * self.flops_per_token + pairs * self.flops_per_pair
        flops += (decodes + (tokens > decodes)) * self.head_flops_per_token
        moved = self.weight_bytes + context_tokens * self.kv_bytes_per_token
        if self.expert_bytes:
            share = experts_read(self.experts, self.experts_per_token, tokens)
            moved += share * self.expert_bytes
        return self.overhead_us + 1e6 * max(flops / self.flops_per_s, moved / self.bytes_per_s)

    def prefill_us(self, begin: npt.ArrayLike, end: npt.ArrayLike) -> Floats:
        """The prompt tokens [begin, end) alone: what they add to a step that has prompts.

        Without what a step does once, whatever its prompts: it reads weights, and samples a row.
        """
        begin, end = np.asarray(begin, np.float64), np.asarray(end, np.float64)
        pairs = (end * (end + 1) - begin * (begin + 1)) / 2
        if self.fit is not None:
            tokens_us = (end - begin) * self.fit.prefill.mean_slope
            return np.asarray(tokens_us + pairs * self.fit.pair_us)
        flops = (end - begin) * self.flops_per_token + pairs * self.flops_per_pair
        return np.asarray(1e6 * flops / self.flops_per_s)

    def decode_us(self, context_tokens: npt.ArrayLike) -> Floats:
        """What a request of `context_tokens` tokens of KV adds to a decode step.

        Without the weights, and the experts that no other token goes to.
        """
        context = np.asarray(context_tokens, np.float64)
        if self.fit is not None:
            return np.asarray(self.fit.decode.mean_slope + context * self.fit.context_us)
        each = self.flops_per_token + self.head_flops_per_token
        flops = (each + context * self.flops_per_pair) / self.flops_per_s
        moved = context * self.kv_bytes_per_token / self.bytes_per_s
        return np.asarray(1e6 * np.maximum(flops, moved))

    def to_options(self) -> dict[str, str]:
        """All fields as texts, for an engine that is told in texts what it is."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fit = fields.pop("fit")
        options = {name: repr(number) for name, number in fields.items()}
        return options if fit is None else options | {"fit": fit_text(fit)}


NUMBERS = tuple(field.name for field in dataclasses.fields(StepCost) if field.name != "fit")
"""The fields of a StepCost that are numbers."""


def fit_text(fit: Fit) -> str:
    """A fit as JSON, from which `read_fit` makes the same, to the bit."""
    return json.dumps(dataclasses.asdict(fit), separators=(",", ":"))


def read_fit(text: str) -> Fit:
    """The fit of `fit_text`. Raises ValueError for any other text."""
    try:
        values = json.loads(text)
        return Fit(
            prefill=_read_curve(values["prefill"]),
            pair_us=float(values["pair_us"]),
            decode=_read_curve(values["decode"]),
            context_us=float(values["context_us"]),
            shared_us=float(values["shared_us"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no fit: {error}") from None


def _read_curve(values: Mapping[str, Any]) -> Curve:
    knots, slopes = values["knots"], values["slopes"]
    if not isinstance(knots, list) or not isinstance(slopes, list):
        raise TypeError("knots and slopes are lists")
    return Curve(float(values["begin_us"]), tuple(map(float, knots)), tuple(map(float, slopes)))
