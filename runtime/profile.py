"""A profile: how long steps of one model were measured to take on one kind of device.

It is a JSON file; docs/cost.md describes it field by field. `Profile.fit` makes a cost model of it.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sagec.runtime.cost import Curve, Fit, StepCost

FORMAT = "sagec-profile"
VERSION = 1

KINDS = ("prefill", "decode", "mixed")
"""Of steps."""

FEWEST_POINTS = 3
"""Steps of prompts alone, and of decodes alone, that a fit needs."""

MOST = 10**15
"""A whole number of a profile, so that sums and products of them are numbers still."""

STIFFNESS = 0.1
"""How much a curve minds to bend, against being off."""

Floats = npt.NDArray[np.float64]
Knots = tuple[float, ...]


class ProfileError(ValueError):
    """A profile that is none, or another one's; the message is a line that says which and why."""


@dataclass(frozen=True)
class Shape:
    """The model that was measured, and the type that it computes in."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: str
    experts: int = 0
    experts_per_token: int = 0
    tied: int = 0


@dataclass(frozen=True)
class Point:
    """A step, measured: us is the median of so many repeats, spread_us their interquartile range.

    It computes chunk_tokens tokens of each of `prompts` prompts, which have past_tokens tokens
    before these; and a token of each of `decodes` requests that have context_tokens tokens of KV.
    """

    us: float
    prompts: int = 0
    chunk_tokens: int = 0
    past_tokens: int = 0
    decodes: int = 0
    context_tokens: int = 0
    spread_us: float = 0.0
    repeats: int = 1

    @property
    def step(self) -> tuple[int, float, int, int]:
        """What `StepCost.step_us` takes: tokens, pairs, tokens of KV, decodes."""
        begin, end = self.past_tokens, self.past_tokens + self.chunk_tokens
        pairs = self.prompts * (end * (end + 1) - begin * (begin + 1)) / 2
        held = self.decodes * self.context_tokens
        return self.prompts * self.chunk_tokens + self.decodes, pairs + held, held, self.decodes

    @property
    def kind(self) -> str:
        """One of KINDS."""
        if self.prompts:
            return "mixed" if self.decodes else "prefill"
        return "decode"

    def __str__(self) -> str:
        parts = []
        if self.prompts:
            past = f" after {self.past_tokens}" if self.past_tokens else ""
            parts.append(f"{self.prompts} x {self.chunk_tokens} prompt tokens{past}")
        if self.decodes:
            parts.append(f"{self.decodes} decodes at {self.context_tokens}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Profile:
    """Measured steps of one model at one parallelism. engine: what computed them; device: the kind;
    machine: in words, for people.

    turn_us: what passes between two steps of an engine in the loop's own thread, for the loop to
    hear of the first; round_us: so much more, where it also makes a plan. See `LoopTimes`.
    """

    engine: str
    device: str
    model: Shape
    points: tuple[Point, ...]
    tp: int = 1
    pp: int = 1
    machine: str = ""
    turn_us: float = 0.0
    round_us: float = 0.0

    @functools.cached_property
    def fit(self) -> Fit:
        """The cost model of its points, and of the turn of the loop that follows each.

        Raises ProfileError where the points are too few.
        """
        return _longer(fit_of(self.points), self.turn_us)

    def fit_for(self, model: Shape, tp: int, pp: int, place: str, kinds: Iterable[str] = ()) -> Fit:
        """The cost model of that model at that parallelism. place: how a message calls the profile.
        kinds: of the devices that say one.

        Raises ProfileError where it was measured of another one, or on another kind of device.
        """
        for kind in kinds:
            if kind != self.device:
                raise ProfileError(
                    f"{place}: measured on a device of kind {self.device}, not {kind}; measure on "
                    "this one: sagec profile"
                )
        for name, here, asked in (("tp", self.tp, tp), ("pp", self.pp, pp)):
            if here != asked:
                raise ProfileError(f"{place}: measured at {name} {here}, not {asked}; measure that")
        for field in fields(Shape):
            here, asked = getattr(self.model, field.name), getattr(model, field.name)
            if here != asked:
                raise ProfileError(
                    f"{place}: of another model, whose {field.name} is {here}, not {asked}; "
                    "measure this one: sagec profile"
                )
        try:
            return self.fit
        except ProfileError as error:
            raise ProfileError(f"{place}: {error}") from None


# Files


def to_text(profile: Profile) -> str:
    """The profile as the JSON that `read` takes; a point a line."""
    head = {"format": FORMAT, "version": VERSION} | asdict(profile)
    del head["points"]
    lines = ",\n  ".join(json.dumps(asdict(point)) for point in profile.points)
    return f'{json.dumps(head, indent=1)[:-2]},\n "points": [\n  {lines}\n ]\n}}\n'


def read(path: str) -> Profile:
    """The profile in a file. Raises ProfileError, whose message begins with the path."""
    try:
        status = os.stat(path)
        return _read(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise ProfileError(f"{path}: {error.strerror or error}") from None


@functools.lru_cache(maxsize=16)
def _read(path: str, changed_ns: int, size: int) -> Profile:
    """As `read`; read and fitted again only when the file changes."""
    text = Path(path).read_bytes()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not JSON: {error}") from None
    try:
        return from_json(values)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None


def from_json(values: object) -> Profile:
    """The profile that a JSON document says. Raises ProfileError."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ProfileError(f'no profile: "format" is not "{FORMAT}"; sagec profile writes them')
    if (version := values.get("version")) != VERSION:
        raise ProfileError(f"version {version!r}; this sagec reads version {VERSION}")
    points = values.get("points")
    if not isinstance(points, list):
        raise ProfileError("points: a list of measured steps is wanted")
    rest = {k: v for k, v in values.items() if k not in ("format", "version", "points", "model")}
    made = tuple(_made(Point, value, f"points[{i}]") for i, value in enumerate(points))
    for i, point in enumerate(made):
        _check_point(point, f"points[{i}]")
    model = _made(Shape, values.get("model"), "model")
    found: Profile = _made(Profile, rest | {"model": model, "points": made}, "profile")
    for name in ("turn_us", "round_us"):
        if not 0 <= (us := getattr(found, name)) < math.inf:
            raise ProfileError(f"profile: {name} is {us!r}; a number, 0 or more")
    return found


