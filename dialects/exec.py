"""The exec dialect: the operators that one step of an instance computes, layer by layer.

A graph is one step: the tokens of its prompts' chunks and of its decodes, through a model, on the
devices of an instance. Values are tensors on a device, or rather on each rank of a tensor parallel
group: the ranks do the same on their shares, and the graph shows the first of them. Weights are no
values; an op's `bytes` count them.

Ops of one stream run in the order of the text; ops of different streams run beside each other. What
one stream made another takes only through `exec.wait`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from xdsl.dialects.builtin import (
    ArrayAttr,
    FlatSymbolRefAttrConstr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
)
from xdsl.ir import Attribute, Block, Data, Dialect, Operation, Region, SSAValue, TypeAttribute
from xdsl.irdl import (
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
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

from sagec.dialects.columns import ColumnAttr, Ints
from sagec.dialects.kv import TIERS
from sagec.dialects.rows import parse_symbol, symbol
from sagec.dialects.scalars import (
    Scalar,
    Scalars,
    Value,
    declares,
    opens_scalars,
    parse_scalars,
    print_scalars,
    properties_of,
    scalar_of,
    verify_scalars,
)
from sagec.dialects.text import TextOp, parse_operands, resolve_typed

COMPUTE, COMM, COPY = STREAMS = ("compute", "comm", "copy")
"""What goes on at the same time on one device: arithmetic, messages to others, copies of KV."""

PHASES = ("prefill", "decode", "hybrid")

BYTES_OF = {"f32": 4, "f16": 2, "bf16": 2, "fp8": 1, "int8": 1, "int4": 0.5, "i32": 4}
"""The size of an element, by type."""

_COSTS: Scalars = (
    Scalar("stream", "what it runs beside", COMPUTE, choices=STREAMS),
    Scalar("layer", "the transformer layer that it belongs to", 0),
    Scalar("time_us", "how long it should take", 0.0),
    Scalar("flops", "arithmetic of one rank", 0.0),
    Scalar("bytes", "memory that one rank reads and writes, or sends", 0.0),
    Scalar("in_place", "1 where results take the places of operands", 0, most=1),
)
"""What every operator may say."""

_HEADS: Scalars = (
    Scalar("heads", "query heads of one rank", 0, required=True, least=1),
    Scalar("kv_heads", "key and value heads of one rank", 0, required=True, least=1),
    Scalar("head_dim", "width of a head", 0, required=True, least=1),
)

_FIRST = Scalar("first", "the first row of the operand that it takes", 0)


@dataclass(frozen=True)
class Tensor:
    """A tensor's shape, its element's type and the device where it is."""

    shape: tuple[int, ...]
    dtype: str
    device: str

    @property
    def num_bytes(self) -> int:
        """Its size.

        >>> Tensor((3, 5), "bf16", "g0").num_bytes
        30
        """
        return math.ceil(math.prod(self.shape) * BYTES_OF[self.dtype])


@irdl_attr_definition
class TensorType(Data[Tensor], TypeAttribute):
    """A tensor on a device: `!exec.tensor<[16, 4096], bf16, @g0>`."""

    name = "exec.tensor"

    @classmethod
    def of(cls, shape: Sequence[int], dtype: str, device: str) -> TensorType:
        """The type of such a tensor."""
        return cls(Tensor(tuple(map(int, shape)), dtype, device))

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Tensor:
        with parser.in_angle_brackets():
            shape = parser.parse_comma_separated_list(
                parser.Delimiter.SQUARE,
                lambda: parser.parse_integer(allow_boolean=False, allow_negative=False),
                " in the shape",
            )
            parser.parse_punctuation(",", " and the elements' type")
            at = parser.pos
            dtype = parser.parse_identifier(" as the elements' type")
            if dtype not in BYTES_OF:
                parser.raise_error(f"no type {dtype!r}; one of: {', '.join(BYTES_OF)}", at)
            parser.parse_punctuation(",", " and the device")
            return Tensor(tuple(shape), dtype, parser.parse_symbol_name().data)

    def print_parameter(self, printer: Printer) -> None:
        tensor = self.data
        shape = ", ".join(map(str, tensor.shape))
        printer.print_string(f"<[{shape}], {tensor.dtype}, {symbol(tensor.device)}>")


def tensor_of(value: SSAValue) -> Tensor:
    """The tensor that a value is."""
    assert isinstance(value.type, TensorType)
    return value.type.data


class OperatorOp(TextOp):
    """An operator: `%s = exec.sample %l {time_us = 4.0} -> !exec.tensor<[16], i32, @g0>`.

    The types of operands may stand before the arrow, behind a colon; they must where nothing above
    says them. Subclasses say in SCALARS and COLUMNS what else they are told, and in `check` what
    shapes fit.
    """

    SCALARS: ClassVar[Scalars] = _COSTS
    COLUMNS: ClassVar[tuple[str, ...]] = ()
    MOVES: ClassVar[bool] = False  # whether results may be on another device than operands
    offsets = opt_prop_def(ColumnAttr)

    @property
    def offset_bytes(self) -> Ints | None:
        """Where each result lies in the memory of its device; None where that is not planned."""
        attr = self.properties.get("offsets")
        return attr.array if isinstance(attr, ColumnAttr) else None

    @property
    def stream_name(self) -> str:
        """The stream that it runs on."""
        return str(self.scalar("stream"))

    @property
    def layer_number(self) -> int | None:
        """The layer that it belongs to; None: to none, as the embedding."""
        return int(self.scalar("layer")) if "layer" in self.properties else None

    @property
    def estimated_us(self) -> float:
        """How long it should take."""
        return float(self.scalar("time_us"))

    @property
    def device(self) -> str:
        """Where it runs: where its first operand is, or else its first result."""
        return tensor_of((*self.operands, *self.results)[0]).device

    def scalar(self, name: str) -> Value:
        """What the op says of `name`, or its default; see `SCALARS`."""
        return scalar_of(self, name, next(s.default for s in self.SCALARS if s.name == name))

    def number(self, name: str) -> int:
        """A scalar that is an integer."""
        value = self.scalar(name)
        assert isinstance(value, int)
        return value

    def column(self, name: str) -> Ints:
        """One of COLUMNS."""
        attr = self.properties[name]
        assert isinstance(attr, ColumnAttr)
        return attr.array

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        offsets = self.offset_bytes
        if offsets is not None and (len(offsets) != len(self.results) or (offsets < 0).any()):
            self.refuse(f"{len(offsets)} offsets for {len(self.results)} results; one each, 0 or "
                        "more")  # fmt: skip
        places = {tensor_of(value).device: None for value in (*self.operands, *self.results)}
        if len(places) > 1 and not self.MOVES:
            self.refuse(f"its tensors are on {' and '.join(map(symbol, places))}; only exec.send, "
                        "exec.recv and exec.kv_migrate move any")  # fmt: skip
        self.check()

    def check(self) -> None:
        """Raise VerifyException where operands and results do not fit."""

    def refuse(self, why: str) -> None:
        """Raise VerifyException."""
        raise VerifyException(f"{self.name}: {why}")

    def expect(self, value: SSAValue, shape: tuple[int, ...], dtype: str, what: str) -> None:
        """Raise VerifyException unless a value has this shape and type."""
        tensor = tensor_of(value)
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            self.refuse(f"{what} is {_described(tensor.shape, tensor.dtype)}; "
                        f"it must be {_described(shape, dtype)}")  # fmt: skip

    def expect_rank(self, value: SSAValue, rank: int, what: str) -> Tensor:
        """The tensor of a value; raises VerifyException unless it has so many dimensions."""
        tensor = tensor_of(value)
        if len(tensor.shape) != rank:
            self.refuse(f"{what} has {len(tensor.shape)} dimensions; it must have {rank}")
        return tensor

    def print_text(self, printer: Printer) -> None:
        if self.operands:
            printer.print_string(" ")
            printer.print_list(self.operands, printer.print_ssa_value)
        print_scalars(printer, self, self.SCALARS)
        for name in self.COLUMNS:
            printer.print_string(f" {name} ")
            printer.print_attribute(self.properties[name])
        self.print_more(printer)
        if "offsets" in self.properties:
            printer.print_string(" offsets ")
            printer.print_attribute(self.properties["offsets"])
        if self.results:
            printer.print_string(" -> ")
            printer.print_list([result.type for result in self.results], printer.print_attribute)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        names = parse_operands(parser) if cls._takes_operands() else []
        properties = parse_scalars(parser, cls.SCALARS)
        for name in cls.COLUMNS:
            parser.parse_keyword(name, " and its column")
            properties[name] = parser.parse_attribute()
        properties |= cls.parse_more(parser)
        if parser.parse_optional_keyword("offsets"):
            properties["offsets"] = parser.parse_attribute()
        operands = resolve_typed(parser, names) if names else ()
        results: Sequence[Attribute] = ()
        if parser.parse_optional_punctuation("->"):
            results = parser.parse_comma_separated_list(parser.Delimiter.NONE, parser.parse_type)
        return cls.create(operands=operands, properties=properties, result_types=results)

    def print_more(self, printer: Printer) -> None:
        """Print what stands between the columns and the types."""

    @classmethod
    def parse_more(cls, parser: Parser) -> dict[str, Attribute]:
        """Parse what `print_more` prints."""
        return {}

    @classmethod
    def _takes_operands(cls) -> bool:
        return bool(cls.get_irdl_definition().operands)

    @classmethod
    def of(
        cls,
        operands: Sequence[SSAValue],
        results: Sequence[TensorType],
        *,
        columns: dict[str, Ints] | None = None,
        more: dict[str, Attribute] | None = None,
        **values: Value | None,
    ) -> Self:
        """The op, with scalars by name, its columns, and what else it is told as attributes."""
        given = {name: ColumnAttr.of(column) for name, column in (columns or {}).items()}
        return cls.create(
            operands=operands,
            result_types=results,
            properties=properties_of(values, cls.SCALARS) | given | (more or {}),
        )


def _described(shape: tuple[int, ...], dtype: str) -> str:
    return f"[{', '.join(map(str, shape))}] {dtype}"


# The model's layers.


@irdl_op_definition
@declares(_COSTS)
class InputOp(OperatorOp):
    """The step's tokens: `%tokens = exec.input -> !exec.tensor<[16], i32, @g0>`"""

    name = "exec.input"
    tokens = result_def(TensorType)

    def check(self) -> None:
        tensor = self.expect_rank(self.tokens, 1, "the result")
        self.expect(self.tokens, tensor.shape, "i32", "the result")


