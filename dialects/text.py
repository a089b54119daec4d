"""What the custom form of every op of ours has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from xdsl.dialects.builtin import UNKNOWN_LOC, LocationAttr
from xdsl.ir import Attribute, Block, OpResult, Region, SSAValue, SSAValues
from xdsl.irdl import IRDLOperation
from xdsl.parser import Parser, UnresolvedOperand
from xdsl.printer import Printer

_NOTHING: Mapping[str, Attribute] = {}


class TextOp(IRDLOperation):
    """An op with a hand-written custom form: `print_text` and `parse_text`.

    Attributes that the op does not know, which any pass may attach, print behind that form as
    `attributes {note = "kept"}`, so that nothing is lost in a text.
    """

    @classmethod
    def create(
        cls,
        *,
        operands: Sequence[SSAValue] = (),
        result_types: Sequence[Attribute] = (),
        properties: Mapping[str, Attribute] = _NOTHING,
        attributes: Mapping[str, Attribute] = _NOTHING,
        location: LocationAttr | None = None,
        successors: Sequence[Block] = (),
        regions: Sequence[Region] = (),
    ) -> Self:
        """As of any op, in a third of the time: ours have no successors and no properties with
        defaults, which xDSL looks for among all that the op may have."""
        if successors:
            raise ValueError(f"{cls.name} has no successors")
        op = cls.__new__(cls)
        if operands:
            op.operands = operands
        op.results = SSAValues([OpResult(kind, op, at) for at, kind in enumerate(result_types)])
        op.properties, op.attributes = dict(properties), dict(attributes)
        op.location = UNKNOWN_LOC if location is None else location
        for region in regions:
            op.add_region(region)
        return op

    def print_text(self, printer: Printer) -> None:
        """Print what stands behind the op's name."""
        raise TypeError(f"{self.name} has no custom form")

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        """Parse what `print_text` prints."""
        raise TypeError(f"{cls.name} has no custom form")

    def print(self, printer: Printer) -> None:
        self.print_text(printer)
        printer.print_op_attributes(self.attributes, print_keyword=True)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        op = cls.parse_text(parser)
        if parser.parse_optional_keyword("attributes"):
            op.attributes |= parser.parse_optional_dictionary_attr_dict()
        return op


def parse_operands(parser: Parser) -> list[UnresolvedOperand]:
    """`%a, %b`: one value or more."""
    return parser.parse_comma_separated_list(
        parser.Delimiter.NONE, lambda: parser.parse_unresolved_operand("expected a value, %name")
    )


def resolve_typed(parser: Parser, operands: Sequence[UnresolvedOperand]) -> Sequence[SSAValue]:
    """Parse `: type, type` and give the operands them; values that stand above need no type."""
    at = parser.pos
    if not parser.parse_optional_punctuation(":"):
        types = [type_above(parser, operand) for operand in operands]
        return [parser.resolve_operand(o, t) for o, t in zip(operands, types, strict=True)]
    types = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
    if len(types) != len(operands):
        parser.raise_error(f"{len(types)} types for {len(operands)} values", at)
    return parser.resolve_operands(operands, types, at)


def type_above(parser: Parser, operand: UnresolvedOperand) -> Attribute:
    """The type of a value that is defined already; raises at its use where it is not."""
    values = parser.ssa_values.get(operand.operand_name, ())
    if operand.index >= len(values):
        parser.raise_error(
            f"{operand.span.text} is not defined above; say its type at the end, after ':'",
            operand.span,
        )
    return values[operand.index].type
