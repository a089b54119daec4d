"""What holds for every strategy, and what for fifo alone."""

import dataclasses
import json

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler
from sagec.planner import CompilingPlanner
from sagec.runtime import strategies
from sagec.runtime.request import FinishReason, Request
from sagec.runtime.state import (
    ADMIT,
    ANY,
    UNBOUNDED,
    Decision,
    Instances,
    Running,
    State,
    Waiting,
    check,
)
from sagec.runtime.strategies import choosers
from tests.echo_cluster import ONE, SPLIT, Served, echo_executor, requests, serve

NAMES = strategies.known()

CHOOSING = [name for name in NAMES if hasattr(strategies.create(name), "chooser")]
"""Strategies that take a chooser."""

FAIR = sorted({"fifo", "hybrid", "slo-aware"} & set(NAMES))
"""Strategies under which a request waits for a bounded time, whatever else comes."""

MODES = ("strict", "time-share", "hybrid")
LAX = settings(suppress_health_check=list(HealthCheck), deadline=None)


@st.composite
def states(draw, max_rows: int = 12):
    """States that a loop can come to, and some that it should not.

    Numbers of rows are drawn one by one, what stands in them from a seed: that is ten times faster.
    """
    count = draw(st.integers(1, 4))
    waiting, running = draw(st.integers(0, max_rows)), draw(st.integers(0, max_rows))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def any_of(count, *values):
        return [values[at] for at in random.integers(0, len(values), count)]

    def between(count, low, high):
        return random.integers(low, high + 1, count)

    def asked(count, first):
        return {
            "sequence": np.arange(first, first + count),
            "arrival_us": between(count, 0, 1000),
            "priority": between(count, -1, 3),
            "ttft_us": any_of(count, 0, 1, 1000, 50_000),
            "tpot_us": any_of(count, 0, 40, 2000),
            "output_tokens": any_of(count, 0, 0, 7),
            "first_token_us": between(count, 0, 1500),
            "preemptions": any_of(count, 0, 0, 1, 5),
            "model": any_of(count, "m", "n"),
            "tenant": any_of(count, "", "a", "b"),
        }

    on = between(running, 0, count - 1)
    prompt = between(running, 1, 300)
    return State(
        now_us=draw(st.sampled_from([0, 800, 2000, 20_000_000])),
        round=draw(st.integers(0, 9)),
        waiting=Waiting.of(
            [f"w{i}" for i in range(waiting)],
            prompt_tokens=between(waiting, 1, draw(st.sampled_from([40, 1200]))),
            generate_tokens=any_of(waiting, 1, 30, 900, UNBOUNDED),
            **asked(waiting, 100),
        ),
        running=Running.of(
            [f"r{i}" for i in range(running)],
            instance=on,
            decode_on=between(running, 0, count - 1) if draw(st.booleans()) else on,
            prompt_tokens=prompt,
            computed_tokens=np.maximum(prompt + between(running, -50, 20), 0),
            remaining_tokens=any_of(running, 1, 30, UNBOUNDED),
            arriving=any_of(running, False, False, True),
            admitted_us=between(running, 0, 1000),
            **asked(running, 50),
        ),
        instances=Instances.of(
            [f"i{i}" for i in range(count)],
            role=any_of(count, "prefill", "decode", "both"),
            model=any_of(count, "m", "n"),
            kv_blocks=between(count, 1, 60),
            block_tokens=any_of(count, 8, 16),
            kv_blocks_used=between(count, 0, 60),
            max_context_tokens=any_of(count, 0, 200),
            alive=between(count, 0, 9) > 0,
            idle=any_of(count, False, True),
            pool=any_of(count, "", "", "shared"),
            switch_us=any_of(count, 0, 500),
            prefill_ns_per_token=any_of(count, 0, 1000, 90_000),
            decode_step_us=any_of(count, 0, 70, 3000),
        ),
        cached_tokens=np.array(any_of(waiting * count, 0, 0, 16, 160)).reshape(waiting, count),
    )


def after(decision: Decision, state: State) -> State:
    """The state with what the decision says to remember, and the first half of those waiting."""
    half = len(state.waiting) // 2
    columns = {f.name: getattr(state.waiting, f.name)[:half] for f in dataclasses.fields(Waiting)}
    return dataclasses.replace(
        state,
        waiting=Waiting(**columns),
        cached_tokens=state.cached_tokens[:half],
        now_us=state.now_us + 700,
        round=state.round + 1,
        memory=json.loads(json.dumps(decision.memory)),
    )


