"""require-exec: a module without execution graphs is refused."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from sagec.dialects import pd
from sagec.passes.errors import PassError
from sagec.passes.streams import exec_graphs


@dataclass(frozen=True)
class RequireExecPass(ModulePass):
    """Change nothing; refuse a module that has no execution graph.

    `pd.graph @serve  -->  error: there is no exec.graph ...`

    Passes on operators leave a module without any as it is, so that they may stand in any pipeline.
    Who names the pipeline `exec` asked for operators, and would take silence for success.
    """

    name = "require-exec"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if any(exec_graphs(op)):
            return
        graph = next((each for each in op.body.block.ops if isinstance(each, pd.GraphOp)), None)
        raise PassError(
            f"{self.name}: there is no exec.graph to work on; convert-pd-to-exec makes them of "
            "steps: serve,convert-pd-to-exec,exec",
            op if graph is None else graph,
        )
