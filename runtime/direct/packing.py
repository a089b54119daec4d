"""Which engine call computes what: the steps of one instance, packed one after the other.

`packed` answers for all instances of a graph. `Packer` is the definition, step by step until only
decodes are left; `line` and `decodes_only` give what it gives, at once, for instances on which
nothing competes.
"""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import numpy.typing as npt

from sagec.runtime.cost import StepCost
from sagec.runtime.direct.columns import Bools, Ints, chosen, flags, zeros
from sagec.runtime.direct.work import Work

Floats = npt.NDArray[np.float64]

FEW = 24
"""Rows that plain numbers are faster for than columns."""

_NO_HORIZON = 1 << 30
_NEVER = 1 << 40


@dataclass(frozen=True, eq=False)
class Order:
    """How steps are to be packed.

    mode: see the pass `fuse-steps`. turn: steps of decodes after one of prompts, if time-share.
    horizon: how many steps; 0: until all is done. prompt_tokens: most of a step; 0: as many as the
    instance takes.
    """

    mode: str
    turn: int
    horizon: int
    prompt_tokens: int = 0

    @property
    def limit(self) -> int:
        """The most steps."""
        return self.horizon or _NO_HORIZON

    def budget(self, left: int) -> int:
        """Prompt tokens of a step in which an instance has `left` tokens for them."""
        return min(left, self.prompt_tokens or left)


@dataclass(frozen=True, eq=False)
class Packed:
    """The steps of one instance.

    blocks: reserved for each row. chunks: [4, chunks], the rows step, row, begin, end. us, tokens,
    used_blocks: of each step. begin: the first step in which a row decodes. until: tokens of KV
    after its last decode, 0 where it does not decode. comes: rows whose KV comes from elsewhere.
    """

    work: Work
    blocks: Ints
    chunks: npt.NDArray[np.int64]
    us: Floats
    tokens: Ints
    used_blocks: Ints
    begin: Ints
    until: Ints
    comes: Bools


Finished = dict[str, float]
"""When the prompt of a request has been computed, in microseconds after the steps begin."""


def packed(works: Sequence[Work], blocks: Sequence[Ints], order: Order) -> list[Packed]:
    """The steps of all instances; those that prefill come first, for the others await their KV.

    blocks: reserved for each row of each work. Two instances may await each other's: what was
    packed too early to know when KV comes is packed once more. Each has a turn of some steps.
    """
    finished: Finished = {}
    found = [pack(work, b, order, finished) for work, b in zip(works, blocks, strict=True)]
    for at, one in enumerate(found):
        if one.work.num_prefills and _missed_some(one, finished):
            found[at] = pack(one.work, blocks[at], order, finished)
    return found


def _missed_some(packed: Packed, finished: Finished) -> bool:
    """Whether KV comes that nobody knew of when this was packed."""
    missed = (packed.work.awaited & ~packed.comes).nonzero()[0]
    return any(_will_come(packed.work, row, finished) for row in missed.tolist())


def pack(work: Work, blocks: Ints, order: Order, finished: Finished) -> Packed:
    """The steps of one instance; what it prefills is added to `finished`."""
    if work.turn_steps is not None:
        order = replace(order, horizon=min(order.limit, work.turn_steps))
    answer = None
    if not work.num_prefills:
        answer = decodes_only(work, blocks, order, finished)
    elif work.num_prefills == len(work.names):
        answer = line(work, blocks, order, finished)
    return answer or Packer(work, blocks, order, finished).packed()


def _will_come(work: Work, row: int, finished: Finished) -> bool:
    """Whether the row's KV is on its way, or is computed elsewhere within the horizon."""
    source = work.source.words[work.source.codes[row]]
    return source == work.instance.name or work.names[row] in finished


