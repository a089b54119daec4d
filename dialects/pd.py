"""The pd dialect: requests, decisions, prefill and decode, and the steps that compute them.

A graph's values are tables of requests. `!pd.wave<N>` are N requests whose prompts are to be
computed; `!pd.kv<N>` are N requests whose KV exists and which decode. The order of the text does
not matter; `order` sorts it and finds cycles. Above the dataflow (what is computed, where) stand
the `pd.steps` (when): they use values and make none, so that a schedule never makes a cycle.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import numpy as np
from xdsl.dialects.builtin import IntegerAttr, StringAttr, SymbolNameConstraint, SymbolRefAttr, i64
from xdsl.ir import Attribute, Block, Data, Dialect, Operation, Region, SSAValue, TypeAttribute
from xdsl.irdl import (
    IRDLOperation,
    base,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
    var_result_def,
)
from xdsl.parser import AttrParser, Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, IsTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import ColumnAttr, Ints, ListsAttr, NamesAttr, WordsAttr, quoted
from sagec.dialects.rows import (
    READABLE_ROWS,
    Field,
    Fields,
    Kind,
    Scanner,
    column_or,
    declares_rows,
    parse_table,
    print_table,
    symbol,
    verify_rows,
    verify_unique,
)
from sagec.dialects.scalars import (
    Scalar,
    Scalars,
    declares,
    parse_scalars,
    print_scalars,
    verify_scalars,
)

UNBOUNDED = 2**31 - 1
"""generate and remaining of a request that goes on until it stops."""

MODES = ("strict", "time-share", "hybrid")
PHASES = ("prefill", "decode")
VERDICTS = ("admit", "defer", "reject", "preempt", "swap")
ADMIT, DEFER, REJECT, PREEMPT, SWAP = range(5)


class SizedType(Data[int], TypeAttribute):
    """A type that says how many requests its value holds."""

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> int:
        with parser.in_angle_brackets():
            return parser.parse_integer(allow_boolean=False, allow_negative=False)

    def print_parameter(self, printer: Printer) -> None:
        printer.print_string(f"<{self.data}>")


@irdl_attr_definition
class WaveType(SizedType):
    """N requests whose prompts are to be computed: `!pd.wave<2>`."""

    name = "pd.wave"


@irdl_attr_definition
class KVType(SizedType):
    """N requests whose prompts' KV exists and which decode: `!pd.kv<2>`."""

    name = "pd.kv"


_WAVE_OR_KV = base(WaveType) | base(KVType)


def rows_of(value: SSAValue) -> int:
    """How many requests a value of the dialect holds."""
    assert isinstance(value.type, SizedType)
    return value.type.data


_CLIENT: Fields = (
    Field("priority", Kind.INT, "smaller goes first"),
    Field("ttft", Kind.INT, "promised time to the first token, us; 0: none"),
    Field("tpot", Kind.INT, "promised time for each token after it, us; 0: none"),
    Field("model", Kind.SYMBOL, "the model it asks for; none: the only one"),
    Field("tenant", Kind.WORD, "who pays"),
    Field("session", Kind.WORD, "conversation it belongs to"),
    Field("adapter", Kind.WORD, "LoRA adapter"),
)

REQUEST_FIELDS: Fields = (
    Field("prompt", Kind.INT, "tokens to compute before the first is sampled", required=True),
    Field("generate", Kind.INT, "tokens to sample at most; none: until it stops", UNBOUNDED),
    Field("arrived", Kind.INT, "when, us"),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never"),
    *_CLIENT,
    Field("samples", Kind.INT, "outputs of one prompt (n of the OpenAI API)", 1),
    Field("prefix", Kind.LIST, "hashes of its leading KV blocks"),
    Field("cached", Kind.INT, "leading tokens whose KV the prefix cache has"),
    Field("computed", Kind.INT, "leading tokens whose KV `on` holds already"),
    Field("chunk", Kind.INT, "most tokens of it in a step; 0: no bound"),
    Field("on", Kind.SYMBOL, "instance that computes its prompt"),
    Field("decode_on", Kind.SYMBOL, "instance that decodes it"),
    Field("text", Kind.TEXT, "the prompt itself, where it is known"),
)

RESIDENT_FIELDS: Fields = (
    Field("on", Kind.SYMBOL, "instance that holds its KV", required=True, header=True),
    Field("context", Kind.INT, "tokens of KV it has", required=True),
    Field("remaining", Kind.INT, "tokens to sample at most; none: until it stops", UNBOUNDED),
    Field("arrived", Kind.INT, "when, us"),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never"),
    *_CLIENT,
    Field("arriving", Kind.FLAG, "its KV is still on the way"),
)

