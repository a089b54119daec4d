"""list passes, named pipelines and targets, with their options"""

from __future__ import annotations

import argparse
from typing import Any

EPILOG = """examples:
  sagec passes
  sagec passes --json | python -m json.tool
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only how to print."""
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Print what there is."""
    from sagec.cli.writing import print_json

    there = listing()
    if args.json:
        print_json(there)
    else:
        _print(there)
    return 0


def listing() -> dict[str, list[dict[str, Any]]]:
    """Passes, pipelines and targets: name and a line each, options, texts and reasons."""
    from sagec.pipelines import PIPELINES
    from sagec.universe import UNIVERSE

    return {
        "passes": [_described(made()) for made in UNIVERSE.all_passes.values()],
        "pipelines": [
            {"name": name, "passes": pipeline.text, "reason": pipeline.reason}
            for name, pipeline in PIPELINES.items()
        ],
        "targets": [_described(made()) for made in UNIVERSE.all_targets.values()],
    }


def _described(kind: Any) -> dict[str, Any]:
    import inspect

    from sagec.cli import spec

    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    return {
        "name": kind.name,
        "summary": " ".join(summary.split()),
        "options": [
            {"name": name, "type": type_name, "default": default}
            for name, type_name, default in spec.options(kind)
        ],
    }


def _print(there: dict[str, list[dict[str, Any]]]) -> None:
    from sagec.cli.writing import console

    out = console()
    for title, entries in there.items():
        out.print(f"[bold]{title}[/bold]")
        for entry in entries:
            out.print(f"  [cyan]{entry['name']}[/cyan]")
            if "passes" in entry:
                out.print(f"      {entry['passes']}", markup=False)
            out.print(f"      {entry.get('summary') or entry.get('reason')}", markup=False)
            for option in entry.get("options", ()):
                default = "required" if option["default"] is None else option["default"]
                out.print(f"      {option['name']}: {option['type']} = {default}", markup=False)
