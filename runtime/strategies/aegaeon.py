"""Several models share a pool of devices and compute by turns, of lengths that keep tokens coming.

After Aegaeon (Xiang et al., SOSP 2025). There, some devices prefill and others decode, and any of
them runs any model. Here an instance runs one model, instances of one `pool` share a device, and a
turn is an instance's: it prefills its group, the oldest requests of its model, and decodes its
batch, all that lie there. So:

- a group of a model is open until 8 requests have joined it; a group that finds its model's turn at
  work joins that, else it waits at the least loaded pool;
- turns go round: each has one before anybody has another, the oldest head first, then those that
  only decode. So nobody waits for more than two turns of each other;
- a turn takes the group's prefill and q_i of decodes, see `turn_lengths`. Prompts share steps with
  decodes of their model where the mode is hybrid, instead of running alone;
- the KV of those that wait stays on its instance, which has blocks of its own, instead of going to
  the host. That a request joins looks 64 tokens ahead, as there.

A turn begins when the others of the pool are idle, and computes after its `switch_us`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sagec.runtime.state import ADMIT, ANY, UNBOUNDED, Decision, Ints, State
from sagec.runtime.strategies import _room
from sagec.runtime.strategies._promises import in_words

Floats = npt.NDArray[np.float64]

GROUP = 8
"""The most requests that prefill in one turn."""

LOOK_AHEAD_TOKENS = 64
"""Tokens of output for which a request needs room beside its prompt to join a batch."""

LEAST_LOAD = 0.5
"""Load is taken for this at least: no cycle computes more than twice the tokens due in it."""

UNKNOWN_STEP_US = 10_000
"""What a step of decodes is taken for until one was measured."""


class TurnLengths(NamedTuple):
    """Seconds of each turn, and the load: above 1, only a share of 1 / load comes in time."""

    turns_s: Floats
    load: float


def turn_lengths(
    step_s: npt.ArrayLike, tbt_s: npt.ArrayLike, switch_s: float, longest_s: float = 4.0
) -> TurnLengths:
    """How long each of several batches that share a device decodes at a time.

    step_s: of each batch, what a step takes. tbt_s: the promised time between its tokens. switch_s:
    of all switches of a cycle together. longest_s: of the longest turn; all are shorter where the
    load is below LEAST_LOAD.

    A batch that computes n_i = tbt / step tokens in the time of one has to compute a share 1 / n_i
    of the time. With s the sum of these, c the switches and QMAX the longest turn:

        load = max(c / (min n * QMAX) + s, LEAST_LOAD);  q_i = c / (n_i * (load - s))

    So all batches compute tokens for the same time, q_i * n_i, in which a cycle, c + sum q, passes
    `load` times. Where switches take no time, turns are as short as a step. (Aegaeon, section 4.3.)

    >>> turn_lengths([0.02, 0.04], 0.1, switch_s=1.0)
    TurnLengths(turns_s=array([2., 4.]), load=0.7)
    """
    step, tbt = np.broadcast_arrays(np.asarray(step_s, float), np.asarray(tbt_s, float))
    tokens = tbt / step
    share = float((1 / tokens).sum())
    if not switch_s:
        return TurnLengths(tbt.max() / tokens, max(share, LEAST_LOAD))
    load = max(switch_s / (float(tokens.min()) * longest_s) + share, LEAST_LOAD)
    return TurnLengths(switch_s / (tokens * (load - share)), round(load, 12))


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Whose turn it is in a pool, as it is remembered.

    owner: an instance's name, "" before the first turn. begin_us: when it computes. until_us: when
    its turn ends. joined: requests of its group. left: who has a turn after it in this cycle, and
    for how many microseconds.
    """

    owner: str = ""
    begin_us: int = 0
    until_us: int = 0
    joined: int = 0
    left: Sequence[Sequence[Any]] = ()


