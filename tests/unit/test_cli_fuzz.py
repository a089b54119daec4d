"""Broken input gets a message and an exit code, never a traceback: hypothesis breaks it."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagec.cli import main
from sagec.runtime.plan import ExecutionPlan, PlanError, check, decode, from_json, to_json
from tests.echo_cluster import requests
from tests.recordings import recorded

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.sage"))
PAGES = sorted(
    path for path in (ROOT / "tests" / "filecheck").rglob("*.mlir") if path.stat().st_size < 6000
)

PIECES = [
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "<",
    ">",
    '"',
    ",",
    ";",
    ":",
    "=",
    "==",
    "->",
    "@",
    "@p0",
    "%kv",
    "%0",
    "!",
    "!pd.wave<2>",
    "!pd.kv<99999999999>",
    "#",
    "#pd",
    "pd.",
    "kv.",
    "pd.graph",
    "pd.requests",
    "pd.prefill",
    "pd.decode",
    "pd.steps",
    "cluster.instance",
    "request",
    "instance",
    "serve",
    "model",
    "prompt",
    "generate",
    "0",
    "-1",
    "1e999",
    "0x10",
    "99999999999999999999",
    "9223372036854775807",
    "3.5",
    "true",
    "\\",
    "\\x",
    "\\u0000",
    "\x00",
    "é",
    "𝄞",
    "\u202e",
    "//",
    "/*",
    "#",
    "...",
    "..",
    "unit",
    "dense<1>",
    "loc(unknown)",
    "builtin.module",
    "\n",
    "  ",
    "\t",
]
"""What is put into a text to break it."""

Edit = tuple[str, float, float, str]

EDITS = st.lists(
    st.tuples(
        st.sampled_from(("delete", "insert", "repeat", "replace", "cut")),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(PIECES) | st.text(max_size=4),
    ),
    min_size=1,
    max_size=5,
)


def edited(text: str, edits: list[Edit]) -> str:
    """The text after each edit: a place and a length, both as shares, and a piece."""
    for what, place, length, piece in edits:
        begin = int(place * len(text))
        end = min(len(text), begin + 1 + int(length * 60))
        if what == "delete":
            text = text[:begin] + text[end:]
        elif what == "insert":
            text = text[:begin] + piece + text[begin:]
        elif what == "repeat":
            text = text[:end] + text[begin:end] + text[end:]
        elif what == "replace":
            text = text[:begin] + piece + text[end:]
        else:
            text = text[: max(begin, 1)]
    return text


def run(argv: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()


def assert_well_said(argv: list[str]) -> None:
    """The command ends with 0, 1 or 2; what is wrong is said in a line, or with its source line."""
    code, _, err = run(argv)
    assert code in (0, 1, 2), err
    assert "Traceback" not in err
    if code:
        assert re.search(r"\berror: \S", err), f"{code}: {err!r}"
        for line in err.splitlines():
            assert re.match(r"(.*error: |\s*\d+ \| |\s+\| )", line), f"{line!r} in {err!r}"


def assert_text_is_well_taken(text: str, suffix: str, commands: list[list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"fuzz{suffix}")
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        for command in commands:
            assert_well_said([*command, str(path)])


def check_mlir(page: Path, edits: list[Edit]) -> None:
    commands = [["opt", "--split-input-file", "-p", "serve"], ["compile"]]
    assert_text_is_well_taken(edited(page.read_text("utf-8"), edits), ".mlir", commands)


def check_sage(example: Path, edits: list[Edit]) -> None:
    text = example.read_text("utf-8").replace('from "', f'from "{ROOT}/examples/')
    commands = [["fmt", "--stdout"], ["compile"]]
    assert_text_is_well_taken(edited(text, edits), ".sage", commands)


def check_options(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "empty.mlir")
        path.write_text("")
        assert_well_said(["opt", f"--passes={text}", str(path)])
        assert_well_said(["opt", f"--target={text}", str(path)])
        assert_well_said(["compile", f"--pipeline={text}", str(path)])


def check_recording(edits: list[tuple[float, bytes]], cut: float) -> None:
    """Every command that reads a recording, of one with other bytes in it, perhaps cut short."""
    content = bytearray(_recording())
    for place, piece in edits:
        at = int(place * len(content))
        content[at : at + len(piece)] = piece
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "fuzz.rec")
        path.write_bytes(content[: round(cut * len(content))])
        for command in (
            ["replay"],
            ["replay", "--steps"],
            ["replay", "--round", "1"],
            ["replay", "--strategy", "priority"],
            ["explain"],
            ["explain", "--request", "r1"],
        ):
            assert_well_said([*command, str(path)])


@functools.cache
def _recording() -> bytes:
    """The bytes of a small recording."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.rec")
        recorded(path, requests(4))
        return path.read_bytes()


