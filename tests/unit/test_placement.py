"""Placement: greedy, local search and solver, against each other and against the best."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.parser import Parser

from sagec.dialects import pd
from sagec.passes import flow, solver
from sagec.passes.errors import PassError
from sagec.passes.select_device import SelectDevicePass
from sagec.passes.topology import topology_of
from sagec.runtime.cost import StepCost
from sagec.runtime.direct.placement import (
    MINOR,
    Assignment,
    Floats,
    Hop,
    Pair,
    Problem,
    Sites,
    greedy,
    improve,
    loads_of,
    measured,
    pairs_of,
    sites_of,
)
from sagec.universe import sagec_context

INF = np.inf
COST = StepCost(2e9, 0.0, 2e9, 1e5, 1e15, 1e12)
LIMIT_S = 20.0


def a_problem(
    chance: random.Random, rows: int, prefills: int, decodes: int, shared: bool = False
) -> Problem:
    """Random costs, loads, links and forbidden sites; every row can go somewhere."""
    instances = prefills if shared else prefills + decodes
    decode_at = list(range(instances - (prefills if shared else decodes), instances))
    sites = Sites(
        num_links=2,
        prefill_at=list(range(prefills)),
        decode_at=[*decode_at, instances],
        costs=(COST,),
        cost_of=np.zeros(instances, np.int64),
        capacity_tokens=np.full(instances, 1e5),
        hops=[
            [*(a_hop(chance, p, d, shared) for d in range(len(decode_at))), Hop()]
            for p in range(prefills)
        ],
    )
    size = (rows, len(decode_at))
    problem = Problem(
        sites=sites,
        prefill_us=a_table(chance, (rows, prefills)),
        decode_us=a_table(chance, size),
        kv_us=a_table(chance, size),
        moved_tokens=a_table(chance, (rows, 1))[:, 0],
        load_us=np.append(a_table(chance, (instances, 1))[:, 0], 0.0),
        kv_load_us=np.append(a_table(chance, (instances, 1))[:, 0], 0.0),
    )
    may_prefill = np.array([[chance.random() < 0.9 for _ in range(prefills)] for _ in range(rows)])
    may_decode = np.array([[chance.random() < 0.9 for _ in decode_at] for _ in range(rows)])
    decoded = np.array([chance.random() < 0.9 for _ in range(rows)], np.bool_)
    narrowed = problem.where(may_prefill.reshape(rows, prefills), may_decode.reshape(size), decoded)
    return problem if narrowed.stuck_row() is not None else narrowed


def a_hop(chance: random.Random, p: int, d: int, shared: bool) -> Hop | None:
    if shared and p == d:
        return Hop(same=True)
    if d and chance.random() < 0.15:
        return None
    links = ((chance.randrange(2), chance.choice([0.1, 1.0, 3.0])),)
    return Hop(chance.uniform(0, 20), links[0][1], links)


def a_table(chance: random.Random, shape: tuple[int, int]) -> Floats:
    values = [float(chance.randint(1, 100)) for _ in range(shape[0] * shape[1])]
    return np.array(values).reshape(shape)


@st.composite
def problems(draw: st.DrawFn, most_rows: int = 12) -> Problem:
    shared = draw(st.booleans())
    sites = draw(st.integers(1, 3))
    return a_problem(
        random.Random(draw(st.integers(0, 2**32))),
        rows=draw(st.integers(0, most_rows)),
        prefills=sites,
        decodes=sites if shared else draw(st.integers(1, 3)),
        shared=shared,
    )


def objective_us(problem: Problem, pairs: list[Pair]) -> tuple[float, float]:
    """The makespan and the objective, in the words of the definition."""
    sites = problem.sites
    time, kv = problem.load_us.copy(), problem.kv_load_us.copy()
    queue, link, moving = np.zeros(len(time)), np.zeros(sites.num_links), 0.0
    for row, (p, d) in enumerate(pairs):
        here, there, tokens = sites.prefill_at[p], sites.decode_at[d], problem.moved_tokens[row]
        time[here] += problem.prefill_us[row, p]
        queue[here] += problem.prefill_us[row, p]
        time[there] += problem.decode_us[row, d]
        kv[there] += problem.kv_us[row, d]
        hop = sites.hops[p][d]
        assert hop is not None
        if not hop.same:
            moving += hop.latency_us + tokens * hop.us_per_token
            for number, us in hop.links:
                link[number] += tokens * us
    peak = max(time.max(), kv.max(), link.max())
    return peak, peak + MINOR * (queue.max() + moving)


def all_placements(problem: Problem) -> Iterator[list[Pair]]:
    """Every way to place the rows."""
    width = problem.decode_us.shape[1]
    options = [
        [
            (p, d)
            for p, d in itertools.product(range(len(problem.sites.hops)), range(width))
            if problem.sites.hops[p][d] is not None
            and problem.prefill_us[row, p] < INF
            and problem.decode_us[row, d] < INF
        ]
        for row in range(len(problem))
    ]
    return map(list, itertools.product(*options))


def assert_right(problem: Problem, found: Assignment) -> None:
    """All rows are where they may be, and the figures are those of the definition."""
    assert len(found.prefill) == len(found.decode) == len(problem)
    rows = np.arange(len(problem))
    assert np.isfinite(problem.prefill_us[rows, found.prefill]).all()
    assert np.isfinite(problem.decode_us[rows, found.decode]).all()
    peak, objective = objective_us(problem, pairs_of(found))
    assert found.makespan_us == pytest.approx(peak)
    assert found.objective_us == pytest.approx(objective)


@given(problems())
@settings(max_examples=60)
def test_the_solver_is_no_worse_than_greedy_and_both_place_rows_where_they_may(
    problem: Problem,
) -> None:
    quick, best = greedy(problem), solver.solve(problem, LIMIT_S, gap=0.02)
    assert_right(problem, quick)
    assert_right(problem, best)
    assert best.objective_us <= quick.objective_us
    assert best.status == "time limit" or (best.gap is not None and best.gap <= 0.02 + 1e-6)


@given(problems(most_rows=4))
@settings(max_examples=40)
def test_the_solver_without_a_gap_finds_the_best_of_all_placements(problem: Problem) -> None:
    found = solver.solve(problem, LIMIT_S, gap=0.0)
    least = min(objective_us(problem, pairs)[1] for pairs in all_placements(problem))
    assert found.objective_us == pytest.approx(least, rel=1e-5)


@given(problems(most_rows=5))
@settings(max_examples=40)
def test_the_bound_of_size_classes_holds_for_the_rows(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "EXACT_CLASSES", 1)
        patch.setattr(solver, "SIZE_CLASSES", 4)
        found = solver.solve(problem, LIMIT_S, gap=0.0)
    assert_right(problem, found)
    assert found.gap is not None
    least = min(objective_us(problem, pairs)[1] for pairs in all_placements(problem))
    assert found.objective_us * (1 - found.gap) <= least * (1 + 1e-6)


@given(problems())
def test_local_search_never_makes_it_worse(problem: Problem) -> None:
    start = greedy(problem)
    found = improve(problem, start)
    assert_right(problem, found)
    assert found.objective_us <= start.objective_us


@given(problems(most_rows=6))
def test_greedy_gives_the_first_row_the_pair_that_raises_the_makespan_least(
    problem: Problem,
) -> None:
    if not len(problem):
        return
    p, d = pairs_of(greedy(problem))[0]
    assert problem.sites.hops[p][d] is not None
    first = [pairs[0] for pairs in all_placements(problem)]
    assert score_of_first_row(problem, (p, d)) <= min(
        score_of_first_row(problem, pair) for pair in first
    ) * (1 + 1e-9)


def score_of_first_row(problem: Problem, pair: Pair) -> float:
    """What `choose` documents, for a row that comes when nothing else is placed."""
    p, d = pair
    sites, hop = problem.sites, problem.sites.hops[p][d]
    assert hop is not None
    tokens = problem.moved_tokens[0]
    before = problem.load_us[sites.prefill_at[p]] + problem.prefill_us[0, p]
    there = sites.decode_at[d]
    after = max(
        problem.load_us[there] + problem.decode_us[0, d],
        problem.kv_load_us[there] + problem.kv_us[0, d],
    )
    moving = 0.0 if hop.same else hop.latency_us + tokens * hop.us_per_token
    links = [0.0] if hop.same else [tokens * us for _, us in hop.links]
    done = before + moving + problem.decode_us[0, d]
    peak = max(problem.load_us.max(), problem.kv_load_us.max())
    return max(peak, after, done, *links, 0.0) + MINOR * (before + moving + after)


@pytest.mark.parametrize("rows", [30, 400])
def test_the_same_problem_gets_the_same_answer(rows: int) -> None:
    def answers() -> list[list[Pair]]:
        problem = a_problem(random.Random(7), rows, prefills=2, decodes=3)
        return [pairs_of(greedy(problem)), pairs_of(solver.solve(problem, LIMIT_S, gap=0.05))]

    assert answers() == answers()


def test_ten_thousand_rows_are_solved_for_their_size_classes_and_the_gap_is_known() -> None:
    problem = a_problem(random.Random(3), 10_000, prefills=2, decodes=2)
    quick, best = greedy(problem), solver.solve(problem, LIMIT_S, gap=0.01)
    assert_right(problem, best)
    assert best.objective_us <= quick.objective_us
    assert best.status in ("within gap", "time limit", "size classes")
    assert best.gap is not None and 0.0 <= best.gap < 0.5


def test_without_time_the_improved_greedy_answer_is_given_and_says_so() -> None:
    problem = a_problem(random.Random(5), 60, prefills=3, decodes=3)
    found = solver.solve(problem, time_limit_s=1e-9, gap=0.0)
    assert_right(problem, found)
    assert found.status == "time limit"
    assert found.objective_us <= greedy(problem).objective_us


def test_a_solver_that_is_not_installed_is_named_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(PassError) as error:
        solver.solve(a_problem(random.Random(1), 3, 1, 1), LIMIT_S, 0.0)
    assert str(error.value) == (
        "method=solve needs highspy: pip install 'sagec[solver]', or say method=greedy"
    )


def test_where_there_are_too_many_pairs_the_nearest_and_the_used_are_kept() -> None:
    problem = a_problem(random.Random(11), 12, prefills=6, decodes=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver, "MAX_VARIABLES", 12 * 12)
        found = solver.solve(problem, LIMIT_S, gap=0.05)
    assert_right(problem, found)
    assert found.objective_us <= greedy(problem).objective_us


def test_a_row_without_a_pair_is_found() -> None:
    problem = a_problem(random.Random(2), 3, prefills=1, decodes=1)
    never = np.array([[True], [False], [True]])
    stuck = problem.where(np.ones((3, 1), np.bool_), never, np.ones(3, np.bool_))
    assert problem.stuck_row() is None
    assert stuck.stuck_row() == 1


def test_measured_counts_what_moves_only_between_instances() -> None:
    problem = a_problem(random.Random(4), 2, prefills=2, decodes=2, shared=True)
    pairs = [(0, 0), (1, 1)]
    assert measured(problem, pairs, "improved").makespan_us == pytest.approx(
        objective_us(problem, pairs)[0]
    )


# With a cluster


CLUSTER = """
cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688,
                  vocab = 1024}
