"""Where the prompt's beginning is cached, while the load is even."""

import dataclasses

from sagec.runtime.state import Ints, State
from sagec.runtime.strategies.choosers._load import Load, in_turn


@dataclasses.dataclass(frozen=True)
class CacheAware:
    """SGLang's rule: by load where that is uneven, else by what is cached.

    Uneven: the most requests on an instance are more than those of the least by `uneven_by`, and
    more than `uneven_ratio` times those; then the least loaded. Else the instance with the longest
    cached beginning, if that is more than `match_rate` of the prompt; else the one whose KV is the
    emptiest, so that caches grow alike.
    """

    uneven_by: int = 64
    uneven_ratio: float = 1.5
    match_rate: float = 0.3
    name = "cache-aware"

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """The instance that the rule gives for each row; the first of equals."""
        cached_tokens = state.cached_tokens[rows].tolist()

        def pick(load: Load, row: int, there: list[int]) -> int:
            requests = [load.requests[i] for i in load.able(row)]
            most, least = max(requests), min(requests)
            if most - least > self.uneven_by and most > self.uneven_ratio * least:
                return min(there, key=load.requests.__getitem__)
            cached = cached_tokens[row]
            nearest = max(there, key=cached.__getitem__)
            if cached[nearest] > self.match_rate * load.prompt_tokens[row]:
                return nearest
            return min(there, key=load.used_blocks.__getitem__)

        return in_turn(state, rows, phase, pick)
