"""KV blocks of the device as bytes, a layer after the other, for the prefix cache's other tiers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]


class TorchBlocks:
    """Blocks of `kv`, a tensor a layer, [blocks, block_tokens, 2, kv_heads, head_dim]."""

    def __init__(self, kv: Sequence[torch.Tensor]) -> None:
        self._kv = kv

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return sum(layer[0].nbytes for layer in self._kv)

    def memory(self, num_blocks: int) -> Bytes:
        """Host memory, [num_blocks, block_bytes]; pinned where that makes copies faster.

        Raises MemoryError where it cannot be had.
        """
        pinned = self._kv[0].device.type == "cuda"
        try:
            shape = (num_blocks, self.block_bytes)
            memory = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise MemoryError(" ".join(str(error).split())) from None
        array: Bytes = memory.numpy()
        return array

    def save(self, block: int, target: Bytes) -> None:
        """Copy a block's KV into `target`, [block_bytes]."""
        for layer, part in zip(self._kv, self._layers(target), strict=True):
            part.copy_(layer[block])

    def load(self, block: int, source: Bytes) -> None:
        """Copy what `save` wrote into a block."""
        for layer, part in zip(self._kv, self._layers(source), strict=True):
            layer[block].copy_(part)

    def _layers(self, memory: Bytes) -> torch.Tensor:
        """The bytes as the block's KV, [layers, block_tokens, 2, kv_heads, head_dim]."""
        first = self._kv[0]
        return torch.from_numpy(memory).view(first.dtype).view(len(self._kv), *first.shape[1:])
