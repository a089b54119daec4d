"""Benchmarks that nothing else runs: a small run of each gives the tables that it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sagec.runtime import native

HERE = Path(__file__).parents[2] / "benchmarks"


def measured(name: str, code: str, out: Path) -> tuple[dict[str, Any], str]:
    """What a benchmark, which is a script, writes as JSON and Markdown; code: ends in a call."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}\n{code}"],
        cwd=HERE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    markdown = (out / f"{name}.md").read_text("utf-8")
    assert markdown.strip() == done.stdout.strip()
    return json.loads((out / f"{name}.json").read_text("utf-8")), markdown


def test_the_simulator_serves_traces_to_the_same_ends_whoever_plans_rounds_and_simulates(
    tmp_path: Path,
) -> None:
    if native.recipe().compiler() is None:
        pytest.skip("no C++ compiler")
    words = ["--out", str(tmp_path), "--limit", "20", "--planner", "direct", "--planner", "ir"]
    found, markdown = measured("simulator", f"simulator.main({words})", tmp_path)
    by_trace: dict[str, list[dict[str, Any]]] = {}
    for one in found["results"]:
        by_trace.setdefault(one["trace"], []).append(one)
    assert set(by_trace) == {"azure", "mooncake"}
    for runs in by_trace.values():
        ways = [(one["core"], one["planner"]) for one in runs]
        assert ways == [("python", "direct"), ("python", "ir"), ("native", "direct")]
        assert len({one["digest"] for one in runs}) == 1
        assert len({(one["rounds"], one["reports"], one["steps"]) for one in runs}) == 1
        assert all(one["requests"] == 20 and one["requests_per_s"] > 0 for one in runs)
        assert f" {runs[0]['digest']} |" in markdown


def test_ranks_take_turns_and_their_memory_is_held_against_the_plan(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    words = ["--out", str(tmp_path), "--turns", "1", "--batch", "2", "--prompt", "8"]
    code = "parallel.WAYS = parallel.WAYS[:2]\n"
    found, markdown = measured(
        "parallel", f"{code}parallel.main({[*words, '--steps', '2']})", tmp_path
    )
    one, two = found["step_times"]
    assert (one["way"], two["way"]) == ("1 rank", "2 ranks")
    assert one["messages"] == 0 < two["messages"]
    assert two["ratio"] == 1.0
    assert min(one["prefill_ms"], two["decode_ms"]) > 0
    assert [(peak["way"], peak["step"]) for peak in found["peaks"]] == [
        (way, step) for way in ("1 rank", "2 ranks") for step in ("prefill", "decode")
    ]
    assert all(0 < peak["planned_kib"] <= peak["naive_kib"] for peak in found["peaks"])
    assert "| 2 ranks |" in markdown
