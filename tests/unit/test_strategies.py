"""What holds for every strategy, and what for fifo alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime import strategies
from sagec.runtime.state import ADMIT, UNBOUNDED, Instances, Running, State, Waiting, check
from tests.echo_cluster import ONE, SPLIT, requests, serve

NAMES = strategies.known()


@st.composite
def states(draw, max_rows: int = 12):
    """States that a loop can come to, and some that it should not."""
    num_instances = draw(st.integers(1, 4))
    instances = Instances.of(
        [f"i{i}" for i in range(num_instances)],
        role=[draw(st.sampled_from(["prefill", "decode", "both"])) for _ in range(num_instances)],
        model=[draw(st.sampled_from(["m", "n"])) for _ in range(num_instances)],
        kv_blocks=[draw(st.integers(1, 60)) for _ in range(num_instances)],
        block_tokens=[draw(st.sampled_from([8, 16])) for _ in range(num_instances)],
        kv_blocks_used=[draw(st.integers(0, 60)) for _ in range(num_instances)],
        max_context_tokens=[draw(st.sampled_from([0, 200])) for _ in range(num_instances)],
        alive=[draw(st.integers(0, 9)) > 0 for _ in range(num_instances)],
    )
    waiting = draw(st.integers(0, max_rows))
    running = draw(st.integers(0, max_rows))

    def column(count, values):
        return [draw(values) for _ in range(count)]

    def asked(count):
        return {
            "arrival_us": column(count, st.integers(0, 1000)),
            "priority": column(count, st.integers(0, 3)),
            "ttft_us": column(count, st.sampled_from([0, 1000])),
            "model": column(count, st.sampled_from(["m", "n"])),
        }

    on = column(running, st.integers(0, num_instances - 1))
    prompt = column(running, st.integers(1, 300))
    return State(
        now_us=draw(st.integers(0, 2000)),
        round=draw(st.integers(0, 9)),
        waiting=Waiting.of(
            [f"w{i}" for i in range(waiting)],
            prompt_tokens=column(waiting, st.integers(1, 1200)),
            generate_tokens=column(waiting, st.sampled_from([1, 30, 900, UNBOUNDED])),
            **asked(waiting),
        ),
        running=Running.of(
            [f"r{i}" for i in range(running)],
            instance=on,
            decode_on=on,
            prompt_tokens=prompt,
            computed_tokens=[draw(st.integers(0, p + 20)) for p in prompt],
            remaining_tokens=column(running, st.sampled_from([1, 30, UNBOUNDED])),
            arriving=column(running, st.booleans()),
            **asked(running),
        ),
        instances=instances,
    )


@pytest.mark.parametrize("name", NAMES)
@given(state=states())
def test_every_state_gets_a_decision_that_fits_it_and_the_same_one_again(name, state):
    first, second = (strategies.create(name).decide(state) for _ in range(2))
    check(first, state, name)
    for field in ("verdict", "rank", "reason", "preempt_rows", "preempt_how"):
        assert getattr(first, field).tolist() == getattr(second, field).tolist()


@pytest.mark.parametrize("name", NAMES)
@given(state=states())
def test_every_verdict_has_a_reason(name, state):
    decision = strategies.create(name).decide(state)
    assert all(decision.reason)
    assert all(decision.preempt_reason)


@pytest.mark.parametrize("name", NAMES)
@given(state=states())
def test_no_strategy_admits_more_than_there_is_room_for(name, state):
    decision = strategies.create(name).decide(state)
    admitted, waiting, instances = decision.admitted, state.waiting, state.instances
    for pool in (instances.prefills, instances.decodes):
        for model in ("m", "n"):
            here = pool & (instances.model == model)
            free = (instances.kv_blocks - instances.kv_blocks_used)[here]
            room = int((free * instances.block_tokens[here]).sum())
            rows = admitted[waiting.model[admitted] == model]
            assert int(waiting.prompt_tokens[rows].sum()) <= max(0, room)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
def test_under_every_strategy_everybody_is_served(name, roles):
    served = serve(roles, requests(20, every_us=100), strategy=name, kv_blocks=14)
    assert not served.failures
    assert all(len(tokens) == 20 for tokens in served.tokens.values())
    assert len(served.tokens) == 20


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
