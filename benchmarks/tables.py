"""What the benchmarks write: tables, where they were taken, and files of the same figures."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def machine() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": cores,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def machine_line(where: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    return ", ".join(f"{name} {value}" for name, value in where.items()) + "."


def table_of(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned, so that it reads as plain text too.

    >>> print(table_of(["policy", "us"], [["lru", 0.7512], ["arc", 12.6]]))
    | policy |   us |
    |-------:|-----:|
    |    lru | 0.75 |
    |    arc |   13 |
    """
    cells = [list(map(str, heads)), *([_shown(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.rjust, row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def show(markdown: str) -> None:
    """Print a report to the terminal: its tables drawn, its headings set apart."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown))


def write(
    out: Path, name: str, answer: Mapping[str, Any], markdown: str, pictures: Mapping[str, str]
) -> None:
    """Write NAME.json, NAME.md and each picture, whose key is its file's name, to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(answer, indent=1))
    (out / f"{name}.md").write_text(markdown)
    for file_name, picture in pictures.items():
        (out / file_name).write_text(picture)


def _shown(cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.0f}" if cell >= 10 else f"{cell:.2f}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
