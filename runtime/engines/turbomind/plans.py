"""A plan at work on this instance: its columns for TurboMind, and what of it is left to do."""

from collections import defaultdict

import numpy as np

from sagec.runtime.engines.turbomind.native import PlanColumns
from sagec.runtime.engines.turbomind.rows import Row
from sagec.runtime.plan import ExecutionPlan, PlanError


class Running:
    """A plan at work. number: as the native side knows it; it grows from plan to plan.

    sessions: by which its rows are posted. step: the last one that was computed, None before the
    first. is_over: all its steps have gone by. exports: where rows go once their first token is
    sampled. imported_ids: those whose KV comes. computing_ids: those that compute or decode here.
    awaited_ids: those that do both.
    """

    def __init__(self, plan: ExecutionPlan, number: int) -> None:
        self.plan, self.number = plan, number
        self.sessions: dict[str, int] = {}
        self.step: int | None = None
        self.is_over = plan.num_steps == 0
        ids, chunks, decodes = plan.request_ids, plan.chunks, plan.decodes
        self.imported_ids = {ids[row] for row in plan.imports.row.tolist()}
        self.computing_ids = {
            ids[row] for row in np.unique(np.concatenate((chunks.row, decodes.row))).tolist()
        }
        self.awaited_ids = self.imported_ids & self.computing_ids
        peers = zip(plan.exports.row.tolist(), plan.exports.peer.tolist(), strict=True)
        self.exports = {ids[row]: plan.peers[peer] for row, peer in peers}
        reuses = zip(plan.reuses.row.tolist(), plan.reuses.tokens.tolist(), strict=True)
        self._reuses = {ids[row]: tokens for row, tokens in reuses}
        self._chunks: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        columns = (chunks.row, chunks.step, chunks.begin, chunks.end)
        for row, *chunk in zip(*(column.tolist() for column in columns), strict=True):
            self._chunks[ids[row]].append((chunk[0], chunk[1], chunk[2]))
        prompts = plan.rows.prompt_tokens[decodes.row]
        members = (decodes.row, decodes.until_tokens, prompts)
        self._decodes = {
            ids[row]: (until, prompt)
            for row, until, prompt in zip(*(column.tolist() for column in members), strict=True)
        }

    def gap_of(self, row: Row) -> str:
        """Why the plan's chunks of a row cannot be computed; "" where they can.

        What was swapped out counts as computed, and so does what the prefix cache may have.
        """
        if not (chunks := self._chunks.get(row.id)):
            return ""
        step, begin, end = chunks[0]
        if begin > max(row.held_tokens, self._reuses.get(row.id, 0)):
            found = f"leaves a gap: only {row.held_tokens} tokens are computed"
        elif (end := max(chunk[2] for chunk in chunks)) > row.num_tokens:
            found = f"goes beyond the request's {row.num_tokens} tokens"
        else:
            return ""
        return f"plan {self.plan.plan_id!r} step {step}: chunk [{begin}, {end}) {found}"

    def has_left(self, row: Row) -> bool:
        """Whether a step still to come computes tokens of this row, with the KV that is here."""
        if self.is_over or self.sessions.get(row.id) != row.session:
            return False
        computed = row.held_tokens
        if until_and_prompt := self._decodes.get(row.id):
            until, prompt = until_and_prompt
            if computed < until and (computed >= prompt or row.decodes):
                return True
        gone = -1 if self.step is None else self.step
        claimed = max(computed, self._reuses.get(row.id, 0))
        return any(
            step > gone and end > computed and begin <= claimed
            for step, begin, end in self._chunks.get(row.id, ())
        )


def columns(running: Running) -> PlanColumns:
    """The plan for the native side.

    >>> from sagec.runtime.plan import ExecutionPlan
    >>> plan = ExecutionPlan(plan_id="p", round=0, target_instance_id="i", mode="time-share",
    ...                      num_steps=2, max_step_tokens=64)
    >>> columns(Running(plan, 7)).mixes_phases
    False
    """
    plan = running.plan
    reused = np.zeros(len(plan.rows), np.int64)
    reused[plan.reuses.row] = plan.reuses.tokens
    return PlanColumns(
        plan=running.number,
        num_steps=plan.num_steps,
        max_step_tokens=plan.max_step_tokens,
        mixes_phases=plan.mixes_phases,
        sessions=np.array([running.sessions[id] for id in plan.request_ids], np.uint64),
        prompt_tokens=plan.rows.prompt_tokens,
        reused_tokens=reused,
        chunk_step=plan.chunks.step,
        chunk_row=plan.chunks.row,
        chunk_begin=plan.chunks.begin,
        chunk_end=plan.chunks.end,
        decode_row=plan.decodes.row,
        decode_begin_step=plan.decodes.begin_step,
        decode_until_tokens=plan.decodes.until_tokens,
    )


def refuse_unsupported(plan: ExecutionPlan, instance: str) -> None:
    """Raise PlanError where the plan asks for what this engine cannot do."""
    source = f"plan {plan.plan_id!r}"
    if plan.target_instance_id != instance:
        raise PlanError(f"{source} is for {plan.target_instance_id!r}; this is {instance!r}")
    if plan.max_step_tokens < 1:
        raise PlanError(f"{source}: max_step_tokens is {plan.max_step_tokens}; 1 at least")
    for name in ("evictions", "migrations"):
        if len(getattr(plan, name)):
            raise PlanError(
                f"{source}: {name}: the prefix cache of {instance!r} is TurboMind's own, which "
                "evicts by itself; leave them out"
            )
    wishes = plan.acceleration
    if wishes.quantization != "none" or wishes.draft_tokens or wishes.cuda_graph:
        raise PlanError(f"{source}: acceleration: {instance!r} runs as it was loaded; ask for none")