def _check_point(point: Point, place: str) -> None:
    if not (0 < point.us < math.inf and 0 <= point.spread_us < math.inf):
        raise ProfileError(f"{place}: us is {point.us!r}, spread_us {point.spread_us!r}")
    if bool(point.prompts) != bool(point.chunk_tokens):
        said = f"{point.prompts} prompts of {point.chunk_tokens} tokens"
        raise ProfileError(f"{place}: {said}; neither is 0, or both are")
    if not point.prompts and not point.decodes:
        raise ProfileError(f"{place}: a step that computes nothing")


def _made(kind: type[Shape | Point | Profile], values: object, place: str) -> Any:
    """A dataclass of JSON values. Raises ProfileError for a field that is missing or of no use."""
    if not isinstance(values, Mapping):
        raise ProfileError(f"{place}: an object is wanted, not {values!r}")
    wanted = {field.name: field for field in fields(kind)}
    for name, value in values.items():
        if (field := wanted.get(name)) is None:
            raise ProfileError(f"{place}: no field {name!r}; there are: {', '.join(wanted)}")
        takes = _TAKES.get(str(field.type))
        if takes and (not isinstance(value, takes[0]) or isinstance(value, bool)):
            raise ProfileError(f"{place}: {name} is {value!r}; {takes[1]} is wanted")
        if isinstance(value, int) and not 0 <= value <= MOST:
            shown = value if abs(value) <= 10 * MOST else "a longer number"
            raise ProfileError(f"{place}: {name} is {shown}; 0 or more, {MOST} at most")
    missing = [name for name, field in wanted.items()
               if field.default is MISSING and name not in values]  # fmt: skip
    if missing:
        raise ProfileError(f"{place}: no {', '.join(missing)}")
    return kind(**values)


_TAKES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
}
"""What a field of a type takes, and how a message calls it."""


# Fits


def fit_of(points: Sequence[Point], straight: bool = False) -> Fit:
    """The cost model whose steps are least off, relative to the measured ones.

    No time is below 0 and more work never takes less: non-negative least squares of slopes. Curves
    have a piece for each doubling of their count in which there are points. straight: DistServe's
    form instead, a line over prompt tokens, and two over decodes, which meet at a batch of 95.
    Raises ProfileError where there are too few points of prompts or of decodes alone.
    """
    prefills = _columns(points, "prefill")
    decodes = _columns(points, "decode")
    tokens, pairs = prefills[:, 0], prefills[:, 1]
    knots = (0.0,) if straight else _doublings(tokens)
    prefill, pair_us = _curve(knots, tokens, pairs, prefills[:, 4])
    rows, held = decodes[:, 3], decodes[:, 2]
    knots = _covered((0.0, 95.0), rows) if straight else _doublings(rows)
    decode, context_us = _curve(knots, rows, held, decodes[:, 4])
    apart = Fit(prefill, pair_us, decode, context_us, shared_us=0.0)
    return replace(apart, shared_us=_shared_us(apart, points))


def _longer(fit: Fit, by_us: float) -> Fit:
    """The cost model of steps that take so much longer, whatever they compute."""
    prefill, decode = (
        replace(curve, begin_us=curve.begin_us + by_us) for curve in (fit.prefill, fit.decode)
    )
    return replace(fit, prefill=prefill, decode=decode, shared_us=fit.shared_us + by_us)


def _columns(points: Sequence[Point], kind: str) -> Floats:
    """[points of the kind, 5]: what `Point.step` says, and the time."""
    found = [(*point.step, point.us) for point in points if point.kind == kind]
    if len(found) < FEWEST_POINTS:
        raise ProfileError(
            f"points: {len(found)} of {kind} steps; a fit needs {FEWEST_POINTS} at least"
        )
    return np.array(found, np.float64)