def columns_of(decision: Decision) -> dict[str, object]:
    return {
        field.name: value.tolist() if isinstance(value, np.ndarray) else value
        for field in dataclasses.fields(decision)
        if (value := getattr(decision, field.name)) is not None
    }


@pytest.mark.parametrize("name", NAMES)
@settings(LAX, max_examples=40)
@given(state=states())
def test_every_state_gets_a_decision_that_fits_it_and_the_same_one_again(name, state):
    for _ in range(2):
        first, second = (strategies.create(name).decide(state) for _ in range(2))
        check(first, state, name)
        assert columns_of(first) == columns_of(second)
        state = after(first, state)


@pytest.mark.slow
@settings(LAX, max_examples=10_000)
@given(state=states(max_rows=8))
def test_ten_thousand_random_states_and_what_follows_them_never_raise(state):
    for name in NAMES:
        decision = strategies.create(name).decide(state)
        check(decision, state, name)
        then = after(decision, state)
        check(strategies.create(name).decide(then), then, name)


@pytest.mark.parametrize("name", NAMES)
@settings(LAX, max_examples=40)
@given(state=states())
def test_every_verdict_has_a_reason(name, state):
    decision = strategies.create(name).decide(state)
    assert all(decision.reason)
    assert all(decision.preempt_reason)


@pytest.mark.parametrize("name", NAMES)
@settings(LAX, max_examples=40)
@given(state=states())
def test_a_memory_is_json_and_forgets_requests_that_have_ended(name, state):
    decision = strategies.create(name).decide(state)
    assert json.loads(json.dumps(decision.memory)) == decision.memory
    gone = dataclasses.replace(
        after(decision, state), waiting=Waiting.of([]), running=Running.of([]),
        cached_tokens=np.zeros((0, 0), np.int64),
    )  # fmt: skip
    end = strategies.create(name).decide(gone)
    fresh = strategies.create(name).decide(dataclasses.replace(gone, memory={}))
    assert len(json.dumps(end.memory)) <= len(json.dumps(fresh.memory)) + 200


@pytest.mark.parametrize("name", NAMES)
@settings(LAX, max_examples=40)
@given(state=states())
def test_no_strategy_admits_more_than_there_is_room_for(name, state):
    decision = strategies.create(name).decide(state)
    admitted, waiting, instances = decision.admitted, state.waiting, state.instances
    for pool in (instances.prefills, instances.decodes):
        for model in ("m", "n"):
            here = pool & (instances.model == model)
            free = np.maximum(instances.kv_blocks - instances.kv_blocks_used, 0)[here]
            room = int((free * instances.block_tokens[here]).sum())
            rows = admitted[waiting.model[admitted] == model]
            assert int(waiting.prompt_tokens[rows].sum()) <= room


