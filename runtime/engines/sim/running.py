"""A plan under way in the simulator: what comes next, as many like steps at a time as there are."""

import bisect
from dataclasses import dataclass, field

import numpy as np

from sagec.runtime.cost import StepCost
from sagec.runtime.engines.sim.residents import Residents
from sagec.runtime.engines.sim.row import Row
from sagec.runtime.plan import ExecutionPlan

Chunk = tuple[Row, int, int]
"""A row, and the prompt tokens [begin, end) of it that a step computes."""


@dataclass
class Stretch:
    """Steps [first, first + len(ends_us)) of a plan that compute the same rows, one after another.

    With chunks it is one step, unless a lone prompt is computed chunk by chunk: `reached` are then
    its tokens after each of the steps. done: how many of the steps have been told of.
    """

    first: int
    chunks: list[Chunk]
    decodes: list[Row]
    begin_us: int
    ends_us: list[int]
    reached: list[int] = field(default_factory=list)
    done: int = 0

    @property
    def is_done(self) -> bool:
        """Whether all its steps have been told of."""
        return self.done == len(self.ends_us)

    @property
    def told_until_us(self) -> int:
        """When the first step began that was not told of yet."""
        return self.ends_us[self.done - 1] if self.done else self.begin_us

    @property
    def step_ends_us(self) -> int:
        """When the next step ends of which was not told yet; some are left."""
        return self.ends_us[self.done]

    def end_of_step_at(self, now_us: int) -> int | None:
        """When the step ends that is at work at this time; None: all have ended before it."""
        at = bisect.bisect_left(self.ends_us, now_us)
        return self.ends_us[at] if at < len(self.ends_us) else None

    def chunks_of(self, steps: int) -> list[Chunk]:
        """What so many more steps compute of prompts."""
        if not self.reached:
            return self.chunks
        row = self.chunks[0][0]
        return [(row, row.computed, self.reached[self.done + steps - 1])]

    def over_by(self, now_us: int) -> int:
        """How many more of the steps have ended since those that were told of."""
        return bisect.bisect_right(self.ends_us, now_us) - self.done

    def begin_later(self, by_us: int) -> None:
        """Put off steps of which none was told yet."""
        self.begin_us += by_us
        self.ends_us = [end_us + by_us for end_us in self.ends_us]

    def end_with_the_step_at(self, now_us: int) -> None:
        """Leave out the steps that begin at this time or later."""
        del self.ends_us[max(self.done, bisect.bisect_left(self.ends_us, now_us) + 1) :]
        if self.told_until_us >= now_us:
            del self.ends_us[self.done :]