def _shared_us(apart: Fit, points: Sequence[Point]) -> float:
    """What a step of both phases saves at most against a step of each, of which the fit is.

    Of what measured ones saved, that with which they are least off, relative to their times; but no
    more than the cheaper phase takes for a token, so that a step of both takes as long as one of
    each at least. Where nothing was measured, what the cheaper phase takes with nothing to do.
    """
    mixed = [point for point in points if point.kind == "mixed"]
    if not mixed:
        return min(apart.prefill.begin_us, apart.decode.begin_us)
    steps = np.array([point.step for point in mixed], np.float64).T
    us = np.array([point.us for point in mixed])

    def off(shared_us: float) -> float:
        return float(abs(replace(apart, shared_us=shared_us).each(*steps) / us - 1).mean())

    most_us = min(apart.prefill.one(1), apart.decode.one(1))
    tried: set[float] = {
        min(max(saved, 0.0), most_us) for saved in (apart.each(*steps) - us).tolist()
    }
    return min(tried, key=lambda shared_us: (off(shared_us), shared_us))


def _doublings(counts: Floats) -> Knots:
    """Knots at 0 and at halvings of the largest count, with a point in each piece between."""
    largest, smallest = float(counts.max()), float(counts.min())
    halvings = max(0, math.ceil(math.log2(largest / smallest)) - 1)
    return _covered((0.0, *(largest / 2**i for i in range(halvings, 0, -1))), counts)


def _covered(knots: Knots, counts: Floats) -> Knots:
    """As many of the knots as leave a count in each piece."""
    kept = [knots[0]]
    for knot in knots[1:]:
        if np.any((counts > kept[-1]) & (counts <= knot)) and np.any(counts > knot):
            kept.append(knot)
    return tuple(kept)


def _curve(knots: Knots, counts: Floats, others: Floats, us: Floats) -> tuple[Curve, float]:
    """The curve over counts, and the microseconds for each of the others."""
    ends = np.array((*knots[1:], np.inf))
    pieces = [np.clip(counts - k, 0.0, end - k) for k, end in zip(knots, ends, strict=True)]
    columns = np.column_stack([np.ones_like(counts), *pieces, others]) / us[:, None]
    bends = _bends(knots, counts, us)
    found = non_negative(
        np.vstack([columns, bends]), np.append(np.ones_like(us), np.zeros(len(bends)))
    )
    return Curve(found[0], knots, tuple(found[1:-1])), found[-1]


def _bends(knots: Knots, counts: Floats, us: Floats) -> Floats:
    """A row for each knot that a curve bends at: what a bend costs beside being off, [knots - 1,
    unknowns]. It says how a curve goes where its points do not.

    As a share, like being off: of the time at the knot, what the bend makes of it.
    """
    rows = np.zeros((len(knots) - 1, len(knots) + 2))
    order = counts.argsort(kind="stable")
    for i, knot in enumerate(knots[1:]):
        share = STIFFNESS * knot / np.interp(knot, counts[order], us[order])
        rows[i, i + 1 : i + 3] = -share, share
    return rows


def non_negative(columns: Floats, wanted: Floats) -> list[float]:
    """The x >= 0 with the least |columns @ x - wanted|, by Lawson and Hanson's active sets.

    columns: [equations, unknowns].

    >>> found = non_negative(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([3.0, 1.0]))
    >>> [round(x, 6) for x in found]
    [2.0, 0.0]
    """
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    columns = columns / scale
    x, free = np.zeros(columns.shape[1]), np.zeros(columns.shape[1], np.bool_)
    for _ in range(3 * len(x)):
        gradient = np.where(free, -np.inf, columns.T @ (wanted - columns @ x))
        if (best := int(gradient.argmax())) < 0 or gradient[best] <= 1e-10:
            break
        free[best] = True
        while True:
            trial = np.zeros(len(x))
            trial[free] = np.linalg.lstsq(columns[:, free], wanted, rcond=None)[0]
            if (low := free & (trial <= 0)).sum() == 0:
                break
            steps = x[low] / (x[low] - trial[low] + 1e-300)
            x = x + steps.min() * (trial - x)
            free &= x > 1e-14
            x[~free] = 0.0
        x = trial
    return [float(value) for value in x / scale]


# Errors


def errors(cost: StepCost | Fit, points: Sequence[Point]) -> Floats:
    """Of each point, how far off its prediction is, as a share of what was measured."""
    predict = cost.one if isinstance(cost, Fit) else cost.one_step_us
    return np.array([abs(predict(*point.step) - point.us) / point.us for point in points])


def halved(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """Every second point of each kind, to be given to a fit; and the others, to be asked for.

    A kind's smallest and largest step are both given, for a fit is asked within what it knows.
    """
    given: list[Point] = []
    asked: list[Point] = []
    for kind in KINDS:
        those = sorted((p for p in points if p.kind == kind), key=lambda p: (*p.step, p.us))
        odd = [i % 2 == 1 and i != len(those) - 1 for i in range(len(those))]
        given += [point for point, is_asked in zip(those, odd, strict=True) if not is_asked]
        asked += [point for point, is_asked in zip(those, odd, strict=True) if is_asked]
    return given, asked
