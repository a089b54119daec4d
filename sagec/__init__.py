"""sagec: a compiler toolchain for serving graphs of large language models.

The names of the public API are loaded when somebody asks for them: `import sagec` loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagec.builder import IRBuilder as IRBuilder
    from sagec.builder import IRGraph as IRGraph
    from sagec.builder import IRNode as IRNode
    from sagec.compiler import IROptimizer as IROptimizer
    from sagec.compiler import PDSeparator as PDSeparator
    from sagec.lowering.execution_graph_builder import (
        ExecutionGraphBuilder as ExecutionGraphBuilder,
    )
    from sagec.passes.execution_graph import ExecutionGraph as ExecutionGraph
    from sagec.passes.execution_graph import OpType as OpType
    from sagec.passes.execution_graph import TensorRef as TensorRef
    from sagec.runtime.executor import ExecutorAPI as ExecutorAPI
    from sagec.runtime.plan import ExecutionPlan as ExecutionPlan

_HOME = {
    "ExecutionGraph": "sagec.passes.execution_graph",
    "ExecutionGraphBuilder": "sagec.lowering.execution_graph_builder",
    "ExecutionPlan": "sagec.runtime.plan",
    "ExecutorAPI": "sagec.runtime.executor",
    "IRBuilder": "sagec.builder",
    "IRGraph": "sagec.builder",
    "IRNode": "sagec.builder",
    "IROptimizer": "sagec.compiler",
    "OpType": "sagec.passes.execution_graph",
    "PDSeparator": "sagec.compiler",
    "TensorRef": "sagec.passes.execution_graph",
}

__all__ = [
    "ExecutionGraph",
    "ExecutionGraphBuilder",
    "ExecutionPlan",
    "ExecutorAPI",
    "IRBuilder",
    "IRGraph",
    "IRNode",
    "IROptimizer",
    "OpType",
    "PDSeparator",
    "TensorRef",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sagec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
