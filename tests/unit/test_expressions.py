"""Strategies written as expressions: what they decide, why, and how their texts travel."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagec import language
from sagec.cli import main
from sagec.compiler import Compiler
from sagec.diagnostics import Diagnostic
from sagec.language.checking import FUNCTIONS, PLACES
from sagec.language.strategies import strategy_of as strategy_stated
from sagec.runtime import strategies
from sagec.runtime.expressions import RuledStrategy
from sagec.runtime.expressions.closures import closure_of
from sagec.runtime.expressions.units import Unit, result
from sagec.runtime.expressions.values import (
    ENDLESS,
    EVERY,
    AdmissionValues,
    PlacingValues,
    RunningValues,
    VictimValues,
    WaitingValues,
    names_of,
)
from sagec.runtime.request import FinishReason
from sagec.runtime.state import ADMIT, ANY, UNBOUNDED, Instances, Running, State, Waiting, check
from sagec.runtime.strategies import StrategyError, choosers
from sagec.runtime.strategies.choosers._load import Load
from sagec.strategies import strategy_of, text_of
from tests.direct_planner import DirectPlanner
from tests.echo_cluster import ONE, SPLIT, Served, echo_executor, requests
from tests.unit.test_strategies import states

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "strategies.sage"
PROGRAM = language.parse(EXAMPLES.read_text("utf-8"), str(EXAMPLES))

OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def ruled(rules: str) -> RuledStrategy:
    made = strategy_of(f"strategy it {{ {rules} }}")
    assert isinstance(made, RuledStrategy)
    return made


# The same as sagec's own.


def assert_same(ours, theirs, state: State) -> None:
    check(ours, state)
    assert ours.verdict.tolist() == theirs.verdict.tolist()
    assert ours.rank.tolist() == theirs.rank.tolist()
    assert ours.preempt_rows.tolist() == theirs.preempt_rows.tolist()
    assert ours.preempt_how.tolist() == theirs.preempt_how.tolist()


def stated(name: str) -> RuledStrategy:
    """A strategy of examples/strategies.sage."""
    (statement,) = (s for s in PROGRAM.strategies if s.name.text == name)
    return strategy_stated(statement)


@pytest.mark.parametrize(("ours", "theirs"), [("in-turn", "fifo"), ("important-first", "priority")])
@OFTEN
@given(state=states())
def test_a_strategy_written_as_rules_decides_as_the_one_of_sagec(ours, theirs, state):
    assert_same(stated(ours).decide(state), strategies.create(theirs).decide(state), state)


# Random rules on random states.

MEASURES = (Unit.NUMBER, Unit.SHARE, Unit.TOKENS, Unit.BLOCKS, Unit.TIME)
LITERALS = {
    Unit.NUMBER: ("0", "3", "1e3"),
    Unit.SHARE: ("0%", "5%", "100%"),
    Unit.TOKENS: ("0 tokens", "64 tokens"),
    Unit.BLOCKS: ("3 blocks",),
    Unit.TIME: ("0us", "200ms", "2s"),
    Unit.TEXT: ('""', '"m"'),
}


@st.composite
def expressions(draw: st.DrawFn, place: type, unit: Unit, depth: int = 3) -> str:
    """The text of an expression of this unit, in parentheses where they might be needed."""

    def another(other: Unit) -> str:
        return draw(expressions(place, other, depth - 1))

    leaves = [name for name, value in names_of(place).items() if value.unit is unit]
    leaves += LITERALS.get(unit, ("kv_free > 5%",) if unit is Unit.CONDITION else ())
    if depth == 0 or unit is Unit.TEXT or draw(st.booleans()):
        return draw(st.sampled_from(leaves))
    sign = draw(st.sampled_from("+-"))
    if unit is Unit.MOMENT:
        return f"({another(unit)} {sign} {another(Unit.TIME)})"
    match draw(st.integers(0, 3)), unit:
        case 0, Unit.CONDITION:
            measure = draw(st.sampled_from((*MEASURES, Unit.MOMENT)))
            comparison = draw(st.sampled_from(("<", "<=", ">", ">=", "==", "!=")))
            return f"({another(measure)} {comparison} {another(measure)})"
        case 1, Unit.CONDITION:
            joined = draw(st.sampled_from(("and", "or", "==")))
            return f"(({another(unit)}) {joined} ({another(unit)}))"
        case 2, Unit.CONDITION:
            return f"(not ({another(unit)}))"
        case 3, Unit.CONDITION:
            return f"({another(Unit.TEXT)} == {another(Unit.TEXT)})"
        case 0, _:
            return f"({another(unit)} {sign} {another(unit)})"
        case 1, _:
            return f"({another(unit)} {draw(st.sampled_from('*/'))} {another(Unit.NUMBER)})"
        case 2, _:
            return f"-{another(unit)}"
        case _:
            function = draw(st.sampled_from(("min", "max")))
            return f"{function}({another(unit)}, abs({another(unit)}))"


@st.composite
def rules(draw: st.DrawFn) -> str:
    """The rules of a strategy, any of those that there are."""

    def measured(place: type) -> str:
        unit = draw(st.sampled_from((*MEASURES, Unit.MOMENT, Unit.CONDITION)))
        return draw(expressions(place, unit))

    def condition(place: type) -> str:
        return draw(expressions(place, Unit.CONDITION))

    way = st.sampled_from(("min", "max"))
    every = {
        "order": lambda: f"order by {measured(WaitingValues)} desc, {measured(WaitingValues)}",
        "admit": lambda: f"admit while {condition(AdmissionValues)}",
        "reject": lambda: f"reject when {condition(WaitingValues)}",
        "prefill": lambda: f"prefill on {draw(way)}({measured(PlacingValues)}), {draw(way)}(load)",
        "decode": lambda: f"decode on {draw(way)}({measured(PlacingValues)})",
        "preempt": lambda: f"preempt {draw(way)} {measured(RunningValues)}, oldest",
        "when": lambda: f"preempt latest when {condition(VictimValues)}",
        "bounds": lambda: "mode time-share chunk 7 horizon 3",
    }
    chosen = sorted(draw(st.sets(st.sampled_from(sorted(every)), min_size=1, max_size=4)))
    return " ".join(
        every[rule]() for rule in chosen if not (rule == "when" and "preempt" in chosen)
    )


@pytest.mark.filterwarnings("error")
@OFTEN
@given(text=rules(), state=states())
def test_any_rules_give_any_state_a_decision_that_fits_it_its_room_and_has_reasons(text, state):
    first, again = (ruled(text).decide(state) for _ in range(2))
    check(first, state)
    assert all(first.reason) and all(first.preempt_reason)
    for field in ("verdict", "rank", "reason", "prefill_on", "preempt_rows", "preempt_reason"):
        assert getattr(first, field).tolist() == getattr(again, field).tolist()
    assert_there_is_room(first.admitted, state)


def assert_there_is_room(admitted, state: State) -> None:
    """The prompts of these rows fit what is free on the instances of their model."""
    waiting, instances = state.waiting, state.instances
    for pool in (instances.prefills, instances.decodes):
        for model in ("m", "n"):
            here = pool & (instances.model == model)
            free = np.maximum((instances.kv_blocks - instances.kv_blocks_used)[here], 0)
            room = int((free * instances.block_tokens[here]).sum())
            rows = admitted[waiting.model[admitted] == model]
            assert int(waiting.prompt_tokens[rows].sum()) <= room


@OFTEN
@given(text=rules())
def test_a_strategy_is_the_same_after_it_went_through_its_text(text):
    made = ruled(text)
    assert strategy_of(text_of(made)) == made
    assert text_of(strategy_of(text_of(made))) == text_of(made)


# One after the other.


def one_instance(**columns) -> Instances:
    defaults = {"role": "both", "kv_blocks": 40, "block_tokens": 16, "prefill_ns_per_token": 1000}
    return Instances.of(["x0"], **(defaults | columns))


def state_of(waiting: Waiting, running: Running | None = None, instances=None, **more) -> State:
    return State(
        now_us=more.pop("now_us", 1000),
        round=0,
        waiting=waiting,
        running=running if running is not None else Running.of([]),
        instances=instances if instances is not None else one_instance(),
        **more,
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@OFTEN
@given(
    prompts=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    text=expressions(AdmissionValues, Unit.CONDITION),
)
def test_admission_sees_each_row_as_if_those_before_it_had_been_admitted(prompts, text):
    ids = [f"w{i}" for i in range(len(prompts))]
    state = state_of(Waiting.of(ids, prompt_tokens=prompts, sequence=range(len(prompts))))
    condition = closure_of(ruled(f"admit while {text}").rules.admit)
    rows = np.arange(len(prompts))
    at_once = np.broadcast_to(condition(AdmissionValues(state, rows)), len(rows))
    for row in rows.tolist():
        used = sum(-(-(prompt + 1) // 16) for prompt in prompts[:row])
        then = state_of(
            Waiting.of(ids[row:], prompt_tokens=prompts[row:], sequence=range(row, len(ids))),
            Running.of(ids[:row], prompt_tokens=prompts[:row]),
            one_instance(kv_blocks_used=used),
        )
        left = np.arange(len(ids) - row)
        alone = np.broadcast_to(condition(WaitingValues(then, left)), len(left))
        assert bool(alone[0]) == bool(at_once[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@OFTEN
@given(
    tokens=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    text=expressions(VictimValues, Unit.CONDITION),
)
def test_victims_are_judged_as_if_those_before_them_had_left(tokens, text):
    def running(first: int) -> Running:
        rest = tokens[first:]
        ids = [f"r{i}" for i in range(first, len(tokens))]
        numbers = range(first, len(tokens))
        return Running.of(ids, prompt_tokens=rest, computed_tokens=rest, sequence=numbers)

    def used(first: int) -> int:
        return sum(-(-(count + 1) // 16) for count in tokens[first:])

    condition = closure_of(ruled(f"preempt latest when {text}").rules.preempt_when)
    nobody = Waiting.of([])
    state = state_of(nobody, running(0), one_instance(kv_blocks_used=used(0)))
    at_once = np.broadcast_to(condition(VictimValues(state, np.arange(len(tokens)))), len(tokens))
    for row in range(len(tokens)):
        then = state_of(nobody, running(row), one_instance(kv_blocks_used=used(row)))
        alone = np.broadcast_to(condition(RunningValues(then, EVERY)), len(tokens) - row)
        if "load" not in text:  # what is still to be computed counts as it is now
            assert bool(alone[0]) == bool(at_once[row])


# What each rule does.


def admitted(text: str, waiting: Waiting, **more) -> list[str]:
    decision = ruled(text).decide(state_of(waiting, **more))
    return waiting.ids[decision.admitted].tolist()


def test_requests_go_by_the_first_key_and_equals_by_the_next():
    waiting = Waiting.of(["a", "b", "c"], prompt_tokens=[9, 9, 3], arrival_us=[5, 2, 7])
    assert admitted("order by prompt_tokens, arrival", waiting) == ["c", "b", "a"]
    assert admitted("order by prompt_tokens desc, arrival desc", waiting) == ["a", "b", "c"]
    assert admitted("order by prompt_tokens > 5 tokens desc", waiting) == ["a", "b", "c"]


def test_without_an_order_requests_go_by_arrival():
    waiting = Waiting.of(["a", "b"], prompt_tokens=9, arrival_us=[5, 2])
    assert admitted("chunk 8", waiting) == ["b", "a"]


def test_cached_tokens_count_where_there_are_the_most():
    waiting = Waiting.of(["a", "b"], prompt_tokens=[40, 50])
    instances = Instances.of(["x", "y"], role="both", kv_blocks=40, block_tokens=16)
    cached = np.array([[0, 0], [16, 32]])
    text = "order by prompt_tokens - cached_tokens"
    assert admitted(text, waiting, instances=instances, cached_tokens=cached) == ["b", "a"]


def test_admission_ends_with_the_first_for_whom_the_condition_fails():
    waiting = Waiting.of(["a", "b", "c"], prompt_tokens=15, arrival_us=[1, 2, 3])
    decision = ruled("admit while kv_free > 5%").decide(
        state_of(waiting, instances=one_instance(kv_blocks_used=37))
    )
    assert waiting.ids[decision.admitted].tolist() == ["a"]
    assert decision.reason.tolist() == [
        "order by arrival: it fits",
        "waits: kv_free 5% is not > 5%",
        "waits behind 'b': kv_free 5% is not > 5%",
    ]


def test_admission_ends_for_each_model_by_itself():
    instances = Instances.of(
        ["x", "y"], role="both", model=["m", "n"], kv_blocks=40, block_tokens=16,
        kv_blocks_used=[39, 0],
    )  # fmt: skip
    waiting = Waiting.of(["a", "b"], prompt_tokens=9, model=["m", "n"], arrival_us=[1, 2])
    assert admitted("admit while kv_free > 10%", waiting, instances=instances) == ["b"]


def test_a_condition_of_several_parts_says_the_parts_that_decided():
    waiting = Waiting.of(["a"], prompt_tokens=9, priority=4)
    for text, why in {
        "kv_free > 5% and priority < 3": "priority 4 is not < 3",
        "kv_free < 5% or priority < 3": "kv_free 100% is not < 5% and priority 4 is not < 3",
        "not (priority == 4 and kv_free > 5%)": "priority 4 is == 4 and kv_free 100% is > 5%",
        'tenant == "b" or running * 2 > waiting': (
            'tenant "" is not == "b" and running * 2 0 is not > waiting 1'
        ),
        "now > deadline": "now 1ms is not > deadline endless",
    }.items():
        decision = ruled(f"admit while {text}").decide(state_of(waiting))
        assert decision.reason.tolist() == [f"waits: {why}"]


def test_a_request_is_rejected_with_the_values_that_say_why():
    waiting = Waiting.of(["late", "free"], prompt_tokens=9, ttft_us=[500, 0])
    decision = ruled("reject when slack < 0ms").decide(state_of(waiting, now_us=2_500))
    assert decision.rejected.tolist() == [0]
    assert decision.reason[0] == "rejected: slack -2.01ms is < 0ms"
    assert decision.verdict[1] == ADMIT


@pytest.mark.parametrize("text", ["reject when priority == 7", "reject when priority == 0"])
def test_a_prompt_that_no_instance_holds_is_rejected_with_the_numbers(text):
    waiting = Waiting.of(["a"], prompt_tokens=700, generate_tokens=UNBOUNDED)
    decision = ruled(text).decide(state_of(waiting))
    assert decision.reason.tolist() == [
        "700 prompt tokens fit no instance: the largest holds 640 tokens"
    ]


def test_prompts_go_to_the_instance_that_ranks_first_and_count_there():
    instances = Instances.of(
        ["x", "y"], role="both", kv_blocks=40, block_tokens=16, prefill_ns_per_token=[900, 1000]
    )
    waiting = Waiting.of(["a", "b", "c"], prompt_tokens=32, arrival_us=[1, 2, 3])
    state = state_of(waiting, instances=instances)
    for text, places in {
        "prefill on min(prefill_time)": [0, 0, 0],
        "prefill on min(load), min(prefill_time)": [0, 1, 0],
        "prefill on max(prefill_time) decode on min(load)": [1, 1, 1],
        'prefill on max(instance == "y")': [1, 1, 1],
    }.items():
        decision = ruled(text).decide(state)
        assert decision.prefill_on.tolist() == decision.decode_on.tolist() == places


def test_outputs_go_where_they_rank_first_unless_they_stay():
    instances = Instances.of(
        ["p", "d", "e"], role=["prefill", "decode", "decode"], kv_blocks=40, block_tokens=16,
        kv_blocks_used=[0, 20, 10],
    )  # fmt: skip
    waiting = Waiting.of(["a"], prompt_tokens=32, generate_tokens=4)
    decision = ruled("decode on max(kv_used)").decide(state_of(waiting, instances=instances))
    assert (decision.prefill_on.tolist(), decision.decode_on.tolist()) == ([0], [1])


def test_a_chooser_says_where_requests_go():
    instances = Instances.of(["x", "y"], role="both", kv_blocks=40, block_tokens=16)
    waiting = Waiting.of(["a", "b"], prompt_tokens=32, arrival_us=[1, 2])
    state = state_of(waiting, instances=instances)
    assert ruled("place by round-robin").decide(state).prefill_on.tolist() == [0, 1]
    assert ruled("order by arrival").decide(state).prefill_on.tolist() == [ANY, ANY]


def running(count: int, **columns) -> Running:
    defaults = {"prompt_tokens": 30, "computed_tokens": 31, "arrival_us": range(count)}
    return Running.of([f"r{i}" for i in range(count)], **(defaults | columns))


def test_requests_leave_until_the_condition_no_longer_holds():
    state = state_of(
        Waiting.of(["w"], prompt_tokens=1), running(20), one_instance(kv_blocks_used=40)
    )
    decision = ruled("preempt latest when kv_free < 8%").decide(state)
    assert decision.preempt_rows.tolist() == [19, 18]
    assert set(decision.preempt_reason) == {"kv_free 0% is < 8%"}
    assert decision.reason.tolist() == ["waits, for 2 running must leave"]


def test_victims_go_by_their_keys_and_those_on_their_way_stay():
    present = running(4, priority=[1, 5, 5, 9], arriving=[False, False, False, True])
    state = state_of(Waiting.of([]), present, one_instance(kv_blocks_used=38))
    for text, rows in {
        "preempt max priority, latest when running > 2": [2, 1],
        "preempt max priority, oldest when running > 3": [1],
        "preempt min priority, latest when running > 2": [0, 2],
    }.items():
        assert ruled(text).decide(state).preempt_rows.tolist() == rows


def test_a_condition_may_be_a_value_and_is_told_by_its_name():
    present = running(3, computed_tokens=[40, 3, 40])
    decision = ruled("preempt oldest when not decoding or not decoding == (priority > 3)").decide(
        state_of(Waiting.of([]), present)
    )
    assert decision.preempt_rows.tolist() == [0, 1]
    assert set(decision.preempt_reason) == {
        "decoding true is not == priority > 3 false",
    }
    decision = ruled("preempt max(prompt_tokens - computed_tokens) when not decoding").decide(
        state_of(Waiting.of([]), present)
    )
    assert decision.preempt_reason.tolist() == ["decoding is false"]


def test_one_request_is_left_on_each_instance():
    places = Instances.of(["x", "y"], role="both", kv_blocks=40, block_tokens=16)
    state = state_of(Waiting.of([]), running(5, instance=[0, 0, 1, 1, 1]), places)
    decision = ruled("preempt latest when kv_free >= 0%").decide(state)
    assert sorted(decision.preempt_rows.tolist()) == [1, 3, 4]


def test_where_kv_runs_out_requests_leave_whatever_the_condition_says():
    present = running(20, computed_tokens=32, priority=range(20))
    state = state_of(Waiting.of([]), present)
    for text, rows in {
        "order by priority": {14, 15, 16, 17, 18, 19, 13},
        "preempt min priority when kv_free < -1%": {0, 1, 2, 3, 4, 5, 6},
    }.items():
        decision = ruled(text).decide(state)
        assert set(decision.preempt_rows.tolist()) == rows
        assert set(decision.preempt_reason) == {"KV is full, and it is the first to leave"}


def test_mode_chunk_and_horizon_are_those_of_the_rules():
    decision = ruled("mode strict chunk 24 horizon 5").decide(state_of(Waiting.of(["a"])))
    assert (decision.mode, decision.horizon_steps) == ("strict", 5)
    assert decision.chunk_tokens.tolist() == [24]


def test_blocks_and_tokens_convert_with_the_blocks_of_the_instance():
    waiting = Waiting.of(["a", "b"], prompt_tokens=[17, 32], arrival_us=[1, 2])
    values = WaitingValues(state_of(waiting), np.arange(2))
    order = ruled("order by blocks(prompt_tokens), tokens(kv_blocks)").rules.order
    assert [closure_of(key.expression)(values).tolist() for key in order] == [[2, 2], [640, 640]]


def test_a_division_by_nothing_is_endless_and_nothing_by_nothing_is_nothing():
    waiting = Waiting.of(["a", "b"], prompt_tokens=[17, 32], priority=[0, 3])
    (key,) = ruled("order by priority / preemptions").rules.order
    values = WaitingValues(state_of(waiting), np.arange(2))
    with np.errstate(all="ignore"):
        assert closure_of(key.expression)(values).tolist() == [0, ENDLESS]


# Values and units.


@given(state=states())
def test_every_value_of_every_place_is_a_column_of_its_rows(state):
    waiting, present = state.waiting.rows, np.argsort(state.running.instance)
    load = Load(state, waiting, "prefill")
    for values, length in (
        (WaitingValues(state, waiting), len(waiting)),
        (AdmissionValues(state, waiting), len(waiting)),
        (RunningValues(state, EVERY), len(present)),
        (VictimValues(state, present), len(present)),
        *((PlacingValues(load, row), len(state.instances)) for row in waiting[:1].tolist()),
    ):
        for name, value in names_of(type(values)).items():
            column = np.asarray(getattr(values, name))
            assert column.shape in ((), (length,)), name
            assert (column.dtype == np.bool_) == (value.unit is Unit.CONDITION) or not length
            assert value.summary


def test_only_like_is_added_to_like_and_a_time_to_a_moment():
    added = {(a, b) for a in Unit for b in Unit if result("+", a, b) is not None}
    assert added == {
        *((unit, unit) for unit in MEASURES),
        (Unit.MOMENT, Unit.TIME),
        (Unit.TIME, Unit.MOMENT),
    }


def test_only_like_is_compared_and_only_numbers_and_shares_scale():
    for a in Unit:
        for b in Unit:
            assert (result("==", a, b) is not None) == (a is b)
            scales = {a, b} & {Unit.NUMBER, Unit.SHARE} and {a, b} <= set(MEASURES)
            assert (result("*", a, b) is not None) == bool(scales)


def test_every_place_has_a_rule_to_name_it_and_every_function_its_words():
    assert set(PLACES) == {
        WaitingValues, AdmissionValues, PlacingValues, RunningValues, VictimValues
    }  # fmt: skip
    assert all(FUNCTIONS.values())


# The examples.


@pytest.mark.parametrize("roles", [ONE, SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("name", [s.name.text for s in PROGRAM.strategies])
def test_every_example_serves_everybody_it_does_not_reject(name, roles):
    served = Served()
    asked = [
        msgspec.structs.replace(request, tenant="batch" if number % 3 else "")
        for number, request in enumerate(requests(20, every_us=100))
    ]
    executor = echo_executor(roles, served, kv_blocks=14)
    served.take(executor.serve(asked, stated(name), DirectPlanner()))
    reasons = {end.reason for end in served.ends.values()}
    assert len(served.ends) == 20
    assert reasons == {FinishReason.LENGTH}


def test_the_file_of_examples_serves_with_the_strategy_that_it_names():
    unit = Compiler().parse(EXAMPLES.read_text("utf-8"), str(EXAMPLES))
    assert unit.strategy == "shortest-first"
    assert unit.make_strategy() == stated("shortest-first")
    assert unit.make_strategy("calm") == strategies.create(
        "adaptive", {"dwell_ms": 8000.0, "long_steps": 48}
    )
    assert unit.make_strategy("priority{chooser=weighted}").chooser == "weighted"
    with pytest.raises(StrategyError, match="did you mean 'calm'"):
        unit.make_strategy("clam")


def test_options_in_a_file_have_units_and_yes_and_no():
    text = "patience_us 3s margin 20% reject yes chooser no most_preemptions 4"
    with pytest.raises(Diagnostic, match="no chooser 'no'"):
        strategy_of(f"strategy a from slo-aware {{ {text} }}")
    made = strategy_of(f"strategy a from slo-aware {{ {text.replace('chooser no', '')} }}")
    given = {"patience_us": 3_000_000, "margin": 0.2, "reject": True, "most_preemptions": 4}
    assert made == strategies.create("slo-aware", given)


def test_a_file_of_ir_names_its_strategy_with_options():
    unit = Compiler().parse('pd.graph @g {policy = "priority{chooser=weighted}"} {\n}\n', "a.mlir")
    assert unit.make_strategy() == strategies.create("priority", {"chooser": "weighted"})


# Texts.


OTHER = {
    bool: lambda default: not default,
    int: lambda default: default + 1,
    float: lambda default: default / 2,
    str: lambda default: choosers.known()[-1],
}
"""Another value of an option, by the type of its default."""


@pytest.mark.parametrize("name", strategies.known())
def test_every_strategy_is_the_same_after_it_went_through_its_text(name):
    made = strategies.create(name)
    assert text_of(made) == name
    for field in dataclasses.fields(made):
        value = OTHER[type(field.default)](field.default)
        other = dataclasses.replace(made, **{field.name: value})
        assert other != made
        assert strategy_of(text_of(other)) == other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no strategy; a name, and options in braces, as in: fifo, or slo-aware{"),
        ("fifo{", "'fifo{' is no strategy; "),
        ("fifi", "no strategy 'fifi'; did you mean 'fifo'? "),
        ("fifo{a}", "strategy fifo: 'a' is no option; as in: fifo{option=1}"),
        ("fifo{a=1}", "strategy fifo: no option 'a'; there are none"),
        ("priority{choser=x}", "strategy priority: no option 'choser'; did you mean 'chooser'? "),
        ("priority{chooser=1}", "strategy priority: option chooser: 1 is not a word"),
        ("priority{chooser=a,chooser=b}", "strategy priority: option chooser is given twice"),
        ("slo-aware{margin=1e999}", "strategy slo-aware: option margin: '1e999' is not a number"),
        ('strategy a { chunk 1 } model m from "m"', "is no strategy; one statement 'strategy'"),
    ],
)
def test_a_text_that_is_no_strategy_is_named(text, says):
    with pytest.raises(StrategyError) as caught:
        strategy_of(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_statement_that_is_wrong_is_pointed_at():
    with pytest.raises(Diagnostic, match="no value 'arival'"):
        strategy_of("strategy a { order by arival }")


# The command line.

Captured = pytest.CaptureFixture[str]


def test_the_command_line_lists_strategies_choosers_and_policies(capsys: Captured):
    assert main(["strategies", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in there["strategies"]] == strategies.known()
    assert [entry["name"] for entry in there["choosers"]] == choosers.known()
    assert "lru" in [entry["name"] for entry in there["policies"]]
    assert all(entry["summary"] for entries in there.values() for entry in entries)
    margin = {"name": "margin", "type": "float", "default": "0.1"}
    (slo_aware,) = (entry for entry in there["strategies"] if entry["name"] == "slo-aware")
    assert margin in slo_aware["options"]
    assert main(["strategies"]) == 0
    assert "s3-fifo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shortst-first", "no strategy 'shortst-first'; did you mean 'shortest-first'?"),
        ("adaptive{windw-ms=5}", "no option 'windw-ms'; did you mean 'window-ms'?"),
        ("strategy a { order by arival }", "no value 'arival'; did you mean 'arrival'?"),
    ],
)
def test_a_wrong_strategy_on_the_command_line_is_wrong_usage(text, says, capsys: Captured):
    assert (
        main(["run", str(EXAMPLES), "--engine", "echo", "--one-process", "--strategy", text]) == 2
    )
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["shortest-first", "calm", "priority{chooser=least-load}", "strategy a { chunk 9 }"]
)
def test_the_command_line_serves_with_the_strategy_that_it_is_given(text, capsys: Captured):
    argv = ["run", str(EXAMPLES), "--engine", "echo", "--one-process", "--json"]
    assert main([*argv, "--strategy", text]) == 0
    assert len(json.loads(capsys.readouterr().out)["requests"]) == 4