def check_strategy(text: str) -> None:
    """A strategy of the command line is one, or is refused with a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.rec")
        path.write_bytes(_recording())
        assert_well_said(["replay", f"--strategy={text}", str(path)])


def check_words(words: list[str]) -> None:
    # An argument cannot hold a NUL; `run` would serve and `--help` prints, which is no error.
    clean = [word.replace("\0", "") for word in words]
    code, _, err = run([*clean[:1], "--nonsense", *clean[1:]] if clean else ["--nonsense"])
    assert code in (0, 1, 2), err
    assert "Traceback" not in err


def check_plan_json(edits: list[Edit]) -> None:
    text = edited(to_json(PLAN).decode(), edits)
    with contextlib.suppress(PlanError):
        check(from_json(text.encode("utf-8", errors="surrogatepass")))


def check_plan_bytes(content: bytes) -> None:
    with contextlib.suppress(PlanError):
        check(decode(content))


PLAN = ExecutionPlan(
    plan_id="p", round=1, target_instance_id="p0", mode="hybrid", num_steps=2, max_step_tokens=64
)

OPTIONS = st.lists(
    st.sampled_from(
        [
            "order",
            "chunk-prefill",
            "fuse-steps",
            "select-device",
            "legalize",
            "cse",
            "serve",
            "plan",
            "{",
            "}",
            "=",
            ",",
            '"',
            "tokens",
            "mode",
            "hybrid",
            "12",
            "-3",
            "1.5",
            "true",
            "none",
            "[",
            "]",
            "mlir-opt",
        ]
    )
    | st.text(max_size=3),
    max_size=8,
).map("".join)

WORDS = st.lists(
    st.sampled_from(
        [
            "opt",
            "compile",
            "run",
            "fmt",
            "passes",
            "doctor",
            "completion",
            "strategies",
            "replay",
            "explain",
            "--strategy",
            "--request",
            "--round",
            "--steps",
            "--on",
            "--limit",
            "-p",
            "-o",
            "-t",
            "--json",
            "--emit",
            "x",
        ]
    )
    | st.text(max_size=5),
    max_size=5,
)

BYTES = st.lists(st.tuples(st.floats(0, 0.999), st.binary(max_size=6)), max_size=3)

STRATEGIES = st.lists(
    st.sampled_from(
        ["fifo", "slo-aware", "priority", "{", "}", "=", " ", ",", "margin", "chooser", "reject",
         "weighted", "0.5", "-1", "1e999", "true", '"', "strategy", "x", "order by", "arrival",
         "admit while", "kv_free", "< 5%", "preempt max", "slack", "%"]
    )
    | st.text(max_size=3),
    max_size=8,
).map("".join)  # fmt: skip

Check = Callable[..., None]


def checked(check: Check, examples: int, *strategies: st.SearchStrategy[object]) -> None:
    """Run a check on so many drawn examples."""
    hurried = settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck)
    )
    hurried(given(*strategies)(check))()


CASES = [
    pytest.param(check_mlir, (st.sampled_from(PAGES), EDITS), 60, id="mlir"),
    pytest.param(check_sage, (st.sampled_from(EXAMPLES), EDITS), 60, id="sage"),
    pytest.param(check_options, (OPTIONS,), 60, id="options"),
    pytest.param(check_recording, (BYTES, st.just(1.0) | st.floats(0, 1)), 30, id="recording"),
    pytest.param(check_strategy, (STRATEGIES,), 40, id="strategy"),
    pytest.param(check_words, (WORDS,), 40, id="words"),
    pytest.param(check_plan_json, (EDITS,), 60, id="plan-json"),
    pytest.param(check_plan_bytes, (st.binary(max_size=200),), 40, id="plan-bytes"),
]


@pytest.mark.parametrize(("check", "strategies", "examples"), CASES)
def test_broken_input_is_named_and_never_a_traceback(
    check: Check, strategies: tuple[st.SearchStrategy[object], ...], examples: int
) -> None:
    checked(check, examples, *strategies)


@pytest.mark.slow
@pytest.mark.parametrize(("check", "strategies", "examples"), CASES)
def test_thousands_of_broken_inputs_are_named(
    check: Check, strategies: tuple[st.SearchStrategy[object], ...], examples: int
) -> None:
    checked(check, 15 * examples, *strategies)
