"""Matrix products with weights, packed once into the layout that the CPU's kernels read."""

import torch
import torch.nn.functional as F

PACKED_FOR_ROWS = 32
"""The number of rows that the layout is chosen for; measured, it is good from 1 to 2048."""


class Linear:
    """x @ weight.T + bias.

    On a CPU, oneDNN's packed layout, which torch's compiler uses too, is 1.1 to 2.5 times as fast
    as the plain one where few rows are multiplied. Only one of the two is kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        packed = _packed(weight)
        self._weight = weight if packed is None else packed
        self._is_packed = packed is not None
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, inputs] -> [n, outputs]."""
        if not self._is_packed:
            return F.linear(x, self._weight, self._bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return product


def _packed(weight: torch.Tensor) -> torch.Tensor | None:
    """The weight in oneDNN's layout; None where this torch, device, dtype or CPU has none."""
    operators = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if weight.device.type != "cpu" or not all(hasattr(operators, name) for name in names):
        return None
    try:
        packed: torch.Tensor = operators._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    except RuntimeError:  # it asks for instructions that this CPU lacks, e.g. for float16
        return None
    return packed
