"""Files into modules, modules through passes, and modules into plans."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass, PassPipeline

from sagec import strategies
from sagec.builder import IRGraph
from sagec.diagnostics import Diagnostic, there_are
from sagec.dialects import pd
from sagec.dialects.cluster import DeviceOp
from sagec.lowering.execution_plan import plans_of
from sagec.passes import flow
from sagec.passes.separate_phases import separate
from sagec.passes.topology import topology_of
from sagec.pipelines import DEFAULT, expanded
from sagec.runtime.plan import ExecutionPlan
from sagec.runtime.request import Request
from sagec.runtime.strategies import Strategy, StrategyError, known
from sagec.source import parse_module
from sagec.universe import PASSES, sagec_context

if TYPE_CHECKING:
    from sagec.language.syntax import Program
    from sagec.planner import Planner

AfterPass = Callable[[ModulePass | None, ModuleOp, ModulePass | None], None]
"""Called between passes: with the one that ran, the module, and the one that comes next."""


@dataclass(frozen=True)
class Unit:
    """A file that was read: its module, and where it came from."""

    name: str
    module: ModuleOp
    text: str
    program: Program | None = None

    @property
    def strategy(self) -> str:
        """The policy that the file's first graph names; "" where it names none."""
        graph = next(flow.graphs(self.module), None)
        return graph.text("policy", "") if graph is not None else ""

    def make_strategy(self, text: str | None = None) -> Strategy:
        """The strategy that the file serves with, fifo where it names none.

        text: another one instead: the name of one of the file's, or what `strategies.strategy_of`
        takes. Raises StrategyError; Diagnostic for a statement that is wrong.
        """
        named = (self.strategy or "fifo") if text is None else text
        stated = self.program.strategies if self.program is not None else ()
        own = {statement.name.text: statement for statement in stated}
        if named in own:
            from sagec.language.strategies import strategy_of

            return strategy_of(own[named])
        if own and re.fullmatch(r"[\w-]+", named) and named not in known():
            raise StrategyError(f"no strategy {named!r}; {there_are(named, [*own, *known()])}")
        return strategies.strategy_of(named)

    @property
    def notes(self) -> list[str]:
        """What its reader should be told, as lines of a trace that were skipped."""
        return list(self.program.notes.values()) if self.program is not None else []

    def requests(self, *, counted: bool = False) -> list[Request]:
        """The requests of the file, with their prompts' token ids. Raises Diagnostic.

        counted: who asks only counts tokens, so that prompts may be any of the right length.
        """
        if self.program is not None:
            from sagec import language

            return language.requests(self.program, counted=counted)
        from sagec.prompts import requests_of

        return requests_of(self.module)


class Compiler:
    """Reads, optimises and lowers; one context for all that it reads."""

    def __init__(self) -> None:
        self.context = sagec_context()

    def read(self, path: str, *, profiles: bool = True) -> Unit:
        """The file at `path`, or stdin for `-`; `.sage` by its name, else MLIR.

        profiles: without them nobody asks for those that devices name, as where one is to be
        measured. Raises Diagnostic, ParseError or OSError.
        """
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        name = "<stdin>" if path == "-" else path
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise Diagnostic("the file is not UTF-8 text", source=name, line=line) from None
        return self.parse(text, name, profiles=profiles)

    def parse(self, text: str, name: str, *, profiles: bool = True) -> Unit:
        """The unit of a text; a name that ends in .sage says that it is of that language."""
        if name.endswith(".sage"):
            from sagec import language

            program = language.parse(text, name)
            if not profiles:
                program = program.without_profiles()
            return Unit(name, language.lower(program), text, program)
        module = parse_module(text, name, self.context)
        module.verify()
        for op in module.ops if not profiles else ():
            if isinstance(op, DeviceOp):
                op.properties.pop("profile", None)
        return Unit(name, module, text)

    def optimize(
        self, module: ModuleOp, pipeline: str = DEFAULT, callback: AfterPass | None = None
    ) -> None:
        """Run a named pipeline, or passes as the command line spells them, on the module.

        Raises PassError; VerifyException where a pass leaves what does not verify.
        """
        passes_of(pipeline, callback).apply(self.context, module)
        module.verify()

    def lower(self, module: ModuleOp) -> list[ExecutionPlan]:
        """The plans of a module that has been optimised, one for each instance with work."""
        return plans_of(module)

    def planner(self, module: ModuleOp, horizon: int | None = None, how: str = "direct") -> Planner:
        """A planner for the loop: the module's cluster, and how its graph wants to be served.

        how: one of `sagec.planner.PLANNERS`.
        """
        from sagec.planner import planner_of

        return planner_of(module, horizon, how)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> tuple[ModulePass, ...]:
    return tuple(PassPipeline.parse_spec(PASSES, text).passes)


def passes_of(pipeline: str, callback: AfterPass | None = None) -> PassPipeline:
    """The passes of a named pipeline, or of a text that names them; parsed once."""
    passes = _parsed(expanded(pipeline))
    return PassPipeline(passes, callback or (lambda *_: None))


class IROptimizer:
    """Runs a pipeline on graphs: `IROptimizer("serve").optimize(graph)`."""

    def __init__(self, pipeline: str = DEFAULT) -> None:
        self.pipeline = pipeline
        self._compiler = Compiler()

    def optimize(self, graph: IRGraph) -> IRGraph:
        """The graph, and all others of its module, after the passes; it is changed in place."""
        self._compiler.optimize(graph.module, self.pipeline)
        return graph


@dataclass(frozen=True)
class PhaseGraphs:
    """The two sub-graphs of a serving graph; either may be None where there is no such phase."""

    prefill: pd.PhaseOp | None
    decode: pd.PhaseOp | None


class PDSeparator:
    """Parts a graph into its phases."""

    def split(self, graph: IRGraph) -> PhaseGraphs:
        """The phases of the graph, which is changed in place.

        >>> from sagec import IRBuilder
        >>> from sagec.runtime.request import Request
        >>> phases = PDSeparator().split(IRBuilder().build([Request(id="a", prompt=(1, 2))]))
        >>> phases.prefill.phase.data, phases.decode.phase.data
        ('prefill', 'decode')
        """
        separate(graph.op, topology_of(graph.module))
        phases = {op.phase.data: op for op in graph.op.body.block.ops if isinstance(op, pd.PhaseOp)}
        return PhaseGraphs(phases.get("prefill"), phases.get("decode"))
