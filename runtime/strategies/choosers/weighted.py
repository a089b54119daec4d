"""Requests in proportion to what instances can do."""

import dataclasses

from sagec.runtime.state import Instances, Ints, State
from sagec.runtime.strategies.choosers._load import Load, in_turn


@dataclasses.dataclass(frozen=True)
class Weighted:
    """As many requests on each instance as is its share of all KV blocks.

    by_speed: its share of what is measured instead, of prompt tokens a second where prompts are
    placed and of decode steps a second else; an instance that nobody has measured counts as the
    fastest, so that it will be.
    """

    by_speed: bool = False
    name = "weighted"

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """The instance that is furthest below its share for each row; the first of equals."""
        weight = _speeds(state.instances, phase) if self.by_speed else None
        weights = [float(w) for w in (weight or state.instances.kv_blocks.tolist())]

        def pick(load: Load, row: int, there: list[int]) -> int:
            requests = load.requests
            shares = [(requests[i] + 1) / weights[i] for i in there]
            return there[shares.index(min(shares))]

        return in_turn(state, rows, phase, pick)


def _speeds(instances: Instances, phase: str) -> list[float]:
    """One by the time that a token or step takes, by instance."""
    times = instances.prefill_ns_per_token if phase == "prefill" else instances.decode_step_us
    fastest = min((time for time in times.tolist() if time > 0), default=1)
    return [1.0 / (time if time > 0 else fastest) for time in times.tolist()]
