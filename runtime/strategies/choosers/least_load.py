"""Where there is most room for each request."""

import dataclasses

import numpy as np

from sagec.runtime.state import Ints, State
from sagec.runtime.strategies.choosers._load import Load, in_turn


@dataclasses.dataclass(frozen=True)
class LeastLoad:
    """The instance with the most freeness, as Llumnix calls it: KV blocks a request that are free.

    freeness = (blocks - virtual usage) / requests. The virtual usage is what requests hold, what
    rows that were just sent there will, and headroom_blocks for each request that runs there with
    a priority value below 0, so that others keep away from it.
    """

    headroom_blocks: int = 0
    name = "least-load"

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """The freest instance for each row; the first of equals."""
        running = state.running
        urgent = running.decode_on[running.priority < 0]
        count = np.bincount(urgent, minlength=len(state.instances))
        headroom = (self.headroom_blocks * count).tolist()

        def pick(load: Load, row: int, there: list[int]) -> int:
            kv_blocks, used, requests = load.kv_blocks, load.used_blocks, load.requests
            freeness = [(kv_blocks[i] - used[i] - headroom[i]) / (requests[i] or 1) for i in there]
            return there[freeness.index(max(freeness))]

        return in_turn(state, rows, phase, pick)
