"""The torch reference engine."""

from sagec.lowering.targets import Ability

ABILITY = Ability(
    engine="torch",
    summary="reference engine of this project; any Llama, Qwen2 or Qwen3 checkpoint",
    swaps=True,
    caches_prefixes=True,
)
