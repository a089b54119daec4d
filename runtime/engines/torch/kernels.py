"""What a step does between its matrix products, in torch: any device, and what C must equal.

A layer's KV is one tensor [blocks, block_tokens, 2, kv_heads, head_dim], so that the key and the
value of a token lie together, as the fused projection computes them, and are stored in one copy.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from sagec.runtime.engines.torch.batch import Batch, Bucket, Chunk
from sagec.runtime.engines.torch.checkpoint import LayerWeights
from sagec.runtime.engines.torch.config import ModelConfig
from sagec.runtime.engines.torch.ffn import FFN, Experts


class Kernels(Protocol):
    """What the model needs beside matrix products.

    short_tokens: spans of at most so many tokens attend token by token; padded: whether these need
    the batch's buckets. The methods are those of TorchKernels.
    """

    short_tokens: int
    padded: bool

    def begin_step(self, batch: Batch) -> None: ...
    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor: ...
    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor: ...
    def store_kv(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, weights: LayerWeights
    ) -> None: ...
    def attend_tokens(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None: ...
    def attend_chunks(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None: ...
    def empty_attended(self, qkv: torch.Tensor) -> torch.Tensor: ...


def attention(
    kernels: Kernels, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, weights: LayerWeights
) -> torch.Tensor:
    """Attention of one layer: [T, (heads + 2 * kv_heads) * head_dim] -> [T, heads * head_dim].

    The KV of the batch's tokens is in `kv` afterwards; `qkv` is changed.
    """
    kernels.store_kv(qkv, kv, batch, weights)
    out = kernels.empty_attended(qkv)
    kernels.attend_tokens(qkv, kv, batch, out)
    kernels.attend_chunks(qkv, kv, batch, out)
    return out


def feed_forward(kernels: Kernels, normed: torch.Tensor, ffn: FFN | Experts) -> torch.Tensor:
    """What a layer's network, or its experts of this rank, make of [T, hidden]: the same shape."""
    if isinstance(ffn, FFN):
        return ffn.down(kernels.silu_multiply(ffn.gate_up(normed)))
    added = torch.zeros_like(normed)
    for expert, rows, share in ffn.routed(normed):
        added.index_add_(0, rows, feed_forward(kernels, normed[rows], expert).mul_(share))
    return added


