"""The gate: what is worse than the stored baseline is found, and what does not fit is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"


BEGIN = """
import gate, json
before = json.loads(gate.BASELINE.read_text())
before = {name: value for name, value in before.items() if gate.TIMED not in name}
"""


def gate(code: str) -> subprocess.CompletedProcess[str]:
    """Run some Python beside the gate, which is a script."""
    return subprocess.run(
        [sys.executable, "-c", BEGIN + code], cwd=HERE, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("figure", "times", "worse"),
    [
        ("apart.ttft_p50_ms", 1.02, False),
        ("apart.ttft_p50_ms", 1.05, True),
        ("apart.ttft_p50_ms", 0.5, False),
        ("hybrid.mfu", 0.97, True),
        ("hybrid.mfu", 1.5, False),
        ("tp2.decode_message_share", 1.1, True),
    ],
)
def test_a_figure_may_be_worse_by_as_much_as_its_threshold_says(
    figure: str, times: float, worse: bool
) -> None:
    done = gate(
        f"now = before | {{{figure!r}: before[{figure!r}] * {times}}}\n"
        "found = gate.compared(before, now)\n"
        "print(json.dumps([one.name for one in found if not one.is_kept]))\n"
        "print(gate.report(found))"
    )
    assert done.returncode == 0, done.stderr
    first, _, text = done.stdout.partition("\n")
    assert json.loads(first) == ([figure] if worse else [])
    assert ("WORSE" in text) == worse


def test_a_figure_that_the_baseline_lacks_is_named() -> None:
    done = gate(
        "try:\n  gate.compared(before, before | {'hybrid.new': 1.0})\n"
        "except gate.GateError as error:\n  print(error)"
    )
    assert done.stdout == (
        "hybrid.new is in this run alone; --write-baseline after a change that is meant\n"
    )


def test_the_workload_is_what_its_generator_makes() -> None:
    lines = (HERE / "gate" / "sessions.jsonl").read_text("utf-8").splitlines()
    done = gate("print(json.dumps(gate.sessions()))")
    assert json.loads(done.stdout) == [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "text", "read", "says"),
    [
        ("BASELINE", "{", "baseline", "Expecting property name"),
        ("BASELINE", "[1]", "baseline", "figures by name are wanted"),
        ("BASELINE", '{"a": "fast"}', "baseline", "figures by name are wanted"),
        ("THRESHOLDS", 'mfu = { better = "more", worse_by = 0.1 }', "thresholds", "mfu: Thresh"),
        ("THRESHOLDS", 'mfu = { better = "higher" }', "thresholds", "worse_by"),
    ],
)
def test_a_file_of_the_gate_that_is_none_is_told_with_its_name(
    name: str, text: str, read: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text(text, "utf-8")
    done = gate(
        f"from pathlib import Path\ngate.{name} = Path({str(path)!r})\n"
        f"try:\n  gate.{read}()\nexcept gate.GateError as error:\n  print(error)"
    )
    assert done.stdout.startswith(f"{path}: "), done.stderr
    assert says in done.stdout
