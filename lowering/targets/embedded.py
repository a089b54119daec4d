"""An engine that its owner steps through a Session (`sagec.runtime.embedding`); KV stays in it."""

from sagec.lowering.targets import Ability

ABILITY = Ability(
    engine="embedded",
    summary="somebody's own engine, stepped by its owner",
    kv_dtypes=("f32", "f16", "bf16", "fp8", "int8", "int4"),
    quantizations=("none", "fp8", "int8", "int4", "awq", "gptq"),
    hands_over=False,
    max_tp=1024,
    max_pp=1024,
    adapters=True,
)