@irdl_op_definition
@declares(_COSTS)
class EmbeddingOp(OperatorOp):
    """Tokens [T] to the residual stream [T, hidden]:

    `%hidden = exec.embedding %tokens
      : !exec.tensor<[16], i32, @g0> -> !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.embedding"
    tokens = operand_def(TensorType)
    hidden = result_def(TensorType)

    def check(self) -> None:
        (count,) = self.expect_rank(self.tokens, 1, "the operand").shape
        hidden = self.expect_rank(self.hidden, 2, "the result")
        self.expect(self.hidden, (count, hidden.shape[1]), hidden.dtype, "the result")


@irdl_op_definition
@declares(_COSTS)
class NormOp(OperatorOp):
    """The residual stream with what a layer adds, normalised, and the sum; where nothing is added,
    the sum is the stream as it was. All [T, hidden].

    `%normed, %sum = exec.norm %hidden : !exec.tensor<[16, 64], bf16, @g0>
      -> !exec.tensor<[16, 64], bf16, @g0>, !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.norm"
    hidden = operand_def(TensorType)
    added = opt_operand_def(TensorType)
    normed = result_def(TensorType)
    sum = result_def(TensorType)

    def check(self) -> None:
        hidden = self.expect_rank(self.hidden, 2, "the operand")
        for value, what in ((self.added, "what is added"), (self.normed, "the first result"),
                            (self.sum, "the second result")):  # fmt: skip
            if value is not None:
                self.expect(value, hidden.shape, hidden.dtype, what)


@irdl_op_definition
@declares(_COSTS + _HEADS)
class QKVOp(OperatorOp):
    """Queries, keys and values: [T, hidden] to [T, (heads + 2 * kv_heads) * head_dim].

    `%qkv = exec.qkv %normed {heads = 4, kv_heads = 2, head_dim = 16}
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[16, 128], bf16, @g0>`
    """

    name = "exec.qkv"
    SCALARS: ClassVar[Scalars] = _COSTS + _HEADS
    normed = operand_def(TensorType)
    qkv = result_def(TensorType)

    def check(self) -> None:
        normed = self.expect_rank(self.normed, 2, "the operand")
        width = (self.number("heads") + 2 * self.number("kv_heads")) * self.number("head_dim")
        self.expect(self.qkv, (normed.shape[0], width), normed.dtype, "the result")


_ATTENTION = (*_COSTS, *_HEADS, _FIRST)

_SCRATCH = Scalar(
    "scratch", "where the memory begins that it needs for itself, as it is planned", 0
)


class AttentionOp(OperatorOp):
    """Rows [first, first + R) of the queries attend to the KV before them and to their own.

    kv: [C, 2, kv_heads, head_dim], of all C tokens before, one request after another. Results:
    [R, heads * head_dim], and the KV of the R tokens, [R, 2, kv_heads, head_dim].
    """

    @property
    def context_tokens(self) -> Ints:
        """Of each request, the tokens of KV before those of this step."""
        raise TypeError(self.name)

    @property
    def new_tokens(self) -> Ints:
        """Of each request, the tokens of this step."""
        raise TypeError(self.name)

    def check(self) -> None:
        (qkv, kv), (attended, new_kv) = self.operands, self.results
        heads, kv_heads, dim = map(self.number, ("heads", "kv_heads", "head_dim"))
        source = self.expect_rank(qkv, 2, "the first operand")
        if heads % kv_heads:
            self.refuse(f"{heads} heads do not share {kv_heads} kv_heads evenly")
        if source.shape[1] != (heads + 2 * kv_heads) * dim:
            self.refuse(
                f"the first operand has {source.shape[1]} columns; {heads} heads and twice "
                f"{kv_heads} kv_heads of {dim} are {(heads + 2 * kv_heads) * dim}"
            )
        if (self.new_tokens < 1).any() or (self.context_tokens < 0).any():
            self.refuse("a request has a token at least in a step, and no negative context")
        first, count = self.number("first"), int(self.new_tokens.sum())
        if first + count > source.shape[0]:
            self.refuse(f"rows [{first}, {first + count}) of {source.shape[0]}")
        cached = self.expect_rank(kv, 4, "the KV")
        context = int(self.context_tokens.sum())
        self.expect(kv, (context, 2, kv_heads, dim), cached.dtype, "the KV")
        self.expect(attended, (count, heads * dim), source.dtype, "the first result")
        self.expect(new_kv, (count, 2, kv_heads, dim), cached.dtype, "the second result")


@irdl_op_definition
@declares((*_ATTENTION, _SCRATCH))
class PrefillAttentionOp(AttentionOp):
    """Chunks of prompts, each the tokens [begin, end) of a request:

    `%attended, %new = exec.prefill_attention %qkv, %kv {heads = 4, kv_heads = 2, head_dim = 16}
      begin #pd.column<8> end #pd.column<24>
      : !exec.tensor<[16, 128], bf16, @g0>, !exec.tensor<[8, 2, 2, 16], bf16, @g0>
      -> !exec.tensor<[16, 64], bf16, @g0>, !exec.tensor<[16, 2, 2, 16], bf16, @g0>`
    """

    name = "exec.prefill_attention"
    SCALARS: ClassVar[Scalars] = (*_ATTENTION, _SCRATCH)
    COLUMNS: ClassVar[tuple[str, ...]] = ("begin", "end")
    begin = prop_def(ColumnAttr)
    end = prop_def(ColumnAttr)
    qkv = operand_def(TensorType)
    kv = operand_def(TensorType)
    attended = result_def(TensorType)
    new_kv = result_def(TensorType)

    @property
    def context_tokens(self) -> Ints:
        return self.column("begin")

    @property
    def new_tokens(self) -> Ints:
        begin, end = self.column("begin"), self.column("end")
        if len(begin) != len(end):
            self.refuse(f"{len(begin)} begins and {len(end)} ends")
        return np.asarray(end - begin)


@irdl_op_definition
@declares(_ATTENTION)
class DecodeAttentionOp(AttentionOp):
    """One token of each request, which has `context` tokens of KV before it:

    `%attended, %new = exec.decode_attention %qkv, %kv {heads = 4, kv_heads = 2, head_dim = 16}
      context #pd.column<811, 7>
      : !exec.tensor<[2, 128], bf16, @g0>, !exec.tensor<[818, 2, 2, 16], bf16, @g0>
      -> !exec.tensor<[2, 64], bf16, @g0>, !exec.tensor<[2, 2, 2, 16], bf16, @g0>`
    """

    name = "exec.decode_attention"
    SCALARS: ClassVar[Scalars] = _ATTENTION
    COLUMNS: ClassVar[tuple[str, ...]] = ("context",)
    context = prop_def(ColumnAttr)
    qkv = operand_def(TensorType)
    kv = operand_def(TensorType)
    attended = result_def(TensorType)
    new_kv = result_def(TensorType)

    @property
    def context_tokens(self) -> Ints:
        return self.column("context")

    @property
    def new_tokens(self) -> Ints:
        return np.ones_like(self.column("context"))


@irdl_op_definition
@declares(_COSTS)
class ProjectionOp(OperatorOp):
    """What attention adds to the stream: parts [R, heads * head_dim], one under the other, to
    [sum of R, hidden].

    `%added = exec.projection %prefilled, %decoded
      : !exec.tensor<[16, 64], bf16, @g0>, !exec.tensor<[2, 64], bf16, @g0>
      -> !exec.tensor<[18, 64], bf16, @g0>`
    """

    name = "exec.projection"
    parts = var_operand_def(TensorType)
    added = result_def(TensorType)

    def check(self) -> None:
        parts = [self.expect_rank(part, 2, "a part") for part in self.parts]
        if not parts or len({(part.shape[1], part.dtype) for part in parts}) > 1:
            self.refuse("its parts must be as wide as each other, and of one type")
        added = self.expect_rank(self.added, 2, "the result")
        rows = sum(part.shape[0] for part in parts)
        self.expect(self.added, (rows, added.shape[1]), parts[0].dtype, "the result")


_FFN: Scalars = (
    *_COSTS,
    Scalar("width", "of the hidden layer of one rank, or of one expert there", 0, True, least=1),
    Scalar("experts", "experts of one rank; 0 where the model is dense", 0),
    Scalar("experts_per_token", "experts that compute a token, on all ranks", 0),
    _SCRATCH,
)


@irdl_op_definition
@declares(_FFN)
class FFNOp(OperatorOp):
    """The feed-forward layer, dense or of experts: [T, hidden] to [T, hidden].

    `%added = exec.ffn %normed {width = 112}
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.ffn"
    SCALARS: ClassVar[Scalars] = _FFN
    normed = operand_def(TensorType)
    added = result_def(TensorType)

    def check(self) -> None:
        normed = self.expect_rank(self.normed, 2, "the operand")
        self.expect(self.added, normed.shape, normed.dtype, "the result")
        if bool(self.number("experts")) != bool(self.number("experts_per_token")):
            self.refuse("experts and experts_per_token: both, or none")