DECIDE_FIELDS: Fields = (
    Field("verdict", Kind.CHOICE, "what the strategy says", required=True, choices=VERDICTS),
    Field("rank", Kind.INT, "order among the admitted, from 0"),
    Field("prefill_on", Kind.SYMBOL, "instance for its prompt, if the strategy cares"),
    Field("decode_on", Kind.SYMBOL, "instance for its output, if the strategy cares"),
    Field("chunk", Kind.INT, "most tokens of it in a step; 0: no bound"),
    Field("because", Kind.WORD, "why, for people"),
)

LEAVE_FIELDS: Fields = (
    Field("verdict", Kind.CHOICE, "why it left", required=True, choices=VERDICTS),
    Field("because", Kind.WORD, "the strategy's reason"),
)

PREEMPT_FIELDS: Fields = (
    Field("verdict", Kind.CHOICE, "preempt (recompute) or swap", required=True, choices=VERDICTS),
    Field("on", Kind.SYMBOL, "instance it leaves", required=True),
    Field("because", Kind.WORD, "the reason, for people"),
)

TRANSFER_FIELDS: Fields = (
    Field("source", Kind.SYMBOL, "instance the KV leaves", required=True, header=True),
    Field("target", Kind.SYMBOL, "instance it goes to", required=True, header=True),
    Field("bytes", Kind.INT, "size of the KV"),
    Field("us", Kind.INT, "predicted time, with what shares the links"),
    Field("via", Kind.WORD, "the devices and switches passed"),
)

STEP_FIELDS: Fields = (
    Field("prompt", Kind.INT, "tokens to compute before the next is sampled", required=True),
    Field("computed", Kind.INT, "tokens of KV when the steps begin"),
    Field("cached", Kind.INT, "leading tokens taken from the prefix cache"),
    Field("blocks", Kind.INT, "KV blocks reserved for all the steps", required=True),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never"),
    Field("begin", Kind.INT, "first step it may decode in"),
    Field("until", Kind.INT, "tokens of KV after its last decode; 0: it does not decode"),
    Field("source", Kind.SYMBOL, "instance its KV comes from"),
    Field("target", Kind.SYMBOL, "instance its KV goes to"),
)


class TableOp(IRDLOperation):
    """An op whose table has the fields FIELDS and a row for each of `ids`."""

    FIELDS: ClassVar[Fields] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The requests' ids, a row each."""
        ids = self.properties.get("ids")
        return ids.data if isinstance(ids, NamesAttr) else ()

    def column(self, name: str) -> Ints:
        """The int64 column of a field; its default where the op does not say."""
        default = next(field.default for field in self.FIELDS if field.name == name)
        return column_or(self, name, default, len(self.names))

    def words(self, name: str) -> list[str]:
        """The string or symbol of each row; "" where a row does not say."""
        attr = self.properties.get(name)
        return attr.rows() if isinstance(attr, WordsAttr) else [""] * len(self.names)

    def verify_(self) -> None:
        if not isinstance(self.properties.get("ids"), NamesAttr):
            raise VerifyException(f"{self.name}: 'ids' must be a #pd.names")
        verify_rows(self, self.FIELDS, len(self.names))
        verify_unique(self, self.names)

    def _at_least(self, name: str, least: int, why: str) -> None:
        column = self.column(name)
        if column.size and (row := int(column.argmin())) >= 0 and column[row] < least:
            raise VerifyException(
                f"{self.name}: {quoted(self.names[row])}: {name} {column[row]}; {why}"
            )


def _print_types(printer: Printer, types: Sequence[Attribute]) -> None:
    printer.print_string(" : ")
    printer.print_list(types, printer.print_attribute)


def _check_type(parser: Parser, derived: Attribute) -> None:
    """A type in the text, which may be left out, must be the one that the rows give."""
    if parser.parse_optional_punctuation(":"):
        at = parser.pos
        if (written := parser.parse_type()) != derived:
            parser.raise_error(f"the type is {written}, but the rows make it {derived}", at)


@irdl_op_definition
class YieldOp(IRDLOperation):
    """The values that a graph or a phase gives: `pd.yield %end`"""

    name = "pd.yield"
    values = var_operand_def()
    traits = traits_def(IsTerminator())
    assembly_format = "($values^ `:` type($values))? attr-dict"


