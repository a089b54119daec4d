"""Which cached blocks move between device, host and disk: what a move brings against what it costs.

A block is worth the time that it is likely to save. In tier t, whose blocks take `fetch_us(t)` to
reach the device, that is

    value_us(t) = P(it is used again within the horizon) x max(recompute_us - fetch_us(t), 0)

and a dropped block is worth nothing. A move from s to t brings value_us(t) - value_us(s), or all of
value_us(t) where the block would be dropped otherwise. It costs the time it takes, at `link_price`:
links work in the background, so that their time is worth less than a request's.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sagec.runtime.plan import EMPTY, Column, Evictions, Migrations

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

DEVICE, HOST, DISK = 0, 1, 2
TIERS = ("device", "host", "disk")
"""Names of the tiers, whose numbers a plan's migrations use."""


@dataclass(frozen=True)
class Candidates:
    """Cached blocks that may move, a row each; ancestors before their descendants.

    tier: where the block lies. reuse_probability: that it is used again within the caller's
    horizon. leaving: its room is needed, so that it is dropped unless it moves.
    """

    block_hash: Column
    tier: Column
    reuse_probability: Floats
    leaving: Flags

    @classmethod
    def of(
        cls,
        block_hash: npt.ArrayLike,
        tier: npt.ArrayLike,
        reuse_probability: npt.ArrayLike,
        leaving: npt.ArrayLike = False,
    ) -> "Candidates":
        """Rows from anything like an array; a single value holds for every row.

        Raises ValueError where a tier or a probability is none.
        """
        hashes = np.asarray(block_hash, np.int64)
        tiers = np.broadcast_to(np.asarray(tier, np.int64), hashes.shape)
        chances = np.broadcast_to(np.asarray(reuse_probability, np.float64), hashes.shape)
        if (bad := np.flatnonzero((tiers < 0) | (tiers >= len(TIERS)))).size:
            raise ValueError(f"tier[{bad[0]}]: {tiers[bad[0]]} is not in [0, {len(TIERS)})")
        if (bad := np.flatnonzero(~((chances >= 0) & (chances <= 1)))).size:
            raise ValueError(f"reuse_probability[{bad[0]}]: {chances[bad[0]]} is not in [0, 1]")
        return cls(hashes, tiers, chances, np.broadcast_to(np.asarray(leaving, bool), hashes.shape))

    def __len__(self) -> int:
        return len(self.block_hash)


@dataclass(frozen=True)
class MigrationPlan:
    """What moves, in this order, after the blocks of `drops` have gone from their tiers.

    gain_us, reasons: of each move: what it is expected to save beyond its cost, and why it is made.
    """

    migrations: Migrations = field(default_factory=Migrations)
    drops: Evictions = field(default_factory=Evictions)
    gain_us: Floats = field(default_factory=lambda: np.zeros(0))
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class CostBenefit:
    """The policy of migration between tiers.

    block_bytes, block_tokens: of a block. prefill_us_per_token: what computing it again takes.
    bytes_per_s: of a copy from one tier to another; between device and disk it goes through host
    memory where no figure is given. link_price: what a microsecond of a link costs, against one
    that a request waits. A block is fetched early, before a request asks for it, where it is
    likelier than this to be asked for.

    Raises ValueError where a number cannot be.
    """

    block_bytes: int
    block_tokens: int
    prefill_us_per_token: float
    bytes_per_s: Mapping[tuple[int, int], float]
    link_price: float = 0.25

    def __post_init__(self) -> None:
        for name in ("block_bytes", "block_tokens", "prefill_us_per_token", "link_price"):
            if not 0 <= (value := getattr(self, name)) < np.inf:
                raise ValueError(f"{name} {value}: a number, 0 or more")
        for (source, target), speed in self.bytes_per_s.items():
            if not {source, target} <= set(range(len(TIERS))) or source == target:
                raise ValueError(f"bytes_per_s[{source}, {target}]: two different tiers of 0, 1, 2")
            if not speed > 0:
                raise ValueError(f"bytes_per_s[{source}, {target}] {speed}: more than 0")

    @property
    def recompute_us(self) -> float:
        """Time to compute a block again."""
        return self.block_tokens * self.prefill_us_per_token

    def move_us(self, source: int, target: int) -> float:
        """Time to copy a block from one tier to another; infinite where nothing leads there."""
        if source == target:
            return 0.0
        if speed := self.bytes_per_s.get((source, target)):
            return 1e6 * self.block_bytes / speed
        if HOST in (source, target):
            return np.inf
        return self.move_us(source, HOST) + self.move_us(HOST, target)

    def fetch_us(self, tier: int) -> float:
        """Time until a block of this tier is on the device."""
        return self.move_us(tier, DEVICE)

    def value_us(self, tier: int, reuse_probability: npt.ArrayLike) -> Floats:
        """Time that a block in this tier is expected to save."""
        saved_us = max(self.recompute_us - self.fetch_us(tier), 0.0)
        return np.asarray(np.multiply(reuse_probability, saved_us), np.float64)

    def gain_us(self, candidates: Candidates, target: int) -> Floats:
        """What moving each candidate to `target` brings beyond its cost, as if there were room."""
        kept = np.stack([self.value_us(t, candidates.reuse_probability) for t in range(len(TIERS))])
        rows = np.arange(len(candidates))
        before = np.where(candidates.leaving, 0.0, kept[candidates.tier, rows])
        cost = np.array([self.cost_us(tier, target) for tier in range(len(TIERS))])
        gain = kept[target] - before - cost[candidates.tier]
        return np.where(candidates.tier == target, -np.inf, gain)

    def cost_us(self, source: int, target: int) -> float:
        """What a move costs: its time, at the price of the link."""
        time_us = self.move_us(source, target)
        return time_us if time_us == np.inf else self.link_price * time_us

    def plan(self, candidates: Candidates, room_blocks: Sequence[int]) -> MigrationPlan:
        """The moves worth making, where each tier has room for so many blocks more.

        The best gain goes first. Where a tier is full, a block takes the place of the candidate
        there that is least likely to be used, if it gains more than that one loses; the other one
        moves to a tier below, or is dropped. A block that moves by choice leaves room behind; the
        room of a leaving one is its caller's.

        Raises ValueError where there is not a number, 0 or more, for each tier.
        """
        if len(room_blocks) != len(TIERS) or min(room_blocks) < 0:
            raise ValueError(f"room_blocks {list(room_blocks)}: 0 or more for each of 3 tiers")
        gains = np.stack([self.gain_us(candidates, tier) for tier in range(len(TIERS))])
        choice = _Choice(self, candidates, room_blocks)
        tiers, rows = np.nonzero(gains > 0)
        for at in np.lexsort((tiers, rows, -gains[tiers, rows])).tolist():
            choice.consider(int(rows[at]), int(tiers[at]), float(gains[tiers[at], rows[at]]))
        return choice.plan()


