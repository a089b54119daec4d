"""The dialects' texts: parsing what was printed gives the same, and real MLIR agrees."""

from __future__ import annotations

import re
import shutil
import subprocess
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from sagec.dialects import cluster, kv, pd
from sagec.dialects.columns import ColumnAttr, Frozen, ListsAttr, NamesAttr, WordsAttr
from sagec.dialects.rows import READABLE_ROWS
from sagec.source import parse_module, verify_module
from sagec.universe import sagec_context
from tests.strategies import any_modules, serving_modules
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.printer import Printer

PAGES = Path(__file__).parent.parent / "filecheck"
OPS_PAGES = sorted(PAGES.glob("dialects/*/*ops.mlir")) + [PAGES / "dialects/pd/columns.mlir"]
DIALECTS = (cluster.Cluster, kv.KV, pd.PD)
CONTEXT = sagec_context()
LAX = settings(suppress_health_check=list(HealthCheck), deadline=None)


def text_of(module: ModuleOp, generic: bool = False) -> str:
    """The module's text, in the custom or in the generic form."""
    stream = StringIO()
    Printer(stream, print_generic_format=generic).print_op(module)
    return stream.getvalue()


def parsed(text: str) -> ModuleOp:
    """The module of a text, verified."""
    module = parse_module(text, "test.mlir", CONTEXT)
    verify_module(module, text)
    return module


def meaning(module: ModuleOp) -> list[tuple[object, ...]]:
    """Of each op its kind, types, and what passes read of it: columns, words, properties."""
    return [
        (op.name, tuple(op.operand_types), tuple(op.result_types), *_values(op))
        for op in module.walk()
    ]


def _values(op: Operation) -> list[tuple[str, object]]:
    if not isinstance(op, pd.TableOp):
        rest = sorted(op.properties.items())
        return [(n, a.rows() if isinstance(a, WordsAttr) else a) for n, a in rest]
    columns = [(f.name, op.properties.get(f.name), f.default) for f in op.FIELDS]
    rows = len(op.names)
    return [("ids", op.names), *((n, _rows(attr, default, rows)) for n, attr, default in columns)]


def _rows(attr: object, default: int, rows: int) -> object:
    match attr:
        case ColumnAttr():
            return [v or None if default == 0 else v for v in attr.array.tolist()]
        case WordsAttr() | ListsAttr():
            return [row or None for row in attr.rows()]
        case NamesAttr():
            return [name or None for name in attr.data]
        case _:
            return [default or None] * rows


@LAX
@given(any_modules())
def test_every_module_verifies_and_its_text_parses_to_the_same(module: ModuleOp) -> None:
    verify_module(module)
    text = text_of(module)
    again = parsed(text)
    assert text_of(again) == text
    assert meaning(again) == meaning(module)


@LAX
@given(any_modules())
def test_the_generic_form_parses_to_the_same(module: ModuleOp) -> None:
    text = text_of(module, generic=True)
    again = parsed(text)
    assert text_of(again, generic=True) == text
    assert text_of(again) == text_of(module)
    assert meaning(again) == meaning(module)


@LAX
@given(serving_modules())
def test_what_a_person_would_write_parses_to_the_same(module: ModuleOp) -> None:
    verify_module(module)
    assert text_of(parsed(text_of(module))) == text_of(module)
    assert meaning(parsed(text_of(module, generic=True))) == meaning(module)