@irdl_op_definition
@declares(_COSTS)
class LMHeadOp(OperatorOp):
    """Logits [S, vocab of one rank] of the rows that sample:

    `%logits = exec.lm_head %normed rows #pd.column<15>
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[1, 1024], bf16, @g0>`
    """

    name = "exec.lm_head"
    COLUMNS: ClassVar[tuple[str, ...]] = ("rows",)
    rows = prop_def(ColumnAttr)
    normed = operand_def(TensorType)
    logits = result_def(TensorType)

    def check(self) -> None:
        normed, logits = (self.expect_rank(v, 2, "a tensor") for v in (self.normed, self.logits))
        rows = self.column("rows")
        if ((rows < 0) | (rows >= normed.shape[0])).any():
            self.refuse(f"a row is outside of the {normed.shape[0]} that there are")
        self.expect(self.logits, (len(rows), logits.shape[1]), logits.dtype, "the result")


@irdl_op_definition
@declares(_COSTS)
class SampleOp(OperatorOp):
    """The next tokens: logits [S, vocab] to [S].

    `%next = exec.sample %logits
      : !exec.tensor<[1, 1024], bf16, @g0> -> !exec.tensor<[1], i32, @g0>`
    """

    name = "exec.sample"
    logits = operand_def(TensorType)
    tokens = result_def(TensorType)

    def check(self) -> None:
        logits = self.expect_rank(self.logits, 2, "the operand")
        self.expect(self.tokens, logits.shape[:1], "i32", "the result")


