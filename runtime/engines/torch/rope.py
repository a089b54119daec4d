"""Rotary position embedding: the angles of every position, once, when a model is loaded."""

import math

import torch

from sagec.runtime.engines.torch.config import Rope


def rope_table(rope: Rope, head_dim: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines of the first `tokens` positions, [tokens, head_dim]: cos | sin.

    The two halves of a head turn as pairs (i, i + head_dim / 2), so half a head has all angles.
    Angles are computed in float32, then rounded to `dtype`, as the models were trained.
    """
    frequencies = _frequencies(rope, head_dim)
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * frequencies[None, :]
    scale = _yarn_scale(rope) if rope.kind == "yarn" else 1.0
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1).to(dtype)


def _frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a token of each pair, [head_dim / 2], fastest first."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, exponents, head_dim)
    return base


def _llama3(rope: Rope, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves slow down by `factor`, short ones stay, those between are blended."""
    turns = rope.original_tokens * base / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * base / rope.factor + kept * base


def _yarn(rope: Rope, exponents: torch.Tensor, head_dim: int) -> torch.Tensor:
    """YaRN (arXiv 2309.00071): as llama3, but the blend is linear in the pair's number."""

    def pair_of(turns: float) -> float:
        """The pair that turns `turns` times over the original context."""
        longest = rope.original_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(longest) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # a step where the two coincide
    slowed = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    slowed = slowed.clamp(0, 1)
    waves = rope.theta**exponents
    return slowed / (rope.factor * waves) + (1 - slowed) / waves


def _yarn_scale(rope: Rope) -> float:
    """What multiplies cosines and sines, so that attention stays as sharp when stretched."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