class TorchKernels:
    """Plain torch, one operation after the other."""

    short_tokens = 1
    padded = True

    def __init__(self, config: ModelConfig, rope: torch.Tensor) -> None:
        self._config = config
        self._cos, self._sin = rope.chunk(2, dim=-1)
        self._scale = config.head_dim**-0.5

    def begin_step(self, batch: Batch) -> None:
        """Look up what all layers of a step share."""
        self._step_cos = self._cos[batch.positions, None, :]
        self._step_sin = self._sin[batch.positions, None, :]

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """Add to `hidden` [T, hidden], in place; the RMS norm of the sum."""
        if added is not None:
            hidden += added
        return F.rms_norm(hidden, weight.shape, weight, self._config.norm_eps)

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * ffn] -> [T, ffn]; `gate_up` may be changed."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def store_kv(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, weights: LayerWeights
    ) -> None:
        """Turn queries and keys of `qkv` [T, (heads + 2 * kv_heads) * head_dim] in place, and put
        the KV of the batch's tokens into `kv`."""
        config = self._config
        heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
        states = qkv.view(-1, heads + 2 * kv_heads, head_dim)
        queries, keys = states[:, :heads], states[:, heads : heads + kv_heads]
        if weights.q_norm is not None and weights.k_norm is not None:
            queries = F.rms_norm(queries, (head_dim,), weights.q_norm, config.norm_eps)
            keys = F.rms_norm(keys, (head_dim,), weights.k_norm, config.norm_eps)
        states[:, :heads] = self._turn(queries)
        states[:, heads : heads + kv_heads] = self._turn(keys)
        kv.view(-1, 2, kv_heads, head_dim).index_copy_(
            0, batch.kv_slots, states[:, heads:].reshape(-1, 2, kv_heads, head_dim)
        )

    def empty_attended(self, qkv: torch.Tensor) -> torch.Tensor:
        """Room for what attention gives of `qkv`: [T, heads * head_dim]."""
        return qkv.new_empty(len(qkv), self._config.heads * self._config.head_dim)

    def attend_tokens(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None:
        """Attention of the batch's short spans, into their rows of `out`."""
        queries, attended = self._queries(qkv), self._by_head(out)
        for bucket in batch.buckets:
            attended[bucket.tokens] = self._attend_bucket(queries[bucket.tokens], kv, bucket)

    def attend_chunks(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None:
        """Attention of the batch's chunks, one after the other, into their rows of `out`."""
        for chunk in batch.chunks:
            attended = self._attend_chunk(qkv[chunk.first : chunk.last], kv, chunk)
            out[chunk.first : chunk.last].view(attended.shape).copy_(attended)
            del attended  # before there is that of the next

    def _attend_chunk(self, qkv: torch.Tensor, kv: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """What a chunk's rows attend: [n, kv_heads, heads of each, head_dim]."""
        keys, values = self._for_groups(self._kv_of(chunk, qkv, kv).permute(1, 2, 0, 3))
        asked = self._in_groups(self._queries(qkv)).permute(1, 2, 0, 3)
        mask = self._mask(chunk, qkv) if chunk.begin else None
        attended = F.scaled_dot_product_attention(
            asked, keys, values, mask, is_causal=mask is None, scale=self._scale
        )
        return attended.permute(2, 0, 1, 3)

    def _kv_of(self, chunk: Chunk, qkv: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """KV that a chunk attends to, [context, 2, kv_heads, head_dim]: a copy out of its blocks,
        or where it begins its request simply what the step computed."""
        if chunk.begin:
            return kv.index_select(0, chunk.blocks).flatten(0, 1)[: chunk.context]
        states = self._by_head(qkv)[:, self._config.heads :]
        return states.view(len(states), 2, self._config.kv_heads, self._config.head_dim)

    def _mask(self, chunk: Chunk, like: torch.Tensor) -> torch.Tensor:
        """What to add to a chunk's scores [tokens, context]: each attends up to itself."""
        scores = like.new_full((len(like), chunk.context), float("-inf"))
        return scores.triu_(chunk.begin + 1)

    def _queries(self, qkv: torch.Tensor) -> torch.Tensor:
        """The queries [T, heads, head_dim] in `qkv`."""
        return self._by_head(qkv)[:, : self._config.heads]

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        """[T, n * head_dim] -> [T, n, head_dim]."""
        head_dim = self._config.head_dim  # -1 would say nothing where there are no rows
        return states.view(len(states), states.shape[1] // head_dim, head_dim)

    def _attend_bucket(
        self, queries: torch.Tensor, kv: torch.Tensor, bucket: Bucket
    ) -> torch.Tensor:
        """A token a request, so that the heads of a group can stand where tokens would."""
        count = len(bucket.tokens)
        states = kv.index_select(0, bucket.blocks).view(count, -1, *kv.shape[2:])
        keys, values = states.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            self._in_groups(queries), keys, values, bucket.mask, scale=self._scale
        )
        return attended.flatten(1, 2)

    def _in_groups(self, queries: torch.Tensor) -> torch.Tensor:
        """[n, heads, head_dim] -> [n, kv_heads, heads of each, head_dim]."""
        return queries.reshape(len(queries), self._config.kv_heads, -1, self._config.head_dim)

    def _for_groups(self, states: torch.Tensor) -> torch.Tensor:
        """[2, kv_heads, context, head_dim] -> the same for each head of a group, without a copy."""
        group = self._config.heads // self._config.kv_heads
        return states[:, :, None].expand(-1, -1, group, -1, -1)

    def _turn(self, states: torch.Tensor) -> torch.Tensor:
        """Rotate [T, heads, head_dim] by the angles of the step's positions."""
        left, right = states.chunk(2, dim=-1)
        cos, sin = self._step_cos, self._step_sin
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
