"""The direct planner makes, to the byte, the plans that the compiler makes; where it cannot be
sure it makes none, and the compiler answers instead."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from xdsl.utils.exceptions import VerifyException

from sagec.compiler import Compiler
from sagec.language.traces import read_trace
from sagec.passes.errors import PassError
from sagec.passes.topology import topology_of
from sagec.planner import CompilingPlanner, DirectFirstPlanner, direct_planner_of
from sagec.runtime import strategies
from sagec.runtime.clock import VirtualClock
from sagec.runtime.direct.waves import NotCovered
from sagec.runtime.engines import InstanceSpec
from sagec.runtime.engines.sim import SimEngine
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.plan import ExecutionPlan, encode
from sagec.runtime.request import Request
from sagec.runtime.state import ANY, UNBOUNDED, Decision, Instances, Running, State, Waiting
from tests.serving_graphs import Round, places, rounds
from tests.test_house import in_python

ROOT = Path(__file__).parents[2]
TRACES = ROOT.parent / "shared" / "traces"
COMPILER = Compiler()
LAX = settings(suppress_health_check=list(HealthCheck), max_examples=50, deadline=None)


def compiler_for(asked: Round, mode: str = "hybrid", chunk: int = 0) -> CompilingPlanner:
    module = COMPILER.parse(asked.cluster(), "cluster.mlir").module
    return CompilingPlanner(module, mode=mode, chunk=chunk)


def said(planner: Any, state: State, decision: Decision) -> list[bytes] | str:
    """What a planner answers: encoded plans, or why it refuses."""
    try:
        return [encode(plan) for plan in planner.plan(state, decision)]
    except (PassError, VerifyException) as error:
        return f"{type(error).__name__}: {error}"


# Any rounds


def assert_same(asked: Round, mode: str = "hybrid", chunk: int = 0) -> None:
    planner = DirectFirstPlanner(compiler_for(asked, mode, chunk))
    expected = said(compiler_for(asked, mode, chunk), asked.state, asked.decision)
    assert said(planner, asked.state, asked.decision) == expected
    event("refused" if isinstance(expected, str) else "planned")
    event(next(iter(planner.fallbacks), "direct"))


@LAX
@given(rounds(), st.sampled_from(("hybrid", "time-share")), st.sampled_from((0, 0, 7)))
def test_plans_are_to_the_byte_those_of_the_compiler(asked: Round, mode: str, chunk: int) -> None:
    assert_same(asked, mode, chunk)


@pytest.mark.slow
@settings(LAX, max_examples=3000)
@given(rounds(), st.sampled_from(("hybrid", "time-share")), st.sampled_from((0, 0, 7)))
def test_many_plans_are_to_the_byte_those_of_the_compiler(
    asked: Round, mode: str, chunk: int
) -> None:
    assert_same(asked, mode, chunk)


@settings(LAX, max_examples=20)
@given(st.data(), st.sampled_from(("turbomind", "torch", "vllm", "embedded")))
def test_what_engines_do_not_take_is_refused_as_by_the_compiler(data: Any, engine: str) -> None:
    assert_same(data.draw(rounds(data.draw(places(engine=engine)))))


@settings(LAX, max_examples=20)
@given(rounds(), st.data())
def test_dead_instances_are_no_part_of_the_cluster(asked: Round, data: Any) -> None:
    count = len(asked.places)
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    instances = dataclasses.replace(asked.state.instances, alive=alive)
    assert_same(
        dataclasses.replace(asked, state=dataclasses.replace(asked.state, instances=instances))
    )


@settings(LAX, max_examples=20)
@given(rounds(), st.data())
def test_what_requests_say_of_themselves_is_in_the_digest_as_in_that_of_the_compiler(
    asked: Round, data: Any
) -> None:
    words = {
        "model": ("", "m", "n"),
        "session": ("", "s"),
        "adapter": ("", "", "french"),
    }
    waiting = asked.state.waiting
    columns = {
        name: np.array([data.draw(st.sampled_from(some)) for _ in waiting.ids], object)
        for name, some in words.items()
    }
    tpot_us = np.array([data.draw(st.sampled_from((0, 50))) for _ in waiting.ids], np.int64)
    waiting = dataclasses.replace(waiting, tpot_us=tpot_us, **columns)
    assert_same(dataclasses.replace(asked, state=dataclasses.replace(asked.state, waiting=waiting)))


# Traces

MODELS = """
model llama8b { layers 32 hidden 4096 heads 32 kv_heads 8 head_dim 128 ffn 14336 vocab 128256 }
"""
SHAPES = {
    "one hybrid": """