@irdl_op_definition
@declares((*_COSTS, _FIRST))
class SliceOp(OperatorOp):
    """Some rows, [first, first + R), so that micro-batches go their own ways:

    `%part = exec.slice %whole {first = 8}
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[8, 64], bf16, @g0>`
    """

    name = "exec.slice"
    SCALARS: ClassVar[Scalars] = (*_COSTS, _FIRST)
    whole = operand_def(TensorType)
    part = result_def(TensorType)

    def check(self) -> None:
        whole, part = tensor_of(self.whole), tensor_of(self.part)
        first = self.number("first")
        if not whole.shape or not part.shape:
            self.refuse("a tensor without dimensions has no rows")
        if first + part.shape[0] > whole.shape[0]:
            self.refuse(f"rows [{first}, {first + part.shape[0]}) of {whole.shape[0]}")
        self.expect(self.part, (part.shape[0], *whole.shape[1:]), whole.dtype, "the result")


@irdl_op_definition
@declares(_COSTS)
class ConcatOp(OperatorOp):
    """Rows one under the other, as those that a slice took apart:

    `%whole = exec.concat %front, %back
      : !exec.tensor<[8, 64], bf16, @g0>, !exec.tensor<[8, 64], bf16, @g0>
      -> !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.concat"
    parts = var_operand_def(TensorType)
    whole = result_def(TensorType)

    def check(self) -> None:
        parts = [tensor_of(part) for part in self.parts]
        if not all(part.shape for part in parts):
            self.refuse("a tensor without dimensions has no rows")
        if not parts or len({(part.shape[1:], part.dtype) for part in parts}) > 1:
            self.refuse("its parts must be as wide as each other, and of one type")
        rows = sum(part.shape[0] for part in parts)
        self.expect(self.whole, (rows, *parts[0].shape[1:]), parts[0].dtype, "the result")


# Ranks and devices.


class CollectiveOp(OperatorOp):
    """What all ranks of a group do together: `... over [@g0, @g1] -> ...`, the first of them being
    where the tensors are shown. Several tensors go in one message."""

    @property
    def group(self) -> tuple[str, ...]:
        """The devices of the ranks."""
        ranks = self.properties["ranks"]
        assert isinstance(ranks, ArrayAttr)
        return tuple(rank.root_reference.data for rank in ranks)

    def verify_(self) -> None:
        if not self.operands or len(self.operands) != len(self.results):
            self.refuse(f"{len(self.operands)} tensors in, {len(self.results)} out; as many, and "
                        "one at least")  # fmt: skip
        super().verify_()
        if len(self.group) < 2 or len(set(self.group)) < len(self.group):
            self.refuse("a group has two devices at least, each once")
        if self.device not in self.group:
            self.refuse(f"its tensors are on {symbol(self.device)}, which is not of its group")

    def print_more(self, printer: Printer) -> None:
        printer.print_string(f" over [{', '.join(map(symbol, self.group))}]")

    @classmethod
    def parse_more(cls, parser: Parser) -> dict[str, Attribute]:
        parser.parse_keyword("over", " and the devices, [@a, @b]")
        devices = parser.parse_comma_separated_list(
            parser.Delimiter.SQUARE, lambda: parse_symbol(parser, "a device"), " in devices"
        )
        return {"ranks": ranks_of(devices)}


def ranks_of(devices: Sequence[str]) -> ArrayAttr[SymbolRefAttr]:
    """A group's devices as `more={"ranks": ...}` wants them."""
    return ArrayAttr([SymbolRefAttr(device) for device in devices])


