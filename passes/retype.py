"""Keep a graph true when a value is replaced: the types of its rows, and no op left over."""

from __future__ import annotations

from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.rewriter import Rewriter

from sagec.dialects import kv, pd
from sagec.passes.errors import PassError


def replace_value(old: SSAValue, new: SSAValue) -> None:
    """Use `new` where `old` was used, and carry its number of rows on to what is made of it."""
    old.replace_all_uses_with(new)
    if old.type != new.type:
        carry_rows(new)


def erase_with_makers(op: Operation) -> None:
    """Erase `op`, and what only it needed."""
    makers = [operand.owner for operand in op.operands]
    op.detach()  # type: ignore[no-untyped-call]
    op.erase()
    for maker in makers:
        if isinstance(maker, Operation) and all(r.first_use is None for r in maker.results):
            erase_with_makers(maker)


def carry_rows(value: SSAValue) -> None:
    """Make the types of what is computed from `value` fit its number of rows."""
    for use in list(value.uses):
        op = use.operation
        match op:
            case pd.PrefillOp():
                _retype(op.kv, pd.KVType(pd.rows_of(value)))
            case pd.JoinOp():
                _retype(op.kv, pd.KVType(sum(map(pd.rows_of, op.parts))))
            case pd.PreemptOp():
                _retype(op.rest, pd.KVType(pd.rows_of(value) - len(op.names)))
            case pd.DecodeOp() | pd.TransferOp() | pd.DecideOp() | kv.MatchOp():
                _retype(op.results[0], value.type)
            case pd.YieldOp():
                parent = op.parent_op()
                if isinstance(parent, pd.PhaseOp):
                    _retype(parent.results[use.index], value.type)
            case pd.StepsOp():
                pass
            case _:
                raise PassError(
                    f"{op.name} uses a value whose rows change; run this pass first", op
                )


def _retype(value: SSAValue, kind: Attribute) -> None:
    if value.type != kind:
        carry_rows(Rewriter.replace_value_with_new_type(value, kind))
