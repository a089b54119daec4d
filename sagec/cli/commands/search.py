"""find the layout of a cluster that serves most of a file's requests well

Layouts deal out the cluster's devices: tensor parallel ranks, instances that do both phases or
prefill and decode apart, and how many of each. Each is served in simulated time at rising rates.
"""

from __future__ import annotations

import argparse

from sagec.cli.commands.run import positive

EPILOG = """examples:
  sagec search examples/search.sage
  sagec search examples/search.sage --tp 1,2 --chunk 512,2048 --best 3 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, what to try, and what to write of it."""
    parser.add_argument("file", metavar="FILE", help=".sage, with a cluster and requests")
    what = parser.add_argument_group("what to try")
    what.add_argument("--tp", metavar="N,N", type=counts, help="ranks of an instance; 1,2,4,8")
    what.add_argument("--chunk", metavar="N,N", type=counts, help="tokens; 512,2048")
    what.add_argument("--strategy", metavar="STRATEGY", help="instead of the file's")
    what.add_argument("--limit", metavar="N", type=positive, help="requests of a trial; 300")
    what.add_argument("--best", metavar="N", type=positive, help="how many to find; 5")
    promise = parser.add_argument_group("what is served well (otherwise what the requests say)")
    promise.add_argument("--ttft-ms", metavar="MS", type=positive, help="to the first token")
    promise.add_argument("--tpot-ms", metavar="MS", type=positive, help="for each token after it")
    promise.add_argument(
        "--attained", metavar="SHARE", type=share, help="of the requests; 0.9", default=0.9
    )
    parser.add_argument("--json", action="store_true", help="the verdicts for programs")


def run(args: argparse.Namespace) -> int:
    """Search; 1 where no layout serves the requests well. Raises what failure.py knows."""
    from sagec.cli import searching

    return searching.run(args)


def counts(text: str) -> list[int]:
    """Whole numbers from 1 on, with commas between them."""
    return sorted({positive(part) for part in text.split(",")})


def share(text: str) -> float:
    """More than 0, at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: more than 0, at most 1")
    return number
