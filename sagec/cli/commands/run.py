"""compile a file and serve its requests, text as it streams

Each instance of the file's cluster is an engine in a process of its own; the requests are served
by the loop with the named strategy, and each plan is compiled when it is needed.
"""

from __future__ import annotations

import argparse

EPILOG = """examples:
  sagec run examples/chat.sage
  sagec run examples/chat.sage --timeline out/chat.svg --trace out/chat.json
  sagec run examples/chat.sage --record out/chat.rec --metrics 9090
  sagec run examples/chat.sage --one-process --strategy fifo --limit 2 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, how to serve it, and what to write of it."""
    parser.add_argument("file", metavar="FILE", help=".sage or .mlir; -: stdin")
    how = parser.add_argument_group("how to serve")
    how.add_argument("--engine", metavar="NAME", help="for all instances, instead of the file's")
    how.add_argument(
        "--one-process", action="store_true", help="all instances in this process, one by one"
    )
    how.add_argument(
        "--strategy",
        metavar="STRATEGY",
        help="instead of the file's: fifo, 'adaptive{window-ms=500}', or one that the file defines",
    )
    how.add_argument(
        "--horizon", metavar="STEPS", type=positive, help="steps that a plan covers at most"
    )
    how.add_argument(
        "--planner",
        choices=("direct", "ir"),
        default="direct",
        help="plan rounds without IR where that gives the same plans, or all of them through it",
    )
    how.add_argument("--limit", metavar="N", type=positive, help="only the first N requests")
    how.add_argument(
        "--metrics", metavar="PORT", type=port, help="serve figures for Prometheus and `sagec top`"
    )
    what = parser.add_argument_group("what to write")
    what.add_argument("--timeline", metavar="SVG", help="a picture of who computed what when")
    what.add_argument("--trace", metavar="JSON", help="the same for Perfetto")
    what.add_argument("--record", metavar="REC", help="every round, for `sagec replay` and explain")
    what.add_argument(
        "--no-prompts", action="store_true", help="leave prompts out of the recording"
    )
    what.add_argument("--no-tokens", action="store_true", help="leave its tokens out too")
    what.add_argument("--spans", metavar="JSONL", help="OpenTelemetry spans, one a line")
    what.add_argument("--json", action="store_true", help="texts and figures for programs")


def run(args: argparse.Namespace) -> int:
    """Serve; 1 where a request failed or was rejected. Raises what failure.py knows."""
    from sagec.cli import serving

    return serving.run(args)


def port(text: str) -> int:
    """A port of this machine; 0: any that is free."""
    number = int(text) if text.isascii() and text.isdigit() else 65536
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 (any) to 65535")
    return number


def positive(text: str) -> int:
    """A whole number from 1 on, of the command line."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number from 0 on, of the command line."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() else least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return number
