"""Where the rows of a round compute and decode: by what was said, else by `placement`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sagec.runtime.direct import placement
from sagec.runtime.direct.cluster import Cluster
from sagec.runtime.direct.columns import Bools, Ints, Words, same, zeros
from sagec.runtime.direct.placement import Problem, Sites
from sagec.runtime.direct.topology import Model
from sagec.runtime.direct.waves import Asked, NotCovered, Residents, Wave
from sagec.runtime.direct.work import UNBOUNDED_STEPS
from sagec.runtime.state import ANY, UNBOUNDED


@dataclass(frozen=True, eq=False)
class Fresh:
    """The rows of all waves, one behind the other; columns as in `Wave`, all rows placed."""

    names: tuple[str, ...]
    prompt: Ints
    computed: Ints
    cached: Ints
    generate: Ints
    deadline: Ints
    on: Ints
    decode_on: Ints

    def __len__(self) -> int:
        return len(self.names)


def place(asked: Asked, cluster: Cluster) -> Fresh | None:
    """The rows of the waves, each in its places; None where there are no waves.

    Raises NotCovered where rows have a choice that needs more than `greedy`, or none.
    """
    waves = [wave for wave in asked.waves if len(wave)] or asked.waves[:1]
    if not waves:
        return None
    on, decode_on = (_joined([getattr(w, name) for w in waves]) for name in ("on", "decode_on"))
    prompt, generate = (
        _joined([getattr(w, name) for w in waves]) for name in ("prompt", "generate")
    )
    need = prompt + np.where(generate >= UNBOUNDED, 0, generate)
    if len(prompt):
        returning = _returning(waves, on, prompt, cluster)
        _check_decodes(decode_on, cluster)
        models = _models(waves, cluster)
        if not returning and (pair := cluster.only_pair) is not None:
            on, decode_on = same(pair[0], len(prompt)), same(pair[1], len(prompt))
        if not _all_forced(on, decode_on, models, prompt, need, cluster):
            rows = _Rows(waves, on, decode_on, prompt, generate, need, models, returning)
            on, decode_on = _chosen(rows, asked, cluster)
    return Fresh(
        names=waves[0].names if len(waves) == 1 else waves[0].names + waves[1].names,
        prompt=prompt,
        computed=_joined([wave.computed for wave in waves]),
        cached=_cached(waves, on),
        generate=generate,
        deadline=_joined([wave.deadline for wave in waves]),
        on=on,
        decode_on=decode_on,
    )


def _joined(columns: list[Ints]) -> Ints:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _cached(waves: list[Wave], on: Ints) -> Ints:
    """Tokens to reuse of each row, where it is computed."""
    columns, begin = [], 0
    for wave in waves:
        cached = wave.cached
        if wave.matches is not None:
            here = wave.matches[np.arange(len(wave)), on[begin : begin + len(wave)]]
            cached = np.maximum(cached, here)
        columns.append(cached)
        begin += len(wave)
    return _joined(columns)


def _returning(waves: list[Wave], on: Ints, prompt: Ints, cluster: Cluster) -> dict[int, Bools]:
    """Instances that do not prefill, and which rows go on there all the same; as `select-device`
    finds them. Raises NotCovered where other rows are said to be there."""
    if all(cluster.prefills):
        return {}
    matches = _all_matches(waves, len(cluster.names))
    asked = np.zeros(len(cluster.names) + 1, np.bool_)
    asked[np.minimum(on, len(cluster.names))] = True
    if matches is not None:
        asked[:-1] |= matches.any(axis=0)
    found: dict[int, Bools] = {}
    cached, computed = _joined([w.cached for w in waves]), _joined([w.computed for w in waves])
    for at in asked[:-1].nonzero()[0].tolist():
        if cluster.prefills[at]:
            continue
        said = on == at
        there = np.where(said, cached, 0)
        if matches is not None:
            there = np.maximum(there, matches[:, at])
        whole = (there > 0) & (there == prompt - computed - 1)
        whole |= said & (computed > 0)
        if np.count_nonzero(said & ~whole):
            raise NotCovered("a row that is to prefill where only decodes are computed")
        if np.count_nonzero(whole):
            found[at] = whole
    return found


def _all_matches(waves: list[Wave], instances: int) -> Ints | None:
    """[rows, instances]: leading tokens that each instance has; None where none has any."""
    if all(wave.matches is None for wave in waves):
        return None
    return np.concatenate(
        [
            np.zeros((len(wave), instances), np.int64) if wave.matches is None else wave.matches
            for wave in waves
        ]
    )


def _check_decodes(decode_on: Ints, cluster: Cluster) -> None:
    """Raise NotCovered where rows are to decode where only prompts are computed."""
    if all(cluster.decodes):
        return
    allowed = np.array([*cluster.decodes, True])
    if not allowed[np.minimum(decode_on, len(allowed) - 1)].all():
        raise NotCovered("a row that is to decode where only prompts are computed")


def _models(waves: list[Wave], cluster: Cluster) -> list[Model] | None:
    """The model of each row; None where there is only one. Raises NotCovered for unknown ones."""
    there = cluster.running_models
    found: list[Model] = []
    for wave in waves:
        words = wave.model.words
        if cluster.only_model:
            if any(word not in there for word in words if word):
                raise NotCovered("a model that nothing runs")
            continue
        only = next(iter(there.values())) if len(there) == 1 else None
        codes = wave.model.codes.tolist() or [0] * len(wave)
        models = [there.get(word, None if word else only) for word in words]
        for code in codes:
            if (model := models[code]) is None:
                raise NotCovered("a model that nothing runs, or none named")
            found.append(model)
    return None if cluster.only_model else found


def _all_forced(
    on: Ints,
    decode_on: Ints,
    models: list[Model] | None,
    prompt: Ints,
    need: Ints,
    cluster: Cluster,
) -> bool:
    """Whether every row may be in one place only, by what was said, and surely fits there."""
    if np.count_nonzero(on == ANY) or np.count_nonzero(decode_on == ANY):
        return False
    capacity = cluster.capacity_tokens
    if np.count_nonzero(prompt > capacity[on]) or np.count_nonzero(need > capacity[decode_on]):
        return False
    if np.count_nonzero(on != decode_on):
        pairs = set(zip(on.tolist(), decode_on.tolist(), strict=True))
        if not all(here == there or cluster.hands_over(here, there) for here, there in pairs):
            return False
    if models is None:
        return True
    instances = cluster.instances
    ends = zip(on.tolist(), decode_on.tolist(), models, strict=True)
    return all(instances[a].model is m and instances[b].model is m for a, b, m in ends)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows to place. need: tokens of KV with all output. returning: as `_returning` says."""

    waves: list[Wave]
    on: Ints
    decode_on: Ints
    prompt: Ints
    generate: Ints
    need: Ints
    models: list[Model] | None
    returning: dict[int, Bools]


