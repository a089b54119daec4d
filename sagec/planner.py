"""The planners that the loop is given: a round's state and decision through the compiler, or past
it where the answer is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.ir import Operation
from xdsl.passes import PassPipeline

from sagec.builder import IRBuilder
from sagec.compiler import passes_of
from sagec.dialects import pd
from sagec.dialects.cluster import InstanceOp
from sagec.dialects.scalars import int_attr
from sagec.lowering.execution_plan import plans_of
from sagec.lowering.legalize import instance_faults
from sagec.lowering.targets import Ability, ability_of, turbomind
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.pipelines import PIPELINES
from sagec.runtime.direct.cluster import Abilities, Cluster
from sagec.runtime.direct.planner import DirectPlanner
from sagec.runtime.direct.waves import NotCovered
from sagec.runtime.engines import Engine
from sagec.runtime.loop import Instance
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.state import Decision, State
from sagec.universe import sagec_context

HORIZON = 16
"""Steps that a round plans where nobody says."""


def put_on(module: ModuleOp, engine: str) -> None:
    """Let every instance be of `engine`, so that plans keep its rules.

    What the file says to another engine alone (`options`) is gone.
    """
    ability = ability_of(engine)
    most = ability.partial_prefills if ability is not None else 0
    for op in module.ops:
        if isinstance(op, InstanceOp) and op.engine.data != engine:
            op.properties["engine"] = StringAttr(engine)
            op.properties.pop("options", None)
            if most:
                op.properties["max_partial_prefills"] = int_attr(most)


def member_of(placed: Placed, engine: Engine) -> Instance:
    """What the loop is told of an instance of a file that runs on `engine`."""
    return Instance(
        id=placed.name,
        role=placed.role,
        engine=placed.engine,
        capability=engine.capability(),
        model=placed.model.name,
        cost=placed.cost,
        pool=placed.pool,
        switch_us=placed.switch_us,
    )


class CompilingPlanner:
    """Builds a round's graph, runs the passes, lowers to plans, and forgets the graph.

    A round is verified once in full, and again only when its ops are others than before: passes
    check what depends on values in any case.
    """

    def __init__(
        self,
        cluster: ModuleOp,
        *,
        mode: str = "hybrid",
        chunk: int = 0,
        horizon: int = HORIZON,
        policy: str = "",
        pipeline: str = "round",
    ) -> None:
        self.context: Context = sagec_context()
        self.builder = IRBuilder(
            cluster, mode=mode, horizon=horizon or HORIZON, policy=policy, chunk=chunk
        )
        self.passes = passes_of(PIPELINES[pipeline].text if pipeline in PIPELINES else pipeline)
        self._verified: set[tuple[str, ...]] = set()
        self._without: tuple[frozenset[str], IRBuilder] | None = None  # dead instances

    @staticmethod
    def of(module: ModuleOp, horizon: int | None = None) -> CompilingPlanner:
        """The planner for a module's cluster; its first graph says mode, chunk and horizon."""
        cluster = ModuleOp([op.clone() for op in module.ops if not isinstance(op, pd.GraphOp)])
        graph = next(flow.graphs(module), None)
        if graph is None:
            return CompilingPlanner(cluster, horizon=horizon or HORIZON)
        prefills = flow.ops_of(graph, pd.PrefillOp)
        return CompilingPlanner(
            cluster,
            mode=graph.text("mode", "hybrid"),
            chunk=prefills[0].chunk_tokens if prefills else 0,
            horizon=horizon or graph.number("horizon") or HORIZON,
            policy=graph.text("policy", ""),
        )

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        """The plans of a round, one for each instance with work. Raises PassError."""
        builder = self._builder_of(state)
        graph = builder.build_round(state, decision)
        try:
            for compiler_pass in self.passes.passes:
                compiler_pass.apply(self.context, graph.module)
            self._verify(graph.op)
            return _without_idle(plans_of(graph.module), state)
        finally:
            builder.drop(graph)

    def _builder_of(self, state: State) -> IRBuilder:
        """The builder for the instances that live: a dead one is no part of the cluster."""
        alive = state.instances.alive
        if alive.all():
            return self.builder
        dead = frozenset(state.instances.ids[~alive].tolist())
        if self._without is None or self._without[0] != dead:
            whole = self.builder
            living = ModuleOp([op.clone() for op in whole.module.ops if not _is_any(op, dead)])
            self._without = (
                dead,
                IRBuilder(
                    living,
                    mode=whole.mode,
                    horizon=whole.horizon,
                    policy=whole.policy,
                    chunk=whole.chunk,
                ),
            )
        return self._without[1]

    def _verify(self, graph: pd.GraphOp) -> None:
        shape = tuple(op.name for op in flow.ops_in(graph))
        if shape not in self._verified:
            graph.verify()
            self._verified.add(shape)