def _coming(work: Work, finished: Finished) -> tuple[Bools, Ints, list[float]]:
    """The rows whose KV comes; those of them that decode here, as they arrive; and when."""
    rows = work.awaited.nonzero()[0]
    if not rows.size:
        return flags(False, len(work.names)), rows, []
    ready = [finished.get(name) for name in chosen(work.names, rows)]
    if None in ready:
        if work.instance.name in work.source.words:
            known = [_will_come(work, row, finished) for row in rows.tolist()]
        else:
            known = [us is not None for us in ready]
        rows = rows[known]
        ready = [us or 0.0 for us in compress(ready, known)]
    comes = np.zeros(len(work.names), np.bool_)
    comes[rows] = True
    arrival_us = np.array(ready, np.float64) + work.transfer_us[rows]
    decodes = work.decodes[rows] > 0
    if np.count_nonzero(decodes) < len(rows):
        rows, arrival_us = rows[decodes], arrival_us[decodes]
    if finished and len(rows) > 1:
        order = np.argsort(arrival_us, kind="stable")
        rows, arrival_us = rows[order], arrival_us[order]
    return comes, rows, arrival_us.tolist()


# Prompts alone


def line(work: Work, blocks: Ints, order: Order, finished: Finished) -> Packed | None:
    """The steps of an instance that only prefills, where no prompt waits for blocks or has bounds.

    Prompts one behind the other make a line of tokens, which the budget cuts into steps. None
    where that is not all.
    """
    instance, rows = work.instance, len(work.names)
    budget = order.budget(instance.max_step_tokens)
    bounded = len(work.bounds.values) != 2 * rows or instance.max_partial_prefills
    if bounded or np.count_nonzero(work.decodes) or blocks.sum() > instance.kv_blocks:
        return None
    started = work.held > work.cached
    at = np.argsort(~started, kind="stable")
    chunks, first, last = _cut(work.held[at], work.prompt[at], budget, order.limit)
    step = chunks[0]
    if step.size > instance.max_batch and np.bincount(step).max() > instance.max_batch:
        return None
    chunks[1] = at[chunks[1]]
    first[: np.count_nonzero(started)] = 0
    steps = int(step[-1]) + 1
    us, tokens = _line_estimates(work, chunks, steps)
    done = last < steps
    names = chosen(work.names, at[done])
    finished.update(zip(names, us.cumsum()[last[done]].tolist(), strict=True))
    taken, given = (np.bincount(n, blocks[at], steps)[:steps] for n in (first, last + 1))
    return Packed(
        work=work,
        blocks=blocks,
        chunks=chunks,
        us=us,
        tokens=tokens,
        used_blocks=(taken - given).cumsum().astype(np.int64),
        begin=zeros(rows),
        until=zeros(rows),
        comes=flags(False, rows),
    )


def _cut(
    held: Ints, prompt: Ints, budget: int, limit: int
) -> tuple[npt.NDArray[np.int64], Ints, Ints]:
    """The chunks of the first `limit` steps, and the first and the last step of each row.

    >>> _cut(np.array([0, 2]), np.array([3, 6]), budget=5, limit=9)[0].T.tolist()
    [[0, 0, 0, 3], [0, 1, 2, 4], [1, 1, 4, 6]]
    """
    ends = (prompt - held).cumsum()
    starts = ends - (prompt - held)
    begin = np.concatenate([starts, np.arange(budget, ends[-1], budget)])
    begin.sort()
    if np.count_nonzero(begin[1:] == begin[:-1]):
        begin = np.unique(begin)
    row = starts.searchsorted(begin, "right") - 1
    shift = (held - starts)[row]
    end = np.concatenate([begin[1:], ends[-1:]])
    step = begin // budget
    chunks = np.array([step, row, begin + shift, end + shift])
    if step[-1] >= limit:
        chunks = chunks[:, : step.searchsorted(limit)]
    return chunks, starts // budget, (ends - 1) // budget


def _line_estimates(work: Work, chunks: npt.NDArray[np.int64], steps: int) -> tuple[Floats, Ints]:
    """Microseconds and tokens of each step."""
    step, _, begin, end = chunks
    # A token attends to itself and to those before it.
    pairs = np.bincount(step, (end * (end + 1) - begin * (begin + 1)) / 2, steps)
    tokens = np.bincount(step, end - begin, steps)
    return work.instance.cost.step_us(tokens, pairs, 0.0), tokens.astype(np.int64)


# Decodes alone


