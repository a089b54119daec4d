"""Choosers: what holds for every one, and the formulas of each."""

import collections
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagec.runtime.state import ANY, Instances, Ints, Running, State, Waiting
from sagec.runtime.strategies import StrategyError, choosers
from sagec.runtime.strategies.choosers import DECODE, PREFILL, place, remembered
from sagec.runtime.strategies.choosers.prefix_aware import lot

NAMES = choosers.known()


def state(waiting: Waiting, ids: str = "xyz", **given) -> State:
    """Of instances of role both with 100 blocks of 16 tokens each, and nothing running."""
    columns = {"role": "both", "kv_blocks": 100, "block_tokens": 16}
    columns |= {key: value for key, value in given.items() if key in _INSTANCE_COLUMNS}
    rest = {key: value for key, value in given.items() if key not in _INSTANCE_COLUMNS}
    return State(
        **{"now_us": 0, "round": 0, "running": Running.of([]), **rest},
        waiting=waiting,
        instances=Instances.of(list(ids), **columns),
    )


_INSTANCE_COLUMNS = {field.name for field in dataclasses.fields(Instances)}


def waves(count: int = 6, **columns) -> Waiting:
    columns = {"prompt_tokens": 31, "generate_tokens": 8, "sequence": range(count), **columns}
    return Waiting.of([f"w{i}" for i in range(count)], **columns)


def running_on(on: list[int], **columns) -> Running:
    columns = {"prompt_tokens": 15, "computed_tokens": 15, **columns}
    return Running.of([f"r{i}" for i in range(len(on))], instance=on, decode_on=on, **columns)


def chosen(name: str, seen: State, phase: str = PREFILL, **options) -> list[int]:
    return choosers.create(name, options).choose(seen, seen.waiting.rows, phase).tolist()


# Every chooser


