"""What a `strategy` statement says, as data, and its canonical text."""

import dataclasses
from collections.abc import Sequence

from sagec.runtime.expressions.tree import Expression, Name
from sagec.runtime.expressions.units import Unit


@dataclasses.dataclass(frozen=True)
class Key:
    """Something to rank by: its smallest value first, or its largest."""

    expression: Expression
    largest: bool = False


BY_ARRIVAL = (Key(Name("arrival", Unit.MOMENT)),)
LATEST, OLDEST = (Key(BY_ARRIVAL[0].expression, largest) for largest in (True, False))
"""Keys with a word of their own where somebody has to leave."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The rules of a strategy; those that it lacks are empty.

    order, prefill_on, decode_on, preempt: the first key decides, the next among equals. Without
    `order` requests go by arrival; without `preempt` the latest leaves where KV runs out.
    place_by: a chooser. mode, chunk_tokens, horizon_steps: as in Decision.
    """

    name: str
    order: tuple[Key, ...] = ()
    admit: Expression | None = None
    reject: Expression | None = None
    place_by: str = ""
    prefill_on: tuple[Key, ...] = ()
    decode_on: tuple[Key, ...] = ()
    preempt: tuple[Key, ...] = ()
    preempt_when: Expression | None = None
    mode: str = ""
    chunk_tokens: int = 0
    horizon_steps: int = 0

    def __str__(self) -> str:
        """The statement, a rule a line."""
        lines = {
            "order by": _order_text(self.order),
            "admit while": str(self.admit or ""),
            "reject when": str(self.reject or ""),
            "place by": self.place_by,
            "prefill on": _instances_text(self.prefill_on),
            "decode on": _instances_text(self.decode_on),
            "preempt": self._preempt_text,
            "mode": self.mode,
            "chunk": str(self.chunk_tokens or ""),
            "horizon": str(self.horizon_steps or ""),
        }
        rules = [f"  {rule} {text}\n" for rule, text in lines.items() if text]
        return f"strategy {self.name} {{\n{''.join(rules)}}}\n"

    @property
    def order_text(self) -> str:
        """The rule of the order, which there is in any case."""
        return f"order by {_order_text(self.order or BY_ARRIVAL)}"

    @property
    def _preempt_text(self) -> str:
        when = f" when {self.preempt_when}" if self.preempt_when is not None else ""
        words = {LATEST: "latest", OLDEST: "oldest"}
        return ", ".join(words.get(key) or _directed(key) for key in self.preempt) + when


def _order_text(keys: Sequence[Key]) -> str:
    return ", ".join(f"{key.expression}{' desc' if key.largest else ''}" for key in keys)


def _instances_text(keys: Sequence[Key]) -> str:
    return ", ".join(f"{'max' if key.largest else 'min'}({key.expression})" for key in keys)


def _directed(key: Key) -> str:
    return f"{'max' if key.largest else 'min'} {key.expression}"
