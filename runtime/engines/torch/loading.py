"""From an InstanceSpec to a model with its KV: options, dtype, device."""

import math
from pathlib import Path

import msgspec
import torch

from sagec.runtime.engines import Capability, EngineError, InstanceSpec
from sagec.runtime.engines.torch.checkpoint import load_weights
from sagec.runtime.engines.torch.config import DTYPES, ModelConfig, read_config
from sagec.runtime.engines.torch.kernels import Kernels, TorchKernels
from sagec.runtime.engines.torch.model import Model
from sagec.runtime.engines.torch.native import NativeKernels, Unbuilt
from sagec.runtime.engines.torch.pool import BlockPool
from sagec.runtime.engines.torch.residents import Residents
from sagec.runtime.engines.torch.rope import rope_table
from sagec.runtime.engines.torch.transfer import kv_layout


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `InstanceSpec.options` may say to this engine.

    native: "auto" builds the C kernels where a compiler is found, "on" insists, "off" stays in
    torch.
    """

    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 1
    channel: str = "shared-memory"
    native: str = "auto"


def read_options(spec: InstanceSpec) -> Options:
    """The options of `spec`. Raises EngineError where one is unknown or has no such value."""
    place = f"instance {spec.id!r}"
    known = Options.__struct_fields__
    if unknown := sorted(spec.options.keys() - set(known)):
        raise EngineError(
            f"{place}: no option {unknown[0]!r}; the torch engine has {', '.join(known)}"
        )
    try:
        options = msgspec.convert(spec.options, Options, strict=False)
    except msgspec.ValidationError as error:
        raise EngineError(f"{place}: options: {error}") from None
    if options.dtype not in ("auto", *DTYPES):
        raise EngineError(
            f"{place}: dtype {options.dtype!r}; it can be {', '.join(('auto', *DTYPES))}"
        )
    if options.threads < 1:
        raise EngineError(f"{place}: threads {options.threads}; 1 at least")
    if options.native not in ("auto", "on", "off"):
        raise EngineError(f"{place}: native {options.native!r}; it can be auto, on, off")
    for name, value in (("kv_blocks", spec.kv_blocks), ("block_tokens", spec.block_tokens)):
        if value < 1:
            raise EngineError(f"{place}: {name} {value}; 1 at least")
    return options


def load_residents(spec: InstanceSpec, options: Options) -> tuple[Residents, Capability]:
    """The model of `spec` with empty KV, and what it can do. Raises EngineError."""
    folder = Path(spec.model)
    config = read_config(folder)
    device = _device(spec, options)
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, config.dtype if options.dtype == "auto" else options.dtype)
    context = min(config.max_context_tokens, spec.kv_blocks * spec.block_tokens)
    weights = load_weights(folder, config, dtype, device)
    rope = rope_table(config.rope, config.head_dim, context, dtype).to(device)
    kernels = _kernels(spec, options, config, rope)
    try:
        model = Model(config, weights, kernels, spec.kv_blocks, spec.block_tokens)
    except (RuntimeError, MemoryError) as error:
        raise EngineError(
            f"instance {spec.id!r}: no memory for {spec.kv_blocks} KV blocks "
            f"({' '.join(str(error).split())}); ask for fewer"
        ) from None
    capability = Capability(
        kv_blocks=spec.kv_blocks,
        block_tokens=spec.block_tokens,
        kv_layout=kv_layout(config, dtype, spec.block_tokens, weights.identity),
        kv_bytes_per_token=sum(math.prod(kv.shape[2:]) * kv.element_size() for kv in model.kv),
        max_context_tokens=context,
        eos_tokens=config.eos_tokens,
    )
    pool = BlockPool(spec.kv_blocks, spec.block_tokens)
    return Residents(model, pool, context, folder), capability


def _kernels(
    spec: InstanceSpec, options: Options, config: ModelConfig, rope: torch.Tensor
) -> Kernels:
    plain = TorchKernels(config, rope)
    if options.native == "off" or (rope.device.type != "cpu" and options.native == "auto"):
        return plain
    try:
        return NativeKernels(config, rope, spec.block_tokens, plain)
    except Unbuilt as error:
        if options.native == "auto":
            return plain
        raise EngineError(f"instance {spec.id!r}: native on: {error}") from None


def _device(spec: InstanceSpec, options: Options) -> torch.device:
    try:
        return torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise EngineError(
            f"instance {spec.id!r}: device {options.device!r}: {reason}; it can be cpu, cuda"
        ) from None
