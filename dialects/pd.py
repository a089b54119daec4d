"""The pd dialect: requests, decisions, prefill and decode, and the steps that compute them.

A graph's values are tables of requests. `!pd.wave<N>` are N requests whose prompts are to be
computed; `!pd.kv<N>` are N requests whose KV exists and which decode. The order of the text does
not matter; `order` sorts it and finds cycles. Above the dataflow (what is computed, where) stand
the `pd.steps` (when): they use values and make none, so that a schedule never makes a cycle.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from xdsl.dialects.builtin import (
    FlatSymbolRefAttrConstr,
    IntegerAttr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
    i64,
)
from xdsl.ir import Attribute, Block, Data, Dialect, Operation, Region, SSAValue, TypeAttribute
from xdsl.irdl import (
    base,
    eq,
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
from xdsl.parser import AttrParser, Parser, UnresolvedOperand
from xdsl.printer import Printer
from xdsl.traits import HasParent, IsolatedFromAbove, IsTerminator, SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import (
    ColumnAttr,
    Ints,
    ListsAttr,
    NamesAttr,
    WordsAttr,
    parse_int64,
    parse_lists,
    quoted,
    shortened,
)
from sagec.dialects.rows import (
    READABLE_ROWS,
    Field,
    Fields,
    Kind,
    Scanner,
    brief,
    column_or,
    declares_rows,
    has_sound_codes,
    parse_symbol,
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
    opens_scalars,
    parse_scalars,
    print_scalars,
    verify_scalars,
)
from sagec.dialects.text import TextOp, parse_operands, resolve_typed, type_above
from sagec.runtime.plan import MODES

UNBOUNDED = 2**31 - 1
"""generate and remaining of a request that goes on until it stops."""

PHASES = ("prefill", "decode")
VERDICTS = ("admit", "defer", "reject", "preempt", "swap")
ADMIT, DEFER, REJECT, PREEMPT, SWAP = range(5)
_LEAVES = "defer, reject, preempt or swap"


MAX_ROWS = 1 << 24
"""The most requests of a value: a type of more is a slip of the pen, and columns would not fit."""


class SizedType(Data[int], TypeAttribute):
    """A type that says how many requests its value holds."""

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> int:
        with parser.in_angle_brackets():
            at = parser.pos
            rows = parser.parse_integer(allow_boolean=False, allow_negative=False)
            if rows > MAX_ROWS:
                parser.raise_error(
                    f"{shortened(rows)} requests are too many; {MAX_ROWS} at most", at
                )
            return rows

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
_I64 = IntegerAttr.constr(type=eq(i64))


def rows_of(value: SSAValue) -> int:
    """How many requests a value of the dialect holds."""
    assert isinstance(value.type, SizedType)
    return value.type.data


_CLIENT: Fields = (
    Field("priority", Kind.INT, "smaller goes first"),
    Field("ttft", Kind.INT, "promised time to the first token, us; 0: none", least=0),
    Field("tpot", Kind.INT, "promised time for each token after it, us; 0: none", least=0),
    Field("model", Kind.SYMBOL, "the model it asks for; none: the only one"),
    Field("tenant", Kind.WORD, "who pays"),
    Field("session", Kind.WORD, "conversation it belongs to"),
    Field("adapter", Kind.WORD, "LoRA adapter"),
)

REQUEST_FIELDS: Fields = (
    Field(
        "prompt", Kind.INT, "tokens to compute before the first is sampled", required=True, least=1
    ),
    Field(
        "generate", Kind.INT, "tokens to sample at most; none: until it stops", UNBOUNDED, least=1
    ),
    Field("arrived", Kind.INT, "when, us", least=0),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never", least=0),
    *_CLIENT,
    Field("samples", Kind.INT, "outputs of one prompt (n of the OpenAI API)", 1, least=1),
    Field("top_k", Kind.INT, "likeliest tokens that it is sampled among; 0: all", least=0),
    Field("prefix", Kind.LIST, "hashes of its leading KV blocks"),
    Field("cached", Kind.INT, "leading tokens whose KV the prefix cache has", least=0),
    Field("computed", Kind.INT, "leading tokens whose KV `on` holds already", least=0),
    Field("chunk", Kind.INT, "most tokens of it in a step; 0: no bound", least=0),
    Field("on", Kind.SYMBOL, "instance that computes its prompt"),
    Field("decode_on", Kind.SYMBOL, "instance that decodes it"),
    Field("text", Kind.TEXT, "the prompt itself, where it is known"),
)

RESIDENT_FIELDS: Fields = (
    Field("on", Kind.SYMBOL, "instance that holds its KV", required=True, header=True),
    Field("context", Kind.INT, "tokens of KV it has", required=True, least=1),
    Field(
        "remaining", Kind.INT, "tokens to sample at most; none: until it stops", UNBOUNDED, least=0
    ),
    Field("arrived", Kind.INT, "when, us", least=0),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never", least=0),
    *_CLIENT,
    Field("arriving", Kind.FLAG, "its KV is still on the way"),
)

DECIDE_FIELDS: Fields = (
    Field("verdict", Kind.CHOICE, "what the strategy says", required=True, choices=VERDICTS),
    Field("rank", Kind.INT, "order among the admitted, from 0", least=0),
    Field("prefill_on", Kind.SYMBOL, "instance for its prompt, if the strategy cares"),
    Field("decode_on", Kind.SYMBOL, "instance for its output, if the strategy cares"),
    Field("chunk", Kind.INT, "most tokens of it in a step; 0: no bound", least=0),
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

TURN_FIELDS: Fields = (
    Field("steps", Kind.INT, "steps it may compute; 0: none", required=True, least=0),
    Field("because", Kind.WORD, "why, for people"),
)

TRANSFER_FIELDS: Fields = (
    Field("source", Kind.SYMBOL, "instance the KV leaves", required=True, header=True),
    Field("target", Kind.SYMBOL, "instance it goes to", required=True, header=True),
    Field("bytes", Kind.INT, "size of the KV", least=0),
    Field("us", Kind.INT, "predicted time, with what shares the links", least=0),
    Field("via", Kind.WORD, "the devices and switches passed"),
)

STEP_FIELDS: Fields = (
    Field(
        "prompt", Kind.INT, "tokens to compute before the next is sampled", required=True, least=0
    ),
    Field("computed", Kind.INT, "tokens of KV when the steps begin", least=0),
    Field("cached", Kind.INT, "leading tokens taken from the prefix cache", least=0),
    Field("blocks", Kind.INT, "KV blocks reserved for all the steps", required=True, least=0),
    Field("deadline", Kind.INT, "when its next token is late, us; 0: never", least=0),
    Field("begin", Kind.INT, "first step it may decode in", least=0),
    Field("until", Kind.INT, "tokens of KV after its last decode; 0: it does not decode", least=0),
    Field("source", Kind.SYMBOL, "instance its KV comes from"),
    Field("target", Kind.SYMBOL, "instance its KV goes to"),
)


class TableOp(TextOp):
    """An op whose table has the fields FIELDS and a row for each of `ids`, which names a ROWS."""

    FIELDS: ClassVar[Fields] = ()
    ROWS: ClassVar[str] = "request"

    @property
    def names(self) -> tuple[str, ...]:
        """The ids, a row each."""
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
            raise VerifyException(f"{self.name}: 'ids' must be a #pd.names, a name a row")
        verify_rows(self, self.FIELDS, self.names)
        self._verify_names()

    def _verify_names(self) -> None:
        """Raise where something is said twice."""
        verify_unique(self, self.names, self.ROWS)


def _print_types(printer: Printer, types: Sequence[Attribute]) -> None:
    printer.print_string(" : ")
    printer.print_list(types, printer.print_attribute)


def _check_type(parser: Parser, derived: Attribute) -> None:
    """A type in the text, which may be left out, must be the one that the rows give."""
    if parser.parse_optional_punctuation(":"):
        at = parser.pos
        if (written := parser.parse_type()) != derived:
            parser.raise_error(f"the type is {written}, but the rows make it {derived}", at)


_GRAPH_SCALARS: Scalars = (
    Scalar("policy", "strategy that decided", ""),
    Scalar("mode", "how phases share an instance", "hybrid", choices=MODES),
    Scalar("now", "the loop's clock, us", 0),
    Scalar("round", "number of the decision", 0),
    Scalar("horizon", "steps to plan; 0: all", 0),
    Scalar("step_prompt_tokens", "most prompt tokens of a step; 0: as its instance takes", 0),
)


@irdl_op_definition
@declares(_GRAPH_SCALARS)
class GraphOp(TextOp):
    """A serving graph: one decision of a strategy, or a whole file of requests.

    `pd.graph @round_42 {policy = "fifo", mode = "hybrid", now = 1834000, horizon = 16} {
      %w = pd.requests ["chat-1": prompt 1024]
      %kv = pd.prefill %w
      pd.yield %kv
    }`

    A graph that gives nothing need not say pd.yield.

    What passes note for people stands behind it: `attributes {placement = "..."}`.
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
        """What the graph says of a number, e.g. `now` or `horizon`; 0 where it does not."""
        attr = self.properties.get(name)
        return attr.value.data if isinstance(attr, IntegerAttr) else 0

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        _verify_body(self.body, f"pd.graph {symbol(self.symbol)}")

    def print_text(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self.symbol)}")
        print_scalars(printer, self, self.SCALARS)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        properties: dict[str, Attribute] = {
            "sym_name": StringAttr(parse_symbol(parser, "the graph's name"))
        }
        if opens_scalars(parser):
            properties |= parse_scalars(parser, cls.SCALARS)
        return cls.create(properties=properties, regions=[_parse_body(parser)])


