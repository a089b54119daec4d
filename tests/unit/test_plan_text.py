"""Plans as text: every table has its lines, in an order that a person can follow."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import HealthCheck, given, settings

from sagec.compiler import Compiler
from sagec.passes.errors import PassError
from sagec.runtime.plan import (
    RECOMPUTE,
    SWAP,
    Chunks,
    Decodes,
    Estimates,
    Evictions,
    ExecutionPlan,
    Migrations,
    Moves,
    Preemptions,
    Reuses,
    Rows,
)
from sagec.runtime.plan_text import to_text
from tests.direct_planner import table
from tests.serving_graphs import Scene, scenes

PLAN = ExecutionPlan(
    plan_id="round_42/d0",
    round=42,
    target_instance_id="d0",
    mode="hybrid",
    num_steps=2,
    max_step_tokens=512,
    peers=("p0", "d1"),
    request_ids=("a", "b", "gone", "moved"),
    rows=table(Rows, [(600, 0, 38, 0), (80, 16, 6, 7000), (0, 0, 0, 0), (0, 0, 0, 0)]),
    chunks=table(Chunks, [(0, 0, 88, 512, 0), (0, 1, 16, 80, 1), (1, 0, 512, 600, 1)]),
    decodes=table(Decodes, [(1, 1, 96)]),
    preemptions=table(Preemptions, [(2, RECOMPUTE), (3, SWAP)]),
    reuses=table(Reuses, [(0, 88)]),
    imports=table(Moves, [(1, 0, 80)]),
    exports=table(Moves, [(0, 1, 600)]),
    evictions=table(Evictions, [(17,), (-42,)]),
    migrations=table(Migrations, [(5, 0, 1), (6, 2, 0)]),
    estimates=table(Estimates, [(120, 488, 44), (120, 89, 44)]),
)

TEXT = """\
plan "round_42/d0" round 42 instance d0 mode hybrid steps 2 budget 512
  row "a" prompt 600 computed 0 blocks 38
  row "b" prompt 80 computed 16 blocks 6 deadline 7000
  row "gone" prompt 0 computed 0 blocks 0
  row "moved" prompt 0 computed 0 blocks 0
  preempt "gone" recompute
  preempt "moved" swap
  reuse "a" tokens 88
  evict 17
  evict -42
  migrate 5 from device to host
  migrate 6 from disk to device
  import "b" from p0 tokens 80
  step 0: "a" [88, 512), "b" [16, 80) samples
  step 1: "a" [512, 600) samples
  decode "b" from 1 until 96
  export "a" to d1 tokens 600
"""


def test_every_table_has_its_lines() -> None:
    estimates = "  estimate us 120x2\n  estimate tokens 488 89\n  estimate kv_blocks 44x2\n"
    assert to_text(PLAN) == TEXT + estimates


def test_a_plan_without_estimates_says_none() -> None:
    assert to_text(msgspec.structs.replace(PLAN, estimates=Estimates())) == TEXT


def test_an_empty_plan_is_a_line() -> None:
    plan = ExecutionPlan(
        plan_id="p",
        round=0,
        target_instance_id="i",
        mode="strict",
        num_steps=0,
        max_step_tokens=8,
    )
    assert to_text(plan) == 'plan "p" round 0 instance i mode strict steps 0 budget 8\n'


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(scenes(tight=True))
def test_the_text_of_a_compiled_plan_has_a_line_for_every_row_chunk_and_move(scene: Scene) -> None:
    compiler = Compiler()
    module = compiler.parse(scene.text(), "scene.mlir").module
    try:
        compiler.optimize(module)
    except PassError:
        return
    for plan in compiler.lower(module):
        lines = [line.split()[0] for line in to_text(plan).splitlines()]
        assert lines.count("row") == len(plan.request_ids)
        assert lines.count("step") == len(np.unique(plan.chunks.step))
        assert lines.count("decode") == len(plan.decodes)
        assert lines.count("import") == len(plan.imports)
        assert lines.count("export") == len(plan.exports)
        assert lines.count("preempt") == len(plan.preemptions)
        assert to_text(plan).count(" samples") == plan.chunks.samples.sum()
