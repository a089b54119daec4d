"""The command line as a person meets it: what it prints, where, and the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sagec.cli import arguments, failure, main, serving, writing
from sagec.runtime.engines import Capability, EngineError
from sagec.runtime.loop import Instance

GRAPH = """\
pd.graph @g {
  %new = pd.requests [
    "chat-1": prompt 1024 generate 256
  ] : !pd.wave<1>
  pd.yield %new : !pd.wave<1>
}
"""

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def graph(tmp_path: Path) -> str:
    path = tmp_path / "graph.mlir"
    path.write_text(GRAPH, encoding="utf-8")
    return str(path)


def fails(argv: Sequence[str], code: int, captured: Captured) -> str:
    """What stderr says when the command ends with this code and prints nothing else."""
    assert main(argv) == code
    out, err = captured.readouterr()
    assert "Traceback" not in err
    assert out == ""
    return err


def test_help_lists_every_command(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("run", "compile", "opt", "fmt", "passes", "doctor", "completion"):
        assert f"\n    {name} " in out


def test_without_a_command_the_help_is_printed(capsys: Captured) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: sagec")


def test_the_version_is_that_of_the_package(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "sagec 0.1.0\n"


@pytest.mark.parametrize("name", ["run", "compile", "opt", "fmt", "passes", "doctor", "completion"])
def test_each_command_has_help_with_examples(name: str, capsys: Captured) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: sagec {name}" in out
    assert f"  sagec {name}" in out.partition("examples:")[2]


def test_an_unknown_command_is_one_line_with_the_likely_one(capsys: Captured) -> None:
    err = fails(["complie"], 2, capsys)
    assert err.startswith("sagec: error: no command 'complie'; did you mean 'compile'?")
    assert err.count("\n") == 1


def test_an_unknown_option_is_one_line_with_the_likely_one(capsys: Captured) -> None:
    err = fails(["opt", "--print-ir-afterall"], 2, capsys)
    assert "no option '--print-ir-afterall'; did you mean '--print-ir-after-all'?" in err
    assert err.count("\n") == 1


def test_an_unknown_choice_is_one_line_with_the_likely_one(capsys: Captured) -> None:
    err = fails(["compile", "x.sage", "--emit", "plans"], 2, capsys)
    assert "no emit 'plans'; did you mean 'plan'?" in err


def test_an_option_without_its_value_is_bad_usage(capsys: Captured) -> None:
    assert "expected one argument" in fails(["opt", "-p"], 2, capsys)


def test_two_dashes_are_no_value(capsys: Captured) -> None:
    err = fails(["opt", "--passes=--", "x.mlir"], 2, capsys)
    assert "argument -p/--passes: '--' is no value" in err


def test_an_argument_too_many_is_bad_usage(capsys: Captured) -> None:
    assert "'b.mlir' is one argument too many" in fails(["opt", "a.mlir", "b.mlir"], 2, capsys)


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "²"])
def test_a_count_is_a_whole_number_from_one_on(text: str, capsys: Captured) -> None:
    err = fails(["run", "x.sage", f"--limit={text}"], 2, capsys)
    assert f"{text!r} is no whole number from 1 on" in err


def test_opt_prints_what_it_read(graph: str, capsys: Captured) -> None:
    assert main(["opt", graph]) == 0
    assert '"chat-1": prompt 1024 generate 256' in capsys.readouterr().out


def test_opt_writes_to_a_file(graph: str, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "out.mlir"
    assert main(["opt", graph, "-o", str(target)]) == 0
    assert capsys.readouterr().out == ""
    assert "pd.graph @g" in target.read_text("utf-8")


def test_opt_runs_passes_of_xdsl_too(graph: str, capsys: Captured) -> None:
    assert main(["opt", "-p", "canonicalize, cse", graph]) == 0
    assert "pd.graph @g" in capsys.readouterr().out


def test_opt_prints_the_ir_after_every_pass_also_the_last(graph: str, capsys: Captured) -> None:
    assert main(["opt", "-p", "canonicalize,cse", "--print-ir-after-all", graph]) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("// IR after")] == [
        "// IR after canonicalize",
        "// IR after cse",
    ]
    assert err.count("pd.graph @g") == 2


def test_opt_times_every_pass_on_stderr(graph: str, capsys: Captured) -> None:
    assert main(["opt", "-p", "canonicalize,cse", "--time-passes", graph]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[1:] for line in err.splitlines()] == [
        ["ms", "canonicalize"],
        ["ms", "cse"],
    ]
    assert "ms" not in out.split()


def test_opt_prints_the_generic_form(graph: str, capsys: Captured) -> None:
    assert main(["opt", "--print-op-generic", graph]) == 0
    assert '"pd.graph"()' in capsys.readouterr().out


def test_opt_reads_stdin(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GRAPH.encode())))
    assert main(["opt"]) == 0
    assert "pd.graph @g" in capsys.readouterr().out


def test_opt_never_patches_xdsl(graph: str) -> None:
    from xdsl.ir import Attribute

    before = Attribute.__post_init__
    assert main(["opt", graph]) == 0
    assert Attribute.__post_init__ is before


def test_what_does_not_parse_is_shown_with_a_caret(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text(GRAPH.replace("yield %new : !pd.wave<1>", "yield %new : !pd.wave<2>"))
    err = fails(["opt", str(path)], 1, capsys)
    first, line, caret = err.rstrip("\n").split("\n")
    assert first.startswith(f"{path}:5:")
    assert ": error: " in first
    assert "pd.yield %new : !pd.wave<2>" in line
    assert "^" in caret


def test_lines_of_a_split_file_count_from_its_beginning(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "split.mlir"
    path.write_text(f"{GRAPH}// -----\npd.nothing\n// -----\n{GRAPH}")
    code = main(["opt", "--split-input-file", "--parsing-diagnostics", str(path)])
    out = capsys.readouterr().out
    assert code == 0
    assert f"{path}:8:1: error: no op 'pd.nothing'" in out
    assert out.count("pd.graph @g") == 2


def test_a_verifier_speaks_with_a_place(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text(
        "\ncluster.model @m {layers = 4, hidden = 256, heads = 7, kv_heads = 2, head_dim = 32, "
        "ffn = 688, vocab = 1024}\n"
    )
    err = fails(["opt", str(path)], 1, capsys)
    assert err.startswith(f"{path}:2:1: error: cluster.model: 7 heads do not share 2 kv_heads")
    assert main(["opt", "--verify-diagnostics", str(path)]) == 0
    assert "7 heads do not share" in capsys.readouterr().out


def test_a_missing_file_is_named_with_its_neighbour(graph: str, capsys: Captured) -> None:
    missing = graph.replace("graph.mlir", "grap.mlir")
    err = fails(["opt", missing], 1, capsys)
    assert err == f"error: {missing}: No such file or directory; did you mean {graph!r}?\n"


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "graph.txt"
    path.write_text(GRAPH)
    err = fails(["opt", str(path)], 1, capsys)
    assert err == f"error: {path}: sagec reads .mlir or .sage; say which with --frontend\n"
    assert main(["opt", "-f", "mlir", str(path)]) == 0


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "graph.mlir"
    path.write_bytes(b"// one\n// two \xff\n")
    err = fails(["opt", str(path)], 1, capsys)
    assert err == f"error: {path}:2: byte 0xff is not UTF-8 text\n"


def test_a_folder_is_no_input(tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "x.mlir"
    folder.mkdir()
    assert "directory" in fails(["opt", str(folder)], 1, capsys)


def test_nothing_is_written_into_a_folder_that_is_missing(
    graph: str, tmp_path: Path, capsys: Captured
) -> None:
    target = tmp_path / "none" / "out.mlir"
    err = fails(["opt", graph, "-o", str(target)], 1, capsys)
    assert str(tmp_path / "none") in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("canonicalise", "no pass 'canonicalise'; did you mean 'canonicalize'?"),
        ("order,check{x=1}", "pipeline check takes no options; give them to its passes"),
        ("cse{x=1}", "pass cse: no option 'x'; there are none"),
        ("cse{", "'cse{' does not parse as passes"),
        ("cse,,dce", "'cse,,dce' does not parse as passes"),
        ("cse dce", "'cse dce' does not parse as passes"),
        ("{}", "'{}' does not parse as passes"),
        ("separate-phases{scheme=dp}", "pass separate-phases: scheme=dp is no pd|af|none"),
        ("chunk-prefill{tokns=3}", "no option 'tokns'; did you mean 'tokens'?"),
    ],
)
def test_a_pipeline_that_does_not_work_is_bad_usage(
    text: str, said: str, graph: str, capsys: Captured
) -> None:
    err = fails(["opt", "-p", text, graph], 2, capsys)
    assert said in err
    assert err.count("\n") == 1


def test_an_option_of_the_wrong_type_is_named(graph: str, capsys: Captured) -> None:
    err = fails(["opt", "-p", "chunk-prefill{tokens=many}", graph], 2, capsys)
    assert err == "sagec: error: pass chunk-prefill: tokens=many is no int\n"


def test_a_pass_of_xdsl_that_cannot_run_here_is_one_line(graph: str, capsys: Captured) -> None:
    err = fails(["opt", "-p", "mlir-opt", graph], 1, capsys)
    assert err.startswith("error: mlir-opt, which is xDSL's, fails: ")
    assert err.count("\n") == 1


def test_an_unknown_target_is_bad_usage(graph: str, capsys: Captured) -> None:
    assert "no target 'mlirr'; did you mean 'mlir'?" in fails(
        ["opt", "-t", "mlirr", graph], 2, capsys
    )


def test_a_fault_of_sagec_is_one_line_and_seventy(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(_: object) -> object:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(arguments, "parse", broken)
    err = fails(["opt"], 70, capsys)
    assert err.startswith("sagec: internal error: ZeroDivisionError: division by zero (")
    assert err.count("\n") == 1
    monkeypatch.setenv("SAGEC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["opt"])


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted(_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(arguments, "parse", interrupted)
    assert fails(["opt"], 130, capsys) == "sagec: interrupted\n"


def test_a_reader_that_leaves_early_is_no_fault(graph: str) -> None:
    many = Path(graph).with_name("many.mlir")
    rows = ",\n".join(f'"r{i}": prompt 7' for i in range(1000))
    many.write_text(
        f"pd.graph @g {{ %w = pd.requests [{rows}] : !pd.wave<1000>\n"
        "pd.yield %w : !pd.wave<1000> }"
    )
    command = f"{sys.executable} -m sagec.cli opt --print-op-generic {many} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_output_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        writing.write_text(str(path), "\ud800")
    assert path.read_text() == "before"
    writing.write_text(str(path), "after")
    assert path.read_text() == "after"
    assert os.listdir(tmp_path) == ["out.txt"]


def test_output_to_a_device_goes_there() -> None:
    writing.write_text(os.devnull, "gone")
    assert Path(os.devnull).exists()
    assert not Path(os.devnull).is_file()


def test_passes_are_told_with_their_options(capsys: Captured) -> None:
    assert main(["passes", "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    passes = {entry["name"]: entry for entry in there["passes"]}
    assert [option["name"] for option in passes["chunk-prefill"]["options"]] == ["tokens"]
    assert all(entry["summary"] for entry in there["passes"] + there["targets"])
    assert all(entry["reason"] for entry in there["pipelines"])
    assert main(["passes"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in passes)


def test_the_doctor_knows_this_python_and_the_engines(capsys: Captured) -> None:
    assert main(["doctor", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["python"]["detail"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["xdsl"]["here"]
    assert found["echo"]["here"]
    assert all(entry["here"] or entry["detail"] for entry in found.values())
    assert main(["doctor"]) == 0
    assert "engines" in capsys.readouterr().out


def test_the_doctor_names_what_an_engine_lacks(tmp_path: Path) -> None:
    from sagec.cli import machine

    (tmp_path / "warp.py").write_text("import os\ndef create():\n    import warp_drive.core\n")
    assert machine._missing_imports(tmp_path, "warp") == {"warp_drive"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_option(shell: str, capsys: Captured) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, parser in arguments.subparsers(arguments.tree()).items():
        assert name in script
        for action in parser._actions:
            for option in action.option_strings:
                assert (option if shell != "fish" else option.lstrip("-")) in script


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_one_the_shell_accepts(shell: str, capsys: Captured) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_options_and_choices(capsys: Captured) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in ("sagec", *words))
        code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}\n_sagec\n"
        code += 'printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("com") == ["compile", "completion"]
    assert completed("opt", "--print-o") == ["--print-op-generic"]
    assert completed("compile", "x", "--emit", "plan") == ["plan", "plan-text"]


def test_unknown_names_are_listed_where_the_list_is_short() -> None:
    assert failure.unknown("engine", "tosh", ["echo", "torch"]).endswith(
        "did you mean 'torch'? (there are: echo, torch)"
    )
    many = [f"pass-{i}" for i in range(100)]
    assert "there are" not in failure.unknown("pass", "x", many)


def piped(command: list[str], shell: str) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a command, which it finds as "$@"."""
    return subprocess.run(
        ["bash", "-c", shell, "-", sys.executable, "-m", "sagec.cli", *command],
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [
        pytest.param('"$@" | true; exit ${PIPESTATUS[0]}', 0, "", id="a-reader-that-left"),
        pytest.param('"$@" >&-', 0, "", id="closed"),
        pytest.param('"$@" <&- >&- 2>&-', 0, "", id="all-closed"),
        pytest.param(
            '"$@" >/dev/full', 1, "error: stdout: No space left on device\n", id="full-disk"
        ),
    ],
)
@pytest.mark.parametrize("command", [["strategies"], ["passes", "--json"]], ids=["rich", "plain"])
def test_a_stdout_that_takes_nothing_is_no_fault_of_sagec(
    command: list[str], shell: str, code: int, said: str
) -> None:
    done = piped(command, shell)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("option", ["--timeline", "--trace", "--record", "--spans"])