class RunningPlan:
    """A plan and how far it is: `step` is the next one."""

    def __init__(self, plan: ExecutionPlan) -> None:
        self.plan = plan
        self.step = 0
        ids = plan.request_ids
        self.kv_blocks = dict(zip(ids, plan.rows.kv_blocks.tolist(), strict=True))
        pairs = zip(plan.exports.row.tolist(), plan.exports.peer.tolist(), strict=True)
        self.exports = {ids[row]: plan.peers[peer] for row, peer in pairs}
        self.imports = dict.fromkeys(ids[row] for row in plan.imports.row.tolist())
        self._chunks: dict[int, list[tuple[str, int]]] = {}
        chunks = plan.chunks
        columns = (chunks.step.tolist(), chunks.row.tolist(), chunks.end.tolist())
        for step, row, end in zip(*columns, strict=True):
            self._chunks.setdefault(step, []).append((ids[row], end))
        decodes = plan.decodes
        columns = (decodes.row.tolist(), decodes.begin_step.tolist(), decodes.until_tokens.tolist())
        self._decodes = [(ids[r], begin, until) for r, begin, until in zip(*columns, strict=True)]
        self._starts = sorted({*self._chunks, *(begin for _, begin, _ in self._decodes)})

    @property
    def computing(self) -> set[str]:
        """Requests that decode here."""
        return {request_id for request_id, _, _ in self._decodes}

    def next_stretch(self, residents: Residents, cost: StepCost, now_us: int) -> Stretch | None:
        """The next steps in which there is something to do; None: there are none."""
        for step in (self.step, *self._starts[bisect.bisect_right(self._starts, self.step) :]):
            if step >= self.plan.num_steps:
                break
            self.step = step
            chunks = self._chunks_of(step, residents)
            tokens = sum(end - begin for _, begin, end in chunks)
            decodes: list[Row] = []
            most = self._until_change(step)
            if not chunks or self.plan.mixes_phases:
                decodes, most = self._decodes_of(step, tokens, 1 if chunks else most, residents)
            if chunks or decodes:
                stretch = _stretch(step, chunks, decodes, 1 if chunks else most, cost, now_us)
                if len(chunks) == 1 and not self._decodes:
                    self._prolong(stretch, residents, cost)
                return stretch
        return None

    def _prolong(self, stretch: Stretch, residents: Residents, cost: StepCost) -> None:
        """Let a lone prompt's chunk be followed by the next ones, up to the one that samples.

        Nothing else happens then, for nobody decodes here.
        """
        row, _, end = stretch.chunks[0]
        reserved = self.kv_blocks[row.request.id]
        reached, ends_us = [end], stretch.ends_us
        for step in range(stretch.first + 1, self.plan.num_steps):
            chunks = self._chunks.get(step, ())
            if len(chunks) != 1 or chunks[0][0] != row.request.id:
                break
            begin, end = end, chunks[0][1]
            if not begin < end < row.num_tokens or not residents.make_room(row, end, reserved):
                break
            ends_us.append(ends_us[-1] + _chunk_us(cost, begin, end))
            reached.append(end)
        if len(reached) > 1:
            stretch.reached = reached

    def _until_change(self, step: int) -> int:
        """Steps from this one on until chunks or rows of the batch change, as the plan says."""
        later = bisect.bisect_right(self._starts, step)
        change = self._starts[later] if later < len(self._starts) else self.plan.num_steps
        return min(change, self.plan.num_steps) - step

    def _chunks_of(self, step: int, residents: Residents) -> list[Chunk]:
        """The step's chunks, less what is computed already; and with what the prefix cache was
        thought to have and has not."""
        chunks: list[Chunk] = []
        for request_id, end in self._chunks.get(step, ()):
            row = residents.rows.get(request_id)
            if row is None or end > row.num_tokens:
                continue
            residents.begin(row)
            if row.computed >= end:
                continue
            if residents.make_room(row, end, self.kv_blocks[request_id]):
                chunks.append((row, row.computed, end))
        return chunks

    def _decodes_of(
        self, step: int, tokens: int, most: int, residents: Residents
    ) -> tuple[list[Row], int]:
        """Rows that decode from this step on, and for how many steps all of them do."""
        budget = self.plan.max_step_tokens - tokens
        known, block_tokens = residents.rows, residents.block_tokens
        found: list[Row] = []
        steps = most
        for request_id, begin, until in self._decodes:
            if len(found) >= budget:
                break
            if begin > step or (row := known.get(request_id)) is None or not row.decodes:
                continue
            computed = row.computed
            if computed >= until:
                continue
            # Of plain comparisons, for this is where a simulation spends its time.
            end = computed + most
            if end > until:
                end = until
            if end >= row.limit:
                end = row.limit - 1
            if row.blocks * block_tokens < end:  # it has no room yet for all of these steps
                reserved = self.kv_blocks[request_id]
                if not residents.make_room(row, end, reserved):
                    end = computed + 1
                    if not residents.make_room(row, end, reserved):
                        continue
            if end - computed < steps:
                steps = end - computed
            found.append(row)
        return found, steps


def _stretch(
    step: int, chunks: list[Chunk], decodes: list[Row], steps: int, cost: StepCost, now_us: int
) -> Stretch:
    tokens = sum(end - begin for _, begin, end in chunks) + len(decodes)
    context = sum(row.num_tokens for row in decodes)
    pairs = sum((end * (end + 1) - begin * (begin + 1)) / 2 for _, begin, end in chunks)
    if steps == 1:
        us = cost.one_step_us(tokens, pairs + context, context, len(decodes))
        ends = [now_us + max(1, round(us))]
    else:
        contexts = context + len(decodes) * np.arange(steps)
        us_each = np.maximum(cost.step_us(tokens, contexts, contexts, tokens).round(), 1)
        ends = (now_us + us_each.cumsum()).astype(np.int64).tolist()
    return Stretch(step, chunks, decodes, now_us, ends)


def _chunk_us(cost: StepCost, begin: int, end: int) -> int:
    """What a step takes that computes these tokens of a prompt, and nothing else."""
    pairs = (end * (end + 1) - begin * (begin + 1)) / 2
    return max(1, round(cost.one_step_us(end - begin, pairs, 0, 0)))
