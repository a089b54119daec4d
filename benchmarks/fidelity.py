"""How close a simulation comes to the torch engine: the same workload on both, side by side.

    OMP_NUM_THREADS=1 python benchmarks/fidelity.py --out out

A model of 28 M parameters is made on the spot. Each turn makes an engine anew, measures its steps
and the loop's turns as `sagec profile` does, serves the workloads on that engine and simulates them
with that profile: steps in one process have been 10% faster than in the next, all else the same.
One instance is in the loop's own process; a prefill and a decode instance are in processes of their
own (`sagec run`). The error of a quantile is (simulated - real) / real, the median of the turns. As
in the profile, time in which the one process wanted a processor that others had does not count.
What steps took against the profile is said beside. They do not take the same all day, so a case in
this process is simulated once more with the profile's steps so much longer, all by one factor, as
the case's steps took in sum: what is left of the error then is not the machine's speed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tables
from engine import VOCAB, make_model
from xdsl.dialects.builtin import ModuleOp

from sagec.cli.serving import spec_of
from sagec.compiler import Compiler
from sagec.passes.topology import Instance as Placed
from sagec.passes.topology import topology_of
from sagec.planner import member_of, planner_of
from sagec.runtime import engines, profile
from sagec.runtime.clock import WallClock
from sagec.runtime.cost import Fit
from sagec.runtime.engines import Engine, StepReport
from sagec.runtime.executor import ExecutorAPI
from sagec.runtime.loop import Finished
from sagec.runtime.loop_timer import measure
from sagec.runtime.profile import Profile
from sagec.runtime.report import RequestReport
from sagec.runtime.request import Request
from sagec.runtime.step_timer import Grid, StepTimer
from sagec.simulation import simulate

MODEL = """
model m from "{folder}"
cluster c {{
  device cpu kind cpu {profile}
{instances}
}}
serve on c mode {mode} chunk 128 horizon 16 {{
{requests}
}}
"""

SETTINGS = """engine torch model m kv_blocks 600 block 16 budget 256 max_batch 32
      options "prefix_cache=off\""""

ONE = f"  instance i0 role both on cpu {SETTINGS}"

PAIR = f"""  instance p0 role prefill on cpu {SETTINGS}
  instance d0 role decode on cpu {SETTINGS}"""

LOADS = {"light": 1.2, "busy": 2.5, "crowded": 5.0}
"""Requests a second, of about 200 prompt tokens and 40 of output."""

Case = tuple[str, str, str]
"""Instances, mode and load."""

CASES: tuple[Case, ...] = (
    *(("one", mode, load) for mode in ("hybrid", "time-share") for load in LOADS),
    ("pair", "strict", "busy"),
)

Figures = dict[str, float]
"""Milliseconds, by figure and quantile."""


@dataclass(frozen=True)
class Error:
    """A quantile of a figure on the engine, simulated, and how far they are from each other.

    paced: the error where steps are simulated at the speed that they had; None: it is not known.
    """

    instances: str
    mode: str
    load: str
    figure: str
    real_ms: float
    simulated_ms: float
    error: float
    paced: float | None


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


def figures_of(rows: Sequence[tuple[float, float | None, int]]) -> Figures:
    """Quantiles over requests: TTFT and TPOT in milliseconds, and tokens of output."""
    found = {
        "TTFT": [ttft for ttft, _, _ in rows],
        "TPOT": [tpot for _, tpot, _ in rows if tpot is not None],
        "end-to-end": [ttft + (tpot or 0.0) * (tokens - 1) for ttft, tpot, tokens in rows],
    }
    return {
        f"{figure} p{q}": float(np.percentile(values, q))
        for figure, values in found.items()
        for q in (50, 99)
    }


def figures_of_reports(reports: Sequence[RequestReport]) -> Figures:
    """The same of the loop's own reports, all of requests that were served."""
    rows = []
    for report in reports:
        assert report.ttft_us is not None
        tpot = None if report.tpot_us is None else report.tpot_us / 1e3
        rows.append((report.ttft_us / 1e3, tpot, report.output_tokens))
    return figures_of(rows)


def simulated(file: Path) -> Figures:
    """Of a simulation."""
    compiler = Compiler()
    unit = compiler.read(str(file))
    planner, requests = compiler.planner(unit.module), unit.requests(counted=True)
    found = simulate(unit.module, requests, unit.make_strategy(), planner)
    return figures_of_reports(found.reports)


# On the engine


class Undisturbed(WallClock):
    """The wall's time, less that in which this thread wanted a processor that others had; the
    wall's where the system does not count it."""

    def now_us(self) -> int:
        file = _schedstat()
        waited_ns = int(os.pread(file, 64, 0).split()[1]) if file is not None else 0
        return super().now_us() - waited_ns // 1000


