"""A request on this instance: its tokens, and how many of them have KV here."""

from dataclasses import dataclass

import torch

from sagec.runtime.kv.prefix_cache import Prefix
from sagec.runtime.row import RequestRow


@dataclass(slots=True, eq=False, kw_only=True)
class Row(RequestRow):
    """One resident request.

    Its KV is in the blocks of pool slot `slot` or, while swapped out, in `host_kv`, as
    `Rank.read_kv` gives it. prefix: its blocks in the prefix cache. started: whether it has
    computed tokens, or told of those found; before, it may lose what it found.
    """

    slot: int
    draw_key: str
    prefix: Prefix
    host_kv: torch.Tensor | None = None
    started: bool = False

    @property
    def pending(self) -> int:
        """Tokens to compute before the next can be sampled: 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether the next token takes a decode, its prompt being computed."""
        return self.num_output > 0 and self.pending == 1

    @property
    def draws(self) -> bool:
        """Whether its tokens are drawn, and not simply the likeliest."""
        return self.request.sampling.temperature > 0
