"""`sagec simulate`: the same figures from the same file, whatever fails and however fast it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sagec.cli import main

MODEL = "model m { layers 4 hidden 512 heads 8 kv_heads 4 ffn 1024 vocab 1000 max_context 4096 }\n"
ONE = """cluster c {
  device g0 kind h100
  instance i0 role both on g0 engine torch kv_blocks 200 block 16 budget 256
}
"""
APART = """cluster c {
  devices g0..g2 kind h100
  links g0..g1 to g2 bandwidth 10GB/s latency 5us
  instances p0..p1 role prefill on g0..g1 engine sim kv_blocks 400 block 16 budget 512
  instance d0 role decode on g2 engine sim kv_blocks 400 block 16
}
"""
REQUESTS = """{
  request "a" tokens 300 generate 40 samples 6
  request "b" tokens 30 generate 90 arrives 2ms samples 6
  request "c" tokens 700 generate 1 arrives 5ms
}
"""
LINKS = {"one": [], "apart": ["g0 to g2", "g1 to g2"]}
CASES = {"one": (ONE, "hybrid chunk 128"), "apart": (APART, "strict chunk 256")}


def written(folder: Path, case: str, promises: str = "", requests: str = REQUESTS) -> str:
    cluster, mode = CASES[case]
    file = folder / "serve.sage"
    file.write_text(f"{MODEL}{cluster}serve on c mode {mode} {promises} {requests}", "utf-8")
    return str(file)


def simulated(captured: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    captured.readouterr()
    assert main(["simulate", *words, "--json"]) == code
    result: dict[str, Any] = json.loads(captured.readouterr().out)
    return result


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_counted_where_it_is_computed(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = simulated(capsys, written(tmp_path, case))
    rows = result["instances"]
    prompts = sum(row["prompt_tokens"] + row["reused_tokens"] for row in rows)
    assert prompts == 6 * 300 + 6 * 30 + 700
    assert sum(row["decode_tokens"] for row in rows) == 6 * 39 + 6 * 89
    assert result["total"]["served"] == result["total"]["served_well"] == 13
    assert 0 < result["total"]["mfu"] < 1
    assert all(0 <= row["busy"] <= 1 and 0 <= row["kv_peak"] <= 1 for row in rows)
    moved = sum(row["kv_sent_bytes"] for row in rows)
    assert moved == result["total"]["kv_moved_bytes"]
    assert (moved > 0) == (case == "apart")
    assert sum(link["bytes"] for link in result["links"]) == moved
    assert all(0 < link["use"] <= 1 for link in result["links"])
    assert [link["link"] for link in result["links"]] == LINKS[case]


@pytest.mark.parametrize("case", CASES)
def test_a_simulation_gives_the_same_bytes_again(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, case)
    for name in ("first", "second"):
        assert main(["simulate", file, "--report", str(tmp_path / name)]) == 0
    capsys.readouterr()
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert first == second
    assert {"report.json", "report.md", "ttft.svg", "tpot.svg", "queue.svg", "kv.svg"} <= set(first)
    assert ("links.svg" in first) == (case == "apart")


def test_a_promise_that_is_missed_is_not_served_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = '{ request "a" tokens 2000 generate 4 samples 8 }'
    lax = simulated(capsys, written(tmp_path, "one", "ttft 10s", asked))["total"]
    tight = simulated(capsys, written(tmp_path, "one", "ttft 1us", asked))["total"]
    assert (lax["served_well"], tight["served_well"]) == (8, 0)
    assert tight["served"] == 8
    assert tight["goodput_per_s"] == 0


def test_an_instance_that_fails_and_comes_back_loses_no_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, "apart")
    calm = simulated(capsys, file)["total"]
    failing = simulated(capsys, file, "--fail", "d0@3ms..20ms")["total"]
    assert failing["served"] == calm["served"] == 13
    assert failing["restarts"] > 0 == calm["restarts"]
    assert failing["duration_s"] > calm["duration_s"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fail", "d7@1s..2s"], "no instance 'd7' to fail; there are: i0"),
        (["--fail", "i0@2s..1s"], "it must be back later than it fails"),
        (["--fail", "i0"], "'i0' is no outage; as in d0@2s..10s"),
        (["--fail", "i0@soon"], "'soon' is no time; as in 2s, 1500ms"),
        (["--strategy", "fofo"], "--strategy: no strategy 'fofo'; there are: adaptive"),
    ],
)
def test_what_cannot_be_simulated_is_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", written(tmp_path, "one"), *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_broken_lines_of_a_trace_are_refused_or_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.68,30,4", "2023,1,2",
             "2023-11-16 18:15:47.10,50,2", "x"]  # fmt: skip
    (tmp_path / "trace.csv").write_text("\n".join(lines), "utf-8")
    refused = written(tmp_path, "one", requests='{ replay "trace.csv" }')
    assert main(["simulate", refused]) == 1
    assert "trace.csv:3:1: error: '2023' is no TIMESTAMP" in capsys.readouterr().err
    skipped = written(tmp_path, "one", requests='{ replay "trace.csv" broken_lines skip }')
    assert main(["simulate", skipped, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["total"]["requests"] == 2
    place = f"{tmp_path / 'trace.csv'}:3:1"
    said = f"2 lines skipped; the first: {place}: '2023' is no TIMESTAMP\n"
    assert err == said
    assert main(["compile", skipped]) == 0
    assert capsys.readouterr().err == said


def test_a_trace_shares_prefixes_as_it_was_recorded_though_tokens_are_only_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = {"input_length": 1100, "output_length": 3}
    rows = [{"timestamp": 1000 * i, **lengths, "hash_ids": [7, 8 + i]} for i in range(4)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    asked = '{ replay "trace.jsonl" }'
    file = Path(written(tmp_path, "one", requests=asked))
    text = file.read_text("utf-8").replace("engine torch", "engine sim")
    file.write_text(text.replace("budget 256", 'budget 256 options "prefix_cache=on"'), "utf-8")
    result = simulated(capsys, str(file))
    assert result["total"]["kv_hit_rate"] == pytest.approx(3 * 512 / (4 * 1100), abs=1e-4)
