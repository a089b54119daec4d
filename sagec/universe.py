"""What sagec adds to xDSL: dialects, passes, targets, each loaded when somebody asks for it.

The entry point `xdsl.universe` names UNIVERSE, so the stock `xdsl-opt` knows them too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin
from xdsl.ir import Dialect
from xdsl.passes import ModulePass
from xdsl.universe import Universe
from xdsl.utils.target import Target

_DIALECT_HOMES = {
    "cluster": "dialects.cluster:Cluster",
    "exec": "dialects.exec:Exec",
    "kv": "dialects.kv:KV",
    "pd": "dialects.pd:PD",
}
_PASS_HOMES = {
    "order": "passes.order:OrderPass",
    "apply-decision": "passes.apply_decision:ApplyDecisionPass",
    "separate-phases": "passes.separate_phases:SeparatePhasesPass",
    "select-device": "passes.select_device:SelectDevicePass",
    "match-prefix": "passes.match_prefix:MatchPrefixPass",
    "insert-transfers": "passes.insert_transfers:InsertTransfersPass",
    "chunk-prefill": "passes.chunk_prefill:ChunkPrefillPass",
    "assign-kv": "passes.assign_kv:AssignKVPass",
    "fuse-steps": "passes.fuse_steps:FuseStepsPass",
    "require-exec": "passes.require_exec:RequireExecPass",
    "fuse-communication": "passes.fuse_communication:FuseCommunicationPass",
    "overlap-communication": "passes.overlap_communication:OverlapCommunicationPass",
    "prefetch-kv": "passes.prefetch_kv:PrefetchKVPass",
    "plan-memory": "passes.plan_memory:PlanMemoryPass",
    "legalize": "lowering.legalize:LegalizePass",
    "convert-pd-to-exec": "lowering.convert_pd_to_exec:ConvertPdToExecPass",
}
_TARGET_HOMES = {
    "plan": "lowering.execution_plan:PlanTarget",
    "torch": "lowering.torch_source:TorchTarget",
}


def _lazy(home: str) -> Callable[[], Any]:
    """Loads the class at `module:Class` of sagec when it is called."""
    module, _, name = home.partition(":")
    return lambda: getattr(importlib.import_module(f"sagec.{module}"), name)


DIALECTS: dict[str, Callable[[], Dialect]] = {
    name: _lazy(home) for name, home in _DIALECT_HOMES.items()
}

PASSES: dict[str, Callable[[], type[ModulePass]]] = {
    name: _lazy(home) for name, home in _PASS_HOMES.items()
}

TARGETS: dict[str, Callable[[], type[Target]]] = {
    name: _lazy(home) for name, home in _TARGET_HOMES.items()
}

UNIVERSE = Universe(all_dialects=DIALECTS, all_passes=PASSES, all_targets=TARGETS)


def sagec_context(allow_unregistered: bool = False) -> Context:
    """A context that knows builtin and the dialects of sagec; they load at their first use."""
    context = Context(allow_unregistered=allow_unregistered)
    context.load_dialect(Builtin)
    for name, dialect in DIALECTS.items():
        context.register_dialect(name, dialect)
    return context
