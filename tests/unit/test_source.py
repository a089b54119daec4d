"""Places: of ops in a text, and of errors."""

from __future__ import annotations

import pytest
from xdsl.dialects.builtin import FileLineColLoc
from xdsl.ir import Operation
from xdsl.utils.exceptions import ParseError, VerifyException

from sagec.diagnostics import Diagnostic
from sagec.dialects import pd
from sagec.source import diagnostic_of, parse_module, verify_module
from sagec.universe import sagec_context

CONTEXT = sagec_context()


def place(op: Operation) -> tuple[str, int, int]:
    """File, line and column of an op."""
    location = op.location
    assert isinstance(location, FileLineColLoc)
    return location.filename.data, location.line.data, location.column.data


def refused(text: str) -> str:
    """What a person reads of a text that does not parse or verify."""
    with pytest.raises((ParseError, Diagnostic)) as caught:
        verify_module(parse_module(text, "a.mlir", CONTEXT), text)
    return str(diagnostic_of(caught.value))


def test_every_op_knows_its_line_and_column() -> None:
    text = """cluster.switch @a

pd.graph @g {
  %w = pd.requests []
  "pd.leave"() <{ids = #pd.names<>}> : () -> ()
}
"""
    places = {
        op.name: place(op) for op in parse_module(text, "a.mlir", CONTEXT).walk() if op.parent
    }
    assert places == {
        "cluster.switch": ("a.mlir", 1, 1),
        "pd.graph": ("a.mlir", 3, 1),
        "pd.requests": ("a.mlir", 4, 3),
        "pd.leave": ("a.mlir", 5, 3),
        "pd.yield": ("a.mlir", 3, 1),
    }


def test_a_location_in_the_text_wins() -> None:
    module = parse_module('cluster.switch @a loc("b.sage":7:9)', "a.mlir", CONTEXT)
    assert place(next(iter(module.ops))) == ("b.sage", 7, 9)


def test_an_empty_text_is_an_empty_module() -> None:
    assert not list(parse_module(" // nothing\n", "a.mlir", CONTEXT).ops)


def test_a_value_that_nobody_defines_is_reported_where_it_is_used() -> None:
    text = "pd.graph @g {\n  %a = pd.decode %x : !pd.kv<1>\n  %b = pd.decode %y : !pd.kv<1>\n}\n"
    assert refused(text) == (
        "a.mlir:2:18: error: nothing here defines %x\n"
        "    2 |   %a = pd.decode %x : !pd.kv<1>\n"
        "      |                  ^~ the same holds for %y"
    )


def test_a_graph_cannot_use_what_stands_behind_it() -> None:
    text = "pd.graph @g {\n  %a = pd.decode %x : !pd.kv<0>\n}\n%x = pd.join none"
    assert "a.mlir:2:18: error: nothing here defines %x" in refused(text)


def test_an_error_behind_an_undefined_value_is_not_hidden_by_it() -> None:
    assert "expected a tier" not in refused("%a = pd.decode %x : !pd.kv<1>\nkv.migrate @d0")
    assert "expected the blocks' hashes" in refused("%a = pd.decode %x : !pd.kv<1>\nkv.migrate @d0")


def test_nesting_without_end_is_one_line() -> None:
    message = refused("pd.graph @g {\n" * 2000)
    assert "error: this nests too deeply" in message
    assert message.count("\n") == 2


def test_an_op_that_does_not_verify_is_shown_with_its_line() -> None:
    assert refused('pd.graph @g {\n  pd.leave ["a": admit]\n}') == (
        'a.mlir:2:3: error: pd.leave: "a" is admitted\n'
        '    2 |   pd.leave ["a": admit]\n'
        "      |   ^~~~~~~~ who leaves is defer, reject, preempt or swap"
    )


def test_an_unknown_op_is_compared_with_those_there_are() -> None:
    assert "a.mlir:1:1: error: no op 'kv.evct'" in refused("kv.evct @d0")
    assert "did you mean 'kv.evict'?" in refused("kv.evct @d0")
    assert "there are: builtin.*, cluster.*, exec.*, kv.*, pd.*" in refused("evict")


@pytest.mark.parametrize(
    "text",
    [
        'pd.graph @"\\FF" {}',
        'cluster.switch @a {x = "\\FF" : i32}',
        "cluster.switch @a {x = " + "9" * 5000 + "}",
        '"pd.requests"',
        "%0, %1 = pd.requests []",
        "\x00",
        "#alias = 3",
        "{-# #-}",
        "cluster.switch @a {x = dense<[1, [2]]> : tensor<2xi32>}",
        "cluster.switch @a {x = 300 : i8}",
    ],
)
def test_what_xdsl_stumbles_over_is_one_line_with_a_place(text: str) -> None:
    message = refused(text)
    assert message.startswith("a.mlir:1:")
    assert message.splitlines()[0].count("error: ") == 1


def test_an_error_without_a_place_is_a_diagnostic_too() -> None:
    assert str(diagnostic_of(VerifyException("wrong; right is this"))) == (
        "error: wrong; right is this"
    )
    diagnostic = Diagnostic("said already")
    assert diagnostic_of(diagnostic) is diagnostic


def test_an_error_whose_file_is_not_at_hand_names_the_place() -> None:
    module = parse_module('\npd.leave ["a": admit]', "a.mlir", CONTEXT)
    with pytest.raises(Diagnostic) as caught:
        verify_module(module)
    assert str(caught.value).startswith('a.mlir:2:1: error: pd.leave: "a" is admitted; who leaves')


def test_strings_in_generic_form_may_hold_any_utf8() -> None:
    text = r"""
"pd.graph"() <{sym_name = "\C3\A9", policy = "é"}> ({
  "pd.yield"() : () -> ()
}) : () -> ()
"""
    module = parse_module(text, "a.mlir", CONTEXT)
    verify_module(module)
    graph = next(iter(module.ops))
    assert isinstance(graph, pd.GraphOp)
    assert graph.symbol == graph.text("policy", "") == "é"