cluster.switch @s
"""


def a_module(chance: random.Random, rows: int, residents: int) -> ModuleOp:
    """Two instances that prefill, two that decode, one that does both, and a graph."""
    text = [CLUSTER]
    for i, role in enumerate(("prefill", "prefill", "decode", "decode", "both")):
        text.append(
            f"cluster.device @g{i}\ncluster.link @g{i} to @s {{bytes_per_s = {i + 1}.0e9}}\n"
            f'cluster.instance @i{i} on [@g{i}] engine "sim" role {role} model @m '
            f"{{kv_blocks = {400 * (i + 1)}}}"
        )
    new = [f'"q{i}": prompt {chance.randint(1, 4000)} {said(chance)}' for i in range(rows)]
    old = [f'"r{i}": on @i{chance.randint(2, 4)} context 90 remaining 7' for i in range(residents)]
    text.append(f"""pd.graph @g {{
      %new = pd.requests [{", ".join(new)}]
      %old = pd.resident [{", ".join(old)}]
      %kv = pd.prefill %new
      %all = pd.join %old, %kv
      %end = pd.decode %all
      pd.yield %end
    }}""")
    return Parser(sagec_context(), "\n".join(text)).parse_module()


def said(chance: random.Random) -> str:
    generate = chance.choice(["", f"generate {chance.randint(1, 900)}"])
    return generate + chance.choice(["", "", " on @i1", " decode_on @i3", " on @i4 decode_on @i4"])


def place(module: ModuleOp, **options: object) -> ModuleOp:
    SelectDevicePass(**options).apply(Context(), module)  # type: ignore[arg-type]
    module.verify()
    return module


@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=40)
def test_the_pass_places_every_row_keeps_what_was_said_and_does_nothing_twice(
    seed: int, rows: int, residents: int
) -> None:
    module = place(a_module(random.Random(seed), rows, residents))
    prefill, decode = (
        op for op in flow.ops_in(next(flow.graphs(module))) if isinstance(op, PLACED)
    )
    before, asked = flow.table(decode.operands[0]), flow.table(prefill.operands[0])
    assert prefill.on is not None and decode.on is not None
    chosen = [*before.place.rows()[:residents], *prefill.on.rows()]
    assert set(chosen) <= {"i0", "i1", "i2", "i3", "i4"}
    for there, here in zip(asked.place.rows(), prefill.on.rows(), strict=True):
        assert there in ("", here)
    assert decode.on.rows()[:residents] == before.place.rows()[:residents]
    for there, here in zip(asked.decode_place.rows(), decode.on.rows()[residents:], strict=True):
        assert there in ("", here)
    text = str(module)
    assert str(place(module)) == text
    assert str(Parser(sagec_context(), text).parse_module()) == text


PLACED = pd.PrefillOp | pd.DecodeOp


@pytest.mark.parametrize("options", [{"method": "solve"}, {"improve": True}])
def test_the_other_methods_do_nothing_twice_either(options: dict[str, object]) -> None:
    module = place(a_module(random.Random(8), rows=9, residents=4), **options)
    assert str(place(module, **options)) == str(module)


def test_the_solver_leaves_a_note_on_the_graph_and_greedy_none() -> None:
    note = next(
        flow.graphs(place(a_module(random.Random(8), rows=9, residents=4), method="solve"))
    ).attributes["placement"]
    assert "gap" in str(note) and "greedy" in str(note)
    quick = place(a_module(random.Random(8), rows=9, residents=4))
    assert not next(flow.graphs(quick)).attributes


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(PassError, match="gap -1; the limit is above 0, the gap 0 or more"):
        place(a_module(random.Random(0), 1, 0), gap=-1)


def test_residents_load_the_instance_that_they_are_on() -> None:
    sites = sites_of(topology_of(a_module(random.Random(0), 1, 0)))
    at = np.array([2, 2, 4])
    time_us, kv_us = loads_of(sites, at, np.array([100, 200, 100]), np.array([10, 10, 10]))
    for loads in (time_us, kv_us):
        assert (loads[[0, 1, 3, 5]] == 0.0).all()
    assert time_us[2] > time_us[4] > 0.0
    alone, _ = loads_of(sites, at[:1], np.array([100]), np.array([10]))
    assert time_us[4] == pytest.approx(alone[2])
