"""What a step costs, in closed form: the roofline of a model on a device.

A step computes some tokens. Each passes through all weights (two operations a parameter), attends
to the tokens before it, and each request's KV is read once; the weights are read once a step. The
time is the larger of arithmetic and memory traffic, and a fixed overhead. Tensor parallelism
divides both by the ranks. Microseconds; arrays welcome everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

STEP_OVERHEAD_US = 100.0
"""Launches, sampling and bookkeeping of a step, where nothing was measured."""


@dataclass(frozen=True)
class StepCost:
    """The time of a step of one instance, from the numbers of its model and devices.

    flops_per_token: of the weights. flops_per_pair: attention of one token to one other, in all
    layers. flops_per_s, bytes_per_s: of all ranks together.
    """

    flops_per_token: float
    flops_per_pair: float
    weight_bytes: float
    kv_bytes_per_token: float
    flops_per_s: float
    bytes_per_s: float
    overhead_us: float = STEP_OVERHEAD_US

    def step_us(
        self, tokens: npt.ArrayLike, pairs: npt.ArrayLike, context_tokens: npt.ArrayLike
    ) -> Floats:
        """A step of `tokens` new tokens that attend to `pairs` tokens in sum over `context_tokens`
        tokens of KV.

        >>> cost = StepCost(2e9, 0.0, 2e9, 1e5, 1e15, 1e12)
        >>> float(cost.step_us(1, 100, 100).round())  # the weights' 2 GB at 1 TB/s
        2110.0
        """
        flops = np.multiply(tokens, self.flops_per_token) + np.multiply(pairs, self.flops_per_pair)
        moved = self.weight_bytes + np.multiply(context_tokens, self.kv_bytes_per_token)
        return self.overhead_us + 1e6 * np.maximum(
            flops / self.flops_per_s, moved / self.bytes_per_s
        )

    def one_step_us(self, tokens: int, pairs: float, context_tokens: float) -> float:
        """`step_us` of plain numbers, without numpy's overhead."""
        flops = tokens * self.flops_per_token + pairs * self.flops_per_pair
        moved = self.weight_bytes + context_tokens * self.kv_bytes_per_token
        return self.overhead_us + 1e6 * max(flops / self.flops_per_s, moved / self.bytes_per_s)

    def prefill_us(self, begin: npt.ArrayLike, end: npt.ArrayLike) -> Floats:
        """Arithmetic of the prompt tokens [begin, end) alone: what they add to a step."""
        begin, end = np.asarray(begin, np.float64), np.asarray(end, np.float64)
        pairs = (end * (end + 1) - begin * (begin + 1)) / 2
        flops = (end - begin) * self.flops_per_token + pairs * self.flops_per_pair
        return np.asarray(1e6 * flops / self.flops_per_s)

    def decode_us(self, context_tokens: npt.ArrayLike) -> Floats:
        """What a request of `context_tokens` tokens of KV adds to a decode step."""
        context = np.asarray(context_tokens, np.float64)
        flops = (self.flops_per_token + context * self.flops_per_pair) / self.flops_per_s
        moved = context * self.kv_bytes_per_token / self.bytes_per_s
        return np.asarray(1e6 * np.maximum(flops, moved))
