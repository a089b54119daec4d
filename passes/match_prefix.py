"""match-prefix: what the instance of a request has of its prompt already is not computed again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation
from xdsl.passes import ModulePass

from sagec.dialects import kv, pd
from sagec.dialects.columns import ColumnAttr, Ints, quoted
from sagec.passes import flow
from sagec.passes.errors import PassError
from sagec.passes.retype import erase_with_makers


@dataclass(frozen=True)
class MatchPrefixPass(ModulePass):
    """Resolve matches, now that every request has a place: prefill [0, n) becomes reuse k and
    prefill [k, n).

    `%h = kv.match %w ["a": tokens 64 on @p0, "a": tokens 32 on @p1]; pd.prefill %h on @p1  -->
     %w = pd.requests ["a": prompt 100 cached 32]; pd.prefill %w on @p1`

    What other instances have of a request is of no use to it, and left out.
    """

    name = "match-prefix"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for graph in flow.graphs(op):
            for prefill in flow.ops_in(graph):
                if type(prefill) is pd.PrefillOp and type(prefill.wave.owner) is kv.MatchOp:
                    resolve(prefill)


def resolve(prefill: pd.PrefillOp) -> None:
    """Write what matches say of the rows of `prefill` into the op that brings them.

    Raises PassError for matched rows that have no place, or are still to be decided on.
    """
    match = prefill.wave.owner
    assert isinstance(match, kv.MatchOp)
    rows = flow.table(prefill.wave)
    columns: dict[str, Attribute] = dict(_source(match).properties)
    columns.pop("cached", None)
    cached = _cached(prefill, rows)
    if np.count_nonzero(cached):
        columns["cached"] = ColumnAttr.of(cached)
    requests = pd.RequestsOp.of(columns)
    requests.location = match.location
    requests.wave.name_hint = match.matched.name_hint or match.wave.name_hint
    assert match.parent is not None
    match.parent.insert_op_before(requests, match)
    prefill.operands[0] = requests.wave
    if match.matched.first_use is None:
        erase_with_makers(match)


def _source(match: kv.MatchOp) -> pd.RequestsOp:
    """The op that brings the matched rows."""
    op: object = match
    while isinstance(op, kv.MatchOp):
        op = op.wave.owner
    if isinstance(op, pd.RequestsOp):
        return op
    name = op.name if isinstance(op, Operation) else "a block argument"
    raise PassError(f"kv.match of what {name} gives; run apply-decision first", match)


def _cached(prefill: pd.PrefillOp, rows: flow.Table) -> Ints:
    """Of each row, the leading tokens that the instance has where it is prefilled."""
    on, cached = prefill.on, rows.cached
    matched = rows.matches.tokens.any(axis=1)
    if not matched.any():
        return cached
    if on is not None:
        for word in rows.matches.on:
            here = on.codes == (on.words.index(word) if word in on.words else len(on.words))
            cached = np.where(here, np.maximum(cached, rows.matches.of(word)), cached)
        matched &= np.array([word == flow.NOWHERE for word in on.words], np.bool_)[on.codes]
    if matched.any():
        name = quoted(rows.names[int(matched.argmax())])
        raise PassError(
            f"{name} is matched and has no place; run select-device first, or say `on`", prefill
        )
    return cached
