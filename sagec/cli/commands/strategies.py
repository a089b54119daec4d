"""list strategies, choosers and eviction policies, with their options"""

from __future__ import annotations

import argparse
from typing import Any

EPILOG = """examples:
  sagec strategies
  sagec run examples/chat.sage --strategy 'priority{chooser=prefix-aware}'
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
    """Strategies, choosers, eviction policies: name and a line each, options with defaults."""
    from sagec.runtime import strategies
    from sagec.runtime.kv import policies
    from sagec.runtime.strategies import choosers

    return {
        "strategies": [_described(name, strategies.create(name)) for name in strategies.known()],
        "choosers": [_described(name, choosers.create(name)) for name in choosers.known()],
        "policies": [
            _described(name, policies.create(name, capacity_blocks=1)) for name in policies.known()
        ],
    }


def _described(name: str, made: Any) -> dict[str, Any]:
    import dataclasses

    from sagec.cli.listing import summary_of
    from sagec.strategies import option_text

    fields = dataclasses.fields(made) if dataclasses.is_dataclass(made) else ()
    return {
        "name": name,
        "summary": summary_of(type(made)),
        "options": [
            {
                "name": field.name.replace("_", "-"),
                "type": type(field.default).__name__,
                "default": option_text(field.default),
            }
            for field in fields
            if field.init
        ],
    }