class DirectFirstPlanner:
    """Plans without the compiler where that gives the same plans, and with it where not.

    direct: None where only the compiler knows the cluster or the pipeline. fallbacks: how many
    rounds went to the compiler, by the reason why; planned: how many did not.
    Rounds that are refused go to the compiler too, which says why.
    """

    def __init__(self, compiler: CompilingPlanner) -> None:
        self.compiler = compiler
        self.fallbacks: Counter[str] = Counter()
        self.planned = 0
        self.direct = direct_planner_of(compiler)

    @property
    def builder(self) -> IRBuilder:
        """The compiler's, which has the settings of a round."""
        return self.compiler.builder

    @property
    def passes(self) -> PassPipeline:
        """The compiler's."""
        return self.compiler.passes

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        """The plans of a round, one for each instance with work. Raises PassError."""
        if self.direct is None:
            self.fallbacks["a cluster or a pipeline that only the compiler knows"] += 1
            return self.compiler.plan(state, decision)
        try:
            plans = self.direct.plan(state, decision)
        except NotCovered as why:
            self.fallbacks[str(why)] += 1
            return self.compiler.plan(state, decision)
        self.planned += 1
        return plans


Planner = CompilingPlanner | DirectFirstPlanner

PLANNERS: dict[str, Callable[[CompilingPlanner], Planner]] = {
    "direct": DirectFirstPlanner,
    "ir": lambda compiler: compiler,
}
"""How rounds are planned, by the name that the command line has for it. The plans are the same."""


def planner_of(module: ModuleOp, horizon: int | None = None, how: str = "direct") -> Planner:
    """The planner for a module's cluster; its first graph says mode, chunk and horizon.

    how: one of PLANNERS.
    """
    return PLANNERS[how](CompilingPlanner.of(module, horizon))


def direct_planner_of(compiler: CompilingPlanner) -> DirectPlanner | None:
    """The direct planner of the same cluster and settings; None where there can be none."""
    if compiler.passes.passes != passes_of("round").passes:
        return None
    builder = compiler.builder
    try:
        cluster = cluster_of(builder.module)
    except PassError:  # the compiler says it, in every round
        return None
    return DirectPlanner(cluster, mode=builder.mode, chunk=builder.chunk, horizon=builder.horizon)


def cluster_of(module: ModuleOp) -> Cluster:
    """A module's cluster as plain data. Raises PassError for a name that nothing has."""
    topology = topology_of(module)
    abilities = {
        one.name: _abilities(ability)
        for one in topology.instances
        if (ability := ability_of(one.engine)) is not None
        and not instance_faults(one)
        and set(ability.rules) <= _KNOWN_RULES
    }
    return Cluster(topology, abilities)


_KNOWN_RULES = {turbomind.partial_prefill_is_last, turbomind.no_step_is_empty}
"""Rules of steps that hold for all that the direct planner makes: of prompts that share a step the
unfinished ones are the last, and `Abilities.holds_empty_steps` bears on the other."""


def _abilities(ability: Ability) -> Abilities:
    return Abilities(
        partial_prefills=ability.partial_prefills,
        chunks_prompts=ability.chunks_prompts,
        hands_over=ability.hands_over,
        swaps=ability.swaps,
        keeps_prefixes=ability.caches_prefixes,
        adapters=ability.adapters,
        holds_empty_steps=turbomind.no_step_is_empty not in ability.rules,
    )


def _is_any(op: Operation, instances: frozenset[str]) -> bool:
    return isinstance(op, InstanceOp) and op.symbol in instances


def _without_idle(plans: list[ExecutionPlan], state: State) -> list[ExecutionPlan]:
    """Without the plans of nothing for instances that are at no plan: nothing changes there.

    Such a plan would be done at once, and ask for a round that makes the same one again.
    """
    if not any(map(_is_nothing, plans)):
        return plans
    idle = set(state.instances.ids[state.instances.idle].tolist())
    return [p for p in plans if p.target_instance_id not in idle or not _is_nothing(p)]


def _is_nothing(plan: ExecutionPlan) -> bool:
    moves = (plan.preemptions.row, plan.evictions.block_hash, plan.migrations.block_hash)
    return not plan.num_steps and not any(len(column) for column in moves)
