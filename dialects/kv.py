"""The kv dialect: what happens to KV blocks beside being computed."""

from __future__ import annotations

from typing import ClassVar, Self

from xdsl.dialects.builtin import FlatSymbolRefAttrConstr, StringAttr, SymbolRefAttr
from xdsl.ir import Attribute, Dialect
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import ColumnAttr, quoted
from sagec.dialects.pd import OverOp, TableOp, WaveType
from sagec.dialects.rows import (
    Field,
    Fields,
    Kind,
    declares_rows,
    parse_symbol,
    parse_table,
    print_table,
    symbol,
)
from sagec.dialects.text import TextOp

TIERS = ("device", "host", "disk")

MATCH_FIELDS: Fields = (
    Field(
        "tokens", Kind.INT, "leading tokens whose KV the prefix cache has", required=True, least=0
    ),
    Field("on", Kind.SYMBOL, "instance that has it; none: any that it goes to", header=True),
)
RESERVE_FIELDS: Fields = (
    Field("on", Kind.SYMBOL, "instance that keeps the blocks free", required=True, header=True),
    Field("blocks", Kind.INT, "how many, for the whole horizon", required=True, least=1),
)


@irdl_op_definition
@declares_rows(MATCH_FIELDS)
class MatchOp(OverOp):
    """Leading tokens that an instance has: `%h = kv.match %w on @p0 ["a": tokens 9] : !pd.wave<1>`

    They are in the prefix cache of the instance, or are the request's own, which was swapped out
    there. A request has a row for each instance that has some; `match-prefix` keeps the one of the
    instance where it goes.
    """

    name = "kv.match"
    FIELDS: ClassVar[Fields] = MATCH_FIELDS
    wave = operand_def(WaveType)
    matched = result_def(WaveType)

    def _verify_names(self) -> None:
        said: set[tuple[str, str]] = set()
        for name, place in zip(self.names, self.words("on"), strict=True):
            if (name, place) in said:
                where = f" on {symbol(place)}" if place else ""
                raise VerifyException(
                    f"{self.name}: request {quoted(name)} is matched twice{where}; once a place"
                )
            said.add((name, place))


@irdl_op_definition
@declares_rows(RESERVE_FIELDS)
class ReserveOp(TableOp):
    """Blocks kept for requests on an instance: `kv.reserve on @d0 ["a": blocks 21]`

    A request is named once an instance: with prefill and decode apart, in two ops.
    """

    name = "kv.reserve"
    FIELDS: ClassVar[Fields] = RESERVE_FIELDS

    def print_text(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        return cls.create(properties=parse_table(parser, cls.FIELDS))


class _HashesOp(TextOp):
    """An op about cached blocks, named by their hashes, on an instance."""

    def _instance(self) -> str:
        ref = self.properties["instance"]
        assert isinstance(ref, SymbolRefAttr)
        return ref.root_reference.data

    def _print_hashes(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self._instance())} ")
        printer.print_attribute(self.properties["hashes"])

    @staticmethod
    def _parse_hashes(parser: Parser) -> dict[str, Attribute]:
        instance = SymbolRefAttr(parse_symbol(parser, "an instance"))
        at = parser.pos
        hashes = parser.parse_optional_attribute()
        if not isinstance(hashes, ColumnAttr):
            parser.raise_error("expected the blocks' hashes as #pd.column<...>", at)
        return {"instance": instance, "hashes": hashes}


@irdl_op_definition
class EvictOp(_HashesOp):
    """Drop cached blocks: `kv.evict @d0 #pd.column<17, 42>`"""

    name = "kv.evict"
    instance = prop_def(FlatSymbolRefAttrConstr)
    hashes = prop_def(ColumnAttr)

    def print_text(self, printer: Printer) -> None:
        self._print_hashes(printer)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        return cls.create(properties=cls._parse_hashes(parser))


@irdl_op_definition
class MigrateOp(_HashesOp):
    """Move cached blocks between tiers: `kv.migrate @d0 #pd.column<17, 42> from device to host`"""

    name = "kv.migrate"
    instance = prop_def(FlatSymbolRefAttrConstr)
    hashes = prop_def(ColumnAttr)
    source = prop_def(StringAttr)
    target = prop_def(StringAttr)

    def verify_(self) -> None:
        ends = self.source.data, self.target.data
        for tier in ends:
            if tier not in TIERS:
                raise VerifyException(f"kv.migrate: no tier '{tier}'; one of: {', '.join(TIERS)}")
        if ends[0] == ends[1]:
            raise VerifyException(
                f"kv.migrate: from {ends[0]} to {ends[1]} moves nothing; name two tiers"
            )

    def print_text(self, printer: Printer) -> None:
        self._print_hashes(printer)
        printer.print_string(f" from {self.source.data} to {self.target.data}")

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        properties = cls._parse_hashes(parser)
        parser.parse_keyword("from", " and the tiers")
        properties["source"] = StringAttr(parser.parse_keyword_in(TIERS, " as the tier"))
        parser.parse_keyword("to", " and the other tier")
        properties["target"] = StringAttr(parser.parse_keyword_in(TIERS, " as the tier"))
        return cls.create(properties=properties)


KV = Dialect("kv", [MatchOp, ReserveOp, EvictOp, MigrateOp])