def test_what_cannot_be_written_is_said_before_anything_is_served(
    option: str, capsys: Captured, tmp_path: Path
) -> None:
    command = ["run", "examples/tour.sage", "--engine", "echo", "--one-process", option]
    assert main([*command, str(tmp_path)]) == 1
    assert capsys.readouterr() == (
        "",
        f"error: {tmp_path}: a folder; the name of a file is wanted\n",
    )
    assert main([*command, str(tmp_path / "none" / "x")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/none: no such folder to write to\n"


def test_spans_that_find_no_room_are_dropped_and_serving_goes_on(capsys: Captured) -> None:
    pytest.importorskip("opentelemetry.sdk")
    command = ["run", "examples/tour.sage", "--engine", "echo", "--one-process"]
    assert main([*command, "--json", "--spans", "/dev/full"]) == 0
    expected = "spans to /dev/full end here, serving goes on: No space left on device\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("option", ["--strategy", "--engine"])
def test_an_empty_name_is_no_name(option: str, capsys: Captured) -> None:
    assert main(["run", "examples/tour.sage", option, ""]) == 2
    assert capsys.readouterr().err.startswith("sagec: error: ")


def placed(name: str, role: str, kv_layout: str, model: str = "m") -> Instance:
    capability = Capability(
        kv_blocks=8,
        block_tokens=16,
        kv_layout=kv_layout,
        kv_bytes_per_token=4,
        max_context_tokens=128,
        eos_tokens=(),
    )
    return Instance(id=name, role=role, engine="echo", capability=capability, model=model)


def test_kv_that_nobody_could_take_is_refused_before_anything_is_served() -> None:
    p0, d0 = placed("p0", "prefill", "a"), placed("d0", "decode", "b")
    with pytest.raises(EngineError, match="'p0': KV of another layout than that of 'd0'; both"):
        serving.check_layouts([p0, d0, placed("d1", "decode", "a", model="another")])
    serving.check_layouts([p0, d0, placed("i0", "both", "a")])
    serving.check_layouts([p0])
    serving.check_layouts([d0, placed("i0", "both", "a")])
