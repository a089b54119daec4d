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
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Dialect, Operation
from xdsl.printer import Printer

from sagec.dialects import cluster, kv, pd
from sagec.dialects import exec as ex
from sagec.dialects.columns import ColumnAttr, Frozen, ListsAttr, NamesAttr, WordsAttr
from sagec.dialects.rows import READABLE_ROWS
from sagec.source import SourceParser, parse_module, verify_module
from sagec.universe import sagec_context
from tests.strategies import any_modules, serving_modules

PAGES = Path(__file__).parent.parent / "filecheck"
OPS_PAGES = [*sorted(PAGES.glob("dialects/*/*ops.mlir")), PAGES / "dialects/pd/columns.mlir"]
DIALECTS = (cluster.Cluster, ex.Exec, kv.KV, pd.PD)
CONTEXT = sagec_context()
LAX = settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)


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


@pytest.mark.parametrize("page", OPS_PAGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_real_mlir_reads_and_writes_the_generic_form(page: Path) -> None:
    if (mlir_opt := shutil.which("mlir-opt-22") or shutil.which("mlir-opt")) is None:
        pytest.skip("mlir-opt is not installed here (Debian: mlir-22-tools)")
    module = parsed(page.read_text("utf-8"))
    done = subprocess.run(
        [mlir_opt, "--allow-unregistered-dialect"],
        input=text_of(module, generic=True),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    again = parsed(done.stdout)
    # MLIR sorts attributes and numbers values.
    assert meaning(again) == meaning(module)
    assert text_of(_nameless(again)) == text_of(_nameless(module))


def _nameless(module: ModuleOp) -> ModuleOp:
    for op in module.walk():
        op.attributes = dict(sorted(op.attributes.items()))
        for result in op.results:
            result.name_hint = None
    return module


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_pages_show_every_op_in_both_forms(dialect: Dialect) -> None:
    page = (PAGES / "dialects" / dialect.name / "ops.mlir").read_text("utf-8")
    for op in dialect.operations:
        assert re.search(rf"CHECK\S*: .*{re.escape(op.name)}\b", page), op.name
        if op.name != "pd.yield":
            assert re.search(rf"GENERIC: .*\"{re.escape(op.name)}\"", page), op.name


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_the_pages_show_every_field(dialect: Dialect) -> None:
    page = (PAGES / "dialects" / dialect.name / "ops.mlir").read_text("utf-8")
    checked = "\n".join(line for line in page.splitlines() if "CHECK" in line)
    for op in dialect.operations:
        for field in getattr(op, "FIELDS", ()):
            for word in field.choices or (field.name,):
                assert re.search(rf"\b{word}\b", checked), f"{op.name} {word}"
        for scalar in getattr(op, "SCALARS", ()):
            assert f"{scalar.name} = " in checked, f"{op.name} {scalar.name}"


def test_a_table_of_more_rows_than_people_read_prints_as_columns() -> None:
    rows = READABLE_ROWS + 1
    requests = pd.RequestsOp.of(
        {
            "ids": NamesAttr.of(map(str, range(rows))),
            "prompt": ColumnAttr.of(np.arange(1, rows + 1)),
        }
    )
    text = text_of(ModuleOp([requests]))
    assert re.search(r'pd.requests \{ids = #pd.names<"0", .*, prompt = #pd.column<"0x0100', text)
    assert text_of(parsed(text)) == text


def test_a_column_where_all_rows_are_on_one_instance_prints_once_whatever_its_words() -> None:
    on = WordsAttr.of(("p0", "d0", "unused"), [1, 1])
    columns = {"ids": NamesAttr.of("ab"), "on": on, "context": ColumnAttr.of([1, 2])}
    text = text_of(ModuleOp([pd.ResidentOp.of(columns)]))
    assert "pd.resident on @d0 [" in text
    assert text_of(parsed(text)) == text


def test_an_op_that_does_not_verify_still_prints() -> None:
    short = {
        "ids": NamesAttr.of("ab"),
        "on": WordsAttr.of(("p0",), [0, 7]),
        "context": ColumnAttr.of([1]),
    }
    wrong = pd.ResidentOp.of(short)
    assert "context = #pd.column<1>" in text_of(ModuleOp([wrong]))
    nameless = pd.LeaveOp.create(properties={"verdict": ColumnAttr.of([1])})
    assert "pd.leave {verdict = #pd.column<1>}" in text_of(ModuleOp([nameless]))


def test_columns_are_made_of_whole_numbers_in_one_dimension() -> None:
    assert ColumnAttr.of([]).array.dtype == np.int64
    assert ColumnAttr.of(np.array([1, 2], np.int32)) == ColumnAttr.of([1, 2])
    with pytest.raises(TypeError, match="integers, not float64"):
        ColumnAttr.of([1.5])
    with pytest.raises(ValueError, match="one dimension, not 2"):
        ColumnAttr.of([[1], [2]])
    with pytest.raises(OverflowError):
        ColumnAttr.of([2**63])


def test_a_column_cannot_be_written() -> None:
    column = ColumnAttr.of(np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        column.array[0] = 7


def test_columns_compare_by_value_and_hash_alike() -> None:
    assert Frozen(np.arange(2)) == Frozen(np.arange(2))
    assert hash(ListsAttr.of([[1], []])) == hash(ListsAttr.of([[1], []]))
    assert ColumnAttr.of([1]) != ColumnAttr.of([2])
    assert repr(ColumnAttr.of([1]).data) == "Frozen([1])"


def test_words_know_their_rows() -> None:
    words = WordsAttr.from_rows(["p0", "d0", "p0"])
    assert words.words == ("p0", "d0")
    assert words.take(np.array([2, 0])).only() == "p0"
    assert words.only() is None
    assert WordsAttr.same("p0", 2).rows() == ["p0", "p0"]
    assert WordsAttr.same("p0", 0).only() is None


def test_constructors_name_what_there_is() -> None:
    with pytest.raises(TypeError, match="no 'knd' here; there are: kind, memory_bytes"):
        cluster.DeviceOp.named("g0", knd="cpu")


def test_scalars_have_the_defaults_of_their_declaration() -> None:
    instance = cluster.InstanceOp.of("p0", ["g0"], "torch", "both", "tiny", kv_blocks=4)
    assert instance.scalar("kv_blocks") == 4
    assert instance.scalar("block_tokens") == 16
    assert instance.device_names == ("g0",)
    assert cluster.LinkOp.between("a", "b", latency_us=2).scalar("latency_us") == 2.0


EXAMPLE = re.compile(r"`((?:%\w+(?:, %\w+)* = )?(?:pd|kv|cluster|exec)\.\w+ [^`]+)`")
OPERATIONS = [op for dialect in DIALECTS for op in dialect.operations]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: op.name)
def test_the_examples_of_a_docstring_parse(operation: type[Operation]) -> None:
    examples = EXAMPLE.findall(operation.__doc__ or "")
    assert examples, f"{operation.name} shows no example"
    for example in examples:
        # A value that the example takes for granted stays undefined, which only a module refuses.
        parser = SourceParser(CONTEXT, example, operation.name)
        found = parser.parse_operation()
        assert found.name == operation.name or operation.name in example
        assert parser.pos == len(example)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: op.name)
def test_every_field_and_scalar_says_what_it_means(operation: type[Operation]) -> None:
    for declared in (*getattr(operation, "FIELDS", ()), *getattr(operation, "SCALARS", ())):
        assert len(declared.doc) > 3, f"{operation.name} {declared.name}"
