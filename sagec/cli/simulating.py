"""`sagec simulate`: from a file to a simulated run, a table, a report and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sagec import charts
from sagec.cli import serving, writing
from sagec.cli.failure import InputError, UsageError
from sagec.passes.topology import topology_of
from sagec.runtime.compiled import Unbuilt
from sagec.runtime.engines.sim.outages import Outage, OutageError
from sagec.runtime.native import NotCovered
from sagec.runtime.report import RequestReport
from sagec.runtime.request import Request
from sagec.simulation import Simulated, simulate

if TYPE_CHECKING:
    from sagec.compiler import Compiler, Unit

PLOTS = {
    "ttft": ("Time to the first token", "ms", "share of requests"),
    "tpot": ("Time of a token after the first", "ms", "share of requests"),
    "queue": ("Requests", "s", "requests"),
    "kv": ("KV in use", "s", "share of the blocks"),
    "links": ("Hand-overs under way on each link", "s", "hand-overs"),
}
"""Title and axes of each plot of a report."""

SHOWN = {
    "requests": "requests",
    "served well": "served_well",
    "goodput /s": "goodput_per_s",
    "output tokens /s": "output_tokens_per_s",
    "KV hit rate": "kv_hit_rate",
    "MFU": "mfu",
    "hand-overs": "kv_moves",
    "preemptions": "preemptions",
}
"""Titles of the summary, and what stands below each."""


def run(args: argparse.Namespace) -> int:
    """Simulate the file's requests; 1 where one of them failed or was rejected."""
    from sagec.compiler import Compiler

    if args.report:
        _check_folder(args.report)
    compiler = Compiler()
    unit = compiler.read(args.file)
    if not topology_of(unit.module).instances:
        raise InputError(f"{unit.name}: no instance to serve on; say where in a cluster")
    requests = serving.chosen(unit, args.limit, counted=True)
    with writing.working(f"simulating {len(requests)} requests"):
        simulated = _simulated(args, compiler, unit, requests)
    result = report(simulated)
    if args.report:
        write_report(Path(args.report), result, simulated, unit.name)
    if args.json:
        writing.print_json(result)
    else:
        writing.console(width=100).print(_table(simulated))
        print(_sentence(result, simulated, unit.name))
        if args.report:
            print(f"report: {Path(args.report) / 'report.md'}")
    return 0 if result["total"]["served"] == len(requests) else 1


def _simulated(
    args: argparse.Namespace, compiler: Compiler, unit: Unit, requests: Sequence[Request]
) -> Simulated:
    strategy = serving.strategy_for(unit, args.strategy)
    planner = compiler.planner(unit.module, horizon=args.horizon)
    outages = [Outage(instance=n, fail_at_us=at, back_at_us=back) for n, at, back in args.fail]
    try:
        return simulate(unit.module, requests, strategy, planner, outages, args.core)
    except OutageError as error:
        raise UsageError(f"--fail: {error}") from None
    except NotCovered as why:
        raise UsageError(f"--core native: not covered: {why}; --core auto falls back") from None
    except Unbuilt as why:
        raise UsageError(f"--core native: {why}") from None


def _check_folder(folder: str) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    writing.check_writable(str(path / "report.json"))


def report(simulated: Simulated) -> dict[str, Any]:
    """The run for programs: the same bytes for the same input, whatever machine simulates it."""
    return {
        "total": simulated.figures(),
        "instances": simulated.instances(),
        "links": simulated.links(),
        "series": simulated.series(),
    }


def write_report(folder: Path, result: dict[str, Any], simulated: Simulated, name: str) -> None:
    """Write report.json, report.md and the plots it shows."""
    writing.write_text(str(folder / "report.json"), json.dumps(result, indent=2) + "\n")
    drawn = dict(_drawn(result, simulated))
    for plot, picture in drawn.items():
        writing.write_text(str(folder / f"{plot}.svg"), picture)
    writing.write_text(str(folder / "report.md"), markdown(result, name, list(drawn)))


