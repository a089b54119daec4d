"""Placement by a mixed-integer solver, HiGHS, with limits and a bound on what was missed.

Rows of the same size are one class, counted by integers. Up to EXACT_CLASSES classes the model is
exact; beyond that, rows of similar size share a class of mean size, and the counts are dealt to the
rows. The bound holds for the rows themselves in either case.
"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from sagec.dialects.columns import Ints
from sagec.passes.errors import PassError
from sagec.runtime.direct.placement import (
    MINOR,
    Assignment,
    Floats,
    Hop,
    Pair,
    Problem,
    greedy,
    improve,
    measured,
    pairs_of,
)

EXACT_CLASSES = 200
SIZE_CLASSES = 64
MAX_VARIABLES = 50_000
"""Integers of a model; where there would be more, the farther pairs of sites are left out."""


def solve(problem: Problem, time_limit_s: float, gap: float) -> Assignment:
    """The best placement that HiGHS finds within `time_limit_s`, or that is within `gap` of it.

    Never worse than `greedy`, whose improved answer it starts from and gives where the time was
    too short. One thread and a fixed seed: the same input gives the same answer unless the time
    limit cuts it. Raises PassError where highspy is not installed.
    """
    highspy = _highspy()
    end_s = time.monotonic() + time_limit_s
    best = improve(problem, greedy(problem))
    if not len(problem):
        return replace(best, gap=0.0, status="within gap")
    classes = _classes(problem)
    model = _Model(problem, classes, best)
    relaxed = None if classes.exact else _run(highspy, model, end_s, gap, relaxed=True)
    run = _run(highspy, model, end_s, gap)
    bound = run.bound_us if relaxed is None else _bound(problem, model, relaxed)
    if run.values is not None:
        found = measured(problem, _dealt(problem, classes, model, run.values), "improved")
        found = improve(problem, found)
        best = min(best, found, key=lambda assignment: assignment.objective_us)
    missed = max(0.0, 1.0 - bound / best.objective_us) if best.objective_us else 0.0
    status = "within gap" if missed <= gap + 1e-6 else "size classes"
    return replace(
        best, gap=missed, status="time limit" if run.timed_out and missed > gap else status
    )


def _highspy() -> ModuleType:
    try:
        import highspy
    except ImportError:
        raise PassError(
            "method=solve needs highspy: pip install 'sagec[solver]', or say method=greedy"
        ) from None
    found: ModuleType = highspy
    return found


# Classes of rows


@dataclass(frozen=True)
class _Classes:
    """of: the class of each row. first: how many rows each has. exact: all of one size."""

    of: Ints
    rows: Ints
    exact: bool


def _classes(problem: Problem) -> _Classes:
    sizes = np.column_stack(
        [problem.prefill_us, problem.decode_us, problem.kv_us, problem.moved_tokens]
    )
    of = _numbered(sizes)
    if exact := int(of.max()) < EXACT_CLASSES:
        return _Classes(of, np.bincount(of), exact)
    allowed = _numbered(np.isfinite(sizes).astype(np.float64))
    kinds = int(allowed.max()) + 1
    side = max(1, int((SIZE_CLASSES / kinds) ** 0.5))
    prefill = _fractions(_size(problem.prefill_us), side)
    decode = _fractions(_size(problem.decode_us), side)
    of = _numbered(np.column_stack([allowed, prefill, decode]).astype(np.float64))
    return _Classes(of, np.bincount(of), exact)


def _numbered(rows: Floats) -> Ints:
    """A number for each different row, from 0."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _size(us: Floats) -> Floats:
    """Of each row, its least cost; 0 where it may be nowhere."""
    least = us.min(axis=1, initial=np.inf)
    return np.where(np.isfinite(least), least, 0.0)


def _fractions(size: Floats, parts: int) -> Ints:
    """Of each row, which part of the sorted sizes it is in; parts of the same number of rows."""
    edges = np.quantile(size, np.linspace(0, 1, parts + 1)[1:-1])
    return np.searchsorted(edges, size).astype(np.int64)


