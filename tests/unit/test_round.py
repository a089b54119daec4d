"""A round is fast in ways that must not show: the same plans as from a text, the same steps as
step by step; and steps keep to budgets and blocks, whatever competes."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from sagec.compiler import Compiler, passes_of
from sagec.dialects.columns import ListsAttr, WordsAttr
from sagec.lowering.execution_plan import plans_of
from sagec.passes import flow
from sagec.passes.chunk_prefill import bounds_of
from sagec.passes.errors import PassError
from sagec.passes.topology import Instance, topology_of
from sagec.planner import CompilingPlanner
from sagec.runtime import strategies
from sagec.runtime.direct.packing import (
    Finished,
    Order,
    Packed,
    Packer,
    decodes_only,
    line,
    pack,
    packed,
)
from sagec.runtime.direct.work import Work
from sagec.universe import DIALECTS
from tests.serving_graphs import Round, rounds

ROOT = Path(__file__).parents[2]
COMPILER = Compiler()
LAX = settings(suppress_health_check=list(HealthCheck), max_examples=200, deadline=None)

CLUSTER = """
cluster.model @m {layers = 2, hidden = 64, heads = 4, kv_heads = 2, head_dim = 16, ffn = 128,
  vocab = 256}
cluster.device @g {flops_per_s = 1.0e+12, bytes_per_s = 1.0e+9}
cluster.instance @i on [@g] engine "sim" role both model @m {kv_blocks = 1, block_tokens = 4}
"""
INSTANCE = topology_of(COMPILER.parse(CLUSTER, "cluster.mlir").module).instances[0]


# Work for one instance


@st.composite
def instances(draw: Any, roomy: bool) -> Instance:
    """One that has little of something, or enough of everything."""
    if roomy:
        budget = draw(st.sampled_from((3, 7, 64)))
        return dataclasses.replace(
            INSTANCE, kv_blocks=100_000, max_step_tokens=budget, max_batch=64
        )
    return dataclasses.replace(
        INSTANCE,
        kv_blocks=draw(st.integers(1, 40)),
        max_step_tokens=draw(st.integers(1, 24)),
        max_batch=draw(st.integers(1, 6)),
        max_partial_prefills=draw(st.sampled_from((0, 0, 1, 2))),
    )


@st.composite
def works(draw: Any, prefills: bool = True, others: bool = True, roomy: bool = False) -> Any:
    """Work, blocks, an order, and when other instances have computed which prompts."""
    instance = draw(instances(roomy))
    num_prefills = draw(st.integers(0, 6)) if prefills else 0
    num_others = draw(st.integers(0, 6)) if others else 0
    kinds = draw(st.lists(st.sampled_from(("resident", "coming", "arriving", "late")),
                          min_size=num_others, max_size=num_others))  # fmt: skip
    room = instance.kv_blocks * instance.block_tokens
    rows = [draw(_prefill(room)) for _ in range(num_prefills)]
    rows += [draw(_other(room, kind)) for kind in kinds]
    most = draw(st.sampled_from((0, 0, 5)))
    work = _work(instance, num_prefills, rows, kinds, most)
    blocks = work.blocks
    finished: Finished = {
        work.names[num_prefills + at]: draw(st.floats(0, 5000))
        for at, kind in enumerate(kinds)
        if kind == "coming"
    }
    mode = draw(st.sampled_from(("strict", "time-share", "hybrid")))
    order = Order(mode, draw(st.integers(1, 3)), draw(st.sampled_from((0, 1, 5))))
    return _fitting(work, blocks), order, finished


@st.composite
def _prefill(draw: Any, room: int) -> tuple[int, int, int, int]:
    """Prompt, held, cached and decodes of a row, which alone fits the room."""
    prompt = draw(st.integers(1, min(room, 40)))
    held = draw(st.integers(0, prompt - 1)) if draw(st.booleans()) else 0
    cached = held if draw(st.booleans()) else 0
    return prompt, held, cached, draw(st.sampled_from((0, min(room - prompt, 9))))


@st.composite
def _other(draw: Any, room: int, kind: str) -> tuple[int, int, int, int]:
    prompt = draw(st.integers(1, min(room, 40)))
    held = prompt if kind in ("resident", "arriving") else 0
    return prompt, held, 0, draw(st.integers(0, min(room - prompt, 9)))


def _work(
    instance: Instance,
    num_prefills: int,
    rows: list[tuple[int, int, int, int]],
    kinds: list[str],
    most: int,
) -> Work:
    prompt, held, cached, decodes = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    count = len(rows)
    awaited = np.array([False] * num_prefills + [kind != "resident" for kind in kinds], np.bool_)
    source = ["i" if kind == "arriving" else "p" if kind != "resident" else "" for kind in kinds]
    begin, end = held[:num_prefills], prompt[:num_prefills]
    return Work(
        instance=instance,
        names=tuple(f"r{row}" for row in range(count)),
        num_prefills=num_prefills,
        prompt=prompt,
        held=held,
        cached=cached,
        decodes=decodes,
        generate=decodes,
        deadline=flow.zeros(count),
        bounds=bounds_of(begin, end, np.full(num_prefills, most)),
        source=WordsAttr.from_rows([*[""] * num_prefills, *source]),
        target=flow.nowhere(count),
        transfer_us=np.arange(count) * 7 % 5 * 100,
        awaited=awaited,
    )


def _fitting(work: Work, blocks: Any) -> Work:
    """The work without residents, and prompts begun, that are more than the blocks there are:
    assign-kv preempts those."""
    here = ~work.awaited & (work.held > work.cached) | (work.held >= work.prompt) & ~work.awaited
    kept = ~here | (np.cumsum(np.where(here, blocks, 0)) <= work.instance.kv_blocks)
    rows = kept.nonzero()[0]
    return dataclasses.replace(
        work,
        names=tuple(work.names[row] for row in rows),
        num_prefills=int(kept[: work.num_prefills].sum()),
        bounds=work.bounds.take(rows[rows < work.num_prefills]),
        source=work.source.take(rows),
        target=work.target.take(rows),
        **{
            name: getattr(work, name)[rows]
            for name in ("prompt", "held", "cached", "decodes", "generate", "deadline")
        },
        transfer_us=work.transfer_us[rows],
        awaited=work.awaited[rows],
    )


class StepByStep(Packer):
    """One that packs every single step, also where only decodes are left."""

    def _only_decodes(self) -> bool:
        return False


def stepwise(work: Work, order: Order, finished: Finished) -> Packed:
    return StepByStep(work, work.blocks, order, finished).packed()


def coming(answer: Packed) -> Any:
    """Rows that decode here once their KV is here."""
    return answer.comes & (answer.work.decodes > 0)


# What holds for any steps


@LAX
@given(works() | works(roomy=True))
def test_no_step_computes_more_than_its_budget_or_its_batch(drawn: Any) -> None:
    work, order, finished = drawn
    answer = stepwise(work, order, finished)
    step, _, begin, end = answer.chunks
    prompts = np.bincount(step, end - begin, len(answer.us))
    chunks = np.bincount(step, minlength=len(answer.us))
    decoding = answer.tokens - prompts
    assert len(answer.us) <= order.limit
    assert (decoding >= 0).all() and (answer.tokens >= 1).all()
    assert (answer.tokens <= work.instance.max_step_tokens).all()
    assert (chunks + decoding <= work.instance.max_batch).all()


@LAX
@given(works() | works(roomy=True))
def test_kv_is_never_above_the_blocks_there_are_nor_below_none(drawn: Any) -> None:
    work, order, finished = drawn
    answer = stepwise(work, order, finished)
    assert (answer.used_blocks <= work.instance.kv_blocks).all()
    assert (answer.used_blocks >= 0).all()


@LAX
@given(works(others=False) | works() | works(roomy=True))
def test_a_prompt_is_computed_once_in_order_and_within_its_bounds(drawn: Any) -> None:
    work, order, finished = drawn
    answer = stepwise(work, order, finished)
    for row in range(work.num_prefills):
        step, _, begin, end = answer.chunks[:, answer.chunks[1] == row]
        bounds = work.bounds.rows()[row]
        assert (np.diff(step) > 0).all()
        assert [*begin[:1]] in ([], [work.held[row]]) and (begin[1:] == end[:-1]).all()
        assert (end > begin).all() and (end <= work.prompt[row]).all()
        for low, high in zip(begin.tolist(), end.tolist(), strict=True):
            assert not any(low < bound < high for bound in bounds)


@LAX
@given(works())
def test_unfinished_prompts_are_as_few_as_the_engine_takes(drawn: Any) -> None:
    work, order, finished = drawn
    allowed = work.instance.max_partial_prefills
    step, row, _, end = stepwise(work, order, finished).chunks
    partial = end < work.prompt[row]
    if allowed and step.size:
        assert np.bincount(step[partial], minlength=1).max() <= allowed


@LAX
@given(works() | works(roomy=True))
def test_without_a_horizon_everything_that_can_be_done_is_done(drawn: Any) -> None:
    work, order, finished = drawn
    answer = stepwise(work, dataclasses.replace(order, horizon=0), finished)
    pre = work.num_prefills
    here = ~work.awaited & (work.decodes > 0)
    assert set(work.names[:pre]) <= finished.keys()
    assert (answer.until[here] == (work.prompt + work.decodes)[here]).all()
    todo = int((work.prompt - work.held)[:pre].sum() + work.decodes[here | answer.comes].sum())
    assert answer.tokens.sum() == todo


@LAX
@given(works() | works(roomy=True))
def test_a_row_decodes_after_its_prompt_and_no_more_than_it_has_to(drawn: Any) -> None:
    work, order, finished = drawn
    answer = stepwise(work, order, finished)
    decodes = answer.until > 0
    assert (answer.until <= work.prompt + work.decodes).all()
    assert (answer.until[decodes] > work.prompt[decodes]).all()
    assert not (answer.until[work.awaited & ~answer.comes]).any()
    step, row, _, end = answer.chunks
    last = dict(zip(row[end == work.prompt[row]].tolist(), step.tolist(), strict=False))
    for at, chunk in enumerate(row.tolist()):
        if end[at] == work.prompt[chunk] and answer.until[chunk]:
            assert answer.begin[chunk] > step[at]
    assert all(row in last for row in range(work.num_prefills) if answer.until[row])


@LAX
@given(works(prefills=False, roomy=True), works(others=False, roomy=True))
def test_two_instances_that_await_each_other_both_end(one: Any, other: Any) -> None:
    work, order, _ = one
    answers = packed([other[0], work], [other[0].blocks, work.blocks], order)
    assert [answer.work for answer in answers] == [other[0], work]


# What is fast gives what is slow


def same(fast: Packed, slow: Packed) -> None:
    for name in ("chunks", "us", "tokens", "used_blocks", "begin", "until", "comes"):
        ours, theirs = getattr(fast, name), getattr(slow, name)
        assert ours.dtype == theirs.dtype or not len(ours), name
        assert np.array_equal(ours, theirs), (name, ours, theirs)


@LAX
@given(works(others=False, roomy=True) | works(others=False))
def test_a_line_is_cut_as_it_would_be_packed_step_by_step(drawn: Any) -> None:
    work, order, _ = drawn
    work = dataclasses.replace(work, decodes=np.zeros(len(work.names), np.int64))
    ours: Finished = {}
    theirs: Finished = {}
    fast = line(work, work.blocks, order, ours) if work.names else None
    event(f"line: {fast is not None}")
    if fast is not None:
        same(fast, stepwise(work, order, theirs))
        assert ours == theirs


@LAX
@given(works(prefills=False, roomy=True) | works(prefills=False))
def test_decodes_alone_are_what_would_be_packed_step_by_step(drawn: Any) -> None:
    work, order, finished = drawn
    fast = decodes_only(work, work.blocks, order, finished) if work.names else None
    event(f"decodes only: {fast is not None}")
    if fast is not None:
        same(fast, stepwise(work, order, finished))


@LAX
@given(works() | works(roomy=True))
def test_packing_is_packing_step_by_step(drawn: Any) -> None:
    work, order, finished = drawn
    other = dict(finished)
    if work.names:
        same(pack(work, work.blocks, order, finished), stepwise(work, order, other))
        assert finished == other


def test_the_fast_ways_are_taken_where_nothing_competes() -> None:
    instance = dataclasses.replace(INSTANCE, kv_blocks=100, max_step_tokens=8, max_batch=8)
    order = Order("strict", 4, 16)
    prompts = _work(instance, 2, [(10, 0, 0, 0), (5, 0, 0, 0)], [], 0)
    assert line(prompts, prompts.blocks, order, {}) is not None
    residents = _work(instance, 0, [(10, 10, 0, 3), (5, 0, 0, 2)], ["resident", "coming"], 0)
    assert decodes_only(residents, residents.blocks, order, {"r1": 50.0}) is not None


# Columns and tables


@LAX
@given(st.lists(st.lists(st.integers(-5, 5), max_size=4)), st.data())
def test_taken_lists_are_the_lists_of_the_rows(lists: list[list[int]], data: Any) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1))) if lists else []
    taken = ListsAttr.of(lists).take(np.array(rows, np.int64))
    assert taken.rows() == [lists[row] for row in rows]
    assert taken == ListsAttr.of([lists[row] for row in rows])


@LAX
@given(st.lists(st.sampled_from("abcdef")))
def test_compacted_words_are_those_of_a_parser(rows: list[str]) -> None:
    words = ("unused", *"fedcba")
    codes = np.array([words.index(row) for row in rows], np.int64)
    if rows:
        assert flow.compact(words, codes) == WordsAttr.from_rows(rows)


@LAX
@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9), unique=True))
def test_rows_are_taken_alike_whether_they_follow_each_other_or_not(
    values: list[int], rows: list[int]
) -> None:
    rows = [row for row in rows if row < len(values)]
    names = tuple(f"r{row}" for row in range(len(values)))
    table = flow.Table(names, {"prompt": np.array(values, np.int64)}.__getitem__)
    taken = table.take(np.array(rows, np.int64))
    assert taken.names == tuple(names[row] for row in rows)
    assert taken.prompt.tolist() == [values[row] for row in rows]


@LAX
@given(st.sets(st.integers(0, 199), max_size=6))
def test_most_names_are_taken_in_pieces(gone: set[int]) -> None:
    names = tuple(f"r{row}" for row in range(200))
    rows = [row for row in range(200) if row not in gone]
    assert flow.chosen(names, np.array(rows)) == tuple(names[row] for row in rows)


def test_no_op_has_a_property_with_a_default_which_making_ops_would_have_to_fill_in() -> None:
    for load in DIALECTS.values():
        for op in load().operations:
            definition = op.get_irdl_definition()
            defaults = {**definition.properties, **definition.attributes}
            assert all(getattr(d, "default_value", None) is None for d in defaults.values())


# The whole round


@settings(LAX, max_examples=60)
@given(rounds())
def test_plans_of_a_round_are_to_the_byte_those_of_the_text_of_its_graph(asked: Round) -> None:
    planner = CompilingPlanner(COMPILER.parse(asked.cluster(), "cluster.mlir").module)
    graph = planner.builder.build_round(asked.state, asked.decision)
    module = COMPILER.parse(str(graph), "graph.mlir").module
    planner.builder.drop(graph)
    try:
        passes_of("serve").apply(COMPILER.context, module)
        expected = plans_of(module)
    except PassError as error:
        with pytest.raises(PassError) as raised:
            planner.plan(asked.state, asked.decision)
        assert raised.value.message == error.message
        return
    assert planner.plan(asked.state, asked.decision) == expected


@settings(LAX, max_examples=60)
@given(rounds())
def test_the_graph_of_a_round_verifies_after_every_pass(asked: Round) -> None:
    planner = CompilingPlanner(COMPILER.parse(asked.cluster(), "cluster.mlir").module)
    graph = planner.builder.build_round(asked.state, asked.decision)
    graph.module.verify()
    for compiler_pass in planner.passes.passes:
        try:
            compiler_pass.apply(planner.context, graph.module)
        except PassError:
            return
        graph.module.verify()


@settings(LAX, max_examples=100)
@given(rounds())
def test_no_instance_computes_more_than_its_turn_and_its_step_allow(asked: Round) -> None:
    planner = CompilingPlanner(COMPILER.parse(asked.cluster(), "cluster.mlir").module)
    try:
        plans = planner.plan(asked.state, asked.decision)
    except PassError:
        return
    names, turns = asked.state.instances.ids.tolist(), asked.decision.turn_steps
    event("turns" if turns is not None else "no turns")
    for plan in plans:
        if turns is not None:
            steps = int(turns[names.index(plan.target_instance_id)])
            assert plan.num_steps <= steps
            assert steps or not (len(plan.chunks.row) or len(plan.decodes.row))
        nothing = plan.num_steps == len(plan.preemptions.row) == len(plan.evictions.block_hash) == 0
        assert not nothing or not asked.state.instances.idle[names.index(plan.target_instance_id)]
        if most := asked.decision.step_prompt_tokens:
            tokens = np.bincount(plan.chunks.step, plan.chunks.end - plan.chunks.begin)
            assert tokens.max(initial=0) <= most


# The benchmark


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_round", ROOT / "benchmarks/round.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_runs_and_says_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script that lies there
    module = benchmark()
    module.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "round.json").read_text())
    assert {one["cluster"] for one in found["rounds"]} == set(module.CLUSTERS)
    for one in found["rounds"]:
        assert list(one["stages_us"])[:2] == ["build", "apply-decision"]
        assert {"fuse-steps", "legalize", "lower", "encode"} <= one["stages_us"].keys()
    decided = {(one["strategy"], one["cluster"]) for one in found["strategies"]}
    assert decided == set(itertools.product(strategies.known(), module.DECIDED[0]))
    assert all(one["round_us"] > one["decide_us"] > 0 for one in found["strategies"])
    assert {(one["form"], one["requests"]) for one in found["compiles"]} == {
        ("mlir", 100),
        ("sage", 100),
    }
    text = (tmp_path / "round.md").read_text()
    assert text in capsys.readouterr().out
    assert "| residents |" in text and "vLLM" in text
