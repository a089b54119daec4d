"""`sagec run` end to end: from a file to text, a table, a picture and a trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from sagec.cli import main

ROOT = Path(__file__).parent.parent.parent
CHAT = ROOT / "examples" / "chat.sage"

Captured = pytest.CaptureFixture[str]

ECHO = """\
cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688,
                  vocab = 1024}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
cluster.link @c0 to @c1
cluster.instance @p0 on [@c0] engine "echo" role prefill model @m {kv_blocks = 200}
cluster.instance @d0 on [@c1] engine "echo" role decode model @m {kv_blocks = 200}
pd.graph @serve {policy = "fifo"} {
  %new = pd.requests [
    "long": prompt 1024 generate 25,
    "short": prompt 24 generate 7
  ] : !pd.wave<2>
  %kv = pd.prefill %new : !pd.kv<2>
  %end = pd.decode %kv : !pd.kv<2>
  pd.yield %end : !pd.kv<2>
}
"""


@pytest.fixture
def echo(tmp_path: Path) -> str:
    path = tmp_path / "echo.mlir"
    path.write_text(ECHO, encoding="utf-8")
    return str(path)


def served(argv: list[str], captured: Captured) -> dict[str, Any]:
    """The JSON of a run that ends well."""
    code = main(["run", *argv, "--json"])
    out, err = captured.readouterr()
    assert (code, err) == (0, ""), out
    result: dict[str, Any] = json.loads(out)
    return result


def test_the_demo_answers_each_request_in_words(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    picture, trace = tmp_path / "chat.svg", tmp_path / "chat.json"
    command = [sys.executable, "-m", "sagec.cli", "run", str(CHAT)]
    done = subprocess.run(
        [*command, "--timeline", str(picture), "--trace", str(trace)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "> Question: What is a KV cache? Answer:" in done.stdout
    assert "A KV cache keeps the keys and values" in done.stdout
    for column in ("TTFT ms", "TPOT ms", "tok/s", "steps", "KV kB"):
        assert column in done.stdout
    assert done.stdout.rstrip().endswith(f"timeline: {picture}\ntrace (ui.perfetto.dev): {trace}")
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"process_name", "hand-over"} <= names


def test_two_processes_say_what_one_says(capsys: Captured) -> None:
    pytest.importorskip("torch")
    two = served([str(CHAT)], capsys)
    one = served([str(CHAT), "--one-process"], capsys)
    assert [r["tokens"] for r in one["requests"]] == [r["tokens"] for r in two["requests"]]
    assert [r["text"] for r in one["requests"]] == [r["text"] for r in two["requests"]]


@pytest.mark.parametrize("how", [(), ("--one-process",), ("--horizon", "3")])
def test_every_request_is_served_and_its_kv_moved(
    how: tuple[str, ...], echo: str, capsys: Captured
) -> None:
    result = served([echo, *how], capsys)
    assert [r["request"] for r in result["requests"]] == ["long", "short"]
    assert [r["output_tokens"] for r in result["requests"]] == [25, 7]
    assert [len(r["tokens"]) for r in result["requests"]] == [25, 7]
    assert all(r["end"] == "length" and not r["detail"] for r in result["requests"])
    assert all(r["ttft_ms"] >= 0 and r["steps"] > 0 for r in result["requests"])
    moved = [r["kv_moved_bytes"] for r in result["requests"]]
    assert all(moved)
    assert result["total"]["kv_moved_bytes"] == sum(moved)
    assert result["total"]["kv_moves"] == 2


def test_only_the_first_requests_are_served(echo: str, capsys: Captured) -> None:
    result = served([echo, "--limit", "1"], capsys)
    assert [r["request"] for r in result["requests"]] == ["long"]


def test_a_run_is_lines_and_a_table_in_a_pipe(echo: str, capsys: Captured) -> None:
    assert main(["run", echo, "--one-process"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\nshort | " in f"\n{out}"
    assert "[length]" in out
    assert "2 requests in " in out


def test_a_request_that_never_fits_is_told_and_the_run_is_not_well(
    tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "big.mlir"
    path.write_text(ECHO.replace("prompt 1024", "prompt 9000"), encoding="utf-8")
    assert main(["run", str(path), "--one-process"]) == 1
    out = capsys.readouterr().out
    assert "[rejected: " in out
    assert "9000 prompt tokens" in out


def test_an_engine_that_does_not_exist_is_bad_usage(echo: str, capsys: Captured) -> None:
    assert main(["run", echo, "--engine", "ecco"]) == 2
    assert "no engine 'ecco'; did you mean 'echo'?" in capsys.readouterr().err


def test_a_strategy_that_does_not_exist_is_named(echo: str, capsys: Captured) -> None:
    assert main(["run", echo, "--strategy", "fito"]) == 2
    assert "no strategy 'fito'; did you mean 'fifo'?" in capsys.readouterr().err


def test_an_engine_that_cannot_start_is_one_line(echo: str, capsys: Captured) -> None:
    pytest.importorskip("torch")
    assert main(["run", echo, "--engine", "torch", "--one-process"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "config.json" in err
    assert err.count("\n") == 1


def test_a_file_without_requests_is_told_so(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "empty.mlir"
    path.write_text(ECHO.partition("pd.graph")[0], encoding="utf-8")
    assert main(["run", str(path)]) == 1
    assert "no request to serve" in capsys.readouterr().err


@pytest.mark.parametrize("emit", ["ir", "plan", "plan-text"])
def test_compile_writes_what_is_asked_for(
    emit: str, echo: str, tmp_path: Path, capsys: Captured
) -> None:
    target = tmp_path / "out"
    assert main(["compile", echo, "--emit", emit, "-o", str(target)]) == 0
    assert capsys.readouterr().out == ""
    written = target.read_text("utf-8")
    if emit == "plan":
        assert {plan["target_instance_id"] for plan in json.loads(written)} == {"p0", "d0"}
    else:
        assert ("pd.steps" if emit == "ir" else 'plan "serve/p0"') in written


def test_what_compile_emits_as_ir_opt_reads_again(echo: str, capsys: Captured) -> None:
    assert main(["compile", echo, "--emit", "ir"]) == 0
    text = capsys.readouterr().out
    path = Path(echo).with_name("again.mlir")
    path.write_text(text, encoding="utf-8")
    assert main(["opt", str(path)]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


def test_compile_takes_passes_for_a_pipeline(echo: str, capsys: Captured) -> None:
    assert main(["compile", echo, "--emit", "ir", "--pipeline", "order, apply-decision"]) == 0
    assert "pd.steps" not in capsys.readouterr().out
    assert main(["compile", echo, "--pipeline", "serv"]) == 2
    assert "no pass 'serv'; did you mean 'serve'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "examples").glob("*.sage")))
def test_every_example_compiles_and_is_formatted(name: str, capsys: Captured) -> None:
    path = str(ROOT / "examples" / name)
    assert main(["fmt", "--check", path]) == 0
    assert main(["compile", path]) == 0
    assert capsys.readouterr().out.startswith('plan "')


def test_fmt_writes_only_what_changes(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "a.sage"
    path.write_text("model   m\n { layers 4  hidden 64 heads 2 ffn 64 vocab 99 }\n")
    assert main(["fmt", "--check", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert main(["fmt", "--stdout", str(path)]) == 0
    canonical = capsys.readouterr().out
    assert path.read_text() != canonical
    assert main(["fmt", str(path)]) == 0
    assert path.read_text() == canonical
    assert main(["fmt", "--check", str(path)]) == 0
    capsys.readouterr()
    path.write_text("model {")
    assert main(["fmt", str(path)]) == 1
    assert capsys.readouterr().err.startswith(f"{path}:1:")
    assert path.read_text() == "model {"


def test_a_picture_without_a_folder_is_refused_before_anything_starts(
    echo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", echo, "--timeline", "no/such/folder/x.svg"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: no/such/folder: no such folder to write to\n")


def test_what_one_question_computed_the_next_one_finds(capsys: Captured) -> None:
    pytest.importorskip("torch")
    result = served([str(ROOT / "examples" / "cached.sage"), "--one-process"], capsys)
    reused = {row["request"]: row["reused_tokens"] for row in result["requests"]}
    assert reused == {"first": 0, "second": 64, "third": 64}
    assert result["total"]["reused_tokens"] == 128


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("vocab=50 eos", "instance @p0: options 'vocab=50 eos': 'eos' is no option"),
        ("speed=2", "instance 'p0': echo has no option 'speed'"),
        ("vocab=many", "instance 'p0': vocab='many': a whole number"),
    ],
)
def test_an_engines_own_options_come_from_the_file(
    options: str, said: str, tmp_path: Path, capsys: Captured
) -> None:
    file = tmp_path / "echo.mlir"
    file.write_text(ECHO.replace("kv_blocks = 200", f'kv_blocks = 200, options = "{options}"'))
    assert main(["run", str(file), "--one-process"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_options_change_what_the_engine_does(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "echo.mlir"
    file.write_text(ECHO.replace("kv_blocks = 200", 'kv_blocks = 200, options = "vocab=7"'))
    result = served([str(file), "--one-process"], capsys)
    assert all(token < 7 for row in result["requests"] for token in row["tokens"])