@irdl_op_definition
@declares((*_COSTS, _SCRATCH))
class AllReduceOp(CollectiveOp):
    """The sum over the ranks, on each of them:

    `%sums = exec.all_reduce %parts over [@g0, @g1]
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.all_reduce"
    SCALARS: ClassVar[Scalars] = (*_COSTS, _SCRATCH)
    ranks = prop_def(ArrayAttr.constr(FlatSymbolRefAttrConstr))
    parts = var_operand_def(TensorType)
    sums = var_result_def(TensorType)

    def check(self) -> None:
        for part, total in zip(self.parts, self.sums, strict=False):
            self.expect(total, tensor_of(part).shape, tensor_of(part).dtype, "a result")


_AXIS = (*_COSTS, Scalar("axis", "the dimension that the ranks share out", 0))


class _ResizingOp(CollectiveOp):
    """A collective that changes the size of a dimension."""

    GROWS: ClassVar[bool]

    def check(self) -> None:
        axis, count = self.number("axis"), len(self.group)
        for before, after in zip(self.operands, self.results, strict=False):
            tensor = tensor_of(before)
            if axis >= len(tensor.shape):
                self.refuse(f"axis {axis} of {len(tensor.shape)} dimensions")
            size = tensor.shape[axis]
            if not self.GROWS and size % count:
                self.refuse(f"{size} does not split over {count} ranks")
            new = size * count if self.GROWS else size // count
            shape = (*tensor.shape[:axis], new, *tensor.shape[axis + 1 :])
            self.expect(after, shape, tensor.dtype, "a result")


@irdl_op_definition
@declares((*_AXIS, _SCRATCH))
class AllGatherOp(_ResizingOp):
    """All ranks' tensors, one behind the other along `axis`, on each of them:

    `%whole = exec.all_gather %part {axis = 1} over [@g0, @g1]
      : !exec.tensor<[1, 512], bf16, @g0> -> !exec.tensor<[1, 1024], bf16, @g0>`
    """

    name = "exec.all_gather"
    SCALARS: ClassVar[Scalars] = (*_AXIS, _SCRATCH)
    GROWS: ClassVar[bool] = True
    ranks = prop_def(ArrayAttr.constr(FlatSymbolRefAttrConstr))
    parts = var_operand_def(TensorType)
    wholes = var_result_def(TensorType)


@irdl_op_definition
@declares(_AXIS)
class ReduceScatterOp(_ResizingOp):
    """The sum over the ranks, of which each gets a share along `axis`:

    `%share = exec.reduce_scatter %parts over [@g0, @g1]
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[8, 64], bf16, @g0>`
    """

    name = "exec.reduce_scatter"
    SCALARS: ClassVar[Scalars] = _AXIS
    GROWS: ClassVar[bool] = False
    ranks = prop_def(ArrayAttr.constr(FlatSymbolRefAttrConstr))
    parts = var_operand_def(TensorType)
    shares = var_result_def(TensorType)


_CHANNEL = (*_COSTS, Scalar("channel", "by which send and recv find each other", 0, required=True))


class _EndOp(OperatorOp):
    """One end of a message between devices; the graph checks that the other is there."""

    SCALARS: ClassVar[Scalars] = _CHANNEL
    WORD: ClassVar[str]

    @property
    def other(self) -> str:
        """The device at the other end."""
        peer = self.properties["peer"]
        assert isinstance(peer, SymbolRefAttr)
        return peer.root_reference.data

    def check(self) -> None:
        if self.other == self.device:
            self.refuse(f"both ends are {symbol(self.other)}; a message goes to another device")

    def print_more(self, printer: Printer) -> None:
        printer.print_string(f" {self.WORD} {symbol(self.other)}")

    @classmethod
    def parse_more(cls, parser: Parser) -> dict[str, Attribute]:
        parser.parse_keyword(cls.WORD, " and a device")
        return {"peer": SymbolRefAttr(parse_symbol(parser, "a device"))}


@irdl_op_definition
@declares(_CHANNEL)
class SendOp(_EndOp):
    """A tensor to another device: `exec.send %x {channel = 3} to @g1
    : !exec.tensor<[16, 64], bf16, @g0>`"""

    name = "exec.send"
    WORD: ClassVar[str] = "to"
    peer = prop_def(FlatSymbolRefAttrConstr)
    sent = operand_def(TensorType)


@irdl_op_definition
@declares(_CHANNEL)
class RecvOp(_EndOp):
    """What another device sent:
    `%y = exec.recv {channel = 3} from @g0 -> !exec.tensor<[16, 64], bf16, @g1>`"""

    name = "exec.recv"
    WORD: ClassVar[str] = "from"
    peer = prop_def(FlatSymbolRefAttrConstr)
    received = result_def(TensorType)


@irdl_op_definition
@declares(_COSTS)
class WaitOp(OperatorOp):
    """What another stream made, from when it is there:

    `%there = exec.wait %made {stream = "compute"}
      : !exec.tensor<[16, 64], bf16, @g0> -> !exec.tensor<[16, 64], bf16, @g0>`
    """

    name = "exec.wait"
    made = operand_def(TensorType)
    there = result_def(TensorType)

    def check(self) -> None:
        made = tensor_of(self.made)
        self.expect(self.there, made.shape, made.dtype, "the result")


# KV.

_TIER = (*_COSTS, Scalar("tier", "where the KV lies", "device", choices=TIERS))


class _KVOp(OperatorOp):
    """An op on KV of one layer, [tokens, 2, kv_heads, head_dim]."""

    def check(self) -> None:
        for value in (*self.operands, *self.results):
            self.expect_rank(value, 4, "the KV")


@irdl_op_definition
@declares(_TIER)
class KVLoadOp(_KVOp):
    """KV of a layer, to attend to; from the tier `device` it costs nothing, for attention reads it
    where it lies.

    `%kv = exec.kv_load {layer = 0, tier = "host"} -> !exec.tensor<[811, 2, 2, 16], bf16, @g0>`
    """

    name = "exec.kv_load"
    SCALARS: ClassVar[Scalars] = _TIER
    kv = result_def(TensorType)


@irdl_op_definition
@declares(_TIER)
class KVStoreOp(_KVOp):
    """KV of this step's tokens, into the cache:
    `exec.kv_store %new {layer = 0} : !exec.tensor<[16, 2, 2, 16], bf16, @g0>`"""

    name = "exec.kv_store"
    SCALARS: ClassVar[Scalars] = _TIER
    kv = operand_def(TensorType)


@irdl_op_definition
@declares(_COSTS)
class KVMigrateOp(_KVOp):
    """KV of a layer, on another device:

    `%there = exec.kv_migrate %kv {layer = 0}
      : !exec.tensor<[811, 2, 2, 16], bf16, @g0> -> !exec.tensor<[811, 2, 2, 16], bf16, @g1>`
    """

    name = "exec.kv_migrate"
    MOVES: ClassVar[bool] = True
    kv = operand_def(TensorType)
    moved = result_def(TensorType)

    def check(self) -> None:
        super().check()
        kv, moved = tensor_of(self.kv), tensor_of(self.moved)
        self.expect(self.moved, kv.shape, kv.dtype, "the result")
        if kv.device == moved.device:
            self.refuse(f"the KV is on {symbol(kv.device)} already; name another device")


# Graphs.

_GRAPH: Scalars = (
    Scalar("phase", "what the step does", "hybrid", choices=PHASES),
    Scalar("model", "the cluster.model that it computes", "", required=True),
    Scalar("instance", "the cluster.instance where", ""),
    Scalar("tp", "tensor parallel ranks", 1, least=1),
    Scalar("pp", "pipeline stages", 1, least=1),
    Scalar("dp", "data parallel replicas of the attention", 1, least=1),
    Scalar("peak_bytes", "activation memory of the device that needs most, where planned", 0),
    Scalar("live_bytes", "there, the most that lives at a time: no plan needs less", 0),
    Scalar("naive_bytes", "there, what a place of its own for each tensor would need", 0),
)


@irdl_op_definition
@declares(_GRAPH)
class ExecGraphOp(TextOp):
    """One step:

    `exec.graph @step {phase = "decode", model = "m"} {
      %tokens = exec.input -> !exec.tensor<[16], i32, @g0>
      exec.yield %tokens
    }`

    Unlike in a `pd.graph`, the order of the text is the order of each stream: a value is made above
    where it is used.
    """

    name = "exec.graph"
    SCALARS: ClassVar[Scalars] = _GRAPH
    sym_name = prop_def(SymbolNameConstraint())
    body = region_def("single_block")
    traits = traits_def(IsolatedFromAbove(), SymbolOpInterface())

    @property
    def symbol(self) -> str:
        """The graph's symbol without the @."""
        name = self.properties["sym_name"]
        assert isinstance(name, StringAttr)
        return name.data

    @property
    def operators(self) -> Iterator[OperatorOp]:
        """Its operators, in their order."""
        return (op for op in self.body.block.ops if isinstance(op, OperatorOp))

    def scalar(self, name: str) -> Value:
        """What the graph says of `name`, or its default."""
        return scalar_of(self, name, next(s.default for s in self.SCALARS if s.name == name))

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        what = f"exec.graph {symbol(self.symbol)}"
        if not isinstance(self.body.block.last_op, ExecYieldOp):
            raise VerifyException(f"{what} must end with exec.yield")
        _verify_order(self.body.block, what)
        _verify_channels(self, what)

    def print_text(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self.symbol)}")
        print_scalars(printer, self, self.SCALARS)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        name = StringAttr(parse_symbol(parser, "the graph's name"))
        properties: dict[str, Attribute] = {"sym_name": name}
        if opens_scalars(parser):
            properties |= parse_scalars(parser, cls.SCALARS)
        return cls.create(properties=properties, regions=[parser.parse_region()])

    @classmethod
    def named(cls, name: str, ops: Sequence[Operation], **values: Value | None) -> Self:
        """The graph `@name` of these ops, the last of them an exec.yield."""
        properties: dict[str, Attribute] = {"sym_name": StringAttr(name)}
        properties |= properties_of(values, cls.SCALARS)
        return cls.create(properties=properties, regions=[Region(Block(ops))])


