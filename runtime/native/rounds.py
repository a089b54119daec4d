"""Rounds that the library does not plan: their state from its columns, and the plans as columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sagec.runtime.loop import Instance, Planner, columns_of
from sagec.runtime.native.library import Column, NotCovered, Run, lists
from sagec.runtime.plan import RECOMPUTE, ExecutionPlan
from sagec.runtime.request import Request
from sagec.runtime.state import Running, State, Strings, Waiting
from sagec.runtime.strategies import Strategy

_COLUMNS = {
    "requests": lambda plan: plan.request_ids,
    "kv_blocks": lambda plan: plan.rows.kv_blocks,
    "chunks.step": lambda plan: plan.chunks.step,
    "chunks.row": lambda plan: plan.chunks.row,
    "chunks.begin": lambda plan: plan.chunks.begin,
    "chunks.end": lambda plan: plan.chunks.end,
    "decodes.row": lambda plan: plan.decodes.row,
    "decodes.begin_step": lambda plan: plan.decodes.begin_step,
    "decodes.until_tokens": lambda plan: plan.decodes.until_tokens,
    "preemptions": lambda plan: plan.preemptions.row,
    "imports.row": lambda plan: plan.imports.row,
    "exports.row": lambda plan: plan.exports.row,
}
"""What the library is told of a plan's rows, by its name there."""


class Rounds:
    """Plans rounds in Python, as the loop there would: the strategy decides, the planner plans."""

    def __init__(
        self,
        run: Run,
        requests: Sequence[Request],
        strategy: Strategy,
        planner: Planner,
        members: Sequence[Instance],
    ) -> None:
        """requests: by their numbers in the library."""
        self._run, self._strategy, self._planner = run, strategy, planner
        self._requests, self._members = requests, members
        self._instances = columns_of(members)
        self._number = {request.id: number for number, request in enumerate(requests)}
        self._instance = {member.id: at for at, member in enumerate(members)}

    def plan(self) -> dict[str, Column]:
        """The plans of the round at hand. Raises NotCovered for what the library cannot carry out,
        and what the planner raises."""
        state = self._state()
        plans = self._planner.plan(state, self._strategy.decide(state))
        for plan in plans:
            _check(plan)
        return {"plans.round": np.array([state.round], np.int64)} | self._columns(plans)

    def _state(self) -> State:
        """What a strategy sees, but for how fast instances are: neither fifo nor planners look."""
        ints = self._run.ints
        waiting = self._asked("waiting")
        running = self._asked("running")
        waiting["generate_tokens"] = ints("waiting.generate_tokens")
        for name in ("instance", "decode_on", "computed_tokens", "remaining_tokens"):
            running[name] = ints(f"running.{name}")
        running["cached_tokens"] = ints("running.cached_tokens")
        running["arriving"] = ints("running.arriving").astype(bool)
        shape = (len(waiting["ids"]), len(self._members))
        return State(
            now_us=int(ints("now_us")[0]),
            round=int(ints("round")[0]),
            waiting=Waiting.of(**waiting),
            running=Running.of(**running),
            instances=dataclasses.replace(
                self._instances,
                kv_blocks_used=ints("instances.kv_blocks_used"),
                idle=ints("instances.idle").astype(bool),
            ),
            cached_tokens=ints("waiting.cached_tokens").reshape(shape),
        )

    def _asked(self, kind: str) -> dict[str, Any]:
        """Columns that waiting and running requests have."""
        numbers = self._run.ints(f"{kind}.request")
        requests = [self._requests[number] for number in numbers.tolist()]
        return {
            "ids": [request.id for request in requests],
            "sequence": numbers,
            "arrival_us": [request.arrival_us for request in requests],
            "priority": [request.priority for request in requests],
            "ttft_us": [request.ttft_us or 0 for request in requests],
            "tpot_us": [request.tpot_us or 0 for request in requests],
            "model": _strings([r.model or self._members[0].model for r in requests]),
            "tenant": _strings([request.tenant for request in requests]),
            "session": _strings([request.session for request in requests]),
            "prompt_tokens": self._run.ints(f"{kind}.prompt_tokens"),
            "output_tokens": self._run.ints(f"{kind}.output_tokens"),
            "first_token_us": np.maximum(self._run.ints(f"{kind}.first_token_us"), 0),
            "preemptions": self._run.ints(f"{kind}.preemptions"),
        }

    def _columns(self, plans: Sequence[ExecutionPlan]) -> dict[str, Column]:
        """The plans, as `read_plans` in simulation.cc takes them."""
        said: dict[str, list[Any]] = {name: [*map(of, plans)] for name, of in _COLUMNS.items()}
        said["requests"] = [[self._number[name] for name in ids] for ids in said["requests"]]
        for moves in ("imports", "exports"):
            said[f"{moves}.peer"] = [
                [self._instance[plan.peers[peer]] for peer in getattr(plan, moves).peer.tolist()]
                for plan in plans
            ]
        columns: dict[str, Column] = {
            "plans.instance": _numbers([self._instance[p.target_instance_id] for p in plans]),
            "plans.mixes_phases": _numbers([plan.mixes_phases for plan in plans]),
            "plans.num_steps": _numbers([plan.num_steps for plan in plans]),
            "plans.max_step_tokens": _numbers([plan.max_step_tokens for plan in plans]),
        }
        for name, rows in said.items():
            columns |= lists(f"plans.{name}", rows)
        return columns


def _check(plan: ExecutionPlan) -> None:
    if len(plan.evictions.block_hash) or len(plan.migrations.block_hash):
        raise NotCovered("plans that move or drop cached blocks")
    if np.count_nonzero(plan.preemptions.how != RECOMPUTE):
        raise NotCovered("KV that is swapped out")


def _numbers(values: Sequence[int]) -> Column:
    return np.array(values, np.int64)


def _strings(values: Sequence[str]) -> Strings:
    column = np.empty(len(values), np.object_)
    column[:] = values
    return column
