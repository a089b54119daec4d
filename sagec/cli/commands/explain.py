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
    tell = _print_slowest if args.request is None else _print_story
    try:
        tell(args, recording)
    finally:
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
    from sagec.cli.listing import table_of
    from sagec.explain import counted, named, report_row, slowest, unfinished

    rows = [report_row(report) for report in slowest(recording, args.limit)]
    if args.json:
        writing.print_json(rows)
        return
    if rows:
        print(f"{args.file}: the requests that took longest; --request ID says why")
        cells = [[_cell(name, row[name]) for name in COLUMNS.values()] for row in rows]
        writing.console(width=100).print(table_of(tuple(COLUMNS), cells, ("request", "end")))
    else:
        print(f"{args.file}: no request ended in it")
    if left := unfinished(recording):
        print(f"{counted(len(left), 'request')} had not ended with the recording: {named(left)}")


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


def _cell(name: str, value: Any) -> Any:
    from sagec.explain import shown

    return shown(value) if name.endswith("_us") and value is not None else value
