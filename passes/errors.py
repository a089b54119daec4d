"""What a pass says when it refuses."""

from __future__ import annotations

from xdsl.dialects.builtin import FileLineColLoc
from xdsl.ir import Operation
from xdsl.utils.exceptions import DiagnosticException


class PassError(DiagnosticException):
    """A graph that a pass refuses: what, with the values, and what would be right.

    place is where the op stands in the source, as `file:line:column`, or "" where nobody knows.
    """

    def __init__(self, message: str, op: Operation | None = None) -> None:
        self.message = message
        self.op = op
        self.place = place_of(op)
        super().__init__(f"{self.place}: {message}" if self.place else message)


def place_of(op: Operation | None) -> str:
    """`file:line:column` of an op, or "" where it has no location."""
    if op is None or not isinstance(op.location, FileLineColLoc):
        return ""
    location = op.location
    return f"{location.filename.data}:{location.line.data}:{location.column.data}"
