"""Which tokens of a step the rows of each value of an exec graph are.

A lane is the tokens of one exec.input. Where a graph slices a lane's rows, its parts are batches of
their own in the code: whole requests, cut at run time into about equal parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from xdsl.ir import SSAValue

from sagec.dialects import exec as ex
from sagec.passes.errors import PassError


@dataclass(frozen=True)
class Rows:
    """The tokens [begin, end) of a lane."""

    lane: int
    begin: int
    end: int


class StepRows:
    """The rows of all values of a graph, and the variables of the batches that they are of."""

    def __init__(self, graph: ex.ExecGraphOp) -> None:
        self.lanes: list[int] = []  # the tokens of each
        self._of: dict[SSAValue, Rows] = {}
        cuts: list[set[int]] = []
        for op in graph.operators:
            if isinstance(op, ex.InputOp):
                (count,) = ex.tensor_of(op.tokens).shape
                self._of[op.tokens] = Rows(len(self.lanes), 0, count)
                self.lanes.append(count)
                cuts.append({0, count})
                continue
            for number, result in enumerate(op.results):
                if (rows := self._made(op, number)) is not None:
                    self._of[result] = rows
                    if isinstance(op, ex.SliceOp):
                        cuts[rows.lane] |= {rows.begin, rows.end}
        self.parts = [list(itertools.pairwise(sorted(each))) for each in cuts]

    def of(self, value: SSAValue) -> Rows:
        """The rows of a value that comes from an input."""
        return self._of[value]

    @property
    def is_one_batch(self) -> bool:
        """Whether all tokens of a step go through the layers together."""
        return len(self.lanes) == 1 and len(self.parts[0]) == 1

    def batch(self, value: SSAValue, op: ex.OperatorOp) -> str:
        """The variable of the batch whose tokens a value has. Raises PassError, at op, where there
        is none."""
        rows = self.of(value)
        lane = self._lane(rows.lane)
        if (rows.begin, rows.end) == (0, self.lanes[rows.lane]):
            return lane
        parts = self.parts[rows.lane]
        if (rows.begin, rows.end) not in parts:
            raise PassError(
                f"{op.name} has rows [{rows.begin}, {rows.end}) of a step that is cut at "
                f"{', '.join(str(end) for _, end in parts[:-1])}; it must have one part, or all", op
            )  # fmt: skip
        return f"{lane}_{parts.index((rows.begin, rows.end))}"

    def opening(self) -> Iterator[str]:
        """The lines that make the batches of the step's batch."""
        if self.is_one_batch:
            yield "kernels.begin_step(batch)"
        if len(self.lanes) > 1:
            yield _cut("batch", len(self.lanes))
        for lane, parts in enumerate(self.parts):
            if len(parts) > 1:
                yield _cut(self._lane(lane), len(parts))

    def bound(self, whole: SSAValue, row: int) -> str:
        """Row `row` of a value as Python counts it: nothing at its ends, else by its parts."""
        rows = self.of(whole)
        if row in (0, rows.end - rows.begin):
            return ""
        lane = self._lane(rows.lane)
        before = [
            f"len({lane}_{number}.tokens)"
            for number, (begin, end) in enumerate(self.parts[rows.lane])
            if begin >= rows.begin and end <= rows.begin + row
        ]
        return " + ".join(before)

    def count(self, value: SSAValue) -> str:
        """How many rows a value has, for a reader: T of a lane, T0, T1, ... of its parts."""
        rows = self.of(value)
        if rows.end - rows.begin == self.lanes[rows.lane]:
            return "T"
        parts = self.parts[rows.lane]
        known = (rows.begin, rows.end) in parts
        return f"T{parts.index((rows.begin, rows.end))}" if known else str(rows.end - rows.begin)

    def _lane(self, number: int) -> str:
        return f"batch_{number}" if len(self.lanes) > 1 else "batch"

    def _made(self, op: ex.OperatorOp, number: int) -> Rows | None:
        """The rows of a result: those of the first operand, of a message's like operand, unless the
        op changes them."""
        operands = op.operands[number:] if isinstance(op, ex.CollectiveOp) else op.operands
        taken = [self._of[value] for value in operands if value in self._of]
        if not taken:
            return None
        lane, begin, end = taken[0].lane, taken[0].begin, taken[0].end
        if isinstance(op, ex.AttentionOp | ex.SliceOp):
            begin += op.number("first")
            end = begin + ex.tensor_of(op.results[0]).shape[0]
        elif isinstance(op, ex.ConcatOp | ex.ProjectionOp):
            begin, end = min(rows.begin for rows in taken), max(rows.end for rows in taken)
        return Rows(lane, begin, end)


def _cut(batch: str, count: int) -> str:
    names = ", ".join(f"{batch}_{number}" for number in range(count))
    return f"{names} = lanes_of({batch}, {count})"
