"""Write the documents that come from the code: docs/dialects.md and docs/plan.schema.json.

python docs/generate.py            # writes them
python docs/generate.py --check    # 1 where one of them is not what would be written
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdsl.ir import Dialect, Operation
from xdsl.irdl import IRDLOperation

from sagec.dialects.rows import Fields, Kind
from sagec.dialects.scalars import Scalar, Scalars
from sagec.runtime.plan import json_schema
from sagec.universe import DIALECTS

DOCS = Path(__file__).parent

HEAD = """\
# Dialects

Written by `make docs` from the docstrings and tables in `dialects/`; a change here is lost.

Requests travel as tables: one op, one value, a row a request, a column a field. In text a row is a
line, `"id": field value ...`, and a field stands where it differs from its default; the fields of a
row may stand in any order. Above 1024 rows a table prints as its columns,
`{ids = #pd.names<...>, prompt = #pd.column<...>}`, and may always be written so.

The type of an operand, `: !pd.wave<2>`, may be left out where the value is defined above. Names of
symbols hold letters, digits, `_`, `$` and `.`; others stand in quotes: `@"rack-7"`. Times are in
microseconds. Attributes that an op does not know stand at its end, `attributes {note = 1}`, and
stay. Every op also has MLIR's generic form (`sagec opt --print-op-generic`), which real MLIR reads
(`mlir-opt --allow-unregistered-dialect`).
"""


def documents() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {
        DOCS / "dialects.md": dialects_page(),
        DOCS / "plan.schema.json": json.dumps(json_schema(), indent=1) + "\n",
    }


def dialects_page() -> str:
    """All dialects: their types and attributes, and their ops with fields."""
    lines = [HEAD]
    for load in DIALECTS.values():
        lines += _dialect(load())
    return "\n".join(lines).rstrip() + "\n"


def _dialect(dialect: Dialect) -> Iterator[str]:
    operations = list(dialect.operations)
    module = inspect.getmodule(operations[0])
    yield f"## {dialect.name}\n"
    yield f"{inspect.getdoc(module)}\n"
    attributes = [kind for kind in dialect.attributes if kind.__doc__]
    if attributes:
        yield "| type or attribute | |"
        yield "|---|---|"
        for kind in attributes:
            sigil = "!" if "type" in kind.__name__.lower() else "#"
            yield f"| `{sigil}{kind.name}` | {_cell(_summary(kind))} |"
        yield ""
    for operation in operations:
        yield from _operation(operation)


def _operation(operation: type[Operation]) -> Iterator[str]:
    assert issubclass(operation, IRDLOperation)
    yield f"### {operation.name}\n"
    yield f"{_shown_examples(inspect.getdoc(operation) or '')}\n"
    definition = operation.get_irdl_definition()
    tables = {"ids", *(f.name for f in getattr(operation, "FIELDS", ()))}
    tables |= {scalar.name for scalar in getattr(operation, "SCALARS", ())}
    parts = (
        ("operands", [_typed(name, of.constr) for name, of in definition.operands]),
        ("results", [_typed(name, of.constr) for name, of in definition.results]),
        ("regions", [f"`{name}`" for name, _ in definition.regions]),
        ("properties", [f"`{name}`" for name in definition.properties if name not in tables]),
    )
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
    if told:
        yield f"{told[0].upper()}{told[1:]}.\n"
    if scalars := getattr(operation, "SCALARS", ()):
        yield from _scalars(scalars)
    if fields := getattr(operation, "FIELDS", ()):
        yield from _fields(fields)


EXAMPLE = re.compile(r"\s*`((?:%\w+ = )?(?:pd|kv|cluster)\.\w+ [^`]+)`(?=\n\n|$)")
"""An op at the end of a paragraph of its docstring."""


def _shown_examples(text: str) -> str:
    """The docstring with its examples as blocks of their own."""
    return EXAMPLE.sub(lambda found: f"\n\n```mlir\n{found[1]}\n```", text)


def _typed(name: str, constraint: Any) -> str:
    """A value's name with the types that it may have, where they are few."""
    # One value is a range of length 1 to xDSL.
    while inner := getattr(constraint, "constr", getattr(constraint, "constraint", None)):
        constraint = inner
    bases = constraint.get_bases() if hasattr(constraint, "get_bases") else None
    types = " or ".join(sorted(f"`!{base.name}`" for base in bases or ()))
    return f"`{name}` {types}".rstrip()


def _scalars(scalars: Scalars) -> Iterator[str]:
    yield "| `{name = value}` | type | default | |"
    yield "|---|---|---|---|"
    for scalar in scalars:
        default = "required" if scalar.required else f"`{json.dumps(scalar.default)}`"
        yield f"| `{scalar.name}` | {_cell(_range(scalar))} | {default} | {_cell(scalar.doc)} |"
    yield ""


def _range(scalar: Scalar) -> str:
    if scalar.choices:
        return " or ".join(f"`{choice}`" for choice in scalar.choices)
    if isinstance(scalar.default, str):
        return "string"
    kind = "integer" if isinstance(scalar.default, int) else "number"
    upto = "" if math.isinf(scalar.most) else f" to {scalar.most:g}"
    return f"{kind}, {scalar.least:g}{upto or ' or more'}"


def _fields(fields: Fields) -> Iterator[str]:
    yield "| field of a row | value | default | |"
    yield "|---|---|---|---|"
    for field in fields:
        value = field.kind.value
        if field.choices:
            value = " or ".join(f"`{choice}`" for choice in field.choices)
        if field.least is not None:
            value = f"{value}, {field.least} or more"
        default = "required" if field.required else "none"
        if not field.required and field.kind is Kind.INT:
            default = f"`{field.default}`"
        yield f"| `{field.name}` | {value} | {default} | {_cell(field.doc)} |"
    yield ""


def _summary(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """Write the documents, or with --check say which are stale; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check: bool = parser.parse_args().check
    stale = 0
    for path, text in documents().items():
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        name = path.relative_to(DOCS.parent)
        if check:
            print(f"{name} is not what the code says; run `make docs`", file=sys.stderr)
            stale += 1
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{name}: written")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