cluster c {
  device g0 kind a100
  instance i0 role both on g0 engine sim model llama8b kv_blocks 20000 block 16 budget 2048
}
serve on c mode hybrid chunk 512 horizon 16 { request "any" tokens 1 generate 1 }
""",
    "two that share their time": """
cluster c {
  devices g0..g1 kind a100
  instances i0..i1 role both on g0..g1 engine sim model llama8b kv_blocks 4000 block 16 budget 1024
}
serve on c mode time-share horizon 16 { request "any" tokens 1 generate 1 }
""",
    "apart": """
cluster c {
  devices g0..g3 kind h100
  links g0..g1 to g2..g3 bandwidth 50GB/s latency 10us
  instances p0..p1 role prefill on g0..g1 engine sim model llama8b kv_blocks 800 block 512
  instances d0..d1 role decode on g2..g3 engine sim model llama8b kv_blocks 800 block 512
}
serve on c mode strict chunk 4096 horizon 16 { request "any" tokens 1 generate 1 }
""",
    "one prefills for a hybrid": """
cluster c {
  devices g0..g1 kind h100
  links g0 to g1 bandwidth 50GB/s latency 10us
  instance p0 role prefill on g0 engine sim model llama8b kv_blocks 8000 block 64
  instance b0 role both on g1 engine sim model llama8b kv_blocks 8000 block 64
}
serve on c mode hybrid horizon 32 { request "any" tokens 1 generate 1 }
""",
}


class Twice:
    """A planner that plans every round directly and through the IR, and compares."""

    def __init__(self, compiler: CompilingPlanner) -> None:
        self.compiler, self.direct = compiler, DirectFirstPlanner(compiler)
        self.rounds = 0

    def plan(self, state: State, decision: Decision) -> list[ExecutionPlan]:
        plans = self.compiler.plan(state, decision)
        made = self.direct.plan(state, decision)
        assert list(map(encode, made)) == list(map(encode, plans)), f"round {state.round}"
        self.rounds += 1
        return plans


def asked_of(name: str, limit: int, rate: float) -> list[Request]:
    """The first requests of a trace; some are promised times, some belong to tenants."""
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    return [
        Request(
            id=f"r{i}",
            prompt=range(row.prompt_tokens),  # type: ignore[arg-type]  # of simulated engines
            max_output_tokens=row.output_tokens,
            arrival_us=round(row.arrival_us / rate),
            tenant=("a", "b")[i % 3 == 0],
            priority=i % 2,
            ttft_us=300_000 if i % 2 else None,
            tpot_us=60_000 if i % 2 else None,
            block_hashes=row.blocks[: row.prompt_tokens // 512],
        )
        for i, row in enumerate(read_trace(path, limit))
    ]


def replayed(shape: str, strategy: str, requests: list[Request], caches: bool) -> Twice:
    """Serve the requests in simulated time; every round is planned twice."""
    module = COMPILER.parse(MODELS + SHAPES[shape], "served.sage").module
    placed, clock = topology_of(module).instances, VirtualClock()
    engines, members = {}, []
    for one in placed:
        spec = InstanceSpec(
            id=one.name,
            engine="sim",
            model="",
            kv_blocks=one.kv_blocks,
            block_tokens=one.block_tokens,
            options={**one.cost.to_options(), "prefix_cache": "on" if caches else "off"},
        )
        engines[one.name] = engine = SimEngine(spec, clock)
        members.append(
            Instance(
                id=one.name,
                role=one.role,
                engine=one.engine,
                capability=engine.capability(),
                model=one.model.name,
                cost=one.cost,
            )
        )
    planner = Twice(CompilingPlanner.of(module))
    executor = ExecutorAPI(engines, members, clock)
    assert sum(1 for _ in executor.serve(requests, strategies.create(strategy), planner))
    return planner


AZURE, MOONCAKE = "azure/AzureLLMInferenceTrace_conv.csv", "mooncake/synthetic_trace.jsonl"


@pytest.mark.parametrize("strategy", strategies.known())
@pytest.mark.parametrize("shape", SHAPES)
def test_every_round_of_a_trace_is_planned_as_by_the_compiler(shape: str, strategy: str) -> None:
    trace, limit = (MOONCAKE, 8) if shape == "apart" else (AZURE, 20)
    planner = replayed(shape, strategy, asked_of(trace, limit, 40.0), caches=shape == "apart")
    assert planner.rounds >= 8
    assert planner.direct.planned >= 0.9 * planner.rounds, planner.direct.fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("strategy", strategies.known())
@pytest.mark.parametrize("shape", SHAPES)
def test_thousands_of_rounds_are_planned_as_by_the_compiler(shape: str, strategy: str) -> None:
    trace = MOONCAKE if shape == "apart" else AZURE
    planner = replayed(shape, strategy, asked_of(trace, 1000, 8.0), caches=shape == "apart")
    assert planner.rounds >= 500
    assert planner.direct.planned >= 0.9 * planner.rounds, planner.direct.fallbacks


# What goes to the compiler

PAIR = """
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128,
  vocab = 256}
