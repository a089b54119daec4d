"""`sagec run --record`, `sagec replay` and `sagec explain`, as a person meets them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagec.cli import main
from sagec.runtime.recording import Recording
from sagec.runtime.recording.entries import Ended, Tokens

ROOT = Path(__file__).parent.parent.parent

GRAPH = """\
cluster.model @m {layers = 4, hidden = 256, heads = 8, kv_heads = 2, head_dim = 32, ffn = 688,
                  vocab = 1024}
cluster.device @c0 {kind = "cpu"}
cluster.device @c1 {kind = "cpu"}
cluster.link @c0 to @c1
cluster.instance @p0 on [@c0] engine "echo" role prefill model @m {kv_blocks = 200}
cluster.instance @d0 on [@c1] engine "echo" role decode model @m {kv_blocks = 200}
pd.graph @serve {policy = "fifo", horizon = 8} {
  %new = pd.requests [
    "long": prompt 1024 generate 25 ttft 1,
    "short": prompt 24 generate 37
  ] : !pd.wave<2>
  %kv = pd.prefill %new : !pd.kv<2>
  %end = pd.decode %kv : !pd.kv<2>
  pd.yield %end : !pd.kv<2>
}
"""

Captured = pytest.CaptureFixture[str]


def said(argv: list[str], captured: Captured, code: int = 0) -> tuple[str, str]:
    """What a command prints, on both streams, that ends with this code."""
    captured.readouterr()
    ended = main(argv)
    out, err = captured.readouterr()
    assert ended == code, out + err
    assert "Traceback" not in err
    return out, err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recording of a run on echo engines."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "echo.mlir").write_text(GRAPH, encoding="utf-8")
    path = str(folder / "echo.rec")
    command = ["run", str(folder / "echo.mlir"), "--one-process", "--json", "--record", path]
    assert main(command) == 0
    return path


def test_a_replay_says_that_every_plan_is_bit_identical(run: str, capsys: Captured) -> None:
    out, err = said(["replay", run], capsys)
    rounds = len(list(Recording(run).rounds()))
    assert out.startswith(f"{run}: {rounds} rounds, strategy fifo\n")
    assert f"plans bit-identical, {rounds} of {rounds} rounds decided and compiled" in out
    assert err == ""
    total = json.loads(said(["replay", run, "--json"], capsys)[0])
    assert total["plans"] == total["identical_plans"] > 0
    assert (total["rounds"], total["differing_rounds"], total["differences"]) == (rounds, 0, [])


def test_a_round_goes_through_the_compiler_again(run: str, capsys: Captured) -> None:
    text, _ = said(["replay", run, "--round", "1"], capsys)
    assert "// round 1, strategy fifo\n// plan round_1/" in text
    path = Path(run).parent / "round.mlir"
    path.write_text(text, encoding="utf-8")
    plans, _ = said(["compile", str(path)], capsys)
    assert 'plan "round_1/' in plans
    shown = json.loads(said(["replay", run, "--round", "1", "--json"], capsys)[0])
    assert shown["state"]["round"] == 1


def test_a_round_that_is_not_there_is_named(run: str, capsys: Captured) -> None:
    last = len(list(Recording(run).rounds())) - 1
    _, err = said(["replay", run, "--round", "4711"], capsys, code=1)
    assert err == f"error: {run}: no round 4711; there are 0 to {last}\n"


def test_another_strategy_is_compared(run: str, capsys: Captured) -> None:
    out, _ = said(["replay", run, "--strategy", "fifo"], capsys)
    assert out.endswith("rounds, 0 differences\n")
    picky = "strategy picky { order by arrival admit while prompt_tokens < 100 tokens }"
    out, _ = said(["replay", run, "--strategy", picky, "--limit", "1"], capsys)
    assert "round 0: long: admit (its turn, and it fits) -> defer" in out
    shown = json.loads(said(["replay", run, "--strategy", picky, "--json"], capsys)[0])
    assert shown["counts"]["admit -> defer"] > 0
    _, err = said(["replay", run, "--strategy", "fif"], capsys, code=2)
    assert err.startswith("sagec: error: --strategy: no strategy 'fif'; did you mean 'fifo'?")
    _, err = said(["replay", run, "--strategy", "strategy x { order by }"], capsys, code=2)
    assert err.startswith("sagec: error: --strategy: ")
    assert shown["changes"][0]["request_id"] == "long"


def test_the_requests_are_served_again(run: str, capsys: Captured) -> None:
    out, _ = said(["replay", run, "--on", "echo"], capsys)
    assert "2 requests served again on echo\n2 of 2 requests got the recorded tokens\n" in out
    shown = json.loads(said(["replay", run, "--on", "echo", "--json"], capsys)[0])
    assert (shown["compared"], shown["identical"], shown["other"]) == (2, 2, [])


def test_other_tokens_are_an_error(run: str, capsys: Captured, tmp_path: Path) -> None:
    copy = tmp_path / "other.rec"
    from sagec.replay import asked
    from sagec.runtime.clock import VirtualClock
    from sagec.runtime.loop import Arrived, Token
    from sagec.runtime.recording import Recorder

    recording = Recording(run)
    with Recorder(copy, recording.header, VirtualClock()) as recorder:
        for each in asked(recording):
            recorder.hear(Arrived(each.request))
            recorder.hear(Token(each.request.id, 0, each.tokens[0] + 1, 5))
    out, _ = said(["replay", str(copy), "--on", "echo"], capsys, code=1)
    assert "other tokens: long and short\n0 of 2 requests got the recorded tokens" in out


def test_a_story_is_told(run: str, capsys: Captured) -> None:
    out, _ = said(["explain", run, "--request", "long"], capsys)
    assert "with a prompt of 1024 tokens, to generate at most 25 tokens; promised: TTFT 1 us" in out
    assert "Round 0 gave it to p0, to decode on d0: its turn, and it fits." in out
    assert "p0 computed 1024 tokens of its prompt in" in out
    assert "the promised 1 us missed by" in out
    told = json.loads(said(["explain", run, "--request", "long", "--json"], capsys)[0])
    assert told["report"]["output_tokens"] == 25


def test_the_slowest_are_listed(run: str, capsys: Captured) -> None:
    out, _ = said(["explain", run], capsys)
    assert out.index("long") < out.index("short") or out.index("short") < out.index("long")
    rows = json.loads(said(["explain", run, "--json", "--limit", "1"], capsys)[0])
    assert len(rows) == 1
    assert rows[0]["request"] in ("long", "short")


def test_a_request_that_is_not_there_is_named(run: str, capsys: Captured) -> None:
    _, err = said(["explain", run, "--request", "shrt"], capsys, code=1)
    assert (
        err == f"error: {run}: no request 'shrt'; did you mean 'short'? (there are: long, short)\n"
    )


@pytest.mark.parametrize("command", ["replay", "explain"])
def test_a_cut_file_is_read_up_to_the_damage(
    run: str, capsys: Captured, tmp_path: Path, command: str
) -> None:
    cut = tmp_path / "cut.rec"
    cut.write_bytes(Path(run).read_bytes()[:-20])
    out, err = said([command, str(cut)], capsys, code=1)
    assert out.startswith(f"{cut}: ")
    assert err.startswith(f"error: {cut}: at byte ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["replay", "explain"])
def test_a_foreign_file_is_named(capsys: Captured, tmp_path: Path, command: str) -> None:
    path = tmp_path / "x.rec"
    path.write_text("hello")
    _, err = said([command, str(path)], capsys, code=1)
    assert err.startswith(f"error: {path}: not a recording: it begins with b'hello'")
    _, err = said([command, str(tmp_path / "none.rec")], capsys, code=1)
    assert err.startswith(f"error: {tmp_path / 'none.rec'}: No such file")


def test_a_run_records_over_no_other_file_and_into_no_missing_folder(
    capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "echo.mlir"
    path.write_text(GRAPH, encoding="utf-8")
    command = ["run", str(path), "--one-process", "--record"]
    _, err = said([*command, str(path)], capsys, code=1)
    assert "not a recording" in err
    _, err = said([*command, str(tmp_path / "none" / "x.rec")], capsys, code=1)
    assert "no such folder" in err
    assert path.read_text(encoding="utf-8") == GRAPH


def test_a_run_on_a_full_disk_serves_and_says_what_is_missing(
    capsys: Captured, tmp_path: Path
) -> None:
    path = tmp_path / "echo.mlir"
    path.write_text(GRAPH, encoding="utf-8")
    out, err = said(["run", str(path), "--one-process", "--record", "/dev/full"], capsys)
    assert "2 requests in" in out
    assert "rounds are not in it" in err


def test_a_run_can_leave_prompts_and_tokens_out(capsys: Captured, tmp_path: Path) -> None:
    path, rec = tmp_path / "echo.mlir", tmp_path / "x.rec"
    path.write_text(GRAPH, encoding="utf-8")
    command = ["run", str(path), "--one-process", "--json", "--record", str(rec)]
    said([*command, "--no-prompts"], capsys)
    said(["replay", str(rec)], capsys)
    _, err = said(["replay", str(rec), "--on", "echo"], capsys, code=1)
    assert "recorded without prompts" in err
    said([*command, "--no-tokens"], capsys)
    _, err = said(["replay", str(rec), "--on", "echo"], capsys, code=1)
    assert "recorded without tokens" in err


ENDLESS = """
import sys
from pathlib import Path
from sagec.runtime.loop import Planned
from tests.echo_cluster import requests
from tests.recordings import recorded
import sagec.runtime.recording.recorder as module

