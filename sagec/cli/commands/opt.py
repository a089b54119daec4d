"""read a graph, run passes on it, print it

`sagec opt` is xDSL's driver: the passes, targets and dialects are those of sagec and of xDSL.
"""

from __future__ import annotations

import argparse

EPILOG = """examples:
  sagec opt -p "order,chunk-prefill{tokens=512}" graph.mlir
  sagec opt -p serve --print-ir-after-all --time-passes graph.mlir
  sagec opt -t plan-text graph.mlir
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, what to do with it, what to print, and what errors are expected."""
    parser.add_argument(
        "input_file", metavar="FILE", nargs="?", default="-", help=".mlir or .sage; -: stdin"
    )
    parser.add_argument(
        "-p", "--passes", default="", metavar="PASSES", help="passes, or a named pipeline"
    )
    parser.add_argument(
        "-t", "--target", default="mlir", metavar="TARGET", help="what to write (default: mlir)"
    )
    parser.add_argument("-o", "--output-file", metavar="OUT", help="where to (default: stdout)")
    parser.add_argument(
        "-f", "--frontend", choices=("mlir", "sage"), help="what FILE is, whatever its name"
    )
    add = parser.add_argument_group("what to print").add_argument
    _flag(add, "--print-op-generic", "ops in MLIR's generic form")
    _flag(add, "--print-debuginfo", "with the place of each op")
    _flag(add, "--print-ir-after-all", "the graph after each pass, on stderr")
    _flag(add, "--time-passes", "what each pass took, on stderr")
    add = parser.add_argument_group("checks").add_argument
    _flag(add, "--verify-each", "verify after each pass, not only before the first and at the end")
    _flag(add, "--split-input-file", "pieces between lines `// -----` are files of their own")
    _flag(add, "--verify-diagnostics", "what verifiers and passes refuse is output, not failure")
    _flag(add, "--parsing-diagnostics", "what does not parse is output, not failure")
    _flag(add, "--allow-unregistered-dialect", "let ops of unknown dialects pass")


def run(args: argparse.Namespace) -> int:
    """Run the driver. Raises what failure.py knows."""
    from sagec.cli.driver import OptMain

    OptMain(args).run()
    return 0


def _flag(add: object, name: str, text: str) -> None:
    assert callable(add)
    add(name, action="store_true", help=text)
