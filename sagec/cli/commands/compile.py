"""compile a file to plans, or to code for the torch engine

The graph of FILE goes through a pipeline and is lowered; `--emit` says what is written of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from sagec.compiler import Compiler

EMITS = ("ir", "plan", "plan-text", "torch")

EPILOG = """examples:
  sagec compile examples/chat.sage
  sagec compile examples/chat.sage --emit plan -o plan.json
  sagec compile examples/chat.sage --emit torch -o steps.py
  sagec compile graph.mlir --pipeline "order,chunk-prefill{tokens=512}" --emit ir
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE, the pipeline, and what is written where."""
    parser.add_argument("file", metavar="FILE", help=".sage or .mlir; -: stdin")
    parser.add_argument("-o", "--output", metavar="OUT", help="where to (default: stdout)")
    parser.add_argument(
        "--emit", choices=EMITS, default="plan-text", help="what to write (default: plan-text)"
    )
    parser.add_argument(
        "--pipeline",
        metavar="NAME|PASSES",
        help="a named pipeline (`sagec passes` lists them) or passes",
    )


def run(args: argparse.Namespace) -> int:
    """Compile and write. Raises what failure.py knows."""
    from sagec.cli import spec, writing
    from sagec.compiler import Compiler
    from sagec.pipelines import DEFAULT
    from sagec.universe import UNIVERSE

    pipeline = spec.expanded(args.pipeline or DEFAULT)
    spec.passes(pipeline, UNIVERSE.all_passes)
    compiler = Compiler()
    unit = compiler.read(args.file)
    for note in unit.notes:
        print(note, file=sys.stderr)
    with writing.working(f"compiling {unit.name}"):
        compiler.optimize(unit.module, pipeline)
        text = _emitted(compiler, unit.module, args.emit, args.output)
    writing.write_text(args.output, text)
    return 0


def _emitted(compiler: Compiler, module: ModuleOp, emit: str, output: str | None) -> str:
    if emit == "ir":
        from io import StringIO

        from xdsl.printer import Printer

        stream = StringIO()
        Printer(stream=stream).print_op(module)
        return f"{stream.getvalue()}\n"
    if emit == "torch":
        return _programs(module, output)
    plans = compiler.lower(module)
    if emit == "plan":
        from sagec.runtime.plan import to_json

        return "[" + ",\n".join(to_json(plan).decode() for plan in plans) + "]\n"
    from sagec.runtime.plan_text import to_text

    return "\n".join(to_text(plan) for plan in plans)


def _programs(module: ModuleOp, output: str | None) -> str:
    """The code of the module's exec graphs; where it has none, that of its torch instances."""
    from sagec import programs
    from sagec.cli.failure import InputError
    from sagec.dialects.exec import ExecGraphOp
    from sagec.lowering.torch_source import programs_of
    from sagec.passes.topology import topology_of

    if any(isinstance(op, ExecGraphOp) for op in module.body.block.ops):
        found = programs_of(module)
    else:
        instances = [each for each in topology_of(module).instances if each.engine == "torch"]
        if not instances:
            raise InputError("--emit torch: the file has no instance of engine torch, and no exec "
                             "graph; --pipeline serve,convert-pd-to-exec makes some")  # fmt: skip
        found = list(dict.fromkeys(map(programs.program_for, instances)))
    if len(found) > 1 and output not in (None, "-"):
        raise InputError(f"{output}: a file holds one program, and there are {len(found)}, for "
                         "models or layouts differ")  # fmt: skip
    return "\n".join(found)