cluster.device @g0 {flops_per_s = 1.0e+12, bytes_per_s = 1.0e+9}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 1.0e+9}
cluster.instance @p on [@g0] engine "sim" role prefill model @m {kv_blocks = 40, block_tokens = 16}
cluster.instance @d on [@g1] engine "sim" role decode model @m {kv_blocks = 40, block_tokens = 16}
"""


def state_of(prompt: int = 20, **columns: Any) -> State:
    return State(
        now_us=5,
        round=1,
        waiting=Waiting.of(["w"], prompt_tokens=prompt, generate_tokens=4, **columns),
        running=Running.of([]),
        instances=Instances.of(
            ["p", "d"], role=["prefill", "decode"], kv_blocks=40, block_tokens=16, idle=False
        ),
    )


def planner_for(pipeline: str = "round", text: str = PAIR) -> DirectFirstPlanner:
    module = COMPILER.parse(text, "cluster.mlir").module
    return DirectFirstPlanner(CompilingPlanner(module, pipeline=pipeline))


def test_rounds_are_counted_by_who_planned_them_and_why() -> None:
    planner = planner_for()
    state = state_of()
    planner.plan(state, Decision.admit(np.array([0]), state.waiting))
    assert (planner.planned, planner.fallbacks) == (1, Counter())
    large = state_of(prompt=10_000)
    with pytest.raises(PassError, match="needs 625 KV blocks"):
        planner.plan(large, Decision.admit(np.array([0]), large.waiting))
    assert (planner.planned, planner.fallbacks.total()) == (1, 1)


def test_another_pipeline_is_for_the_compiler_alone() -> None:
    planner, state = planner_for("serve"), state_of()
    assert planner.plan(state, Decision.admit(np.array([0]), state.waiting))
    assert planner.planned == 0 and planner.fallbacks.total() == 1


def test_a_cluster_that_cannot_be_is_refused_by_the_compiler_in_every_round() -> None:
    planner, state = planner_for(text=PAIR.replace("on [@g1]", "on [@g7]")), state_of()
    for _ in range(2):
        with pytest.raises(PassError, match="no device @g7"):
            planner.plan(state, Decision.admit(np.array([0]), state.waiting))
    assert planner.planned == 0


def test_an_adapter_is_refused_where_an_engine_takes_none() -> None:
    planner, state = planner_for(text=PAIR.replace('"sim"', '"torch"')), state_of(adapter="french")
    with pytest.raises(PassError, match="torch takes none"):
        planner.plan(state, Decision.admit(np.array([0]), state.waiting))


def test_the_direct_planner_says_what_it_does_not_cover() -> None:
    compiler = CompilingPlanner(COMPILER.parse(PAIR, "cluster.mlir").module)
    direct, state = direct_planner_of(compiler), state_of(prompt=10_000)
    assert direct is not None
    with pytest.raises(NotCovered, match="a row without a pair of instances"):
        direct.plan(state, Decision.admit(np.array([0]), state.waiting))


def test_two_models_on_one_cluster_keep_apart() -> None:
    names = {"@m": "@n", "@p": "@q", "@d": "@e", "@g0": "@h0", "@g1": "@h1"}
    other = functools.reduce(lambda text, name: text.replace(*name), names.items(), PAIR)
    state = State(
        now_us=5,
        round=1,
        waiting=Waiting.of(["a", "b", "c"], prompt_tokens=20, generate_tokens=4,
                           model=["n", "m", "n"]),
        running=Running.of(["r"], instance=3, decode_on=3, prompt_tokens=9, computed_tokens=10,
                           remaining_tokens=7, model="n"),
        instances=Instances.of(["p", "d", "q", "e"], role=["prefill", "decode"] * 2,
                               kv_blocks=40, block_tokens=16, idle=False),
    )  # fmt: skip
    decision = Decision.admit(np.array([2, 0, 1]), state.waiting)
    planner = planner_for(text=PAIR + other)
    assert said(planner, state, decision) == said(planner.compiler, state, decision)
    assert planner.planned == 1
    nameless = dataclasses.replace(state, waiting=dataclasses.replace(
        state.waiting, model=np.array(["", "m", "n"], object)))  # fmt: skip
    assert said(planner, nameless, decision) == said(planner.compiler, nameless, decision)
    assert planner.fallbacks.total() == 1


def test_a_cluster_of_plain_data_is_planned_for_without_xdsl() -> None:
    assert in_python(PLAIN).splitlines() == ["['one'] False"]


PLAIN = """
import sys
import numpy as np
from sagec.runtime.direct.cluster import Abilities, Cluster
from sagec.runtime.direct.planner import DirectPlanner
from sagec.runtime.direct.topology import Device, Instance, Model, Topology
from sagec.runtime.state import ANY, Decision, Instances, Running, State, Waiting

