"""Deficit round robin: tenants take turns, each with so many tokens a turn."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from sagec.runtime.state import Ints, Strings


@dataclasses.dataclass(frozen=True, eq=False)
class Turns:
    """The order in which one queue's rows are served, and how to go on after some of them.

    names, deficits: tenants in the order of their turns, with the tokens they have left; amid: the
    last tenant's turn is not over. tokens: what each row costs; of: whose it is; visit: in which
    round of turns it is served. order: rows, the first to be served first.
    """

    names: list[str]
    deficits: Ints
    tokens: Ints
    of: Ints
    visit: Ints
    order: Ints
    quantum_tokens: int
    amid: bool

    @staticmethod
    def over(
        tenants: Strings, tokens: Ints, memory: Mapping[str, Any], quantum_tokens: int
    ) -> "Turns":
        """Turns over a queue's rows, which are in the order in which each tenant wants them.

        A tenant's turn adds the quantum to its deficit and serves rows while they cost no more
        than that. Who has no row now has lost what was left; who is new comes last.
        """
        before = dict(memory.get("turns", ()))
        there = list(dict.fromkeys(tenants.tolist()))
        stayed = [name for name in before if name in there]
        new = [name for name in there if name not in before]
        amid = bool(memory.get("amid")) and stayed[-1:] == list(before)[-1:]
        names = stayed[:-1] + new + stayed[-1:] if amid else stayed + new
        position = {name: at for at, name in enumerate(names)}
        of = np.array([position[name] for name in tenants.tolist()], np.int64)
        deficits = np.array([before.get(name, 0) for name in names], np.int64)
        needed = _sums_within(of, tokens) - deficits[of]
        # The last tenant may be amid its turn, which goes on before the others have theirs.
        least = np.ones(len(names), np.int64)
        least[-1:] = 0 if amid else 1
        visit = np.maximum(-(-needed // quantum_tokens), least[of])
        order = np.lexsort((np.arange(len(of)), of, visit))
        return Turns(names, deficits, tokens, of, visit, order, quantum_tokens, amid)

    def remembered(self, num_served: int) -> dict[str, Any]:
        """What to remember after the first so many rows of `order` were served."""
        if not num_served:
            return self._memory(self.deficits, np.arange(len(self.names)), self.amid)
        served, last = self.order[:num_served], self.order[num_served - 1]
        position = np.arange(len(self.names))
        visits = np.maximum(self.visit[last] - (position > self.of[last]), 0)
        spent = np.bincount(self.of[served], self.tokens[served], len(self.names))
        deficits = self.deficits + self.quantum_tokens * visits - spent.astype(np.int64)
        left = self.of[self.order[num_served:]]
        waits = np.bincount(left, minlength=len(position)) > 0
        turned = (position + 1 + self.of[last]) % len(position)
        return self._memory(deficits, turned[waits[turned]], bool(waits[self.of[last]]))

    def _memory(self, deficits: Ints, positions: Ints, amid: bool) -> dict[str, Any]:
        turns = [[self.names[at], int(deficits[at])] for at in positions.tolist()]
        return {"turns": turns, "amid": amid}


def _sums_within(group: Ints, values: Ints) -> Ints:
    """Of each value, the sum of those of its group up to it."""
    order = np.argsort(group, kind="stable")
    sums, grouped = np.cumsum(values[order]), group[order]
    first = np.searchsorted(grouped, grouped)
    within = np.empty(len(group), np.int64)
    within[order] = sums - sums[first] + values[order][first]
    return within
