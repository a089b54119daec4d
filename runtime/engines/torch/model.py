"""The forward pass of a Llama-like decoder over one flat batch."""

import torch
import torch.nn.functional as F

from sagec.runtime.engines.torch.batch import Batch
from sagec.runtime.engines.torch.checkpoint import Weights
from sagec.runtime.engines.torch.config import ModelConfig
from sagec.runtime.engines.torch.kernels import Kernels, attention, feed_forward
from sagec.runtime.engines.torch.program import Program
from sagec.runtime.engines.torch.ranks import Ranks


class Model:
    """Weights and KV of one model; a step in, logits of the sampled tokens out.

    kv: a tensor a layer, [blocks, block_tokens, 2, kv_heads, head_dim]. Each is an allocation of
    its own: writing through views of one large tensor is many times slower. ranks: how this rank
    reaches the others, which its program does; None where the model is in one piece. Config,
    weights and KV are of a rank.
    program: generated code that computes the steps; None: the layers that are written here do.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kernels: Kernels,
        num_blocks: int,
        block_tokens: int,
        program: Program | None = None,
    ) -> None:
        self.config = config
        self.weights = weights
        self.kernels = kernels
        self.ranks: Ranks | None = None
        self.program = program
        shape = (num_blocks, block_tokens, 2, config.kv_heads, config.head_dim)
        embedding = weights.embedding
        self.kv = [
            torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
            for _ in range(config.layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [S, vocab] of the tokens that `batch.sampled` names; KV is written on the way."""
        kernels, weights = self.kernels, self.weights
        if self.program is not None:
            compute = self.program.function(batch)
            return compute(weights, kernels, self.kv, batch, self.ranks)
        kernels.begin_step(batch)
        hidden = F.embedding(batch.tokens, weights.embedding)
        added = None
        for layer, kv in zip(weights.layers, self.kv, strict=True):
            qkv = layer.qkv(kernels.add_norm(hidden, added, layer.norm))
            attended = layer.output(attention(kernels, qkv, kv, batch, layer))
            normed = kernels.add_norm(hidden, attended, layer.ffn_norm)
            added = feed_forward(kernels, normed, layer.ffn)
        if added is not None:
            added = added[batch.sampled]
        return weights.lm_head(kernels.add_norm(hidden[batch.sampled], added, weights.norm))
