"""vLLM, version 1 of its engine.

Hand-over needs equal tp on both sides here: its connectors hang or corrupt where it differs and
the KV heads do not divide (vLLM 50765, 45330, 43523).
"""

from sagec.lowering.targets import Ability

ABILITY = Ability(
    engine="vllm",
    summary="vLLM's V1 engine, through its scheduler interface",
    block_tokens=(8, 16, 32, 64, 128),
    kv_dtypes=("fp8",),
    quantizations=("none", "fp8", "int8", "int4", "awq", "gptq"),
    caches_prefixes=True,
    max_tp=64,
    max_pp=64,
    samples=1024,
    adapters=True,
    drafts=True,
)
