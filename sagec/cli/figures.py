"""The table after a run, and the same for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from sagec.runtime.report import RequestReport, Summary
    from sagec.runtime.timeline import Timeline

SHOWN_ROWS = 48
"""Of more requests than these the table leaves the rest out; `--json` has all."""

COLUMNS = {
    "request": "request",
    "prompt": "prompt_tokens",
    "cached": "reused_tokens",
    "output": "output_tokens",
    "end": "end",
    "TTFT ms": "ttft_ms",
    "TPOT ms": "tpot_ms",
    "tok/s": "tokens_per_s",
    "steps": "steps",
    "KV kB": "kv_moved_kb",
}
"""Titles of the table, and what stands below each."""


def rows(summary: Summary, timeline: Timeline) -> list[dict[str, Any]]:
    """A row a request. Times are milliseconds; None where a request never came to that."""
    steps, moved = _steps(timeline), _moved_bytes(timeline)
    return [
        {
            "request": report.request_id,
            "prompt_tokens": report.prompt_tokens,
            "reused_tokens": report.reused_tokens,
            "output_tokens": report.output_tokens,
            "end": str(report.reason),
            "queue_ms": _ms(report.queue_us),
            "ttft_ms": _ms(report.ttft_us),
            "tpot_ms": _ms(report.tpot_us),
            "tokens_per_s": _tokens_per_s(report),
            "steps": steps[report.request_id],
            "kv_moved_bytes": moved[report.request_id],
        }
        for report in summary.requests
    ]


def total(summary: Summary) -> dict[str, Any]:
    """The sum of a run; TTFT and TPOT are medians, with their 99th percentiles."""
    ttft, tpot = summary.ttft, summary.tpot
    return {
        "requests": len(summary.requests),
        "duration_ms": _ms(summary.duration_us),
        "prompt_tokens": summary.prompt_tokens,
        "reused_tokens": sum(report.reused_tokens for report in summary.requests),
        "output_tokens": summary.output_tokens,
        "ttft_p50_ms": _ms(ttft.p50_us) if ttft else None,
        "ttft_p99_ms": _ms(ttft.p99_us) if ttft else None,
        "tpot_p50_ms": _ms(tpot.p50_us) if tpot else None,
        "tpot_p99_ms": _ms(tpot.p99_us) if tpot else None,
        "tokens_per_s": round(summary.output_tokens_per_s, 1),
        "steps": summary.steps,
        "conformance": dataclasses.asdict(summary.conformance),
        "rounds": summary.rounds,
        "kv_moves": summary.num_moves,
        "kv_moved_bytes": summary.kv_moved_bytes,
    }


def table(summary: Summary, timeline: Timeline) -> Table:
    """The rows, and below them the sums, or for times the medians."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    sums = total(summary)
    footer = _cells(
        {**sums, "request": "all", "end": "", "ttft_ms": sums["ttft_p50_ms"],
         "tpot_ms": sums["tpot_p50_ms"]}
    )  # fmt: skip
    for title, cell in zip(COLUMNS, footer, strict=True):
        justify: Any = "left" if title in ("request", "end") else "right"
        shown.add_column(title, footer=cell, justify=justify, no_wrap=True)
    every = rows(summary, timeline)
    for row in every[:SHOWN_ROWS]:
        shown.add_row(*map(Text, _cells(row)))
    if len(every) > SHOWN_ROWS:
        shown.add_row(Text(f"and {len(every) - SHOWN_ROWS} more"))
    return shown


def sentence(summary: Summary) -> str:
    """What the table does not say, in one line."""
    sums = total(summary)
    moved = f"{summary.kv_moved_bytes / 1000:.1f} kB"
    return (
        f"{sums['requests']} requests in {sums['duration_ms']:.0f} ms: {sums['rounds']} rounds, "
        f"{sums['steps']} steps, {sums['kv_moves']} hand-overs with {moved} of KV; "
        f"TTFT and TPOT below the line are medians; conformance: {summary.conformance}"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    shown = {**row, "kv_moved_kb": round(row["kv_moved_bytes"] / 1000, 1)}
    values = (shown[name] for name in COLUMNS.values())
    return ["-" if value is None else str(value) for value in values]


def _ms(time_us: float | None) -> float | None:
    return None if time_us is None else round(time_us / 1000, 1 if time_us >= 10_000 else 2)


def _tokens_per_s(report: RequestReport) -> float | None:
    """Tokens of the output over the time from arrival to the end."""
    duration_us = report.end_us - report.arrival_us
    return round(report.output_tokens * 1e6 / duration_us, 1) if duration_us > 0 else None


def _steps(timeline: Timeline) -> Counter[str]:
    """In how many steps each request had a chunk or a decode."""
    steps: Counter[str] = Counter()
    for step in timeline.steps:
        steps.update({name for name, _, _ in step.chunks} | set(step.decodes))
    return steps


def _moved_bytes(timeline: Timeline) -> Counter[str]:
    moved: Counter[str] = Counter()
    for move in timeline.moves:
        moved[move.request_id] += move.num_bytes
    return moved