class _Choice:
    """A plan in the making: who goes where, and what room that leaves."""

    def __init__(
        self, model: CostBenefit, candidates: Candidates, room_blocks: Sequence[int]
    ) -> None:
        self._model = model
        self._candidates = candidates
        self._room = list(room_blocks)
        self._settled: set[int] = set()
        self._moves: list[tuple[int, int, float, str]] = []
        self._drops: list[int] = []
        # Of each tier, its candidates that may stay: the least likely to be used first, and of
        # equal ones the last, for it may be a descendant of the others.
        self._stayers: list[list[tuple[float, int]]] = [[] for _ in TIERS]
        for row in np.flatnonzero(~candidates.leaving).tolist():
            chance = float(candidates.reuse_probability[row])
            self._stayers[int(candidates.tier[row])].append((chance, -row))
        for stayers in self._stayers:
            heapq.heapify(stayers)

    def consider(self, row: int, target: int, gain_us: float) -> None:
        """Move the row if that pays, with what it displaces, and if it has not gone elsewhere."""
        if row in self._settled:
            return
        if not self._room[target]:
            gain_us -= self._make_room(row, target, gain_us)
        if self._room[target]:
            self._move(row, target, gain_us, self._why(row, target))

    def plan(self) -> MigrationPlan:
        """What was chosen."""
        rows = np.array([row for row, *_ in self._moves], np.int64)
        hashes, tier = self._candidates.block_hash, self._candidates.tier
        return MigrationPlan(
            migrations=Migrations(
                block_hash=hashes[rows],
                source_tier=tier[rows],
                target_tier=np.array([target for _, target, _, _ in self._moves], np.int64),
            ),
            drops=Evictions(block_hash=hashes[self._drops] if self._drops else EMPTY),
            gain_us=np.array([gain_us for _, _, gain_us, _ in self._moves], np.float64),
            reasons=tuple(reason for *_, reason in self._moves),
        )

    def _make_room(self, row: int, tier: int, gain_us: float) -> float:
        """Displace the least likely block of a full tier if `gain_us` pays for it; what it cost."""
        stayers = self._stayers[tier]
        while stayers and -stayers[0][1] in self._settled:
            heapq.heappop(stayers)
        if not stayers:
            return 0.0
        chance, other = stayers[0][0], -stayers[0][1]
        below, kept_us = self._best_below(tier, chance)
        lost_us = float(self._model.value_us(tier, chance)) - kept_us
        if lost_us >= gain_us:
            return 0.0
        heapq.heappop(stayers)
        if below is None:
            self._settled.add(other)
            self._drops.append(other)
            self._room[tier] += 1
        else:
            name = f"{self._candidates.block_hash[row]}"
            self._move(other, below, kept_us, f"makes room for block {name}, which gains more")
        return lost_us

    def _best_below(self, tier: int, chance: float) -> tuple[int | None, float]:
        """The slower tier with room that is best for a displaced block, and what it brings."""
        best: tuple[int | None, float] = (None, 0.0)
        for below in range(tier + 1, len(TIERS)):
            kept_us = float(self._model.value_us(below, chance)) - self._model.cost_us(tier, below)
            if self._room[below] and kept_us > best[1]:
                best = below, kept_us
        return best

    def _move(self, row: int, target: int, gain_us: float, reason: str) -> None:
        self._settled.add(row)
        self._moves.append((row, target, gain_us, reason))
        self._room[target] -= 1
        if not self._candidates.leaving[row]:
            self._room[int(self._candidates.tier[row])] += 1

    def _why(self, row: int, target: int) -> str:
        model, source = self._model, int(self._candidates.tier[row])
        chance = f"{100 * self._candidates.reuse_probability[row]:.0f}% likely to be used again"
        other_us = model.recompute_us if self._candidates.leaving[row] else model.fetch_us(source)
        what = "recompute" if self._candidates.leaving[row] else f"fetch from {TIERS[source]}"
        return (
            f"{chance}: {model.fetch_us(target):.0f} us to fetch from {TIERS[target]} against "
            f"{other_us:.0f} us to {what}; the move takes {model.move_us(source, target):.0f} us"
        )
