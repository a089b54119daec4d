"""The echo engine: tokens that are a pure function of the tokens before."""

from sagec.lowering.targets import Ability

ABILITY = Ability(
    engine="echo",
    summary="toy engine that checks the plans it is given",
    swaps=True,
    caches_prefixes=True,
)