def _verify_order(block: Block, what: str) -> None:
    """Each value is made above its uses, and goes to another stream through exec.wait alone."""
    made: set[SSAValue] = set()
    for op in block.ops:
        if not isinstance(op, OperatorOp | ExecYieldOp):
            raise VerifyException(f"{what}: {op.name} is no operator; only exec ops stand in it")
        for operand in op.operands:
            if operand not in made:
                raise VerifyException(f"{what}: {op.name} uses a value that is made below it, or "
                                      "elsewhere")  # fmt: skip
            if isinstance(op, OperatorOp) and not isinstance(op, WaitOp):
                _verify_stream(op, operand.owner, what)
        made.update(op.results)


def _verify_stream(op: OperatorOp, maker: Operation | Block, what: str) -> None:
    if isinstance(maker, OperatorOp) and maker.stream_name != op.stream_name:
        raise VerifyException(
            f"{what}: {op.name} on stream {op.stream_name} uses what {maker.name} makes on stream "
            f"{maker.stream_name}; put an exec.wait between them"
        )


def _verify_channels(graph: ExecGraphOp, what: str) -> None:
    """Each send has its recv, of the same shape, the other way round, and below it."""
    sends: dict[int, SendOp] = {}
    paired: set[int] = set()
    for op in graph.operators:
        if not isinstance(op, _EndOp):
            continue
        channel = op.number("channel")
        if isinstance(op, SendOp):
            if channel in sends:
                raise VerifyException(f"{what}: channel {channel} has two exec.send; one each")
            sends[channel] = op
            continue
        if channel not in sends or channel in paired:
            raise VerifyException(f"{what}: exec.recv on channel {channel} has no exec.send above "
                                  "it that is still to be received")  # fmt: skip
        paired.add(channel)
        _verify_pair(sends[channel], op, f"{what}: channel {channel}")
    if alone := sorted(sends.keys() - paired):
        raise VerifyException(f"{what}: what is sent on channel {alone[0]} nobody receives")


