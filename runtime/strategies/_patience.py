"""Nobody waits for ever behind those that are always served first; for strategies."""

import dataclasses

import numpy as np

from sagec.runtime.state import Ints, State

DEBT = "overdue_debt_tokens"
"""Under this name a memory holds, by model, the tokens that overdue rows had beyond their share."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """Rows that waited longer than wait_us are overdue, and get a share of the prompt tokens.

    The oldest overdue row of a model goes before everybody, unless overdue rows have had more than
    `share` of what was admitted since: then others go first until that is made up. So whoever waits
    is served after a bounded number of others' tokens, and these keep the rest.
    """

    wait_us: int
    share: float

    def first(self, state: State, behind: Ints) -> Ints:
        """Of the rows that go behind others, those that go first now: of each model at most one."""
        debts = state.memory.get(DEBT, {})
        waiting, chosen = state.waiting, {}
        for row in self._overdue(state, behind).tolist():
            model = waiting.model[row]
            if model not in chosen and debts.get(model, 0) <= 0:
                chosen[model] = row
        return np.array(list(chosen.values()), np.int64)

    def remembered(
        self, state: State, behind: Ints, first: Ints, admitted: Ints
    ) -> dict[str, dict[str, int]]:
        """What to remember of this round; nothing of a model for which nobody is overdue."""
        waiting, debts = state.waiting, state.memory.get(DEBT, {})
        overdue = self._overdue(state, behind)
        if not len(overdue):
            return {}
        had = np.isin(admitted, first)
        remembered = {}
        for model in sorted(set(waiting.model[overdue].tolist())):
            here = waiting.model[admitted] == model
            tokens = waiting.prompt_tokens[admitted]
            mine, others = int(tokens[here & had].sum()), int(tokens[here & ~had].sum())
            debt = debts.get(model, 0) + (1 - self.share) * mine - self.share * others
            if debt > 0:
                remembered[model] = round(debt)
        return {DEBT: remembered} if remembered else {}

    def _overdue(self, state: State, rows: Ints) -> Ints:
        """Those of the rows that have waited too long, the first to come first."""
        waiting = state.waiting
        late = rows[state.now_us - waiting.arrival_us[rows] >= self.wait_us]
        if not len(late):
            return late
        return late[np.lexsort((waiting.sequence[late], waiting.arrival_us[late]))]