def decodes_only(work: Work, blocks: Ints, order: Order, finished: Finished) -> Packed | None:
    """The steps of an instance that only decodes, where there is place and KV for all at once.

    None where there is not.
    """
    instance = work.instance
    seats = min(instance.max_batch, instance.max_step_tokens)
    if len(work.names) > seats or blocks.sum() > instance.kv_blocks:
        return None
    comes, awaited, arrival_us = _coming(work, finished)
    decodes = work.decodes
    if np.count_nonzero(work.awaited):
        decodes = np.where(work.awaited, 0, decodes)
    rows, context, used = _staying(decodes, work.prompt, blocks, order.limit)
    if arrival_us:
        columns = (column[awaited].tolist() for column in (work.decodes, work.prompt, blocks))
        joining = zip(arrival_us, *columns, strict=True)
        alone = rows, context, used
        us, rows, used = _with_arrivals(work.instance.cost, alone, joining, order.limit)
    else:
        us = work.instance.cost.step_us(rows, context, context, rows)
    taken = np.minimum(decodes, len(us))
    if len(awaited):
        taken = np.where(comes, work.decodes, taken)
    return Packed(
        work=work,
        blocks=blocks,
        chunks=_NO_CHUNKS,
        us=us,
        tokens=rows,
        used_blocks=used,
        begin=zeros(len(taken)),
        until=np.where(taken > 0, work.prompt + taken, 0),
        comes=comes,
    )


_NO_CHUNKS = np.zeros((4, 0), np.int64)


def _staying(decodes: Ints, prompt: Ints, blocks: Ints, limit: int) -> tuple[Ints, Ints, Ints]:
    """Of each step, how many rows decode, their tokens of KV, and their blocks.

    A row that decodes n steps is there in those from 0 to n - 1.

    >>> [column.tolist() for column in _staying(np.array([2, 1]), np.array([5, 8]), np.ones(2), 9)]
    [[2, 1], [13, 6], [2, 1]]
    """
    steps = min(limit, int(decodes.max())) if decodes.size else 0
    short = (decodes < steps).nonzero()[0]
    leaves = decodes[short]

    rows = _left(len(decodes), leaves, None, steps)
    context = _left(int(prompt.sum()), leaves, prompt[short], steps)
    used = _left(int(blocks.sum()), leaves, blocks[short], steps)
    return rows, context + rows * np.arange(steps), used


def _left(total: float, at: Ints, gone: Ints | Floats | None, steps: int) -> Ints:
    """What is left of `total` in each step when `gone`, each 1 if None, leaves at the steps `at`.

    >>> _left(5, np.array([1, 2]), np.array([3, 2]), 4).tolist()
    [5, 2, 0, 0]
    """
    return (total - np.bincount(at, gone, steps).cumsum()).astype(np.int64)


def _with_arrivals(
    cost: StepCost,
    residents: tuple[Ints, Ints, Ints],
    joining: Iterable[tuple[float, int, int, int]],
    limit: int,
) -> tuple[Floats, Ints, Ints]:
    """Microseconds, tokens and blocks of each step, where rows join the residents as they arrive.

    residents: as `_staying` says. joining: of each row, in order, when it arrives, the steps it
    decodes, its prompt and its blocks. Step by step until all have come, then at once.
    """
    here = [column.tolist() for column in residents]
    steps: list[tuple[float, int, int]] = []
    leaves: dict[int, list[tuple[int, int]]] = defaultdict(list)
    waiting = deque(joining)
    now = 0.0
    joined = context = blocks = 0
    while waiting and (step := len(steps)) < limit:
        for held, freed in leaves.pop(step, ()):
            joined, context, blocks = joined - 1, context - held, blocks - freed
        while waiting and waiting[0][0] <= now:
            _, decodes, prompt, taken = waiting.popleft()
            joined, context, blocks = joined + 1, context + prompt, blocks + taken
            leaves[step + decodes].append((prompt + decodes, taken))
        alone = [column[step] for column in here] if step < len(here[0]) else _NOBODY
        if rows := joined + alone[0]:
            held = context + alone[1]
            steps.append((cost.one_step_us(rows, held, held, rows), rows, blocks + alone[2]))
            now += steps[-1][0]
            context += joined
        else:
            now = waiting[0][0]
    rest, held_rest, used_rest = _all_there(
        residents, (joined, context, blocks), leaves, len(steps), limit
    )
    us, tokens, used = np.array(steps, np.float64).reshape(-1, 3).T
    return (
        np.concatenate([us, cost.step_us(rest, held_rest, held_rest, rest)]),
        np.concatenate([tokens.astype(np.int64), rest]),
        np.concatenate([used.astype(np.int64), used_rest]),
    )