model = Model("m", 2, 64, 4, 2, 16, 128, 256, "bf16", 0, 0, 0, 0, "")
device = Device("g", "cpu", 0, 1e12, 1e9)
one = Instance(0, "one", "mine", "both", model, (device,), 1, 1, 40, 16, "auto", "", 64, 8, 0,
               "none", 0, 0, "auto", "", 0, "")
cluster = Cluster(Topology({"m": model}, {"g": device}, (one,), ()), {"one": Abilities()})
state = State(
    now_us=0, round=0,
    waiting=Waiting.of(["w"], prompt_tokens=20, generate_tokens=4),
    running=Running.of([]),
    instances=Instances.of(["one"], role="both", kv_blocks=40, block_tokens=16),
)
plans = DirectPlanner(cluster, horizon=16).plan(state, Decision.admit(np.array([0]), state.waiting))
print([plan.target_instance_id for plan in plans], "xdsl" in sys.modules)
"""


# Residents that find no blocks

TIGHT = """
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128,
  vocab = 256}
cluster.device @g0 {flops_per_s = 1.0e+12, bytes_per_s = 1.0e+9}
cluster.device @g1 like @g0
cluster.link @g0 to @g1 {bytes_per_s = 1.0e+9}
cluster.instance @a on [@g0] engine "sim" role both model @m {kv_blocks = 12, block_tokens = 16}
cluster.instance @b on [@g1] engine "sim" role both model @m {kv_blocks = 9, block_tokens = 16}
"""


@st.composite
def tight_rounds(draw: st.DrawFn) -> tuple[State, Decision]:
    """Residents that mostly need more blocks than there are; some prompts are under way, some KV
    still comes, some requests wait, which may be nearly too long and without a limit; the strategy
    preempts some itself, and bounds some turns."""
    count = draw(st.integers(2, 9))

    def column(some: st.SearchStrategy[Any], rows: int = count) -> Any:
        return np.array(draw(st.lists(some, min_size=rows, max_size=rows)))

    instance, prompt = column(st.integers(0, 1)), column(st.integers(1, 60))
    computed = prompt + column(st.sampled_from([0, 0, 3, 30, -1]))
    running = Running.of(
        [f"r{i}" for i in range(count)],
        instance=instance,
        decode_on=instance,
        prompt_tokens=prompt,
        computed_tokens=np.maximum(computed, 0),
        remaining_tokens=column(st.sampled_from([1, 5, 40])),
        arriving=column(st.sampled_from([False, False, False, True])),
    )
    waits = draw(st.integers(0, 2))
    waiting = Waiting.of(
        [f"w{i}" for i in range(waits)],
        prompt_tokens=column(st.sampled_from([2, 30, 140, 143, 144]), waits).astype(np.int64),
        generate_tokens=column(st.sampled_from([1, 9, UNBOUNDED]), waits).astype(np.int64),
    )
    instances = Instances.of(
        ["a", "b"], role="both", kv_blocks=np.array([12, 9]), block_tokens=16, idle=False
    )
    state = State(now_us=5, round=1, waiting=waiting, running=running, instances=instances)
    rows = sorted(draw(st.sets(st.integers(0, count - 1), max_size=2)))
    decision = Decision.admit(waiting.rows, waiting)
    decision = dataclasses.replace(
        decision,
        preempt_rows=np.array(rows, np.int64),
        preempt_how=np.zeros(len(rows), np.int64),
        preempt_reason=np.array(["late"] * len(rows), object),
        turn_steps=draw(st.sampled_from([None, np.array([ANY, 0]), np.array([2, ANY])])),
    )
    return state, decision


@LAX
@given(tight_rounds(), st.sampled_from(("hybrid", "time-share")))
def test_residents_that_find_no_blocks_leave_as_by_the_compiler(
    asked: tuple[State, Decision], mode: str
) -> None:
    module = COMPILER.parse(TIGHT, "cluster.mlir").module
    planner = DirectFirstPlanner(CompilingPlanner(module, mode=mode))
    expected = said(CompilingPlanner(module, mode=mode), *asked)
    assert said(planner, *asked) == expected
    if isinstance(expected, str):
        event("refused")
        return
    plans = planner.plan(*asked)
    left = sum(len(plan.preemptions.row) for plan in plans) - len(asked[1].preempt_rows)
    event("some left" if left > 0 else "nobody left")
    assert not planner.fallbacks


@pytest.mark.parametrize(("prompt", "until"), [(179, 192), (190, 192), (191, 192)])
def test_who_says_no_limit_is_planned_for_no_more_than_its_instance_holds(
    prompt: int, until: int
) -> None:
    state = dataclasses.replace(
        state_of(prompt),
        waiting=Waiting.of(["w"], prompt_tokens=prompt, generate_tokens=UNBOUNDED),
        instances=Instances.of(
            ["a", "b"], role="both", kv_blocks=np.array([12, 9]), block_tokens=16
        ),
    )
    asked, planner = (state, Decision.admit(np.array([0]), state.waiting)), planner_for(text=TIGHT)
    (plan,) = planner.plan(*asked)
    assert (plan.target_instance_id, plan.rows.kv_blocks.tolist()) == ("a", [12])
    assert plan.decodes.until_tokens.tolist() == [until]
    assert said(planner, *asked) == said(planner.compiler, *asked)
    assert not planner.fallbacks


def test_all_residents_of_an_instance_may_leave_it() -> None:
    """One prompt is under way and needs all blocks; the plan that drops the others is direct."""
    state = State(
        now_us=5,
        round=1,
        waiting=Waiting.of([]),
        running=Running.of(
            ["long", "x", "y"],
            instance=0,
            decode_on=0,
            prompt_tokens=np.array([180, 20, 20]),
            computed_tokens=np.array([20, 21, 25]),
            remaining_tokens=np.array([4, 30, 30]),
        ),
        instances=Instances.of(
            ["a", "b"], role="both", kv_blocks=np.array([12, 9]), block_tokens=16, idle=False
        ),
    )
    planner = planner_for(text=TIGHT)
    asked = (state, Decision.admit(np.array([], np.int64), state.waiting))
    (plan,) = planner.plan(*asked)
    assert [plan.request_ids[row] for row in plan.preemptions.row] == ["x", "y"]
    assert not planner.fallbacks
    assert [encode(plan)] == said(planner.compiler, *asked)
