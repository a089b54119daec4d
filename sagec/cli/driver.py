"""`sagec opt`: xDSL's driver with our dialects, passes, targets, and places in its messages."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO
from typing import IO

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass, PassPipeline
from xdsl.printer import Printer
from xdsl.universe import Universe
from xdsl.utils.exceptions import DiagnosticException, ParseError
from xdsl.utils.target import Target
from xdsl.xdsl_opt_main import xDSLOptMain

from sagec.cli import reading, spec
from sagec.cli.failure import InputError, message
from sagec.diagnostics import Diagnostic
from sagec.source import parse_module, verify_module
from sagec.universe import UNIVERSE

EXTENSIONS = ("mlir", "sage")
"""What sagec reads, by the end of the file's name."""

FIXED = {
    "no_implicit_module": False,
    "disable_verify": False,
    "syntax_highlight": False,
    "print_no_properties": False,
    "shrink": False,
}
"""xDSL's arguments that we do not offer; --disable-verify would patch its classes for good."""


class OptMain(xDSLOptMain):
    """Reads .mlir or .sage, runs passes, writes a target; all reports go to stderr."""

    def __init__(self, args: argparse.Namespace) -> None:
        # Not xDSL's constructor: it reads the command line itself, and ours is read already.
        self.args = argparse.Namespace(**vars(args), **FIXED)
        self.available_frontends, self.available_passes, self.available_targets = {}, {}, {}
        self.ctx = Context(allow_unregistered=args.allow_unregistered_dialect)
        self.universe = _universe()
        self.register_all_dialects()
        self.register_all_frontends()
        self.available_passes.update(self.universe.all_passes)
        self.available_targets.update(self.universe.all_targets)
        self.setup_pipeline()
        self.output_target = self._target()

    def register_all_dialects(self) -> None:
        for name, dialect in self.universe.all_dialects.items():
            self.ctx.register_dialect(name, dialect)

    def register_all_frontends(self) -> None:
        for extension in EXTENSIONS:
            self.available_frontends[extension] = functools.partial(self._parsed, extension)

    def setup_pipeline(self) -> None:
        passes = spec.passes(self.args.passes, self.available_passes)
        self._begin_s = time.perf_counter()
        self._running: ModulePass | None = None
        self.pipeline = PassPipeline(tuple(passes), self._after)

    def run(self) -> None:
        """Process the input, or with --split-input-file each piece of it by itself."""
        chunks, extension = self.prepare_input()
        output = self.prepare_output()
        try:
            for number, (chunk, line_offset) in enumerate(chunks):
                if number:
                    output.write("// -----\n")
                # Lines of a later piece count from the beginning of the file.
                piece = BytesIO(b"\n" * line_offset + chunk.read())
                chunk.close()
                output.write(self._processed(piece, extension))
                output.flush()
        finally:
            if output is not sys.stdout:
                output.close()

    def get_input_stream(self) -> tuple[IO[bytes], str]:
        path = self.args.input_file
        if path == "-":
            return BytesIO(reading.read_bytes(path)), "mlir"
        return open(path, "rb"), os.path.splitext(path)[1].removeprefix(".")

    def prepare_input(self) -> tuple[list[tuple[IO[bytes], int]], str]:
        try:
            return super().prepare_input()
        except ValueError:
            known = " or ".join(f".{name}" for name in EXTENSIONS)
            raise InputError(
                f"{self.args.input_file}: sagec reads {known}; say which with --frontend"
            ) from None

    def apply_passes(self, prog: ModuleOp) -> None:
        with _not_ours(lambda: self._running):
            self.pipeline.apply(self.ctx, prog)

    def output_resulting_program(self, prog: ModuleOp) -> str:
        stream = StringIO()
        with _not_ours(lambda: self.output_target):
            self.output_target.emit(self.ctx, prog, stream)
        return f"{stream.getvalue().rstrip()}\n"

    def _processed(self, chunk: IO[bytes], extension: str) -> str:
        """The output for one piece; expected errors are output too."""
        try:
            module = self.parse_chunk(chunk, extension)
            assert module is not None
            self.apply_passes(module)
            return self.output_resulting_program(module)
        except ParseError as error:
            if not self.args.parsing_diagnostics:
                raise
            return f"{message(error)}\n"
        except (Diagnostic, DiagnosticException) as error:
            if not self.args.verify_diagnostics:
                raise
            return f"{message(error)}\n"

    def _after(
        self, previous: ModulePass | None, module: ModuleOp, following: ModulePass | None
    ) -> None:
        """Called before the first pass, between passes and after the last one."""
        if previous is not None:
            spent_ms = (time.perf_counter() - self._begin_s) * 1e3
            if self.args.time_passes:
                print(f"{spent_ms:10.3f} ms  {previous.name}", file=sys.stderr)
            if self.args.print_ir_after_all:
                print(f"// IR after {previous}", file=sys.stderr)
                Printer(stream=sys.stderr).print_op(module)
                sys.stderr.write("\n\n")
        if previous is None or following is None or self.args.verify_each:
            verify(module, after=previous)
        self._running = following
        self._begin_s = time.perf_counter()

    def _parsed(self, extension: str, stream: IO[bytes]) -> ModuleOp:
        """The module of one piece. Raises ParseError, Diagnostic, InputError."""
        name = reading.shown(self.args.input_file)
        text = reading.decoded(stream.read(), name)
        if extension == "sage":
            from sagec import language

            return language.lower(language.parse(text, name))
        return parse_module(text, name, self.ctx)

    def _target(self) -> Target:
        target = spec.target(self.args.target, self.universe.all_targets)
        if target.name != "mlir":
            return target
        from xdsl.targets.mlir import MLIRTarget

        return MLIRTarget(
            print_generic_format=self.args.print_op_generic,
            print_debuginfo=self.args.print_debuginfo,
        )


@contextlib.contextmanager
def _not_ours(running: Callable[[], ModulePass | Target | None]) -> Iterator[None]:
    """What a pass or target of xDSL raises for input that it does not expect, as InputError."""
    try:
        yield
    except Exception as error:
        what = running()
        expected = message(error) is not None
        if expected or what is None or type(what).__module__.startswith("sagec."):
            raise
        text = f"{type(error).__name__}: {error}"
        raise InputError(f"{what.name}, which is xDSL's, fails: {text}") from error


def verify(module: ModuleOp, after: ModulePass | None = None) -> None:
    """Verify each op by itself, so that the message can say where the wrong one stands.

    Raises Diagnostic; where a pass left the module so, it names the pass.
    """
    try:
        verify_module(module)
    except Diagnostic as error:
        if after is not None:
            error.message += f" (after the pass {after.name})"
        raise


def _universe() -> Universe:
    """xDSL's universe with ours, also where sagec runs without having been installed."""
    universe = Universe.get_multiverse()
    universe.all_dialects.update(UNIVERSE.all_dialects)
    universe.all_passes.update(UNIVERSE.all_passes)
    universe.all_targets.update(UNIVERSE.all_targets)
    return universe
