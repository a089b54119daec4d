"""The cluster dialect: models, devices, links, and the engine instances that run on them.

All are symbols of the module; graphs name instances, instances name devices and a model.
"""

from __future__ import annotations

from typing import ClassVar, Self

from xdsl.dialects.builtin import (
    ArrayAttr,
    FlatSymbolRefAttrConstr,
    StringAttr,
    SymbolNameConstraint,
    SymbolRefAttr,
)
from xdsl.ir import Attribute, Dialect
from xdsl.irdl import (
    IRDLOperation,
    irdl_op_definition,
    opt_prop_def,
    prop_def,
    traits_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import SymbolOpInterface
from xdsl.utils.exceptions import VerifyException

from sagec.dialects.columns import parse_string, quoted
from sagec.dialects.rows import parse_symbol, symbol
from sagec.dialects.scalars import (
    Scalar,
    Scalars,
    Value,
    declares,
    parse_scalars,
    print_scalars,
    properties_of,
    scalar_of,
    verify_scalars,
)
from sagec.dialects.text import TextOp

ROLES = ("prefill", "decode", "both")
DTYPES = ("f32", "f16", "bf16", "fp8")
KV_DTYPES = ("auto", *DTYPES, "int8", "int4")

MODEL_SCALARS: Scalars = (
    Scalar("layers", "transformer layers", 0, required=True, least=1),
    Scalar("hidden", "width of the residual stream", 0, required=True, least=1),
    Scalar("heads", "query heads", 0, required=True, least=1),
    Scalar("kv_heads", "key and value heads", 0, required=True, least=1),
    Scalar("head_dim", "width of a head", 0, required=True, least=1),
    Scalar("ffn", "width of the feed-forward layer", 0, required=True, least=1),
    Scalar("vocab", "tokens in the vocabulary", 0, required=True, least=1),
    Scalar("dtype", "type of the weights", "bf16", choices=DTYPES),
    Scalar("max_context", "tokens of prompt and output together", 131072, least=1),
    Scalar("experts", "experts a layer; 0 where the model is dense", 0),
    Scalar("experts_per_token", "experts that compute a token", 0),
    Scalar("tied", "1 where the embedding is also the output head", 0, most=1),
    Scalar("path", "folder of the checkpoint", ""),
)

DEVICE_FIGURES = ("memory_bytes", "flops_per_s", "bytes_per_s")


def _figures(memory_gib: int, flops_per_s: float, bytes_per_s: float) -> dict[str, Value]:
    return dict(zip(DEVICE_FIGURES, (memory_gib << 30, flops_per_s, bytes_per_s), strict=True))


DEVICE_KINDS: dict[str, dict[str, Value]] = {
    "cpu": _figures(16, 1e12, 2e10),
    "a10": _figures(24, 1.25e14, 6e11),
    "a10g": _figures(24, 7e13, 6e11),
    "a100": _figures(80, 3.12e14, 2.04e12),
    "b200": _figures(180, 2.25e15, 8e12),
    "h100": _figures(80, 9.9e14, 3.35e12),
    "h200": _figures(141, 9.9e14, 4.8e12),
    "h800": _figures(80, 9.9e14, 3.35e12),
    "l4": _figures(24, 1.21e14, 3e11),
    "l40s": _figures(48, 3.62e14, 8.64e11),
    "mi300x": _figures(192, 1.3e15, 5.3e12),
}
"""Class figures of the makers' data sheets: memory, dense bf16 arithmetic, memory bandwidth."""

DEVICE_SCALARS: Scalars = (
    Scalar("kind", "what it is: cpu, h200, a100, ...", "cpu"),
    Scalar("memory_bytes", "memory for weights and KV", 16 << 30, least=1),
    Scalar("flops_per_s", "arithmetic in the weights' type", 1e12, least=1),
    Scalar("bytes_per_s", "memory bandwidth", 2e10, least=1),
    Scalar("profile", "file of measured steps, which then decide their time", ""),
)

LINK_SCALARS: Scalars = (
    Scalar("bytes_per_s", "bandwidth in each direction", 1e10, least=1),
    Scalar("latency_us", "time before the first byte arrives", 10.0),
)

INSTANCE_SCALARS: Scalars = (
    Scalar("tp", "tensor parallel ranks", 1, least=1),
    Scalar("pp", "pipeline stages", 1, least=1),
    Scalar("kv_blocks", "blocks of the KV cache", 0, required=True, least=1),
    Scalar("block_tokens", "tokens in a block", 16, least=1),
    Scalar("kv_dtype", "type of the KV; auto is the model's", "auto", choices=KV_DTYPES),
    Scalar("kv_layout", "order of the KV in memory, as the engine names it", "default"),
    Scalar("max_step_tokens", "token budget of a step", 512, least=1),
    Scalar("max_batch", "requests in a step", 256, least=1),
    Scalar("max_partial_prefills", "prompts a step may leave unfinished; 0: any", 0),
    Scalar("quantization", "of the weights", "none"),
    Scalar("draft_layers", "layers of a draft model whose KV lies beside the model's", 0),
    Scalar("draft_tokens", "tokens a step drafts (speculative decoding)", 0),
    Scalar("dtype", "type it computes in; auto is the model's", "auto", choices=("auto", *DTYPES)),
    Scalar("pool", "instances of one pool share devices and compute by turns", ""),
    Scalar("switch_us", "time until an instance of a pool computes when its turn begins", 0),
    Scalar("options", "for its engine alone: words name=value", ""),
)


class _Symbol(TextOp):
    """An op with a name and scalars; subclasses print what stands between."""

    SCALARS: ClassVar[Scalars]

    @property
    def symbol(self) -> str:
        """The op's symbol without the @."""
        name = self.properties["sym_name"]
        assert isinstance(name, StringAttr)
        return name.data

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)

    def scalar(self, name: str) -> Value:
        """What the op says of `name`, or its default; see `SCALARS`."""
        default = next(s.default for s in self.SCALARS if s.name == name)
        return scalar_of(self, name, default)


