"""serve a file's requests on simulated instances, and report what came of it

Time is simulated: steps take what the cost model says, KV what the links allow. The strategy, the
compiler and the loop are those that serve real engines.
"""

from __future__ import annotations

import argparse
import re

from sagec.cli.commands.run import positive

EPILOG = """examples:
  sagec simulate examples/fleet.sage
  sagec simulate examples/fleet.sage --strategy slo-aware --report out
  sagec simulate examples/fleet.sage --fail d0@100ms..900ms --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, how to serve it, and what to write of it."""
    parser.add_argument("file", metavar="FILE", help=".sage or .mlir; -: stdin")
    how = parser.add_argument_group("how to serve")
    how.add_argument(
        "--strategy",
        metavar="STRATEGY",
        help="instead of the file's: fifo, 'adaptive{window-ms=500}', or one that the file defines",
    )
    how.add_argument(
        "--horizon", metavar="STEPS", type=positive, help="steps that a plan covers at most"
    )
    how.add_argument(
        "--fail",
        metavar="INSTANCE@BEGIN..END",
        type=outage,
        action="append",
        default=[],
        help="an instance that fails, as in d0@2s..10s; without END for good; again for more",
    )
    how.add_argument(
        "--core",
        choices=("auto", "python", "native"),
        default="auto",
        help="what simulates: the loop in Python, the same in C++, or (auto) this where it can",
    )
    how.add_argument("--limit", metavar="N", type=positive, help="only the first N requests")
    what = parser.add_argument_group("what to write")
    what.add_argument(
        "--report", metavar="FOLDER", help="report.json, report.md and plots; made if not there"
    )
    what.add_argument("--json", action="store_true", help="the figures for programs")


_TIMES = {"us": 1, "ms": 1000, "s": 1_000_000, "": 1_000_000}


def outage(text: str) -> tuple[str, int, int | None]:
    """`d0@2s..10s`: who fails, when, and when it is back, in microseconds; None: never."""
    name, at, when = text.partition("@")
    begin, dots, end = when.partition("..")
    if not (name and at and begin):
        raise argparse.ArgumentTypeError(f"{text!r} is no outage; as in d0@2s..10s")
    return name, _time_us(begin), _time_us(end) if dots and end else None


def _time_us(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; as in 2s, 1500ms")
    return round(float(found[1]) * _TIMES[found[2]])


def run(args: argparse.Namespace) -> int:
    """Simulate; 1 where a request failed or was rejected. Raises what failure.py knows."""
    from sagec.cli import simulating

    return simulating.run(args)