def _verify_pair(send: SendOp, recv: _EndOp, what: str) -> None:
    sent, received = tensor_of(send.operands[0]), tensor_of(recv.results[0])
    if (sent.shape, sent.dtype) != (received.shape, received.dtype):
        raise VerifyException(
            f"{what} sends {_described(sent.shape, sent.dtype)} and receives "
            f"{_described(received.shape, received.dtype)}"
        )
    if (send.other, recv.other) != (received.device, sent.device):
        raise VerifyException(
            f"{what} goes from {symbol(sent.device)} to {symbol(send.other)}, and comes from "
            f"{symbol(recv.other)} to {symbol(received.device)}"
        )


@irdl_op_definition
class ExecYieldOp(TextOp):
    """The step's results, the sampled tokens as a rule:
    `exec.yield %next : !exec.tensor<[16], i32, @g0>`"""

    name = "exec.yield"
    given = var_operand_def(TensorType)
    traits = traits_def(IsTerminator())

    def print_text(self, printer: Printer) -> None:
        if self.operands:
            printer.print_string(" ")
            printer.print_list(self.operands, printer.print_ssa_value)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        first = parser.parse_optional_unresolved_operand()
        names = [] if first is None else [first]
        while names and parser.parse_optional_punctuation(","):
            names.append(parser.parse_unresolved_operand())
        return cls.create(operands=resolve_typed(parser, names) if names else ())


Exec = Dialect(
    "exec",
    [
        ExecGraphOp, ExecYieldOp, InputOp, EmbeddingOp, NormOp, QKVOp, PrefillAttentionOp,
        DecodeAttentionOp, ProjectionOp, FFNOp, LMHeadOp, SampleOp, SliceOp, ConcatOp, AllReduceOp,
        AllGatherOp, ReduceScatterOp, SendOp, RecvOp, WaitOp, KVLoadOp, KVStoreOp, KVMigrateOp,
    ],
    [TensorType],
)  # fmt: skip
