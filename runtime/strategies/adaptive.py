"""How prefill and decode share instances, changed with the load that is measured.

Two loads are smoothed over `window_ms`. The prefill load is the share of the time that the
instances need for the prompts that arrive: tokens a second, times the time a token takes, over the
number of instances that prefill. The contention is that load times the decodes of an instance: how
many of them a prompt would hold up at a moment, in the mean. Then

- time-share, prompts alone in their steps, where contention is low: prompts are short or few
  decodes run;
- hybrid, prompts in chunks beside the decodes, where it is not. The chunk of a step is the largest
  with which it takes no longer than the smallest slack to a next token (Sarathi-Serve);
- strict, instances for one phase, where the prefill load is high, but not so high that all but one
  instance could not bear it: with `dedicate`, of instances of role both. A cluster without role
  both is strict whatever the load.

It does not oscillate: it takes more load to enter a mode than to stay in it, and another mode must
have been the better one for all of `dwell_ms`, with what has come in that time and without. So a
load that comes and goes faster changes nothing, and one that comes to stay changes the mode once.
"""

import dataclasses
import math

import numpy as np

from sagec.runtime.state import DEFER, REJECT, Decision, Ints, State
from sagec.runtime.strategies import _room, choosers
from sagec.runtime.strategies._promises import largest_chunks
from sagec.runtime.strategies.fifo import Fifo

MODES = ("time-share", "hybrid", "strict")
TIME_SHARE, HYBRID, STRICT = range(3)

MIXING = (0.25, 0.5)
"""Contention: below the first hybrid ends and time-share begins, from the second on the reverse."""

DEDICATING = (0.15, 0.25)
"""Prefill load: below the first strict ends, from the second on it begins."""

BEARABLE = 0.95
"""Of the prefill load that the instances which would prefill can bear: above it none begins to."""

MOST_LOAD = 1.2
"""Beyond this it makes no difference, and a burst is not to be remembered for longer."""

FULL = 0.8
"""Of the KV: from then on plans are short, for they reserve what they may fill."""

TILE_TOKENS = 16
"""Chunks are of whole tiles, as kernels compute them."""


