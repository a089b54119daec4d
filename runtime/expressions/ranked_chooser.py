"""Where admitted requests go, by `prefill on` and `decode on`."""

from collections.abc import Sequence

import numpy as np

from sagec.runtime.expressions.compiled import Ranking
from sagec.runtime.expressions.rules import Key
from sagec.runtime.expressions.values import PlacingValues
from sagec.runtime.state import Ints, State
from sagec.runtime.strategies import choosers
from sagec.runtime.strategies.choosers._load import Load, in_turn


class RankedChooser:
    """The instance that ranks first by a phase's keys, of those that have room; without keys, the
    one with the least load."""

    name = "ranked"

    def __init__(self, prefill_on: Sequence[Key], decode_on: Sequence[Key]) -> None:
        keys = {choosers.PREFILL: prefill_on, choosers.DECODE: decode_on}
        self._rankings = {phase: Ranking(given) for phase, given in keys.items() if given}
        self._otherwise = choosers.create("least-load")

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """An instance for each row, ANY where none has room."""
        ranking = self._rankings.get(phase)
        if ranking is None:
            return self._otherwise.choose(state, rows, phase)

        def pick(load: Load, row: int, there: list[int]) -> int:
            columns = ranking.columns(PlacingValues(load, row), len(state.instances))
            if len(columns) == 1:
                return there[int(np.argmin(columns[0][there]))]
            return there[int(np.lexsort([column[there] for column in columns[::-1]])[0])]

        return in_turn(state, rows, phase, pick)