def markdown(result: dict[str, Any], name: str, plots: Sequence[str]) -> str:
    """The report for people. plots: those that lie beside it."""
    total = result["total"]
    lines = [
        f"# {name}, simulated with {total['strategy']}",
        "",
        f"{total['requests']} requests in {total['duration_s']:.3f} s of simulated time; "
        f"{total['rounds']} rounds, {total['steps']} steps, {total['restarts']} restarts.",
        "",
        *_rows([{title: total[key] for title, key in SHOWN.items()}]),
        "",
        *_rows([{"ms": kind, **(total[f"{kind}_ms"] or {})} for kind in _TIMES]),
        "",
        *_rows(result["instances"]),
    ]
    if result["links"]:
        lines += ["", *_rows(result["links"])]
    for plot in plots:
        lines += ["", f"![{PLOTS[plot][0]}]({plot}.svg)"]
    return "\n".join(lines) + "\n"


_TIMES = ("queue", "ttft", "tpot", "e2e")


def _rows(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A Markdown table; a row without a column is left empty there."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[str(row.get(title, "")) for title in titles] for row in rows]
    table = [titles, ["---:" for _ in titles], *cells]
    return [f"| {' | '.join(line)} |" for line in table]


def _drawn(result: dict[str, Any], simulated: Simulated) -> list[tuple[str, str]]:
    """The plots for which there is something to draw."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {
        "ttft": {"requests": _distribution(simulated.reports, "ttft_us")},
        "tpot": {"requests": _distribution(simulated.reports, "tpot_us")},
    }
    times = result["series"]["time_s"]["time_s"]
    for kind in ("queue", "kv", "links"):
        lines = result["series"][kind]
        busiest = sorted(lines, key=lambda name: -max(lines[name], default=0.0))
        shown = [name for name in lines if name in busiest[: len(charts.COLOURS)]]
        series[kind] = {name: list(zip(times, lines[name], strict=True)) for name in shown}
    return [
        (kind, charts.line_chart(lines, *PLOTS[kind]))
        for kind, lines in series.items()
        if any(lines.values())
    ]


_POINTS = 200


def _distribution(reports: Sequence[RequestReport], figure: str) -> list[tuple[float, float]]:
    """The share of requests whose figure is at most so many milliseconds; some hundred points."""
    values = sorted(value for r in reports if (value := getattr(r, figure)) is not None)
    every = max(1, len(values) // _POINTS)
    ranks = sorted({*range(0, len(values), every), len(values) - 1} - {-1})
    return [(values[rank] / 1e3, (rank + 1) / len(values)) for rank in ranks]


def _table(simulated: Simulated) -> Any:
    """The instances, a row each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = simulated.instances()
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in COLUMNS:
        justify: Any = "left" if title in ("instance", "role") else "right"
        shown.add_column(title, justify=justify, no_wrap=True)
    for row in rows[:_SHOWN_ROWS]:
        shown.add_row(*(Text(_cell(title, row[key])) for title, key in COLUMNS.items()))
    if len(rows) > _SHOWN_ROWS:
        shown.add_row(Text(f"and {len(rows) - _SHOWN_ROWS} more"))
    return shown


def _cell(title: str, value: Any) -> str:
    if title.endswith("%"):
        return f"{100 * value:.1f}"
    return f"{value / 1e6:.1f}" if title.endswith("MB") else str(value)


COLUMNS = {
    "instance": "instance",
    "role": "role",
    "steps": "steps",
    "prompt tok": "prompt_tokens",
    "decode tok": "decode_tokens",
    "busy %": "busy",
    "MFU %": "mfu",
    "KV hit %": "kv_hit_rate",
    "KV peak %": "kv_peak",
    "KV sent MB": "kv_sent_bytes",
}
"""Titles of the table, and what stands below each."""

_SHOWN_ROWS = 48
"""Of more instances than these the table leaves the rest out; `--json` has all."""


def _sentence(result: dict[str, Any], simulated: Simulated, name: str) -> str:
    total = result["total"]
    ttft, tpot = total["ttft_ms"] or {}, total["tpot_ms"] or {}
    speed = len(simulated.reports) / simulated.wall_s if simulated.wall_s else 0.0
    return (
        f"{name}, {total['strategy']}: {total['requests']} requests in "
        f"{total['duration_s']:.3f} simulated s, {total['served_well']} served well "
        f"({total['goodput_per_s']} /s); TTFT ms p50 {ttft.get('p50', '-')} p99 "
        f"{ttft.get('p99', '-')}; TPOT ms p50 {tpot.get('p50', '-')} p99 {tpot.get('p99', '-')}; "
        f"MFU {total['mfu']:.4f}; {total['rounds']} rounds; simulated at {speed:.0f} requests/s "
        f"({simulated.core} core)"
    )
