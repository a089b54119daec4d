"""measure how long an engine's steps take here, for `cluster.device` to name

Steps of prompts, of decodes and of both are computed by the engine itself, over a grid, and their
median times are written to a file. A device of a .sage file that names it (`profile "here.json"`)
costs what was measured: in passes, strategies and the simulator.
"""

from __future__ import annotations

import argparse

from sagec.cli.commands.run import positive

EPILOG = """examples:
  sagec profile examples/chat.sage -o laptop.json
  sagec profile examples/chat.sage --instance d0 --quick -o laptop.json
  sagec profile examples/models/tiny -o laptop.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure, how well, and where it is written."""
    parser.add_argument(
        "file", metavar="FILE", help=".sage or .mlir, or the folder of a checkpoint"
    )
    parser.add_argument("-o", "--output", metavar="OUT", help="where to (default: stdout)")
    parser.add_argument("--instance", metavar="NAME", help="of the file (default: its first)")
    parser.add_argument("--quick", action="store_true", help="a coarser grid: seconds, not minutes")
    parser.add_argument(
        "--repeats", metavar="N", type=positive, help="of each step (default: 9; quick: 5)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, write the profile, and print how well a fit to it does."""
    from sagec.cli import profiling

    return profiling.run(args)
