"""Which part of a model each tensor parallel rank holds.

Queries, keys, values, gate and up are divided by output, so that a rank has whole heads and a part
of the hidden layer; attention's output and down by input, so that their products sum up over the
ranks; the rows of the output head by token. Embedding and norms are whole on each rank, and so are
experts, which the ranks divide up, and the router.
"""

from dataclasses import dataclass

import msgspec
import torch

from sagec.runtime.engines.torch.config import ModelConfig

_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUT = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Share:
    """The part of rank `rank` of `size`.

    >>> Share(1, 2).tensor("model.layers.0.mlp.up_proj.weight", torch.arange(4)).tolist()
    [2, 3]
    """

    rank: int
    size: int

    def faults(self, config: ModelConfig) -> list[str]:
        """Why the model does not split over so many ranks; empty where it does."""
        counts = {
            "heads": config.heads,
            "KV heads": config.kv_heads,
        }
        if config.experts:
            counts["experts"] = config.experts
        else:
            counts["columns of the hidden layer"] = config.ffn
        return [
            f"{count} {name} do not split over tp {self.size}; what does: {_divisors(count)}"
            for name, count in counts.items()
            if count % self.size
        ]

    def config(self, config: ModelConfig) -> ModelConfig:
        """The shape of the rank's part of a model without faults; hidden and vocab are whole."""
        return msgspec.structs.replace(
            config,
            heads=config.heads // self.size,
            kv_heads=config.kv_heads // self.size,
            ffn=config.ffn if config.experts else config.ffn // self.size,
            experts=config.experts // self.size,
        )

    def experts(self, config: ModelConfig) -> range:
        """The numbers of the rank's experts, of a whole model without faults."""
        count = config.experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def adds_bias(self) -> bool:
        """Whether this rank adds the biases of products that sum up over the ranks: one does."""
        return self.rank == 0

    def tensor(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of the checkpoint's tensor `name`."""
        if self.size == 1 or ".experts." in name:
            return whole
        layer, kind = name.split(".")[-2:]
        if layer in _BY_OUTPUT:
            return self._part(whole, 0)
        if layer in _BY_INPUT and kind == "weight":
            return self._part(whole, 1)
        if layer == "lm_head":
            return self._rows(whole)
        return whole

    def _part(self, whole: torch.Tensor, axis: int) -> torch.Tensor:
        return whole.chunk(self.size, dim=axis)[self.rank]

    def _rows(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's rows; zeros follow the last where they do not divide evenly."""
        count = -(-len(whole) // self.size)
        rows = whole[self.rank * count : (self.rank + 1) * count]
        return torch.nn.functional.pad(rows, (0, 0, 0, count - len(rows)))


def _divisors(count: int) -> str:
    return ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
