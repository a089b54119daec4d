"""One instance after the other."""

import collections
import dataclasses

from sagec.runtime.state import Ints, State
from sagec.runtime.strategies.choosers._load import PLACED, Load, in_turn


@dataclasses.dataclass(frozen=True)
class RoundRobin:
    """One instance after the other, each model's by itself; one without room loses its turn.

    Whose turn it is follows from how many rows were placed so far, which the memory says.
    """

    name = "round-robin"

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """The next in turn for each row."""
        turn: collections.Counter[str] = collections.Counter(state.memory.get(PLACED, {}))

        def pick(load: Load, row: int, there: list[int]) -> int:
            able, model = load.able(row), load.models[row]
            first = turn[model] % len(able)
            turn[model] += 1
            return next(i for i in able[first:] + able[:first] if i in there)

        return in_turn(state, rows, phase, pick)
