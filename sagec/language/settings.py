"""The settings of each statement: what they take, in which units, and what is in range.

A setting is a line in one of the tables below; the parser, the error messages, the formatter and
docs/language.md know it from there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from sagec.diagnostics import did_you_mean
from sagec.language.syntax import Plain

MOST_TOKENS = 2**31 - 2
MOST = 2**62

MODES = ("strict", "time-share", "hybrid")
ROLES = ("prefill", "decode", "both")
DTYPES = ("f32", "f16", "bf16", "fp8")
KV_DTYPES = ("auto", *DTYPES, "int8", "int4")
END_OF_TEXT = "end-of-text"
"""What `stop` takes beside strings: the token with which the model ends a text."""

AT_END_OF_TEXT = ""
"""The value of `stop end-of-text`; no stop string is empty."""

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}


_NONE: dict[str, float] = {}


class Kind(Enum):
    """What a setting takes: how a message calls it, and its units, the factors to sagec's own."""

    COUNT = ("a whole number", {"": 1})
    REAL = ("a number", {"": 1})
    SHARE = ("a number or a share", {"": 1.0, "%": 0.01})
    BYTES = ("a size", _BYTES)
    TIME = ("a time", {"us": 1, "ms": 1000, "s": 1_000_000})
    LATENCY = ("a time", {"us": 1.0, "ms": 1e3, "s": 1e6, "ns": 1e-3})
    BANDWIDTH = (
        "a bandwidth",
        {f"{unit}/s": factor for unit, factor in _BYTES.items()}
        | {"Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8, "Tbit/s": 1e12 / 8},
    )
    FLOPS = (
        "operations per second",
        {"": 1, "Gflop/s": 1e9, "Tflop/s": 1e12, "Pflop/s": 1e15},
    )
    WORD = ("a name", _NONE)
    LABEL = ("a name or a text in quotes", _NONE)
    TEXT = ("a text in quotes", _NONE)
    STOP = (f"a text in quotes, or {END_OF_TEXT}", _NONE)
    CHOICE = ("a word", _NONE)

    def __init__(self, called: str, units: dict[str, float]) -> None:
        self.called = called
        self.units = units


@dataclass(frozen=True)
class Setting:
    """`name value` in a statement.

    doc: a line for people. least, most: its range, in sagec's units. above: `least` itself is too
    small. choices: of a CHOICE. repeats: may be given more than once; the values are collected.
    """

    name: str
    kind: Kind
    doc: str
    least: float = 0
    most: float = MOST
    above: bool = False
    choices: tuple[str, ...] = ()
    repeats: bool = False


Table = dict[str, Setting]


class SettingError(ValueError):
    """A value that a setting does not take; the hint says what it takes."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


def _table(*settings: Setting) -> Table:
    return {setting.name: setting for setting in settings}


def _count(name: str, doc: str, least: float = 1, most: float = MOST_TOKENS) -> Setting:
    return Setting(name, Kind.COUNT, doc, least, most)


MODEL: Table = _table(
    _count("layers", "transformer layers"),
    _count("hidden", "width of the residual stream"),
    _count("heads", "query heads"),
    _count("kv_heads", "key and value heads; without it, as many as heads"),
    _count("head_dim", "width of a head; without it, hidden / heads"),
    _count("ffn", "width of the feed-forward layer"),
    _count("vocab", "tokens in the vocabulary"),
    Setting("dtype", Kind.CHOICE, "type of the weights", choices=DTYPES),
    _count("max_context", "tokens of prompt and output together"),
    _count("experts", "experts a layer; 0: a dense model", 0),
    _count("experts_per_token", "experts that compute a token", 0),
    Setting("tied", Kind.CHOICE, "whether the embedding is also the head", choices=("no", "yes")),
)

DEVICE: Table = _table(
    Setting("kind", Kind.WORD, "what it is: cpu, h100, ...; a known kind brings its numbers"),
    Setting("memory", Kind.BYTES, "for weights and KV", 1),
    Setting("flops", Kind.FLOPS, "arithmetic in the weights' type", 1, 1e30),
    Setting("bandwidth", Kind.BANDWIDTH, "of its memory", 1, 1e30),
    Setting(
        "profile", Kind.TEXT, "file of measured steps (sagec profile), which decide their time"
    ),
)

LINK: Table = _table(
    Setting("bandwidth", Kind.BANDWIDTH, "in each direction", 1, 1e30),
    Setting("latency", Kind.LATENCY, "time before the first byte arrives", 0, 1e12),
)

INSTANCE: Table = _table(
    Setting("role", Kind.CHOICE, "the phases it computes; both, if not said", choices=ROLES),
    Setting("engine", Kind.WORD, "the software that runs it"),
    Setting("model", Kind.WORD, "what it runs; the only model of the file, if not said"),
    _count("tp", "tensor parallel ranks; without it, as the devices allow"),
    _count("pp", "pipeline stages"),
    _count("kv_blocks", "blocks of the KV cache"),
    Setting("kv", Kind.BYTES, "the same as a size, over all its devices", 1),
    _count("block", "tokens in a block"),
    _count("budget", "tokens that a step may compute"),
    _count("max_batch", "requests in a step"),
    _count("max_partial_prefills", "prompts a step may leave unfinished; 0: any", 0),
    Setting("kv_dtype", Kind.CHOICE, "type of the KV; auto is the model's", choices=KV_DTYPES),
    Setting("kv_layout", Kind.LABEL, "order of the KV in memory, as the engine names it"),
    Setting("dtype", Kind.CHOICE, "type to compute in", choices=("auto", *DTYPES)),
    Setting("quantization", Kind.LABEL, "of the weights"),
    _count("draft_layers", "layers of a draft model beside the model's", 0),
    _count("draft_tokens", "tokens a step drafts (speculative decoding)", 0),
    Setting("pool", Kind.LABEL, "instances of one pool share devices and compute by turns"),
    Setting("switch_time", Kind.TIME, "until it computes when its turn in the pool begins", 0),
    Setting("options", Kind.TEXT, 'for its engine alone: "name=value" and more of these'),
)

_TOLD = (
    Setting("model", Kind.WORD, "the model it asks for; the only one, if not said"),
    Setting("temperature", Kind.REAL, "of sampling; 0, if not said: the likeliest token", 0, 1e6),
    _count("top_k", "sample among so many tokens; 0: all", 0),
    Setting("top_p", Kind.REAL, "sample among the likeliest of this mass", 0, 1, above=True),
    _count("seed", "of sampling", 0, MOST),
    Setting("stop", Kind.STOP, "what ends the output, and is no part of it", repeats=True),
    Setting("priority", Kind.COUNT, "smaller goes first", -MOST_TOKENS, MOST_TOKENS),
    Setting("ttft", Kind.TIME, "promised time to the first token", 1),
    Setting("tpot", Kind.TIME, "promised time for each token after it", 1),
    Setting("tenant", Kind.LABEL, "who pays"),
    Setting("adapter", Kind.LABEL, "LoRA adapter"),
)
_GENERATE = _count("generate", "tokens to sample at most; until it stops, if not said")

REQUEST: Table = _table(
    Setting("prompt", Kind.TEXT, "the prompt as text, for a model with a tokenizer"),
    _count("tokens", "instead of a text: so many tokens, drawn from the id"),
    _GENERATE,
    *_TOLD,
    Setting("arrives", Kind.TIME, "when, from the begin"),
    Setting("session", Kind.LABEL, "conversation it belongs to"),
    _count("samples", "outputs of the one prompt", most=1024),
    _count("chunk", "most tokens of its prompt in a step"),
    Setting("on", Kind.WORD, "the instance to compute its prompt"),
    Setting("decode_on", Kind.WORD, "the instance to decode it"),
)

REPLAY: Table = _table(
    Setting("rate", Kind.REAL, "so many times as fast as it was recorded", 0, 1e9, above=True),
    _count("limit", "only the first so many requests"),
    _count("clip", "prompts of at most so many tokens, longer ones are cut"),
    Setting(
        "broken_lines",
        Kind.CHOICE,
        "refuse them, if not said, or skip and count them",
        choices=("refuse", "skip"),
    ),
    *_TOLD,
)

SERVE: Table = _table(
    Setting("on", Kind.WORD, "the cluster; the only one of the file, if not said"),
    Setting("with", Kind.WORD, "the strategy; fifo, if not said"),
    Setting("mode", Kind.CHOICE, "how the phases share instances", choices=MODES),
    _count("chunk", "most tokens of a prompt in a step"),
    _count("horizon", "steps to plan ahead; all, if not said"),
    _GENERATE,
    *_TOLD,
)

STRATEGY: Table = _table(SERVE["mode"], SERVE["chunk"], SERVE["horizon"])

UNITS = frozenset(unit for kind in Kind for unit in kind.units if unit)
"""All units there are."""

SHARED = (_GENERATE.name, *(setting.name for setting in _TOLD))
"""Settings of `serve` and `replay` that hold for each of their requests."""

_NUMBER = re.compile(
    r"([+-]?\d+(?:_\d+)*(?:\.\d+(?:_\d+)*)?(?:[eE][+-]?\d+)?)([A-Za-z%][A-Za-z/%]*)?"
)


def read_number(setting: Setting, text: str) -> Plain:
    """The number that `text` gives a setting, in sagec's units. Raises SettingError."""
    kind = setting.kind
    if not kind.units:
        raise SettingError(f"'{setting.name}' is {kind.called}, not {text}", _example(setting))
    match = _NUMBER.fullmatch(text) if len(text) <= 64 else None
    if match is None:
        message = f"'{setting.name}' is {kind.called}, not {_cut(text)}"
        raise SettingError(message, _numbers(setting))
    digits, unit = match[1], match[2] or ""
    if (factor := kind.units.get(unit)) is None:
        raise SettingError(_wrong_unit(setting, text, unit), _units(kind, digits))
    number = _scaled(digits, factor)
    value = number if kind in _FLOATS else _whole(setting, number, text)
    low = not value > setting.least if setting.above else not value >= setting.least
    if low or value > setting.most:
        hint = f"at most {setting.most:.15g}" if not low else f"what does: {range_of(setting)}"
        raise SettingError(f"'{setting.name}' is {_cut(text)}", hint)
    return value


_FLOATS = (Kind.REAL, Kind.SHARE, Kind.LATENCY, Kind.BANDWIDTH, Kind.FLOPS)


def _scaled(digits: str, factor: float) -> int | float:
    """The number times its unit: exact where both are whole."""
    if digits.lstrip("+-").replace("_", "").isdigit():
        return int(digits) * factor
    return float(digits) * factor


def _whole(setting: Setting, number: int | float, text: str) -> int | float:
    if isinstance(number, float) and math.isfinite(number):
        if setting.kind is Kind.COUNT and number != int(number):
            hint = f"what does: {math.floor(number)} or {math.ceil(number)}"
            raise SettingError(f"'{setting.name}' is a whole number, not {text}", hint)
        return round(number)
    return number


def _wrong_unit(setting: Setting, text: str, unit: str) -> str:
    if not unit:
        return f"'{setting.name}' is {setting.kind.called}, and {text} has no unit"
    if list(setting.kind.units) == [""]:
        return f"'{setting.name}' is {setting.kind.called} without a unit, not {text}"
    return f"'{setting.name}' is {setting.kind.called}, and {unit} is no unit of it"


def _units(kind: Kind, digits: str) -> str:
    return f"what does: {', '.join(f'{digits}{unit}' for unit in kind.units)}"


def _numbers(setting: Setting) -> str:
    """The hint where a number of a setting is none: its units, or where it has none its range."""
    if list(setting.kind.units) == [""]:
        return f"what does: {range_of(setting)}"
    return _units(setting.kind, "1")


def _example(setting: Setting) -> str:
    match setting.kind:
        case Kind.CHOICE:
            return f"what does: {', '.join(setting.choices)}"
        case Kind.TEXT | Kind.LABEL:
            return f'as in: {setting.name} "..."'
        case Kind.STOP:
            return f'as in: {setting.name} "..."; or: {setting.name} {END_OF_TEXT}'
        case _:
            return "names begin with a letter"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


def range_of(setting: Setting) -> str:
    """The range of a setting that takes numbers, for people."""
    unit = next(iter(setting.kind.units), "")
    low = f"{setting.least:.15g}{unit}"
    high = f"{setting.most:.15g}{unit}"
    if setting.above:
        return f"more than {low}" + ("" if setting.most >= 1e9 else f", at most {high}")
    return f"{low} or more" if setting.most >= MOST_TOKENS else f"{low} to {high}"


def read_word(setting: Setting, text: str) -> Plain:
    """The name that `text` gives a setting. Raises SettingError."""
    kind = setting.kind
    if kind is Kind.CHOICE:
        if text not in setting.choices:
            close = did_you_mean(text, setting.choices)
            hint = f"did you mean '{close}'? ({_example(setting)})" if close else _example(setting)
            raise SettingError(f"'{setting.name}' is '{_cut(text)}'", hint)
        return text
    if kind in (Kind.WORD, Kind.LABEL):
        return text
    if kind is Kind.STOP:
        if text != END_OF_TEXT:
            raise SettingError(f"'stop' is '{_cut(text)}'", _example(setting))
        return AT_END_OF_TEXT
    if kind.units:
        message = f"'{setting.name}' is {kind.called}, not '{_cut(text)}'"
        raise SettingError(message, _numbers(setting))
    raise SettingError(f"'{setting.name}' is {kind.called}, not '{_cut(text)}'", _example(setting))


def read_text(setting: Setting, text: str) -> Plain:
    """What a text in quotes, already without them, gives a setting. Raises SettingError."""
    if setting.kind is Kind.STOP:
        if not text:
            raise SettingError("'stop' is empty, and would end every output", _example(setting))
        return text
    if setting.kind in (Kind.TEXT, Kind.LABEL):
        return text
    if setting.kind.units:
        message = f"'{setting.name}' is {setting.kind.called}, not a text"
        raise SettingError(message, _numbers(setting))
    message = f"'{setting.name}' is {setting.kind.called}, not a text"
    raise SettingError(message, "leave out the quotes")
