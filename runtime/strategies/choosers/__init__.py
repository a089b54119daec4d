"""Choosers: on which instance a request is to be computed; one file each, found by its name.

The chooser `least-load` is the class `LeastLoad` in `least_load.py`; nothing else lists it. It is a
frozen dataclass, and its fields are its options. Strategies ask it for all rows that they would
admit, a router for the one that came.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from sagec.runtime import by_name
from sagec.runtime.state import ANY, Bools, Ints, State
from sagec.runtime.strategies import StrategyError
from sagec.runtime.strategies._room import room_tokens, whole_tokens
from sagec.runtime.strategies.choosers._load import PLACED

PREFILL, DECODE = "prefill", "decode"


class Chooser(Protocol):
    """Chooses and changes nothing: the same state and rows, the same choice."""

    @property
    def name(self) -> str: ...

    def choose(self, state: State, rows: Ints, phase: str) -> Ints:
        """An instance for each of these rows of `state.waiting`, ANY where none has room.

        phase: PREFILL or DECODE. Rows chosen for earlier in the same call count as load.
        """
        ...


def known() -> list[str]:
    """Names of the choosers that lie in this folder.

    >>> "least-load" in known()
    True
    """
    return by_name.names(__path__)


def create(name: str, options: Mapping[str, Any] | None = None) -> Chooser:
    """The chooser of this name, with these of its options changed.

    Raises StrategyError where there is no such chooser or option, or a value is of a wrong type.
    """
    kind = class_of(name)
    found = by_name.options_of(kind, f"chooser {name}", options, StrategyError)
    chooser: Chooser = kind(**found)
    return chooser


def class_of(name: str) -> Any:
    """The class of the chooser of this name. Raises StrategyError where there is none."""
    if name not in known():
        raise StrategyError(by_name.no_such("chooser", name, known()))
    return by_name.class_of(__name__, name)


@functools.cache
def named(name: str) -> Chooser:
    """The chooser of this name with its options as they are; made once, for use in each round."""
    return create(name)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where rows are to prefill and decode, ANY where no instance has room."""

    prefill_on: Ints
    decode_on: Ints

    @property
    def fits(self) -> Bools:
        """Rows that have both."""
        both: Bools = (self.prefill_on != ANY) & (self.decode_on != ANY)
        return both


def place(chooser: Chooser, state: State, rows: Ints) -> Placement:
    """Places for both phases of these waiting rows; earlier rows count as load for later ones.

    A row stays where it prefills if it can decode there to its end; else the chooser is asked
    again, with the room that the prompts will take gone.
    """
    instances = state.instances
    prefill_on = chooser.choose(state, rows, PREFILL)
    placed = np.flatnonzero(prefill_on != ANY)
    at, those = prefill_on[placed], rows[placed]
    stays = instances.decodes[at] & (
        whole_tokens(state.waiting, those) <= room_tokens(instances)[at]
    )
    decode_on = np.full(len(rows), ANY, np.int64)
    decode_on[placed[stays]] = at[stays]
    if not stays.all():
        used = instances.kv_blocks_used.copy()
        prompt_blocks = -(-(state.waiting.prompt_tokens[those] + 1) // instances.block_tokens[at])
        np.add.at(used, at, prompt_blocks)
        then = dataclasses.replace(
            state, instances=dataclasses.replace(instances, kv_blocks_used=used)
        )
        decode_on[placed[~stays]] = chooser.choose(then, those[~stays], DECODE)
    return Placement(prefill_on, decode_on)


def remembered(state: State, rows: Ints) -> dict[str, dict[str, int]]:
    """What a strategy is to remember of having placed these rows, so that turns go on.

    The number of rows placed so far of each model: `round-robin` counts on from there.
    """
    placed = dict(state.memory.get(PLACED, {}))
    for model in state.waiting.model[rows].tolist():
        placed[model] = placed.get(model, 0) + 1
    return {PLACED: placed} if placed else {}
