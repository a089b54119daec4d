"""The next token of each request, from its logits, its sampling and nothing else.

A draw is keyed by the request's seed and the token's position in prompt and output, so it does not
depend on the batch, on preemption or on the instance, nor on a restart that sends the output so far
as part of the prompt. A request without a seed is keyed by its id: computed again, on whichever
instance, it gives the same tokens again.
"""

import hashlib
from collections.abc import Sequence

import torch

from sagec.runtime.request import Request, Sampling


def draw_key(request: Request) -> str:
    """What the request's draws are keyed by."""
    seed = request.sampling.seed
    return f"id {request.id}" if seed is None else f"seed {seed}"


def draw(key: str, position: int) -> float:
    """A number in [0, 1), the same for the same key and position.

    >>> draw("seed 1", 0) == draw("seed 1", 0) != draw("seed 1", 1)
    True
    """
    digest = hashlib.blake2b(f"{key} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[float]
) -> list[int]:
    """A token for each row of `logits` [n, vocab]; draws, in [0, 1), count where not greedy."""
    logits = logits.float()  # in bfloat16 the argmax takes six times as long
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if rows:
        drawn = _draw_tokens(
            logits[rows], [samplings[row] for row in rows], [draws[row] for row in rows]
        )
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def probabilities(
    logits: torch.Tensor, samplings: Sequence[Sampling]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, k] of the k likeliest tokens and their ids, likeliest first.

    temperature first, then top_k, then top_p: the smallest set whose probability reaches it. What
    is cut has weight 0; the rest is not yet scaled to a sum of 1.
    """
    vocab = logits.shape[-1]
    kept = max(s.top_k or vocab for s in samplings)
    temperature = logits.new_tensor([s.temperature for s in samplings])
    top_k = logits.new_tensor([s.top_k or vocab for s in samplings])
    top_p = logits.new_tensor([s.top_p for s in samplings], dtype=torch.float64)
    if kept < vocab:
        values, ids = logits.topk(kept, dim=-1)
    else:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
    values = (values - values[:, :1]) / temperature[:, None]
    ranks = torch.arange(values.shape[-1], device=logits.device)
    values = values.masked_fill(ranks >= top_k[:, None], float("-inf"))
    weights = values.double().softmax(dim=-1)
    before = weights.cumsum(dim=-1) - weights
    return weights.masked_fill((before >= top_p[:, None]) & (ranks > 0), 0.0), ids


def _draw_tokens(
    logits: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[float]
) -> list[int]:
    weights, ids = probabilities(logits, samplings)
    reached = weights.cumsum(dim=-1)
    target = reached.new_tensor(draws)[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, target, right=True)
    last = (weights > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not pass the last one
    tokens: list[int] = ids.gather(1, torch.minimum(chosen, last))[:, 0].tolist()
    return tokens
