"""Where the prompt's beginning is cached, unless that instance has too much to do."""

import bisect
import dataclasses
import itertools
import math

from sagec.runtime.state import Ints, State
from sagec.runtime.strategies.choosers._load import Load, in_turn


@dataclasses.dataclass(frozen=True)
class PrefixAware:
    """The instance of the least cost, as Dynamo's router reckons it, in KV blocks:

    cost = prefill_scale * max(to compute - credit, 0) + in use + active_weight * requests
    credit = cache_credit * cached blocks / (1 + credit_decay * excess / blocks of the prompt)

    What is to compute and what is in use count the row itself; the excess is what an instance has
    to compute more than the one with the least. temperature 0 takes the least cost, equals by lot;
    above 0 every instance may be taken, cheap ones more often (softmax of the costs' share of
    their range). Lots are drawn from the round and the request, so that they fall the same again.
    """

    prefill_scale: float = 1.0
    cache_credit: float = 1.0
    credit_decay: float = 0.0
    active_weight: float = 0.0
    temperature: float = 0.0
    name = "prefix-aware"

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """The instance of the least cost for each row, or one drawn by cost."""
        cached = self.cache_credit * state.cached_tokens[rows] / state.instances.block_tokens
        credits: list[list[float]] = cached.tolist()
        sequence = state.waiting.sequence[rows].tolist()

        def pick(load: Load, row: int, there: list[int]) -> int:
            costs = self._costs(load, row, there, credits[row])
            least = min(costs)
            if costs.count(least) == 1 and not self.temperature > 0:
                return there[costs.index(least)]
            scale = (max(costs) - least) * self.temperature
            weights = [
                math.exp((least - cost) / scale) if scale > 0 else float(cost == least)
                for cost in costs
            ]
            return there[_drawn(weights, lot(state.round, sequence[row]))]

        return in_turn(state, rows, phase, pick)

    def _costs(self, load: Load, row: int, there: list[int], credits: list[float]) -> list[float]:
        need, used, requests = load.need_blocks[row], load.used_blocks, load.requests
        tokens, block_tokens = load.pending_tokens, load.block_tokens
        pending = [tokens[i] / block_tokens[i] for i in there]
        if self.credit_decay > 0:
            least, decay = min(pending), self.credit_decay
            credits = credits.copy()
            for i, blocks in zip(there, pending, strict=True):
                credits[i] /= 1 + decay * (blocks - least) / need[i]
        scale, active = self.prefill_scale, self.active_weight
        costs = []
        for i, blocks in zip(there, pending, strict=True):
            to_compute = blocks + need[i] - credits[i]
            prefill = scale * to_compute if to_compute > 0 else 0.0
            costs.append(prefill + used[i] + need[i] + active * requests[i])
        return costs


def _drawn(weights: list[float], lot: float) -> int:
    """The index under whose share of the weights' sum the lot, in [0, 1), falls."""
    ends = list(itertools.accumulate(weights))
    return min(bisect.bisect_right(ends, lot * ends[-1]), len(ends) - 1)


def lot(round_number: int, sequence: int) -> float:
    """A number in [0, 1) that depends on nothing else, evenly spread (the splitmix64 mixer)."""
    mask = 2**64 - 1
    mixed = (round_number * 0x9E3779B97F4A7C15 + sequence * 0xD1B54A32D192ED03 + 1) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return ((mixed ^ (mixed >> 31)) >> 11) / 2**53
