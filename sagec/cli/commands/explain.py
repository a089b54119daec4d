"""say why a recorded request took as long as it did

Without --request, the requests that took longest are listed.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sagec.cli.commands.run import positive

if TYPE_CHECKING:
    from sagec.runtime.recording import Recording

EPILOG = """examples:
  sagec run examples/chat.sage --record chat.rec
  sagec explain chat.rec
  sagec explain chat.rec --request story
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, and of which request."""
    parser.add_argument("file", metavar="FILE", help="a recording")
    parser.add_argument("--request", metavar="ID", help="tell the story of this request")
    parser.add_argument(
        "--limit", metavar="N", type=positive, default=10, help="requests to list (default: 10)"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Tell; 1 where the file could not be read to its end. Raises what failure.py knows."""
    import sys

    from sagec.runtime.recording import Recording

    recording = Recording(args.file)
    if args.request is None:
        _print_slowest(args, recording)
    else:
        _print_story(args, recording)
    for damage in recording.damages:
        print(f"error: {damage}", file=sys.stderr)
    return 1 if recording.damages else 0


def _print_story(args: argparse.Namespace, recording: Recording) -> None:
    from sagec.cli import writing
    from sagec.explain import story_of

    story = story_of(recording, args.request)
    if args.json:
        writing.print_json(story.as_json())
    else:
        print("\n".join(story.sentences))


def _print_slowest(args: argparse.Namespace, recording: Recording) -> None:
    from sagec.cli import writing
    from sagec.explain import report_row, slowest

    rows = [report_row(report) for report in slowest(recording, args.limit)]
    if args.json:
        writing.print_json(rows)
        return
    print(f"{args.file}: the requests that took longest; --request ID says why")
    writing.console(width=100).print(_table(rows))


COLUMNS = {
    "request": "request",
    "total": "total_us",
    "queue": "queue_us",
    "TTFT": "ttft_us",
    "TPOT": "tpot_us",
    "prompt": "prompt_tokens",
    "output": "output_tokens",
    "preempted": "preemptions",
    "end": "end",
}
"""Titles of the table, and what stands below each."""


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in COLUMNS:
        justify: Any = "left" if title in ("request", "end") else "right"
        table.add_column(title, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_cell(name, row[name])) for name in COLUMNS.values()))
    return table


def _cell(name: str, value: Any) -> str:
    from sagec.explain import shown

    if value is None:
        return "-"
    return shown(value) if name.endswith("_us") else str(value)
