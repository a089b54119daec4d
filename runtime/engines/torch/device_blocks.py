"""KV blocks of the device as bytes, a layer after the other, for the prefix cache's other tiers."""

import numpy as np
import numpy.typing as npt
import torch

from sagec.runtime.engines.torch.rank import Rank

Bytes = npt.NDArray[np.uint8]


class TorchBlocks:
    """The blocks of an instance, whose rank 0 is `rank`."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        return self._rank.block_bytes

    def memory(self, num_blocks: int) -> Bytes:
        """Host memory, [num_blocks, block_bytes]; pinned where that makes copies faster.

        Raises MemoryError where it cannot be had.
        """
        pinned = self._rank.device.type == "cuda"
        try:
            shape = (num_blocks, self.block_bytes)
            memory = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise MemoryError(" ".join(str(error).split())) from None
        array: Bytes = memory.numpy()
        return array

    def save(self, block: int, target: Bytes) -> None:
        """Copy a block's KV into `target`, [block_bytes]."""
        self._rank.read_kv(torch.tensor([block]), self._layers(target))

    def load(self, block: int, source: Bytes) -> None:
        """Copy what `save` wrote into a block."""
        self._rank.write_kv(torch.tensor([block]), self._layers(source))

    def _layers(self, memory: Bytes) -> torch.Tensor:
        """The bytes as the block's KV, [layers, 1, *block_shape]."""
        flat = torch.from_numpy(memory).view(self._rank.model.kv[0].dtype)
        return flat.view(-1, 1, *self._rank.block_shape)