def _verify_body(body: Region, what: str) -> None:
    if body.block.args:
        raise VerifyException(
            f"{what} has block arguments; requests come in by pd.requests and pd.resident"
        )
    if not isinstance(body.block.last_op, YieldOp):
        raise VerifyException(f"{what} must end with pd.yield")


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
class PhaseOp(TextOp):
    """A sub-graph of one phase, with the resources that it needs.

    `%kv = pd.phase prefill {compute_tokens = 1120} {
      %p = pd.prefill %w : !pd.kv<2>
      pd.yield %p
    } : !pd.kv<2>`
    """

    name = "pd.phase"
    SCALARS: ClassVar[Scalars] = _PHASE_SCALARS
    phase = prop_def(StringAttr)
    outs = var_result_def(KVType)
    body = region_def("single_block")
    traits = traits_def(HasParent(GraphOp))

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        if self.phase.data not in PHASES:
            raise VerifyException(
                f"pd.phase: '{self.phase.data}' is no phase; one of: {', '.join(PHASES)}"
            )
        _verify_body(self.body, "pd.phase")
        last = self.body.block.last_op
        assert last is not None
        given, taken = [str(t) for t in last.operand_types], [str(t) for t in self.result_types]
        if given != taken:
            raise VerifyException(
                f"pd.phase yields {', '.join(given) or 'nothing'}, but its results are "
                f"{', '.join(taken) or 'none'}; both must be the same"
            )

    def print_text(self, printer: Printer) -> None:
        printer.print_string(f" {self.phase.data}")
        print_scalars(printer, self, self.SCALARS)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False)
        if self.outs:
            _print_types(printer, self.result_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        phase = parser.parse_keyword_in(PHASES, " as the phase")
        properties: dict[str, Attribute] = {"phase": StringAttr(phase)}
        if opens_scalars(parser):
            properties |= parse_scalars(parser, cls.SCALARS)
        body = _parse_body(parser)
        types: list[Attribute] = []
        if parser.parse_optional_punctuation(":"):
            types = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
        return cls.create(properties=properties, regions=[body], result_types=types)


@irdl_op_definition
class YieldOp(TextOp):
    """The values that a graph or a phase gives: `pd.yield %end : !pd.kv<3>`"""

    name = "pd.yield"
    values = var_operand_def()
    traits = traits_def(IsTerminator(), HasParent(GraphOp, PhaseOp))

    def print_text(self, printer: Printer) -> None:
        if self.values:
            printer.print_string(" ")
            printer.print_list(self.values, printer.print_operand)
            _print_types(printer, self.operand_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        begin = str(parser.lexer.input.content[parser.pos : parser.pos + 1])
        operands = parse_operands(parser) if begin == "%" else []
        return cls.create(operands=resolve_typed(parser, operands) if operands else [])


class _SourceOp(TableOp):
    """An op that brings requests into a graph: `name TABLE : type`."""

    RESULT: ClassVar[type[SizedType]] = WaveType

    def verify_(self) -> None:
        super().verify_()
        if rows_of(self.results[0]) != len(self.names):
            raise VerifyException(
                f"{self.name}: the result is {self.results[0].type}, but {len(self.names)} rows "
                f"make it {self.RESULT(len(self.names))}"
            )

    def print_text(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)
        _print_types(printer, self.result_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
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
        prompt, held = self.column("prompt"), self.column("computed") + self.column("cached")
        # Columns are 0 or more each, so that a sum below 0 has overflowed.
        if (bad := np.flatnonzero((held < 0) | (held >= prompt))).size:
            row = int(bad[0])
            computed, cached = self.column("computed")[row], self.column("cached")[row]
            raise VerifyException(
                f"pd.requests: {quoted(self.names[row])}: computed {computed} and cached {cached} "
                f"of prompt {prompt[row]}; the last token is always computed, for its logits"
            )


@irdl_op_definition
@declares_rows(RESIDENT_FIELDS)
class ResidentOp(_SourceOp):
    """Requests that decode already: `%r = pd.resident on @d0 ["a": context 811 remaining 40]`"""

    name = "pd.resident"
    FIELDS: ClassVar[Fields] = RESIDENT_FIELDS
    RESULT: ClassVar[type[SizedType]] = KVType
    kv = result_def(KVType)


class OverOp(TableOp):
    """An op that says something of some rows of its operand: `name %x TABLE : type of %x`."""

    GIVES: ClassVar[bool] = True

    def verify_(self) -> None:
        super().verify_()
        operand = self.operands[0]
        if (named := len(set(self.names))) > rows_of(operand):
            raise VerifyException(
                f"{self.name}: {named} rows say something of {operand.type}; "
                f"there are {rows_of(operand)}"
            )
        given, derived = self.result_types, self._result_type(operand, self.properties)
        if self.GIVES and given[0] != derived:
            raise VerifyException(
                f"{self.name}: of {operand.type} it gives {derived}, not {given[0]}"
            )

    def print_text(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.operands[0])
        print_table(printer, self, self.FIELDS)
        _print_types(printer, self.operand_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties = parse_table(parser, cls.FIELDS)
        (value,) = resolve_typed(parser, [operand])
        if not isinstance(value.type, SizedType):
            parser.raise_error(
                f"{cls.name} takes a !pd.wave or a !pd.kv, not {value.type}", operand.span
            )
        return cls.over(value, properties)

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


@irdl_op_definition
@declares_rows(LEAVE_FIELDS)
class LeaveOp(TableOp):
    """Requests that this round does nothing for, with the reason: `pd.leave ["a": defer]`"""

    name = "pd.leave"
    FIELDS: ClassVar[Fields] = LEAVE_FIELDS

    def verify_(self) -> None:
        super().verify_()
        verdicts = self.column("verdict")
        if (admitted := np.flatnonzero(verdicts == ADMIT)).size:
            name = quoted(self.names[int(admitted[0])])
            raise VerifyException(f"pd.leave: {name} is admitted; who leaves is {_LEAVES}")

    def print_text(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        return cls.create(properties=parse_table(parser, cls.FIELDS))


@irdl_op_definition
@declares_rows(TURN_FIELDS)
class TurnsOp(TableOp):
    """Instances that compute by turns: `pd.turns ["a0": steps 40, "b0": steps 0 because "a0's"]`

    A row names an instance. It computes no more steps than `steps`; with 0 it computes nothing, its
    residents keep their KV, and nothing new is placed there unless the source says so. Instances
    without a row compute as the horizon says.
    """

    name = "pd.turns"
    FIELDS: ClassVar[Fields] = TURN_FIELDS
    ROWS: ClassVar[str] = "instance"

    def print_text(self, printer: Printer) -> None:
        print_table(printer, self, self.FIELDS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
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
        verdicts = self.column("verdict")
        if (bad := np.flatnonzero(~np.isin(verdicts, (PREEMPT, SWAP)))).size:
            row = int(bad[0])
            raise VerifyException(
                f"pd.preempt: {quoted(self.names[row])}: {VERDICTS[verdicts[row]]}; "
                "it is preempt or swap"
            )


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
    if (one := attr.only()) is not None:
        printer.print_string(symbol(one))
    elif len(attr) > READABLE_ROWS or not has_sound_codes(attr):
        printer.print_attribute(attr)
    else:
        printer.print_string(f"[{', '.join(map(symbol, attr.rows()))}]")


def _parse_placed(parser: Parser, name: str) -> str | Attribute | None:
    """What `_print_placed` prints: an instance for all, a column, or None where it is not there."""
    if not parser.parse_optional_keyword(name):
        return None
    at = parser.pos
    names = parser.parse_optional_comma_separated_list(
        parser.Delimiter.SQUARE, lambda: parse_symbol(parser, "an instance")
    )
    if names is not None:
        return WordsAttr.from_rows(names)
    if (one := parser.parse_optional_symbol_name()) is not None:
        return one.data
    if not isinstance(attr := parser.parse_optional_attribute(), WordsAttr):
        parser.raise_error(
            f"expected @instance, [@a, @b, ...] or #pd.words<...> after '{name}'", at
        )
    return attr


def _placed_column(placed: str | Attribute, rows: int) -> Attribute:
    return WordsAttr.same(placed, rows) if isinstance(placed, str) else placed


def _verify_placed(op: Operation, rows: int) -> None:
    attr = op.properties.get("on")
    if attr is None:
        return
    if not isinstance(attr, WordsAttr):
        raise VerifyException(f"{op.name}: 'on' must be a #pd.words, not {brief(attr)}")
    if len(attr) != rows:
        raise VerifyException(
            f"{op.name}: 'on' names instances for {len(attr)} rows; there are {rows}"
        )
    if not has_sound_codes(attr):
        raise VerifyException(
            f"{op.name}: 'on' has codes outside [0, {len(attr.words)}), the number of its words"
        )


def _parse_count(parser: Parser, name: str) -> IntegerAttr | None:
    """`name 16`, if it is there."""
    if not parser.parse_optional_keyword(name):
        return None
    return IntegerAttr(parse_int64(parser), i64)


@irdl_op_definition
class PrefillOp(TextOp):
    """Compute the prompts of a wave and sample each one's first token.

    `%kv = pd.prefill %go chunk 64 on @p0 bounds [[0, 64, 96], [0, 64, 128]] : !pd.kv<2>`

    on: the instance of each row. chunk: most tokens of a request in one step. bounds: for each
    row where its chunks begin and end; chunk-prefill writes them.
    """

    name = "pd.prefill"
    wave = operand_def(WaveType)
    chunk = opt_prop_def(_I64)
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
            raise VerifyException(
                f"pd.prefill: of {self.wave.type} it gives {KVType(rows)}, not {self.kv.type}"
            )
        if self.chunk is not None and self.chunk_tokens < 1:
            raise VerifyException(f"pd.prefill: chunk {self.chunk_tokens}; 1 or more")
        _verify_placed(self, rows)
        if self.bounds is None:
            return
        if len(self.bounds) != rows or not self.bounds.is_sound():
            raise VerifyException(
                f"pd.prefill: bounds of {len(self.bounds)} rows; there are {rows}"
            )
        for row, bounds in enumerate(self.bounds.rows()):
            if len(bounds) < 2 or bounds[0] < 0 or sorted(set(bounds)) != bounds:
                raise VerifyException(
                    f"pd.prefill: row {row} has bounds {bounds}; they ascend and are two or more: "
                    "where its chunks begin, and the end"
                )

    def print_text(self, printer: Printer) -> None:
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
    def parse_text(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties: dict[str, Attribute] = {}
        if (chunk := _parse_count(parser, "chunk")) is not None:
            properties["chunk"] = chunk
        placed = _parse_placed(parser, "on")
        if parser.parse_optional_keyword("bounds"):
            with parser.in_square_brackets():
                properties["bounds"] = ListsAttr.of(parse_lists(parser))
        rows = _parse_kv_rows(parser, operand)
        if placed is not None:
            properties["on"] = _placed_column(placed, rows)
        return cls.of(parser.resolve_operand(operand, WaveType(rows)), properties)

    @classmethod
    def of(cls, wave: SSAValue, properties: Mapping[str, Attribute] | None = None) -> Self:
        """The op that prefills `wave`."""
        return cls.create(
            operands=[wave], properties=properties or {}, result_types=[KVType(rows_of(wave))]
        )


def _parse_kv_rows(parser: Parser, operand: UnresolvedOperand) -> int:
    """N of the result's type `: !pd.kv<N>`, which a value that stands above makes unnecessary."""
    at = parser.pos
    if parser.parse_optional_punctuation(":"):
        if not isinstance(written := parser.parse_type(), KVType):
            parser.raise_error(f"the result is a !pd.kv, not {written}", at)
        return written.data
    kind = type_above(parser, operand)
    if not isinstance(kind, SizedType):
        parser.raise_error(f"expected a !pd.wave or a !pd.kv, not {kind}", operand.span)
    return kind.data


@irdl_op_definition
class JoinOp(TextOp):
    """One table of several: `%all = pd.join %old, %new : !pd.kv<1>, !pd.kv<2>`

    A join of nothing is an empty table: `%all = pd.join none`
    """

    name = "pd.join"
    parts = var_operand_def(KVType)
    kv = result_def(KVType)

    def verify_(self) -> None:
        total = sum(map(rows_of, self.parts))
        if rows_of(self.kv) != total:
            raise VerifyException(
                f"pd.join: of {total} rows it gives {KVType(total)}, not {self.kv.type}"
            )

    def print_text(self, printer: Printer) -> None:
        if not self.parts:
            printer.print_string(" none")
            return
        printer.print_string(" ")
        printer.print_list(self.parts, printer.print_operand)
        _print_types(printer, self.operand_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        if parser.parse_optional_keyword("none"):
            return cls.of([])
        at = parser.pos
        parts = resolve_typed(parser, parse_operands(parser))
        for part in parts:
            if not isinstance(part.type, KVType):
                parser.raise_error(f"pd.join takes !pd.kv, not {part.type}", at)
        return cls.of(parts)

    @classmethod
    def of(cls, parts: Sequence[SSAValue]) -> Self:
        """The op that joins `parts`, in their order."""
        return cls.create(operands=parts, result_types=[KVType(sum(map(rows_of, parts)))])


@irdl_op_definition
class DecodeOp(TextOp):
    """Sample a token a step for each row: `%end = pd.decode %all steps 16 on @d0 : !pd.kv<3>`

    on: the instance of each row. steps: at most; 0 or nothing: until they are done.
    """

    name = "pd.decode"
    kv = operand_def(KVType)
    steps = opt_prop_def(_I64)
    on = opt_prop_def(WordsAttr)
    end = result_def(KVType)

    @property
    def max_steps(self) -> int:
        """The bound in the source; 0 where there is none."""
        return self.steps.value.data if self.steps is not None else 0

    def verify_(self) -> None:
        if self.end.type != self.kv.type:
            raise VerifyException(
                f"pd.decode: of {self.kv.type} it gives the same type, not {self.end.type}"
            )
        if self.max_steps < 0:
            raise VerifyException(f"pd.decode: steps {self.max_steps}; 0 (all) or more")
        _verify_placed(self, rows_of(self.kv))

    def print_text(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.kv)
        if self.steps is not None:
            printer.print_string(f" steps {self.max_steps}")
        _print_placed(printer, self, "on")
        _print_types(printer, self.result_types)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        operand = parser.parse_unresolved_operand()
        properties: dict[str, Attribute] = {}
        if (steps := _parse_count(parser, "steps")) is not None:
            properties["steps"] = steps
        placed = _parse_placed(parser, "on")
        rows = _parse_kv_rows(parser, operand)
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
    instance = prop_def(FlatSymbolRefAttrConstr)
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

    @classmethod
    def none(cls, instance: str, max_step_tokens: int) -> Self:
        """The steps of an instance that computes nothing."""
        columns: dict[str, Attribute] = {name: ColumnAttr.of([]) for name in _CHUNK_COLUMNS}
        return cls.create(
            properties={
                "instance": SymbolRefAttr(instance),
                "num_steps": IntegerAttr(0, i64),
                "max_step_tokens": IntegerAttr(max_step_tokens, i64),
                "ids": NamesAttr(()),
                **columns,
            }
        )

    def number(self, name: str) -> int:
        """`num_steps` or `max_step_tokens`."""
        attr = self.properties[name]
        assert isinstance(attr, IntegerAttr)
        return attr.value.data

    def verify_(self) -> None:
        super().verify_()
        verify_scalars(self, self.SCALARS)
        self._verify_chunks()
        for name in _ESTIMATE_COLUMNS:
            column = self.properties.get(name)
            if isinstance(column, ColumnAttr) and len(column) != self.number("num_steps"):
                raise VerifyException(
                    f"pd.steps: {name} has {len(column)} rows; it has one a step, "
                    f"{self.number('num_steps')}"
                )

    def _verify_chunks(self) -> None:
        if len({len(column) for column in self.chunks}) > 1:
            lengths = ", ".join(str(len(column)) for column in self.chunks)
            raise VerifyException(f"pd.steps: chunk columns of {lengths} rows; all have the same")
        step, row, begin, end = self.chunks
        self._verify_range("chunk_row", row, len(self.names))
        self._verify_range("chunk_step", step, self.number("num_steps"))
        if step.size and (np.diff(step) < 0).any():
            raise VerifyException("pd.steps: chunks must be in the order of their steps")
        self._refuse_chunk((begin < 0) | (end <= begin), "is empty; begin is before end")
        self._refuse_chunk(end > self.column("prompt")[row], "ends behind its prompt")
        order = np.argsort(row, kind="stable")
        again = np.flatnonzero(row[order][1:] == row[order][:-1]) + 1
        overlaps = begin[order[again]] < end[order[again - 1]]
        self._refuse_chunk(
            np.isin(np.arange(len(row)), order[again[overlaps]]),
            "begins before the end of the chunk before it",
        )

    def _refuse_chunk(self, wrong: np.ndarray[Any, np.dtype[np.bool_]], why: str) -> None:
        if not wrong.any():
            return
        at = int(wrong.argmax())
        step, row, begin, end = (int(column[at]) for column in self.chunks)
        raise VerifyException(
            f"pd.steps: step {step}: {quoted(self.names[row])}: chunk [{begin}, {end}) {why}"
        )

    def _verify_range(self, name: str, column: Ints, end: int) -> None:
        if column.size and not 0 <= int(column.min()) <= int(column.max()) < end:
            bad = column[(column < 0) | (column >= end)][0]
            raise VerifyException(f"pd.steps: {name} {bad}; it is in [0, {end})")

    def print_text(self, printer: Printer) -> None:
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

    def _has_readable_chunks(self) -> bool:
        """Whether text can show them: each is of a row that the table above has."""
        step, row, begin, end = self.chunks
        if not len(step) == len(row) == len(begin) == len(end):
            return False
        return 0 <= int(row.min()) <= int(row.max()) < len(self.names)

    def _print_chunks(self, printer: Printer) -> None:
        if not len(self.chunk_step):
            return
        printer.print_string(" chunks ")
        if len(self.chunk_step) > READABLE_ROWS or not self._has_readable_chunks():
            printer.print_attr_dict({name: self.properties[name] for name in _CHUNK_COLUMNS})
            return
        printer.print_string("{")
        rows = zip(*(column.tolist() for column in self.chunks), strict=True)
        with printer.indented():
            for step, chunks in itertools.groupby(rows, key=lambda chunk: chunk[0]):
                cells = (f"{quoted(self.names[row])} [{b}, {e})" for _, row, b, e in chunks)
                printer.print_string(f"\n{step}: {', '.join(cells)};")
        printer.print_string("\n}")

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        instance = SymbolRefAttr(parse_symbol(parser, "an instance"))
        properties: dict[str, Attribute] = {"instance": instance}
        operands = parse_operands(parser) if parser.parse_optional_keyword("of") else []
        properties |= parse_scalars(parser, cls.SCALARS) | parse_table(parser, cls.FIELDS)
        properties |= _parse_chunks(parser, properties)
        if parser.parse_optional_keyword("estimates"):
            properties |= _parse_columns(parser, _ESTIMATE_COLUMNS)
        return cls.create(
            operands=resolve_typed(parser, operands) if operands else [], properties=properties
        )


def _parse_chunks(parser: Parser, properties: Mapping[str, Attribute]) -> dict[str, Attribute]:
    """The chunk columns: `chunks {0: "a" [0, 64), "b" [0, 32); 1: ...}`, or their attributes."""
    empty: dict[str, Attribute] = {name: ColumnAttr.of([]) for name in _CHUNK_COLUMNS}
    if not parser.parse_optional_keyword("chunks"):
        return empty
    if opens_scalars(parser):
        return empty | _parse_columns(parser, _CHUNK_COLUMNS)
    ids = properties["ids"]
    assert isinstance(ids, NamesAttr)
    chunks = _Chunks(parser).scan({name: row for row, name in enumerate(ids.data)})
    columns = np.array(chunks, np.int64).reshape(-1, 4).T
    return {
        name: ColumnAttr.of(np.ascontiguousarray(column))
        for name, column in zip(_CHUNK_COLUMNS, columns, strict=True)
    }


def _parse_columns(parser: Parser, names: Sequence[str]) -> dict[str, Attribute]:
    """`{name = #pd.column<...>, ...}` of some of `names`."""
    at = parser.pos
    columns = parser.parse_optional_dictionary_attr_dict()
    for name, attr in columns.items():
        if name not in names:
            parser.raise_error(f"no column '{name[:40]}' here; there are: {', '.join(names)}", at)
        if not isinstance(attr, ColumnAttr):
            parser.raise_error(f"'{name}' must be a #pd.column, not {brief(attr)}", at)
    return columns


class _Chunks(Scanner):
    """Reads `{0: "a" [0, 64), "b" [0, 32); 1: ...}`."""

    def scan(self, rows: Mapping[str, int]) -> list[tuple[int, int, int, int]]:
        """The chunks as (step, row, begin, end); rows are the numbers of the ids."""
        chunks: list[tuple[int, int, int, int]] = []
        self.expect("{")
        self.next()
        while self.value != "}":
            step = self.integer("a step's number or '}'")
            self.expect(":")
            chunks.append((step, *self._chunk(rows)))
            while self.next() == ",":
                chunks.append((step, *self._chunk(rows)))
            if self.value == ";":
                self.next()
            elif self.value != "}":
                self.expected("',', ';' or '}' after a chunk")
        self.finish()
        return chunks

    def _chunk(self, rows: Mapping[str, int]) -> tuple[int, int, int]:
        self.next()
        if (row := rows.get(self.string("a request's id"))) is None:
            self.error(f"no row {self.value[:40]} in the table above")
        self.expect("[")
        self.next()
        begin = self.integer("where the chunk begins")
        self.expect(",")
        self.next()
        end = self.integer("where the chunk ends")
        self.expect(")")
        return row, begin, end


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
        TurnsOp,
        PreemptOp,
        TransferOp,
        PrefillOp,
        JoinOp,
        DecodeOp,
        StepsOp,
    ],
    [WaveType, KVType, ColumnAttr, NamesAttr, WordsAttr, ListsAttr],
)
