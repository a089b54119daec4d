"""Whether a block whose room is needed moves to a slower tier, or is dropped."""

from collections.abc import Sequence
from typing import Protocol

from sagec.runtime.clock import Clock, WallClock
from sagec.runtime.kv.lifetime import LifetimePredictor
from sagec.runtime.kv.migration import DEVICE, DISK, HOST, Candidates, CostBenefit
from sagec.runtime.kv.tiers import Tiers

HORIZON_US = 60e6
"""A block that is not used again within a minute is not kept for its own sake."""

FIRST_BYTES_PER_S = {
    (DEVICE, HOST): 5e9,
    (HOST, DEVICE): 5e9,
    (HOST, DISK): 5e8,
    (DISK, HOST): 5e8,
}
"""What copies are taken to do before the first one was measured."""

_NEWEST = 0.2
"""Weight of the newest step in the pace of computing."""


class Demotion(Protocol):
    """Judges blocks that leave their tier.

    used: a request asks for these blocks, a prefix. computed: prompt tokens took so long. pays:
    whether a block that leaves `source` is worth the move to `target`.
    """

    def used(self, block_hashes: Sequence[int]) -> None: ...
    def computed(self, tokens: int, us: int) -> None: ...
    def pays(self, block_hash: int, source: int, target: int) -> bool: ...


class Always:
    """Every block moves on, as long as there are tiers."""

    def used(self, block_hashes: Sequence[int]) -> None:
        """What is used does not matter."""

    def computed(self, tokens: int, us: int) -> None:
        """Nor what it would cost to compute."""

    def pays(self, block_hash: int, source: int, target: int) -> bool:
        """Always."""
        return True


class WhereItPays:
    """Blocks move where that is likely to save more time than it costs.

    How likely a block is used again is learned from the blocks that were asked for, how fast tiers
    copy and how long computing takes is measured. Before anything was computed, every block moves.
    """

    def __init__(self, tiers: Tiers, block_tokens: int, clock: Clock | None = None) -> None:
        self._tiers = tiers
        self._block_tokens = block_tokens
        self._clock = clock or WallClock()
        self._lives = LifetimePredictor()
        self._us_per_token: float | None = None

    def used(self, block_hashes: Sequence[int]) -> None:
        """Learn from what is used, and from what is not."""
        self._lives.used(block_hashes, self._clock.now_us())

    def computed(self, tokens: int, us: int) -> None:
        """The last steps count most."""
        pace = us / tokens
        older = self._us_per_token
        self._us_per_token = pace if older is None else older + _NEWEST * (pace - older)

    def pays(self, block_hash: int, source: int, target: int) -> bool:
        """Whether the expected gain is more than nothing."""
        if self._us_per_token is None:
            return True
        chance = self._lives.reuse_probability([block_hash], self._clock.now_us(), HORIZON_US)
        model = CostBenefit(
            block_bytes=self._tiers.block_bytes,
            block_tokens=self._block_tokens,
            prefill_us_per_token=self._us_per_token,
            bytes_per_s=self._bytes_per_s(),
        )
        leaving = Candidates.of([block_hash], source, chance, leaving=True)
        return bool(model.gain_us(leaving, target)[0] > 0)

    def _bytes_per_s(self) -> dict[tuple[int, int], float]:
        moved = self._tiers.statistics().moved
        measured = {(pair.source, pair.target): pair.bytes_per_s for pair in moved if pair.us}
        return {**FIRST_BYTES_PER_S, **measured}