@pytest.mark.parametrize("name", CHOOSING)
@settings(LAX, max_examples=40)
@given(state=states(), chooser=st.sampled_from(choosers.known()))
def test_no_instance_that_a_chooser_names_gets_more_than_it_has_room_for(name, chooser, state):
    decision = strategies.create(name, {"chooser": chooser}).decide(state)
    check(decision, state, name)
    waiting, instances = state.waiting, state.instances
    need = np.zeros(len(instances), np.int64)
    for row in decision.admitted.tolist():
        here, there = int(decision.prefill_on[row]), int(decision.decode_on[row])
        assert ANY not in (here, there)
        assert instances.prefills[here]
        assert instances.decodes[there]
        assert {instances.model[here], instances.model[there]} == {waiting.model[row]}
        for i in {here, there}:
            need[i] += -(-(waiting.prompt_tokens[row] + 1) // instances.block_tokens[i])
    assert (need <= np.maximum(instances.kv_blocks - instances.kv_blocks_used, 0)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
def test_under_every_strategy_everybody_is_served(name, roles):
    served = serve(roles, requests(20, every_us=100), strategy=name, kv_blocks=14)
    assert not served.failures
    assert all(len(tokens) == 20 for tokens in served.tokens.values())
    assert len(served.tokens) == 20


def echo_cluster(roles: dict[str, str], kv_blocks: int) -> str:
    """The module of a cluster of echo instances, a device each, all of them linked."""
    lines = [
        "cluster.model @tiny {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, "
        "ffn = 128, vocab = 256}",
        "cluster.switch @hub",
    ]
    for name, role in roles.items():
        lines += [
            f"cluster.device @g_{name} {{flops_per_s = 1.0e+12}}",
            f"cluster.link @g_{name} to @hub {{bytes_per_s = 1.0e+9}}",
            f'cluster.instance @{name} on [@g_{name}] engine "echo" role {role} model @tiny '
            f"{{kv_blocks = {kv_blocks}, block_tokens = 16}}",
        ]
    return "\n".join(lines)


def planner(roles: dict[str, str], mode: str, kv_blocks: int = 14) -> CompilingPlanner:
    module = Compiler().parse(echo_cluster(roles, kv_blocks), "cluster.mlir").module
    return CompilingPlanner(module, mode=mode, chunk=32, horizon=8)


def mixed_requests(count: int) -> list[Request]:
    """Of three tenants, some with a priority, a promise, or no output after the first token."""
    return [
        msgspec.structs.replace(
            request,
            tenant="abc"[i % 3],
            priority=i % 4,
            ttft_us=(None, 20_000, 400_000)[i % 3],
            tpot_us=(None, 3000)[i % 2],
            max_output_tokens=1 if i % 5 == 4 else 12,
        )
        for i, request in enumerate(requests(count, every_us=300))
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mode_runs_under_every_strategy(name, mode):
    roles = SPLIT if mode == "strict" else ONE
    asked = mixed_requests(15)
    served = serve(roles, asked, planner(roles, mode), strategy=name, kv_blocks=14)
    assert not served.failures
    assert {id: len(tokens) for id, tokens in served.tokens.items()} == {
        request.id: request.max_output_tokens for request in asked
    }


MIXED = {"p0": "prefill", "b0": "both", "d0": "decode"}


@pytest.mark.parametrize("chooser", choosers.known())
@pytest.mark.parametrize("name", CHOOSING)
def test_every_chooser_serves_any_mix_of_roles_under_every_strategy_that_takes_one(name, chooser):
    served = Served()
    executor = echo_executor(MIXED, served, kv_blocks=14)
    strategy = strategies.create(name, {"chooser": chooser})
    asked = mixed_requests(15)
    served.take(executor.serve(asked, strategy, planner(MIXED, "hybrid")))
    assert not served.failures
    assert {id: len(tokens) for id, tokens in served.tokens.items()} == {
        request.id: request.max_output_tokens for request in asked
    }


@pytest.mark.parametrize("name", FAIR)
def test_nobody_starves_under_a_fair_strategy(name):
    """A long prompt without a promise, among small urgent ones that alone would fill the KV."""
    options = {"patience_us": 20_000} if name != "fifo" else {}
    rivals = [
        Request(id=f"r{i}", prompt=tuple(range(60)), max_output_tokens=30, arrival_us=i * 4000,
                ttft_us=1_000_000, tpot_us=100_000, priority=-1)
        for i in range(60)
    ]  # fmt: skip
    meek = Request(id="meek", prompt=tuple(range(90)), max_output_tokens=4, arrival_us=30_000)
    served = Served()
    executor = echo_executor(ONE, served, kv_blocks=12)
    served.take(
        executor.serve(
            [*rivals, meek], strategies.create(name, options), planner(ONE, "hybrid", kv_blocks=12)
        )
    )
    reports = {id: end.report for id, end in served.ends.items()}
    assert {end.reason for end in served.ends.values()} == {FinishReason.LENGTH}
    waited_us = reports["meek"].admitted_us - meek.arrival_us
    last_us = max(report.admitted_us for report in reports.values())
    assert 0 < waited_us < last_us / 4
    assert reports["meek"].end_us < last_us


@pytest.mark.parametrize("name", NAMES)
def test_what_no_instance_can_hold_is_rejected_at_once_with_the_numbers(name):
    long = Request(id="long", prompt=tuple(range(300)), max_output_tokens=9)
    served = serve(ONE, [long, *requests(3)], strategy=name, kv_blocks=14)
    end = served.ends["long"]
    assert end.reason == FinishReason.REJECTED
    assert end.detail == (
        "300 prompt tokens and 9 to generate fit no instance: the largest holds 224 tokens"
    )
    assert end.report.end_us == 0
    assert len(served.tokens) == 3


@pytest.mark.parametrize("name", CHOOSING)
def test_an_unknown_chooser_is_named_with_the_nearest_one(name):
    with pytest.raises(strategies.StrategyError, match=r"^no chooser 'least-lod'; did you mean"):
        strategies.create(name, {"chooser": "least-lod"})


@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_is_called_what_its_file_is_called(name):
    assert strategies.create(name).name == name


def test_an_unknown_strategy_is_named_with_the_nearest_one():
    with pytest.raises(strategies.StrategyError) as caught:
        strategies.create("fifi")
    assert str(caught.value) == (
        f"no strategy 'fifi'; did you mean 'fifo'? (there are: {', '.join(NAMES)})"
    )
    with pytest.raises(strategies.StrategyError, match=r"^no strategy 'zzz'; there are: "):
        strategies.create("zzz")


# Fifo.


def instance(kv_blocks: int = 10, **columns) -> Instances:
    return Instances.of(["x0"], role="both", kv_blocks=kv_blocks, block_tokens=16, **columns)


def fifo(waiting: Waiting, running: Running | None = None, instances: Instances | None = None):
    return strategies.create("fifo").decide(
        State(
            now_us=0,
            round=0,
            waiting=waiting,
            running=running or Running.of([]),
            instances=instances or instance(),
        )
    )


def test_fifo_admits_in_order_of_arrival():
    waiting = Waiting.of(["c", "a", "b"], arrival_us=[9, 1, 5], prompt_tokens=16)
    assert waiting.ids[fifo(waiting).admitted].tolist() == ["a", "b", "c"]


def test_fifo_lets_nobody_overtake_a_prompt_that_does_not_fit_yet():
    waiting = Waiting.of(["a", "long", "b"], arrival_us=[1, 2, 3], prompt_tokens=[40, 120, 8])
    decision = fifo(waiting)
    assert waiting.ids[decision.admitted].tolist() == ["a"]
    assert decision.reason.tolist() == [
        "its turn, and it fits",
        "no room before its turn",
        "no room before its turn",
    ]


def test_fifo_rejects_what_no_instance_can_hold_and_the_rest_goes_on():
    waiting = Waiting.of(["a", "b"], prompt_tokens=[200, 20], generate_tokens=[UNBOUNDED, 4])
    decision = fifo(waiting)
    assert decision.rejected.tolist() == [0]
    assert decision.reason[0] == ("200 prompt tokens fit no instance: the largest holds 160 tokens")
    assert decision.admitted.tolist() == [1]


def test_fifo_minds_the_models_context():
    waiting = Waiting.of(["a"], prompt_tokens=50, generate_tokens=60)
    decision = fifo(waiting, instances=instance(max_context_tokens=100))
    assert decision.reason[0] == (
        "50 prompt tokens and 60 to generate fit no instance: the largest holds 100 tokens"
    )


def test_fifo_preempts_the_last_that_came_when_the_next_token_has_no_room():
    running = Running.of(
        ["new", "old"], arrival_us=[9, 1], prompt_tokens=70, computed_tokens=[80, 80]
    )
    decision = fifo(Waiting.of(["w"], prompt_tokens=1), running, instance(kv_blocks_used=10))
    assert decision.preempt_rows.tolist() == [0]
    assert decision.verdict[0] != ADMIT


def test_fifo_makes_room_for_older_kv_that_is_on_its_way_and_not_for_younger():
    for arrival_us, leaving in (([1, 9], [1]), ([9, 1], [])):
        running = Running.of(
            ["coming", "here"],
            arrival_us=arrival_us,
            prompt_tokens=80,
            computed_tokens=90,
            arriving=[True, False],
        )
        assert fifo(Waiting.of([]), running).preempt_rows.tolist() == leaving


def test_fifo_never_preempts_the_only_one():
    running = Running.of(["a"], prompt_tokens=70, computed_tokens=900)
    assert fifo(Waiting.of([]), running).preempt_rows.tolist() == []


def test_fifo_counts_models_apart():
    instances = Instances.of(
        ["x", "y"], role="both", model=["m", "n"], kv_blocks=[10, 2], block_tokens=16
    )
    waiting = Waiting.of(["a", "b"], prompt_tokens=24, model=["n", "m"], arrival_us=[0, 1])
    assert fifo(waiting, instances=instances).admitted.tolist() == [0, 1]
    longer = Waiting.of(["a", "b"], prompt_tokens=[30, 24], model=["m", "n"])
    assert np.array_equal(fifo(longer, instances=instances).admitted, [0, 1])
