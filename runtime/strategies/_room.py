"""How much KV room there is: what fits now, what never will, and who must leave; for strategies."""

import numpy as np

from sagec.runtime.state import UNBOUNDED, Bools, Instances, Ints, Running, State, Waiting


def fitting(state: State, order: Ints) -> Ints:
    """The first rows of `order` whose prompts fit the free blocks of their model's instances.

    Each row needs room for its prompt and the next token, where it prefills and where it decodes.
    Stops at the first row that does not fit, so that nobody overtakes a long prompt for ever.
    """
    fits = np.ones(len(order), bool)
    models = state.waiting.model[order]
    for model in set(models.tolist()):
        here = np.flatnonzero(models == model)
        for allowed in (state.instances.prefills, state.instances.decodes):
            fits[here] &= _fits_in_turn(state, order[here], allowed & _serves(state, model))
    return order[: len(order) if fits.all() else int(np.argmin(fits))]


def never_fitting(state: State) -> tuple[Ints, list[str]]:
    """Waiting rows that are too long for every live instance of their model, and why."""
    waiting, rows, reasons = state.waiting, [], []
    for model in set(waiting.model.tolist()):
        here = np.flatnonzero(waiting.model == model)
        served = _serves(state, model)
        if (
            not (served & state.instances.prefills).any()
            or not (served & state.instances.decodes).any()
        ):
            continue
        prompt = waiting.prompt_tokens[here]
        whole = prompt + _bounded(waiting, here)
        prefill_room = _largest(state.instances, served & state.instances.prefills)
        decode_room = _largest(state.instances, served & state.instances.decodes)
        for row in here[(prompt + 1 > prefill_room) | (whole > decode_room)]:
            rows.append(row)
            reasons.append(_too_long(waiting, int(row), min(prefill_room, decode_room)))
    return np.array(rows, np.int64), reasons


def overflowing(state: State, staying: Ints | None = None) -> Ints:
    """Running rows that must leave so that all before them on their instance have a next token.

    staying: all running rows, those first that are to stay the longest; None: in order of arrival,
    so that the latest to come leave first. One that is alone always stays. A row whose KV is on its
    way takes the room of those after it, and has nothing to leave itself.
    """
    running = state.running
    need = _next_blocks(running, state.instances)
    total = np.bincount(running.instance, need, len(state.instances))
    if (total <= state.instances.kv_blocks).all():
        return np.zeros(0, np.int64)
    order = np.argsort(running.arrival_us, kind="stable") if staying is None else staying
    order = order[np.argsort(running.instance[order], kind="stable")]
    instance = running.instance[order]
    need = need[order]
    before = np.cumsum(need)
    first = np.searchsorted(instance, instance)
    within = before - before[first] + need[first]
    crowded = (within > state.instances.kv_blocks[instance]) & (np.arange(len(order)) > first)
    rows = order[crowded]
    return rows[~running.arriving[rows]]


def without(rows: Ints, others: Ints) -> Ints:
    """Those of the rows, in their order, that are not among the others."""
    if not len(others):
        return rows
    kept = np.ones(int(max(rows.max(initial=0), others.max())) + 1, bool)
    kept[others] = False
    return rows[kept[rows]]


def room_tokens(instances: Instances) -> Ints:
    """Tokens of the longest context that each instance can hold."""
    room = instances.kv_blocks * instances.block_tokens
    limit = instances.max_context_tokens
    return np.where(limit > 0, np.minimum(room, limit), room)


def whole_tokens(waiting: Waiting, rows: Ints) -> Ints:
    """Tokens that rows will hold at their end: the prompt and one more where nobody knows."""
    return waiting.prompt_tokens[rows] + _bounded(waiting, rows)


def free_blocks(state: State) -> Ints:
    """Blocks of each instance that are neither held nor promised, nor the next to be taken.

    Every request that decodes there may take one block more before the next round.
    """
    instances = state.instances
    growing = np.bincount(state.running.decode_on, minlength=len(instances))
    return instances.kv_blocks - instances.kv_blocks_used - growing


def _next_blocks(running: Running, instances: Instances) -> Ints:
    """Blocks each running row holds once its prompt is computed and one more token."""
    tokens = np.maximum(running.prompt_tokens, running.computed_tokens) + 1
    return -(-tokens // instances.block_tokens[running.instance])


def _serves(state: State, model: str) -> Bools:
    serves: Bools = state.instances.model == model
    return serves & state.instances.alive


def _fits_in_turn(state: State, rows: Ints, pool: Bools) -> Bools:
    """Whether each row, after those before it, finds room in the pool's free blocks."""
    if not pool.any():
        return np.zeros(len(rows), bool)
    instances = state.instances
    block_tokens = int(instances.block_tokens[pool].max())
    free = (instances.kv_blocks - instances.kv_blocks_used)[pool] * instances.block_tokens[pool]
    growing = int(pool[state.running.instance].sum())
    need = np.cumsum(-(-(state.waiting.prompt_tokens[rows] + 1) // block_tokens))
    return need <= int(free.sum()) // block_tokens - growing


def _largest(instances: Instances, pool: Bools) -> int:
    """Tokens of the longest context that one instance of the pool can hold."""
    room = instances.kv_blocks[pool] * instances.block_tokens[pool]
    limit = instances.max_context_tokens[pool]
    return int(np.where(limit > 0, np.minimum(room, limit), room).max(initial=0))


def _bounded(waiting: Waiting, rows: Ints) -> Ints:
    """Tokens that rows will hold beyond their prompts; one where nobody knows."""
    generate = waiting.generate_tokens[rows]
    return np.where(generate == UNBOUNDED, 1, generate)


def _too_long(waiting: Waiting, row: int, room_tokens: int) -> str:
    prompt, generate = int(waiting.prompt_tokens[row]), int(waiting.generate_tokens[row])
    return too_long(prompt, generate, room_tokens)


def too_long(prompt_tokens: int, generate_tokens: int, room_tokens: int) -> str:
    """Why a request is rejected of which the largest instance holds only so many tokens."""
    output = "" if generate_tokens == UNBOUNDED else f" and {generate_tokens} to generate"
    fits = f"{prompt_tokens} prompt tokens{output} fit no instance"
    return f"{fits}: the largest holds {room_tokens} tokens"