def _dealt(problem: Problem, classes: _Classes, model: _Model, values: Ints) -> list[Pair]:
    """Rows of a class go to its pairs in turn, the large ones first, as often as counted."""
    size = _size(problem.prefill_us) + _size(problem.decode_us)
    by_class = np.lexsort((-size, classes.of))
    used = np.flatnonzero(values)
    turns = [
        (int(model.class_of[v]), (turn + 0.5) / values[v], int(model.pair_of[v]))
        for v in used.tolist()
        for turn in range(int(values[v]))
    ]
    pairs: list[Pair] = [(0, 0)] * len(problem)
    for row, (_, _, pair) in zip(by_class.tolist(), sorted(turns), strict=True):
        pairs[row] = model.pairs[pair]
    return pairs


# The model


class _Model:
    """Minimise T + MINOR * (Q + transfers), in units of the start's makespan.

    Columns: T, Q, and for each class and pair of sites that it may use, how many rows go there.
    Rows: a class each (all are placed), then time, KV and link loads below T, then prefill queues
    below Q. class_of, pair_of: of each variable. start: their values in the start.
    """

    def __init__(self, problem: Problem, classes: _Classes, start: Assignment) -> None:
        self.problem, self.classes = problem, classes
        self.unit_us = start.makespan_us or 1.0
        self.prefill_us = self._mean(problem.prefill_us)
        self.decode_us = self._mean(problem.decode_us)
        self.kv_us = self._mean(problem.kv_us)
        self.tokens = self._mean(problem.moved_tokens[:, None])[:, 0]
        used = set(pairs_of(start))
        self.pairs = _near_pairs(problem, MAX_VARIABLES // len(classes.rows), used)
        p, d = np.array(self.pairs, np.int64).T
        allowed = np.isfinite(self.prefill_us[:, p]) & np.isfinite(self.decode_us[:, d])
        self.class_of, self.pair_of = np.nonzero(allowed)
        self.prefill_of, self.decode_of = p[self.pair_of], d[self.pair_of]
        self.start = self._counts(start)
        self._number_rows()

    def _mean(self, columns: Floats) -> Floats:
        """Of each class, the mean of its rows; infinite stays so."""
        total = np.zeros((len(self.classes.rows), columns.shape[1]))
        np.add.at(total, self.classes.of, columns)
        return total / self.classes.rows[:, None]

    def _counts(self, assignment: Assignment) -> Floats:
        number = {pair: i for i, pair in enumerate(self.pairs)}
        pair = np.array([number[pair] for pair in pairs_of(assignment)], np.int64)
        at = np.bincount(
            self.classes.of * len(self.pairs) + pair,
            minlength=len(self.classes.rows) * len(self.pairs),
        )
        counts: Floats = at[self.class_of * len(self.pairs) + self.pair_of].astype(np.float64)
        return counts

    def _number_rows(self) -> None:
        sites, num_classes = self.problem.sites, len(self.classes.rows)
        width = sites.num_instances + 1
        begins = np.cumsum([0, num_classes, width, width, sites.num_links, width]).tolist()
        _, self.time_row, self.kv_row, self.link_row, self.queue_row, self.num_rows = begins
        self.num_columns = 2 + len(self.class_of)

    @property
    def cost(self) -> Floats:
        """Of each column."""
        hops = [self.problem.sites.hops[p][d] or Hop() for p, d in self.pairs]
        latency_us = np.array([hop.latency_us for hop in hops])[self.pair_of]
        us_per_token = np.array([hop.us_per_token for hop in hops])[self.pair_of]
        transfers = latency_us + us_per_token * self.tokens[self.class_of]
        return np.concatenate([[1.0, MINOR], MINOR * transfers / self.unit_us])

    @property
    def upper(self) -> Floats:
        """Bounds of the rows; those of the classes are equations, the others have no lower."""
        problem = self.problem
        zeros = np.zeros(problem.sites.num_links + problem.sites.num_instances + 1)
        loads = np.concatenate([problem.load_us, problem.kv_load_us, zeros]) / self.unit_us
        return np.concatenate([self.classes.rows, -loads])

    @functools.cached_property
    def matrix(self) -> tuple[Ints, Ints, Floats]:
        """The coefficients by column: where each begins, row indices, values."""
        entries = [*self._site_entries(), *self._link_entries()]
        variables = np.concatenate([variable for variable, _, _ in entries])
        rows = np.concatenate([row for _, row, _ in entries])
        values = np.concatenate([value for _, _, value in entries]) / self.unit_us
        ones = np.arange(len(self.class_of))
        below_t = np.arange(self.time_row, self.queue_row)
        below_q = np.arange(self.queue_row, self.num_rows)
        columns = np.concatenate(
            [0 * below_t, 0 * below_q + 1, ones + 2, variables + 2],
        )
        rows = np.concatenate([below_t, below_q, self.class_of, rows])
        minus = np.full(len(below_t) + len(below_q), -1.0)
        values = np.concatenate([minus, np.ones(len(ones)), values])
        return _compressed(columns, rows, values, self.num_columns, self.num_rows)

    def _site_entries(self) -> list[tuple[Ints, Ints, Floats]]:
        """(variable, row, microseconds) of instances' time, KV and prefill queues."""
        here = np.array(self.problem.sites.prefill_at, np.int64)[self.prefill_of]
        there = np.array(self.problem.decode_at, np.int64)[self.decode_of]
        variables = np.arange(len(self.class_of))
        prefill = self.prefill_us[self.class_of, self.prefill_of]
        decode = self.decode_us[self.class_of, self.decode_of]
        stay = self.kv_us[self.class_of, self.decode_of]
        return [
            (variables, self.time_row + here, prefill),
            (variables, self.time_row + there, decode),
            (variables, self.kv_row + there, stay),
            (variables, self.queue_row + here, prefill),
        ]

    def _link_entries(self) -> list[tuple[Ints, Ints, Floats]]:
        """(variable, row, microseconds) of links."""
        entries = []
        for pair, (p, d) in enumerate(self.pairs):
            hop = self.problem.sites.hops[p][d]
            if hop is None or not hop.links:
                continue
            variables = np.flatnonzero(self.pair_of == pair)
            tokens = self.tokens[self.class_of[variables]]
            for link, us_per_token in hop.links:
                row = np.full(len(variables), self.link_row + link)
                entries.append((variables, row, tokens * us_per_token))
        return entries


def _near_pairs(problem: Problem, most: int, used: set[Pair]) -> list[Pair]:
    """Pairs with a hop, `used` among them; where they are more than `most`, the nearest of each."""
    width = problem.decode_us.shape[1]
    hops = [row[:width] for row in problem.sites.hops]
    us = np.array([[np.inf if h is None else h.us_per_token for h in row] for row in hops])
    keep = np.isfinite(us)
    if keep.sum() > most:
        each = max(1, most // (2 * max(us.shape)))
        turned = (np.arange(us.shape[1]) - np.arange(us.shape[0])[:, None]) % max(us.shape)
        rank = np.lexsort((turned, us), axis=1).argsort(axis=1)
        rank_back = np.lexsort((turned, us), axis=0).argsort(axis=0)
        keep &= (rank < each) | (rank_back < each)
    found = {(int(p), int(d)) for p, d in zip(*np.nonzero(keep), strict=True)}
    return sorted(found | used)


def _compressed(
    columns: Ints, rows: Ints, values: Floats, num_columns: int, num_rows: int
) -> tuple[Ints, Ints, Floats]:
    """Coordinates as compressed columns; those that meet are added up, zeros left out."""
    keys, place = np.unique(columns * num_rows + rows, return_inverse=True)
    summed = np.bincount(place.reshape(-1), weights=values, minlength=len(keys))
    keys, summed = keys[summed != 0.0], summed[summed != 0.0]
    begins = np.searchsorted(keys, np.arange(num_columns + 1) * num_rows)
    return begins, keys % num_rows, summed


# Running it


@dataclass(frozen=True)
class _Run:
    """values: rows of each class and pair, None where there is no answer. duals: of the rows."""

    values: Ints | None
    duals: Floats
    bound_us: float
    timed_out: bool


def _run(
    highspy: ModuleType, model: _Model, end_s: float, gap: float, relaxed: bool = False
) -> _Run:
    """Run HiGHS on the model, or on its relaxation to fractions, until `end_s` of the clock."""
    solver = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": 1,
        "time_limit": max(0.0, end_s - time.monotonic()),
        "mip_rel_gap": float(gap),
    }.items():
        solver.setOptionValue(name, value)
    solver.passModel(_program(highspy, model, relaxed))
    if not relaxed:
        start = highspy.HighsSolution()
        start.col_value = _start(model)
        solver.setSolution(start)
    solver.run()
    found, report = solver.getSolution(), solver.getInfo()
    solved = report.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.rint(np.array(found.col_value)[2:]).astype(np.int64) if solved else None
    return _Run(
        values=values,
        duals=np.array(found.row_dual) if relaxed else np.zeros(0),
        bound_us=0.0 if relaxed else max(0.0, report.mip_dual_bound) * model.unit_us,
        timed_out=solver.getModelStatus() == highspy.HighsModelStatus.kTimeLimit,
    )


def _program(highspy: ModuleType, model: _Model, relaxed: bool) -> object:
    """The model as HiGHS takes it."""
    program = highspy.HighsLp()
    infinite = highspy.kHighsInf
    counts = model.classes.rows[model.class_of].astype(np.float64)
    lower = np.full(model.num_rows, -infinite)
    lower[: len(model.classes.rows)] = model.classes.rows
    program.num_col_, program.num_row_ = model.num_columns, model.num_rows
    program.col_cost_ = model.cost
    program.col_lower_ = np.zeros(model.num_columns)
    program.col_upper_ = np.concatenate([[infinite, infinite], counts])
    program.row_lower_, program.row_upper_ = lower, model.upper
    begins, rows, values = model.matrix
    program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    program.a_matrix_.start_ = begins
    program.a_matrix_.index_ = rows
    program.a_matrix_.value_ = values
    if not relaxed:
        kinds = [highspy.HighsVarType.kContinuous] * 2
        program.integrality_ = kinds + [highspy.HighsVarType.kInteger] * len(counts)
    return program


def _start(model: _Model) -> Floats:
    """The start's values: its counts, with the T and Q that they need."""
    begins, rows, values = model.matrix
    columns = np.concatenate([[0.0, 0.0], model.start])
    weights = values * np.repeat(columns, np.diff(begins))
    loads = np.bincount(rows, weights=weights, minlength=model.num_rows) - model.upper
    columns[0] = max(0.0, loads[model.time_row : model.queue_row].max())
    columns[1] = max(0.0, loads[model.queue_row :].max())
    return columns


def _bound(problem: Problem, model: _Model, relaxed: _Run) -> float:
    """A bound below every placement of the rows, from the prices of the classes' relaxation.

    Any prices that sum to 1 over T's rows, and to MINOR over Q's, bound the objective: each row
    takes the pair that is cheapest at these prices.
    """
    if not len(relaxed.duals):
        return 0.0
    prices = np.maximum(0.0, -relaxed.duals)
    time, kv, link, queue = (
        prices[begin:end]
        for begin, end in itertools.pairwise(
            [model.time_row, model.kv_row, model.link_row, model.queue_row, model.num_rows]
        )
    )
    scale = max(1.0, time.sum() + kv.sum() + link.sum())
    time, kv, link = time / scale, kv / scale, link / scale
    queue = queue * min(1.0, MINOR / queue.sum()) if queue.sum() else queue
    fixed = float(time @ problem.load_us + kv @ problem.kv_load_us)
    return fixed + float(_cheapest(problem, time, kv, link, queue).sum())


def _cheapest(problem: Problem, time: Floats, kv: Floats, link: Floats, queue: Floats) -> Floats:
    """Of each row, the least price of a pair."""
    here, there = np.array(problem.sites.prefill_at), np.array(problem.decode_at)
    width = len(there)
    decode = problem.decode_us * np.where(np.isfinite(problem.decode_us), time[there], 1.0)
    decode = decode + problem.kv_us * kv[there]
    least = np.full(len(problem), np.inf)
    for p, hops in enumerate(problem.sites.hops):
        fixed = np.array([np.inf if h is None else MINOR * h.latency_us for h in hops[:width]])
        token = np.array([_token_price(hop, link) for hop in hops[:width]])
        after = (decode + fixed + problem.moved_tokens[:, None] * token).min(axis=1)
        us, price = problem.prefill_us[:, p], time[here[p]] + queue[here[p]]
        allowed = np.isfinite(us)
        least = np.minimum(least, np.where(allowed, np.where(allowed, us, 0.0) * price, us) + after)
    return least


def _token_price(hop: Hop | None, link: Floats) -> float:
    """Price of moving a token."""
    if hop is None:
        return 0.0
    return MINOR * hop.us_per_token + sum(float(link[number]) * us for number, us in hop.links)
