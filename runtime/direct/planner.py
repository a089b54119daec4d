"""The direct planner: plans of the usual rounds, to the byte those of the compiler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sagec.runtime.direct import digest
from sagec.runtime.direct.chunking import bounds_of, whole
from sagec.runtime.direct.cluster import Cluster
from sagec.runtime.direct.columns import Coded, Ints, Lists, Words, joined_words, words_in_order
from sagec.runtime.direct.emitting import Target, idle_plan, plan_of
from sagec.runtime.direct.packing import Order, packed
from sagec.runtime.direct.places import Fresh, place, words_of
from sagec.runtime.direct.waves import Asked, NotCovered, Wave, read
from sagec.runtime.direct.work import Work
from sagec.runtime.direct.works import Splitter
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.state import Decision, State

TURN = 4
"""Steps of decodes after one of prompts, in time-share mode."""


class DirectPlanner:
    """Plans rounds without IR: the pipeline `round` in one go, for what is usual.

    Its plans are to the byte those of `sagec.planner.CompilingPlanner`, digest and all. Where that
    is not sure it raises NotCovered: among others for every round that the passes refuse.

    mode, chunk, horizon: as for the compiler; see `sagec.builder.IRBuilder`.
    """

    def __init__(
        self, cluster: Cluster, *, mode: str = "hybrid", chunk: int = 0, horizon: int
    ) -> None:
        self.cluster, self.mode, self.chunk, self.horizon = cluster, mode, chunk, horizon
        self._without: tuple[frozenset[str], Cluster] | None = None  # dead instances

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        """The plans of a round, one for each instance with work. Raises NotCovered."""
        cluster = self._living(state)
        asked = read(state, decision, cluster)
        mode = decision.mode or self.mode
        if asked.waves and mode == "strict" and cluster.has_both:
            raise NotCovered("a strict round, and an instance of both roles")
        fresh = place(asked, cluster)
        bounds = self._say_prefills(asked, fresh, cluster)
        horizon = decision.horizon_steps or self.horizon
        splitter = Splitter(cluster, asked.residents, fresh, bounds, horizon)
        works = splitter.works(asked.turns)
        for left in splitter.left:
            asked.preempt(left.at, cluster.names[left.at], left.names, left.because)
        ops = _with_decode(asked, fresh, cluster, splitter.kept)
        target = Target(
            name=f"round_{state.round}",
            round=state.round,
            mode=mode,
            digest=digest.of_ops(ops),
            cluster=cluster,
            gone=asked.gone,
        )
        _check_adapters(asked.waves, works, cluster)
        order = Order(mode, TURN, horizon, decision.step_prompt_tokens)
        return _without_idle(_plans(works, order, target), state)

    def _living(self, state: State) -> Cluster:
        """The cluster of the instances that live."""
        alive = state.instances.alive
        if alive.all():
            return self.cluster
        dead = frozenset(state.instances.ids[~alive].tolist())
        if self._without is None or self._without[0] != dead:
            self._without = (dead, self.cluster.without(dead))
        return self._without[1]

    def _say_prefills(self, asked: Asked, fresh: Fresh | None, cluster: Cluster) -> Lists:
        """Bounds of all fresh rows; the ops of the waves are among those of the digest then."""
        parts, begin = [], 0
        for wave in asked.waves:
            assert fresh is not None
            rows = slice(begin, begin + len(wave))
            begin = rows.stop
            cached, here = fresh.cached[rows], fresh.on[rows]
            if np.count_nonzero(cached):
                wave.said["cached"] = digest.of_numbers(cached)
            start = wave.computed + cached
            if len(cached) and np.count_nonzero(start >= wave.prompt):
                raise NotCovered("a prompt of which nothing is left to compute")
            if self.chunk or np.count_nonzero(wave.chunk):
                most = np.where(wave.chunk > 0, wave.chunk, self.chunk)
                bounds = bounds_of(start, wave.prompt, most)
            else:
                bounds = whole(start, wave.prompt)
            parts.append(bounds)
            said = {
                "bounds": digest.of_lists(bounds),
                "on": digest.of_words(_placed(wave, here, len(fresh), cluster)),
            }
            if self.chunk:
                said["chunk"] = digest.of_scalar(self.chunk)
            asked.ops.append(digest.of_op("pd.requests", wave.said))
            asked.ops.append(digest.of_op("pd.prefill", said))
        return _joined_lists(parts)


def _placed(wave: Wave, at: Ints, rows: int, cluster: Cluster) -> Coded:
    """The places of a wave, as `select-device` writes them."""
    if rows:
        return words_of(at, cluster.names)
    # Of no rows at all, what the requests said stays.
    return Words(("",) if "on" not in wave.said else (), at)


def _joined_lists(parts: Sequence[Lists]) -> Lists:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return _NO_LISTS
    first, second = parts
    offsets = np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]])
    return Lists(offsets, np.concatenate([first.values, second.values]))


_NO_LISTS = Lists(np.zeros(1, np.int64), np.zeros(0, np.int64))


def _with_decode(
    asked: Asked, fresh: Fresh | None, cluster: Cluster, kept: Ints | None
) -> list[bytes]:
    """The ops of the digest, with those that take all rows; kept: residents that stay, where some
    leave."""
    columns: list[Coded] = []
    residents = asked.residents
    if residents is not None:
        columns.append(_in_order(residents.at, cluster))
    begin = 0
    for wave in asked.waves:
        assert fresh is not None
        at = fresh.decode_on[begin : begin + len(wave)]
        begin += len(wave)
        if len(fresh):
            columns.append(words_of(at, cluster.names))
        else:
            columns.append(Words(("",) if "decode_on" not in wave.said else (), at))
    if columns:
        on = joined_words(columns)
        if kept is not None and residents is not None:
            others = np.arange(len(residents.names), len(on.codes))
            on = Words(on.words, on.codes[np.concatenate([kept, others])])
        asked.ops.append(digest.of_op("pd.decode", {"on": digest.of_words(on)}))
    if len(columns) > 1:
        asked.ops.append(digest.of_op("pd.join", {}))
    return asked.ops


def _check_adapters(waves: list[Wave], works: list[Work], cluster: Cluster) -> None:
    """Raise NotCovered where a request names an adapter and an engine takes none."""
    if any(wave.asks_adapter for wave in waves):
        able = [cluster.abilities.get(work.instance.name) for work in works]
        if not all(ability is not None and ability.adapters for ability in able):
            raise NotCovered("an adapter, which an engine may not take")


def _plans(works: list[Work], order: Order, target: Target) -> list[ExecutionPlan]:
    """Plans of what may compute nothing, then those of prompts, then those of decodes alone; and
    last of instances that only drop rows."""
    plans = [idle_plan(work.instance, target) for work in works if work.turn_steps == 0]
    computing = [work for work in works if work.turn_steps != 0]
    computing.sort(key=lambda work: work.num_prefills == 0)
    plans += [
        plan_of(one, target) for one in packed(computing, [w.blocks for w in computing], order)
    ]
    busy = {work.instance.index for work in works}
    instances = target.cluster.instances
    return plans + [idle_plan(instances[at], target) for at in target.gone if at not in busy]


def _without_idle(plans: list[ExecutionPlan], state: State) -> list[ExecutionPlan]:
    """Without plans of nothing for instances that are at no plan: nothing changes there."""
    if all(plan.num_steps or len(plan.preemptions.row) for plan in plans):
        return plans
    idle = set(state.instances.ids[state.instances.idle].tolist())
    return [
        plan
        for plan in plans
        if plan.num_steps or len(plan.preemptions.row) or plan.target_instance_id not in idle
    ]


def _in_order(at: Ints, cluster: Cluster) -> Words:
    return Words(*words_in_order(cluster.names, at))
