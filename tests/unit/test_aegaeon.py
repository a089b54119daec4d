"""Turns: their lengths are those of the paper, and instances of a pool never compute at once."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.runtime.engines import StepReport
from sagec.runtime.engines.echo import Echo
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Instance
from sagec.runtime.request import Request
from sagec.runtime.state import ADMIT, ANY, Decision, Instances, Running, State, Waiting, check
from sagec.runtime.strategies import create
from sagec.runtime.strategies.aegaeon import GROUP, LEAST_LOAD, Aegaeon, turn_lengths
from tests.echo_cluster import Served, spec

# The lengths of turns.

steps_s = st.lists(st.floats(0.001, 0.2), min_size=1, max_size=8)
batches = steps_s.flatmap(
    lambda steps: st.tuples(
        st.just(np.array(steps)),
        st.lists(st.floats(0.02, 1.0), min_size=len(steps), max_size=len(steps)).map(np.array),
    )
)


@pytest.mark.parametrize(
    ("step_s", "switch_s", "load", "turns_s"),
    [((0.02, 0.04), 1.0, 0.7, (2, 4)), ((0.03, 0.05, 0.04), 2.0, 1.45, (2.4, 4, 3.2))],
)
def test_the_turns_are_those_of_the_published_examples(step_s, switch_s, load, turns_s):
    found = turn_lengths(step_s, 0.1, switch_s)
    assert found.load == pytest.approx(load)
    assert found.turns_s == pytest.approx(turns_s)


@given(batches, st.floats(0.01, 10))
def test_all_batches_compute_tokens_for_the_same_time_in_a_cycle(batch, switch_s):
    step, tbt = batch
    turns, load = turn_lengths(step, tbt, switch_s)
    worth_s = turns * tbt / step
    assert worth_s == pytest.approx(worth_s[0])
    assert load * worth_s == pytest.approx(switch_s + turns.sum(), rel=1e-6)


@given(batches, st.floats(0.01, 10), st.floats(0.5, 8))
def test_the_longest_turn_is_as_long_as_allowed_unless_the_load_is_low(batch, switch_s, longest_s):
    turns, load = turn_lengths(*batch, switch_s, longest_s)
    if load > LEAST_LOAD:
        assert turns.max() == pytest.approx(longest_s, rel=1e-5)
    else:
        assert turns.max() <= longest_s * (1 + 1e-9)


@given(batches, st.floats(0.01, 10))
def test_the_share_of_tokens_that_come_in_time_is_one_over_the_load(batch, switch_s):
    step, tbt = batch
    turns, load = turn_lengths(step, tbt, switch_s)
    cycles, cycle_s = 50, switch_s + turns.sum()
    for turn_s, step_s, tbt_s in zip(turns, step, tbt, strict=True):
        computed = cycles * turn_s / step_s
        due = cycles * cycle_s / tbt_s
        assert min(1, computed / due) == pytest.approx(min(1, 1 / load), rel=1e-6)


@given(batches)
def test_where_switching_takes_no_time_a_turn_is_a_step_of_the_least_hurried(batch):
    step, tbt = batch
    turns, load = turn_lengths(step, tbt, 0.0)
    assert turns * tbt / step == pytest.approx(tbt.max())
    assert (turns >= step * (1 - 1e-9)).all()
    assert load == pytest.approx(max(LEAST_LOAD, float((step / tbt).sum())))


# A round.


def pool(models: str = "abc", **columns) -> Instances:
    """An instance a letter, which says its model, all of one pool; a0 is the first of model a."""
    said = {"pool": "p", "kv_blocks": 40, "block_tokens": 16, "role": "both"} | columns
    said = {"decode_step_us": 10_000, "switch_us": 500_000} | said
    ids = [f"{model}{models[:at].count(model)}" for at, model in enumerate(models)]
    return Instances.of(ids, model=list(models), **said)


def waiting(models: str, **columns) -> Waiting:
    """A request a letter, which says its model; they came one after the other."""
    said = {"prompt_tokens": 16, "generate_tokens": 30, "arrival_us": range(len(models))}
    ids = [f"{model}{number}" for number, model in enumerate(models)]
    return Waiting.of(ids, model=list(models), **(said | columns))


def ask(now_us: int, waiting: Waiting, instances: Instances, memory=None, running=None):
    state = State(
        now_us=now_us,
        round=0,
        waiting=waiting,
        running=running if running is not None else Running.of([]),
        instances=instances,
        memory=memory or {},
    )
    decision = Aegaeon().decide(state)
    check(decision, state)
    return decision


def admitted(decision, waiting: Waiting) -> list[str]:
    return waiting.ids[decision.admitted].tolist()


def test_a_turn_computes_when_its_instance_is_switched_in_and_the_others_pause():
    came = waiting("bba")
    first = ask(1_000, came, pool())
    assert admitted(first, came) == []
    assert first.turn_steps.tolist() == [0, 0, 0]
    assert first.again_us == 501_000
    assert first.reason.tolist() == ["waits while b0 is switched in, 500 ms"] * 3
    then = ask(501_000, came, pool(), first.memory)
    assert admitted(then, came) == ["b0", "b1"]
    assert (then.turn_steps > 0).tolist() == [False, True, False]
    assert then.prefill_on[:2].tolist() == then.decode_on[:2].tolist() == [1, 1]
    assert then.reason[2].startswith("waits for the turn of a0: b0 computes for ")


def test_the_turns_of_a_cycle_are_as_long_as_the_formula_says():
    came = waiting("ab", tpot_us=100_000)
    instances = pool("ab", decode_step_us=[20_000, 40_000])
    begun = ask(500_000, came, instances, ask(0, came, instances).memory)
    assert begun.turn_steps.tolist() == [100, 0]
    assert begun.memory["aegaeon"]["p"]["left"] == [["b0", 4_000_000]]
    assert begun.again_us == 2_500_000


def test_a_group_has_room_for_eight_and_those_behind_wait_for_the_next_turn():
    came = waiting("a" * 12 + "b")
    begun = ask(500_000, came, pool(), ask(0, came, pool()).memory)
    assert admitted(begun, came) == [f"a{number}" for number in range(GROUP)]
    assert begun.reason[8] == "waits for the next turn of a0: the group of this one is full"


def test_who_comes_during_the_turn_of_its_model_joins_the_group():
    instances = pool("ab", prefill_ns_per_token=1_000_000)
    came = waiting("ab")
    begun = ask(500_000, came, instances, ask(0, came, instances).memory)
    late = waiting("ab", arrival_us=[600_000, 1], prompt_tokens=100)
    joined = ask(600_000, late, instances, begun.memory)
    assert admitted(joined, late) == ["a0"]
    assert joined.again_us == begun.again_us + 100_000


def test_a_request_joins_only_where_there_is_room_for_some_output():
    came = waiting("aaab", prompt_tokens=16, generate_tokens=100)
    instances = pool("ab", kv_blocks=10)
    begun = ask(500_000, came, instances, ask(0, came, instances).memory)
    assert admitted(begun, came) == ["a0", "a1"]
    assert begun.reason[2] == "its group's turn, but no room is left on a0"


def running(models: str, instances: Instances, **columns) -> Running:
    at = [instances.model.tolist().index(model) for model in models]
    said = {"prompt_tokens": 16, "computed_tokens": 20, "remaining_tokens": 9} | columns
    ids = [f"r{number}" for number in range(len(models))]
    return Running.of(ids, model=list(models), instance=at, decode_on=at, **said)


def test_nobody_begins_before_the_last_has_stopped():
    none = waiting("")
    instances = pool("ab", switch_us=0)
    both = running("ab", instances)
    begun = ask(0, none, instances, running=both)
    assert (begun.turn_steps > 0).tolist() == [True, False]
    at_work = dataclasses.replace(instances, idle=np.array([False, True]))
    over = ask(begun.again_us, none, at_work, begun.memory, both)
    assert over.turn_steps.tolist() == [0, 0]
    stopped = ask(begun.again_us + 7, none, instances, over.memory, both)
    assert (stopped.turn_steps > 0).tolist() == [False, True]


def test_a_turn_ends_early_when_its_instance_has_nothing_left_to_do():
    instances = pool("ab", switch_us=0)
    both = running("ab", instances)
    begun = ask(0, waiting(""), instances, running=both)
    left = running("b", instances)
    assert (ask(1, waiting(""), instances, begun.memory, left).turn_steps > 0).tolist() == [
        False,
        True,
    ]


def test_who_has_the_pool_alone_computes_without_bound():
    came = waiting("a" * 20)
    begun = ask(500_000, came, pool(), ask(0, came, pool()).memory)
    assert begun.turn_steps.tolist() == [ANY, 0, 0]
    assert begun.again_us is None
    assert len(begun.admitted) > GROUP


def test_a_group_goes_to_the_pool_with_the_fewest_requests():
    instances = pool("aab", pool=["p", "q", "q"], switch_us=0)
    came = waiting("a" * (GROUP + 2))
    begun = ask(0, came, instances, running=running("bb", instances))
    assert begun.prefill_on.tolist() == [0] * GROUP + [1] * 2


def test_a_group_goes_where_its_longest_request_fits():
    instances = pool("aa", pool=["p", "q"], switch_us=0, kv_blocks=[4, 40])
    came = waiting("aa", prompt_tokens=[10, 100])
    assert ask(0, came, instances).prefill_on.tolist() == [1, 1]


def test_kv_of_those_that_pause_is_left_alone():
    instances = pool("ab", kv_blocks=4, switch_us=0)
    crowd = running("aabb", instances, computed_tokens=40, arrival_us=[0, 1, 2, 3])
    begun = ask(0, waiting(""), instances, running=crowd)
    assert (begun.turn_steps > 0).tolist() == [True, False]
    assert begun.preempt_rows.tolist() == [1]


def test_the_turn_of_an_instance_that_died_goes_to_the_next():
    instances = pool("ab", switch_us=0)
    both = running("ab", instances)
    begun = ask(0, waiting(""), instances, running=both)
    dead = dataclasses.replace(instances, alive=np.array([False, True]))
    then = ask(1, waiting("a"), dead, begun.memory, running("b", instances))
    assert (then.turn_steps > 0).tolist() == [False, True]
    assert then.verdict[0] != ADMIT


def test_models_with_instances_of_their_own_are_served_as_by_fifo():
    instances = pool("abab", pool=["p", "p", "", ""], switch_us=0, kv_blocks=[40, 40, 6, 6])
    came = waiting("baabba", prompt_tokens=40)
    said = ask(0, came, instances)
    own = dataclasses.replace(instances, alive=np.array([False, False, True, True]))
    fifo = create("fifo").decide(
        State(now_us=0, round=0, waiting=came, running=Running.of([]), instances=own)
    )
    assert admitted(said, came) == admitted(fifo, came)
    assert said.turn_steps.tolist() == [0, 0, ANY, ANY]
    assert said.prefill_on.tolist() == [ANY] * 6


@pytest.mark.parametrize("models", ["", "a", "aab"])
def test_without_pools_it_decides_as_fifo_does(models):
    instances = pool("ab", pool="", kv_blocks=5)
    came = waiting(models, prompt_tokens=30)
    said = ask(0, came, instances)
    fifo = create("fifo").decide(
        State(now_us=0, round=0, waiting=came, running=Running.of([]), instances=instances)
    )
    assert admitted(said, came) == admitted(fifo, came)
    assert said.reason.tolist() == fifo.reason.tolist()
    assert said.turn_steps is None


# The compiler.

MODELS = ("m0", "m1", "m2")
TOGETHER = {"i0": ("m0", "both"), "i1": ("m1", "both"), "i2": ("m2", "both")}


def cluster(names: dict[str, tuple[str, str]], switch_us: int) -> str:
    """A module with a device, and on it instances of (model, role) that share it."""
    shape = (
        "layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128, vocab = 256"
    )
    lines = [f"cluster.model @{model} {{{shape}}}" for model in MODELS] + ["cluster.device @g"]
    for name, (model, role) in names.items():
        lines.append(
            f'cluster.instance @{name} on [@g] engine "echo" role {role} model @{model} '
            f'{{kv_blocks = 60, pool = "shared", switch_us = {switch_us}}}'
        )
    return "\n".join(lines)


def turn(steps_of: list[int], idle: list[bool], instances: Instances, held: Running):
    """The plans of a round in which each instance has a turn of so many steps."""
    state = State(
        now_us=0,
        round=3,
        waiting=waiting(""),
        running=held,
        instances=dataclasses.replace(instances, idle=np.array(idle)),
    )
    decision = dataclasses.replace(
        Decision.defer(state.waiting), turn_steps=np.array(steps_of, np.int64)
    )
    planner = CompilingPlanner(Compiler().parse(cluster(TOGETHER, 0), "c.mlir").module)
    return {plan.target_instance_id: plan for plan in planner.plan(state, decision)}


def test_an_instance_at_work_is_told_to_stop_and_one_that_is_idle_is_told_nothing():
    instances = Instances.of(
        list(TOGETHER), model=list(MODELS), role="both", kv_blocks=60, block_tokens=16
    )
    held = Running.of(
        ["r0", "r1", "r2"],
        model=list(MODELS),
        instance=[0, 1, 2],
        decode_on=[0, 1, 2],
        prompt_tokens=16,
        computed_tokens=20,
        remaining_tokens=50,
    )
    plans = turn([0, 0, 5], [True, False, True], instances, held)
    assert {name: plan.num_steps for name, plan in plans.items()} == {"i1": 0, "i2": 5}
    assert plans["i1"].request_ids == ()
    plans = turn([ANY, 0, 0], [True, True, True], instances, held)
    assert {name: plan.num_steps for name, plan in plans.items()} == {"i0": 16}
    leaving = Decision.defer(waiting("")).preempt(np.array([1]), "room")
    planner = CompilingPlanner(Compiler().parse(cluster(TOGETHER, 0), "c.mlir").module)
    state = State(now_us=0, round=4, waiting=waiting(""), running=held, instances=instances)
    (plan,) = planner.plan(state, dataclasses.replace(leaving, turn_steps=np.zeros(3, np.int64)))
    assert (plan.target_instance_id, plan.num_steps) == ("i1", 0)
    assert plan.preemptions.row.tolist() == [0]


# A run.


def serve(names: dict[str, tuple[str, str]], asked: list[Request], switch_us: int) -> Served:
    served = Served()
    options = {"step_us": "1000", "token_us": "10", "bytes_per_s": "10000000"}
    engines = {name: Echo(spec(name, 60, **options), served.clock) for name in names}
    instances = [
        Instance(
            id=name,
            role=role,
            engine="echo",
            capability=engines[name].capability(),
            model=model,
            pool="shared",
            switch_us=switch_us,
        )
        for name, (model, role) in names.items()
    ]
    executor = ExecutorAPI(engines, instances, served.clock, watch=[served.hear])
    planner = CompilingPlanner(Compiler().parse(cluster(names, switch_us), "c.mlir").module)
    served.take(executor.serve(asked, create("aegaeon"), planner))
    assert not any(engine.kv_blocks_used() for engine in engines.values())
    return served


def asked(count: int, every_us: int = 3000) -> list[Request]:
    return [
        Request(
            id=f"r{number}",
            prompt=tuple(range(number, number + 7 + number * 13 % 90)),
            max_output_tokens=40,
            arrival_us=number * every_us,
            model=MODELS[number % 3],
        )
        for number in range(count)
    ]


APART = {f"p{i}": (model, "prefill") for i, model in enumerate(MODELS)}
APART |= {f"d{i}": (model, "decode") for i, model in enumerate(MODELS)}


@pytest.mark.parametrize("switch_us", [0, 20_000])
@pytest.mark.parametrize("names", [TOGETHER, APART], ids=["both", "prefill and decode"])
def test_instances_of_a_pool_never_compute_at_once_and_everybody_is_served(names, switch_us):
    served = serve(names, asked(45), switch_us)
    assert not served.failures
    assert [len(served.tokens[f"r{number}"]) for number in range(45)] == [40] * 45
    steps = [event for event in served.events if isinstance(event, StepReport)]
    steps.sort(key=lambda step: step.begin_us)
    for before, step in itertools.pairwise(steps):
        apart_us = switch_us if step.instance != before.instance else 0
        assert step.begin_us >= before.end_us + apart_us


def test_each_model_gets_its_share_of_turns_and_waits_for_two_of_each_other_at_most():
    served = serve(TOGETHER, asked(90, every_us=1000), switch_us=20_000)
    steps = [event for event in served.events if isinstance(event, StepReport)]
    turns = [name for name, _ in itertools.groupby(step.instance for step in steps)]
    # All three have work until the first of them is done with its last request.
    ends = {name: max(at for at, turn in enumerate(turns) if turn == name) for name in TOGETHER}
    contended = turns[: min(ends.values())]
    assert len(contended) > 9
    counts = [contended.count(name) for name in TOGETHER]
    assert max(counts) - min(counts) <= 2
    for begin in range(len(contended) - 4):
        assert set(contended[begin : begin + 5]) == set(TOGETHER)


def test_turns_change_no_tokens():
    alone = {
        name: serve({name: TOGETHER[name]}, asked(12)[at::3], 0) for at, name in enumerate(TOGETHER)
    }
    together = serve(TOGETHER, asked(12), switch_us=5000)
    for served in alone.values():
        for request_id, tokens in served.tokens.items():
            assert together.tokens[request_id] == tokens
