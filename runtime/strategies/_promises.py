"""What was promised to requests, as deadlines of their next tokens, and what it takes to keep it.

Times are microseconds. A prediction that nobody can make is 0: then deadlines alone count.
"""

import numpy as np

from sagec.runtime.state import Bools, Ints, Running, State, Waiting

NEVER = 2**62
"""The deadline of a token that nobody was promised."""

CATCHING_UP = 0.9
"""Of its time between tokens, what a late row asks for: with half, prompts pile up under load."""


def is_promised(asked: Waiting | Running) -> Bools:
    """Rows that were promised a time to the first token, or between tokens."""
    promised: Bools = (asked.ttft_us > 0) | (asked.tpot_us > 0)
    return promised


def token_deadlines_us(asked: Waiting | Running) -> Ints:
    """When each row's next token is due: arrival + TTFT + k * TPOT after k tokens, else NEVER.

    Where only the time between tokens was promised, or the first token came late, it counts from
    the first token: what is lost cannot be asked of the others. Where only the first token was
    promised, nothing is due after it.

    >>> asked = Waiting.of(["a", "b"], arrival_us=5, ttft_us=100, tpot_us=10, output_tokens=[0, 3])
    >>> token_deadlines_us(asked)
    array([105, 135])
    """
    begun = asked.output_tokens > 0
    first_due = np.where(asked.ttft_us > 0, asked.arrival_us + asked.ttft_us, 0)
    first_due = np.maximum(first_due, asked.first_token_us)
    due = first_due + asked.output_tokens * asked.tpot_us
    is_due = np.where(begun, asked.tpot_us > 0, asked.ttft_us > 0)
    return np.where(is_due, due, NEVER)


def bare_prefill_us(state: State) -> Ints:
    """What each waiting row's prompt takes where nothing else runs, at the best instance for it.

    Tokens that are cached there are not computed. 0 where no instance of the model was measured.
    """
    waiting, instances = state.waiting, state.instances
    best = np.full(len(waiting), NEVER, np.int64)
    known = np.flatnonzero(instances.prefills & (instances.prefill_ns_per_token > 0))
    for i in known.tolist():
        tokens = np.maximum(waiting.prompt_tokens - state.cached_tokens[:, i], 1)
        took = tokens * int(instances.prefill_ns_per_token[i]) // 1000
        serves = waiting.model == instances.model[i]
        best = np.where(serves, np.minimum(best, took), best)
    return np.where(best == NEVER, 0, best)


def pace_share(state: State, model: str) -> float:
    """The prefill time of the model's fastest instance over that of all of them together.

    As many prompts at once as this is the inverse of: 0.5 for two equal ones.
    """
    instances = state.instances
    here = instances.prefills & (instances.model == model) & (instances.prefill_ns_per_token > 0)
    times = instances.prefill_ns_per_token[here]
    return 1.0 if len(times) < 2 else float(1.0 / (times.min() * (1.0 / times).sum()))


def backlog_us(state: State, model: str) -> int:
    """How long the model's instances have to compute at prompts under way, work shared evenly."""
    instances, running = state.instances, state.running
    here = instances.prefills & (instances.model == model)
    num_tokens = np.maximum(running.prompt_tokens - running.computed_tokens, 0)
    took = num_tokens * instances.prefill_ns_per_token[running.instance]
    num_instances = max(1, int(np.count_nonzero(here)))
    return int(took[here[running.instance]].sum()) // 1000 // num_instances


def largest_chunks(state: State, least_tokens: int) -> Ints:
    """Prompt tokens that a step may take on each instance so that tokens come in time; 0: any.

    The largest chunk with which a step takes no longer than the smallest slack to a next token, or
    the smallest TPOT (later steps have no more). A row that is late already asks for CATCHING_UP
    of its TPOT and no less: so it catches up while prompts go on, and those go by `least_tokens` at
    least, for a prompt that stands still helps nobody.
    """
    instances, running = state.instances, state.running
    chunk = np.zeros(len(instances), np.int64)
    at = np.flatnonzero((running.tpot_us > 0) & (running.computed_tokens >= running.prompt_tokens))
    if not len(at):
        return chunk
    tpot_us = running.tpot_us[at]
    least_us = (CATCHING_UP * tpot_us).astype(np.int64)
    slack_us = np.clip(token_deadlines_us(running)[at] - state.now_us, least_us, tpot_us)
    smallest_us = np.full(len(instances), NEVER, np.int64)
    np.minimum.at(smallest_us, running.decode_on[at], slack_us)
    ns = instances.prefill_ns_per_token
    bound = (smallest_us < NEVER) & instances.prefills & (ns > 0)
    left_us = np.maximum(smallest_us[bound] - instances.decode_step_us[bound], 0)
    chunk[bound] = np.maximum(left_us * 1000 // ns[bound], least_tokens)
    return chunk


def step_prompt_tokens(state: State, least_tokens: int) -> int:
    """Prompt tokens that a step of the round may take so that tokens come in time; 0: any.

    One number for all instances, so that of the one that may take the fewest.
    """
    chunks = largest_chunks(state, least_tokens)
    return int(min(chunks[chunks > 0], default=0))


def in_words(us: float) -> str:
    """A time to one digit, rounded down, so that few different ones occur.

    >>> in_words(199_456), in_words(7), in_words(15_000_000)
    ('100 ms', '7 us', '10 s')
    """
    for unit_us, unit in ((1_000_000, "s"), (1000, "ms")):
        if us >= unit_us:
            return f"{_leading(int(us // unit_us))} {unit}"
    return f"{_leading(int(us))} us"


def _leading(number: int) -> int:
    """The number with all but its first digit 0."""
    power: int = 10 ** (len(str(number)) - 1)
    return number // power * power