_GRAPH_SCALARS: Scalars = (
    Scalar("policy", "strategy that decided", ""),
    Scalar("mode", "how phases share an instance", "hybrid", choices=MODES),
    Scalar("now", "the loop's clock, us", 0),
    Scalar("round", "number of the decision", 0),
    Scalar("horizon", "steps to plan; 0: all", 0),
)


@irdl_op_definition
@declares(_GRAPH_SCALARS)
class GraphOp(IRDLOperation):
    """A serving graph: one decision of a strategy, or a whole file of requests.

    `pd.graph @round_42 {policy = "fifo", mode = "hybrid", now = 1834000, horizon = 16} { ... }`
    """

    name = "pd.graph"
    SCALARS: ClassVar[Scalars] = _GRAPH_SCALARS
    sym_name = prop_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface())

    @property
    def symbol(self) -> str:
        """The graph's symbol without the @."""
        name = self.properties["sym_name"]
        assert isinstance(name, StringAttr)
        return name.data

    def text(self, name: str, default: str) -> str:
        """What the graph says of `policy` or `mode`, or the default."""
        attr = self.properties.get(name)
        return attr.data if isinstance(attr, StringAttr) else default

    def number(self, name: str) -> int:
        """What the graph says of `now`, `round` or `horizon`; 0 where it does not."""
        attr = self.properties.get(name)
        return attr.value.data if isinstance(attr, IntegerAttr) else 0

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        if not isinstance(self.body.block.last_op, YieldOp):
            raise VerifyException(f"pd.graph {symbol(self.symbol)} must end with pd.yield")

    def print(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self.symbol)}")
        print_scalars(printer, self, self.SCALARS)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        properties: dict[str, Attribute] = {"sym_name": parser.parse_symbol_name()}
        if _brace_holds_scalars(parser, cls.SCALARS):
            properties |= parse_scalars(parser, cls.SCALARS)
        return cls.create(properties=properties, regions=[_parse_body(parser)])


def _brace_holds_scalars(parser: Parser, scalars: Scalars) -> bool:
    """Whether the next brace opens `{name = value}` and not a body."""
    text = str(parser.lexer.input.content[parser.pos : parser.pos + 256])
    first = re.match(r"\{\s*(\w+)\s*=", text)
    return first is not None and first[1] in {scalar.name for scalar in scalars}


def _parse_body(parser: Parser) -> Region:
    """A region of one block that ends with pd.yield, which may be left out."""
    region = parser.parse_region()
    if not region.blocks:
        region.add_block(Block())
    block = region.blocks[-1]
    if not isinstance(block.last_op, YieldOp):
        block.add_op(YieldOp.create())
    return region


_PHASE_SCALARS: Scalars = (
    Scalar("compute_tokens", "tokens to compute", 0),
    Scalar("kv_tokens", "tokens of KV to hold at the end", 0),
    Scalar("kv_bytes", "their size; 0 where the model is not known", 0),
)