@functools.cache
def _schedstat() -> int | None:
    """This thread's counters, open for as long as the process lives; opening takes time."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:
        return None


Ratios = dict[str, list[float]]
"""What steps took against what they should, by kind."""


class Steps:
    """Holds the steps of runs against a profile."""

    def __init__(self, fit: Fit, ratios: Ratios) -> None:
        """ratios: where they are noted."""
        self._fit, self._ratios = fit, ratios
        self._tokens: dict[str, int] = {}
        self._took_us = self._expected_us = 0.0

    def begin(self, requests: Sequence[Request]) -> None:
        """Another run, of these requests."""
        self._tokens = {request.id: len(request.prompt) for request in requests}
        self._took_us = self._expected_us = 0.0

    @property
    def pace(self) -> float:
        """What the steps of the run took in sum, of what the profile says."""
        return self._took_us / self._expected_us

    def hear(self, said: object) -> None:
        """Listen."""
        if not isinstance(said, StepReport) or not (said.chunks or said.decodes):
            return
        held = sum(self._tokens[name] for name in said.decodes)
        pairs = sum((e * (e + 1) - b * (b + 1)) / 2 for _, b, e in said.chunks)
        tokens = sum(e - b for _, b, e in said.chunks) + len(said.decodes)
        kind = "mixed" if said.chunks and said.decodes else "prefill" if said.chunks else "decode"
        expected_us = self._fit.one(tokens, pairs + held, held, len(said.decodes))
        took_us = said.end_us - said.begin_us
        self._ratios.setdefault(kind, []).append(took_us / expected_us)
        self._took_us += took_us
        self._expected_us += expected_us
        for name, _, _ in said.tokens:
            self._tokens[name] += 1


def served_here(file: Path, engine: Engine, steps: Steps) -> Figures:
    """Serve on the engine, in this process."""
    compiler = Compiler()
    unit = compiler.read(str(file))
    (placed,) = topology_of(unit.module).instances
    requests = unit.requests()
    steps.begin(requests)
    member = member_of(placed, engine)
    executor = ExecutorAPI({placed.name: engine}, [member], Undisturbed(), [steps.hear])
    outputs = executor.serve(requests, unit.make_strategy(), compiler.planner(unit.module))
    return figures_of_reports([o.report for o in outputs if isinstance(o, Finished)])


def served_apart(file: Path) -> Figures:
    """Serve on engines in processes of their own."""
    rows: list[dict[str, Any]] = json.loads(sagec("run", str(file), "--json"))["requests"]
    return figures_of([(row["ttft_ms"], row["tpot_ms"], row["output_tokens"]) for row in rows])


def text_of(folder: Path, case: Case, requests: str, measured: Path | None = None) -> str:
    """A case as .sage has it. measured: the profile."""
    instances, mode, _ = case
    return MODEL.format(
        folder=folder / "model",
        profile="" if measured is None else f'profile "{measured}"',
        instances={"one": ONE, "pair": PAIR}[instances],
        mode=mode,
        requests=requests,
    )


def written(folder: Path, case: Case, measured: Path, count: int) -> Path:
    """The file of a case."""
    file = folder / f"{'-'.join(case)}.sage"
    file.write_text(text_of(folder, case, workload(LOADS[case[2]], count), measured), "utf-8")
    return file


def made(folder: Path) -> tuple[ModuleOp, Placed, Engine]:
    """The one instance and its engine, new."""
    file = folder / "measured.sage"
    file.write_text(text_of(folder, CASES[0], '  request "none" tokens 1 generate 1'), "utf-8")
    module = Compiler().read(str(file)).module
    (placed,) = topology_of(module).instances
    return module, placed, engines.create(spec_of(placed, one_process=True))


def profiled(module: ModuleOp, placed: Placed, engine: Engine, repeats: int) -> Profile:
    """The profile of the engine, as `sagec profile` makes it."""
    model, most = placed.model, (placed.max_batch, placed.max_step_tokens)
    timer = StepTimer(engine, placed.name, model.vocab, *most)
    points = timer.points(replace(Grid(), repeats=repeats))
    times = measure(engine, member_of(placed, engine), planner_of(module), model.vocab)
    shape, kind = model.shape_in(placed.dtype), placed.devices[0].kind
    return Profile(placed.engine, kind, shape, points, **asdict(times))


@dataclass(frozen=True)
class Outcome:
    """What the engine gave for a case, what the simulation, and what the simulation at the pace
    that the engine's steps had, where that is known."""

    real: Figures
    simulated: Figures
    paced: Figures | None = None


Turn = dict[Case, Outcome]


def slower(found: Profile, factor: float) -> Profile:
    """The profile of an engine whose steps take so many times as long."""
    points = [replace(point, us=point.us * factor) for point in found.points]
    return replace(found, points=tuple(points))