_NOBODY = [0, 0, 0]


def _all_there(
    residents: tuple[Ints, Ints, Ints],
    joined: tuple[int, int, int],
    leaves: dict[int, list[tuple[int, int]]],
    begin: int,
    limit: int,
) -> tuple[Ints, Ints, Ints]:
    """Rows, tokens of KV and blocks of each step from `begin` on, when nobody joins any more.

    joined: these of the rows that joined before. leaves: by step, KV and blocks of each of those
    that leaves.
    """
    end = min(limit, max([len(residents[0]), *leaves]))
    steps = max(0, end - begin)
    gone = [(at - begin, *one) for at, left in leaves.items() if at < end for one in left]
    at, held, freed = np.array(gone, np.int64).reshape(-1, 3).T
    rows = _left(joined[0], at, None, steps)
    context = _left(joined[1], at, held, steps) + rows.cumsum() - rows
    used = _left(joined[2], at, freed, steps)
    for column, alone in zip((rows, context, used), residents, strict=True):
        more = alone[begin:end]
        column[: len(more)] += more
    return rows, context, used


# Anything


class Packer:
    """Packs the steps of one instance, one after the other.

    Plain numbers and lists: a step has few changes. `clock` counts the steps in which rows decode;
    in time-share mode those are fewer than the steps. `leaves` says by that clock how many rows
    are done, with their tokens of KV and their blocks; `returned`, by step, how many blocks an
    exported prompt gives back.
    """

    def __init__(self, work: Work, blocks: Ints, order: Order, finished: Finished) -> None:
        self.work, self.order, self.finished = work, order, finished
        self.blocks = blocks
        self.chunks: list[int] = []
        self.us: list[float] = []
        self.tokens: list[int] = []
        self.used_blocks: list[int] = []
        self.begin = np.zeros(len(work.names), np.int64)
        self.joined = np.full(len(work.names), _NEVER)
        self.clock = self.active = self.turns = 0
        self.context = self.now_us = 0.0
        self.free = work.instance.kv_blocks
        self.leaves: dict[int, list[float]] = defaultdict(lambda: [0, 0.0, 0])
        self.returned: dict[int, int] = defaultdict(int)
        self.seats = min(work.instance.max_batch, work.instance.max_step_tokens)
        self._sort_rows()

    def _sort_rows(self) -> None:
        """Who has KV here already, who waits for it, and who waits to be computed."""
        work, num_prefills = self.work, self.work.num_prefills
        held = (work.held - work.cached)[:num_prefills].tolist()
        self.position = work.held[:num_prefills].tolist()
        self.prompt: list[int] = work.prompt[:num_prefills].tolist()
        self.decodes = work.decodes[:num_prefills].tolist()
        self.needs = self.blocks[:num_prefills].tolist()
        self.offsets, self.bounds = work.bounds.offsets.tolist(), work.bounds.values.tolist()
        self.uncut = len(self.bounds) == 2 * num_prefills
        self.running = [row for row in range(num_prefills) if held[row] > 0]
        self.waiting = deque(row for row in range(num_prefills) if held[row] == 0)
        self.free -= sum(self.needs[row] for row in self.running)
        self.comes, awaited, arrival_us = _coming(work, self.finished)
        self.any_comes = bool(np.count_nonzero(self.comes))
        self.awaited, self.arrival_us = deque(awaited.tolist()), deque(arrival_us)
        self.reserve = len(awaited) if num_prefills else 0
        here = ~work.awaited & (work.decodes > 0)
        here[:num_prefills] = False
        self._seat_residents(here.nonzero()[0])

    def _seat_residents(self, rows: Ints) -> None:
        """Residents decode from step 0, as many as a step takes; the rest as places get free."""
        work = self.work
        self.free -= int(self.blocks[rows].sum())
        seated, self.standing = rows[: self.seats], deque(rows[self.seats :].tolist())
        self.joined[seated] = 0
        self.active = len(seated)
        self.context = float(work.prompt[seated].sum())
        seated = seated[work.decodes[seated] < self.order.limit]
        steps = work.decodes[seated]
        if len(seated) < FEW:
            columns = (steps.tolist(), work.prompt[seated].tolist(), self.blocks[seated].tolist())
            for at, prompt, blocks in zip(*columns, strict=True):
                self._leaves_at(at, prompt + at, blocks)
            return
        weights = (None, work.prompt[seated] + steps, self.blocks[seated])
        gone = np.array([np.bincount(steps, w) for w in weights]).T
        self.leaves |= {at: gone[at].tolist() for at in gone[:, 0].nonzero()[0].tolist()}

    def packed(self) -> Packed:
        """Pack steps until nothing is left to do, or the horizon ends."""
        limit = self.order.limit
        while len(self.us) < limit:
            if self.returned or self.clock in self.leaves:
                self._leave()
            if self.standing or self.awaited:
                self._join()
            if self._only_decodes():
                self._decode_on()
                break
            if not self._pack() and not self._unblock():
                break
        return Packed(
            work=self.work,
            blocks=self.blocks,
            chunks=np.array(self.chunks, np.int64).reshape(-1, 4).T.copy(),
            us=np.array(self.us),
            tokens=np.array(self.tokens, np.int64),
            used_blocks=np.array(self.used_blocks, np.int64),
            begin=np.where(self.comes, 0, self.begin) if self.any_comes else self.begin,
            until=self._until(),
            comes=self.comes,
        )

    def _unblock(self) -> bool:
        """Where nothing can be computed: wait for exported KV to leave, or other KV to come."""
        if self.returned:
            self.free += sum(self.returned.values())
            self.returned.clear()
            return True
        if self.awaited and self.arrival_us[0] > self.now_us:
            self.now_us = self.arrival_us[0]
            return True
        return False

    def _leave(self) -> None:
        """Rows whose last decode is behind give back their place and their blocks."""
        if self.clock in self.leaves:
            rows, context, blocks = self.leaves.pop(self.clock)
            self.active -= int(rows)
            self.context -= context
            self.free += int(blocks)
        if self.returned:
            self.free += self.returned.pop(len(self.us), 0)

    def _join(self) -> None:
        """Residents that stood and rows whose KV has arrived decode, where there is room."""
        while self.standing and self.active < self.seats:
            self._decode_here(self.standing.popleft())
        while self.awaited and self.active < self.seats:
            row = self.awaited[0]
            if self.arrival_us[0] > self.now_us or self.blocks[row] > self.free:
                break
            self.awaited.popleft()
            self.arrival_us.popleft()
            self.free -= int(self.blocks[row])
            self._decode_here(row)

    def _only_decodes(self) -> bool:
        """Whether nothing happens any more but that rows decode and leave."""
        prompts = self.running or self.waiting
        return not (prompts or self.standing or self.awaited or self.returned)

    def _decode_on(self) -> None:
        """Pack the steps that are left, all at once, where only rows leave in between."""
        left = self.order.limit - len(self.us)
        leaves = [(clock - self.clock, *gone) for clock, gone in self.leaves.items()]
        at, rows, context, blocks = np.array(leaves, np.int64).reshape(-1, 4).T
        steps = left if rows.sum() < self.active else min(left, int(at.max(initial=0)))
        inside = at < steps
        at, rows, context, blocks = (column[inside] for column in (at, rows, context, blocks))
        active = _left(self.active, at, rows, steps)
        held = _left(self.context, at, context, steps) + active.cumsum() - active
        used = _left(self.work.instance.kv_blocks - self.free, at, blocks, steps)
        self.us += self.work.instance.cost.step_us(active, held, held, active).tolist()
        self.tokens += active.tolist()
        self.used_blocks += used.tolist()
        self.clock += steps

    def _decode(self, row: int, prompt: int, steps: int, blocks: int) -> None:
        """The row decodes from the step that is packed next, and is done after its last one."""
        self.begin[row] = len(self.us)
        self.joined[row] = self.clock
        self.active += 1
        self.context += prompt
        self._leaves_at(self.clock + steps, prompt + steps, blocks)

    def _leaves_at(self, clock: int, context: int, blocks: int) -> None:
        """A row leaves then, with its tokens of KV and its blocks."""
        leaving = self.leaves[clock]
        leaving[0] += 1
        leaving[1] += context
        leaving[2] += blocks

    def _decode_here(self, row: int) -> None:
        """A row that this instance does not prefill decodes."""
        work = self.work
        numbers = work.prompt[row], work.decodes[row], self.blocks[row]
        self._decode(row, *map(int, numbers))

    def _pack(self) -> bool:
        """Pack one step; False where there is nothing to compute."""
        decoding = self._decoding()
        prompts, pairs, finished = self._take_chunks(decoding)
        decoding = decoding if prompts else self.active
        if not decoding and not prompts:
            return False
        self.turns = self.order.turn if prompts else self.turns - 1
        self._append(prompts, decoding, pairs)
        for row in finished:
            self._finish(row)
        return True

    def _append(self, prompts: int, decoding: int, pairs: float) -> None:
        """Count the step that is packed: its time, tokens and blocks."""
        instance = self.work.instance
        context = self.context if decoding else 0.0
        us = instance.cost.one_step_us(prompts + decoding, pairs + context, context, decoding)
        self.now_us += us
        self.us.append(us)
        self.tokens.append(prompts + decoding)
        self.used_blocks.append(instance.kv_blocks - self.free)
        if decoding:
            self.clock += 1
            self.context += decoding

    def _decoding(self) -> int:
        """How many rows decode in this step if it has chunks."""
        if self.order.mode == "hybrid" or not (self.running or self.waiting):
            return self.active
        if self.order.mode == "time-share" and self.turns > 0:
            return self.active
        return 0

    def _take_chunks(self, decoding: int) -> tuple[int, float, list[int]]:
        """Prompt tokens, the pairs they attend to, and the rows whose prompt ends in this step."""
        if not (self.running or self.waiting) or (decoding and self.order.mode != "hybrid"):
            return 0, 0.0, []
        instance = self.work.instance
        budget = instance.max_step_tokens - decoding
        budget -= min(self.reserve, instance.max_step_tokens // 2)
        budget = self.order.budget(budget)
        # Whose prompt ends decodes from the next step on, beside all that decode now.
        seats = self.seats - self.active
        partial = instance.max_partial_prefills or seats
        left, pairs, step = budget, 0.0, len(self.us)
        finished: list[int] = []
        queue, self.running = self.running, []
        chunks, position, prompt = self.chunks, self.position, self.prompt
        while left > 0 and seats > 0 and partial > 0:
            if queue:
                row = queue.pop(0)
            elif self.waiting and self.needs[self.waiting[0]] <= self.free:
                row = self._start()
            else:  # those behind the first that waits for blocks wait for it
                break
            begin = position[row]
            bound = prompt[row] if self.uncut else self._bound(row)
            end = begin + left if bound > begin + left else bound
            chunks += (step, row, begin, end)
            position[row] = end
            left -= end - begin
            seats -= 1
            pairs += (end * (end + 1) - begin * (begin + 1)) / 2
            if end == prompt[row]:
                finished.append(row)
            else:
                self.running.append(row)
                partial -= 1
        self.running += queue
        return budget - left, pairs, finished

    def _start(self) -> int:
        row = self.waiting.popleft()
        self.free -= self.needs[row]
        return row

    def _bound(self, row: int) -> int:
        """Where the chunk ends that the row is in."""
        low, high = self.offsets[row], self.offsets[row + 1]
        return int(self.bounds[bisect.bisect_right(self.bounds, self.position[row], low, high)])

    def _finish(self, row: int) -> None:
        """The row's prompt is computed: it decodes here from the next step, or leaves."""
        self.finished[self.work.names[row]] = self.now_us
        if self.decodes[row]:
            self._decode(row, self.prompt[row], self.decodes[row], self.needs[row])
        else:
            self.returned[len(self.us)] += self.needs[row]

    def _until(self) -> Ints:
        """Tokens of KV of each row after its last decode; 0 where it does not decode."""
        work = self.work
        taken = np.minimum(self.joined + work.decodes, self.clock) - self.joined
        if self.any_comes:
            taken = np.where(self.comes, work.decodes, taken)
        return np.where(taken > 0, work.prompt + taken, 0)