@irdl_op_definition
@declares(_PHASE_SCALARS)
class PhaseOp(IRDLOperation):
    """A sub-graph of one phase, with the resources that it needs.

    `%kv = pd.phase prefill {compute_tokens = 1120} { ... pd.yield %0 : !pd.kv<2> } : !pd.kv<2>`
    """

    name = "pd.phase"
    SCALARS: ClassVar[Scalars] = _PHASE_SCALARS
    phase = prop_def(StringAttr)
    outs = var_result_def(KVType)
    body = region_def("single_block")

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        if self.phase.data not in PHASES:
            raise VerifyException(
                f"pd.phase: '{self.phase.data}' is no phase; one of: {', '.join(PHASES)}"
            )
        last = self.body.block.last_op
        if not isinstance(last, YieldOp):
            raise VerifyException("pd.phase must end with pd.yield")
        given, taken = [str(t) for t in last.operand_types], [str(t) for t in self.result_types]
        if given != taken:
            raise VerifyException(
                f"pd.phase yields {', '.join(given) or 'nothing'} "
                f"for results {', '.join(taken) or 'of none'}"
            )

    def print(self, printer: Printer) -> None:
        printer.print_string(f" {self.phase.data}")
        print_scalars(printer, self, self.SCALARS)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False)
        if self.outs:
            _print_types(printer, self.result_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        phase = parser.parse_keyword_in(PHASES, "prefill or decode expected")
        properties: dict[str, Attribute] = {"phase": StringAttr(phase)}
        if _brace_holds_scalars(parser, cls.SCALARS):
            properties |= parse_scalars(parser, cls.SCALARS)
        body = _parse_body(parser)
        types: list[Attribute] = []
        if parser.parse_optional_punctuation(":"):
            types = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
        return cls.create(properties=properties, regions=[body], result_types=types)


class _SourceOp(TableOp):
    """An op that brings requests into a graph: `name TABLE : type`."""

    RESULT: ClassVar[type[SizedType]] = WaveType

    def verify_(self) -> None:
        super().verify_()
        if rows_of(self.results[0]) != len(self.names):
            raise VerifyException(
                f"{self.name}: the result is {self.results[0].type}, "
                f"but there are {len(self.names)} rows"
            )

    def print(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)
        _print_types(printer, self.result_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        op = cls.of(parse_table(parser, cls.FIELDS))
        _check_type(parser, op.results[0].type)
        return op

    @classmethod
    def of(cls, columns: Mapping[str, Attribute]) -> Self:
        """The op of these columns, by field name, with `ids`."""
        ids = columns.get("ids")
        rows = len(ids) if isinstance(ids, NamesAttr) else 0
        return cls.create(properties=columns, result_types=[cls.RESULT(rows)])


@irdl_op_definition
@declares_rows(REQUEST_FIELDS)
class RequestsOp(_SourceOp):
    """Requests that travel together: `%w = pd.requests ["chat-1": prompt 1024 generate 256]`"""

    name = "pd.requests"
    FIELDS: ClassVar[Fields] = REQUEST_FIELDS
    wave = result_def(WaveType)

    def verify_(self) -> None:
        super().verify_()
        self._at_least("prompt", 1, "a request has at least one token")
        self._at_least("generate", 1, "a request samples at least one token")
        self._at_least("samples", 1, "a request has at least one output")
        prompt, held = self.column("prompt"), self.column("computed") + self.column("cached")
        if (bad := np.flatnonzero((held < 0) | (held >= prompt))).size:
            row = int(bad[0])
            raise VerifyException(
                f"pd.requests: {quoted(self.names[row])}: {held[row]} of {prompt[row]} tokens have "
                "KV; the last is always computed, for its logits"
            )


@irdl_op_definition
@declares_rows(RESIDENT_FIELDS)
class ResidentOp(_SourceOp):
    """Requests that decode already: `%r = pd.resident on @d0 ["a": context 811 remaining 40]`"""

    name = "pd.resident"
    FIELDS: ClassVar[Fields] = RESIDENT_FIELDS
    RESULT: ClassVar[type[SizedType]] = KVType
    kv = result_def(KVType)

    def verify_(self) -> None:
        super().verify_()
        self._at_least("context", 1, "a resident has KV")
        self._at_least("remaining", 0, "0 where it is done")


class OverOp(TableOp):
    """An op that says something of some rows of its operand: `name %x TABLE : type of %x`."""

    GIVES: ClassVar[bool] = True

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.operands[0])
        print_table(printer, self, self.FIELDS)
        _print_types(printer, self.operand_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties = parse_table(parser, cls.FIELDS)
        parser.parse_punctuation(":", " and the operand's type")
        at = parser.pos
        kind = parser.parse_type()
        if not isinstance(kind, SizedType):
            parser.raise_error(f"{cls.name} takes a !pd.wave or a !pd.kv, not {kind}", at)
        return cls.over(parser.resolve_operand(operand, kind), properties)

    @classmethod
    def over(cls, operand: SSAValue, columns: Mapping[str, Attribute]) -> Self:
        """The op over `operand` with these columns, by field name, with `ids`."""
        return cls.create(
            operands=[operand],
            properties=columns,
            result_types=[cls._result_type(operand, columns)] if cls.GIVES else [],
        )

    @classmethod
    def _result_type(cls, operand: SSAValue, columns: Mapping[str, Attribute]) -> Attribute:
        return operand.type


@irdl_op_definition
@declares_rows(DECIDE_FIELDS)
class DecideOp(OverOp):
    """What the strategy said, a row each, with its reason; rows it does not name wait.

    `%go = pd.decide %new ["chat-2": admit rank 0, "chat-1": defer because "no KV"] : !pd.wave<2>`
    """

    name = "pd.decide"
    FIELDS: ClassVar[Fields] = DECIDE_FIELDS
    decided = operand_def(_WAVE_OR_KV)
    verdicts = result_def(_WAVE_OR_KV)

    def verify_(self) -> None:
        super().verify_()
        if self.verdicts.type != self.decided.type:
            raise VerifyException(
                f"pd.decide: gives {self.verdicts.type} of {self.decided.type}; "
                "apply-decision takes the rows out, pd.decide does not"
            )


@irdl_op_definition
@declares_rows(LEAVE_FIELDS)
class LeaveOp(TableOp):
    """Requests that this round does nothing for, with the reason: `pd.leave ["a": defer]`"""

    name = "pd.leave"
    FIELDS: ClassVar[Fields] = LEAVE_FIELDS

    def print(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        return cls.create(properties=parse_table(parser, cls.FIELDS))


@irdl_op_definition
@declares_rows(PREEMPT_FIELDS)
class PreemptOp(OverOp):
    """Rows that lose their KV: `%r1 = pd.preempt %r0 ["chat-0": preempt on @d0] : !pd.kv<3>`

    `preempt` drops the KV, to be computed again; `swap` moves it to the host. Where %r0 is
    !pd.kv<3> the result is !pd.kv<2>.
    """

    name = "pd.preempt"
    FIELDS: ClassVar[Fields] = PREEMPT_FIELDS
    kv = operand_def(KVType)
    rest = result_def(KVType)

    @classmethod
    def _result_type(cls, operand: SSAValue, columns: Mapping[str, Attribute]) -> Attribute:
        ids = columns.get("ids")
        return KVType(rows_of(operand) - (len(ids) if isinstance(ids, NamesAttr) else 0))

    def verify_(self) -> None:
        super().verify_()
        if rows_of(self.rest) != rows_of(self.kv) - len(self.names):
            raise VerifyException(
                f"pd.preempt: {self.kv.type} less {len(self.names)} rows is not {self.rest.type}"
            )
        verdicts = self.column("verdict")
        if not np.isin(verdicts, (PREEMPT, SWAP)).all():
            raise VerifyException("pd.preempt: a row's verdict is 'preempt' or 'swap'")


@irdl_op_definition
@declares_rows(TRANSFER_FIELDS)
class TransferOp(OverOp):
    """Move KV to another instance: `%k1 = pd.transfer %k0 source @p0 target @d0 ["a"] : !pd.kv<1>`

    Rows that it does not name stay where they are.
    """

    name = "pd.transfer"
    FIELDS: ClassVar[Fields] = TRANSFER_FIELDS
    kv = operand_def(KVType)
    moved = result_def(KVType)

    def verify_(self) -> None:
        super().verify_()
        for name, source, target in zip(
            self.names, self.words("source"), self.words("target"), strict=True
        ):
            if source == target:
                raise VerifyException(
                    f"pd.transfer: {quoted(name)} goes from {symbol(source)} to itself"
                )


def _print_placed(printer: Printer, op: Operation, name: str) -> None:
    """Print ` on @p0` where all rows are on one instance, else ` on [@p0, @d0, ...]`."""
    attr = op.properties.get(name)
    if not isinstance(attr, WordsAttr):
        return
    printer.print_string(f" {name} ")
    if len(attr.words) == 1:
        printer.print_string(symbol(attr.words[0]))
    elif len(attr) > READABLE_ROWS:
        printer.print_attribute(attr)
    else:
        printer.print_string(f"[{', '.join(map(symbol, attr.rows()))}]")


def _parse_placed(parser: Parser, name: str) -> str | Attribute | None:
    """What `_print_placed` prints: an instance for all, a column, or None where it is not there."""
    if not parser.parse_optional_keyword(name):
        return None
    names = parser.parse_optional_comma_separated_list(
        parser.Delimiter.SQUARE, lambda: parser.parse_symbol_name().data
    )
    if names is not None:
        return WordsAttr.from_rows(names)
    if (one := parser.parse_optional_symbol_name()) is not None:
        return one.data
    return parser.parse_attribute()


def _placed_column(placed: str | Attribute, rows: int) -> Attribute:
    return WordsAttr.same(placed, rows) if isinstance(placed, str) else placed


def _verify_placed(op: Operation, rows: int) -> None:
    attr = op.properties.get("on")
    if attr is None:
        return
    if not isinstance(attr, WordsAttr) or len(attr) != rows:
        raise VerifyException(f"{op.name}: 'on' must be a #pd.words of {rows} rows, not {attr}")


@irdl_op_definition
class PrefillOp(IRDLOperation):
    """Compute the prompts of a wave and sample each one's first token.

    `%kv = pd.prefill %go chunk 64 on @p0 bounds [[0, 64, 96], [0, 64, 128]] : !pd.kv<2>`

    on: the instance of each row. chunk: most tokens of a request in one step. bounds: for each
    row where its chunks begin and end; chunk-prefill writes them.
    """

    name = "pd.prefill"
    wave = operand_def(WaveType)
    chunk = opt_prop_def(IntegerAttr)
    on = opt_prop_def(WordsAttr)
    bounds = opt_prop_def(ListsAttr)
    kv = result_def(KVType)

    @property
    def chunk_tokens(self) -> int:
        """The bound in the source; 0 where there is none."""
        return self.chunk.value.data if self.chunk is not None else 0

    def verify_(self) -> None:
        rows = rows_of(self.wave)
        if rows_of(self.kv) != rows:
            raise VerifyException(f"pd.prefill: gives {self.kv.type} of {self.wave.type}")
        if self.chunk is not None and self.chunk_tokens < 1:
            raise VerifyException(f"pd.prefill: chunk {self.chunk_tokens}; at least 1")
        _verify_placed(self, rows)
        if self.bounds is None:
            return
        if len(self.bounds) != rows:
            raise VerifyException(f"pd.prefill: bounds of {len(self.bounds)} rows; it has {rows}")
        ascends = np.diff(self.bounds.values) > 0
        ascends[self.bounds.offsets[1:-1] - 1] = True
        if not ascends.all() or (rows and np.diff(self.bounds.offsets).min() < 2):
            raise VerifyException("pd.prefill: each row's bounds ascend and are two or more")

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.wave)
        if self.chunk is not None:
            printer.print_string(f" chunk {self.chunk_tokens}")
        _print_placed(printer, self, "on")
        if self.bounds is not None:
            rows = ", ".join(map(str, self.bounds.rows()))
            printer.print_string(f" bounds [{rows}]")
        _print_types(printer, self.result_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties: dict[str, Attribute] = {}
        if parser.parse_optional_keyword("chunk"):
            properties["chunk"] = IntegerAttr(parser.parse_integer(allow_boolean=False), i64)
        placed = _parse_placed(parser, "on")
        if parser.parse_optional_keyword("bounds"):
            properties["bounds"] = ListsAttr.of(
                parser.parse_comma_separated_list(
                    parser.Delimiter.SQUARE,
                    lambda: parser.parse_comma_separated_list(
                        parser.Delimiter.SQUARE, parser.parse_integer
                    ),
                )
            )
        rows = _parse_kv_rows(parser)
        if placed is not None:
            properties["on"] = _placed_column(placed, rows)
        return cls.of(parser.resolve_operand(operand, WaveType(rows)), properties)

    @classmethod
    def of(cls, wave: SSAValue, properties: Mapping[str, Attribute] | None = None) -> Self:
        """The op that prefills `wave`."""
        return cls.create(
            operands=[wave], properties=properties or {}, result_types=[KVType(rows_of(wave))]
        )


def _parse_kv_rows(parser: Parser) -> int:
    """`: !pd.kv<N>`; N."""
    parser.parse_punctuation(":", " and the result's type")
    at = parser.pos
    kind = parser.parse_type()
    if not isinstance(kind, KVType):
        parser.raise_error(f"expected a !pd.kv, not {kind}", at)
    return kind.data


@irdl_op_definition
class JoinOp(IRDLOperation):
    """One table of several: `%all = pd.join %old, %new : !pd.kv<1>, !pd.kv<2>`"""

    name = "pd.join"
    parts = var_operand_def(KVType)
    kv = result_def(KVType)

    def verify_(self) -> None:
        total = sum(map(rows_of, self.parts))
        if rows_of(self.kv) != total:
            raise VerifyException(f"pd.join: {total} rows come in, {self.kv.type} goes out")

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_list(self.parts, printer.print_operand)
        if self.parts:
            _print_types(printer, self.operand_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        at = parser.pos
        parts = parser.parse_optional_undelimited_comma_separated_list(
            parser.parse_optional_unresolved_operand, parser.parse_unresolved_operand
        )
        types: list[Attribute] = []
        if parts:
            parser.parse_punctuation(":", " and the operands' types")
            types = [*parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)]
        for kind in types:
            if not isinstance(kind, KVType):
                parser.raise_error(f"pd.join takes !pd.kv, not {kind}", at)
        return cls.of(parser.resolve_operands(parts or [], types, at))

    @classmethod
    def of(cls, parts: Sequence[SSAValue]) -> Self:
        """The op that joins `parts`, in their order."""
        return cls.create(operands=parts, result_types=[KVType(sum(map(rows_of, parts)))])


@irdl_op_definition
class DecodeOp(IRDLOperation):
    """Sample a token a step for each row: `%end = pd.decode %all steps 16 on @d0 : !pd.kv<3>`

    on: the instance of each row. steps: at most; 0 or nothing: until they are done.
    """

    name = "pd.decode"
    kv = operand_def(KVType)
    steps = opt_prop_def(IntegerAttr)
    on = opt_prop_def(WordsAttr)
    end = result_def(KVType)

    @property
    def max_steps(self) -> int:
        """The bound in the source; 0 where there is none."""
        return self.steps.value.data if self.steps is not None else 0

    def verify_(self) -> None:
        if self.end.type != self.kv.type:
            raise VerifyException(f"pd.decode: gives {self.end.type} of {self.kv.type}")
        if self.max_steps < 0:
            raise VerifyException(f"pd.decode: steps {self.max_steps}; 0 (all) or more")
        _verify_placed(self, rows_of(self.kv))

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.kv)
        if self.steps is not None:
            printer.print_string(f" steps {self.max_steps}")
        _print_placed(printer, self, "on")
        _print_types(printer, self.result_types)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties: dict[str, Attribute] = {}
        if parser.parse_optional_keyword("steps"):
            properties["steps"] = IntegerAttr(parser.parse_integer(allow_boolean=False), i64)
        placed = _parse_placed(parser, "on")
        rows = _parse_kv_rows(parser)
        if placed is not None:
            properties["on"] = _placed_column(placed, rows)
        return cls.of(parser.resolve_operand(operand, KVType(rows)), properties)

    @classmethod
    def of(cls, kv: SSAValue, properties: Mapping[str, Attribute] | None = None) -> Self:
        """The op that decodes `kv`."""
        return cls.create(operands=[kv], properties=properties or {}, result_types=[kv.type])


_STEPS_SCALARS: Scalars = (
    Scalar("num_steps", "engine calls", 0, required=True),
    Scalar("max_step_tokens", "token budget of each", 0, required=True, least=1),
)
_CHUNK_COLUMNS = ("chunk_step", "chunk_row", "chunk_begin", "chunk_end")
_ESTIMATE_COLUMNS = ("step_us", "step_tokens", "step_blocks")


@irdl_op_definition
@declares(_STEPS_SCALARS)
@declares_rows(STEP_FIELDS)
class StepsOp(TableOp):
    """What the engine calls of an instance compute: chunks of prompts, and rows that decode.

    `pd.steps @p0 of %kv {num_steps = 2, max_step_tokens = 512} ["a": prompt 600 blocks 38]
      chunks {0: "a" [0, 512); 1: "a" [512, 600)} : !pd.kv<1>`

    A row decodes one token in each step from `begin` on, until its KV holds `until` tokens. The
    chunk that ends a prompt samples. step_us, step_tokens and step_blocks are what the compiler
    predicts of each step.
    """

    name = "pd.steps"
    FIELDS: ClassVar[Fields] = STEP_FIELDS
    SCALARS: ClassVar[Scalars] = _STEPS_SCALARS
    instance = prop_def(SymbolRefAttr)
    scheduled = var_operand_def()
    chunk_step = prop_def(ColumnAttr)
    chunk_row = prop_def(ColumnAttr)
    chunk_begin = prop_def(ColumnAttr)
    chunk_end = prop_def(ColumnAttr)
    step_us = opt_prop_def(ColumnAttr)
    step_tokens = opt_prop_def(ColumnAttr)
    step_blocks = opt_prop_def(ColumnAttr)

    @property
    def instance_name(self) -> str:
        return self.instance.root_reference.data

    @property
    def chunks(self) -> tuple[Ints, Ints, Ints, Ints]:
        """The columns step, row, begin, end."""
        return (
            self.chunk_step.array,
            self.chunk_row.array,
            self.chunk_begin.array,
            self.chunk_end.array,
        )

    def number(self, name: str) -> int:
        """`num_steps` or `max_step_tokens`."""
        attr = self.properties[name]
        assert isinstance(attr, IntegerAttr)
        return attr.value.data

    def verify_(self) -> None:
        super().verify_()
        verify_scalars(self, self.SCALARS)
        lengths = {len(column) for column in self.chunks}
        if len(lengths) > 1:
            raise VerifyException("pd.steps: the chunk columns have different lengths")
        step, row, begin, end = self.chunks
        self._verify_range("chunk_row", row, len(self.names))
        self._verify_range("chunk_step", step, self.number("num_steps"))
        if step.size and (np.diff(step) < 0).any():
            raise VerifyException("pd.steps: chunks must be in the order of their steps")
        if (bad := np.flatnonzero((begin < 0) | (end <= begin))).size:
            at = int(bad[0])
            raise VerifyException(
                f"pd.steps: {quoted(self.names[row[at]])}: chunk [{begin[at]}, {end[at]}) is empty"
            )

    def _verify_range(self, name: str, column: Ints, end: int) -> None:
        if column.size and not 0 <= int(column.min()) <= int(column.max()) < end:
            raise VerifyException(f"pd.steps: {name} must be in [0, {end})")

    def print(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self.instance_name)}")
        if self.scheduled:
            printer.print_string(" of ")
            printer.print_list(self.scheduled, printer.print_operand)
        print_scalars(printer, self, self.SCALARS)
        print_table(printer, self, self.FIELDS)
        self._print_chunks(printer)
        estimates = {n: self.properties[n] for n in _ESTIMATE_COLUMNS if n in self.properties}
        if estimates:
            printer.print_string(" estimates ")
            printer.print_attr_dict(estimates)
        if self.scheduled:
            _print_types(printer, self.operand_types)

    def _print_chunks(self, printer: Printer) -> None:
        if not len(self.chunk_step):
            return
        printer.print_string(" chunks ")
        if len(self.chunk_step) > READABLE_ROWS:
            printer.print_attr_dict({name: self.properties[name] for name in _CHUNK_COLUMNS})
            return
        printer.print_string("{")
        rows = zip(*(column.tolist() for column in self.chunks), strict=True)
        with printer.indented():
            for step, chunks in itertools.groupby(rows, key=lambda chunk: chunk[0]):
                cells = (f"{quoted(self.names[row])} [{b}, {e})" for _, row, b, e in chunks)
                printer.print_string(f"\n{step}: {', '.join(cells)};")
        printer.print_string(f"\n}}")

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        properties: dict[str, Attribute] = {"instance": SymbolRefAttr(parser.parse_symbol_name())}
        at = parser.pos
        operands = (
            parser.parse_comma_separated_list(
                parser.Delimiter.NONE, parser.parse_unresolved_operand
            )
            if parser.parse_optional_keyword("of")
            else []
        )
        properties |= parse_scalars(parser, cls.SCALARS) | parse_table(parser, cls.FIELDS)
        properties |= _parse_chunks(parser, properties)
        if parser.parse_optional_keyword("estimates"):
            properties |= parser.parse_optional_dictionary_attr_dict()
        types: Sequence[Attribute] = []
        if operands:
            parser.parse_punctuation(":", " and the operands' types")
            types = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
        return cls.create(
            operands=parser.resolve_operands(operands, types, at), properties=properties
        )


def _parse_chunks(parser: Parser, properties: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """The chunk columns: `chunks {0: "a" [0, 64), "b" [0, 32); 1: ...}`, or their attributes."""
    empty: dict[str, Attribute] = {name: ColumnAttr.of([]) for name in _CHUNK_COLUMNS}
    if not parser.parse_optional_keyword("chunks"):
        return empty
    text = str(parser.lexer.input.content[parser.pos : parser.pos + 64])
    if text[1:].lstrip().startswith("chunk_"):
        return empty | parser.parse_optional_dictionary_attr_dict()
    ids = properties["ids"]
    assert isinstance(ids, NamesAttr)
    chunks = Scanner(parser).chunks({name: row for row, name in enumerate(ids.data)})
    columns = np.array(chunks, np.int64).reshape(-1, 4).T
    return {
        name: ColumnAttr.of(np.ascontiguousarray(column))
        for name, column in zip(_CHUNK_COLUMNS, columns, strict=True)
    }


PD = Dialect(
    "pd",
    [
        GraphOp,
        YieldOp,
        PhaseOp,
        RequestsOp,
        ResidentOp,
        DecideOp,
        LeaveOp,
        PreemptOp,
        TransferOp,
        PrefillOp,
        JoinOp,
        DecodeOp,
        StepsOp,
    ],
    [WaveType, KVType, ColumnAttr, NamesAttr, WordsAttr, ListsAttr],
)