def turn(folder: Path, cases: Sequence[Case], count: int, repeats: int, ratios: Ratios) -> Turn:
    """Measure an engine, serve every case on it, and simulate them with what was measured."""
    module, placed, engine = made(folder)
    measured = folder / "here.json"
    served: dict[Case, tuple[Figures, float | None]] = {}
    try:
        found = profiled(module, placed, engine, repeats)
        measured.write_text(profile.to_text(found), "utf-8")
        setattr(engine, "_clock", Undisturbed())  # noqa: B010  from here on the loop's
        files = {case: written(folder, case, measured, count) for case in cases}
        steps = Steps(profile.fit_of(found.points), ratios)
        for case, file in files.items():
            if case[0] == "one":
                served[case] = served_here(file, engine, steps), steps.pace
            else:
                served[case] = served_apart(file), None
    finally:
        engine.close()
    outcomes = {case: Outcome(served[case][0], simulated(file)) for case, file in files.items()}
    for case, (_, pace) in served.items():
        if pace is not None:
            measured.write_text(profile.to_text(slower(found, pace)), "utf-8")
            outcomes[case] = replace(outcomes[case], paced=simulated(files[case]))
    return outcomes


def errors(turns: Sequence[Turn]) -> list[Error]:
    """The median of the turns, each with its own profile, by case and figure."""
    found = []
    for case, outcome in turns[0].items():
        for name in outcome.real:
            pairs = [(one[case].real[name], one[case].simulated[name]) for one in turns]
            real, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            error = statistics.median((ours - real) / real for real, ours in pairs)
            paces = [(one[case].paced, one[case].real[name]) for one in turns]
            paced = [(ours[name] - real) / real for ours, real in paces if ours is not None]
            found.append(
                Error(*case, name, real, ours, error, statistics.median(paced) if paced else None)
            )
    return found


def report(found: Sequence[Error], ratios: Ratios) -> str:
    """The table, and below it the medians of the errors."""
    rows: list[list[object]] = [
        [
            *(e.instances, e.mode, e.load, e.figure, e.real_ms, e.simulated_ms, f"{e.error:+.1%}"),
            "" if e.paced is None else f"{e.paced:+.1%}",
        ]
        for e in found
    ]
    worst = max(found, key=lambda error: abs(error.error))
    heads = ["on", "mode", "load", "figure", "real ms", "sim ms", "error", "paced"]
    took = [f"{kind} {statistics.median(of):.3f}" for kind, of in sorted(ratios.items())]
    where = f"{worst.instances}, {worst.mode}, {worst.load}, {worst.figure}"
    return (
        "# Fidelity of the simulator\n\n"
        f"{tables.machine_line(tables.machine())} A vocabulary of {VOCAB}.\n\n"
        f"{tables.table_of(heads, rows)}\n\n"
        f"Median error {_median(found)}; {_medians(found)}; worst {worst.error:+.1%} ({where}). "
        f"Paced, as the steps of each case were: {_median_paced(found)}. "
        f"Steps took, of what the profile says (median): {', '.join(took) or 'none'}.\n"
    )


def _medians(found: Sequence[Error]) -> str:
    """By instances."""
    by_kind = defaultdict[str, list[Error]](list)
    for error in found:
        by_kind[error.instances].append(error)
    return ", ".join(f"{instances}: {_median(those)}" for instances, those in by_kind.items())


def _median(found: Sequence[Error]) -> str:
    return f"{statistics.median(abs(error.error) for error in found):.1%}"


def _median_paced(found: Sequence[Error]) -> str:
    paced = [abs(error.paced) for error in found if error.paced is not None]
    return f"{statistics.median(paced):.1%}" if paced else "not measured"


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=40, help="requests of a run")
    parser.add_argument("--turns", type=int, default=3, help="runs on the engine")
    parser.add_argument("--repeats", type=int, default=2, help="of each step of a profile")
    parser.add_argument("--instances", choices=("one", "pair"), help="only these; else all")
    parser.add_argument("--out", type=Path, help="folder for fidelity.json and fidelity.md")
    args = parser.parse_args()
    cases = [case for case in CASES if args.instances in (None, case[0])]
    turns: list[Turn] = []
    ratios: Ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        for number in range(args.turns):
            turns.append(turn(Path(folder), cases, args.count, args.repeats, ratios))
            print(f"turn {number + 1} of {args.turns}: done", flush=True)
    found = errors(turns)
    text = report(found, ratios)
    if args.out is not None:
        answer = {**tables.machine(), "errors": [asdict(e) for e in found], "steps": ratios}
        tables.write(args.out, "fidelity", answer, text, {})
    tables.show(text)


if __name__ == "__main__":
    main()
