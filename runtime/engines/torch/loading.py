"""From an InstanceSpec to a model with its KV: options, dtype, device."""

from pathlib import Path

import msgspec
import torch

from sagec.runtime.compiled import Unbuilt
from sagec.runtime.engines import Capability, EngineError, InstanceSpec
from sagec.runtime.engines.torch.checkpoint import load_weights
from sagec.runtime.engines.torch.config import DTYPES, ModelConfig, read_config
from sagec.runtime.engines.torch.device_blocks import TorchBlocks
from sagec.runtime.engines.torch.kernels import Kernels, TorchKernels
from sagec.runtime.engines.torch.model import Model
from sagec.runtime.engines.torch.native import NativeKernels
from sagec.runtime.engines.torch.program import Program, load_program
from sagec.runtime.engines.torch.rank import Rank
from sagec.runtime.engines.torch.rank_processes import RankProcesses
from sagec.runtime.engines.torch.residents import Residents
from sagec.runtime.engines.torch.rope import rope_table
from sagec.runtime.engines.torch.share import Share
from sagec.runtime.engines.torch.transfer import kv_layout
from sagec.runtime.kv.demotion import Always, Demotion, WhereItPays
from sagec.runtime.kv.policies import PolicyError, create
from sagec.runtime.kv.pool import BlockPool
from sagec.runtime.kv.prefix_cache import PrefixCache
from sagec.runtime.kv.prefix_index import PrefixIndex
from sagec.runtime.kv.tiers import Tiers


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `InstanceSpec.options` may say to this engine.

    native: "auto" builds the C kernels where a compiler is found, "on" insists, "off" stays in
    torch. eviction: a policy's name. host_blocks, disk_blocks: cached blocks that the device has no
    room for; the latter lie in a file in the folder `spool` ("": the system's for such files).
    migration: "always", or "where-it-pays" by what is learned of reuse and measured of copies.
    quotas: tenant=blocks, separated by commas. tp: ranks that share out the model, each a process
    with so many threads. program: a file with generated code that computes the steps; "off": the
    layers of model.py do.
    """

    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 1
    channel: str = "shared-memory"
    native: str = "auto"
    prefix_cache: str = "on"
    eviction: str = "lru"
    host_blocks: int = 0
    disk_blocks: int = 0
    spool: str = ""
    migration: str = "always"
    quotas: str = ""
    tp: int = 1
    program: str = "off"


_WORDS = {
    "native": ("auto", "on", "off"),
    "prefix_cache": ("on", "off"),
    "migration": ("always", "where-it-pays"),
}


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
    for name in ("threads", "tp"):
        if (value := getattr(options, name)) < 1:
            raise EngineError(f"{place}: {name} {value}; 1 at least")
    if options.tp > 1 and options.device != "cpu":
        raise EngineError(f"{place}: tp {options.tp} on {options.device!r}; ranks compute on cpu")
    if options.tp > 1 and options.program == "off":
        raise EngineError(
            f"{place}: tp {options.tp} without a program; the code that exchanges what ranks "
            "compute is generated: name its file as option program"
        )
    for name, words in _WORDS.items():
        if (word := getattr(options, name)) not in words:
            raise EngineError(f"{place}: {name} {word!r}; it can be {', '.join(words)}")
    for name, value in (("kv_blocks", spec.kv_blocks), ("block_tokens", spec.block_tokens)):
        if value < 1:
            raise EngineError(f"{place}: {name} {value}; 1 at least")
    for name in ("host_blocks", "disk_blocks"):
        if (value := getattr(options, name)) < 0:
            raise EngineError(f"{place}: {name} {value}; 0 (none) or more")
    return options


def load_residents(spec: InstanceSpec, options: Options) -> tuple[Residents, Capability]:
    """The model of `spec` with empty KV, on as many ranks as it says, and what it can do.

    Raises EngineError.
    """
    folder = Path(spec.model)
    config = read_config(folder)
    rank = _load_ranks(spec, options, config)
    model = rank.model
    context = _context_tokens(spec, config)
    capability = Capability(
        kv_blocks=spec.kv_blocks,
        block_tokens=spec.block_tokens,
        kv_layout=kv_layout(config, model.kv[0].dtype, spec.block_tokens, model.weights.identity),
        kv_bytes_per_token=rank.block_bytes // spec.block_tokens,
        max_context_tokens=context,
        eos_tokens=config.eos_tokens,
        caches_prefixes=options.prefix_cache == "on",
    )
    try:
        pool = BlockPool(spec.kv_blocks, spec.block_tokens, _quotas(spec, options))
        cache = _prefix_cache(spec, options, pool, rank) if capability.caches_prefixes else None
    except EngineError:
        rank.close()
        raise
    return Residents(rank, pool, context, folder, cache), capability


def load_model(spec: InstanceSpec, options: Options, share: Share) -> Model:
    """A rank's share of the model of `spec`, with empty KV. Raises EngineError."""
    whole = read_config(Path(spec.model))
    config = share.config(whole)
    device = _device(spec, options)
    program = _program(spec, options, config)
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, config.dtype if options.dtype == "auto" else options.dtype)
    weights = load_weights(Path(spec.model), whole, dtype, device, share)
    context = _context_tokens(spec, config)
    rope = rope_table(config.rope, config.head_dim, context, dtype).to(device)
    kernels = _kernels(spec, options, config, rope)
    try:
        return Model(config, weights, kernels, spec.kv_blocks, spec.block_tokens, program)
    except (RuntimeError, MemoryError) as error:
        raise EngineError(
            f"instance {spec.id!r}: no memory for {spec.kv_blocks} KV blocks "
            f"({' '.join(str(error).split())}); ask for fewer"
        ) from None


