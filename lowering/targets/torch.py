"""The torch reference engine. Its ranks are processes of one host, which talk over gloo."""

from __future__ import annotations

from collections.abc import Iterator

from sagec.lowering.targets import Ability
from sagec.passes.topology import Instance


def ranks_can_share(instance: Instance) -> Iterator[str]:
    """Ranks have whole KV heads and even parts of the hidden layer, or whole experts, on CPUs."""
    model, tp = instance.model, instance.tp
    if tp > model.kv_heads:
        yield (
            f"tp {tp} is more than {model.kv_heads} KV heads, which torch does not replicate; "
            f"at most {model.kv_heads}"
        )
    shared, what = model.ffn, "columns of the hidden layer"
    if model.experts:
        shared, what = model.experts, "experts"
    if shared % tp:
        fits = ", ".join(str(n) for n in range(1, tp) if shared % n == 0)
        yield f"{shared} {what} do not split over tp {tp}; what does: {fits}"
    if tp > 1 and (kinds := {d.kind for d in instance.devices} - {"cpu"}):
        yield f"tp {tp} on {', '.join(sorted(kinds))}; torch shares a model out over kind cpu alone"


ABILITY = Ability(
    engine="torch",
    summary="reference engine of this project; Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE checkpoints",
    reshards=True,
    swaps=True,
    caches_prefixes=True,
    max_tp=8,
    instance_rules=(ranks_can_share,),
)
