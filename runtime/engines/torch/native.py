"""kernels.c, built with the system's C compiler when first wanted, and called through ctypes."""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch

from sagec.runtime.compiled import compiled
from sagec.runtime.engines.torch.batch import Batch
from sagec.runtime.engines.torch.checkpoint import LayerWeights
from sagec.runtime.engines.torch.config import ModelConfig
from sagec.runtime.engines.torch.kernels import TorchKernels

SOURCE = Path(__file__).parent / "kernels.c"
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-ffp-contract=fast", "-fassociative-math"),
    *("-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
ELEMENTS = {torch.float32: (), torch.bfloat16: ("-DBFLOAT16",), torch.float16: ("-DFLOAT16",)}
SHORT_TOKENS = 64
"""Spans up to this length attend token by token in C, longer ones by torch's fused attention; also
those that attend to much, see `SHORT_PAIRS`."""

_ARGUMENTS = {  # i: a 64-bit integer, p: a pointer, f: a float
    "add_norm": "ppppiif",
    "silu_multiply": "pii",
    "store_kv": "pippppppp",
    "attend": "pipppipppp",
}
_KINDS = {"i": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float}


class _Shape(ctypes.Structure):
    """`shape` of kernels.c."""

    _fields_ = (
        ("heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_tokens", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class NativeKernels:
    """The kernels in C, on one thread; attention of long chunks stays with torch.

    Raises Unbuilt where there is no compiler or it fails.
    """

    short_tokens = SHORT_TOKENS
    padded = False

    def __init__(
        self, config: ModelConfig, rope: torch.Tensor, block_tokens: int, plain: TorchKernels
    ) -> None:
        self._library = load_library(rope.dtype)
        self._plain = plain
        self._rope = rope
        self._eps = config.norm_eps
        self._width = config.heads * config.head_dim
        self._shape = _Shape(
            config.heads,
            config.kv_heads,
            config.head_dim,
            block_tokens,
            config.norm_eps,
            config.head_dim**-0.5,
        )
        self._shape_pointer = ctypes.addressof(self._shape)
        floats = config.heads * (2 * config.head_dim + 2 + block_tokens)
        self._scratch = torch.empty(floats, dtype=torch.float32)

    def begin_step(self, batch: Batch) -> None:
        """Look up what all layers of a step share."""
        self._positions = batch.positions.data_ptr()
        self._kv_slots = batch.kv_slots.data_ptr()
        self._slots = batch.slots.ctypes.data
        self._tables = batch.tables.ctypes.data

    def add_norm(
        self, hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """Add to `hidden` [T, hidden], in place; the RMS norm of the sum."""
        out = torch.empty_like(hidden)
        self._library.add_norm(
            hidden.data_ptr(),
            None if added is None else added.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            *hidden.shape,
            self._eps,
        )
        return out

    def silu_multiply(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of [T, 2 * ffn] -> [T, ffn], in the first half of the same memory."""
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        self._library.silu_multiply(gate_up.data_ptr(), rows, width)
        return gate_up.as_strided((rows, width), (width, 1))

    def store_kv(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, weights: LayerWeights
    ) -> None:
        """Turn queries and keys of `qkv` [T, (heads + 2 * kv_heads) * head_dim] in place, and put
        the KV of the batch's tokens into `kv`."""
        self._library.store_kv(
            self._shape_pointer,
            len(qkv),
            self._positions,
            self._kv_slots,
            self._rope.data_ptr(),
            None if weights.q_norm is None else weights.q_norm.data_ptr(),
            None if weights.k_norm is None else weights.k_norm.data_ptr(),
            qkv.data_ptr(),
            kv.data_ptr(),
        )

    def empty_attended(self, qkv: torch.Tensor) -> torch.Tensor:
        """Room for what attention gives of `qkv`: [T, heads * head_dim]."""
        return qkv.new_empty(len(qkv), self._width)

    def attend_tokens(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None:
        """Attention of the batch's short spans, into their rows of `out`."""
        self._library.attend(
            self._shape_pointer,
            batch.num_short,
            self._positions,
            self._slots,
            self._tables,
            batch.tables.shape[1],
            qkv.data_ptr(),
            kv.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
        )

    def attend_chunks(
        self, qkv: torch.Tensor, kv: torch.Tensor, batch: Batch, out: torch.Tensor
    ) -> None:
        """Attention of the batch's chunks, one after the other, into their rows of `out`."""
        self._plain.attend_chunks(qkv, kv, batch, out)


@functools.cache
def load_library(dtype: torch.dtype) -> Any:
    """kernels.c for `dtype`, built where the cache has no build of this source for this CPU.

    Raises Unbuilt.
    """
    path = compiled("kernels", [SOURCE], (*FLAGS, *ELEMENTS[dtype]), key=(_cpu(),))
    library: Any = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes = [_KINDS[kind] for kind in arguments]
        function.restype = None
    return library


def _cpu() -> str:
    """What a build for "native" depends on: two machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model"))))
