"""Passes and targets from the words of the command line: `chunk-prefill{tokens=512},legalize`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from xdsl.passes import ModulePass
from xdsl.utils.arg_spec import ArgSpec, ArgSpecConvertible, parse_pipeline
from xdsl.utils.exceptions import ArgSpecParseError
from xdsl.utils.hints import type_repr
from xdsl.utils.target import Target

from sagec import pipelines
from sagec.cli.failure import UsageError, message, unknown
from sagec.pipelines import PIPELINES

MadeT = TypeVar("MadeT", bound=ArgSpecConvertible)


def passes(text: str, available: Mapping[str, Callable[[], type[ModulePass]]]) -> list[ModulePass]:
    """The passes that `text` names, with their options.

    Raises UsageError for a pass or option that does not exist, or a value that does not fit it.
    """
    return [_made("pass", spec, available) for spec in _specs(text)]


def target(text: str, available: Mapping[str, Callable[[], type[Target]]]) -> Target:
    """The target that `text` names, with its options. Raises UsageError."""
    specs = _specs(text)
    if len(specs) != 1:
        raise UsageError(f"one target, not {len(specs)}: {text!r}")
    return _made("target", specs[0], available)


def expanded(text: str) -> str:
    """The text with the passes of the named pipelines in it, without spaces.

    Spaces beside commas and braces, which xDSL refuses, mean nothing.
    """
    dense = re.sub(r'("(?:\\.|[^"\\])*")|\s*([,{}=])\s*', r"\1\2", text.strip())
    return pipelines.expanded(dense)


def options(kind: type[ArgSpecConvertible]) -> list[tuple[str, str, str | None]]:
    """Name, type and default of each option, as the command line spells them."""
    hints = get_type_hints(kind)
    return [
        (field.name.replace("_", "-"), type_name(hints[field.name]), _default(field))
        for field in dataclasses.fields(kind)
        if field.init and field.name != "name"
    ]


def type_name(hint: Any) -> str:
    """How the command line calls the type of an option.

    >>> type_name(Literal["pd", "none"]), type_name(int | None)
    ('pd|none', 'int')
    """
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return "|".join(type_name(kind) for kind in get_args(hint) if kind is not NoneType)
    return type_repr(hint)


def _specs(text: str) -> list[ArgSpec]:
    """The parsed specs. Raises UsageError."""
    try:
        return list(parse_pipeline(expanded(text)))
    except ArgSpecParseError as error:
        said = (message(error) or "").partition("parse: ")[2]
        raise UsageError(f"{text!r} does not parse as passes: {said}") from None
    except (RuntimeError, StopIteration):
        raise UsageError(f"{text!r} does not parse as passes: it ends too early") from None


def _made(kind: str, spec: ArgSpec, available: Mapping[str, Callable[[], type[MadeT]]]) -> MadeT:
    if kind == "pass" and spec.name in PIPELINES:
        raise UsageError(f"pipeline {spec.name} takes no options; give them to its passes")
    if spec.name not in available:
        named = PIPELINES if kind == "pass" else ()
        raise UsageError(unknown(kind, spec.name, [*available, *named]))
    made = available[spec.name]()
    types = {name: type_name for name, type_name, _ in options(made)}
    for option, values in spec.parameters.items():
        if option.replace("_", "-") not in types:
            raise UsageError(f"{kind} {spec.name}: {unknown('option', option, types)}")
        _fits(f"{kind} {spec.name}", option, values, made)
    try:
        return made.from_spec(spec)
    except ValueError as error:
        raise UsageError(f"{kind} {spec.name}: {error}") from None


def _fits(
    where: str, option: str, values: tuple[object, ...], made: type[ArgSpecConvertible]
) -> None:
    """Raise UsageError unless xDSL can turn the values into what the option holds."""
    from xdsl.utils.arg_spec import _convert_arg_to_type

    wanted = get_type_hints(made)[option.replace("-", "_")]
    try:
        _convert_arg_to_type(values, wanted)  # type: ignore[arg-type]
    except ValueError:
        given = ",".join(str(value) for value in values) or "nothing"
        raise UsageError(f"{where}: {option}={given} is no {type_name(wanted)}") from None


def _default(field: dataclasses.Field[object]) -> str | None:
    """A field's default as the command line spells it; None where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return None
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
