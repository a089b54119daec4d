"""Texts that somebody broke: each is a module or an error of one line, and nothing else."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError

from sagec.diagnostics import Diagnostic
from sagec.source import diagnostic_of, parse_module, verify_module
from sagec.universe import sagec_context

CONTEXT = sagec_context()
PAGES = Path(__file__).parent.parent / "filecheck" / "dialects"


def pieces() -> list[str]:
    """Short texts that mean something, or nearly: the graphs and cases of the pages."""
    found = []
    for page in sorted(PAGES.glob("*/*.mlir")):
        lines = page.read_text("utf-8").splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith("// "))
        for piece in text.split("\n\n"):
            found += [piece] if piece.strip() else []
    return found


PIECES = pieces()
CHUNKS = [
    *'"@%#!<>[]{}():;,=-/\\\n\x00é', "//", "->", "::", "0x", "-1", "1.5", "9" * 30, "99999999",
    '"a"', "@p0", "%w", "%kv", "^bb0", "!pd.wave<2>", "!pd.kv<1>", "#pd.column<1, 2>", "i64",
    '#pd.names<"a">', '#pd.words<"a" : 0>', "#pd.lists<[1]>", "prompt 1", "chunk", "on", "none",
    "pd.yield", "pd.graph @g {", "}", "{num_steps = 1}", 'loc("a":1:2)', "attributes", "estimates",
    'chunks {0: "a" [0, 1)}', '"\\FF"', '"\\q"', "true", "dense<1>", "vector<2xi32>", "like",
    "!exec.tensor<[4, 8], bf16, @g0>", "[]", "over [@g0, @g1]", "offsets #pd.column<0>", "to @g1",
    "exec.yield", "exec.wait", 'stream = "copy"', "channel = 1", "rows #pd.column<9>",
]  # fmt: skip


@st.composite
def broken_texts(draw: st.DrawFn) -> str:
    """A piece, or two, after some edits: parts deleted, replaced, repeated, or put elsewhere."""
    text = "\n".join(draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 12)))
        kind = draw(st.sampled_from(("delete", "insert", "replace", "repeat", "cut")))
        chunk = draw(st.sampled_from(CHUNKS) | st.text(max_size=3))
        match kind:
            case "delete":
                text = text[:begin] + text[end:]
            case "insert":
                text = f"{text[:begin]}{chunk}{text[begin:]}"
            case "replace":
                text = f"{text[:begin]}{chunk}{text[end:]}"
            case "repeat":
                text = text[:end] + text[begin:]
            case "cut":
                text = text[begin:]
    return text


def text_of(module: ModuleOp) -> str:
    stream = StringIO()
    Printer(stream).print_op(module)
    return stream.getvalue()


def check(text: str) -> None:
    """Parse and verify; what verifies prints, and parses again to the same."""
    try:
        module = parse_module(text, "broken.mlir", CONTEXT)
        verify_module(module, text)
    except (ParseError, Diagnostic) as error:
        line = diagnostic_of(error).line()
        assert line.startswith("broken.mlir:") or "builtin.module" in line or "dialect" in line
        assert "\n" not in line and "error: " in line
        return
    printed = text_of(module)
    again = parse_module(printed, "printed.mlir", CONTEXT)
    verify_module(again, printed)
    assert text_of(again) == printed


LAX = settings(suppress_health_check=list(HealthCheck), deadline=None)


@settings(LAX, max_examples=300)
@given(broken_texts())
@example('%k = pd.prefill %k on @"" : !pd.kv<3>')
@example("pd.graph @g {x = 1, " + "// " * 3000 + "\n")
@example("pd.leave [" + "// " * 3000)
@example('"exec.all_gather"() <{ranks = []}> : () -> ()')
@example('"exec.projection"() : () -> !exec.tensor<[], bf16, @g0>')
@example("%x = exec.recv {channel = 0} from @g1")
def test_a_broken_text_is_a_module_or_one_line(text: str) -> None:
    check(text)


@pytest.mark.slow
@settings(LAX, max_examples=6000)
@given(broken_texts())
def test_thousands_of_broken_texts_are_modules_or_one_line(text: str) -> None:
    check(text)