@dataclasses.dataclass(frozen=True)
class Aegaeon:
    """Models that share devices compute by turns; instances without a pool serve as fifo would.

    tbt_ms: between tokens where nothing was promised. longest_ms: no turn of decodes is longer.
    least_steps: none is shorter, whatever switching costs.
    """

    tbt_ms: float = 100.0
    longest_ms: float = 4000.0
    least_steps: int = 8
    name = "aegaeon"

    def decide(self, state: State) -> Decision:
        """Admit who joins a group whose turn it is; the other instances of a pool pause."""
        waiting, instances = state.waiting, state.instances
        too_long, reasons = _room.never_fitting(state)
        asking = np.argsort(waiting.arrival_us, kind="stable")
        asking = asking[~np.isin(asking, too_long)]
        turns = _remembered(state)
        homes = _homes(state, asking, turns)
        overflowing = _room.overflowing(state)
        said = _without_pools(state, asking[homes[asking] == ANY], overflowing)
        steps, again = np.full(len(instances), ANY, np.int64), []
        for pool, turn in turns.items():
            shared = _Pool(self, state, np.flatnonzero(instances.pool == pool), asking, homes)
            turns[pool] = turn = shared.joined(said, shared.turn_after(turn), overflowing)
            steps[shared.members] = shared.steps(turn)
            again += shared.again_us(turn)
        leaving = overflowing[steps[state.running.instance[overflowing]] > 0]
        said.rank[asking] = np.arange(len(asking))
        return dataclasses.replace(
            said.reject(too_long, reasons).preempt(leaving, "KV is full and it came last"),
            turn_steps=steps if turns else None,
            again_us=min(again, default=None),
            memory={self.name: {pool: dataclasses.asdict(turn) for pool, turn in turns.items()}},
        )


def _remembered(state: State) -> dict[str, _Turn]:
    """The turn that each pool is in."""
    pools = sorted(set(state.instances.pool.tolist()) - {""})
    memory = state.memory.get(Aegaeon.name, {})
    return {pool: _Turn(**memory.get(pool, {})) for pool in pools}


def _homes(state: State, asking: Ints, turns: Mapping[str, _Turn]) -> Ints:
    """The instance of a pool that each waiting row belongs to; ANY where its model has instances
    without a pool, or none."""
    instances, homes = state.instances, np.full(len(state.waiting), ANY, np.int64)
    loads = dict.fromkeys(turns, 0)
    for instance in state.running.instance.tolist():
        if (pool := instances.pool[instance]) in loads:
            loads[pool] += 1
    models = state.waiting.model[asking]
    for model in dict.fromkeys(models.tolist()):
        serving = np.flatnonzero(instances.prefills & (instances.model == model))
        pools = instances.pool[serving].tolist()
        rows = asking[models == model]
        if len(serving) == 1 and pools[0]:
            homes[rows] = serving[0]
        elif len(serving) and all(pools):
            _group(state, rows, serving, turns, loads, homes)
    return homes


def _group(
    state: State,
    rows: Ints,
    serving: Ints,
    turns: Mapping[str, _Turn],
    loads: dict[str, int],
    homes: Ints,
) -> None:
    """Give rows of one model to its instances: first to those whose turn it is, as far as their
    groups are open; then in groups, each to the pool with the fewest requests."""
    ids, pool_of = state.instances.ids, state.instances.pool
    room = _room.room_tokens(state.instances)
    whole = _room.whole_tokens(state.waiting, rows)
    for instance in serving.tolist():
        turn = turns[pool_of[instance]]
        if turn.owner == ids[instance] and turn.until_us > state.now_us:
            joining = np.flatnonzero(whole <= room[instance])[: max(0, GROUP - turn.joined)]
            homes[rows[joining]] = instance
            rows, whole = np.delete(rows, joining), np.delete(whole, joining)
    for begin in range(0, len(rows), GROUP):
        group, longest = rows[begin : begin + GROUP], whole[begin : begin + GROUP].max()
        able = serving[room[serving] >= min(longest, room[serving].max())].tolist()
        home = min(able, key=lambda instance: loads[str(pool_of[instance])])
        homes[group] = home
        loads[str(pool_of[home])] += len(group)