def _program(spec: InstanceSpec, options: Options, config: ModelConfig) -> Program | None:
    """The generated code for a rank that has this part of a model. Raises EngineError."""
    if options.program == "off":
        return None
    try:
        return load_program(Path(options.program), config, options.tp)
    except EngineError as error:
        raise EngineError(f"instance {spec.id!r}: {error}") from None


def _load_ranks(spec: InstanceSpec, options: Options, config: ModelConfig) -> Rank:
    """Rank 0 with its share loaded, and connected to the others, which load side by side."""
    share = Share(0, options.tp)
    if options.tp == 1:
        return Rank(load_model(spec, options, share))
    if faults := share.faults(config):
        raise EngineError(f"instance {spec.id!r}: {faults[0]}")
    others = RankProcesses(spec, options.tp, options.threads)
    try:
        model = load_model(spec, options, share)
        model.ranks = others.meet()
    except BaseException:
        others.close()
        raise
    return Rank(model, others)


def _context_tokens(spec: InstanceSpec, config: ModelConfig) -> int:
    return min(config.max_context_tokens, spec.kv_blocks * spec.block_tokens)


def _prefix_cache(spec: InstanceSpec, options: Options, pool: BlockPool, rank: Rank) -> PrefixCache:
    sizes = (spec.kv_blocks, options.host_blocks, options.disk_blocks)
    try:
        policy, *slower = (create(options.eviction, max(size, 1)) for size in sizes)
    except PolicyError as error:
        raise EngineError(f"instance {spec.id!r}: option eviction: {error}") from None
    index = PrefixIndex(policy, spec.block_tokens, slower)
    if not any(sizes[1:]):
        return PrefixCache(pool, index)
    spool = Path(options.spool) if options.spool else None
    try:
        tiers = Tiers(TorchBlocks(rank), options.host_blocks, options.disk_blocks, spool)
    except (OSError, MemoryError) as error:
        raise EngineError(
            f"instance {spec.id!r}: no place for {options.host_blocks} host_blocks and "
            f"{options.disk_blocks} disk_blocks in spool {options.spool!r}: {error}"
        ) from None
    pays = options.migration == "where-it-pays"
    demotion: Demotion = WhereItPays(tiers, spec.block_tokens) if pays else Always()
    return PrefixCache(pool, index, tiers, demotion)


def _quotas(spec: InstanceSpec, options: Options) -> dict[str, int]:
    quotas = {}
    for quota in options.quotas.split(",") if options.quotas else ():
        tenant, _, blocks = quota.partition("=")
        if not blocks.isdecimal():
            raise EngineError(
                f"instance {spec.id!r}: quotas: {quota!r}; a tenant's is like acme=40, in blocks"
            )
        quotas[tenant.strip()] = int(blocks)
    return quotas


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
