"""apply-decision: what the strategy said becomes what the graph does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass

from sagec.dialects import kv, pd
from sagec.dialects.columns import (
    ColumnAttr,
    Ints,
    ListsAttr,
    NamesAttr,
    WordsAttr,
    quoted,
)
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.retype import erase_with_makers, replace_value

_UNDECIDED = "the strategy did not decide"


@dataclass(frozen=True)
class ApplyDecisionPass(ModulePass):
    """Replace a decided wave by its admitted rows in rank order; the others leave with a reason.

    `%go = pd.decide %new ["b": admit rank 0, "a": defer because "no KV"]`
    `-->  %go = pd.requests ["b": ...]   pd.leave ["a": defer because "no KV"]`

    Residents that are preempted become a pd.preempt. Refuses rows and ranks that do not exist and
    rows that are decided twice.
    """

    name = "apply-decision"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for graph in flow.graphs(op):
            decides = flow.ops_of(graph, pd.DecideOp)
            _check_decided_once(decides)
            for decide in decides:
                apply_decision(decide)


def _check_decided_once(decides: list[pd.DecideOp]) -> None:
    """Raise PassError where two ops decide on the same rows."""
    seen: set[Operation] = set()
    for decide in decides:
        source = _source(decide.decided, decide)
        if source in seen:
            raise PassError("rows are decided twice; one pd.decide a wave", decide)
        seen.add(source)


def apply_decision(decide: pd.DecideOp) -> None:
    """Put into effect what `decide` says, and take it out of the graph."""
    source = _source(decide.decided, decide)
    if _admits_all(decide, source):
        rest = decide.decided
        rest.name_hint = decide.verdicts.name_hint or rest.name_hint
    else:
        rows = flow.rows_named(flow.table(decide.decided), decide)
        apply = _preempted if isinstance(source, pd.ResidentOp) else _admitted
        rest = apply(decide, source, rows)
    replace_value(decide.verdicts, rest)
    erase_with_makers(decide)


_HINTS = {"prefill_on", "decode_on", "chunk"}


def _admits_all(decide: pd.DecideOp, source: pd.RequestsOp | pd.ResidentOp) -> bool:
    """Whether the wave is admitted just as it stands, which is how most rounds go."""
    said = decide.properties
    if type(source) is not pd.RequestsOp:
        return False
    if decide.names != source.names or not _HINTS.isdisjoint(said):
        return False
    verdicts, ranks = said["verdict"], said.get("rank")
    if not isinstance(verdicts, ColumnAttr) or np.count_nonzero(verdicts.array != pd.ADMIT):
        return False
    if not isinstance(ranks, ColumnAttr):
        return True
    return not np.count_nonzero(ranks.array != np.arange(len(ranks.array)))


def _source(value: SSAValue, decide: pd.DecideOp) -> pd.RequestsOp | pd.ResidentOp:
    """The op that brought the decided rows; between them at most their prefix matches."""
    op = value.owner
    while isinstance(op, kv.MatchOp):
        op = op.wave.owner
    if isinstance(op, pd.RequestsOp | pd.ResidentOp):
        return op
    if isinstance(op, pd.DecideOp):
        raise PassError("rows are decided twice; one pd.decide a wave", decide)
    name = op.name if isinstance(op, Operation) else "a block argument"
    raise PassError(f"pd.decide of what {name} gives; decide what pd.requests brings", decide)


# Waiting requests


def _admitted(decide: pd.DecideOp, source: pd.RequestsOp | pd.ResidentOp, rows: Ints) -> SSAValue:
    """The admitted rows in rank order; the rest is left behind in a pd.leave."""
    verdicts = decide.column("verdict")
    if (verdicts >= pd.PREEMPT).any():
        name = decide.names[int(np.flatnonzero(verdicts >= pd.PREEMPT)[0])]
        raise PassError(
            f"{quoted(name)} waits and holds no KV to preempt; admit, defer or reject it", decide
        )
    admitted = _in_rank_order(decide, np.flatnonzero(verdicts == pd.ADMIT))
    _leave_behind(decide, source, rows, admitted)
    columns = _with_hints(_gathered(source, rows[admitted]), decide, admitted)
    known = flow.table(decide.decided)
    cached, matches = known.cached[rows[admitted]], known.matches[rows[admitted]]
    if np.count_nonzero(cached):
        columns["cached"] = ColumnAttr.of(cached)
    chosen = pd.RequestsOp.of(columns)
    _insert_before(chosen, decide)
    chosen.wave.name_hint = decide.verdicts.name_hint
    if not np.count_nonzero(matches.tokens):
        return chosen.wave
    match = kv.MatchOp.over(chosen.wave, flow.match_columns(chosen.names, matches))
    _insert_before(match, decide)
    return match.matched


def _in_rank_order(decide: pd.DecideOp, admitted: Ints) -> Ints:
    """Rows of `decide` that are admitted, by rank; ranks left out are the order of the rows."""
    if "rank" not in decide.properties:
        return admitted
    ranks = decide.column("rank")[admitted]
    order = np.argsort(ranks, kind="stable")
    if (ranks[order] != np.arange(len(ranks))).any():
        raise _rank_error(decide, admitted, ranks)
    return admitted[order]


def _rank_error(decide: pd.DecideOp, admitted: Ints, ranks: Ints) -> PassError:
    """Says which row's rank does not exist, or else is another row's too."""
    wrong = np.flatnonzero((ranks < 0) | (ranks >= len(ranks)))
    why = "which does not exist"
    if not wrong.size:
        wrong = np.flatnonzero(np.bincount(ranks)[ranks] > 1)[1:]
        why = "which another row has too"
    name = quoted(decide.names[int(admitted[wrong[0]])])
    return PassError(
        f"{name} has rank {ranks[wrong[0]]}, {why}; the ranks of {len(ranks)} admitted rows are 0 "
        f"to {len(ranks) - 1}",
        decide,
    )


def _gathered(source: pd.TableOp, rows: Ints) -> dict[str, Attribute]:
    """The columns of `source`, in these rows."""
    columns: dict[str, Attribute] = {}
    same = len(rows) == len(source.names) and bool((rows == np.arange(len(rows))).all())
    for name, attr in source.properties.items():
        assert isinstance(attr, ColumnAttr | NamesAttr | WordsAttr | ListsAttr)
        columns[name] = attr if same else attr.take(rows)
    return columns


def _with_hints(
    columns: dict[str, Attribute], decide: pd.DecideOp, rows: Ints
) -> dict[str, Attribute]:
    """The columns with the instances and chunk bounds that the strategy asks for."""
    for hint, column in (("prefill_on", "on"), ("decode_on", "decode_on")):
        if isinstance(said := decide.properties.get(hint), WordsAttr):
            said, now = said.take(rows), columns.get(column)
            asked = np.array([bool(word) for word in said.words])[said.codes]
            before = now if isinstance(now, WordsAttr) else WordsAttr.same("", len(rows))
            columns[column] = flow.placed(before, np.flatnonzero(asked), said.take(asked))
    if "chunk" in decide.properties:
        said_chunk = decide.column("chunk")[rows]
        had = columns.get("chunk")
        before_chunk = had.array if isinstance(had, ColumnAttr) else 0
        columns["chunk"] = ColumnAttr.of(np.where(said_chunk > 0, said_chunk, before_chunk))
    return columns


def _leave_behind(decide: pd.DecideOp, source: pd.TableOp, rows: Ints, admitted: Ints) -> None:
    """Write down who is not admitted, in the order of the wave, and why."""
    if len(admitted) == len(source.names):
        return
    verdict = np.full(len(source.names), pd.DEFER)
    verdict[rows] = decide.column("verdict")
    reasons = [_UNDECIDED] * len(source.names)
    for row, reason in zip(rows.tolist(), decide.words("because"), strict=True):
        reasons[row] = reason
    gone = np.flatnonzero(verdict != pd.ADMIT)
    _insert_before(_leave(source.names, gone, verdict, reasons), decide)


def _leave(names: tuple[str, ...], gone: Ints, verdict: Ints, reasons: list[str]) -> pd.LeaveOp:
    columns: dict[str, Attribute] = {
        "ids": NamesAttr.of([names[row] for row in gone.tolist()]),
        "verdict": ColumnAttr.of(verdict[gone]),
        "because": WordsAttr.from_rows([reasons[row] for row in gone.tolist()]),
    }
    return pd.LeaveOp.create(properties=columns)


def _insert_before(new: Operation, op: Operation) -> None:
    assert op.parent is not None
    new.location = op.location
    op.parent.insert_op_before(new, op)


# Residents


def _preempted(decide: pd.DecideOp, _: pd.RequestsOp | pd.ResidentOp, rows: Ints) -> SSAValue:
    """The residents that go on; the preempted leave their instance."""
    verdicts = decide.column("verdict")
    if not np.isin(verdicts, (pd.ADMIT, pd.PREEMPT, pd.SWAP)).all():
        name = decide.names[int(np.flatnonzero(np.isin(verdicts, (pd.DEFER, pd.REJECT)))[0])]
        raise PassError(
            f"{quoted(name)} decodes already; what it can be is admit, preempt or swap", decide
        )
    out = np.flatnonzero(verdicts >= pd.PREEMPT)
    if not out.size:
        return decide.decided
    columns: dict[str, Attribute] = {
        "ids": NamesAttr.of([decide.names[row] for row in out.tolist()]),
        "verdict": ColumnAttr.of(verdicts[out]),
        "on": flow.table(decide.decided).place.take(rows[out]),
    }
    if isinstance(because := decide.properties.get("because"), WordsAttr):
        columns["because"] = because.take(out)
    preempt = pd.PreemptOp.over(decide.decided, columns)
    _insert_before(preempt, decide)
    preempt.rest.name_hint = decide.verdicts.name_hint
    return preempt.rest