def _without_pools(state: State, rows: Ints, overflowing: Ints) -> Decision:
    """What fifo says of rows whose models have instances of their own."""
    own = state.instances.pool == ""
    instances = dataclasses.replace(state.instances, alive=state.instances.alive & own)
    leaving = own[state.running.instance[overflowing]].any()
    fitting = _room.fitting(dataclasses.replace(state, instances=instances), rows)
    admitted = rows[:0] if leaving else fitting
    return Decision.admit(
        admitted, state.waiting, "its turn, and it fits", "no room before its turn"
    )


class _Pool:
    """The instances of a pool and what each has to do.

    members: their indices. rows: of each, the waiting rows that belong to it, the oldest first.
    num_running: of each, how many requests it holds.
    """

    def __init__(
        self, rules: Aegaeon, state: State, members: Ints, asking: Ints, homes: Ints
    ) -> None:
        instances = state.instances
        self.rules, self.state, self.members = rules, state, members
        self.names = instances.ids[members].tolist()
        self.rows = [asking[homes[asking] == member] for member in members.tolist()]
        self.num_running = np.bincount(state.running.instance, minlength=len(instances))[members]
        self.idle = instances.idle[members].tolist()
        measured = instances.decode_step_us[members]
        self.step_us = np.where(measured > 0, measured, UNKNOWN_STEP_US)

    @property
    def at_work(self) -> list[str]:
        """Who has something to do."""
        todo = zip(self.names, self.rows, self.num_running.tolist(), strict=True)
        return [name for name, rows, num_running in todo if num_running or len(rows)]

    def turn_after(self, turn: _Turn) -> _Turn:
        """The turn that it is now: the same until it is over, then that of the next in line.

        Before another instance begins, all have to be idle: until then it is nobody's turn.
        """
        if not self._is_over(turn):
            return turn
        now_us, at_work = self.state.now_us, self.at_work
        left = [one for one in turn.left if one[0] in at_work] or self._cycle()
        if not left:
            return dataclasses.replace(turn, until_us=now_us, left=[])
        name, turn_us = left[0]
        others = zip(self.names, self.idle, strict=True)
        if any(not idle and other != name for other, idle in others):
            return dataclasses.replace(turn, until_us=now_us, left=left)
        switch_us = self.state.instances.switch_us[self.members[self.names.index(name)]]
        begin_us = now_us + (0 if name == turn.owner else int(switch_us))
        return _Turn(name, begin_us, begin_us + turn_us, 0, left[1:])

    def _is_over(self, turn: _Turn) -> bool:
        if turn.owner not in self.names:
            return True
        at = self.names.index(turn.owner)
        has_work = self.num_running[at] or (len(self.rows[at]) and turn.joined < GROUP)
        return not has_work or self._steps_left(turn) < 1

    def _steps_left(self, turn: _Turn) -> int:
        left_us = turn.until_us - max(self.state.now_us, turn.begin_us)
        return round(left_us / int(self.step_us[self.names.index(turn.owner)]))

    def _cycle(self) -> list[list[Any]]:
        """Everybody who has work, the oldest head first, and for how many microseconds."""
        at = [self.names.index(name) for name in self.at_work]
        at.sort(key=lambda i: self._head_us(i))
        if not at:
            return []
        switch_us = self.state.instances.switch_us[self.members[at]]
        lengths = turn_lengths(
            self.step_us[at] / 1e6,
            np.array([self._tbt_us(i) for i in at]) / 1e6,
            float(switch_us.sum()) / 1e6 if len(at) > 1 else 0.0,
            self.rules.longest_ms / 1e3,
        )
        least_us = self.rules.least_steps * self.step_us[at]
        turns_us = np.maximum(np.rint(1e6 * lengths.turns_s).astype(np.int64), least_us)
        return [[self.names[i], us] for i, us in zip(at, turns_us.tolist(), strict=True)]

    def _head_us(self, at: int) -> int:
        """When the oldest request that waits for the instance came; those without come last."""
        rows = self.rows[at]
        return int(self.state.waiting.arrival_us[rows[0]]) if len(rows) else 2**62

    def _tbt_us(self, at: int) -> float:
        """The shortest time between tokens that was promised to anybody of the instance."""
        running, rows = self.state.running, self.rows[at]
        here = running.tpot_us[running.instance == self.members[at]]
        promised = np.concatenate([here, self.state.waiting.tpot_us[rows]])
        return float(min(promised[promised > 0].tolist(), default=1e3 * self.rules.tbt_ms))

    def _computes(self, turn: _Turn) -> bool:
        return turn.begin_us <= self.state.now_us < turn.until_us

    def joined(self, said: Decision, turn: _Turn, overflowing: Ints) -> _Turn:
        """Admit who joins the group whose turn it is, and say why the others wait.

        The turn gets longer by what the new prompts take.
        """
        for at, rows in enumerate(self.rows):
            said.reason[rows] = self._why_not(at, turn)
        if not self._computes(turn):
            return turn
        at = self.names.index(turn.owner)
        member, rows = int(self.members[at]), self.rows[at]
        if (self.state.running.instance[overflowing] == member).any():
            said.reason[rows] = "waits, for KV is full"
            return turn
        open_to = len(rows) if len(self.at_work) == 1 else max(0, GROUP - turn.joined)
        rows = rows[:open_to]
        admitted = rows[: self._num_fitting(member, rows)]
        said.reason[rows] = f"its group's turn, but no room is left on {turn.owner}"
        said.verdict[admitted] = ADMIT
        said.prefill_on[admitted] = member
        if self.state.instances.role[member] != "prefill":
            said.decode_on[admitted] = member
        tokens = int(self.state.waiting.prompt_tokens[admitted].sum())
        prefill_us = tokens * int(self.state.instances.prefill_ns_per_token[member]) // 1000
        turn = dataclasses.replace(
            turn, until_us=turn.until_us + prefill_us, joined=turn.joined + len(admitted)
        )
        left = in_words(turn.until_us - self.state.now_us)
        said.reason[admitted] = f"its group's turn on {turn.owner}, {left} left"
        return turn

    def _num_fitting(self, member: int, rows: Ints) -> int:
        """How many of the first rows find room on an instance, with some output."""
        waiting, instances = self.state.waiting, self.state.instances
        prompt, generate = waiting.prompt_tokens[rows], waiting.generate_tokens[rows]
        ahead = np.minimum(
            np.where(generate == UNBOUNDED, LOOK_AHEAD_TOKENS, generate), LOOK_AHEAD_TOKENS
        )
        tokens = np.minimum(prompt + ahead, int(_room.room_tokens(instances)[member]))
        blocks = np.cumsum(-(-tokens // instances.block_tokens[member]))
        here = np.searchsorted(blocks, _room.free_blocks(self.state)[member], side="right")
        return min(int(here), len(_room.fitting(self.state, rows)))

    def _why_not(self, at: int, turn: _Turn) -> str:
        """Why those wait who do not join."""
        now_us, name = self.state.now_us, self.names[at]
        if turn.begin_us > now_us:
            return f"waits while {turn.owner} is switched in, {in_words(turn.begin_us - now_us)}"
        if turn.until_us <= now_us:
            return f"waits until {turn.owner} has stopped"
        left = in_words(turn.until_us - now_us)
        if name == turn.owner:
            return f"waits for the next turn of {name}: the group of this one is full"
        return f"waits for the turn of {name}: {turn.owner} computes for {left} more"

    def steps(self, turn: _Turn) -> Ints:
        """Of each member, how many steps it may compute now."""
        steps = np.zeros(len(self.members), np.int64)
        if self._computes(turn):
            alone = self.at_work == [turn.owner]
            steps[self.names.index(turn.owner)] = ANY if alone else self._steps_left(turn)
        return steps

    def again_us(self, turn: _Turn) -> list[int]:
        """When to look again, if nothing happens until then."""
        now_us = self.state.now_us
        if turn.begin_us > now_us:
            return [turn.begin_us]
        return [turn.until_us] if self._computes(turn) and len(self.at_work) > 1 else []