class _LikeSymbol(_Symbol):
    """`@g1 like @g0 {...}`: what the op does not say, the other op of its kind says."""

    def verify_(self) -> None:
        if "like" not in self.properties:
            return super().verify_()
        optional = tuple(
            Scalar(s.name, s.doc, s.default, False, s.least, s.choices, s.most)
            for s in self.SCALARS
        )
        if self.properties["like"] == SymbolRefAttr(self.symbol):
            raise VerifyException(
                f"{self.name}: {symbol(self.symbol)} is like itself; name another one"
            )
        return verify_scalars(self, optional)

    def print_text(self, printer: Printer) -> None:
        printer.print_string(f" {symbol(self.symbol)}")
        if isinstance(like := self.properties.get("like"), SymbolRefAttr):
            printer.print_string(f" like {symbol(like.root_reference.data)}")
        print_scalars(printer, self, self.SCALARS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        properties: dict[str, Attribute] = {"sym_name": StringAttr(parse_symbol(parser, "a name"))}
        if parser.parse_optional_keyword("like"):
            properties["like"] = SymbolRefAttr(parse_symbol(parser, "another of its kind"))
        return cls.create(properties=properties | parse_scalars(parser, cls.SCALARS))

    @classmethod
    def named(cls, name: str, like: str | None = None, **values: Value | None) -> Self:
        """The op `@name`, with scalars by name."""
        properties: dict[str, Attribute] = {"sym_name": StringAttr(name)}
        if like is not None:
            properties["like"] = SymbolRefAttr(like)
        return cls.create(properties=properties | properties_of(values, cls.SCALARS))


@irdl_op_definition
@declares(MODEL_SCALARS)
class ModelOp(_LikeSymbol):
    """A model's shape, which decides its memory, its KV and its time.

    `cluster.model @tiny {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32,
      ffn = 688, vocab = 1024, dtype = "bf16"}`

    What one that is like another does not say, the other says:

    `cluster.model @long like @tiny {max_context = 1048576}`
    """

    name = "cluster.model"
    SCALARS: ClassVar[Scalars] = MODEL_SCALARS
    sym_name = prop_def(StringAttr)
    like = opt_prop_def(FlatSymbolRefAttrConstr)
    traits = traits_def(SymbolOpInterface())

    def verify_(self) -> None:
        super().verify_()
        heads, kv_heads = self.scalar("heads"), self.scalar("kv_heads")
        if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads and heads % kv_heads:
            raise VerifyException(
                f"cluster.model: {heads} heads do not share {kv_heads} kv_heads evenly; "
                "kv_heads must divide heads"
            )


@irdl_op_definition
@declares(DEVICE_SCALARS)
class DeviceOp(_LikeSymbol):
    """A piece of hardware that holds weights and KV and computes: `cluster.device @g1 like @g0`"""

    name = "cluster.device"
    SCALARS: ClassVar[Scalars] = DEVICE_SCALARS
    sym_name = prop_def(StringAttr)
    like = opt_prop_def(FlatSymbolRefAttrConstr)
    traits = traits_def(SymbolOpInterface())


@irdl_op_definition
class SwitchOp(IRDLOperation):
    """A place where links meet and nothing computes: `cluster.switch @nvs0`"""

    name = "cluster.switch"
    sym_name = prop_def(SymbolNameConstraint())
    traits = traits_def(SymbolOpInterface())
    assembly_format = "$sym_name attr-dict"


@irdl_op_definition
@declares(LINK_SCALARS)
class LinkOp(TextOp):
    """A connection, in both directions, between two devices or switches.

    `cluster.link @g0 to @g1 {bytes_per_s = 4.5e11, latency_us = 2.0}`
    """

    name = "cluster.link"
    SCALARS: ClassVar[Scalars] = LINK_SCALARS
    source = prop_def(FlatSymbolRefAttrConstr)
    target = prop_def(FlatSymbolRefAttrConstr)

    def verify_(self) -> None:
        verify_scalars(self, self.SCALARS)
        if self.source == self.target:
            raise VerifyException(
                f"cluster.link: both ends are {symbol(self.source.root_reference.data)}; name two"
            )

    def scalar(self, name: str) -> Value:
        """What the op says of `name`, or its default."""
        return scalar_of(self, name, next(s.default for s in self.SCALARS if s.name == name))

    def print_text(self, printer: Printer) -> None:
        source, target = self.source.root_reference.data, self.target.root_reference.data
        printer.print_string(f" {symbol(source)} to {symbol(target)}")
        print_scalars(printer, self, self.SCALARS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        source = SymbolRefAttr(parse_symbol(parser, "a device or switch"))
        parser.parse_keyword("to", " and the other end")
        target = SymbolRefAttr(parse_symbol(parser, "a device or switch"))
        ends: dict[str, Attribute] = {"source": source, "target": target}
        return cls.create(properties=ends | parse_scalars(parser, cls.SCALARS))

    @classmethod
    def between(cls, source: str, target: str, **values: Value | None) -> Self:
        """The link `@source to @target`, with scalars by name."""
        ends: dict[str, Attribute] = {
            "source": SymbolRefAttr(source),
            "target": SymbolRefAttr(target),
        }
        return cls.create(properties=ends | properties_of(values, cls.SCALARS))


@irdl_op_definition
@declares(INSTANCE_SCALARS)
class InstanceOp(_Symbol):
    """A running copy of an engine with a model, on devices, for a phase or both.

    `cluster.instance @p0 on [@g0] engine "torch" role prefill model @tiny {kv_blocks = 4000}`
    """

    name = "cluster.instance"
    SCALARS: ClassVar[Scalars] = INSTANCE_SCALARS
    sym_name = prop_def(StringAttr)
    devices = prop_def(ArrayAttr.constr(FlatSymbolRefAttrConstr))
    engine = prop_def(StringAttr)
    role = prop_def(StringAttr)
    model = prop_def(FlatSymbolRefAttrConstr)
    traits = traits_def(SymbolOpInterface())

    def verify_(self) -> None:
        super().verify_()
        place = f"cluster.instance: {symbol(self.symbol)}"
        if self.role.data not in ROLES:
            raise VerifyException(f"{place}: role '{self.role.data}'; one of: {', '.join(ROLES)}")
        names, tp, pp = self.device_names, self.scalar("tp"), self.scalar("pp")
        assert isinstance(tp, int) and isinstance(pp, int)
        if len(names) != tp * pp:
            raise VerifyException(
                f"{place}: tp {tp} x pp {pp} is {tp * pp} ranks on {len(names)} devices; "
                "each rank has its own"
            )
        if twice := [name for name in names if names.count(name) > 1]:
            raise VerifyException(
                f"{place}: {symbol(twice[0])} is named twice; each rank has its own device"
            )

    @property
    def device_names(self) -> tuple[str, ...]:
        return tuple(device.root_reference.data for device in self.devices.data)

    def print_text(self, printer: Printer) -> None:
        devices = ", ".join(map(symbol, self.device_names))
        printer.print_string(f" {symbol(self.symbol)} on [{devices}] engine ")
        printer.print_string(quoted(self.engine.data))
        printer.print_string(
            f" role {self.role.data} model {symbol(self.model.root_reference.data)}"
        )
        print_scalars(printer, self, self.SCALARS)

    @classmethod
    def parse_text(cls, parser: Parser) -> Self:
        name = parse_symbol(parser, "a name")
        parser.parse_keyword("on", " and the devices, [@a, @b]")
        devices = parser.parse_comma_separated_list(
            parser.Delimiter.SQUARE, lambda: parse_symbol(parser, "a device"), " in devices"
        )
        parser.parse_keyword("engine", " and its name")
        engine = parse_string(parser, "the engine's name")
        parser.parse_keyword("role", " and the phase")
        role = parser.parse_keyword_in(ROLES, " as the role")
        parser.parse_keyword("model", " and its name")
        model = parse_symbol(parser, "a model")
        op = cls.of(name, devices, engine, role, model)
        op.properties |= parse_scalars(parser, cls.SCALARS)
        return op

    @classmethod
    def of(
        cls,
        name: str,
        devices: list[str],
        engine: str,
        role: str,
        model: str,
        **values: Value | None,
    ) -> Self:
        """The instance `@name`, with scalars by name."""
        properties: dict[str, Attribute] = {
            "sym_name": StringAttr(name),
            "devices": ArrayAttr([SymbolRefAttr(device) for device in devices]),
            "engine": StringAttr(engine),
            "role": StringAttr(role),
            "model": SymbolRefAttr(model),
        }
        return cls.create(properties=properties | properties_of(values, cls.SCALARS))


Cluster = Dialect("cluster", [ModelOp, DeviceOp, SwitchOp, LinkOp, InstanceOp])