def _chosen(rows: _Rows, asked: Asked, cluster: Cluster) -> tuple[Ints, Ints]:
    """Places of all rows, as `select-device` chooses them."""
    sites = placement.sites_of(cluster.topology, returning=tuple(sorted(rows.returning)))
    whole = _problem(rows, asked.residents, sites, cluster)
    problem = None
    if paused := [at for at, steps in asked.turns.items() if not steps]:
        problem = _where(whole, rows, cluster, frozenset(paused))
    if problem is None or problem.stuck_row() is not None:
        problem = _where(whole, rows, cluster, frozenset())
    if problem.stuck_row() is not None:
        raise NotCovered("a row without a pair of instances")
    found = placement.greedy(problem)
    here = np.array(sites.prefill_at, np.int64)[found.prefill]
    return here, np.array(sites.decode_at, np.int64)[found.decode]


def _problem(rows: _Rows, residents: Residents | None, sites: Sites, cluster: Cluster) -> Problem:
    """The rows and what each costs, as if they may be anywhere."""
    begin = _joined([wave.computed + wave.cached for wave in rows.waves])
    if (matches := _all_matches(rows.waves, len(cluster.names))) is not None:
        computed = _joined([wave.computed for wave in rows.waves])
        begin = np.maximum(begin, computed + matches[:, sites.prefill_at].T)
    decodes = rows.generate - 1
    decodes = np.where(rows.generate >= UNBOUNDED, np.minimum(decodes, UNBOUNDED_STEPS), decodes)
    loads = _loads(residents, sites)
    return placement.problem_of(sites, begin, rows.prompt, decodes, *loads)


def _loads(residents: Residents | None, sites: Sites) -> tuple[placement.Floats, placement.Floats]:
    """What the instances have to do for residents."""
    if residents is None:
        nothing = np.zeros(sites.num_instances + 1)
        return nothing, nothing
    remaining = residents.remaining
    decodes = np.where(remaining >= UNBOUNDED, np.minimum(remaining, UNBOUNDED_STEPS), remaining)
    return placement.loads_of(sites, residents.at, residents.context, decodes)


def _where(problem: Problem, rows: _Rows, cluster: Cluster, avoid: frozenset[int]) -> Problem:
    """The problem with rows only where they may be, and not where to avoid if there is else."""
    sites = problem.sites
    may_prefill = _may(rows, cluster, sites.prefill_at, rows.on, rows.prompt)
    for at, whole in rows.returning.items():
        may_prefill[:, sites.prefill_at.index(at)] &= whole
    may_decode = _may(rows, cluster, sites.decode_at[:-1], rows.decode_on, rows.need)
    if avoid:
        may_prefill = _elsewhere(may_prefill, sites.prefill_at, avoid)
        may_decode = _elsewhere(may_decode, sites.decode_at[:-1], avoid)
    return problem.where(may_prefill, may_decode, np.ones(len(rows.prompt), np.bool_))


def _may(rows: _Rows, cluster: Cluster, at: list[int], said: Ints, tokens: Ints) -> Bools:
    """[rows, sites]: by model, by what was said, and by room for the row alone."""
    may = tokens[:, None] <= cluster.capacity_tokens[at]
    if rows.models is not None:
        instances = [cluster.instances[index] for index in at]
        may &= np.array([[one.model is model for one in instances] for model in rows.models])
    may &= (said[:, None] == ANY) | (said[:, None] == np.array(at, np.int64))
    return may


def _elsewhere(may: Bools, at: list[int], avoid: frozenset[int]) -> Bools:
    """[rows, sites]: without the sites to avoid, for each row that has others."""
    others = may & np.array([index not in avoid for index in at], np.bool_)  # also of no sites
    return np.where(others.any(axis=1, keepdims=True), others, may)


def words_of(at: Ints, names: tuple[str, ...]) -> Words:
    """Names of numbered instances, in the order of their numbers; none that no row has."""
    used = np.bincount(at, minlength=len(names)) > 0
    words = tuple([names[number] for number in used.nonzero()[0].tolist()])
    if len(words) == 1:
        return Words(words, zeros(len(at)))
    return Words(words, (used.cumsum() - 1)[at])
