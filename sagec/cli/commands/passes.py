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
    from sagec.cli.listing import show

    show(listing(), args.json)
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
    from sagec.cli import spec
    from sagec.cli.listing import summary_of

    return {
        "name": kind.name,
        "summary": summary_of(kind),
        "options": [
            {"name": name, "type": type_name, "default": default}
            for name, type_name, default in spec.options(kind)
        ],
    }