written = module.Recorder._write
def told(self):
    written(self)
    print(self.rounds, flush=True)
module.Recorder._write = told
recorded(Path(sys.argv[1]), requests(2000, every_us=2000))
"""


@pytest.mark.parametrize("rounds", [3, 40])
def test_a_process_that_is_killed_leaves_every_round_that_it_had_written(
    tmp_path: Path, rounds: int
) -> None:
    path = tmp_path / "killed.rec"
    command = [sys.executable, "-c", ENDLESS, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = 0
        for line in process.stdout:
            told = int(line)
            if told >= rounds:
                process.send_signal(signal.SIGKILL)
                break
    recording = Recording(path)
    read = [one.state.round for one in recording.rounds()]
    assert read[:told] == list(range(told))
    assert len(recording.damages) <= 1


def test_a_run_on_the_torch_engine_is_served_again_token_for_token(
    capsys: Captured, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    rec = tmp_path / "chat.rec"
    chat = str(ROOT / "examples" / "chat.sage")
    said(["run", chat, "--one-process", "--json", "--limit", "3", "--record", str(rec)], capsys)
    said(["replay", str(rec)], capsys)
    out, _ = said(["replay", str(rec), "--on", "torch"], capsys)
    assert "3 of 3 requests got the recorded tokens" in out
    found = list(Recording(rec).entries())
    sampled = sum(len(entry.tokens) for entry in found if isinstance(entry, Tokens))
    ended = sum(entry.report.output_tokens for entry in found if isinstance(entry, Ended))
    assert sampled == ended > 0


def figures(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_benchmark_of_recording_runs(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/recorder.py", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert figures(tmp_path / "recorder.json")["run"]["rounds"] > 0
    assert "| running |" in (tmp_path / "recorder.md").read_text(encoding="utf-8")


def test_step_times_are_held_against_predictions(capsys: Captured, tmp_path: Path) -> None:
    text = (ROOT / "examples" / "rivals.sage").read_text("utf-8")
    source, path = tmp_path / "rivals.sage", str(tmp_path / "sim.rec")
    source.write_text(text.replace('from "', f'from "{ROOT}/examples/'), encoding="utf-8")
    out, _ = said(
        ["run", str(source), "--engine", "sim", "--one-process", "--record", path], capsys
    )
    assert "no texts: a simulator counts tokens and does not know them" in out
    out, _ = said(["replay", path, "--steps"], capsys)
    assert "steps against predicted times" in out
    assert "100%" in out  # the simulator takes what the compiler predicts
    (row,) = json.loads(said(["replay", path, "--steps", "--json"], capsys)[0])
    assert row["instance"] == "i0"
    assert row["num_close"] == row["num_steps"] > 0
    out, _ = said(["replay", path, "--on", "sim"], capsys)
    assert "0 of 0 requests got the recorded tokens; 12 not compared" in out
    out, _ = said(["explain", path, "--request", "token"], capsys)
    assert re.search(r"i0 decoded 23 more tokens in .* ms", out)


def test_other_engines_than_the_recorded_one_are_named(run: str, capsys: Captured) -> None:
    out, _ = said(["replay", run, "--on", "sim"], capsys)
    assert "2 requests served again on sim, recorded on echo\n" in out
    for engine in ("", "ech"):
        _, err = said(["replay", run, "--on", engine], capsys, code=2)
        assert err.startswith(f"sagec: error: no engine {engine!r}; ")


def test_damage_is_named_though_nothing_is_found(
    run: str, capsys: Captured, tmp_path: Path
) -> None:
    content = Path(run).read_bytes()
    cut = tmp_path / "cut.rec"
    cut.write_bytes(content[: content.index(b"\xc1sg", 30) + 20])
    for argv in (["explain", str(cut), "--request", "long"], ["replay", str(cut), "--round", "1"]):
        _, err = said(argv, capsys, code=1)
        assert "it ends within a frame" in err
        assert err.splitlines()[-1].startswith(f"error: {cut}: no ")
    out, _ = said(["explain", str(cut)], capsys, code=1)
    assert out == f"{cut}: no request ended in it\n"


def test_requests_that_had_not_ended_are_listed(run: str, capsys: Captured, tmp_path: Path) -> None:
    content = Path(run).read_bytes()
    for end in range(len(content) - 1, 0, -1):
        if content.startswith(b"\xc1sg", end):
            break
    cut = tmp_path / "cut.rec"
    cut.write_bytes(content[:end])
    out, _ = said(["explain", str(cut)], capsys)
    assert re.search(r"\d requests? had not ended with the recording: ", out)
