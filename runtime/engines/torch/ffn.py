"""What follows attention in a layer: one feed-forward network, or experts of which each token goes
to a few."""

from dataclasses import dataclass

import torch

from sagec.runtime.engines.torch.linear import Linear


@dataclass(frozen=True)
class FFN:
    """down(silu(gate) * up); gate and up are fused along their output."""

    gate_up: Linear  # hidden -> 2 * ffn
    down: Linear  # ffn -> hidden


@dataclass(frozen=True)
class Experts:
    """Networks of which each token goes to the `per_token` that its router finds likeliest.

    held: those of this rank, from number `first` on; router: hidden -> experts of all ranks.
    is_scaled: whether a token's shares in its experts are made to sum up to 1; else they are the
    probabilities as they were.
    """

    router: Linear
    held: tuple[FFN, ...]
    first: int
    per_token: int
    is_scaled: bool

    def routed(self, normed: torch.Tensor) -> list[tuple[FFN, torch.Tensor, torch.Tensor]]:
        """Of each expert here that a row of `normed` [T, hidden] goes to: itself, the rows [n], and
        its share in each of them [n, 1]."""
        likely = self.router(normed).softmax(dim=-1, dtype=torch.float32)
        shares, experts = likely.topk(self.per_token, dim=-1)
        if self.is_scaled:
            shares /= shares.sum(dim=-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        rows = order.div(self.per_token, rounding_mode="floor")
        of_each = shares.flatten()[order].to(normed.dtype)[:, None]
        counts = experts.flatten().bincount(minlength=likely.shape[-1]).tolist()
        parts = list(zip(torch.split(rows, counts), torch.split(of_each, counts), strict=True))
        mine = zip(self.held, parts[self.first : self.first + len(self.held)], strict=True)
        return [(expert, rows, share) for expert, (rows, share) in mine if len(rows)]