@dataclasses.dataclass(frozen=True)
class _Memory:
    """What it knows of earlier rounds.

    mode: an index of MODES. better, since_us: whether a mode above (1) or below (-1) it is better,
    and since when; 0: none is. now_us: when it looked. next_sequence: requests before it have been
    counted. tokens_per_s: prompt tokens that arrive. decodes: running on each instance. prefilling:
    the share of instances that only prefill, while instances of role both are dedicated.
    """

    mode: int = HYBRID
    better: int = 0
    since_us: int = 0
    now_us: int = 0
    next_sequence: int = 0
    tokens_per_s: float = 0.0
    decodes: float = 0.0
    prefilling: float = 0.0


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """First come, first served, in the mode, the chunk and the horizon that the load asks for.

    window_ms: loads are smoothed over. dwell_ms: how long another mode must be better. dedicate:
    instances of role both may hand KV to each other, which takes links, so that some of them
    prefill and others decode. least_chunk: prompt tokens of a hybrid step, whatever was promised.
    short_steps, long_steps: the horizon while somebody waits or KV is nearly full, and else.
    """

    window_ms: float = 1000.0
    dwell_ms: float = 2000.0
    dedicate: bool = False
    least_chunk: int = 32
    short_steps: int = 8
    long_steps: int = 32
    name = "adaptive"

    def decide(self, state: State) -> Decision:
        """Admit in order of arrival what fits, and say how it is to be computed."""
        before = _Memory(**state.memory.get(self.name, {"now_us": state.now_us}))
        faded = self._faded(before, state)
        seen = self._counted(faded, state)
        memory = self._settled(state, faded, seen)
        placed = self._in_roles(state, memory)
        said = _admitted(placed, is_placed=placed is not state)
        said.reason[said.verdict != REJECT] += f" ({_loads_in_words(state, memory)})"
        pending = memory.better and len(state.running)
        return dataclasses.replace(
            said,
            mode=_mode_of_graph(state, memory),
            horizon_steps=self._horizon(state, said),
            step_prompt_tokens=0 if memory.mode == TIME_SHARE else self._chunk(placed, memory),
            again_us=memory.since_us + round(1e3 * self.dwell_ms) if pending else None,
            memory={self.name: dataclasses.asdict(memory)},
        )

    def _faded(self, before: _Memory, state: State) -> _Memory:
        """The loads now, if no prompt had come since."""
        running = state.running
        kept = math.exp(min(0, before.now_us - state.now_us) / (1e3 * self.window_ms))
        num_decodes = int(np.count_nonzero(running.computed_tokens >= running.prompt_tokens))
        decodes = num_decodes / max(1, int(np.count_nonzero(state.instances.decodes)))
        return dataclasses.replace(
            before,
            now_us=state.now_us,
            tokens_per_s=kept * before.tokens_per_s,
            decodes=float(decodes + kept * (before.decodes - decodes)),
        )

    def _counted(self, faded: _Memory, state: State) -> _Memory:
        """The loads with the prompts that came since."""
        waiting, running = state.waiting, state.running
        sequence = np.concatenate([waiting.sequence, running.sequence])
        is_new = sequence >= faded.next_sequence
        tokens = np.concatenate([waiting.prompt_tokens, running.prompt_tokens])[is_new].sum()
        tokens_per_s = faded.tokens_per_s + 1e3 * int(tokens) / self.window_ms
        if (each := _prefill_load(state, 1.0)) > 0:
            tokens_per_s = min(tokens_per_s, MOST_LOAD / each)
        following = int(sequence.max(initial=-1)) + 1
        return dataclasses.replace(
            faded,
            next_sequence=max(faded.next_sequence, following),
            tokens_per_s=tokens_per_s,
        )

    def _settled(self, state: State, faded: _Memory, seen: _Memory) -> _Memory:
        """The mode to be in, and since when another one has been better."""
        if (state.instances.role != "both").all():
            return dataclasses.replace(seen, mode=STRICT, better=0)
        most = max((1 - 1 / len(at) for at in _dedicable(state)), default=0.0)
        most = most if self.dedicate else 0.0
        if seen.mode == STRICT and not most:
            seen = dataclasses.replace(seen, mode=HYBRID, better=0)
        best = [_best(state, loads, seen.mode, most) for loads in (faded, seen)]
        mode = min(best) if min(best) > seen.mode else min(max(best), seen.mode)
        better = (mode > seen.mode) - (mode < seen.mode)
        if better != seen.better:
            return dataclasses.replace(seen, better=better, since_us=state.now_us)
        if not better or state.now_us < seen.since_us + round(1e3 * self.dwell_ms):
            return seen
        prefilling = _prefill_load(state, seen.tokens_per_s)
        return dataclasses.replace(seen, mode=mode, better=0, prefilling=prefilling)

    def _in_roles(self, state: State, memory: _Memory) -> State:
        """The state with the roles that its instances of role both are to play."""
        if memory.mode != STRICT or not self.dedicate:
            return state
        roles = state.instances.role.copy()
        for at in _dedicable(state):
            num_prefilling = math.ceil(memory.prefilling * len(at))
            split = min(max(1, num_prefilling), len(at) - 1)
            roles[at[:split]], roles[at[split:]] = "prefill", "decode"
        return dataclasses.replace(
            state, instances=dataclasses.replace(state.instances, role=roles)
        )

    def _chunk(self, state: State, memory: _Memory) -> int:
        """Prompt tokens of a step with which every decode beside them comes in time; 0: any.

        But as many as it takes for the prompts to come in time, too.
        """
        chunks = largest_chunks(state, self.least_chunk)
        if not (chunks > 0).any():
            return 0
        needed = _needed_chunk(state, _needed_tokens_per_s(state, memory))
        if needed is None:
            return 0
        tiles = max(int(chunks[chunks > 0].min()) // TILE_TOKENS, math.ceil(needed / TILE_TOKENS))
        return max(tiles, 1) * TILE_TOKENS

    def _horizon(self, state: State, said: Decision) -> int:
        instances = state.instances
        nearly_full = instances.kv_blocks_used > FULL * instances.kv_blocks
        crowded = (said.verdict == DEFER).any() or nearly_full.any()
        return self.short_steps if crowded else self.long_steps


def _prefill_load(state: State, tokens_per_s: float) -> float:
    """The share of their time that the instances need for prompt tokens that come at this rate."""
    instances = state.instances
    prefill_ns = instances.prefill_ns_per_token[instances.prefills]
    known = prefill_ns[prefill_ns > 0]
    return float(1e-9 * tokens_per_s * known.mean() / len(prefill_ns)) if len(known) else 0.0


def _needed_tokens_per_s(state: State, memory: _Memory) -> float:
    """Prompt tokens to compute a second, for every first token to come in half of the time that is
    left for it; where nothing was promised, or it is late, as many as arrive."""
    waiting, running = state.waiting, state.running
    tokens = np.concatenate(
        [running.prompt_tokens - running.computed_tokens, waiting.prompt_tokens]
    )
    arrival_us = np.concatenate([running.arrival_us, waiting.arrival_us])
    ttft_us = np.concatenate([running.ttft_us, waiting.ttft_us])
    pending = np.flatnonzero(tokens > 0)
    pending = pending[np.argsort(arrival_us[pending], kind="stable")]
    left_us = (arrival_us + ttft_us)[pending] - state.now_us
    hopeful = (ttft_us[pending] > 0) & (left_us > 0)
    before = np.cumsum(tokens[pending])[hopeful]
    demand = float((2e6 * before / left_us[hopeful]).max(initial=0.0))
    return demand if hopeful.all() else max(demand, memory.tokens_per_s)


def _needed_chunk(state: State, tokens_per_s: float) -> float | None:
    """Prompt tokens of each step with which so many are computed a second; None: no number does.

    Of r tokens a second on an instance whose decodes take d seconds a step and each token t: a
    chunk c computes c / (d + c t) of them, which is r where c = r d / (1 - r t).
    """
    instances = state.instances
    if (load := _prefill_load(state, tokens_per_s)) >= 1:
        return None
    num_prefills = max(1, int(np.count_nonzero(instances.prefills)))
    step_s = 1e-6 * float(instances.decode_step_us.max(initial=0))
    return tokens_per_s / num_prefills * step_s / (1 - load)


def _best(state: State, loads: _Memory, mode: int, most: float) -> int:
    """The mode for these loads, seen from the mode that it is in.

    most: the prefill load that instances can bear which only prefill; 0: none may.
    """
    load = _prefill_load(state, loads.tokens_per_s)
    least, most = DEDICATING[mode != STRICT], most * (1 if mode == STRICT else BEARABLE)
    if least <= load <= most:
        return STRICT
    return HYBRID if load * loads.decodes >= MIXING[mode == TIME_SHARE] else TIME_SHARE


def _dedicable(state: State) -> list[Ints]:
    """Of each model the live instances of role both, where they are several and hold the same."""
    instances = state.instances
    room = _room.room_tokens(instances)
    both = instances.alive & (instances.role == "both")
    models = sorted(set(instances.model[both].tolist()))
    found = [np.flatnonzero(both & (instances.model == model)) for model in models]
    return [at for at in found if len(at) > 1 and (room[at] == room[at[0]]).all()]


def _admitted(state: State, is_placed: bool) -> Decision:
    """What fifo says; with instances of its own for each phase where roles are played."""
    said = Fifo().decide(state)
    if is_placed:
        rows = said.admitted
        where = choosers.place(choosers.create("least-load"), state, rows)
        said.prefill_on[rows], said.decode_on[rows] = where.prefill_on, where.decode_on
        crowded = rows[~where.fits]
        said.verdict[crowded] = DEFER
        said.reason[crowded] = "no instance has room for all of it"
    return said


def _mode_of_graph(state: State, memory: _Memory) -> str:
    """The mode to compile with: a graph is strict only where no instance has role both."""
    if memory.mode == STRICT and (state.instances.role == "both").any():
        return MODES[HYBRID]
    return MODES[memory.mode]


def _loads_in_words(state: State, memory: _Memory) -> str:
    load = _prefill_load(state, memory.tokens_per_s)
    return f"{MODES[memory.mode]}: prefill load {load:.2g}, {memory.decodes:.2g} decodes each"
