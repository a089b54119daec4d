"""What each instance has to do, as columns."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from sagec.runtime.direct.columns import Bools, Coded, Ints, Listed, zeros
from sagec.runtime.direct.topology import Instance

UNBOUNDED = 2**31 - 1
"""Tokens of a request that goes on until it stops."""

UNBOUNDED_STEPS = 256
"""Steps planned for such a request, where nobody gave a horizon."""


@dataclass(frozen=True, eq=False)
class Work:
    """The requests of one instance: those it prefills, in rank order, then those it only decodes.

    prompt: tokens to compute before the first is sampled; of a resident, its context. held: how
    many of them have KV here, or in its prefix cache (cached), before step 0. decodes: tokens to
    decode here within the horizon; 0 where the row decodes elsewhere. generate: tokens to decode
    at all. bounds: the chunks of each prefilled row. source, target: the instance its
    KV comes from, or goes to after its prefill. transfer_us: how long that takes. awaited: rows
    whose KV is not here yet and is not computed here. turn_steps: the most steps it may compute,
    see `pd.turns`; None: no bound.
    """

    instance: Instance
    names: tuple[str, ...]
    num_prefills: int
    prompt: Ints
    held: Ints
    cached: Ints
    decodes: Ints
    generate: Ints
    deadline: Ints
    bounds: Listed
    source: Coded
    target: Coded
    transfer_us: Ints
    awaited: Bools
    turn_steps: int | None = None

    @functools.cached_property
    def blocks(self) -> Ints:
        """Blocks that each row needs within the horizon."""
        return -(-(self.prompt + self.decodes) // self.instance.block_tokens)

    @property
    def computed(self) -> Ints:
        """Tokens whose KV is here before step 0, beside those in the prefix cache."""
        nothing = zeros(len(self.names))
        computed = self.held if self.cached is nothing else self.held - self.cached
        if np.count_nonzero(self.awaited):
            return np.where(self.awaited, 0, computed)
        return computed

    @functools.cached_property
    def whole(self) -> Ints:
        """All the tokens of KV that each row may ever have here."""
        bounded = np.where(self.generate >= UNBOUNDED, self.decodes, self.generate)
        return self.prompt + np.where(self.decodes > 0, bounded, 0)


def in_turn(work: Work, steps: int | None) -> Work:
    """The same work, which decodes no more than a turn of so many steps allows; None: no bound."""
    if steps is None:
        return work
    return dataclasses.replace(work, turn_steps=steps, decodes=np.minimum(work.decodes, steps))


def bounded_by_its_room(work: Work) -> Work:
    """The same work, in which a request that goes on until it stops decodes no more than the
    instance has blocks for; one token at least, so that a prompt that fits nowhere is refused."""
    unbounded = work.generate >= UNBOUNDED
    if not np.count_nonzero(unbounded):
        return work
    room = work.instance.kv_blocks * work.instance.block_tokens
    most = np.where(unbounded, np.maximum(room - work.prompt, 1), work.decodes)
    return dataclasses.replace(work, decodes=np.minimum(work.decodes, most))


def within_its_room(work: Work) -> Work:
    """The same work, in which prompts that are under way find blocks for what they decode.

    They were begun under a horizon that may have been shorter. Where under this one they need more
    blocks than there are, the last of them decode one token in it: a strategy leaves room for that.
    """
    room = work.instance.kv_blocks
    if int(work.blocks.sum()) <= room:
        return work
    begun = np.flatnonzero((work.held > work.cached) & (work.held < work.prompt) & ~work.awaited)
    over = int(work.blocks[begun].sum()) - room
    if over <= 0:
        return work
    one = np.minimum(work.decodes, 1)
    saved = work.blocks - -(-(work.prompt + one) // work.instance.block_tokens)
    last_first = begun[::-1]
    cut = last_first[: np.searchsorted(np.cumsum(saved[last_first]), over) + 1]
    decodes = work.decodes.copy()
    decodes[cut] = one[cut]
    return dataclasses.replace(work, decodes=decodes)


def victims_of(work: Work) -> Ints:
    """Rows that decode already and must leave: the last ones, as many as it takes."""
    if work.blocks.sum() <= work.instance.kv_blocks:
        return zeros(0)
    held = np.flatnonzero(~work.awaited & (work.held >= work.prompt))
    started = np.flatnonzero((work.held > work.cached) & (work.held < work.prompt))
    room = work.instance.kv_blocks - int(work.blocks[started].sum())
    kept = int(np.searchsorted(np.cumsum(work.blocks[held]), room, side="right"))
    return held[kept:]