@st.composite
def clusters(draw) -> State:
    """A cluster of any roles, models and fill, with rows that wait."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, num_waiting = draw(st.integers(1, 5)), draw(st.integers(0, 12))
    on = random.integers(0, count, draw(st.integers(0, 8))).tolist()
    return state(
        waves(
            num_waiting,
            prompt_tokens=random.integers(1, 400, num_waiting),
            model=random.choice(["m", "n"], num_waiting),
        ),
        "vwxyz"[:count],
        role=random.choice(["prefill", "decode", "both"], count),
        model=random.choice(["m", "n"], count),
        kv_blocks=random.integers(1, 60, count),
        kv_blocks_used=random.integers(0, 30, count),
        prefill_ns_per_token=random.choice([0, 100, 900], count),
        running=running_on(on, priority=random.integers(-1, 2, len(on))),
        cached_tokens=random.choice([0, 16, 64], (num_waiting, count)),
        round=draw(st.integers(0, 99)),
        memory={"placed": {"m": draw(st.integers(0, 9))}},
    )


@pytest.mark.parametrize("phase", [PREFILL, DECODE])
@pytest.mark.parametrize("name", NAMES)
@given(seen=clusters())
def test_a_choice_runs_the_phase_and_the_model_and_has_room_for_all(name, phase, seen):
    instances, waiting = seen.instances, seen.waiting
    choice = chosen(name, seen, phase)
    assert choice == chosen(name, seen, phase)
    able = instances.prefills if phase == PREFILL else instances.decodes
    free = (instances.kv_blocks - instances.kv_blocks_used).tolist()
    for row, i in enumerate(choice):
        need = -(-(waiting.prompt_tokens[row] + 1) // 16)
        if i != ANY:
            assert able[i]
            assert instances.model[i] == waiting.model[row]
            free[i] -= need
            assert free[i] >= 0


@pytest.mark.parametrize("name", NAMES)
@given(seen=clusters())
def test_a_row_that_fits_somewhere_is_placed(name, seen):
    if chosen(name, seen)[:1] == [ANY]:
        instances, tokens = seen.instances, int(seen.waiting.prompt_tokens[0]) + 1
        growing = np.bincount(seen.running.decode_on, minlength=len(instances))
        free = instances.kv_blocks - instances.kv_blocks_used - growing
        serves = instances.prefills & (instances.model == seen.waiting.model[0])
        assert not (serves & (free * 16 >= tokens)).any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_chosen_before_count_as_load(name):
    """Equal instances get equal shares of what comes at once."""
    counts = collections.Counter(chosen(name, state(waves(9))))
    assert set(counts.values()) == {3}


@pytest.mark.parametrize("name", NAMES)
def test_a_chooser_is_called_what_its_file_is_called_and_says_what_it_does(name):
    chooser = choosers.create(name)
    assert chooser.name == name
    assert type(chooser).__doc__


def test_unknown_choosers_and_options_are_named():
    with pytest.raises(StrategyError, match=r"^no chooser 'weighed'; did you mean 'weighted'\?"):
        choosers.create("weighed")
    with pytest.raises(StrategyError, match=r"^chooser weighted: no option 'by-sped'; did you"):
        choosers.create("weighted", {"by-sped": True})
    wrong = r"^chooser weighted: option by-speed: 3 is not true or false"
    with pytest.raises(StrategyError, match=wrong):
        choosers.create("weighted", {"by-speed": 3})
    assert choosers.create("prefix-aware", {"temperature": 1}).temperature == 1


# Places for both phases


def test_a_row_decodes_where_it_prefills_if_that_instance_decodes():
    seen = state(waves(2), "xy", role=["prefill", "both"], kv_blocks=[0, 100])
    placement = place(choosers.create("least-load"), seen, seen.waiting.rows)
    assert placement.prefill_on.tolist() == placement.decode_on.tolist() == [1, 1]
    assert placement.fits.all()


def test_a_row_prefills_here_and_decodes_there_where_roles_are_apart():
    seen = state(waves(4), "pqde", role=["prefill", "prefill", "decode", "decode"])
    placement = place(choosers.create("round-robin"), seen, seen.waiting.rows)
    assert placement.prefill_on.tolist() == [0, 1, 0, 1]
    assert placement.decode_on.tolist() == [2, 3, 2, 3]


def test_a_row_moves_on_where_its_output_would_not_fit():
    waiting = waves(1, prompt_tokens=100, generate_tokens=100)
    seen = state(waiting, "bd", role=["both", "decode"], kv_blocks=[10, 20])
    placement = place(choosers.create("least-load"), seen, seen.waiting.rows)
    assert (placement.prefill_on[0], placement.decode_on[0]) == (0, 1)


def test_what_the_prompts_take_is_gone_for_the_decodes():
    waiting = waves(2, prompt_tokens=[150, 150], generate_tokens=[100, 1])
    seen = state(waiting, "bd", role=["both", "both"], kv_blocks=[10, 20])
    placement = place(_First(), seen, seen.waiting.rows)
    # `_First` sends a decode to d only if it sees that the prompt has filled b.
    assert placement.prefill_on.tolist() == [0, ANY]
    assert placement.decode_on.tolist() == [1, ANY]


class _First:
    """One row may prefill on the first, and decode on the second once the first is full."""

    name = "first"

    def choose(self, seen: State, rows: Ints, phase: str) -> Ints:
        free = seen.instances.kv_blocks - seen.instances.kv_blocks_used
        column = np.full(len(rows), ANY, np.int64)
        if phase == PREFILL:
            column[:1] = 0
        elif free[0] == 0:
            column[:1] = 1
        return column


# Round robin


def test_turns_go_on_where_the_last_round_ended_and_models_have_their_own():
    memory: dict = {}
    sent: dict[str, list[int]] = {"m": [], "n": []}
    for models in ("mn", "mn", "mnm", "m", "nn"):
        waiting = waves(len(models), model=list(models))
        seen = state(waiting, "abcd", model=["m", "m", "n", "n"], memory=memory)
        choice = chosen("round-robin", seen)
        for model, i in zip(models, choice, strict=True):
            sent[model].append(i)
        memory = remembered(seen, waiting.rows)
    assert sent == {"m": [0, 1, 0, 1, 0], "n": [2, 3, 2, 3, 2]}


def test_one_without_room_loses_its_turn():
    assert chosen("round-robin", state(waves(4), kv_blocks=[100, 1, 100])) == [0, 2, 2, 0]


# Least load


def test_the_freest_instance_has_the_most_free_blocks_a_request():
    # (100 - 50) / 1, (100 - 20) / 4, (100 - 90) / 1
    seen = state(waves(1), kv_blocks_used=[50, 20, 90], running=running_on([0, 1, 1, 1, 1, 2]))
    assert chosen("least-load", seen) == [0]


def test_headroom_keeps_others_away_from_urgent_requests():
    running = running_on([0, 1], priority=[-1, 0])
    seen = state(waves(1), "xy", kv_blocks_used=[10, 30], running=running)
    assert chosen("least-load", seen) == [0]
    assert chosen("least-load", seen, headroom_blocks=40) == [1]


# Weighted


def test_shares_follow_the_kv_blocks():
    counts = collections.Counter(chosen("weighted", state(waves(12), kv_blocks=[100, 200, 300])))
    assert counts == {0: 2, 1: 4, 2: 6}


def test_shares_follow_the_measured_speed_of_the_phase():
    seen = state(waves(12), "xy", prefill_ns_per_token=[100, 300], decode_step_us=[70, 70])
    assert collections.Counter(chosen("weighted", seen, by_speed=True)) == {0: 9, 1: 3}
    by_steps = chosen("weighted", seen, DECODE, by_speed=True)
    assert collections.Counter(by_steps) == {0: 6, 1: 6}


def test_what_nobody_has_measured_counts_as_the_fastest():
    seen = state(waves(14), prefill_ns_per_token=[100, 0, 300])
    counts = collections.Counter(chosen("weighted", seen, by_speed=True))
    assert counts == {0: 6, 1: 6, 2: 2}


# Prefix aware


def test_a_cached_prompt_draws_the_request_until_load_outweighs_it():
    cached = np.array([[0, 32, 0]])
    # Costs in blocks: prompt 3 - 2 cached, plus in use with its own 3.
    light = state(waves(1, prompt_tokens=47), kv_blocks_used=[9, 10, 9], cached_tokens=cached)
    assert chosen("prefix-aware", light) == [1]
    heavy = state(waves(1, prompt_tokens=47), kv_blocks_used=[9, 12, 20], cached_tokens=cached)
    assert chosen("prefix-aware", heavy) == [0]
    assert chosen("prefix-aware", light, cache_credit=0.0) != [1]


def test_pending_prompts_and_requests_count():
    pending = running_on([0], prompt_tokens=160, computed_tokens=0)
    assert chosen("prefix-aware", state(waves(1), "xy", running=pending)) == [1]
    busy = state(waves(1), "xy", running=running_on([0]), kv_blocks_used=[0, 1])
    assert chosen("prefix-aware", busy) == [0]
    assert chosen("prefix-aware", busy, active_weight=2.0) == [1]


def test_credit_decays_with_the_excess_of_prompts_to_compute():
    pending = running_on([0], prompt_tokens=48, computed_tokens=0)
    cached = np.array([[64, 0]])
    seen = state(
        waves(1, prompt_tokens=63), "xy", running=pending, cached_tokens=cached,
        kv_blocks_used=[3, 4],
    )  # fmt: skip
    # x: 3 + 4 - 4 + 3 + 4 = 10 of y's 4 + 4 + 4 = 12; with decay 1, credit is 4 / (1 + 3 / 4).
    assert chosen("prefix-aware", seen) == [0]
    assert chosen("prefix-aware", seen, credit_decay=1.0) == [0]
    assert chosen("prefix-aware", seen, credit_decay=2.0) == [1]


def test_equal_costs_are_drawn_by_lot_and_the_same_again():
    draws = [chosen("prefix-aware", state(waves(1), "xy", round=n))[0] for n in range(400)]
    assert 150 < sum(draws) < 250
    assert draws == [chosen("prefix-aware", state(waves(1), "xy", round=n))[0] for n in range(400)]


def test_temperature_draws_by_the_softmax_of_the_costs():
    used = [0, 6, 12]
    draws = collections.Counter(
        chosen("prefix-aware", state(waves(1), kv_blocks_used=used, round=n), temperature=0.5)[0]
        for n in range(2000)
    )
    weights = [math.exp(-cost / 0.5) for cost in (0.0, 0.5, 1.0)]
    for i, weight in enumerate(weights):
        assert draws[i] / 2000 == pytest.approx(weight / sum(weights), abs=0.04)


def test_lots_are_even_and_differ_by_round_and_request():
    lots = np.array([lot(r, s) for r in range(100) for s in range(100)])
    assert ((lots >= 0) & (lots < 1)).all()
    assert len(set(lots.tolist())) == len(lots)
    assert np.histogram(lots, 10, (0, 1))[0] == pytest.approx(np.full(10, 1000), rel=0.12)


# Cache aware


def test_an_even_load_goes_where_enough_of_the_prompt_is_cached():
    waiting, used = waves(1, prompt_tokens=100), [5, 0, 3]
    for tokens, expected in ((48, 2), (30, 1)):  # more than 0.3 of it, and not more
        cached = np.array([[0, 0, tokens]])
        seen = state(waiting, kv_blocks_used=used, cached_tokens=cached)
        assert chosen("cache-aware", seen) == [expected]


def test_an_uneven_load_goes_to_the_least_loaded():
    cached = np.array([[31, 0]])
    for num_requests, expected in ((64, 0), (65, 1)):  # more than 64 apart, and not more
        seen = state(
            waves(1), "xy", kv_blocks=1000, running=running_on([0] * num_requests),
            cached_tokens=cached,
        )  # fmt: skip
        assert chosen("cache-aware", seen) == [expected]
    nearly = running_on([0] * 300 + [1] * 220)  # 80 apart, but not 1.5 times as many
    seen = state(waves(1), "xy", kv_blocks=1000, running=nearly, cached_tokens=cached)
    assert chosen("cache-aware", seen) == [0]
