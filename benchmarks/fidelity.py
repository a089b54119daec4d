"""How close a simulation comes to the torch engine: the same workload on both, side by side.

    taskset -c 0,1 python benchmarks/fidelity.py --out out

A model of 28 M parameters is made on the spot and its steps are measured (`sagec profile`). Then a
workload is served by `sagec run` on the torch engine, in a process of its own, and by
`sagec simulate` with that profile. The error of a quantile is (simulated - real) / real; real is
the median of the turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tables
from engine import VOCAB, make_model

CLUSTER = """
model m from "{folder}"
cluster c {{
  device cpu kind cpu profile "{profile}"
  instance i0 role both on cpu engine torch model m kv_blocks 600 block 16 budget 256 max_batch 32
      options "prefix_cache=off"
}}
serve on c mode {mode} chunk 128 horizon 16 {{
{requests}
}}
"""

LOADS = {"light": 1.2, "busy": 2.5, "crowded": 5.0}
"""Requests a second, of about 200 prompt tokens and 40 of output."""

FIGURES = ("ttft_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True)
class Error:
    """A quantile of a figure on the engine, simulated, and how far they are from each other."""

    load: str
    mode: str
    figure: str
    real_ms: float
    simulated_ms: float
    error: float


def workload(rate_per_s: float, count: int, seed: int = 5) -> str:
    """Requests as .sage has them, made up from a seed."""
    draw = random.Random(seed)
    lines, now_s = [], 0.0
    for number in range(count):
        now_s += draw.expovariate(rate_per_s)
        prompt = min(900, max(8, round(draw.lognormvariate(5.0, 0.7))))
        output = min(120, max(2, round(draw.lognormvariate(3.5, 0.5))))
        lengths = f"tokens {prompt} generate {output}"
        lines.append(f'  request "r{number}" {lengths} arrives {round(1e3 * now_s)}ms')
    return "\n".join(lines)


def sagec(*words: str) -> str:
    """What a command prints, run in a process of its own. Raises CalledProcessError."""
    done = subprocess.run(
        [sys.executable, "-m", "sagec.cli", *words], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout


def real(file: Path) -> dict[str, float]:
    """Quantiles of a run on the engine."""
    rows = json.loads(sagec("run", str(file), "--json"))["requests"]
    e2e = [
        row["ttft_ms"] + row["tpot_ms"] * (row["output_tokens"] - 1)
        for row in rows
        if row["tpot_ms"] is not None
    ]
    found = {
        "ttft_ms": [row["ttft_ms"] for row in rows],
        "tpot_ms": [row["tpot_ms"] for row in rows if row["tpot_ms"] is not None],
        "e2e_ms": e2e,
    }
    return {
        f"{figure} p{q}": float(np.percentile(values, q))
        for figure, values in found.items()
        for q in (50, 99)
    }


def simulated(file: Path) -> dict[str, float]:
    """The same of a simulation."""
    total: dict[str, Any] = json.loads(sagec("simulate", str(file), "--json"))["total"]
    return {f"{figure} p{q}": total[figure][f"p{q}"] for figure in FIGURES for q in (50, 99)}


def errors(folder: Path, count: int, turns: int) -> list[Error]:
    """Serve every load in both modes on both."""
    make_model(folder / "model")
    profile = folder / "here.json"
    print(sagec("profile", str(folder / "model"), "-o", str(profile)))
    found = []
    for load, rate in LOADS.items():
        for mode in ("hybrid", "time-share"):
            file = folder / f"{load}-{mode}.sage"
            requests = workload(rate, count)
            file.write_text(
                CLUSTER.format(
                    folder=folder / "model", profile=profile, mode=mode, requests=requests
                ),
                "utf-8",
            )
            ours, runs = simulated(file), [real(file) for _ in range(turns)]
            for figure, value in ours.items():
                on_engine = statistics.median(run[figure] for run in runs)
                error = (value - on_engine) / on_engine
                found.append(Error(load, mode, figure, on_engine, value, error))
            print(f"{load}, {mode}: done")
    return found


def report(found: Sequence[Error]) -> str:
    """The table, and below it the median of the errors."""
    rows: list[list[object]] = [
        [e.load, e.mode, e.figure, e.real_ms, e.simulated_ms, f"{e.error:+.1%}"] for e in found
    ]
    median = statistics.median(abs(error.error) for error in found)
    worst = max(found, key=lambda error: abs(error.error))
    heads = ["load", "mode", "figure", "engine ms", "simulated ms", "error"]
    return (
        "# Fidelity of the simulator\n\n"
        f"{tables.machine_line(tables.machine())} A vocabulary of {VOCAB}.\n\n"
        f"{tables.table_of(heads, rows)}\n\n"
        f"Median error {median:.1%}; worst {worst.error:+.1%} ({worst.load}, {worst.mode}, "
        f"{worst.figure}).\n"
    )


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=60, help="requests of a run")
    parser.add_argument("--turns", type=int, default=3, help="runs on the engine")
    parser.add_argument("--out", type=Path, help="folder for fidelity.json and fidelity.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = errors(Path(folder), args.count, args.turns)
    text = report(found)
    if args.out is not None:
        answer = {**tables.machine(), "errors": [asdict(error) for error in found]}
        tables.write(args.out, "fidelity", answer, text, {})
    tables.show(text)


if __name__ == "__main__":
    main()
