"""When a cached block will be used again: learned from the blocks that were, and from those not.

Blocks of a kind (how deep in the prefix tree, how often used so far) share a life table: in each
stretch of age, which part of the blocks that came so far was used again before its end? A block
that is never used again counts in every stretch that it outlives, so that what did not happen is
learned as well as what did.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Kind = tuple[int, int]

EDGES_US: tuple[float, ...] = (0.0, *(250e3 * 2**step for step in range(21)))
"""Where stretches of age begin and end: 0, then from 250 ms doubling to 3 days."""

_STRETCHES = len(EDGES_US) - 1
"""A block that has outlived them all is not expected any more."""

_WIDTHS_US = np.diff(EDGES_US)

_PRIOR_BLOCKS = 2.0
"""Blocks' worth of the prior in each stretch: of a kind, what all kinds together say; of all kinds,
what the stretch before says, for stretches double and reuse is often much the same in each."""

_MOST_CERTAIN = 1 - 1e-9

_HALVINGS = 32.0
"""Weights grow by so many factors of two before all are scaled down."""


def kind_of(depth: int, uses: int) -> Kind:
    """The kind of a block `depth` blocks below the root that was used `uses` times.

    Depths and uses are told apart in powers of two, up to 64 blocks and 8 uses.

    >>> kind_of(0, 1), kind_of(5, 3), kind_of(1000, 1000)
    ((0, 1), (3, 2), (7, 4))
    """
    return min(depth.bit_length(), 7), min(uses.bit_length(), 4)


@dataclass(slots=True)
class _Life:
    """What is known of a block: its kind, uses, last use, and the stretch of age it has reached."""

    kind: Kind
    uses: int
    last_us: int
    stretch: int = 0


def _zeros() -> list[float]:
    return [0.0] * (_STRETCHES + 1)


@dataclass(slots=True)
class _Table:
    """A kind's life table, a value for each stretch, which includes its end and not its beginning.

    used, came: weighted, of the blocks that have left the stretch: those that were used in it, and
    all. waiting, entered_us: of the blocks that are in it: their number, and the sum of the moments
    at which they came.
    """

    used: list[float] = field(default_factory=_zeros)
    came: list[float] = field(default_factory=_zeros)
    waiting: list[int] = field(default_factory=lambda: [0] * (_STRETCHES + 1))
    entered_us: list[float] = field(default_factory=_zeros)

    def enter(self, life: _Life) -> None:
        self.waiting[life.stretch] += 1
        self.entered_us[life.stretch] += life.last_us + EDGES_US[life.stretch]

    def leave(self, life: _Life, weight: float) -> None:
        self.waiting[life.stretch] -= 1
        self.entered_us[life.stretch] -= life.last_us + EDGES_US[life.stretch]
        self.came[life.stretch] += weight

    def scale(self, factor: float) -> None:
        self.used = [factor * value for value in self.used]
        self.came = [factor * value for value in self.came]

    def totals(self, now_us: float, weight: float) -> Floats:
        """Who was used and who came, in each stretch: [2, stretches].

        A block that is still in a stretch counts as the part of it that it has seen.
        """
        seen_us = np.multiply(self.waiting, now_us) - self.entered_us
        came = np.array(self.came[:_STRETCHES]) + weight * seen_us[:_STRETCHES] / _WIDTHS_US
        totals: Floats = np.maximum(np.array([self.used[:_STRETCHES], came]), 0.0)
        return totals


class LifetimePredictor:
    """Predicts whether a block is used within some time, from its kind and its age since last use.

    What was seen `half_life_us` ago counts half. At most `max_blocks` blocks are followed; beyond
    that, the one that has waited longest is given up. A time before the latest counts as the
    latest.

    >>> lives = LifetimePredictor()
    >>> for second in range(0, 300, 10):  # block 7 every 10 s, and another one that never returns
    ...     lives.used([7, 1000 + second], now_us=second * 1_000_000)
    >>> chances = lives.reuse_probability([7, 1290], now_us=291_000_000, within_us=30_000_000)
    >>> bool(chances[0] > 0.9), bool(chances[1] < 0.1)
    (True, True)
    """

    def __init__(self, half_life_us: float = 600e6, max_blocks: int = 1 << 18) -> None:
        """Raises ValueError where a number is not more than 0."""
        for name, value in (("half_life_us", half_life_us), ("max_blocks", max_blocks)):
            if not value > 0:
                raise ValueError(f"{name} {value}: more than 0")
        self._half_life_us = half_life_us
        self._max_blocks = max_blocks
        self._lives: dict[int, _Life] = {}
        # The blocks that have reached a stretch and not the next, in the order of their last use.
        self._reached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(_STRETCHES + 1)]
        self._tables: dict[Kind, _Table] = {}
        self._now_us = 0
        self._weighed_since_us = 0
        self._known: dict[Kind | None, Floats] = {}
        self._risks_us: int | None = None

    def __len__(self) -> int:
        return len(self._lives)

    def used(self, block_hashes: Sequence[int], now_us: int) -> None:
        """A request used these blocks, which are a prefix: its first block first."""
        weight = self._advance(now_us)
        self._risks_us = None
        for depth, block_hash in enumerate(block_hashes):
            uses = 1
            if (known := self._lives.get(block_hash)) is not None:
                uses += known.uses
                self._tables[known.kind].used[known.stretch] += weight
                self._leave(block_hash, known, weight)
            life = _Life(kind_of(depth, uses), uses, self._now_us)
            self._lives[block_hash] = life
            self._enter(block_hash, life)
        while len(self._lives) > self._max_blocks:
            self.forget(next(block for reached in self._reached[::-1] for block in reached))

    def forget(self, block_hash: int) -> None:
        """Follow the block no longer; what it has taught stays."""
        if (life := self._lives.pop(block_hash, None)) is not None:
            self._leave(block_hash, life, self._weight())

    def followed(self) -> Iterator[int]:
        """The blocks that are followed."""
        return iter(tuple(self._lives))

    def reuse_probability(
        self, block_hashes: Sequence[int], now_us: int, within_us: float
    ) -> Floats:
        """P(used in the next `within_us` | not since its last use) of each block: [blocks].

        A block that is not followed is judged as one of all kinds that was used just now. Without
        any history the answer is 0. Raises ValueError where within_us is less than 0.
        """
        if not within_us >= 0:
            raise ValueError(f"within_us {within_us}: 0 or more")
        self._advance(now_us)
        risks = self._known_risks()
        lives = [self._lives.get(block_hash) for block_hash in block_hashes]
        ages_us = np.array([self._now_us - life.last_us if life else 0 for life in lives], float)
        rows_of: dict[Kind | None, list[int]] = {}
        for row, life in enumerate(lives):
            rows_of.setdefault(life.kind if life else None, []).append(row)
        risk = np.zeros(len(lives))
        for kind, rows in rows_of.items():
            end = np.interp(ages_us[rows] + within_us, EDGES_US, risks[kind])
            risk[rows] = end - np.interp(ages_us[rows], EDGES_US, risks[kind])
        return -np.expm1(-np.maximum(risk, 0.0))

    def _known_risks(self) -> dict[Kind | None, Floats]:
        """`_risks`, renewed after each use, and when time has gone on by the shortest stretch."""
        if self._risks_us is None or self._now_us - self._risks_us > EDGES_US[1]:
            self._known, self._risks_us = self._risks(self._weight()), self._now_us
        return self._known

    def _risks(self, weight: float) -> dict[Kind | None, Floats]:
        """Of each kind, and of all together as None: the risk of a use up to each edge of age."""
        nothing = np.zeros((2, _STRETCHES))
        totals: dict[Kind | None, Floats] = {None: nothing}
        for kind, table in self._tables.items():
            totals[kind] = table.totals(self._now_us, weight)
        prior_blocks = weight * _PRIOR_BLOCKS
        chance, anyones = 0.0, np.zeros(_STRETCHES)
        for stretch, (used, came) in enumerate(sum(totals.values(), nothing).T):
            chance = (used + prior_blocks * chance) / (came + prior_blocks)
            anyones[stretch] = chance
        risks: dict[Kind | None, Floats] = {}
        for one, (used, came) in totals.items():
            chances = (used + prior_blocks * anyones) / (came + prior_blocks)
            risk = -np.log1p(-np.minimum(chances, _MOST_CERTAIN))
            risks[one] = np.concatenate(([0.0], np.cumsum(risk)))
        return risks

    def _advance(self, now_us: int) -> float:
        """Time goes on: blocks reach further stretches. What is seen now weighs so much."""
        self._now_us = max(self._now_us, now_us)
        weight = self._weight()
        for stretch in range(_STRETCHES):
            reached, end_us = self._reached[stretch], EDGES_US[stretch + 1]
            while reached:
                block_hash = next(iter(reached))
                life = self._lives[block_hash]
                if life.last_us + end_us >= self._now_us:
                    break
                self._leave(block_hash, life, weight)
                life.stretch += 1
                self._enter(block_hash, life)
        return weight

    def _enter(self, block_hash: int, life: _Life) -> None:
        self._reached[life.stretch][block_hash] = None
        if (table := self._tables.get(life.kind)) is None:
            table = self._tables[life.kind] = _Table()
        table.enter(life)

    def _leave(self, block_hash: int, life: _Life, weight: float) -> None:
        del self._reached[life.stretch][block_hash]
        self._tables[life.kind].leave(life, weight)

    def _weight(self) -> float:
        """What is seen now weighs twice as much as what was seen a half-life ago."""
        halvings = (self._now_us - self._weighed_since_us) / self._half_life_us
        if halvings <= _HALVINGS:
            return float(2.0**halvings)
        for table in self._tables.values():
            table.scale(2.0**-halvings)
        self._weighed_since_us = self._now_us
        return 1.0
