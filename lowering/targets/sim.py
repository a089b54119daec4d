"""The simulator: it computes nothing, so it refuses nothing that could be computed."""

from sagec.lowering.targets import Ability

ABILITY = Ability(
    engine="sim",
    summary="predicts times, computes no tokens",
    kv_dtypes=("f32", "f16", "bf16", "fp8", "int8", "int4"),
    quantizations=("none", "fp8", "int8", "int4", "awq", "gptq"),
    reshards=True,
    swaps=True,
    caches_prefixes=True,
    max_tp=1024,
    max_pp=1024,
    samples=1024,
    adapters=True,
    drafts=True,
)
