"""order: the text's order becomes one in which every value is made before it is used."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.dialects.columns import quoted
from sagec.dialects.pd import TableOp
from sagec.dialects.rows import symbol
from sagec.passes.errors import PassError, place_of
from sagec.passes.flow import graphs, ops_in, ops_of


@dataclass(frozen=True)
class OrderPass(ModulePass):
    """Sort each graph: makers before users, otherwise in the order of the text.

    `%b = pd.prefill %a; %a = pd.requests [...]  -->  %a = pd.requests [...]; %b = pd.prefill %a`

    Refuses a cycle, with its whole path; a value used outside of the phase that makes it; a
    request that two ops bring.
    """

    name = "order"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for graph in graphs(op):
            check_escapes(graph)
            check_unique(graph)
            for phase in ops_of(graph, pd.PhaseOp):
                sort(phase.body.block)
            sort(graph.body.block)


def check_escapes(graph: pd.GraphOp) -> None:
    """Raise PassError where an op uses a value that is made in a phase it does not stand in."""
    for op in ops_in(graph):
        around = op.parent_block()
        for operand in op.operands:
            home = operand.owner if isinstance(operand.owner, Block) else operand.owner.parent
            if home not in (around, graph.body.block):
                value = _value_name(operand.name_hint)
                raise PassError(
                    f"{op.name} uses {value}, which is made inside a phase; yield it from there", op
                )


def check_unique(graph: pd.GraphOp) -> None:
    """Raise PassError where two ops bring a request of the same id."""
    sources = [o for o in ops_in(graph) if isinstance(o, pd.RequestsOp | pd.ResidentOp)]
    if len(sources) < 2:
        return
    home: dict[str, TableOp] = {}
    for source in sources:
        for name in source.names:
            if (other := home.setdefault(name, source)) is not source:
                where = f" (also at {place_of(other)})" if place_of(other) else ""
                raise PassError(
                    f"request {quoted(name)} comes twice into {symbol(graph.symbol)}{where}; "
                    "ids are unique in a graph",
                    source,
                )


def sort(block: Block) -> None:
    """Sort the ops of a block topologically, the earlier in the text first; the yield stays last.

    Raises PassError on a cycle.
    """
    ops = [op for op in block.ops if not isinstance(op, pd.YieldOp)]
    done: set[Operation] = set()
    ordered: list[Operation] = []
    for op in ops:
        _visit(op, block, done, ordered)
    if ordered == ops:
        return
    last = block.last_op
    for op in ordered:
        block.detach_op(op)
        if isinstance(last, pd.YieldOp):
            block.insert_op_before(op, last)
        else:
            block.add_op(op)


def _visit(root: Operation, block: Block, done: set[Operation], ordered: list[Operation]) -> None:
    """Append `root` to `ordered` after all that it needs, without recursion: chains may be long."""
    if root in done:
        return
    path = [root]
    needs = [iter(_makers(root, block))]
    on_path = {root}
    while path:
        maker = next(needs[-1], None)
        if maker is None:
            op = path.pop()
            needs.pop()
            on_path.discard(op)
            done.add(op)
            ordered.append(op)
        elif maker in on_path:
            raise _cycle([*path[path.index(maker) :], maker])
        elif maker not in done:
            path.append(maker)
            needs.append(iter(_makers(maker, block)))
            on_path.add(maker)


def _makers(op: Operation, block: Block) -> list[Operation]:
    """The ops of the block whose values `op`, or an op inside of it, uses."""
    users = [op, *(inner for region in op.regions for inner in region.walk())]
    makers = (operand.owner for user in users for operand in user.operands)
    return [m for m in makers if isinstance(m, Operation) and m.parent is block]


def _cycle(path: list[Operation]) -> PassError:
    steps = [_described(op) for op in reversed(path)]
    return PassError(
        f"cycle: {' -> '.join(steps)}; a value cannot be made of itself, "
        "so one of these must use another",
        path[0],
    )


def _described(op: Operation) -> str:
    value = _value_name(op.results[0].name_hint) if op.results else op.name
    place = place_of(op)
    line = f" (line {place.split(':')[-2]})" if place else ""
    return f"{value} = {op.name}{line}" if op.results else f"{op.name}{line}"


def _value_name(hint: str | None) -> str:
    return f"%{hint}" if hint else "a value"
